"""docs/ says what is so: its examples run, its recipe lines and commands name what there is."""

import inspect
import json
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from conftest import REPOSITORY, status_of
from PIL import Image

from sft.cli.main import app
from sft.datasets import Adapter, adapter_names
from sft.recipe import DataConfig, DatasetConfig
from sft.store import Store

PAGES = {file.name: file.read_text(encoding="utf-8") for file in (REPOSITORY / "docs").glob("*.md")}
PAGE = PAGES["data.md"]
EXAMPLES = dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL))
SNIPPETS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)]
DATASETS = [dataset for snippet in SNIPPETS if isinstance(snippet, list) for dataset in snippet]
COMMANDS = [
    command
    for page in PAGES.values()
    for command in re.findall(r"^ *(?:\$ )?(?:PYTHONPATH=\. )?idefics-sft (.*)", page, flags=re.MULTILINE)
]


def write(folder: Path, name: str) -> Path:
    """An example of the page as a file."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(EXAMPLES[name], encoding="utf-8")
    return file


def write_photo(file: Path, colour: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(file)


def options_of(name: str) -> set[str]:
    """The options of an adapter."""
    module = import_module(f"sft.datasets.{name}")
    functions = [getattr(module, function, None) for function in ("files", "rows", "to_sample")]
    parameters = [p for function in functions if function for p in inspect.signature(function).parameters.values()]
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def section(name: str) -> str:
    """What the page says about a dataset."""
    return PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


# --------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize("dataset", DATASETS, ids=json.dumps)
def test_a_recipe_line_names_an_adapter_and_options_that_it_has(dataset):
    config = DatasetConfig.model_validate(dataset)
    Adapter(config.dataset, None if config.path is None else ".", config.split, config.options)


@pytest.mark.parametrize("name", adapter_names())
def test_every_adapter_has_a_section_with_all_its_options_and_a_recipe_line(name):
    assert all(f"`{option}`" in section(name) or f"`{option}: " in section(name) for option in options_of(name))
    assert name in {dataset["dataset"] for dataset in DATASETS}


def test_other_snippets_are_keys_of_a_recipe():
    mixture = [{"name": "mine", "share": 1, "datasets": [DATASETS[0]]}]
    others = [snippet["data"] for snippet in SNIPPETS if isinstance(snippet, dict)]
    assert [DataConfig.model_validate(data | {"mixture": mixture}).validation is None for data in others] == [
        False,
        False,
        True,
    ]


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_the_options_that_are_named(line):
    name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)


def test_the_mixture_of_the_page_is_one():
    (text,) = re.findall(r"^```yaml\n(.*?)```", PAGES["mixtures.md"], flags=re.DOTALL | re.MULTILINE)
    data = DataConfig.model_validate(yaml.safe_load(text)["data"])
    assert [source.when_exhausted for source in data.mixture] == ["reweight", "stop"]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_to_files_and_headings(page):
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)", page, flags=re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]*)\)", page):
        assert target[1:] in headings if target.startswith("#") else (REPOSITORY / "docs" / target).is_file(), target


# ------------------------------------------------------------------------------------------------------- examples


def test_the_conversations_are_read_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "my_data/train.jsonl")
    for name, colour in (("dog", "brown"), ("cat", "gray")):
        write_photo(tmp_path / "my_data" / "photos" / f"{name}.jpg", colour)
    assert status_of("prepare", "--dataset", "messages", "--path", "my_data", "--output", "stores/mine") == 0
    store = Store(Path("stores/mine"))
    rounds, parts, llava, text, document = (store.sample(row).messages for row in range(len(store)))
    assert [len(messages) for messages in (rounds, parts, llava, text, document)] == [4, 3, 2, 2, 1]
    assert [len(store.sample(row).images) for row in range(5)] == [1, 2, 1, 0, 1]
    assert rounds[0].content[1] == "What is this?" and llava[0].content[0] == "What is this?"
    assert text[0].content == ("What does <image> stand for?",)
    assert document[0].role == "document"
    assert status_of("stats", "stores/mine") == 0
    assert status_of("export", "stores/mine", "--output", "mine.parquet") == 0


def test_the_adapter_works_under_its_dotted_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "my_tools/captions.py")
    write_photo(tmp_path / "captions" / "dog.jpg", "brown")
    (tmp_path / "captions" / "train.csv").write_text("file,caption\ndog.jpg,A dog on the grass\ndog.jpg,\n")
    arguments = shlex.split(next(line for line in COMMANDS if "my_tools.captions" in line))
    assert status_of(*arguments, "--option", "question=What is this?", "--max-skip-share", "0.5") == 0
    store = Store(Path("stores/captions"))
    assert store.sample(0).key == "captions/train.csv:1"
    assert [message.content[-1] for message in store.sample(0).messages] == ["What is this?", "A dog on the grass"]
    assert store.manifest["skipped"] == {"no caption": 1}
    assert store.manifest["examples"] == {"no caption": "my_tools.captions/train.csv:2"}


def test_the_links_of_a_shard_are_listed_for_img2dataset_whose_files_are_then_read(tmp_path, monkeypatch):
    shard = tmp_path / "data" / "train-00000.parquet"
    shard.parent.mkdir()
    pages = [{"images": ["http://a", None, "http://b"], "texts": [None, "Between.", None]}] * 2
    pq.write_table(pa.Table.from_pylist(pages), shard)
    monkeypatch.setattr(sys, "argv", ["obelics_urls.py", str(shard)])
    runpy.run_path(str(write(tmp_path, "obelics_urls.py")))
    assert shard.with_suffix(".urls.txt").read_text() == "http://a\nhttp://b\n"
    listed = [{"url": "http://a", "key": "0", "status": "success"}, {"url": "http://b", "key": "1", "status": "failed"}]
    write_photo(tmp_path / "data" / "train-00000.images" / "00000" / "0.jpg", "brown")
    pq.write_table(pa.Table.from_pylist(listed), tmp_path / "data" / "train-00000.images" / "00000.parquet")
    output = tmp_path / "store"
    assert status_of("prepare", "--dataset", "obelics", "--path", tmp_path, "--output", output) == 0
    (document,) = Store(output).sample(0).messages
    assert document.content[1:] == ("Between.",) and len(Store(output).sample(0).images) == 1
