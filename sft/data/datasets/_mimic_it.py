"""What the two scene-difference sets of MIMIC-IT (Otter) share: SD and CGD, each question about two images.

https://huggingface.co/datasets/pufanyi/MIMICIT, gated. Where NAME is SD or CGD, the data come as

    NAME_instructions.json   {"meta": …, "data": {"NAME_INS_…": {"instruction": str, "answer": str,
                              "image_ids": [id, id], "rel_ins_ids": [id of another instruction, …]}}}
      and beside it either
    NAME.json                {"NAME_IMG_…": base64, or a list of one such string}
    NAME.parquet             column `base64`; the ids are the pandas index (Otter's convert_to_parquet.py)

or as rows of the hub with columns id, instruction, answer, images [{bytes, path}], related instructions; that these lie
in NAME/train-*.parquet is from memory, as `datasets` writes it.

Known defects: instructions name images that are not there; `<image>` and line breaks in instructions; an id with too
many leading zeros was quoted in Otter#329, so ids are compared without them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.images import MAX_BYTES, TOO_MANY_BYTES, base64_image
from sft.core.sample import ImageRef, Message, SkipSample, question_and_answer
from sft.data.formats import Row, batches, is_table, read_json_items, read_records, require_file
from sft.data.formats.base64_object import FileRange, index_base64_object

BLOCK_BYTES = 512 * 1024 * 1024  # so much of an image parquet is held in memory, about


def patterns(name: str, split: str) -> list[str]:
    """Return where either form may lie in a folder; the instructions are of the one published split, train."""
    instructions = [f"{name}_instructions.json", f"{name}/{name}_instructions.json"] if split == "train" else []
    return [*instructions, f"{name}/{split}-*.parquet", f"{split}-*.parquet"]


def beside(file: Path) -> list[Path]:
    """Return the images of an instructions file."""
    name = file.name.partition("_instructions")[0]
    return [path for suffix in ("json", "parquet") if (path := file.with_name(f"{name}.{suffix}")).is_file()][:1]


def read_instructions(file: Path, *, multi_turn: bool, with_images: bool = True) -> Iterator[Row | SkipSample]:
    """Yield instructions, each with `images`: the two images, or what they are read from."""
    if not is_table(file):
        records = _dialogues(file) if multi_turn else _instructions(file)
        return _with_images(records, file) if with_images else records
    if multi_turn or not with_images:
        raise UserError(f"{file}: multi_turn and image_folder go by image ids, which rows of the hub do not have")
    return read_records(file)


def to_messages(row: Row, images: tuple[ImageRef, ...]) -> tuple[Message, ...]:
    """Return both images and the question, the answer, and further turns; raise SkipSample where a text is missing."""
    question, answer = _question_and_answer(row)
    messages = question_and_answer((*images, question), answer)
    for question, answer in map(_question_and_answer, row.get("__further__", ())):
        messages += question_and_answer((question,), answer)
    return messages


def two_images(row: Row) -> tuple[ImageRef, ...]:
    """Return the images of a row, in its order; raise SkipSample unless there are two, and both are whole."""
    ids = " ".join(filter(None, _names(row)))[:200]
    return tuple(_image(source, detail=ids) for source in two_of(row.get("images")))


def two_of(images: object) -> list[Any]:
    """Return the list itself when it has two items, else raise SkipSample."""
    if not isinstance(images, list):
        raise SkipSample("images are not a list")
    if len(images) != 2:
        raise SkipSample({0: "no image", 1: "one image only"}.get(len(images), "more than two images"))
    return images


def _image(source: object, detail: str) -> ImageRef:
    if source is None:
        raise SkipSample("image not in the data", detail=detail)
    if isinstance(source, FileRange):
        if source.length > MAX_BYTES * 4 // 3 + 4:
            raise SkipSample(TOO_MANY_BYTES, detail=detail)
        return base64_image(source.read())
    if not isinstance(source, dict):
        return base64_image(source)
    content = source.get("bytes")
    if not isinstance(content, bytes) or not content:
        raise SkipSample("image without bytes", detail=str(source.get("path"))[:200])
    return ImageRef(source=content)


def _question_and_answer(record: Row) -> tuple[str, str]:
    instruction, answer = _text(record, "instruction"), _text(record, "answer")
    question = " ".join(instruction.replace("<image>", " ").split())
    if not question:
        raise SkipSample("empty instruction")
    if not answer:
        raise SkipSample("empty answer")
    return question, answer


def _text(record: Row, name: str) -> str:
    text = record.get(name)
    if not isinstance(text, str):
        raise SkipSample(f"{name} is not text")
    return text.strip()


def _instructions(file: Path) -> Iterator[Row | SkipSample]:
    for name, record in read_json_items(file, "data"):
        yield record if isinstance(record, dict) else SkipSample("record is not a JSON object", detail=name)


def _dialogues(file: Path) -> Iterator[Row | SkipSample]:
    """Yield instructions with those related ones as further turns that show the same images; each is used once. All
    texts are held in memory: 5 MB for SD, about 50 MB for CGD."""
    records = dict(read_json_items(file, "data"))
    used: set[str] = set()
    for name, record in records.items():
        if name in used:
            yield SkipSample("asked in the dialogue of a related record", filtered=True, detail=name)
        elif not isinstance(record, dict):
            yield SkipSample("record is not a JSON object", detail=name)
        else:
            used.add(name)
            related = [other for other in _related(record, records) if other not in used] if _is_sound(record) else []
            used.update(related)
            yield record | {"__further__": [records[other] for other in related]}


def _related(record: Row, records: dict[str, Any]) -> list[str]:
    """Return the names of the related records that are sound and show the same images, each name once."""
    names = record.get("rel_ins_ids")
    names = dict.fromkeys(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()
    sound = [name for name in names if _is_sound(records.get(name))]
    return [name for name in sound if _names(records[name]) == _names(record)]


def _is_sound(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    try:
        _question_and_answer(record)
        two_of(record.get("image_ids"))
    except SkipSample:
        return False
    return all(_names(record))


def _with_images(records: Iterator[Row | SkipSample], file: Path) -> Iterator[Row | SkipSample]:
    """Yield instructions with the images of NAME.json or NAME.parquet beside them."""
    name, is_named, _ = file.name.partition("_instructions")
    if not is_named:
        raise UserError(f"{file}: an object, as the instructions of MIMIC-IT are; expected NAME_instructions.json")
    in_json, in_parquet = file.with_name(f"{name}.json"), file.with_name(f"{name}.parquet")
    if in_json.is_file() and in_json != file:
        places = {_plain(name): place for name, place in index_base64_object(in_json).items()}
        return (_with(record, places) for record in records)
    return _from_parquet(records, require_file(in_parquet, f"the images of {file.name}, here or in {in_json.name}"))


def _from_parquet(records: Iterator[Row | SkipSample], file: Path) -> Iterator[Row | SkipSample]:
    """Yield instructions with images of the parquet file, which is read through once for every block of instructions;
    what the block shows fits BLOCK_BYTES. Images cannot be read one at a time: pandas writes up to a million rows as
    one row group, here the whole file."""
    with _open_parquet(file) as parquet:
        bytes_per_image = file.stat().st_size // max(parquet.metadata.num_rows, 1)
    block_size = max(BLOCK_BYTES // max(2 * bytes_per_image, 1), 1)
    while block := list(islice(records, block_size)):
        shown = {name for record in block if isinstance(record, dict) for name in _names(record)[:2]}
        images = {name: image for name, image in _read_images(file) if name in shown}
        yield from (_with(record, images) for record in block)


def _with(record: Row | SkipSample, images: Mapping[Any, Any]) -> Row | SkipSample:
    """Return the record with its images, None for one that is absent."""
    if isinstance(record, SkipSample):
        return record
    has_ids = isinstance(record.get("image_ids"), list)
    return record | {"images": [images.get(name) for name in _names(record)] if has_ids else None}


def _names(record: Row) -> list[str | None]:
    """Return the image ids of a record, in the form in which they are compared; None for what is no id."""
    ids = record.get("image_ids")
    return [_plain(name) if isinstance(name, str) else None for name in ids] if isinstance(ids, list) else []


def _plain(name: str) -> str:
    """Return an image id without leading zeros: `CGD_IMG_000000000042` -> `CGD_IMG_42`."""
    head, _, number = name.rpartition("_")
    return f"{head}_{number.lstrip('0')}" if number.isdecimal() else name


def _read_images(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the ids and base64 strings of an image parquet."""
    with _open_parquet(file) as parquet:
        others = [name for name in parquet.schema_arrow.names if name != "base64"]
        if len(others) != 1 or len(parquet.schema_arrow) != 2:
            raise UserError(f"{file}: has columns {parquet.schema_arrow.names}; expected `base64` and one of image ids")
        for batch in batches(file, parquet):
            for name, image in zip(batch.column(others[0]), batch.column("base64"), strict=True):
                yield _plain(str(name)), image.as_py()


@contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as parquet: {' '.join(str(error).split())[:200]}") from error
