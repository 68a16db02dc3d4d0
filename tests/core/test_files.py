"""Files that are written whole or not at all."""

import errno
import os

import pytest

from sft.core.files import whole_file, write_atomically


def test_a_full_disk_is_told_by_the_name_of_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "answers.jsonl"
    write_atomically(file, "before")

    def no_room(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does: without a name

    with pytest.raises(OSError, match="No space") as told, whole_file(file) as opened:
        opened.write(b"half")
        no_room()
    assert told.value.filename == str(file)
    monkeypatch.setattr("pathlib.Path.write_text", no_room)
    with pytest.raises(OSError, match="No space") as told:
        write_atomically(file, "after")
    assert told.value.filename == str(file)
    assert [path.name for path in file.parent.iterdir()] == ["answers.jsonl"]
    assert file.read_text() == "before"
