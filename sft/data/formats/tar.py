"""WebDataset tars, sample by sample, within bounds that `tarfile` alone does not keep."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from sft.core.errors import UserError, printable
from sft.core.sample import SkipSample
from sft.data.formats.rows import BLOCK_BYTES, TOO_LONG, Row, max_record_bytes, one_line, require_file

MAX_HEADER_BYTES = 64 * 1024  # of one tar member: its header, its long name, its attributes
MAX_NAMED = 8  # members of a sample that are not read and are named


def read_tar(path: Path, extensions: Sequence[str]) -> Iterator[Row | SkipSample]:
    """Yield the samples of a WebDataset shard (.tar, .tar.gz): members that share a name up to its first dot, as
    {"__key__": name, extension: bytes}. A number may stand before an extension (`000.3.image.jpeg`). Members with other
    extensions are not even read, `__others__` names the first of them; nothing is ever unpickled. Raise UserError where
    it is missing, not a tar, or cut off: one cut between two members reads without an error of its own but lacks the
    two blocks of zeros that end every tar, so that is looked for."""
    limit, size = max_record_bytes.get(), max(require_file(path, "a tar").stat().st_size, 1)
    sample: Row = {}
    num_bytes = 0
    try:
        with path.open("rb") as raw:
            tar = _Tar(raw)
            for member in tar.members():
                key, extension = _split_name(member.name)
                if sample and sample["__key__"] != key:
                    yield _whole(sample)
                    sample, num_bytes = {}, 0
                sample = sample or {"__key__": key, "__from__": f"{path.name}:{printable(key)}"}
                sample["__at__"] = raw.tell() / size
                if not member.isreg() or member.issparse():
                    sample["__skip__"] = "tar member is not a plain file"
                elif extension in sample:
                    sample["__skip__"] = "tar member stands there twice"
                elif extension.lstrip("0123456789.") in extensions:  # 3.image.jpeg of interleaved documents
                    num_bytes += tarfile.BLOCKSIZE + member.size
                    if num_bytes > limit + tarfile.BLOCKSIZE:
                        sample["__skip__"] = TOO_LONG
                    if "__skip__" not in sample:
                        sample[extension] = tar.content(member)
                elif len(others := sample.setdefault("__others__", [])) < MAX_NAMED:
                    others.append(printable(extension[:40]))
            tar.check_end()
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError, RecursionError) as error:
        where = f"after {printable(sample['__key__'])}" if sample else "at its beginning"
        raise UserError(f"{path}: not readable as a tar {where}: {one_line(error)}") from error
    if sample:
        yield _whole(sample)


class _Tar:
    """What `tarfile` does, within bounds: its memory stays small and it does not run in circles."""

    def __init__(self, raw: IO[bytes]) -> None:
        is_packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        self.file = _Bounded(gzip.GzipFile(fileobj=raw) if is_packed else raw)
        self.tar = tarfile.open(fileobj=cast(IO[bytes], self.file), mode="r:")  # noqa: SIM115  (`raw` is its caller's)

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield all members but folders."""
        while True:
            self.file.left = MAX_HEADER_BYTES
            member = self.tar.next()
            if member is None:
                return
            if self.tar.offset <= member.offset:  # and the next member would be this one again
                raise tarfile.ReadError(f"{printable(member.name)} has a negative size")
            vars(self.tar).update(members=[], pax_headers={})  # it would keep them all
            if not member.isdir():
                yield member

    def content(self, member: tarfile.TarInfo) -> bytes:
        """Return the whole of a plain file."""
        self.file.seek(member.offset_data)
        self.file.left = member.size
        content = self.file.read(member.size)
        if len(content) < member.size:
            raise EOFError(f"member {printable(member.name)} is cut off")
        return content

    def check_end(self) -> None:
        """Read on to the end, where gzip has its checksum; raise ReadError unless two blocks of zeros stand there."""
        self.file.left = tarfile.BLOCKSIZE
        if self.file.last + self.file.read(tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the tar breaks off; get it again")
        while content := self.file.file.read(BLOCK_BYTES):
            if content.strip(b"\0"):
                raise tarfile.ReadError("the tar goes on behind its end, as two in one file would")


class _Bounded:
    """A file that gives no more than `left` bytes: the headers of a tar may ask for any number of them."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, MAX_HEADER_BYTES
        self.last = b""  # what was read last
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header asks for {size:,} bytes")
        self.left -= size
        self.last = self.file.read(size)
        return self.last


def _split_name(name: str) -> tuple[str, str]:
    """Return the key and the extension of a member, as webdataset does: `a/000.image.jpg` -> (`a/000`, `image.jpg`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _whole(sample: Row) -> Row | SkipSample:
    if "__skip__" in sample:
        return SkipSample(sample["__skip__"], where=sample["__from__"])
    return sample
