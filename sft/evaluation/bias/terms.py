"""Terms by group: TF-IDF as the card has it, and a permutation test, which the card lacks.

Among thousands of terms some differ much between groups by chance. The test gives the groups to the images anew, at
random, and takes the largest variance of all terms each time (Westfall and Young 1993, maxT). p is the share of draws
in which it reaches a term's own variance: with p < ALPHA one table in twenty shows any term that is pure noise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ALPHA, PERMUTATIONS = 0.05, 1000
NUM_TERMS = 50
"""Of the card's list, those of the largest variance. Findings are its first ones, and are never cut."""
STOP_WORDS = frozenset(Path(__file__).with_name("stop_words.txt").read_text().split())
"""The list of the Glasgow Information Retrieval Group, as scikit-learn has it."""


class Weights(NamedTuple):
    """A sparse matrix of texts and terms: term `columns[i]` weighs `values[i]` in text `rows[i]`."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    terms: Sequence[str]


def terms_of(text: str) -> list[str]:
    """Return the words of two characters or more that are no stop words."""
    return [term for term in re.findall(r"\b\w\w+\b", text.lower()) if term not in STOP_WORDS]


def tfidf(texts: Sequence[str]) -> Weights:
    """Return what scikit-learn's `TfidfVectorizer(max_df=0.95, min_df=2, stop_words="english")` does."""
    counts = [Counter(terms_of(text)) for text in texts]
    number = Counter(term for own in counts for term in own)
    column = {
        term: n for n, term in enumerate(term for term, n in sorted(number.items()) if 2 <= n <= 0.95 * len(texts))
    }
    idf = np.log((1 + len(texts)) / (1 + np.array([number[term] for term in column]))) + 1
    cells = [(row, column[term], n) for row, own in enumerate(counts) for term, n in own.items() if term in column]
    rows, columns, times = np.array(cells, np.int64).reshape(-1, 3).T
    values = times * idf[columns]
    return Weights(rows, columns, values / np.sqrt(np.bincount(rows, values**2))[rows], list(column))


def compare(
    weights: Weights, images: Sequence[str], group_of: Mapping[str, str], permutations: int = PERMUTATIONS
) -> list[dict[str, Any]]:
    """Return the terms by the variance of their mean weight over groups. `images` names the image of each text,
    `group_of` the group of an image; texts about other images are left out. Texts about one image stay together."""
    groups, place = sorted(set(group_of.values())), {image: index for index, image in enumerate(group_of)}
    image_of_text = np.array([place.get(image, -1) for image in images])
    num_texts = np.bincount(image_of_text[image_of_text >= 0], minlength=len(place))
    is_in, shape = image_of_text[weights.rows] >= 0, (len(groups), len(weights.terms))
    image, columns, values = image_of_text[weights.rows][is_in], weights.columns[is_in], weights.values[is_in]

    def means_of(group_of_image: NDArray[np.int64]) -> NDArray[np.float64]:  # (groups, terms)
        sums = np.bincount(group_of_image[image] * shape[1] + columns, values, shape[0] * shape[1])
        means: NDArray[np.float64] = sums.reshape(shape) / np.bincount(group_of_image, num_texts)[:, None]
        return means

    actual, random = np.array([groups.index(group) for group in group_of.values()]), np.random.default_rng(0)
    means, variance = means_of(actual), means_of(actual).var(axis=0)
    largest = np.sort([means_of(random.permutation(actual)).var(axis=0).max(initial=0) for _ in range(permutations)])
    as_large = permutations - np.searchsorted(largest, variance * (1 - 1e-9))  # equal, but for rounding
    p = (1 + as_large) / (1 + permutations)
    return [
        {
            "term": weights.terms[column],
            "variance": float(variance[column]),
            "p": float(p[column]),
            "is_finding": bool(p[column] < ALPHA),
            "most": groups[means[:, column].argmax()],
            "mean_by_group": dict(zip(groups, means[:, column].tolist(), strict=True)),
        }
        for column in np.argsort(-variance, kind="stable")[: max(NUM_TERMS, int((p < ALPHA).sum()))]
    ]
