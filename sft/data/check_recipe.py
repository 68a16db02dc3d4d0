"""Checks that what a recipe names is there, before anything is read."""

from collections.abc import Iterator
from pathlib import Path

from sft.core.errors import UserError
from sft.core.shipped import is_local, resolve
from sft.data.datasets import Adapter
from sft.models import adapters_of, check_names
from sft.models.base_model import check_adapters
from sft.recipe import BUILT_BENCHMARKS, Recipe


def check_recipe(recipe: Recipe, *, paths: bool = True) -> None:
    """Check that model family, adapters, their options and, unless `paths` is false, all files of a recipe are there,
    or raise UserError: all that is wrong, each with its key or dataset."""
    problems = [*_of_names(recipe), *_of_datasets(recipe, paths), *(_of_paths(recipe) if paths else ())]
    if problems:
        raise UserError(*problems)


def _of_names(recipe: Recipe) -> Iterator[str]:
    try:
        check_names(recipe)
        if adapters := adapters_of(recipe):
            check_adapters(recipe, adapters)
    except UserError as error:
        yield from error.args


def _of_datasets(recipe: Recipe, paths: bool) -> Iterator[str]:
    missing = 0
    for dataset in (dataset for source in recipe.data.mixture for dataset in source.datasets):
        path = dataset.path if paths or dataset.path is None else "."
        try:
            Adapter(dataset.dataset, path, dataset.split, dataset.options)
        except UserError as error:
            cure = ", or take its source out of the recipe: the other shares still have to sum to 100"
            yield from (problem + cure * ("docs/data.md#" in problem) for problem in error.args)
            missing += any("does not exist" in problem for problem in error.args)
    if missing > 1:
        cure = "a source that you do not have can be deleted, and the shares of the others then have to sum to 100"
        yield f"data.mixture: set each `path` to where the data are, from the current directory; {cure}"


def _of_paths(recipe: Recipe) -> Iterator[str]:
    if is_local(recipe.model.path) and not resolve(recipe.model.path).is_dir():
        yield f"model.path: {recipe.model.path} is not a folder; expected one, or a hub id like owner/name"
    benchmark = recipe.evaluation.benchmark
    if benchmark is not None and benchmark not in BUILT_BENCHMARKS and not resolve(benchmark).exists():
        known = (
            f"a TSV of MMBench layout, or {', '.join(BUILT_BENCHMARKS)}, or a .jsonl of questions with short answers"
        )
        yield f"evaluation.benchmark: {benchmark} is not a file; expected {known}"
    support = recipe.evaluation.support
    if support is not None and not resolve(support).is_file():
        yield f"evaluation.support: {support} is not a file; expected a TSV of MMBench layout with answers"
    for key, folder in (("output_dir", recipe.output_dir), ("data.store", recipe.data.store)):
        if Path(folder).exists() and not Path(folder).is_dir():
            yield f"{key}: {folder} is a file; expected a folder, or a name for a new one"
