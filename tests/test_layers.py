"""A folder imports only folders below it; inside a folder, files may import each other."""

import ast
import re
from importlib.util import resolve_name
from pathlib import Path

import sft

FOLDERS = [  # from the lowest to the highest
    *("core", "recipe", "runs", "models", "data", "batches", "report"),
    *("inference", "checks", "evaluation", "selection", "training", "cost", "cli"),
]


def upward_imports(root):
    """`data/vqa.py:2 imports sft.batches` for every import that does not point down."""
    found = []
    for file in sorted(root.rglob("*.py")):
        *folders, _ = file.relative_to(root).parts
        if not folders:
            continue  # sft/__init__.py, the face of all
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = resolve_name("." * node.level + (node.module or ""), ".".join(("sft", *folders)))
                names = [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            above = FOLDERS[FOLDERS.index(folders[0]) + 1 :]
            others = {name.split(".")[1] for name in names if name.startswith("sft.")}
            found += [
                f"{file.relative_to(root)}:{node.lineno} imports sft.{other}" for other in sorted(others & {*above})
            ]
    return found


def test_imports_point_down():
    root = Path(sft.__file__).parent
    assert upward_imports(root) == []
    folders = {file.parent.name for file in root.glob("*/__init__.py")}
    assert folders == {*FOLDERS}, "give the new folder a place in FOLDERS"
    assert [file.name for file in root.glob("*.py")] == ["__init__.py"], "every file has a folder"


def test_the_docstring_of_a_folder_names_each_of_its_files():
    """Files of `cli`, `datasets` and `tasks` are found by name: a folder of many of a kind need not list them."""
    missing = []
    for file in Path(sft.__file__).parent.rglob("__init__.py"):
        parts = [part.stem for part in file.parent.glob("*.py")] + [
            part.parent.name for part in file.parent.glob("*/__init__.py")
        ]
        names = {name for name in parts if not name.startswith("_")}
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if file.parent.name not in ("sft", "cli", "datasets", "formats", "tasks"):
            missing += [f"{file.parent.name}/{name}" for name in sorted(names) if not re.search(rf"\b{name}\b", about)]
    assert missing == []


def test_adapters_know_no_model():
    files = [*(Path(sft.__file__).parent / "data" / "datasets").glob("*.py")]
    assert files and [file.name for file in files if "sft.models" in file.read_text(encoding="utf-8")] == []


def test_an_import_that_points_up_is_found(tmp_path):
    sources = {
        "data/vqa.py": "import json\nfrom sft.batches import packing\nfrom sft.core.sample import Sample\n",
        "data/card.py": "from sft.data import vqa\nfrom . import vqa\nfrom ..training.trainer import fit\n",
        "data/store/read.py": "from sft.data.formats import tar\nimport sft.batches.collate\n",
        "training/trainer.py": "from sft import run, cost\nimport sft.cli.main\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert upward_imports(tmp_path) == [
        "data/card.py:3 imports sft.training",
        "data/store/read.py:2 imports sft.batches",
        "data/vqa.py:2 imports sft.batches",
        "training/trainer.py:1 imports sft.cost",
        "training/trainer.py:2 imports sft.cli",
    ]
