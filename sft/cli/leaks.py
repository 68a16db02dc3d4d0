"""`idefics-sft leaks TSV STORE...`: images of a benchmark that are in prepared datasets."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, console, folded, percent, print_json, progress, table
from sft.core.errors import printable

NUM_SHOWN = 20
"""Leaks that are listed; --json has all of them."""
EXAMPLES = ("leaks mmbench_dev_en.tsv stores/llava_instruct-1a2b3c4d",)


def run(
    benchmark: Annotated[
        str, typer.Argument(metavar="TSV", help="A benchmark of MMBench layout, or the data of the task.")
    ],
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders of prepared datasets.")],
    task: Annotated[str | None, typer.Option(metavar="TASK", help="One of `tasks list`.")] = None,
    split: Annotated[str | None, typer.Option(help="The part of the benchmark.")] = None,
    num_proc: Annotated[int, typer.Option(min=1, help="Processes that work side by side.")] = 1,
    json: Json = False,
) -> None:
    """Find the images of a benchmark in prepared datasets: the same bytes, or the same picture scaled or compressed."""
    from sft.data.store import Store
    from sft.evaluation import leaks
    from sft.evaluation.tasks import named_tasks, open_tasks
    from sft.recipe import EvaluationConfig

    leaks.check_imagehash()
    out = console(to_stderr=json)
    opened = [Store(path) for path in stores]  # a wrong one is told before hours of work on the others
    settings = EvaluationConfig(benchmark=benchmark, by=task, split=split, protocol="card")  # asks every row of a TSV
    shown = leaks.benchmark_images(*open_tasks(named_tasks(settings), settings, Path("stores")))
    found = []
    for store in opened:
        with progress(f"comparing {printable(store.path)}", store.num_images, out) as update:
            found.append(leaks.find_leaks(shown, store.path, num_proc=num_proc, on_progress=update))
    summary = leaks.summary(benchmark, shown, found)
    if json:
        print_json(summary)
    else:
        show(summary, out)


def show(summary: dict[str, Any], out: Console) -> None:
    """Print counts by store, then the leaks themselves."""
    rows = [
        (printable(store["store"]), *(f"{store[key]:,}" for key in ("images", "by_content", "by_sight", "unreadable")))
        for store in summary["stores"]
    ]
    title = f"{printable(summary['benchmark'])}: {summary['images']:,} images, {summary['questions']:,} questions"
    out.print(table(title, ("store", "images", "by bytes", "by sight", "unreadable"), rows))
    share = percent(summary["leaked_questions"] / max(summary["questions"], 1))
    out.print(f"{summary['leaked_images']:,} images are in them; {summary['leaked_questions']:,} questions ({share})")
    if summary["images_without_features"]:
        out.print(f"{summary['images_without_features']:,} images without features were compared by their bytes only")
    every = [(store["store"], leak) for store in summary["stores"] for leak in store["leaks"]]
    for store, leak in every[:NUM_SHOWN]:
        how = "same bytes" if leak["by"] == "content" else f"same picture ({leak['distance']} bits differ)"
        questions, samples = (", ".join(map(str, leak[key][:3])) for key in ("questions", "samples"))
        where = f"image {leak['row']} of {printable(Path(store).name)}, in {printable(samples)}"
        out.print(folded(f"question {questions}: {how} as {where}", out.width))
    if len(every) > NUM_SHOWN:
        out.print(f"and {len(every) - NUM_SHOWN:,} more; --json names all of them")
