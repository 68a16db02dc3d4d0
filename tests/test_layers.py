"""Imports point strictly down the layers; inside a package they may go anywhere."""

import ast
import tomllib
from importlib.util import resolve_name
from pathlib import Path

import sft

LAYERS = (  # the design's layer 0 is the first two rows: the nouns, and what needs nothing but them
    "errors sample",
    "recipe shipped recomputation attention loss locking files parallel images spikes statistics stopping",
    "sources pixels image_keys chat_template models optim lora distributed precision training_state",
    "fitting checkpoint engines",
    "memory datasets store encoding mixture packing dealing collate generation bases naming run_status held_out",
    "prepared feature_cache planner stated validation inference metrics",
    "plans callbacks",
    "data_loader trainer checks evaluation held_out_loss",
    "scoring dry_run",
    "selection leaks",
    "monitoring preparation run_folder",
    "run mix inspection export merge stats chat api report cost",
    "cli __init__",
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names.split()}


def upward_imports(root):
    """`datasets/vqa.py:2 imports sft.packing` for every import that does not point down."""
    found = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        own = relative.parts[0].removesuffix(".py")
        package = ".".join(("sft", *relative.parts[:-1]))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = resolve_name("." * node.level + (node.module or ""), package)
                names = [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            others = {name.split(".")[1] for name in names if name.startswith("sft.")} - {own}
            for other in sorted(others):
                if LAYER_OF.get(other, 99) >= LAYER_OF.get(own, -1):
                    found.append(f"{relative}:{node.lineno} imports sft.{other}")
    return found


def test_imports_point_down():
    root = Path(sft.__file__).parent
    assert upward_imports(root) == []
    unknown = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert unknown - {"__init__"} <= LAYER_OF.keys(), "give the new module a layer here and in the design"


def test_an_import_that_points_up_is_found(tmp_path):
    sources = {
        "datasets/vqa.py": "import json\nfrom sft.packing import pack\nfrom sft.sample import Sample\n",
        "datasets/card.py": "from sft.datasets import vqa\nfrom . import vqa\nfrom ..trainer import fit\n",
        "trainer.py": "from sft import run, store\nimport sft.cli.main\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert upward_imports(tmp_path) == [
        "datasets/card.py:3 imports sft.trainer",
        "datasets/vqa.py:2 imports sft.packing",
        "trainer.py:1 imports sft.run",
        "trainer.py:2 imports sft.cli",
    ]


def test_every_package_travels_in_the_wheel():
    root = Path(sft.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    packages = {".".join(("sft", *file.parent.relative_to(root).parts)) for file in root.rglob("__init__.py")}
    assert packages <= set(project["tool"]["setuptools"]["packages"])
