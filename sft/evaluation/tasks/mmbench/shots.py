"""Answered questions shown before the one that is asked.

They come from a support split that is never asked itself: another file, or a part of the same one made of whole images.
Those of a query are drawn by the seed and the question alone, so every checkpoint, and every rotation of a question,
sees the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from sft.core.errors import UserError
from sft.evaluation.draw_images import in_random_order
from sft.evaluation.tasks.mmbench.questions import Question, Row

SUPPORT_SHARE = 0.1
"""Of the questions, where support is a part of the file."""


def split_support(questions: Sequence[Question], *, num_shots: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Return the questions to ask, and the tenth of them (at least `num_shots`) that is set aside, by whole images.

    The last images of the seeded order are set aside: a part of the questions is made of the first.
    """
    by_image: dict[str, set[int]] = {}
    for question in questions:
        by_image.setdefault(question.cluster, set()).add(question.id)
    wanted = max(num_shots, math.ceil(SUPPORT_SHARE * sum(map(len, by_image.values()))))
    support: set[str] = set()
    num_support = 0
    for image in reversed(in_random_order(list(by_image), seed)):
        if num_support < wanted:
            support.add(image)
            num_support += len(by_image[image])
    asked = [question for question in questions if question.cluster not in support]
    return asked, [question for question in questions if question.cluster in support]


def draw_shots(query: Question, support: Sequence[Row], *, num_shots: int, seed: int) -> tuple[Row, ...]:
    """Return `num_shots` rows of `support`, of different questions, none about the query's question or image; raise
    UserError where there are not so many."""
    unseen: dict[int, Row] = {}
    for row in support:
        if row.image_sha256 != query.cluster and row.question_index != query.id:
            unseen.setdefault(row.question_index, row)
    if len(unseen) < num_shots:
        raise UserError(
            f"shots: question {query.id} can be shown {len(unseen)} others with answers, {num_shots} are asked for"
        )
    rng = random.Random(f"shots {seed} {query.id}")
    return tuple(rng.sample(list(unseen.values()), num_shots))
