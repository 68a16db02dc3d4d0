"""VQA accuracy: an answer is right as far as people gave it, wholly from three of ten on.

    accuracy = mean over the people of min(1, how many of the others gave the prediction / 3)

Four variants of it are in use. On 91 questions of VizWiz the same predictions score 51.2, 53.4, 67.9 and 70.0 %, so a
figure names its variant. They differ in what is compared, and in who "the others" of a person are.

Sources: GT-Vision-Lab/VQA (vqaEval.py) for `official` and the normaliser; open_flamingo and HuggingFaceM4, which
evaluated IDEFICS, for `open_flamingo` and `m4`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Variant = Literal[
    "m4",  # all are normalised; the others are the nine further answers
    "official",  # nothing is normalised where all people agree; the others are the answers whose records differ
    "open_flamingo",  # all are normalised; the others are the answers whose records differ
    "min_n_over_3",  # all are normalised; min(1, how many gave it / 3), nobody left out
]


def vqa_accuracy(
    prediction: str, answers: Sequence[str], *, variant: Variant = "m4", marks: Sequence[object] | None = None
) -> float:
    """Return the accuracy of a prediction by the answers of several people.

    `marks` is what a person's record holds besides the answer: confidence, number. Where all records of an answer are
    equal, since the benchmark numbers none, `official` and `open_flamingo` leave all of them out at once. Without marks
    every record differs.
    """
    said, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if variant != "official" or len(set(given)) > 1:
        said, given = normalise(said), [normalise(answer) for answer in given]
    if variant == "min_n_over_3":
        return min(1.0, given.count(said) / 3)
    by_index = variant == "m4" or marks is None
    records = list(zip(given, range(len(given)) if by_index else marks or (), strict=True))
    accuracies = [min(1.0, sum(other[0] == said for other in records if other != own) / 3) for own in records]
    return sum(accuracies) / len(accuracies)


def normalise(answer: str) -> str:
    """Return an answer as the official code compares it: lower case, without articles, punctuation and full stops,
    numbers up to ten as digits, apostrophes put back into contractions."""
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_freely(answer: str) -> str:
    """Return the same with apostrophes dropped everywhere, in place of the table of contractions."""
    words = _without_punctuation(" ".join(answer.split())).replace("'", "").lower().split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Return a text without punctuation marks and full stops that do not precede a digit.

    A mark goes without trace where it stands next to a space anywhere in the text, or where the text has a comma
    between digits; else a space takes its place. No more than 32 full stops go: the official code passes a flag of that
    value where `re.sub` takes a count.
    """
    has_number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if is_loose or has_number else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, mark in enumerate(word)
    if mark == "'"
}
"""What contractions become that lack one of their apostrophes. The first is a slip of the official table."""
