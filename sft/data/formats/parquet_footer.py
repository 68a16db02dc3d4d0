"""The sizes of a parquet file's columns, read from its footer.

pyarrow has them as well, but its `RowGroupMetaData.column()` ends the process where a column's metadata is damaged
(pyarrow 26: an exception of C++ that nothing catches). The footer is written in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BYTE_ARRAY = 6
"""The number of parquet's type of strings and bytes."""

_Value = Any
"""A number, bytes, a list of values, or the fields of a struct by their ids."""


class ColumnSizes(NamedTuple):
    """What the footer says about one column of a row group; absent numbers are 0."""

    name: str
    """The dotted path of the column."""
    kind: int
    num_values: int
    unpacked: int
    packed: int
    dictionary_at: int
    """The position of the dictionary's page in the file."""


def column_sizes(path: Path) -> list[list[ColumnSizes]]:
    """Return the columns of every row group.

    Raises:
        OSError: the footer is damaged.
    """
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        footer = _Thrift(file.read(length))
    try:
        groups = footer.struct().get(4, [])
        return [[_sizes(column[3]) for column in group[1]] for group in groups]
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"the footer is damaged: {type(error).__name__}") from error


def _sizes(column: dict[int, _Value]) -> ColumnSizes:
    name = b".".join(column[3]).decode(errors="replace")
    return ColumnSizes(name, *(int(column.get(field, 0)) for field in (1, 5, 6, 7, 11)))


class _Thrift:
    """A text in Thrift's compact protocol, read from the beginning."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def struct(self) -> dict[int, _Value]:
        """Read a struct: its fields by their ids. One that stands twice would let readers differ, so it is refused."""
        fields: dict[int, _Value] = {}
        for field, kind in self._headers():
            if field in fields:
                raise OSError(f"the footer is damaged: field {field} stands twice")
            fields[field] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _headers(self) -> Iterator[tuple[int, int]]:
        field = 0
        while header := self._byte():
            field = field + (header >> 4) if header >> 4 else self._number()
            yield field, header & 15

    def _value(self, kind: int) -> _Value:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._number()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            return self._list()
        if kind == 12:
            return self.struct()
        raise OSError(f"the footer is damaged: there is no type {kind}")  # parquet has no maps

    def _list(self) -> list[_Value]:
        header = self._byte()
        size = self._varint() if header >> 4 == 15 else header >> 4
        return [self._value(header & 15) for _ in range(size)]

    def _number(self) -> int:
        varint = self._varint()
        return (varint >> 1) ^ -(varint & 1)

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return (value | byte << shift) & 2**64 - 1

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _bytes(self, length: int) -> bytes:
        self._at += length
        if self._at > len(self._content):
            raise IndexError(length)
        return self._content[self._at - length : self._at]
