"""Asking the benchmark of a run: the base and every checkpoint, each once; what is answered already is read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from sft.chat_template import ChatTemplate
from sft.evaluation.results import Rank, Result, find_result, write_result
from sft.evaluation.score import Benchmark, evaluate, load_benchmark, protocol_hash
from sft.files import hash_file
from sft.inference import load_for_inference, load_template
from sft.models import get_family
from sft.recipe import BUILT_BENCHMARKS, EvaluationConfig, Recipe
from sft.shipped import resolve


def recipe_benchmark(recipe: Recipe) -> Benchmark | None:
    """The benchmark of a recipe; None where it names none."""
    return load_settings(recipe.evaluation, Path(recipe.data.store)) if recipe.evaluation.benchmark else None


def load_settings(settings: EvaluationConfig, store: Path) -> Benchmark:
    """The benchmark that settings name, built into `store` on first use where it is one that is made here."""
    assert settings.benchmark is not None
    return load_benchmark(
        benchmark_file(settings.benchmark, store, seed=settings.seed),
        protocol=settings.protocol,
        max_questions=settings.max_questions,
        seed=settings.seed,
    )


def benchmark_file(name: str, store: Path, *, seed: int) -> Path:
    """The TSV of a benchmark given by path, or by the name of one that is built into `store`."""
    if name not in BUILT_BENCHMARKS:
        return resolve(name)
    file = store / "benchmarks" / f"{name}-{seed}.tsv"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        import_module(f"sft.evaluation.{name}").write_benchmark(file, seed=seed)
    return file


def score_model(
    path: Path,
    benchmark: Benchmark,
    *,
    run_dir: Path | None,
    name: str,
    ranks: Sequence[Rank],
    blind: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Rank, Result]:
    """Evaluate the model in `path` and keep the results in the run under `name`, or read them if they are there.

    Without a run nothing is kept.
    """
    weights = weights_hash(path)
    template = load_template(get_family("idefics"), path)
    kept = {rank: run_dir and _kept(template, benchmark, run_dir, name, rank, blind, weights) for rank in ranks}
    missing = [rank for rank, result in kept.items() if not result]
    found: dict[Rank, Result] = {rank: result for rank, result in kept.items() if isinstance(result, Result)}
    if missing:
        loaded = load_for_inference(path)
        found |= evaluate(
            loaded.model,
            loaded.template,
            benchmark,
            image_size=loaded.image_size,
            ranks=missing,
            blind=blind,
            autocast=loaded.autocast,
            weights=weights,
            on_progress=on_progress,
        )
        if run_dir:
            for rank in missing:
                write_result(found[rank], run_dir, name)
    return found


def weights_hash(folder: Path) -> str:
    """One hash over the weight files of a model folder."""
    return "-".join(hash_file(file) for file in sorted(folder.glob("*.safetensors")))


def _kept(
    template: ChatTemplate, benchmark: Benchmark, run_dir: Path, name: str, rank: Rank, blind: bool, weights: str
) -> Result | None:
    asked = protocol_hash(template, benchmark, rank=rank, blind=blind)
    return find_result(run_dir, benchmark.name, asked, name, weights=weights)
