"""UltraChat: 1,468,348 generated dialogues, text only; MIT.

https://huggingface.co/datasets/openbmb/UltraChat, once `stingning/ultrachat`: `train_0.jsonl` to `train_9.jsonl`, 9.3
GB, a dialogue a line. No role is named: the user has the even places, the assistant the odd ones.

    {"id": "0", "data": ["How …?", "By …", "And …?", "Then …"]}

Also read: HuggingFaceH4/ultrachat_200k, a filtered copy, `data/<split>-00000-of-00003-….parquet` with `prompt`,
`prompt_id` and `messages` [{"content", "role"}]. Its train_sft (207,865 rows) is the split `train` here; the others are
test_sft, train_gen and test_gen.

Known defects: the parquet files that the hub itself made of the lines hold 773,913 dialogues, about half. A dialogue
that ends with a question loses it, as in UltraChat's own older code, which cut to `len // 2 * 2`.
Dialogues average 1,467 tokens and stay whole here; what is too long for a pack is the packing's to decide.
"""

import re
from pathlib import Path

from sft.core.errors import UserError
from sft.core.sample import Message, Sample, SkipSample
from sft.data.datasets._meaning import Keys
from sft.data.formats import Row, find_files
from sft.data.formats.records import rows as rows

LICENCE = "MIT"
KEYS = Keys.of("data messages prompt prompt_id", turn="role content")
READS_HUB = True


def files(path: Path, split: str) -> list[Path]:
    """Return the parts of the split in order; the first ones alone are fine, a gap is not."""
    patterns = ["train_[0-9].jsonl"] if split == "train" else []
    parquet = "train_sft" if split == "train" else split
    patterns += [f"data/{parquet}-[0-9]*-of-*.parquet", f"{parquet}-[0-9]*-of-*.parquet"]
    found = find_files(path, *patterns, what="parts of UltraChat or of ultrachat_200k")
    if path.is_dir():
        _check_no_gap(found)
    return found


def _check_no_gap(parts: list[Path]) -> None:
    """Raise a UserError unless parts count on by one: else a download failed, or two revisions lie in one folder."""
    numbers = [int(re.search(r"[-_]([0-9]+)", part.stem)[1]) for part in parts]  # type: ignore[index]
    if numbers != list(range(len(parts))):
        has = ", ".join(map(str, numbers))
        raise UserError(f"{parts[0].parent}: has parts {has}; expected 0, 1, 2, … each once (or the path of one part)")


def to_sample(row: Row, path: Path) -> Sample:
    """Return one dialogue, user first."""
    texts = _texts_of_messages(row["messages"]) if "messages" in row else row.get("data")
    if not isinstance(texts, list):
        raise SkipSample("dialogue is not a list")
    texts = texts[: len(texts) // 2 * 2]
    if not texts:
        raise SkipSample("no question with an answer")
    return Sample(key=f"ultrachat/{row['__from__']}", messages=tuple(map(_message, range(len(texts)), texts)))


def _texts_of_messages(messages: object) -> list[object]:
    """Return the texts of ultrachat_200k, where roles are named."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SkipSample("dialogue is not a list")
    for place, message in enumerate(messages):
        if message.get("role") != ("assistant" if place % 2 else "user"):
            raise SkipSample("turns do not alternate", detail=f"role {message.get('role')!r} at turn {place + 1}"[:200])
    return [message.get("content") for message in messages]


def _message(place: int, text: object) -> Message:
    if not isinstance(text, str):
        raise SkipSample("message is not text")
    if not text.strip():
        raise SkipSample("empty message")
    return Message(role="assistant" if place % 2 else "user", content=(text.strip(),))
