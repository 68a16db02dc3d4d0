"""easy-vqa: 4,000 + 1,000 images of one coloured shape each, 38,575 + 9,673 questions; MIT, a PyPI package.

Raw layout: `<split>/questions.json`, a list of `[question, answer, image id]`, and `<split>/images/<image id>.png`.
Three forms of the same data:
    questions  every question with its one-word answer
    choices    open questions with two to all of their options, in the layout of MMBench: three times to be answered by
               a letter and once by the text, each time with options drawn anew
    captions   "a blue circle" as a document, for images whose colour and shape some answer gives
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sft.core.sample import ImageRef, Message, Sample, SkipSample, question_and_answer
from sft.data.datasets._meaning import Keys
from sft.data.formats import Row, read_json, require_file

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
LICENCE = "MIT"
KEYS = Keys.of("split image question answer answer_with caption", is_conversation=False)
Form = Literal["questions", "choices", "captions"]


def default_path() -> Path:
    """Return the data of the installed package."""
    import easy_vqa

    return Path(easy_vqa.__file__).parent / "data"


def files(path: Path, split: str) -> list[Path]:
    """Return the questions of the split."""
    return [require_file(path / split / "questions.json", "the questions of easy-vqa")]


def rows(file: Path, split: str, *, form: Form = "questions") -> Iterator[Row | SkipSample]:
    """Yield a row for each question; for captions a row for each image; for choices four for each open question."""
    questions = read_json(file)
    if form == "captions":
        yield from _captions(questions, split)
        return
    for number, (question, answer, image) in enumerate(questions):
        row = {"key": f"{split}/{form}/{number}", "split": split, "image": image}
        row |= {"question": question, "answer": answer}
        if form == "questions":
            yield row
        elif answer in SHAPES or answer in COLOURS:
            for draw in range(3):
                yield row | {"key": f"{row['key']}/letter-{draw}", "answer_with": "letter"}
            yield row | {"key": f"{row['key']}/text", "answer_with": "text"}
        else:
            yield SkipSample("yes/no question", filtered=True)


def _captions(questions: list[tuple[str, str, int]], split: str) -> Iterator[Row | SkipSample]:
    shapes = {image: answer for _, answer, image in questions if answer in SHAPES}
    colours = {image: answer for _, answer, image in questions if answer in COLOURS}
    for image in sorted({image for _, _, image in questions}):
        if image in shapes and image in colours:
            caption = f"a {colours[image]} {shapes[image]}"
            yield {"key": f"{split}/captions/{image}", "image": image, "caption": caption, "split": split}
        else:
            yield SkipSample("no answer tells colour and shape", filtered=True)


def to_sample(row: Row, path: Path, *, form: Form = "questions", seed: int = 0) -> Sample:
    """Return one question and its answer. `seed` and the row's key alone draw the order of options."""
    key = f"easy_vqa/{row['key']}"
    image = ImageRef(source=path / row["split"] / "images" / f"{row['image']}.png")
    if form == "captions":
        return Sample(key=key, messages=(Message(role="document", content=(image, row["caption"])),))
    question, answer = row["question"], row["answer"]
    if form == "choices":
        rng = random.Random(f"{seed}/{key}")
        options = _some_of(draw_options(answer, rng), answer, rng)
        question = multiple_choice(question, options)
        if row["answer_with"] == "letter":
            answer = "ABCD"[options.index(answer)]
    return Sample(key=key, messages=question_and_answer((image, question), answer))


def draw_options(answer: str, rng: random.Random) -> list[str]:
    """Return all three shapes, or the right colour among three others, shuffled."""
    if answer in SHAPES:
        options = list(SHAPES)
    else:
        options = [answer, *rng.sample([colour for colour in COLOURS if colour != answer], 3)]
    rng.shuffle(options)
    return options


def _some_of(options: list[str], answer: str, rng: random.Random) -> list[str]:
    """Return two to all of the options in their order, the right one among them."""
    wrong = rng.sample([option for option in options if option != answer], rng.randint(1, len(options) - 1))
    return [option for option in options if option == answer or option in wrong]


def multiple_choice(question: str, options: list[str]) -> str:
    """Return a question with lettered options, in the layout HuggingFaceM4 asked MMBench in (make_mmbench.py)."""
    lines = [f"{letter}: {option}" for letter, option in zip("ABCD", options, strict=False)]
    return "\n".join([f"Question: {question}", "Possible answers:", *lines, "Correct answer:"])
