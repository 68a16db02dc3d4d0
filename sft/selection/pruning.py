"""Which checkpoints' weights may go, and removing them so that a kill leaves nothing that looks whole.

The resume state in `state/`, which is complete by a manifest of its own, stays (`sft.runs.checkpoint`)."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from sft.core.files import discard
from sft.runs.checkpoint import MANIFEST, STATE, checkpoints, step_of
from sft.selection.record import Selection


def weights_to_prune(selection: Selection, present: Collection[str]) -> list[str]:
    """Return, of the checkpoints whose weights are `present`, those that `keep_weights: best+last` lets go, by step.

    Only what is evaluated; never the selected one, the best one or the newest one.
    """
    last = max(present, key=lambda name: step_of(Path(name)), default=None)
    evaluated = {score.checkpoint: score.step for score in selection.scores if score.checkpoint in present}
    return sorted(evaluated.keys() - {selection.selected, selection.best, last}, key=evaluated.__getitem__)


def prune_weights(run_dir: Path, selection: Selection) -> list[str]:
    """Remove the weights that `keep_weights: best+last` lets go; returns the names of their checkpoints."""
    folder = run_dir / "checkpoints"
    _finish_pruning(folder)
    names = weights_to_prune(selection, [path.name for path in checkpoints(folder)])
    for name in names:
        _remove_weights(folder / name)
    return names


def _remove_weights(checkpoint: Path) -> None:
    """Remove the weights of a checkpoint, and the folder where it has no state. The state stays whole at any moment."""
    if not (checkpoint / STATE).is_dir():
        discard(checkpoint)
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # first: from here on there are no weights to be found
    for path in checkpoint.iterdir():
        if path.name == STATE:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _finish_pruning(folder: Path) -> None:
    """Remove what a kill has left of weights whose manifest is gone. Checkpoints get their names with the manifest."""
    for path in folder.glob("checkpoint-*"):
        if (path / STATE).is_dir() and not (path / MANIFEST).exists():
            _remove_weights(path)
