"""Which adapter reads a folder or file of data, found by reading its first records with each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from sft.core.errors import UserError, printable
from sft.core.sample import Sample, SkipSample
from sft.data.datasets import Adapter, adapter_names

OWN = "messages"
"""The adapter of the user's own conversations: it is preferred where a published dataset's reads no more records."""

FIRST_RECORDS = 300
"""So many records of a dataset are read to recognise it."""

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".tar", ".gz", ".tgz", ".zst")
MAX_FILES = 12
"""So many files of a folder without a file of the split are tried."""


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A dataset as one adapter reads its first records."""

    dataset: str
    path: Path
    records: int = 0
    """Records that were read; all of them if there are no more than FIRST_RECORDS."""
    share_read: float = 1.0
    """The share of the raw bytes that these records are."""
    samples: tuple[Sample, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first record that was skipped for each reason."""

    @property
    def estimated_samples(self) -> int:
        """Return how many samples the whole dataset has, if its other records are like the first."""
        return max(round(len(self.samples) / self.share_read), 1)

    @property
    def is_whole(self) -> bool:
        """Return whether these are all records."""
        return self.share_read >= 1

    def describe(self) -> Iterator[str]:
        """Yield lines that say what was found."""
        first = "" if self.is_whole else "first "
        yield (
            f"{self.path}: read by the adapter {self.dataset}; {len(self.samples):,} of the {first}{self.records:,} "
            f"records are samples, with {self.num_images:,} images"
        )
        for reason, number in self.skipped.most_common():
            yield f"  {number:,} skipped: {reason}; as {printable(self.examples[reason])}"

    @property
    def num_images(self) -> int:
        """Return how many images the samples that were read show."""
        return sum(len(sample.images) for sample in self.samples)


def recognise(path: Path) -> Recognised:
    """Return the reading of the data at `path` that makes the most samples.

    Raises:
        UserError: nothing there is readable; it says what the folder holds, or why the records are left out.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected your data")
    refusals: list[str] = []
    found = list(_readings(path, refusals))
    best = max(found, key=lambda one: (len(one.samples), one.dataset == OWN), default=None)
    if best is None:
        raise UserError(refusals[0])
    if not best.samples:
        reason, number = best.skipped.most_common(1)[0]
        raise UserError(f"{best.path}: none of the first {best.records} records is a sample; {number} times: {reason}")
    return best


def _readings(path: Path, refusals: list[str]) -> Iterator[Recognised]:
    """Yield the data as each adapter reads them, and single files of a folder that has none named after a split."""
    names = [OWN, *(name for name in adapter_names() if name != OWN)]
    for name in names:
        try:
            yield _read(name, path)
        except UserError as error:
            refusals.append(str(error))
    if path.is_dir():
        for file in _data_files(path):
            try:
                yield _read(OWN, file)
            except UserError as error:
                refusals.append(str(error))


def _data_files(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix.lower() in DATA_SUFFIXES)
    return list(islice(files, MAX_FILES))


def _read(name: str, path: Path) -> Recognised:
    """Return the first records as an adapter reads them.

    Raises:
        UserError: the adapter finds no files here, or cannot read them.
    """
    adapter = Adapter(name, str(path), "train", {})
    files = adapter.files()
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    records, at = 0, 1.0
    for row in islice(chain.from_iterable(map(adapter.rows, files)), FIRST_RECORDS):
        records += 1
        try:
            if isinstance(row, SkipSample):
                raise row
            at = row.get("__at__", 1.0)
            samples.append(adapter.to_sample(row))
        except SkipSample as skip:
            skipped[skip.reason] += 1
            examples.setdefault(skip.reason, skip.detail or f"record {records}")
    share = 1.0 if records < FIRST_RECORDS else max(at / len(files), 1e-9)
    return Recognised(
        dataset=name,
        path=path,
        records=records,
        share_read=share,
        samples=tuple(samples),
        skipped=skipped,
        examples=examples,
    )
