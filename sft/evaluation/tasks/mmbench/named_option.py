"""Which option a generated answer names. No model judges it; an answer that names none counts as wrong.

1. The words of the answer, without punctuation, hold exactly one option letter (a capital by itself), among the last
   four words. `A` in an answer of more than three words is the article, not a letter.
2. `answer is X`, or `answer: X`, with or without brackets.
3. Exactly one option's text stands in the answer, capitals aside, and the answer is at most twice as long as all
   options together. An option text inside another counts for the longer one.

After `can_infer` of VLMEvalKit and the 2023 rules of OpenCompass, without their judge and without their random choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_NEW_TOKENS = 64
"""Of a generated answer."""

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!?*#{}'\"。，：；！？（）、", " "))
_LAST_WORDS = 4
_ARTICLE_WORDS = 3


def find_letter(answer: str, letters: Sequence[str], options: Sequence[str]) -> str:
    """Return the letter of the option that `answer` names, or an empty string."""
    return _by_word(answer, letters) or _by_phrase(answer, letters) or _by_text(answer, letters, options)


def _by_word(answer: str, letters: Sequence[str]) -> str:
    words = answer.translate(_PUNCTUATION).split()
    named = [
        place
        for place, word in enumerate(words)
        if word in letters and not (word == "A" and len(words) > _ARTICLE_WORDS)
    ]
    if len(named) != 1 or named[0] < len(words) - _LAST_WORDS:
        return ""
    return words[named[0]]


def _by_phrase(answer: str, letters: Sequence[str]) -> str:
    found = re.findall(rf"(?i:answer(?:\s+is)?)\s*:?\s*[(\[*]*([{''.join(letters)}])\b", answer)
    return found[0] if len(set(found)) == 1 else ""


def _by_text(answer: str, letters: Sequence[str], options: Sequence[str]) -> str:
    text = answer.casefold()
    if len(text) > 2 * sum(len(option) for option in options):
        return ""
    named = []
    for option, letter in sorted(zip(options, letters, strict=True), key=lambda pair: -len(pair[0])):
        # A word of its own in scripts that put spaces between words.
        pattern = rf"(?<![a-z0-9]){re.escape(option.casefold())}(?![a-z0-9])"
        if re.search(pattern, text):
            named.append(letter)
            text = re.sub(pattern, "\0", text)
    return named[0] if len(named) == 1 else ""
