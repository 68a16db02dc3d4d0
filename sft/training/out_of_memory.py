"""Lack of memory, noticed whichever library reports it, and explained with the settings that take less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sft.core.distributed import current_rank
from sft.core.errors import RunError
from sft.recipe import ENGINES, OPTIMIZERS, Recipe
from sft.recipe.engines import resolve_engine
from sft.recipe.optimizers import lighter_optimizers

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch's allocators and CUDA's libraries say so, in a RuntimeError of one class or another."""


@contextmanager
def explain_out_of_memory(recipe: Recipe, where: Callable[[], str]) -> Iterator[None]:
    """Raise RunError for a lack of memory inside the block, of the GPU or the machine, in one line that begins with
    `where`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        changes = lighter_settings(recipe)
        raise RunError(f"{where()}: out of memory; less takes: {changes}. `idefics-sft plan` says what fits") from error


def lighter_settings(recipe: Recipe) -> str:
    """Return the settings to change and their new values: first those that change nothing of what is trained."""
    training, data = recipe.training, recipe.data
    changes = [
        ("training.micro_batch_packs=1", training.micro_batch_packs > 1, f" (is {training.micro_batch_packs})"),
        ("training.gradient_checkpointing=true", not training.gradient_checkpointing, ""),
        *((f"training.optimizer={name}", True, f" (is {training.optimizer})") for name in _lightest_optimizer(recipe)),
        ("model.mode=qlora", recipe.model.mode != "qlora", f" (is {recipe.model.mode})"),
        ("a smaller data.max_images_per_pack", True, f" (is {data.max_images_per_pack})"),
        ("a shorter data.sequence_length", True, f" (is {data.sequence_length})"),
    ]
    return ", ".join(change + is_now for change, helps, is_now in changes if helps)


def _lightest_optimizer(recipe: Recipe) -> list[str]:
    """Return the optimizer that takes the least memory of those that the engine can use; none if it is used already."""
    shards = ENGINES[resolve_engine(recipe.distributed.engine, recipe.model.mode, current_rank().of)].shards
    lighter = lighter_optimizers(recipe.training.optimizer)
    usable = [name for name in lighter if OPTIMIZERS[name].is_shardable or not shards]
    return [min(usable, key=lambda name: OPTIMIZERS[name].gpu_bytes_per_parameter)] if usable else []
