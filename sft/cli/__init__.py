"""The `idefics-sft` command. One small file a command; heavy imports happen when a command runs."""

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
