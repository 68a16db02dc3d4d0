"""`idefics-sft tasks list|show`: the benchmarks that `evaluate`, `select` and `leaks` take."""

import inspect
from typing import Annotated

import typer

from sft.cli.terminal import WIDTH, Json, console, examples, folded, print_json, table

EXAMPLES = ("tasks list", "tasks show vqav2")
app = typer.Typer(help="List the benchmarks, or show what one needs and how it is evaluated.", no_args_is_help=True)


@app.command(name="list", epilog=examples(EXAMPLES[:1]))
def list_(json: Json = False) -> None:
    """List the tasks: what is scored, how they are asked, and their splits."""
    from sft.evaluation.tasks import task_names, task_type

    found = [(name, task_type(name)) for name in task_names()]
    if json:
        print_json([{"name": n, "metric": t.metric.name, "how": t.how, "splits": list(t.splits)} for n, t in found])
        return
    lines = [(name, task.metric.name, ", ".join(task.splits)) for name, task in found]
    console().print(table("tasks", ("name", "metric", "splits, the default first"), lines))


@app.command(epilog=examples(EXAMPLES[1:]))
def show(name: Annotated[str, typer.Argument(metavar="TASK", help="One of `tasks list`.")]) -> None:
    """Print what a task needs and how it is evaluated."""
    from sft.evaluation.questions import Questions
    from sft.evaluation.tasks import task_module, task_type

    task = task_type(name)
    about = (inspect.getdoc(task_module(name)) or "").split("\n\n")
    # A paragraph with columns keeps its lines.
    about = [folded(paragraph, WIDTH, 0) if "  " not in paragraph else paragraph for paragraph in about]
    splits = f"; splits {', '.join(task.splits)}" if task.splits else ""
    console().print("\n\n".join(about))
    prompts = f"; prompts {', '.join(task.prompts)}" if issubclass(task, Questions) else ""
    copies = "; copies of the hub or VLMEvalKit are read too" if issubclass(task, Questions) and task.has_copies else ""
    more = f"metric {task.metric.name}; evaluated by: {task.how}{splits}{prompts}{copies}"
    console().print(f"\n{folded(more, WIDTH, 0)}")
