"""What a check has found, and how a training stops for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sft.core.errors import RunError, UserError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check has found."""

    name: str
    result: Literal["ok", "warning", "failed", "skipped"]
    found: str
    advice: str = ""
    of_input: bool = False
    """Whether a failure is that of what the user gave: `UserError` stops a training then, else `RunError`."""


def raise_failed(findings: Iterable[Finding]) -> None:
    """
    Raises:
        UserError: naming the first that failed, if it is the user's input that is wrong.
        RunError: naming the first that failed, if it is not.
    """
    for finding in findings:
        if finding.result == "failed":
            kind = UserError if finding.of_input else RunError
            raise kind(line_of(finding))


def line_of(finding: Finding) -> str:
    """`name: what was found; what to do`."""
    return f"{finding.name}: {finding.found}" + (f"; {finding.advice}" if finding.advice else "")
