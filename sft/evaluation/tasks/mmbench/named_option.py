"""Which option a generated answer names. No model judges it; an answer that names none counts as wrong.

1. Exactly one option's text stands in the answer, and no option letter beside it: `A blue square`, `It is vitamin C`.
   An `A` before a word is the article here. Not where an option's text is itself a letter.
2. The words of the answer, without punctuation, hold exactly one option letter (a capital by itself), among the last
   four words. `A` in an answer of more than three words is the article, not a letter.
3. `answer is X`, or `answer: X`, with or without brackets.
4. Exactly one option's text stands in the answer, whatever letters do.

A text is found whatever its capitals, spaces, leading article and full stop, in an answer at most twice as long as all
options together. An option text inside another counts for the longer one.

After `can_infer` of VLMEvalKit and the 2023 rules of OpenCompass, without their judge and without their random choice.
Rule 1 is ours: both take the article of `A blue square` for the letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

RULES = 2
"""Raised when the same answer names another option: a part of the protocol of generated answers."""

MAX_NEW_TOKENS = 64
"""Of a generated answer."""

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!?*#{}'\"。，：；！？（）、", " "))
_LAST_WORDS = 4
_ARTICLE_WORDS = 3
_TEXT = "\0"
"""Stands in an answer where an option's text was."""
_ARTICLE = re.compile(rf"\bA[ \t]+(?=[\w{_TEXT}])(?!(?:is|or|and|because|since)\b)")


def find_letter(answer: str, letters: Sequence[str], options: Sequence[str]) -> str:
    """Return the letter of the option that `answer` names, or an empty string."""
    by_text, rest = _by_text(answer, letters, options)
    if by_text and not _letters_in(_ARTICLE.sub("", rest), letters) and not _are_letters(options, letters):
        return by_text
    return _by_word(answer, letters) or _by_phrase(answer, letters) or by_text


def _letters_in(text: str, letters: Sequence[str]) -> list[str]:
    return [word for word in text.translate(_PUNCTUATION).replace(_TEXT, " ").split() if word in letters]


def _are_letters(options: Sequence[str], letters: Sequence[str]) -> bool:
    """Return whether an option's text is a letter of an option, such as `B: A`."""
    return any(option.translate(_PUNCTUATION).strip().upper() in letters for option in options)


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


def _by_text(answer: str, letters: Sequence[str], options: Sequence[str]) -> tuple[str, str]:
    """Return the letter of the one option whose text stands in the answer, or an empty string, and what the answer
    holds beside texts of options."""
    if len(answer) > 2 * sum(len(option) for option in options):
        return "", answer
    named = []
    for text, letter in sorted(zip(_texts(options), letters, strict=True), key=lambda pair: -len(pair[0])):
        # A word of its own in scripts that put spaces between words.
        words = r"\s+".join(map(re.escape, text.split()))
        answer, times = re.subn(rf"(?<![a-z0-9]){words}(?![a-z0-9])", _TEXT, answer, flags=re.IGNORECASE)
        if times:
            named.append(letter)
    return (named[0] if len(named) == 1 else ""), answer


def _texts(options: Sequence[str]) -> list[str]:
    """Return the options without a leading article and a final full stop, if they still differ and none is empty."""
    bare = [re.sub(r"^(?:an?|the)\s+(?=\S)", "", option.strip(" ."), flags=re.IGNORECASE) for option in options]
    is_sound = all(bare) and len({text.casefold() for text in bare}) == len(bare)
    return bare if is_sound else list(options)
