"""The run of a recipe with a benchmark, for tests of what comes after training; a plugin of conftest."""

import base64
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import status_of
from helpers.files import write_tsv
from helpers.stores import encoded
from helpers.training import write_recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The recipe of a run with two checkpoints and a benchmark of eight images, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder)
    colours = ("red", "green", "blue", "yellow", "teal", "brown", "gray", "black")
    rows = []
    for number, colour in enumerate(colours):
        image = folder / f"{colour}.png"
        image.write_bytes(encoded(colour, size=(28, 28)))
        rows.append(question(number, colour, colours[number - 1], image))
    write_tsv(folder / "colours.tsv", rows[0])
    with (folder / "colours.tsv").open("a") as file:
        file.writelines("\t".join(map(str, row.values())) + "\n" for row in rows[1:])
    values = yaml.safe_load(recipe.read_text())
    values["evaluation"] = {
        "benchmark": str(folder / "colours.tsv"),
        "protocol": "vanilla",
        "ranks": ["text", "letter"],
    }
    values["training"]["max_steps"] = 2
    values["checkpoints"]["every_steps"] = 1
    recipe.write_text(yaml.safe_dump(values))
    assert status_of("train", recipe) == 0
    return recipe


def question(number: int, right: str, wrong: str, image: Path) -> dict[str, object]:
    content = base64.b64encode(image.read_bytes()).decode()
    return {"index": number, "question": "Which color?", "A": right, "B": wrong, "answer": "A", "image": content}


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """The run, copied to another place."""
    return shutil.copytree(trained.parent / "run", tmp_path / "copy")
