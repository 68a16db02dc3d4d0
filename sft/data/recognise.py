"""Which adapter reads a folder or file of data, found by reading its first records with each of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sft.core.errors import UserError, printable
from sft.core.sample import Sample, SkipSample
from sft.data.datasets import Adapter, adapter_names
from sft.data.datasets._meaning import is_image_like
from sft.data.formats import Row, folder_of

OWN = "messages"
"""The adapter of the user's own conversations. A published dataset's is preferred where it reads more records."""

FIRST_RECORDS = 300  # so many records of a dataset are read to recognise it

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst")
MAX_FILES = 12  # so many files of a folder without a file of the split are tried

COLUMNS = {
    "user": ("question", "prompt", "query", "instruction", "input", "user", "human"),
    "assistant": ("answer", "response", "output", "completion", "caption", "text", "label", "assistant"),
}
"""What columns of tables are called that hold a question or an answer; case does not count."""


@dataclass(kw_only=True)
class Recognised:
    """A dataset as one adapter reads its first records."""

    dataset: str
    path: Path
    options: Mapping[str, Any]
    records: int = 0  # that were read: all of them, or FIRST_RECORDS
    share_read: float = 1.0  # the share of the raw bytes that these records are
    first: Row | None = None  # the first record that was read
    samples: list[Sample] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)  # by reason, of the first record that was skipped for it
    others: Sequence[Path] = ()  # other files of the folder that are read as well

    @property
    def estimated_samples(self) -> int:
        """Return how many samples the whole dataset has, if its other records are like the first."""
        return max(round(len(self.samples) / self.share_read), 1)

    def describe(self) -> Iterator[str]:
        """Yield lines that say what was found."""
        first = "" if self.share_read >= 1 else "first "
        images = sum(len(sample.images) for sample in self.samples)
        keys = ", ".join(key for key in self.first or () if not key.startswith("__"))
        yield printable(f"{self.path}: records of {keys or 'nothing'}; read by the adapter {self.dataset}")
        if self.options:
            yield printable(f"  with {', '.join(f'{name} {value}' for name, value in self.options.items())}")
        yield f"  {len(self.samples):,} of the {first}{self.records:,} are samples, with {images:,} images"
        for reason, number in self.skipped.most_common():
            detail = printable(self.details[reason])
            yield f"  {number:,} skipped: {reason}{f', as {detail}' if detail else ''}"
        if self.others:
            names = ", ".join(printable(file.name) for file in self.others)
            yield f"  not taken, though readable too: {names}; give the file that you want"


def recognise(path: Path) -> Recognised:
    """Return the reading of the data at `path` that makes the most samples. Where nothing is readable raise a UserError
    that says what the folder holds, or why the records are skipped."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected your data")
    refusals: list[str] = []
    found = list(_readings(path, refusals))
    best = max(found, key=lambda one: (len(one.samples), one.dataset == OWN), default=None)
    if best is None:
        raise UserError(refusals[0])
    if not best.samples:
        raise UserError("; ".join(line.strip() for line in best.describe()))
    best.others = [one.path for one in found if one is not best and one.path.is_file() and one.samples]
    return best


def _readings(path: Path, refusals: list[str]) -> Iterator[Recognised]:
    """Yield how the adapter of own conversations reads the data, or the single files of a folder without one that is
    named after the split; if it makes no sample of them, how the others do."""
    whole = _own_reading(path, refusals)
    own = [whole] if whole else []
    if path.is_dir() and not own:
        files = (file for file in sorted(path.iterdir()) if file.is_file() and file.suffix.lower() in DATA_SUFFIXES)
        own = [reading for file in islice(files, MAX_FILES) if (reading := _own_reading(file, refusals))]
    names = [] if any(reading.samples for reading in own) else [name for name in adapter_names() if name != OWN]
    others = (_read(name, path, {}, refusals) for name in names)
    yield from (reading for reading in (*own, *others) if reading)


def _own_reading(path: Path, refusals: list[str]) -> Recognised | None:
    """Return the data as they are read: as they are, by guessed columns, with images elsewhere."""
    reading = _read(OWN, path, {}, refusals)
    for guess in (_guessed_columns, _guessed_folder):
        if reading and (more := guess(reading)):
            reading = _read(OWN, path, {**reading.options, **more}, refusals)
    return reading


def _guessed_columns(found: Recognised) -> dict[str, Any]:
    """Return the option `columns` where no record is a sample, or none shows the images that the first one names, and
    that has a column that sounds like a question and one like an answer."""
    if any(sample.images for sample in found.samples):
        return {}
    row = found.first or {}
    names = {key.lower(): key for key in row}
    columns = {ours: next((names[name] for name in theirs if name in names), None) for ours, theirs in COLUMNS.items()}
    columns["image"] = next((key for key in names.values() if is_image_like(key, repr(row[key]))), None)
    guessed = {ours: theirs for ours, theirs in columns.items() if theirs}
    is_better = "image" in guessed or not found.samples
    return {"columns": guessed} if is_better and {"user", "assistant"} <= guessed.keys() else {}


def _guessed_folder(found: Recognised) -> dict[str, Any]:
    """Return the option `image_folder` where the first image that was missing is in a folder beside its file."""
    if found.samples:
        return {}
    missing, folder = found.details.get("image file missing"), folder_of(found.path)
    if missing is None or not Path(missing).is_relative_to(folder):
        return {}
    name = Path(missing).relative_to(folder)
    beside = [entry.name for entry in sorted(folder.iterdir()) if (entry / name).is_file()]
    return {"image_folder": beside[0]} if beside else {}


def _read(name: str, path: Path, options: Mapping[str, Any], refusals: list[str]) -> Recognised | None:
    """Return the first records as an adapter reads them; None, and its reason, if it finds no files or cannot."""
    found, at = Recognised(dataset=name, path=path, options=options), 0.0
    try:
        adapter = Adapter(name, str(path), "train", options)
        files = adapter.files()
        for row in islice(chain.from_iterable(map(adapter.rows, files)), FIRST_RECORDS):
            found.records += 1
            try:
                if isinstance(row, SkipSample):
                    raise row
                found.first, at = found.first or row, row.get("__at__", 1.0)
                found.samples.append(adapter.to_sample(row))
            except SkipSample as skip:
                found.skipped[skip.reason] += 1
                found.details.setdefault(skip.reason, skip.detail)
    except UserError as error:
        refusals.extend(map(str, error.args))
        return None
    if found.records >= FIRST_RECORDS:
        found.share_read = max(at / len(files), 1e-9)
    return found
