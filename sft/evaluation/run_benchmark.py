"""Asking the benchmark of a run: the base and every checkpoint, each once; what is answered already is read back.

Evaluations that a run keeps, in the files of sft.evaluation.results: the summary last, which vouches for both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from sft.core.distributed import all_or_none, from_main, is_main_process
from sft.core.files import hash_file, write_atomically
from sft.core.shipped import resolve
from sft.evaluation.mmbench.score import Benchmark, evaluate, load_benchmark, protocol_hash
from sft.evaluation.results import Rank, Result, find_result, result_file, write_result
from sft.models.open_model import Load, Loaded, find_family, load_for_inference, load_template
from sft.recipe import BUILT_BENCHMARKS, EvaluationConfig, Recipe
from sft.runs.checkpoint import listed_hashes


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
        shots=settings.shots,
        support=resolve(settings.support) if settings.support else None,
        seed=settings.seed,
    )


def benchmark_file(name: str, store: Path, *, seed: int) -> Path:
    """The TSV of a benchmark given by path, or by the name of one that is built into `store`."""
    if name not in BUILT_BENCHMARKS:
        return resolve(name)
    file = store / "benchmarks" / f"{name}-{seed}.tsv"

    def build() -> None:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            import_module(f"sft.evaluation.mmbench.{name}").write_benchmark(file, seed=seed)

    from_main(build)
    return file


class ScoredModel:
    """A model and its results, kept in the run under `name` and read back if they are there; it is loaded, by `load`,
    when something is to be asked. Without a run nothing is kept."""

    def __init__(
        self, path: str | Path, *, run_dir: Path | None = None, name: str = "", load: Load = load_for_inference
    ) -> None:
        self.path = path
        self.run_dir = run_dir
        self.name = name
        self._load = load

    @cached_property
    def loaded(self) -> Loaded:
        """The model on its device."""
        return self._load(self.path)

    @cached_property
    def _weights(self) -> str:
        """What a kept result has to be of; not computed where none is kept."""
        return weights_hash(Path(self.path)) if self.run_dir else ""

    def score(
        self,
        benchmark: Benchmark,
        ranks: Sequence[Rank],
        *,
        blind: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[Rank, Result]:
        """Its result by each ranking; all processes share in asking."""
        found, weights = from_main(lambda: (self._kept(benchmark, ranks, blind), self._weights))
        missing = [rank for rank in ranks if rank not in found]
        if missing:
            with all_or_none():
                loaded = self.loaded
            made = evaluate(
                loaded.model,
                loaded.template,
                benchmark,
                image_size=loaded.image_size,
                ranks=missing,
                blind=blind,
                autocast=loaded.autocast,
                weights=weights,
                max_positions=loaded.max_positions,
                on_progress=on_progress,
            )
            with all_or_none():
                if self.run_dir and is_main_process():
                    for result in made.values():
                        write_result(result, self.run_dir, self.name)
            found |= made
        return {rank: found[rank] for rank in ranks}

    def _kept(self, benchmark: Benchmark, ranks: Sequence[Rank], blind: bool) -> dict[Rank, Result]:
        if self.run_dir is None:
            return {}
        template = load_template(find_family(self.path), self.path)
        hashes = {rank: protocol_hash(template, benchmark, rank=rank, blind=blind) for rank in ranks}
        kept = {
            rank: find_result(self.run_dir, benchmark.name, asked, self.name, weights=self._weights)
            for rank, asked in hashes.items()
        }
        return {rank: result for rank, result in kept.items() if result}


def score_model(
    path: str | Path,
    benchmark: Benchmark,
    *,
    run_dir: Path | None,
    name: str,
    ranks: Sequence[Rank],
    blind: bool = False,
    load: Load = load_for_inference,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Rank, Result]:
    """`ScoredModel.score` for a model that is asked once."""
    model = ScoredModel(path, run_dir=run_dir, name=name, load=load)
    return model.score(benchmark, ranks, blind=blind, on_progress=on_progress)


def weights_hash(folder: Path) -> str:
    """One hash over the weight files of a model folder: read back where a manifest lists them, 18 GB otherwise."""
    known = listed_hashes(folder)
    return "-".join(known.get(file.name) or hash_file(file) for file in sorted(folder.glob("*.safetensors")))


def asked_once(
    path: Path,
    run_dir: Path,
    benchmark: str,
    protocol: dict[str, Any],
    ask: Callable[[], tuple[dict[str, Any], Sequence[object]]],
) -> str:
    """See to it that the run keeps the answers of the checkpoint in `path`, and return the hash they are kept under.

    `protocol` is everything but the weights that a score depends on. `ask` makes the summary and a line per question;
    it is called by all processes, and by none where these weights were asked this before.
    """
    protocol_hash = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    weights = from_main(lambda: weights_hash(path))
    if not from_main(lambda: is_kept(run_dir, benchmark, protocol_hash, path.name, weights=weights)):
        summary, lines = ask()
        with all_or_none():
            if is_main_process():
                keep(run_dir, benchmark, protocol_hash, path.name, {"weights": weights} | summary, lines)
    return protocol_hash


def is_kept(run_dir: Path, benchmark: str, protocol_hash: str, checkpoint: str, *, weights: str) -> bool:
    """Whether these weights were asked this before, and the answers can be read."""
    file = result_file(run_dir, benchmark, protocol_hash, checkpoint)
    try:
        for line in file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            json.loads(line)
        return bool(json.loads(file.read_text(encoding="utf-8"))["weights"] == weights)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def keep(
    run_dir: Path, benchmark: str, protocol_hash: str, checkpoint: str, summary: dict[str, Any], lines: Sequence[object]
) -> None:
    """Write one line per question, then the summary, which names the `weights`."""
    file = result_file(run_dir, benchmark, protocol_hash, checkpoint)
    head = {"checkpoint": checkpoint, "benchmark": benchmark, "protocol_hash": protocol_hash}
    write_atomically(file.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(file, json.dumps(head | summary, indent=2) + "\n")
