"""README.md and docs/ say what is so: examples run, recipe lines, commands and links name what there is."""

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
import torch
import typer
import yaml
from conftest import REPOSITORY, status_of
from PIL import Image

from sft.cli.main import PANELS, app
from sft.core.errors import UserError
from sft.core.shipped import shipped_recipes
from sft.data.datasets import Adapter, adapter_names
from sft.data.formats import record_limit
from sft.data.store import Store
from sft.evaluation.task import Answer
from sft.evaluation.tasks import named_tasks, open_tasks
from sft.recipe import DataConfig, DatasetConfig, EvaluationConfig, TrainingConfig, optimizers

FILES = [*sorted((REPOSITORY / "docs").glob("*.md")), *sorted(REPOSITORY.glob("*.md"))]
PAGES = {file.name: file.read_text(encoding="utf-8") for file in FILES}
PAGE = PAGES["data.md"]
EXAMPLES = dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", "\n".join(PAGES.values()), flags=re.DOTALL))
SNIPPETS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)]
DATASETS = [dataset for snippet in SNIPPETS if isinstance(snippet, list) for dataset in snippet]
HEADS = {name: file.read_text(encoding="utf-8").partition("\nmodel:")[0] for name, file in shipped_recipes().items()}


def commands_of(text: str) -> list[str]:
    """What follows `idefics-sft` on lines that are commands, chained ones too."""
    lines = re.findall(r"^(?:#? *)(?:\$ |srun |PYTHONPATH=\. )?(idefics-sft .*)", text, flags=re.MULTILINE)
    chained = (part for line in lines for part in line.split(" && "))
    return [part.removeprefix("idefics-sft ") for part in chained if part.startswith("idefics-sft ")]


COMMANDS = [command for page in PAGES.values() for command in commands_of(page)]
OF_RECIPES = [re.sub(r"  .*", "", command) for head in HEADS.values() for command in commands_of(head)]
MODULES = [import_module(f"sft.cli.{name}") for names in PANELS.values() for name in names]
OF_HELP = [command for module in MODULES for command in getattr(module, "EXAMPLES", ())]


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
    module = import_module(f"sft.data.datasets.{name}")
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
    assert section(name), f"docs/data.md has no section {name}"
    missing = {o for o in options_of(name) if f"`{o}`" not in section(name) and f"`{o}: " not in section(name)}
    assert not missing, f"the section {name} of docs/data.md names no option {missing}"
    assert name in {dataset["dataset"] for dataset in DATASETS}, f"docs/data.md has no yaml recipe line of {name}"


def test_other_snippets_are_keys_of_a_recipe():
    mixture = [{"name": "mine", "share": 1, "datasets": [DATASETS[0]]}]
    others = [snippet["data"] for snippet in SNIPPETS if isinstance(snippet, dict)]
    assert [DataConfig.model_validate(data | {"mixture": mixture}).validation is None for data in others] == [
        False,
        False,
        True,
    ]


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("line", [*COMMANDS, *OF_RECIPES, *OF_HELP])
def test_a_command_has_the_options_that_are_named(line):
    command, arguments = typer.main.get_command(app), re.split(r" [>|] ", line)[0]
    name, *arguments = shlex.split(arguments, comments=True)
    while name in getattr(command, "commands", {}):
        command = command.commands[name]
        if hasattr(command, "commands"):
            name, *arguments = arguments
    command.make_context(name, arguments)


WITHOUT_DATA = sorted(
    {
        line.partition(" #")[0].strip()
        for line in COMMANDS
        if re.match(
            rf"plan ({'|'.join(HEADS)})\b(?!\.)|validate .*--no-paths|recipes (list|show)|tasks (?!show my_tools)", line
        )
    }
)


@pytest.mark.parametrize("line", WITHOUT_DATA)
def test_a_command_that_needs_no_data_runs(line, capsys):
    assert status_of(*shlex.split(line)) == 0
    assert capsys.readouterr().out


def test_mix_prints_what_the_page_shows(capsys):
    (command, shown) = re.search(
        r"^    \$ idefics-sft (mix .*)\n((?:    .*\n)+)", PAGES["mixtures.md"], re.MULTILINE
    ).groups()
    assert status_of(*shlex.split(command)) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert [line for line in lines if line not in (*printed, "…")] == []


def test_every_command_has_examples_in_its_help_that_fit_a_terminal():
    assert [module.__name__ for module in MODULES if not getattr(module, "EXAMPLES", ())] == []
    assert [command for command in OF_HELP if len(f" idefics-sft {command}") > 79] == []


def test_figures_of_plan_are_those_of_the_recipes():
    """Those are held against `plan` in test_recipe.py."""
    told = dict(re.findall(r"^#   idefics-sft (plan .*?)  *([\d.]+ of .*)$", "\n".join(HEADS.values()), re.MULTILINE))
    said = re.findall(r"^ *idefics-sft (plan .*?) *# ([\d.]+ of [\d.]+ GiB)$", PAGES["README.md"], re.MULTILINE)
    assert said and all(told[command].startswith(figures) for command, figures in said)
    days = [
        told[f"plan idefics-{size}-instruct --gpus {gpus}"].partition(", ")[2]
        for size, gpus in (("9b", 8), ("80b", 384))
    ]
    assert f"say {' and '.join(days)} for all 22,000 steps" in PAGES["reproducing.md"]


def test_the_mixture_of_the_page_is_one():
    (text,) = re.findall(r"^```yaml\n(.*?)```", PAGES["mixtures.md"], flags=re.DOTALL | re.MULTILINE)
    data = DataConfig.model_validate(yaml.safe_load(text)["data"])
    assert [source.when_exhausted for source in data.mixture] == ["reweight", "stop"]


def headings_of(page: str) -> set[str]:
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_lead_to_files_and_headings(file):
    for target in re.findall(r"\]\(([^)]*)\)", PAGES[file.name]):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        assert (file.parent / path).exists(), target
        assert not heading or heading in headings_of(PAGES[Path(path).name or file.name]), target


def test_every_page_is_listed_in_the_readme():
    assert {
        name for name in PAGES if (REPOSITORY / "docs" / name).is_file() and f"(docs/{name})" not in PAGES["README.md"]
    } == set()


def test_every_python_snippet_is_run_here_or_has_a_test_of_its_own():
    every = [
        (name, code) for name, page in PAGES.items() for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ]
    assert {name for name, code in every if code not in EXAMPLES.values()} <= {"inference.md"}, "name it: <!-- file -->"
    assert {name for name in EXAMPLES if name.endswith(".py")} == {
        "my_tools/captions.py",
        "my_tools/counting.py",
        "my_tools/vqav2.py",
        "obelics_urls.py",
        "sft/data/formats/tsv.py",
        "sft/recipe/optimizers.py",
    }


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


def test_the_adapter_of_thirty_lines_has_thirty_and_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(write(tmp_path, "my_tools/vqav2.py").read_text().splitlines()) <= 35
    write_photo(tmp_path / "raw" / "vqav2" / "train2014" / "COCO_train2014_000000000009.jpg", "green")
    asked = {"question_id": 9000, "image_id": 9, "question": "What is on the table?", "answer": "food"}
    lines = [asked, asked | {"question_id": 9001, "answer": ""}]
    (tmp_path / "raw" / "vqav2" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = shlex.split(next(line for line in COMMANDS if "my_tools.vqav2" in line))
    assert status_of(*arguments, "--max-skip-share", "0.5") == 0
    store = Store(Path("stores/vqav2"))
    assert (store.sample(0).key, store.manifest["licence"]) == ("vqav2/9000", "CC-BY-4.0")
    assert store.manifest["skipped"] == {"no answer": 1}


def test_the_benchmark_is_shown_read_and_scored_under_its_dotted_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "my_tools/counting.py")
    write_photo(tmp_path / "counting" / "photos" / "1.jpg", "brown")
    asked = {"id": 1, "image": "photos/1.jpg", "things": "dogs", "count": 3}
    (tmp_path / "counting" / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    assert status_of(*shlex.split(next(line for line in COMMANDS if line.startswith("tasks show my_tools")))) == 0
    assert "Counting: how many things" in capsys.readouterr().out
    settings = EvaluationConfig(by="my_tools.counting=counting")
    (task,) = open_tasks(named_tasks(settings), settings, tmp_path)
    (item,) = task.items
    scores = [task.score(item, [Answer(text=text)]) for text in ("3", " 4.", "5", "three dogs")]
    assert scores == [1, 0.5, 0, 0]
    assert task.queries(item)[0].sample.messages[0].content[1] == "How many dogs are there? Answer with a number."
    (tmp_path / "counting" / "questions.jsonl").write_text("[]")
    with pytest.raises(UserError, match="expected objects with id, image, things and count"):
        open_tasks(named_tasks(settings), settings, tmp_path)


def test_the_row_makes_an_optimizer_with_states_of_the_size_that_it_says():
    names = vars(optimizers) | {"torch": torch, "nn": torch.nn, "TrainingConfig": TrainingConfig}
    exec(EXAMPLES["sft/recipe/optimizers.py"], names)  # as in the file
    row = eval("{" + EXAMPLES["OPTIMIZERS"] + "}", names)["nadam"]
    layer = torch.nn.Linear(64, 64, bias=False)
    settings = TrainingConfig(max_steps=1, tokens_per_step=8, learning_rate=0.1)
    group = {"params": [*layer.parameters()], "lr": 0.01, "weight_decay": 0.0}
    optimizer = row.make([group], settings, layer, False)
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert sum(t.nbytes for t in state.values() if t.numel() > 1) == row.bytes_per_parameter * layer.weight.numel()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]


def test_the_reader_yields_rows_and_names_bad_lines(tmp_path):
    long = "cat.jpg\t" + "A cat " * 20
    (tmp_path / "a.tsv").write_text(f"file\tcaption\ndog.jpg\tA dog\n{long}\ncat.jpg\n")
    read_tsv = runpy.run_path(str(write(tmp_path, "sft/data/formats/tsv.py")))["read_tsv"]
    with record_limit(50):
        good, *bad = read_tsv(tmp_path / "a.tsv")
    assert good == {"file": "dog.jpg", "caption": "A dog", "__from__": "a.tsv:2", "__at__": pytest.approx(27 / 164)}
    assert [(skip.reason, skip.detail) for skip in bad] == [
        ("record too long", "a.tsv:3"),
        ("line has another number of columns", "a.tsv:4"),
    ]


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
