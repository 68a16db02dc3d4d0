"""The `idefics-sft` command: a small file a command, found by `main`.

arguments ─main─> command ─runs.names, recipe─> Recipe or model ─a function of the folders below─> lines, or --json

main        the application: its commands, what holds for all of them, errors and exit status
terminal    what commands print: tables, progress, notes, JSON; the arguments that they share
completion  what the shell completes
several     commands for several processes

Every other file is the command of its name; `evaluation_tables` is a part of evaluate. A file imports what takes long
to import inside its functions, so that `--help` does not wait for torch.
"""

import sys

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of shells: 128 and the number of SIGINT."""
STOPPED_LINE = "idefics-sft: stopped"


def start() -> None:
    """Run the installed command; Ctrl-C is one line also while modules are imported."""
    try:
        from sft.cli.main import main
    except KeyboardInterrupt:
        print(STOPPED_LINE, file=sys.stderr)
        sys.exit(INTERRUPTED)
    main()
