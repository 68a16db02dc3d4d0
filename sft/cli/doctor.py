"""`idefics-sft doctor`: checks that everything is here that training takes for granted."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sft.cli.terminal import Json, console, folded, print_json, quiet_libraries

if TYPE_CHECKING:
    from sft.checks.finding import Finding
EXAMPLES = ("doctor", "doctor --model runs/my-data@100")


def run(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Check this model too: a folder, a hub id, RUN or RUN@STEP.")
    ] = None,
    json: Json = False,
) -> None:
    """Check this machine and, with --model, a model. Exit status 1 if a check failed."""
    from sft.runs.names import find_model

    path = None if model is None else find_model(model)
    quiet_libraries()
    out = console(to_stderr=json)
    findings = []
    for finding in _findings(path):
        findings.append(finding)
        advice = f"  -> {finding.advice}" if finding.advice and finding.result != "ok" else ""
        out.print(folded(f"{finding.result:<8} {finding.name:<28} {finding.found}{advice}", out.width, 38))
    failed = sum(finding.result == "failed" for finding in findings)
    if json:
        kept = ("name", "result", "found", "advice")
        print_json({"failed": failed, "checks": [{key: asdict(f)[key] for key in kept} for f in findings]})
    if failed:
        raise typer.Exit(1)


def _findings(path: Path | str | None) -> "Iterator[Finding]":
    from sft.checks.environment import environment
    from sft.checks.finding import Finding
    from sft.checks.model import check_model
    from sft.checks.subject import load_subject
    from sft.core.errors import UserError

    yield from environment(Path.cwd())
    if path is None:
        return
    try:
        subject = load_subject(path)
    except UserError as error:
        yield Finding("model loads", "failed", str(error))
        return
    yield Finding("model loads", "ok", f"{path}, in {subject.precision}")
    yield from check_model(subject)
