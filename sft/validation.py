"""Whether what a recipe names is there, before anything is read."""

from __future__ import annotations

from pathlib import Path

from sft.datasets import Adapter
from sft.models import get_family
from sft.recipe import Recipe
from sft.shipped import resolve


def check_adapters(recipe: Recipe, *, paths: bool = True) -> None:
    """Whether every dataset of a recipe has an adapter, its options and, unless told otherwise, its raw files.

    Raises:
        UserError: naming the dataset and what is wrong.
    """
    get_family(recipe.model.family)
    for source in recipe.data.mixture:
        for dataset in source.datasets:
            path = dataset.path if paths or dataset.path is None else "."
            Adapter(dataset.dataset, path, dataset.split, dataset.options)
    if paths and is_local(recipe.model.path):
        resolve(recipe.model.path)


def is_local(path: str) -> bool:
    """Whether a model path is a folder rather than a hub id, which has the form `owner/name`."""
    return path.startswith(("shipped:", "/", "./", "../", "~")) or path.count("/") != 1 or Path(path).exists()
