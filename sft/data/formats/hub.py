"""Datasets of the hub: `datasets` downloads one once, and its cached Arrow files are read like any others."""

import re
from pathlib import Path

from sft.core.contain import contained
from sft.core.errors import UserError
from sft.core.shipped import DATA_SUFFIXES


def is_hub_id(path: str) -> bool:
    """Return whether a path has the form `owner/name`, and neither the ending of a file nor a folder that is here."""
    is_here = path.startswith(("raw/", "data/", "datasets/", "my_data/")) or Path(path).parent.is_dir()
    is_file = path.lower().endswith((".json", *DATA_SUFFIXES))
    return not is_here and not is_file and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path))


def hub_cache() -> Path:
    """Return the folder below which the hub's libraries keep files, images among them."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def hub_files(name: str, split: str, configuration: str | None) -> list[Path]:
    """Return the Arrow files of one split, images not decoded; raise UserError where it is missing or out of reach."""
    import datasets

    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise UserError(f"{name}: split {split!r} is not the name of a split")
    with contained() as failed:  # by the network, the hub, the files: each library has its own errors
        return [Path(file["filename"]) for file in datasets.load_dataset(name, configuration, split=split).cache_files]
    why = f"as a dataset of the hub: {failed.reason} (option config names a configuration)"
    raise UserError(f"{name}: no such file or folder here; {why}")
