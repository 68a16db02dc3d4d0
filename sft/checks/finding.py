"""The result of a check, and how a training stops for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sft.core.errors import RunError, UserError

Result = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    result: Result
    found: str
    advice: str = ""
    of_input: bool = False
    """Whether a failure is the user's input: `UserError` stops a training then, else `RunError`."""


def raise_failed(findings: Iterable[Finding]) -> None:
    """Stop for the first check that failed, if any did, with UserError where the user's input is wrong, else
    RunError."""
    for finding in findings:
        if finding.result == "failed":
            kind = UserError if finding.of_input else RunError
            raise kind(line_of(finding))


def line_of(finding: Finding) -> str:
    """Return `name: what was found; what to do`."""
    return f"{finding.name}: {finding.found}" + (f"; {finding.advice}" if finding.advice else "")
