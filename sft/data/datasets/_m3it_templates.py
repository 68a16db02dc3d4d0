"""Inputs and outputs of M3IT's raw rows, as the published loader M3IT.py joined their fields into sentences.

`m3it.py` says what these templates rest on.
"""

from collections.abc import Callable

from sft.core.sample import SkipSample
from sft.data.formats import Row

WITHOUT_QUESTION = {"textcap", "image-paragraph-captioning", "coco-text", "coco-cn", "flickr8k-cn", "msrvtt"}


def text_of(row: Row, *fields: str) -> str:
    """Return the first of the fields that is there."""
    value = next((row[field] for field in fields if row.get(field) is not None), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise SkipSample(f"{fields[0]} is not text")
    return value


def _the_answer_is(answer: str) -> str:
    return f"The answer is {answer}." if answer.strip() else ""


def _question(row: Row) -> str:
    if not (question := text_of(row, "question", "inputs", "input", "context").strip()):
        raise SkipSample("no question")
    return question


def general(row: Row) -> tuple[str, str]:
    inputs = "" if row["__subset__"] in WITHOUT_QUESTION else _question(row)
    return inputs, text_of(row, "answer", "outputs", "output", "caption", "response")


def _story(row: Row) -> tuple[str, str]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(one, str) for one in sentences):
        raise SkipSample("sentences is not a list of texts")
    return "", " ".join(sentences)


def _sentence(row: Row) -> tuple[str, str]:
    return _question(row), _the_answer_is(text_of(row, "answer", "output"))


def _paraphrase(row: Row) -> tuple[str, str]:
    """Return the answer as a sentence, where it could be made one."""
    paraphrased = row.get("paraphrased_answer")
    if isinstance(paraphrased, str) and paraphrased.strip() and "not answerable" not in paraphrased.lower():
        return _question(row), paraphrased
    return _question(row), _the_answer_is(text_of(row, "answer", "original_answer"))


def _rationale(row: Row) -> tuple[str, str]:
    if not (answer := text_of(row, "answer").strip()):
        raise SkipSample("empty message")
    return _question(row), f"{text_of(row, 'rationale').strip()} So the answer is {answer}."


def _shapes(row: Row) -> tuple[str, str]:
    answer = {"true": "yes", "false": "no"}.get(str(row.get("answer")).lower())
    if answer is None:
        raise SkipSample("answer is neither true nor false")
    return f"{_question(row).removesuffix('?')}?", _the_answer_is(answer)


def _text_vqa(row: Row) -> tuple[str, str]:
    inputs, outputs = general(row)
    return inputs, outputs.replace("?.", ".")


def _entailment(row: Row) -> tuple[str, str]:
    answer = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}.get(text_of(row, "gold_label"))
    if answer is None:
        raise SkipSample("unknown gold_label")
    return text_of(row, "hypothesis"), answer


def _class_name(row: Row) -> tuple[str, str]:
    """Return the name of an imagenet label, which is a number or a WordNet id."""
    label, classes = row.get("label"), row["__classes__"]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return "", list(classes.values())[label]
    if isinstance(label, str) and label in classes:
        return "", classes[label]
    raise SkipSample("unknown label")


def _class_options(row: Row) -> tuple[str, str]:
    """Return the class name among nine others."""
    _, answer = _class_name(row)
    others = sorted(set(row["__classes__"].values()) - {answer})
    options = [answer, *row["__rng__"].sample(others, min(9, len(others)))]
    row["__rng__"].shuffle(options)
    return _lettered(options, answer)


def _region(row: Row) -> tuple[str, str]:
    """Return options and answer of coco-goi: after a heading an option a line, of which M3IT.py keeps 24."""
    options = [option.strip() for option in text_of(row, "input").strip().split("\n")[1:25]]
    if not (answer := text_of(row, "outputs").strip()):
        raise SkipSample("empty message")
    if answer not in options:
        options.append(answer)
        row["__rng__"].shuffle(options)
    return _lettered(options, answer)


def _lettered(options: list[str], answer: str) -> tuple[str, str]:
    lettered = [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]
    return "\n".join(["Options:", *lettered]), lettered[options.index(answer)]


TEMPLATES: dict[str, Callable[[Row], tuple[str, str]]] = {
    "coco": lambda row: ("", text_of(row, "caption")),
    "vist": _story,
    "shapes": _shapes,
    "okvqa": _paraphrase,
    "viquae": _paraphrase,
    "vqa-v2": _paraphrase,
    "a-okvqa": _rationale,
    "st-vqa": _sentence,
    "nlvr": _sentence,
    "text-vqa": _text_vqa,
    "snli-ve": _entailment,
    "coco-goi": _region,
    "imagenet": _class_options,
    "imagenet-open-ended": _class_name,
}
