"""Image-text pairs, LAION, PMD and the like, as documents: the image, then its caption.

Raw layouts, told apart by the file and by the columns of a row:
    00000.tar       img2dataset's `webdataset` output: `<key>.jpg`, `<key>.txt`, `<key>.json`, or .jpeg, .png, .webp;
                    HuggingFaceM4's `<key>.image.jpeg`, `<key>.text.txt`. img2dataset leaves failed downloads out
    00000.parquet   img2dataset's `files` output: `url, caption, key, status, …`, the image is `00000/<key>.jpg`; failed
                    downloads are listed with their status
    00000.parquet   img2dataset's `parquet` output: the same with the image in `jpg` and the caption in `txt`
    *.parquet       PMD: `image` ({bytes, path}, or null where the download failed), `text`, `source`, `meta`
    *.parquet       LAION: `URL`, `TEXT`, …, without images; nothing is ever fetched, so every row is left out
A folder with tars is read as tars alone, since img2dataset lists the same samples in a parquet file beside each.

`image_column` and `text_column` name other columns, or the extensions of other tar members (`text_column: cls`). A
column may hold bytes, {bytes, path} or a path relative to `image_folder`, which is itself relative to the data's folder
and defaults to it.

`prob_image_at_end` is the share of images that stand after their captions. A configuration template of IDEFICS has 0.1
for PMD; whether the final runs kept it is not known.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.images import local_image
from sft.core.sample import ImageRef, Message, Sample, SkipSample
from sft.data.datasets._meaning import Keys
from sft.data.formats import Row, find_files, folder_of, read_records

LICENCE = "LAION: CC-BY-4.0 for URLs and captions; PMD: that of each source; images belong to their owners"
IMAGES = ("image", "image.jpeg", "jpg", "jpeg", "png", "webp")
TEXTS = ("text", "text.txt", "txt", "TEXT", "caption")
KNOWN = "url status error_message width height original_width original_height exif sha256 md5 uid json meta URL"
KEYS = Keys.of(" ".join((*IMAGES, *TEXTS, KNOWN)), is_conversation=False)


def files(path: Path, split: str) -> list[Path]:
    """Return the tars of a folder or else its parquet files, those named after the split where there are some."""
    parquets = (f"{split}-*.parquet", f"data/{split}-*.parquet", "*.parquet")
    return find_files(path, "*.tar", "*.tar.gz", "*.tgz", *parquets, what="shards of image-text pairs")


def rows(
    file: Path, split: str, *, image_column: str | None = None, text_column: str | None = None
) -> Iterator[Row | SkipSample]:
    """Yield the samples of a tar, or the rows of a parquet file with its name, after which images are kept."""
    members = ("json", *_columns(image_column, IMAGES), *_columns(text_column, TEXTS))
    for row in read_records(file, members=members):
        yield row if isinstance(row, SkipSample) else row | {"__shard__": file.stem}


def to_sample(
    row: Row,
    path: Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    image_folder: str | None = None,
    prob_image_at_end: float = 0.0,
    seed: int = 0,
) -> Sample:
    """Return one image and its caption. `seed` and the key draw whether the image stands at the end."""
    if not 0 <= prob_image_at_end <= 1:
        raise UserError(f"dataset 'image_text_pairs': prob_image_at_end is {prob_image_at_end}; expected 0 to 1")
    if _status(row) != "success":
        raise SkipSample("download failed", filtered=True)
    key = f"image_text_pairs/{row['__from__']}"
    folder = folder_of(path) / (image_folder or "")
    image = _image(row, _columns(image_column, IMAGES), folder)
    text = _only(row, _columns(text_column, TEXTS), "text_column")
    if text is None:
        raise SkipSample("no caption", detail=_found(row, "text_column"))
    caption = _caption(text)
    is_at_end = random.Random(f"{seed}/{key}").random() < prob_image_at_end
    content = (caption, image) if is_at_end else (image, caption)
    return Sample(key=key, messages=(Message(role="document", content=content),))


def _columns(chosen: str | None, usual: Sequence[str]) -> Sequence[str]:
    return (chosen,) if chosen else usual


def _only(row: Row, columns: Sequence[str], option: str) -> Any:
    """Return what the one of the columns holds that is there."""
    found = [column for column in columns if row.get(column) is not None]
    if any(_plain(row[column]) != _plain(row[found[0]]) for column in found[1:]):
        raise SkipSample("several images or captions", detail=_found({name: 0 for name in found}, option))
    return row[found[0]] if found else None


def _plain(value: Any) -> Any:
    """Return a text without regard to whether it is encoded and to blanks around it, anything else as it is."""
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value.strip() if isinstance(value, str) else value


def _status(row: Row) -> object:
    """Return what became of the download, by the row or the json member of a tar: success where neither says."""
    if "__key__" in row and row.get("json") is not None:
        row = _json_object(row["json"])
    return row.get("status") or "success"


def _json_object(member: Any) -> Row:
    try:
        value = json.loads(member)
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SkipSample("json member is not a JSON object")
    return value


def _image(row: Row, columns: Sequence[str], folder: Path) -> ImageRef:
    value = _only(row, columns, "image_column")
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None and "__key__" in row:
        raise SkipSample("no image", detail=_found(row, "image_column"))
    if value is None and row.get("status") == "success" and row.get("key"):
        value = f"{row.get('__shard__')}/{row['key']}.jpg"
    if value is None:
        raise SkipSample("image not downloaded", filtered=True, detail=_found(row, "image_column"))
    return ImageRef(source=value) if isinstance(value, bytes) else local_image(folder, value)


def _found(row: Row, option: str) -> str:
    """Return what a row has, as a hint."""
    names = [name for name in row if not name.startswith("__")] + row.get("__others__", [])
    return f"found {', '.join(names) or 'nothing'}; option {option} says which one is meant"


def _caption(text: Any) -> str:
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise SkipSample("caption is not UTF-8") from error
    if not isinstance(text, str):
        raise SkipSample("caption is not text")
    if not text.strip():
        raise SkipSample("empty caption")
    return text.strip()
