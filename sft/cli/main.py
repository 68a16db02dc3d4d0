"""Entry point: parses the command line and turns mistakes into one line and an exit status.

0 done · 1 failed · 2 the user's input is wrong · 130 stopped by Ctrl-C
"""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer import Abort, BadParameter

from sft.cli import INTERRUPTED, STOPPED_LINE, completion, terminal
from sft.core.distributed import reports_the_error
from sft.core.errors import RunError, UserError

app = typer.Typer(
    name="idefics-sft",
    help="Instruction fine-tuning for IDEFICS vision-language models.",
    epilog=terminal.examples(("quickstart", "recipes list", "train my-data --help")),
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
PANELS = {
    "Start": ("quickstart", "new", "doctor", "recipes"),
    "Data": ("validate", "prepare", "mix", "inspect", "stats", "export", "leaks"),
    "Training": ("plan", "train"),
    "Models": ("tasks", "evaluate", "score", "compare", "select", "report", "bias", "chat", "merge"),
    "Other": ("schema",),
}
"""The commands, as their list is divided. Each is a module of this folder with a function `run`, or an `app` of several
commands."""

for panel, names in PANELS.items():
    for name in names:
        command = import_module(f"sft.cli.{name}")
        if hasattr(command, "app"):
            app.add_typer(command.app, name=name, rich_help_panel=panel)
        else:
            epilog = terminal.examples(command.EXAMPLES)
            app.command(name=name, epilog=epilog, rich_help_panel=panel)(command.run)


_UsageError: Any = next(kind for kind in BadParameter.__mro__ if kind.__name__ == "UsageError")
"""Typer's own: it has no public name."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"idefics-sft {version('idefics-sft')}")
        raise typer.Exit


@app.callback()
def _options(
    print_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors. May stand anywhere.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show results and errors, no progress. May stand anywhere.")
    ] = False,
) -> None:
    """Instruction fine-tuning for IDEFICS vision-language models."""
    terminal.show_progress(not quiet)


ANYWHERE = ("--debug", "--quiet", "-q")


def _anywhere_first(arguments: list[str]) -> list[str]:
    """`train x --debug` -> `--debug train x`: options of all commands may stand behind them too."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    first = [argument for argument in arguments[:end] if argument in ANYWHERE]
    return first + [argument for argument in arguments[:end] if argument not in ANYWHERE] + arguments[end:]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = _anywhere_first(sys.argv[1:] if arguments is None else arguments)
    if {"--show-completion", "--install-completion"} & {argument.partition("=")[0] for argument in arguments}:
        from typer import _completion_shared  # typer has no public place for a script

        _completion_shared._completion_scripts["bash"] = completion.BASH_SCRIPT
    try:
        status = app(arguments, prog_name="idefics-sft", standalone_mode=False) or 0
        if status == INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.exit(status)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no command at all: help is wanted
            error.show()
        else:
            message = " ".join(error.format_message().split())
            terminal.print_problems(message.replace(": Value error, ", ": "))  # pydantic's words
        sys.exit(2)
    except (UserError, RunError) as error:
        if "--debug" in arguments:
            raise
        if reports_the_error():
            terminal.print_problems(*(error.args if isinstance(error, UserError) else (error,)))
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        is_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # comes without a name while a file is written
        if "--debug" in arguments or (error.filename is None and not is_disk):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        terminal.print_problems(f"{where}{error.strerror}")
        sys.exit(1 if is_disk else 2)
    except (KeyboardInterrupt, Abort):
        if reports_the_error():
            print(STOPPED_LINE, file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
