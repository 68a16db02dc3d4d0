"""A recipe is read strictly: what is wrong is named, with its line and what would be right."""

import re
from pathlib import Path

import pytest
import yaml

from sft.cli.main import main
from sft.errors import UserError
from sft.recipe import GROUPS, ModelConfig, Recipe, TrainingConfig, load_recipe
from sft.shipped import recipe_path, resolve, shipped_root

TOY = """\
model:
  path: toy
data:
  sequence_length: 100
  mixture:
    - name: cats
      share: 0.75
      datasets: [{dataset: messages, path: cats.jsonl}]
    - name: dogs
      share: 0.25
      datasets:
        - dataset: messages
          path: dogs.jsonl
training:
  max_steps: 10
  tokens_per_step: 400
  learning_rate: 1e-5
output_dir: run
"""


def read(tmp_path: Path, *overrides: str, text: str = TOY) -> Recipe:
    file = tmp_path / "toy.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def refusal(tmp_path: Path, *overrides: str, text: str = TOY) -> str:
    """The one line that says what is wrong, without the folder of the file."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, *overrides, text=text)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_what_is_left_out_has_its_default(tmp_path):
    recipe = read(tmp_path)
    assert recipe.data.train_on == "assistant"
    assert recipe.training.precision == "auto"
    assert recipe.packs_per_step == 4


@pytest.mark.parametrize(
    ("found", "written", "expected"),
    [
        ("  max_steps", "  max_step", "toy.yaml:15: training.max_step: unknown key; did you mean 'max_steps'?"),
        ("output_dir: run", "output_dir: run\nsed: 1", "toy.yaml:19: sed: unknown key; did you mean 'seed'?"),
        ("      share: 0.25", "      share: 0.25\n      shares: 1", "shares: unknown key; did you mean 'share'?"),
        ("          path: dogs", "          paths: dogs", "toy.yaml:13: data.mixture.1.datasets.0.paths: unknown key"),
        ("  path: toy", "  path: toy\n  wheels: 4", "toy.yaml:3: model.wheels: unknown key"),
    ],
)
def test_an_unknown_key_names_its_line_and_the_nearest_one(tmp_path, found, written, expected):
    assert expected in refusal_of_first(tmp_path, TOY.replace(found, written))


def refusal_of_first(tmp_path, text):
    """Like `refusal`, where a misspelt key is missing under its right name too: a line each, the first counts."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, text=text)
    lines = str(caught.value).replace(f"{tmp_path}/", "").split("\n")
    return next(line for line in lines if "unknown key" in line)


def test_a_missing_key_is_named_with_the_part_it_belongs_to(tmp_path):
    assert refusal(tmp_path, text=TOY.replace("  max_steps: 10\n", "")) == (
        "toy.yaml:14: training.max_steps: this key is required"
    )
    assert refusal(tmp_path, text=TOY.replace("output_dir: run\n", "")) == "toy.yaml: output_dir: this key is required"


@pytest.mark.parametrize(
    ("found", "written", "expected"),
    [
        ("max_steps: 10", "max_steps: many", "toy.yaml:15: training.max_steps: Input should be a valid integer"),
        ("max_steps: 10", "max_steps: 0", "toy.yaml:15: training.max_steps: Input should be greater than 0, found 0"),
        ("1e-5", ".inf", "toy.yaml:17: training.learning_rate: Input should be a finite number, found inf"),
        ("share: 0.25", "share: -1", "toy.yaml:10: data.mixture.1.share: Input should be greater than 0, found -1"),
        ("path: toy", "path: [toy]", "toy.yaml:2: model.path: Input should be a valid string, found ['toy']"),
        ("share: 0.25", "share: 0.2", "toy.yaml:3: data: shares sum to 0.95; they must sum to 1 or to 100"),
        ("name: dogs", "name: cats", "toy.yaml:3: data: two sources are called 'cats'; names must differ"),
        ("400", "450", "training.tokens_per_step 450 is not a whole number of packs of 100 tokens"),
        ("400", "400\n  micro_batch_packs: 3", "training.micro_batch_packs 3 does not divide the 4 packs of a step"),
        (
            "output_dir: run",
            "output_dir: run\nevaluation: {protocol: card, ranks: [text]}",
            "toy.yaml:19: evaluation: protocol card ranks letters; set ranks: [letter]",
        ),
        ("400", "400\n  warmup_steps: 10", "training.warmup_steps must be less than training.max_steps"),
        ("output_dir: run", "output_dir: run\nevaluation: {every_steps: 30}", "is not a multiple of checkpoints"),
        ("output_dir: run", "output_dir: run\nevaluation: {patience: 3}", "set evaluation.every_steps too"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, found, written, expected):
    assert expected in refusal(tmp_path, text=TOY.replace(found, written))


@pytest.mark.parametrize(
    ("found", "written", "expected"),
    [
        (
            "output_dir: run",
            "output_dir: run\noutput_dir: on",
            "toy.yaml:19: not readable as YAML: key 'output_dir' st",
        ),
        ("path: cats.jsonl", "path: *dogs", "toy.yaml:8: not readable as YAML: aliases (*name) are not allowed"),
        ("path: toy", "path: !!python/name:os.system", "toy.yaml:2: not readable as YAML: could not determine a const"),
        ("output_dir: run", "output_dir: [run", "not readable as YAML"),
        ("output_dir: run", "output_dir: 2026-13-41", "toy.yaml: not readable as YAML: month must be in 1..12"),
        ("output_dir: run", "output_dir: ru\x00n", "not readable as YAML: unacceptable character"),
        ("output_dir: run", "? [a, b]\n: run", "toy.yaml:18: not readable as YAML: found unhashable key"),
        ("output_dir: run", "output_dir: " + "[" * 5000, "not readable as YAML"),
        (TOY, "- a list\n", "toy.yaml: a recipe is a mapping of keys, found list"),
        (TOY, "", "toy.yaml: a recipe is a mapping of keys, found NoneType"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(tmp_path, found, written, expected):
    assert expected in refusal(tmp_path, text=TOY.replace(found, written))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "toy.yaml").write_bytes(b"\x80\x81")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_recipe(tmp_path / "toy.yaml")


def test_shares_are_fractions_or_percent(tmp_path):
    percent = TOY.replace("0.75", "75").replace("0.25", "25")
    assert read(tmp_path).data.shares == read(tmp_path, text=percent).data.shares == (0.75, 0.25)


def test_a_number_needs_no_dot(tmp_path):
    assert read(tmp_path).training.learning_rate == 0.00001, "YAML 1.1 reads 1e-5 as text"
    assert read(tmp_path, "training.learning_rate=3e-6").training.learning_rate == 0.000003


def test_overrides_are_dotted_and_read_as_yaml(tmp_path):
    recipe = read(
        tmp_path,
        "training.max_steps=7",
        "data.mixture.1.name=wolves",
        "data.mixture.1.datasets.0.options.form=wild",
        "training.betas=[0.8, 0.9]",
        "evaluation.benchmark=null",
        "evaluation.seed=3",
    )
    assert recipe.training.max_steps == 7
    assert recipe.data.mixture[1].name == "wolves"
    assert recipe.data.mixture[1].datasets[0].options == {"form": "wild"}
    assert recipe.training.betas == (0.8, 0.9)
    assert recipe.evaluation.benchmark is None
    assert recipe.evaluation.seed == 3, "evaluation is not in the file"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("data.mixture.2.name=fox", "there is no '2' to go into"),
        ("data.mixture.first.name=fox", "there is no 'first' to go into"),
        ("data.mixture.2=fox", "there is no '2' to set"),
        ("training.max_steps.now=3", "there is no 'now' to set"),
        ("training.max_steps=[3", "not readable as YAML"),
        ("training.max_stepz=3", "training.max_stepz: unknown key; did you mean 'max_steps'?"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, expected):
    assert expected in refusal(tmp_path, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.mode=lora", "model.lora.alpa=2"], "model.lora.alpa: unknown key; did you mean 'alpha'?"),
        (["training.groups.visoin.weight_decay=0"], "training.groups.visoin: Input should be 'vision', "),
        (["training.groups.vision.wieght_decay=0"], "training.groups.vision.wieght_decay: unknown key; did you mean"),
        (
            ["model.mode=qlora", "training.groups.vision.learning_rate=1"],
            "training.groups names vision, of which nothing is trained; see model.trainable",
        ),
        (["model.lora.r=4"], "model: lora is set, but mode is full"),
        (["training.decay_steps=5"], "training: decay_steps 5 is before max_steps 10"),
    ],
)
def test_what_cannot_be_trained_so_is_named(tmp_path, overrides, expected):
    assert expected in refusal(tmp_path, *overrides)


def test_the_page_on_training_is_about_this_recipe():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert ModelConfig.model_validate(yaml.safe_load(snippet)["model"]).mode == "qlora"
    names = (*GROUPS, *TrainingConfig.model_fields)
    told_elsewhere = {"tokens_per_step", "micro_batch_packs", "betas"}
    assert {name for name in names if not re.search(rf"`([a-z_]+\.)?{name}`", page)} == told_elsewhere


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = read(tmp_path, "data.mixture.0.datasets.0.options={form: wild}")
    assert read(tmp_path, text=recipe.to_yaml()) == recipe


def test_the_store_is_named_after_what_is_asked(tmp_path):
    cats, dogs = (source.datasets[0].store_name for source in read(tmp_path).data.mixture)
    assert cats != dogs
    assert (
        cats
        == read(tmp_path, "data.mixture.0.share=0.5", "data.mixture.1.share=0.5").data.mixture[0].datasets[0].store_name
    )


# ------------------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize("file", sorted((shipped_root() / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid(file, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["validate", "--no-paths", file.stem])
    assert ended.value.code == 0
    assert f"{file.stem}: valid" in capsys.readouterr().out
    assert file.read_text().startswith("#"), "a recipe opens with what it is for and its command"


def test_shipped_files_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("quickstart").name == "quickstart.yaml"
    assert resolve("shipped:recipes/quickstart.yaml").is_file()
    assert resolve("somewhere/else") == Path("somewhere/else")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        recipe_path("quickstrat")
    with pytest.raises(UserError, match="no such file is shipped"):
        resolve("shipped:tiny_bass")
