"""What the checkpoints of a run are asked, behind one face: ask one, and get the hashes its answers are kept under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft.core.errors import UserError
from sft.core.shipped import resolve
from sft.data.sources import Sources
from sft.evaluation.held_out_loss import BENCHMARK, ask_held_out_loss, held_out_packs
from sft.evaluation.run_benchmark import load_settings, score_model
from sft.evaluation.short_answers import ask_short_answers, read_questions
from sft.models.chat_template import ChatTemplate
from sft.models.open_model import Load
from sft.recipe import BUILT_BENCHMARKS, By, EvaluationConfig, Recipe

OnProgress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Questionnaire:
    """The same questions for every checkpoint."""

    by: By
    benchmark: str
    """The folder of RUN/evaluations where answers are kept."""
    unit: str
    """What progress counts."""
    ask: Callable[[Path, Load, OnProgress], set[str]]
    """Asks the checkpoint in a folder what it was not asked yet, loading it if need be, and returns the hashes of the
    protocols."""


def scored_by(settings: EvaluationConfig) -> By:
    """What a benchmark is scored by, where the recipe leaves it open.

    Raises:
        UserError: the benchmark does not go with what is asked for.
    """
    benchmark = settings.benchmark
    is_jsonl = benchmark is not None and benchmark.endswith(".jsonl")
    by: By = settings.by or ("loss" if benchmark is None else "exact_match" if is_jsonl else "mmbench")
    if by != "loss" and benchmark is None:
        raise UserError(f"--by {by} needs a benchmark; give --benchmark FILE, or evaluation.benchmark in the recipe")
    if by == "exact_match" and not is_jsonl:
        raise UserError(f"{benchmark}: --by exact_match reads a .jsonl of questions with short answers")
    if by == "mmbench" and is_jsonl:
        raise UserError(f"{benchmark}: --by mmbench reads a TSV of MMBench layout; a .jsonl goes with --by exact_match")
    return by


def multiple_choice(recipe: Recipe) -> Questionnaire:
    """A benchmark of MMBench's layout.

    Raises:
        UserError: see `read_tsv`; it has no answers.
    """
    settings, run_dir = recipe.evaluation, Path(recipe.output_dir)
    benchmark = load_settings(settings, Path(recipe.data.store))
    if not benchmark.has_answers:
        raise UserError(f"{settings.benchmark}: has no answers, so it cannot choose; give a split that has them")

    def ask(path: Path, load: Load, on_progress: OnProgress) -> set[str]:
        results = score_model(
            path, benchmark, run_dir=run_dir, name=path.name, ranks=settings.ranks, load=load, on_progress=on_progress
        )
        return {result.protocol_hash for result in results.values()}

    return Questionnaire(by="mmbench", benchmark=benchmark.name, unit="tokens", ask=ask)


def short_answers(recipe: Recipe) -> Questionnaire:
    """Questions of the user's own.

    Raises:
        UserError: see `read_questions`.
    """
    assert recipe.evaluation.benchmark is not None and recipe.evaluation.benchmark not in BUILT_BENCHMARKS
    file = resolve(recipe.evaluation.benchmark)
    questions = read_questions(file)

    def ask(path: Path, load: Load, on_progress: OnProgress) -> set[str]:
        return {ask_short_answers(path, questions, file, Path(recipe.output_dir), load, on_progress)}

    return Questionnaire(by="exact_match", benchmark=file.stem, unit="questions", ask=ask)


def held_out_loss(recipe: Recipe, held_out: Sources, template: ChatTemplate) -> Questionnaire:
    """The loss on what the recipe holds out.

    Raises:
        UserError: no held-out sample of a source fits a pack.
    """
    packs = held_out_packs(held_out, seed=recipe.evaluation.seed)

    def ask(path: Path, load: Load, on_progress: OnProgress) -> set[str]:
        return {ask_held_out_loss(path, packs, template, Path(recipe.output_dir), load, on_progress)}

    return Questionnaire(by="loss", benchmark=BENCHMARK, unit="samples", ask=ask)
