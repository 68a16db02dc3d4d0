"""What adapters make of raw records."""

import base64
from pathlib import Path

from helpers.stores import encoded

from sft.core.sample import Sample, SkipSample
from sft.data.datasets import Adapter

DATA = Path(__file__).parent.parent / "fixtures"


def adapter(name: str, path: str | Path | None = None, split: str = "train", **options) -> Adapter:
    """An adapter over its fixture folder, tests/fixtures/<name>, or over `path`."""
    return Adapter(name, str(path or DATA / name), split, options)


def outcomes(of: Adapter) -> list[Sample | str]:
    """What becomes of each record, in order: a sample, or the reason to leave it out (`filtered: …` for a policy)."""
    found: list[Sample | str] = []
    for row in (row for file in of.files() for row in of.rows(file)):
        try:
            if isinstance(row, SkipSample):
                raise row
            found.append(of.to_sample(row))
        except SkipSample as skip:
            found.append(f"filtered: {skip.reason}" if skip.filtered else skip.reason)
    return found


def samples(of: Adapter) -> list[Sample]:
    """The samples alone."""
    return [outcome for outcome in outcomes(of) if isinstance(outcome, Sample)]


def said(sample: Sample) -> list[tuple[str, str]]:
    """A conversation as a reader sees it: (role, text), an image as `<file name>` or `<N bytes>`."""

    def show(item) -> str:
        if isinstance(item, str):
            return item
        return f"<{item.source.name}>" if isinstance(item.source, Path) else f"<{len(item.source)} bytes>"

    return [(message.role, "|".join(map(show, message.content))) for message in sample.messages]


def encoded_base64(colour: str) -> str:
    """An image of one colour as base64."""
    return base64.b64encode(encoded(colour)).decode()
