"""OBELICS: 141 million web pages with text and images in reading order, as documents (HuggingFaceM4/OBELICS).

Raw layouts:
    train-*.parquet   `images` (URL or null) and `texts` (text or null), lists of the same length: one or the other in
                      each slot; also `metadata` and `general_metadata`, which are not used
    *.tar             pages exported with their images: `<key>.<slot>.text.txt`, `<key>.<slot>.image.jpeg`, and
                      `<key>.metadata.txt`, the names of all members, which tells whether a page is whole
Images are URLs and nothing is ever fetched. What was downloaded is kept beside each shard, `train-00000.images/` for
`train-00000.parquet`, so that the map from URL to file, which is held in memory, is that of one shard:
    img2dataset's `files` output:   00000.parquet (`url`, `key`, `status`) and 00000/<key>.jpg
    or anything else, with a map:   *.parquet or *.jsonl with `url` and `path`, relative to that folder
These folders stand in `image_folder` (relative to the shards) where they are not beside them.

Known defects: many URLs are dead: such an image is left out of its page. Slots may be null in both lists, or hold ""
for null. A page may be several documents with END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED between them, each is a document
here.

The rules, with their defaults, are those of HuggingFaceM4's published packing code (of Idefics2's time), which judges a
page before it is taken apart and counts dead images as images; here they judge each document as it will be read.
`min_words` stands for its 5 tokens, of which an image and the ends take 5: one word. `skip_texts_with_image_tokens` is
off: the text `<image>` cannot become an image here.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sft.core.errors import UserError
from sft.core.images import local_image
from sft.core.sample import ImageRef, Message, Sample, SkipSample
from sft.data.datasets._meaning import Keys
from sft.data.formats import Row, find_files, is_table, read_records

LICENCE = "CC-BY-4.0 (texts and images belong to their owners)"
KEYS = Keys.of("items", is_conversation=False)
END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
LISTS = ("*.parquet", "*.jsonl")
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>")

Items = list[str | ImageRef]  # texts and images in reading order


def files(path: Path, split: str) -> list[Path]:
    """Return the shards of the split, or else all tars."""
    return find_files(path, f"{split}-*.parquet", f"data/{split}-*.parquet", "*.tar", "*.tar.gz", what="web documents")


def beside(file: Path, *, image_folder: str | None = None) -> list[Path]:
    """Return the lists of the shard's images."""
    folder = _folder(file, image_folder)
    return find_files(folder, *LISTS, what="the shard's images and what URLs they were") if is_table(file) else []


def _folder(file: Path, image_folder: str | None) -> Path:
    return file.parent / (image_folder or "") / f"{file.stem}.images"


def rows(file: Path, split: str, *, image_folder: str | None = None) -> Iterator[Row | SkipSample]:
    """Yield the documents of a shard, each with its texts and images in reading order."""
    folder = _folder(file, image_folder)
    pages = read_records(file, columns=("images", "texts"), members=("text.txt", "image.jpeg", "metadata.txt"))
    names = _image_map(folder) if is_table(file) else {}
    for page in pages:
        if isinstance(page, SkipSample):
            yield page
            continue
        try:
            items = _tar_items(page) if "__key__" in page else _parquet_items(page, names, folder)
        except SkipSample as skip:
            yield SkipSample(skip.reason, detail=skip.detail, where=page["__from__"])
            continue
        for number, document in enumerate(_documents(items)):
            yield {"__from__": f"{page['__from__']}/{number}", "__at__": page["__at__"], "items": document}


def _image_map(folder: Path) -> dict[str, str]:
    """Return a map from URL to file below the folder, of the images that were downloaded."""
    names: dict[str, str] = {}
    for file in find_files(folder, *LISTS, what="the shard's images and what URLs they were"):
        for record in read_records(file):
            if isinstance(record, SkipSample) or record.get("status", "success") != "success":
                continue
            url, name, key = (record.get(column) for column in ("url", "path", "key"))
            name = f"{file.stem}/{key}.jpg" if name is None and key else name
            if isinstance(url, str) and isinstance(name, str):
                names.setdefault(url, name)
    if not names:
        raise UserError(f"{folder}: no downloaded image listed; expected `url` with `path`, or with `key` and `status`")
    return names


def _parquet_items(page: Row, names: dict[str, str], folder: Path) -> Items:
    """Return what the slots hold, without the images that were not downloaded."""
    urls, texts = page.get("images"), page.get("texts")
    if not isinstance(urls, list) or not isinstance(texts, list):
        raise SkipSample("images or texts is not a list")
    if len(urls) != len(texts):
        raise SkipSample("images and texts differ in length")
    items: Items = []
    for url, text in zip(urls, texts, strict=True):
        if not isinstance(url, str | None) or not isinstance(text, str | None):
            raise SkipSample("slot holds neither a URL nor a text")
        if url and text:
            raise SkipSample("slot holds both an image and a text")
        if text:
            items.append(text)
        elif url in names:
            items.append(local_image(folder, names[url]))
    return items


def _tar_items(page: Row) -> Items:
    """Return what the slots hold in the order of their numbers: `tar --sort=name` put 10 before 2."""
    listed = page.get("metadata.txt", b"").decode("utf-8", "replace").splitlines()
    if not listed:
        raise SkipSample("no list of the members", detail=f"found {', '.join(page.get('__others__', ())) or 'none'}")
    if any(name.partition(".")[2] not in page for name in listed):
        raise SkipSample("a listed member is missing")
    slots: dict[int, str | ImageRef] = {}
    for member, content in page.items():
        number, _, kind = member.partition(".")
        if not number.isdecimal() or kind not in ("text.txt", "image.jpeg"):
            continue
        if int(number) in slots:
            raise SkipSample("slot holds both an image and a text")
        slots[int(number)] = ImageRef(source=content) if kind == "image.jpeg" else _decoded(content)
    return [slots[number] for number in sorted(slots)]


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise SkipSample("text is not UTF-8") from error


def _documents(items: Items) -> list[Items]:
    """Return the documents of a page, taken apart at its markers; a page with nothing in it stays one document."""
    documents: list[Items] = [[]]
    for item in items:
        if isinstance(item, ImageRef):
            documents[-1].append(item)
            continue
        parts: list[Items] = [[part] if part.strip() else [] for part in item.split(END_OF_DOCUMENT)]
        documents[-1] += parts[0]
        documents += parts[1:]
    return [document for document in documents if document] or [[]]


def to_sample(
    row: Row,
    path: Path,
    *,
    max_images: int | None = None,
    min_words: int = 1,
    skip_ending_with_two_images: bool = True,
    skip_three_consecutive_images: bool = True,
    skip_single_trailing_image: bool = True,
    skip_texts_with_image_tokens: bool = False,
) -> Sample:
    """Return one document, unless a rule leaves it out. One whose only image is last, which no text sees, is no use."""
    items = row.get("items")
    if not isinstance(items, list):
        raise SkipSample("no items")
    if skip_texts_with_image_tokens:
        items = [item for item in items if not (isinstance(item, str) and any(token in item for token in IMAGE_TOKENS))]
    content = _joined(item for item in items if isinstance(item, str) or _is_here(item))
    shape = "".join("T" if isinstance(item, str) else "I" for item in content)
    num_words = sum(len(item.split()) for item in content if isinstance(item, str))
    rules = {
        "no image is left": "I" not in shape,
        "fewer than min_words words": num_words < min_words,
        "more than max_images images": max_images is not None and shape.count("I") > max_images,
        "ends with two images": skip_ending_with_two_images and shape.endswith("II"),
        "three consecutive images": skip_three_consecutive_images and "III" in shape,
        "the only image is last": skip_single_trailing_image and shape in ("I", "TI"),
    }
    for reason, applies in rules.items():
        if applies:
            raise SkipSample(reason, filtered=True)
    return Sample(key=f"obelics/{row['__from__']}", messages=(Message(role="document", content=content),))


def _is_here(image: object) -> bool:
    return isinstance(image, ImageRef) and (isinstance(image.source, bytes) or os.path.isfile(image.source))


def _joined(items: Iterable[str | ImageRef]) -> tuple[str | ImageRef, ...]:
    """Return adjacent texts as one, with a space between them, and no space at the ends of the document."""
    joined: Items = []
    for item in items:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += f" {item}"
        else:
            joined.append(item)
    if joined and isinstance(joined[0], str):
        joined[0] = joined[0].lstrip()
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    return tuple(joined)
