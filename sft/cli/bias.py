"""`idefics-sft bias MODEL`: what a model writes about people, compared between groups of them."""

from collections import Counter
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import typer

from sft.cli.several import Nproc, start
from sft.cli.terminal import Json, console, notes, print_json, progress, quiet_libraries

EXAMPLES = ("bias runs/my-data --data fairface --limit 2000", "bias --generations generations.jsonl")


def run(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder, a hub id, RUN or RUN@STEP.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of FairFace, or the parquet of Stable Bias.")] = None,
    layout: Annotated[Literal["fairface", "stable_bias"] | None, typer.Option(help="Left out, the files tell.")] = None,
    generations: Annotated[Path | None, typer.Option(help="Texts that are there, in place of a model.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="resume, dating, arrest, or a column; else all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, drawn at random.")] = None,
    toxicity_model: Annotated[Path | None, typer.Option(help="The folder of a text classifier.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For the texts, figures and page.")] = None,
    nproc: Nproc = 1,
    json: Json = False,
) -> None:
    """Let a model write a resume, a dating profile and an arrest report of people in images, as the model card does,
    and find terms that differ between groups of people more than chance explains. A run that was killed goes on."""
    from sft.core.distributed import process_group
    from sft.core.errors import UserError
    from sft.core.files import write_atomically
    from sft.evaluation.bias import generations as bias
    from sft.evaluation.bias.study import load_scorer, page_of, study
    from sft.evaluation.bias.terms import ALPHA, PERMUTATIONS
    from sft.evaluation.task import TOO_LONG
    from sft.runs.names import find_model

    source = data or generations
    if source is None or (model is None) == (generations is None) or (generations and (limit or nproc > 1)):
        raise UserError("bias needs MODEL and --data PATH, or --generations FILE without --limit and --nproc")
    asked = prompt or list(bias.PROMPTS)
    if model and not bias.PROMPTS.keys() >= set(asked):
        raise UserError(f"--prompt {' '.join(asked)}: expected some of {', '.join(bias.PROMPTS)}")
    if nproc > 1:
        start(context)
    quiet_libraries()
    skipped, out, path = Counter[str](), console(to_stderr=json), find_model(model) if model else ""
    file = generations or (output or Path("bias", Path(path).name)) / "generations.jsonl"
    scorer = load_scorer(toxicity_model) if toxicity_model else None
    with process_group() as process:
        out.quiet = not process.is_main
        people = bias.read_people(source, skipped if model else Counter(), layout, limit)
        if model:
            if not people:
                raise UserError(f"{source}: no image can be read: {', '.join(skipped) or 'there is none'}")
            file.parent.mkdir(parents=True, exist_ok=True)
            with progress("generating", len(asked) * len(people), out) as update:
                skipped[TOO_LONG] += bias.write_texts(path, people, asked, file, update)
    if not process.is_main:
        return
    texts = bias.read_texts(file, asked if model else prompt or (), Counter() if model else skipped)
    if model:  # the file may have texts about others, of a run without --limit
        texts = {name: [one for one in every if one.image in people] for name, every in texts.items()}
    prompts = {}
    for name, every in texts.items():
        notes(json).print(f"testing {name}: {len(every):,} texts")
        prompts[name] = study(every, scorer)
    summary = {
        "model": str(path or file),
        "data": str(source),
        "images": len({one.image for every in texts.values() for one in every}),
        "skipped": dict(+skipped),
        "permutations": PERMUTATIONS,
        "alpha": ALPHA,
        "toxicity_model": str(toxicity_model) if toxicity_model else None,
        "prompts": prompts,
    }
    folder = output or file.parent
    write_atomically(folder / "bias.json", dumps(summary, indent=1))
    write_atomically(folder / "bias.html", page_of(summary, texts, people))
    if json:
        return print_json(summary)
    for name, axis, by in ((name, *own) for name, one in prompts.items() for own in one["by"].items()):
        findings = [f"{line['term']} (most for {line['most']})" for line in by["terms"] if line["is_finding"]]
        out.print(f"{name} by {axis}: {', '.join(findings) or 'no term differs more than chance explains'}")
    for reason, number in (+skipped).items():
        out.print(f"{number:,} left out: {reason}")
    out.print(f"{folder / 'bias.html'} has the figures, examples, and the card's lists, which are not tested")
