"""The file that MMBench's server scores, for splits whose answers are kept back.

One sheet, a line for each row of the TSV: index, question, A, B, C, D, prediction. The server tells the release by the
index and the language by the question, and wants a letter as the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sft.core.errors import UserError
from sft.core.files import whole_file
from sft.evaluation.results import Result
from sft.evaluation.tasks.mmbench.benchmark import Benchmark
from sft.evaluation.tasks.mmbench.multiple_choice import asked_rows
from sft.evaluation.tasks.mmbench.questions import Row
from sft.recipe import Scoring

OPTIONS = ("A", "B", "C", "D")
NO_OPTION = "Z"
"""No option was named, or the question did not fit the model; so VLMEvalKit writes it too."""


def check_submission(file: Path, benchmark: Benchmark, scorings: Sequence[Scoring]) -> None:
    """Check that `file` will hold all it has to, before anything is computed. Raise UserError for another suffix, no
    openpyxl, more than one ranking, or rows that are not asked."""
    if file.suffix != ".xlsx":
        raise UserError(f"--submission {file}: expected the name of an .xlsx file")
    if find_spec("openpyxl") is None:
        raise UserError("--submission needs openpyxl: pip install 'idefics-sft[evaluation]'")
    if len(scorings) > 1:
        raise UserError(f"--submission holds the answers of one ranking, found {', '.join(scorings)}; give --rank")
    asked = {row.index for question in benchmark.questions for row in question.rotations}
    missing = [row.index for row in benchmark.rows if row.index not in asked]
    if missing:
        raise UserError(
            f"--submission needs every row of the file, {len(missing)} of {len(benchmark.rows)} are not asked; "
            "protocol circular asks them all, without --max-questions, and with shots from another file"
        )


def write_submission(file: Path, rows: Sequence[Row], result: Result) -> None:
    """Write the predictions for all rows of a TSV; NO_OPTION where there is none."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    predictions = {row.index: row.prediction for outcome in result.outcomes for row in asked_rows(outcome)}
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["index", "question", *OPTIONS, "prediction"])
    for row in rows:
        options = dict(zip(row.letters, row.options, strict=True))
        texts = (row.question, *(options.get(letter, "") for letter in OPTIONS))
        sheet.append([row.index, *(ILLEGAL_CHARACTERS_RE.sub("", text) for text in texts)])
        for column, _ in enumerate(texts, start=2):
            sheet.cell(sheet.max_row, column).data_type = "s"  # `=1+1` is an option here, not a formula
        sheet.cell(sheet.max_row, len(texts) + 2, predictions.get(row.index) or NO_OPTION)
    with whole_file(file) as opened:
        book.save(opened)
