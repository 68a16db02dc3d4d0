"""The questions of one file of MMBench layout, chosen and grouped by a protocol, with what may be shown before them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.core.distributed import from_main
from sft.core.errors import UserError
from sft.core.shipped import resolve, user_cache
from sft.evaluation.draw_images import choose_part
from sft.evaluation.tasks.mmbench.from_easy_vqa import write_benchmark
from sft.evaluation.tasks.mmbench.protocols import Protocol, group_rows
from sft.evaluation.tasks.mmbench.questions import Question, Row, first_rows, read_tsv
from sft.evaluation.tasks.mmbench.shots import draw_shots, split_support
from sft.recipe import BUILT_BENCHMARKS


def benchmark_file(name: str, store: Path, *, seed: int) -> Path:
    """Return the TSV of a benchmark given by path, or by the name of one that is built on first use: into a
    `store` that `prepare` has made, else into the user's cache, since a recipe may be somebody else's."""
    if name not in BUILT_BENCHMARKS:
        return resolve(name)
    place = store if (store / "bases").is_dir() else user_cache()
    file = place / "benchmarks" / f"{name}-{seed}.tsv"

    def build() -> None:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_benchmark(file, seed=seed)

    from_main(build)
    return file


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Questions of one file, chosen and grouped by a protocol."""

    name: str
    """The file's name without its suffix: the folder of its results."""
    protocol: Protocol
    fingerprint: str
    """Of the file's bytes, of which questions were chosen, and of what is shown before them."""
    questions: tuple[Question, ...]
    rows: tuple[Row, ...] = ()
    """All rows of the file, in its order."""
    shots: int = 0
    support: tuple[Row, ...] = ()
    """Rows with answers that may be shown before a question about something else."""
    seed: int = 0
    """Draws the shots."""

    @property
    def has_answers(self) -> bool:
        """Whether it can be scored here."""
        return bool(self.questions[0].first.answer)


def load_benchmark(
    path: Path,
    *,
    protocol: Protocol = "circular",
    max_questions: int | None = None,
    shots: int = 0,
    support: Path | None = None,
    seed: int = 0,
) -> Benchmark:
    """Read a TSV of MMBench layout; with `max_questions`, a seeded part of it made of whole images.

    `shots` questions are shown before each, from the TSV `support`, or from a part of `path` that is then not asked.
    Raise UserError as `read_tsv` does, and where there are not enough answers to show.
    """
    rows = read_tsv(path)
    questions = group_rows(rows, protocol)
    shown: Sequence[Question] = ()
    if shots and support:
        shown = first_rows(read_tsv(support))
    elif shots:
        questions, shown = split_support(questions, num_shots=shots, seed=seed)
    if not questions:
        raise UserError(f"{path}: no questions are left to ask beside those set aside for {shots} shots")
    if shots and not all(question.first.answer for question in shown):
        raise UserError(f"{support or path}: has no answers to show as shots; give a TSV with answers as support")
    questions = choose_part(questions, max_questions, seed)
    support_rows = tuple(row for question in shown for row in question.rotations)
    for question in questions if shots else ():
        draw_shots(question, support_rows, num_shots=shots, seed=seed)  # told before a model is loaded
    parts = [_hash_of(path), ",".join(str(question.first.index) for question in questions)]
    if shots:
        parts += [str(seed), _hash_of(support or path), ",".join(str(question.first.index) for question in shown)]
    return Benchmark(
        name=path.stem,
        protocol=protocol,
        fingerprint=hashlib.sha256(" ".join(parts).encode()).hexdigest(),
        questions=tuple(questions),
        rows=tuple(rows),
        shots=shots,
        support=support_rows,
        seed=seed,
    )


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
