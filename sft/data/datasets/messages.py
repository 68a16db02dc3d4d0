"""Your own conversations, in the forms that TRL, LLaMA-Factory, ms-swift and LLaVA read.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A dog."}],
     "images": ["photos/dog.jpg"]}
    {"conversations": [{"from": "human", "value": "What is this?\\n<image>"}, {"from": "gpt", "value": "A dog."}],
     "image": "photos/dog.jpg"}

docs/data.md#messages has all forms of turns, parts and images that are read, and what is left out for which reason.
Strings are stripped, also around markers; parts are taken as they are.

Raw layout: a file of one such object a line (.jsonl), of one list (.json) or of one a row (.parquet); or a folder that
holds `<split>.jsonl`, `.json` or `.parquet`, or `<split>-00000-of-00002.parquet` and so on, as the hub has them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from sft.core.errors import UserError, nearest
from sft.core.images import local_image
from sft.core.sample import ImageRef, Role, Sample, SkipSample
from sft.data.datasets import _conversation
from sft.data.datasets._conversation import PART_KEYS, SYSTEMS, TURN_KEYS, is_texts, listed_images, to_messages
from sft.data.datasets._meaning import FLAGS, Keys, is_image_key
from sft.data.formats import Row, folder_of, read_json, read_records, record_files

LICENCE = "your own"
READS_HUB = True
VERSION = 4
EXPECTED = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "images": ["…"]}'
QUESTIONS = ("user", "prompt", "query", "instruction", "question")
ANSWERS = ("assistant", "completion", "response", "output", "answer")
"""What a question and its answer are called in a record without turns, and in each of its `texts`."""
FILE_NAMES = {"file_name": "image", "file_names": "images"}
FORMS = ("messages", "conversations", "texts", "document")
ROUND = " ".join((*QUESTIONS, *ANSWERS, "input history document"))
KEYS = Keys.of(
    " ".join(("messages conversations texts images image", *SYSTEMS)), turn=TURN_KEYS, part=PART_KEYS, rounds=ROUND
)


def files(path: Path, split: str, *, image_folder: str | None = None) -> list[Path]:
    """Return the file itself, or the split's file of the folder."""
    images = folder_of(path) / (image_folder or "")
    if image_folder is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder; expected images (option image_folder)")
    if path.is_file():
        return [path]
    name = re.escape(split)
    part = r"-\d+-of-\d+(-\w+)?"
    found = record_files(path, name)
    for folder, stem in ((path, name + part), (path / "data", name + part), (path, f".+-{name}({part})?")):
        found = found or record_files(folder, stem)  # of the hub, of the cache of `datasets`
    if found := found or _saved_files(path, split) or record_files(path, "metadata"):
        return _checked_parts(path, found)
    there = _listed(entry.name + "/" * entry.is_dir() for entry in path.iterdir()) or "nothing"
    cure = f"the folder holds {there}; name the file after the split, or say which by the path"
    raise UserError(f"{path}: no {split}.jsonl, {split}.json or {split}.parquet; {cure}")


def _checked_parts(path: Path, found: list[Path]) -> list[Path]:
    """Return one file, or all parts of one set, whose names say how many there are; else raise a UserError."""
    parts = [re.search(r"-(\d+)-of-(\d+)", file.name) for file in found]
    numbers = sorted((int(part[2]), int(part[1])) if part else (1, 0) for part in parts)
    if numbers == [(len(found), number) for number in range(len(found))]:
        return found
    names = _listed(file.name for file in found)
    raise UserError(f"{path}: holds {names}; expected one of them, or each part of one set; or say which by the path")


def _saved_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder that `save_to_disk` of `datasets` wrote, of one set or of several by their split."""
    states = (state for state in (folder / "state.json", folder / split / "state.json") if state.is_file())
    return [state.parent / one["filename"] for state in states for one in read_json(state)["_data_files"]]


def _listed(all_names: Iterable[str]) -> str:
    names = sorted(all_names)
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"])


def rows(file: Path, split: str, *, columns: dict[str, str] | None = None) -> Iterator[Row | SkipSample]:
    """Yield the records of a file. In `metadata.*`, as `imagefolder` of `datasets` has it, `file_name` is the image."""
    records = read_records(file)
    first = next(records, None)
    if first is None:
        raise UserError(f"{file}: the file has no records; expected such as {EXPECTED}")
    names = {name: ours for name, ours in FILE_NAMES.items() if name not in (columns or {}).values()}
    for row in chain([first], records):
        if file.name.startswith("metadata.") and isinstance(row, dict) and {"image", "images"}.isdisjoint(row):
            row = {names.get(key, key): value for key, value in row.items()}
        yield row


def to_sample(
    row: Row,
    path: Path,
    *,
    image_folder: str | None = None,
    columns: dict[str, str] | None = None,
    train_on: Literal["answers", "last"] = "answers",
) -> Sample:
    """Return one conversation or document. `image_folder` holds the images, relative to the data's own folder or
    absolute. `columns` are names of theirs by ours. With `train_on: last` only the last answer is learned."""
    row = _renamed(row, columns) if columns else row
    images = listed_images(row)
    is_marked = bool(images) or "__images__" in row or any(map(is_image_key, row))
    find = partial(_image_file, folder_of(path) / (image_folder or ""))
    messages = to_messages(row, _turns(row), images, find, is_marked=is_marked)
    if train_on == "last":
        before = (replace(m, is_trained=m.is_trained and m.role != "assistant") for m in messages[:-1])
        messages = (*before, messages[-1])
    return Sample(key=f"messages/{row['__from__']}", messages=messages)


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """Return a record by our names of its columns; what it has under other names of the same is not read."""
    names = {*FORMS, *ROUND.split(), "images", "image", *SYSTEMS}
    if unknown := [ours for ours in columns if ours not in names]:
        near = nearest(unknown[0], names) or f" (known: {', '.join(sorted(names))})"
        raise UserError(f"dataset 'messages': option columns: unknown name {unknown[0]!r}{near}")
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        found = ", ".join(key for key in row if not key.startswith("__"))
        raise SkipSample("no such column", detail=f"{missing[0]!r}{nearest(missing[0], row)} (found {found})"[:200])
    kinds = [{*QUESTIONS, "input", "history"}, {*ANSWERS}, {"images", "image"}]
    same = {*columns.values()}.union(*(kind for kind in kinds if kind & {*columns}))
    same |= {*FORMS} if {*columns} & {*ROUND.split(), *FORMS} else set()
    same |= {*ROUND.split()} if {*columns} & {*FORMS} else set()
    kept = {key: value for key, value in row.items() if key not in same}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _turns(row: Row) -> Any:
    """Return the turns of a record, in whichever form."""
    found = [name for name in FORMS if row.get(name)]
    asked = [[name for name in names if row.get(name)] for names in (QUESTIONS, ANSWERS)]
    found += chain(*asked) if all(asked) and found in (["texts"], ["document"]) else ()
    if any(row[name] != row[found[0]] for name in found):
        raise _conversation.two_forms(found)
    if row.get("messages") or row.get("conversations"):
        return row.get("messages") or row["conversations"]
    if row.get("document"):
        return [{"role": "document", "content": row["document"]}]
    rounds = row["texts"] if isinstance(row.get("texts"), list) else [*_history(row), row]
    return [turn for each in rounds for turn in _round(each, row)]


def _history(row: Row) -> list[Row]:
    """Return the rounds before that of an alpaca record, which are pairs."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise SkipSample("history is not a list of pairs")
    return [{"user": question, "assistant": answer} for question, answer in pairs]


def _round(asked: Any, row: Row) -> list[Any]:
    """Return a question and its answer; either may be a list of turns, as TRL has them."""
    found = asked if isinstance(asked, dict) else {}
    questions, answers = (
        [name for name in names if found.get(name)] or [name for name in names if name in found]
        for names in (QUESTIONS, ANSWERS)
    )
    if not questions or not answers:
        raise _conversation.no_messages(found or row, ("messages", "conversations"), QUESTIONS + ANSWERS)
    if len(questions) > 1 or len(answers) > 1:
        names = ", ".join(questions + answers)
        raise SkipSample("several questions or answers", detail=f"{names}; say which by the option columns")
    question, answer, more = found[questions[0]], found[answers[0]], found.get("input")
    if more and not (isinstance(question, str) and isinstance(more, str)):
        raise SkipSample("input is not text", detail=type(more).__name__)
    if is_texts(question) and is_texts(answer) and len(question) == len(answer):
        pairs = ({questions[0]: one, answers[0]: its} for one, its in zip(question, answer, strict=True))
        return [turn for pair in pairs for turn in _round(found | pair, row)]
    flags = {name: found[name] for name in FLAGS if name in found}
    return [*_as_turns("user", f"{question}\n{more}" if more else question, {}), *_as_turns("assistant", answer, flags)]


def _as_turns(role: Role, content: Any, flags: Row) -> list[Any]:
    is_list = isinstance(content, list) and any(isinstance(turn, dict) and turn.get("role") for turn in content)
    return content if is_list else [{"role": role, "content": content, **flags}]


def _image_file(folder: Path, given: Any) -> ImageRef:
    image = local_image(folder, given)
    try:
        if isinstance(image.source, Path) and image.source.is_file():
            return image
    except OSError as error:  # a name too long
        raise SkipSample("image is not a local path", detail=repr(given)[:200]) from error
    raise SkipSample("image file missing", detail=str(image.source))
