"""A small real benchmark of MMBench layout: the open questions of easy-vqa's test split.

easy-vqa (PyPI, MIT) has 1,000 test images of one coloured shape each and 2,537 open questions about them: which shape
(3 options: all there are) or which colour (4 options: the right one and 3 others, drawn). Nothing is left out.
"""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from sft.core.files import write_atomically
from sft.data.datasets.easy_vqa import SHAPES, draw_options
from sft.evaluation.tasks.mmbench.questions import COLUMNS, LETTERS, PASS


def write_benchmark(path: Path, *, seed: int) -> int:
    """Write the TSV, with every rotation of the options as a row, and return the number of questions.

    A question's index is its place among all questions of the split, yes/no questions counted. `seed` draws the wrong
    colours and shuffles the options, so that the right letter is uniform. Raise OSError where it cannot be written.
    """
    import easy_vqa

    paths = easy_vqa.get_test_image_paths()
    rng = random.Random(seed)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    num_questions = 0
    for index, (question, answer, image) in enumerate(zip(*easy_vqa.get_test_questions(), strict=True)):
        if answer in ("yes", "no"):
            continue
        encoded = base64.b64encode(Path(paths[image]).read_bytes()).decode()
        writer.writerows(_rows(index, question, answer, draw_options(answer, rng), encoded, f"image {image}"))
        num_questions += 1
    write_atomically(path, file.getvalue())
    return num_questions


def _rows(
    index: int, question: str, answer: str, options: Sequence[str], image: str, comment: str
) -> Iterator[dict[str, str | int]]:
    """Yield all rotations of a question. The first row holds the image, the others point to it."""
    category = "shape" if answer in SHAPES else "color"
    for by in range(len(options)):
        rotated = [*options[by:], *options[:by]]
        yield {
            "index": index + by * PASS,
            "question": question,
            **dict(zip(LETTERS, rotated, strict=False)),
            "answer": LETTERS[rotated.index(answer)],
            "category": category,
            "image": index if by else image,
            "source": f"easy-vqa {version('easy-vqa')}",
            "l2-category": category,
            "comment": comment,
            "split": "test",
        }
