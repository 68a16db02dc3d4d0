"""Too little memory: noticed whatever says so, and told with what takes less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sft.core.errors import RunError
from sft.recipe import Recipe

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch's allocators and CUDA's libraries say so, in a RuntimeError of one class or another."""


@contextmanager
def out_of_memory_told(recipe: Recipe, where: Callable[[], str]) -> Iterator[None]:
    """
    Raises:
        RunError: there was not enough memory; `where` is the beginning of its line.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        changes = what_takes_less(recipe)
        raise RunError(f"{where()}: out of memory; less takes: {changes}. `idefics-sft plan` says what fits") from error


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU or of the machine."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _SIGNS)


def what_takes_less(recipe: Recipe) -> str:
    """Settings of a recipe to be changed, and to what: first those that change nothing of what is trained."""
    training, data = recipe.training, recipe.data
    changes = [
        ("training.micro_batch_packs=1", training.micro_batch_packs > 1, f" (is {training.micro_batch_packs})"),
        ("training.gradient_checkpointing=true", not training.gradient_checkpointing, ""),
        ("training.optimizer=paged_adamw_8bit", training.optimizer == "adamw", ""),
        ("model.mode=qlora", recipe.model.mode != "qlora", f" (is {recipe.model.mode})"),
        ("a smaller data.max_images_per_pack", True, f" (is {data.max_images_per_pack})"),
        ("a shorter data.sequence_length", True, f" (is {data.sequence_length})"),
    ]
    return ", ".join(change + is_now for change, helps, is_now in changes if helps)
