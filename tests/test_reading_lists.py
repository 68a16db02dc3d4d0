"""The reading lists of CONTRIBUTING: files that are there, each once, few enough to be read."""

import re

import pytest
from conftest import REPOSITORY

TITLES = (
    "To read `train` from the command to the first optimizer step",
    "To read one sample from its raw row to the loss",
)
MAX_FILES, MAX_LINES = 20, 4000


def reading_list(title: str) -> list[str]:
    """The files of a list, in their order."""
    section = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
    entries = re.findall(r"^(\d+)\. \[.*?\]\((\S+)\): \S", section.partition("\n## ")[0], flags=re.MULTILINE)
    assert [int(number) for number, _ in entries] == [*range(1, len(entries) + 1)] != []
    return [file for _, file in entries]


@pytest.mark.parametrize("title", TITLES)
def test_a_path_is_read_in_few_files_and_lines(title):
    files = reading_list(title)
    lines = {file: len((REPOSITORY / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lines) == len(files) <= MAX_FILES
    assert sum(lines.values()) <= MAX_LINES, lines
