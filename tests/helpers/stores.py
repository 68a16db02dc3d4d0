"""Small images, an adapter of hand-made samples, and the store that is made of them."""

import io
from pathlib import Path

from PIL import Image

from sft.core.sample import ImageRef, Message, Sample, SkipSample
from sft.data.store import Settings, Store, prepare_store


def encoded(colour: str, format: str = "PNG", size: tuple[int, int] = (4, 4)) -> bytes:
    """An image of one colour as an encoded file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")


class Toys:
    """An adapter whose records are samples, or the reason to leave them out; its raw files are only looked at."""

    name = "toys"
    licence = "MIT"

    def __init__(self, *records: Sample | SkipSample, file: Path | None = None, version: int = 1) -> None:
        self.records = records
        self.raw = file or Path(__file__)
        self.version = version
        self.num_read = 0

    def files(self):
        return [self.raw]

    def all_files(self):
        return self.files()

    def rows(self, file):
        for record in self.records:
            self.num_read += 1
            yield record if isinstance(record, SkipSample) else {"sample": record}

    def not_read(self, row, sample=None):
        return ()

    def to_sample(self, row):
        return row["sample"]


def shown(key: str, *items: str | bytes) -> Sample:
    """A question of texts and encoded images, answered yes."""
    content = tuple(ImageRef(source=item) if isinstance(item, bytes) else item for item in items)
    return Sample(
        key=key,
        messages=(Message(role="user", content=content), Message(role="assistant", content=("Yes.",))),
    )


def prepared(path, adapter, *, on_progress=lambda records, share: None, max_skip_share=1.0, **settings) -> Store:
    settings = Settings(max_skip_share=max_skip_share, **settings)
    return prepare_store(adapter, path / "toys", asked={"dataset": "toys"}, settings=settings, on_progress=on_progress)
