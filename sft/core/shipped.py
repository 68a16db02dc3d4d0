"""Files that travel with the toolkit: recipes, chat templates, small base models, the released models' shapes.

In a checkout they stand at the top of the repository; in an installed wheel, in `sft/shipped_files`. In recipes a path
that begins with `shipped:` names one of them: `shipped:tiny_base`.
"""

import os
from pathlib import Path

from sft.core.errors import UserError, nearest

PREFIX = "shipped:"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".tar", ".zip")
_PACKAGE = Path(__file__).parent.parent


def shipped_root() -> Path:
    """Return the folder that holds recipes/, chat_templates/, model_configs/, tiny_base/ and tiny_smolvlm/."""
    installed = _PACKAGE / "shipped_files"
    return installed if installed.is_dir() else _PACKAGE.parent


def user_cache() -> Path:
    """Return the user's folder for what may be made again: `IDEFICS_SFT_CACHE`, else one in `XDG_CACHE_HOME`."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("IDEFICS_SFT_CACHE") or f"{caches}/idefics-sft").expanduser()


def resolve(path: str | Path) -> Path:
    """Return the path on disk of a path in a recipe, or raise UserError where no shipped file has that name."""
    text = str(path)
    if not text.startswith(PREFIX):
        return Path(text).expanduser()
    found = shipped_root() / text.removeprefix(PREFIX)
    if not found.exists():
        raise UserError(f"{text}: no such file is shipped with idefics-sft")
    return found


def is_local(path: str) -> bool:
    """Return whether a model path is a folder rather than a hub id, which has the form `owner/name`."""
    return path.startswith((PREFIX, "/", "./", "../", "~")) or path.count("/") != 1 or Path(path).exists()


def shipped_recipes() -> dict[str, Path]:
    """Return the name and file of every shipped recipe, the quickstart first."""
    files = (shipped_root() / "recipes").glob("*.yaml")
    return {file.stem: file for file in sorted(files, key=lambda file: (file.stem != "quickstart", file.stem))}


def recipe_title(file: Path) -> str:
    """Return what a recipe is for: the first sentence of its comment, after the line for editors."""
    comment = file.read_text(encoding="utf-8").partition("\n")[2].partition("#\n")[0]
    return " ".join(comment.replace("#", " ").split()).partition(". ")[0].rstrip(".")


def recipe_path(name: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one; raise UserError for anything else."""
    path = Path(name)
    for_data = f"`idefics-sft new {name}` writes a recipe for data"
    if path.suffix.lower() in DATA_SUFFIXES and path.is_file():
        raise UserError(f"{name}: this is data, not a recipe; {for_data}")
    if path.is_dir() and name not in ("", *shipped_recipes()):
        if (path / "manifest.json").is_file():
            given = f"give a recipe that has it in data.mixture (`idefics-sft stats {name}` shows what it holds)"
            raise UserError(f"{name}: a prepared dataset, not a recipe; {given}")
        given = "give the folder that `idefics-sft train` wrote, or a recipe"
        raise UserError(f"{name}: a folder without recipe.yaml, so no run; {given}; {for_data}")
    return path if path.is_file() else shipped_recipe(name)


def shipped_recipe(name: str) -> Path:
    """Return the file of a shipped recipe, or raise a UserError that names the nearest."""
    shipped = shipped_recipes()
    if name not in shipped:
        names = f"{nearest(name, shipped)} (shipped: {', '.join(shipped) or 'none'})"
        raise UserError(f"{name}: no such recipe file, and no shipped recipe has that name{names}")
    return shipped[name]
