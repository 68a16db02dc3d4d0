"""`new`: which form data of one's own have, and a recipe for them that holds as it stands."""

import csv
import json

import pytest
from conftest import status_of
from helpers.stores import BLUE, RED

from sft.data.check_recipe import check_recipe
from sft.data.new_recipe import sizes_for
from sft.data.recognise import recognise
from sft.recipe import load_recipe

TURNS = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A dog."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]


def write(folder, name, records):
    """Write records as the suffix says, and the images 0.png and photos/1.png beside them."""
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "0.png").write_bytes(RED)
    (folder / "photos" / "1.png").write_bytes(BLUE)
    with (folder / name).open("w", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        elif name.endswith(".jsonl"):
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            json.dump(records, file)


@pytest.mark.parametrize(
    ("name", "record", "file", "options"),
    [
        ("train.jsonl", {"messages": TURNS, "images": ["0.png"]}, "", {}),
        ("data.json", {"conversations": LLAVA, "image": "0.png"}, "data.json", {}),
        ("data.json", {"conversations": LLAVA, "image": "1.png"}, "data.json", {"image_folder": "photos"}),
        ("metadata.csv", {"file_name": "0.png", "question": "What?", "answer": "A dog."}, "", {}),
        (
            "rows.jsonl",
            {"Question": "What?", "Caption": "A dog.", "img": "0.png"},
            "rows.jsonl",
            {"columns": {"user": "Question", "assistant": "Caption", "image": "img"}},
        ),
    ],
)
def test_a_form_is_recognised_with_its_images(tmp_path, name, record, file, options):
    write(tmp_path, name, [record] * 3)
    found = recognise(tmp_path)
    assert (found.dataset, found.path, found.options) == ("messages", tmp_path / file, options)
    assert [len(sample.images) for sample in found.samples] == [1, 1, 1]


def test_the_recipe_holds_as_it_stands_and_names_what_was_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path, "train.jsonl", [{"messages": TURNS, "images": ["0.png"]}] * 3 + [{"messages": TURNS, "label": False}]
    )
    for mode in ("qlora", "lora", "full"):
        assert status_of("new", ".", f"{mode}.yaml", "--model", "shipped:tiny_base", "--mode", mode, "--json") == 0
        recipe = load_recipe(tmp_path / f"{mode}.yaml")
        check_recipe(recipe)
        assert recipe.model.mode == mode and recipe.output_dir == f"runs/{mode}"
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["samples"], said["skipped"]) == (3, {"answer is labelled as bad": 1})
    assert "1 skipped: answer is labelled as bad" in (tmp_path / "full.yaml").read_text()


def test_small_data_get_more_epochs_and_smaller_steps_than_large_ones(tmp_path):
    write(tmp_path, "train.jsonl", [{"messages": TURNS}] * 12)
    few = sizes_for(recognise(tmp_path), "idefics")
    write(tmp_path, "train.jsonl", [{"messages": TURNS}] * 5000)
    found = recognise(tmp_path)
    many = sizes_for(found, "idefics")
    assert few.epochs == 15 and many.epochs == 3 and few.tokens_per_step <= many.tokens_per_step
    assert abs(found.estimated_samples / 5000 - 1) < 0.1, "from the share of the file that was read"


def test_the_family_is_that_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "train.jsonl", [{"messages": TURNS, "images": ["0.png"]}] * 3)
    assert status_of("new", ".", "small.yaml", "--model", "HuggingFaceTB/SmolVLM-256M-Instruct", "--mode", "full") == 0
    recipe = load_recipe(tmp_path / "small.yaml")
    check_recipe(recipe)
    assert (recipe.model.family, recipe.data.sequence_length) == ("smolvlm", 8192)


def test_what_is_no_data_is_said_with_what_is_there(tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    assert "nowhere: no such file or folder" in refusal("new", "nowhere")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(RED)
    assert "the folder holds 0.png" in refusal("new", "photos")
    (tmp_path / "train.jsonl").write_text(json.dumps({"video": "a.mp4", "messages": TURNS}) + "\n")
    assert "record has video or audio" in refusal("new", "train.jsonl")
    assert "expected the name of a .yaml file" in refusal("new", "train.jsonl", "recipe.txt")
    (tmp_path / "mine.yaml").write_text("")
    assert "--force overwrites it" in refusal("new", "train.jsonl", "mine.yaml")
