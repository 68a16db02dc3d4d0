"""Files that several tests read."""

from pathlib import Path


def write_tsv(file: Path, columns: dict[str, object]) -> Path:
    """Write a header and one row, as a benchmark of MMBench's layout has them."""
    file.write_text("\t".join(columns) + "\n" + "\t".join(map(str, columns.values())) + "\n")
    return file
