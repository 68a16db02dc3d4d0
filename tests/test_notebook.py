"""The notebook for Colab: it runs from top to bottom, its settings fit a T4, and nothing of a run is kept in it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import REPOSITORY
from helpers.tiled import byte_tokenizer, tiny_folder
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

from sft.cost.devices import find_device
from sft.cost.estimate import estimate
from sft.recipe import load_recipe

FILE = REPOSITORY / "notebooks" / "finetune_4bit_colab.ipynb"
COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def write_own_data(folder):
    """Ten images, each with two questions, in the form that the notebook names."""
    (folder / "photos").mkdir(parents=True)
    lines = []
    for number, (name, colour) in enumerate([*COLOURS.items()] * 5):
        pixels = np.full((20, 20, 3), colour, np.uint8)
        pixels[0, number] = 255  # no two are the same
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
        for question, answer in (("What colour is it?", f"It is {name}."), ("Is it red?", str(name == "red"))):
            turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns, "images": [f"photos/{number}.png"]}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))


def with_settings(notebook, **settings):
    """The notebook with other values in its first cell of code."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    names = [line.split(" = ")[0] for line in cell.source.splitlines() if " = " in line]
    assert settings.keys() <= set(names)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    return notebook


def test_no_output_is_kept(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)
    assert not any("execution" in cell.metadata for cell in code)


@pytest.mark.parametrize(("model", "data", "mode"), [
    ("HuggingFaceM4/idefics-9b", "", "qlora"),
    ("HuggingFaceM4/idefics-9b-instruct", "my_data", "qlora"),
    ("HuggingFaceTB/SmolVLM-256M-Instruct", "", "full"),
    ("HuggingFaceTB/SmolVLM-Instruct", "my_data", "lora"),
])  # fmt: skip
def test_a_model_is_trained_in_the_way_that_fits_a_t4(notebook, tmp_path, monkeypatch, model, data, mode):
    monkeypatch.chdir(tmp_path)
    with_settings(notebook, MODEL=model, DATA=data)
    wanted = ("# All there is to choose", "GPU = found_gpu()", "def write_recipe")
    values = {"subprocess": subprocess}
    for cell in notebook.cells:
        if any(part in cell.source for part in wanted):
            exec(cell.source, values)
    planned = estimate(load_recipe(Path("recipe.yaml")), find_device("t4"), 1, 0.35, None).report
    assert values["MODE"] == mode
    assert planned["fits"] and planned["peak_bytes"] < 13.5 * 2**30, "a gibibyte to spare for the notebook itself"
    assert planned["seconds"] < 3 * 3600
    (row,) = [line for line in notebook.cells[0].source.splitlines() if f"`{model}`" in line]
    minutes = planned["seconds"] / 60
    assert f"| {planned['peak_bytes'] / 2**30:.1f} | {minutes:.0f} minutes |" in row, row


def test_without_a_wheel_nothing_is_installed_and_one_line_says_what_to_upload(notebook, tmp_path, monkeypatch):
    (install,) = (cell.source for cell in notebook.cells if "%pip install" in cell.source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no idefics_sft-\*\.whl here; upload one beside this notebook"):
        exec(TransformerManager().transform_cell(install), {})


def test_what_takes_long_is_run_where_its_lines_are_shown_as_they_come(notebook):
    assert not any(cell.source.startswith("%%bash") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mode", "weights"), [
    ("shipped:tiny_base", "qlora", "adapter_model.safetensors"),
    ("smolvlm", "", "model.safetensors"),
])  # fmt: skip
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch, model, mode, weights):
    write_own_data(tmp_path / "my_data")
    if model == "smolvlm":
        model = str(tiny_folder(tmp_path / model, byte_tokenizer(), kind="smolvlm"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other beside other work: 40 times as slow
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    with_settings(notebook, MODEL=model, MODE=mode, DATA="my_data", STEPS=2)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    images = [kind for output in outputs for kind in output.get("data", ()) if kind.startswith("image/")]
    assert "fits, " in text and "T4 16 GB" in text and f"mode: {mode or 'full'}" in text
    assert "⟦" in text, "what is trained"
    assert text.count("  before:  ") == text.count("  after:   ") == len(images) - 1 > 0, "and the losses"
    for name in (f"my-model/{weights}", "my-model.zip", "runs/colab/report.html"):
        assert (tmp_path / name).exists()
    assert not (tmp_path / "my-model" / "state").exists()
    assert not (tmp_path / "my-merged-model").exists(), "merging only if asked"
