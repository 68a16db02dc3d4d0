"""CIDEr-D: how much a caption has in common with those that people wrote, words that every image has counted little.

Vedantam et al. 2015, section 4, as the coco-caption code computes it: n-grams of 1 to 4 words, weighed by the number of
images whose references hold them, clipped to those of the reference, times a penalty for another length. The card's
figures are 100 times these.

The words are those of the Penn Treebank tokenizer that coco-caption calls, without its Java program: 80 images of COCO
get the same scores to six digits.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

MAX_WORDS = 4
"""Of an n-gram."""
SIGMA = 6.0
"""Words of difference in length at which the penalty is exp(-1/2)."""

Counts = Counter[tuple[str, ...]]


class CiderD:
    """The scores of captions, where n-grams are weighed by the references of a set of images."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """`references` are the captions that people wrote for each image."""
        self._num_images_of = Counter(
            ngram for captions in references for ngram in {ngram for text in captions for ngram in _ngrams(text)}
        )
        self._log_images = math.log(max(1, len(references)))

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Return the score of a caption of an image, from 0 to 10: its mean over the image's references."""
        own = _ngrams(caption)
        return sum(self._similarity(own, _ngrams(text)) for text in references) / max(1, len(references))

    def _similarity(self, own: Counts, other: Counts) -> float:
        """Return ten times the clipped cosine of two texts, averaged over the lengths of n-grams."""
        length_difference = _num_bigrams(own) - _num_bigrams(other)
        penalty = math.exp(-(length_difference**2) / (2 * SIGMA**2))
        total = 0.0
        for size in range(1, MAX_WORDS + 1):
            mine, theirs = self._weights(own, size), self._weights(other, size)
            norms = math.sqrt(sum(w * w for w in mine.values()) * sum(w * w for w in theirs.values()))
            common = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs
            )
            total += common / norms if norms else 0.0
        return 10 * penalty * total / MAX_WORDS

    def _weights(self, counts: Counts, size: int) -> dict[tuple[str, ...], float]:
        return {
            ngram: count * (self._log_images - math.log(max(1, self._num_images_of[ngram])))
            for ngram, count in counts.items()
            if len(ngram) == size
        }


def tokenize(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation marks. Clitics are words of their own: `isn't`
    is `is` and `n't`."""
    text = caption.lower().replace("’", "'")
    for pattern, words in _SPLITS:
        text = pattern.sub(words, text)
    return [word for word in _WORD.findall(text) if word not in _MARKS]


def _ngrams(text: str) -> Counts:
    words = tokenize(text)
    return Counter(
        tuple(words[first : first + size]) for size in range(1, MAX_WORDS + 1) for first in range(len(words) + 1 - size)
    )


def _num_bigrams(counts: Counts) -> int:
    """Return the length of a text, which coco-caption counts in pairs of words."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


_SPLITS = [
    (re.compile(r"(?<=[a-z])n't\b"), " n't"),
    (re.compile(r"(?<=\w)'(s|m|d|ll|re|ve)\b"), r" '\1"),
    (re.compile(r"\bcannot\b"), "can not"),
    (re.compile(r"\b(gon|wan)na\b"), r"\1 na"),
    (re.compile(r"\("), " -lrb- "),
    (re.compile(r"\)"), " -rrb- "),
]
_WORD = re.compile(
    r"-[lr]rb-"
    r"|(?:[a-z]\.){2,}"  # u.s.
    r"|\b(?:mr|mrs|ms|dr|prof|jr|sr|st|ave|rd|blvd|vs|etc|co|corp|inc|ltd)\."
    r"|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?\b(?!-\w)"
    r"|n't|'(?:s|m|d|ll|re|ve)\b"
    r"|\w+(?:[-/.&']\w+)*"
    r"|\.\.\.|--|[^\w\s]"
)
_MARKS = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}
