"""A recipe is read strictly: what is wrong is named, with its line and what would be right."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, status_of

from sft.core.errors import UserError
from sft.core.shipped import recipe_path, resolve, shipped_recipes
from sft.models.idefics.names import GROUPS
from sft.recipe import ModelConfig, Recipe, TrainingConfig, load_recipe
from sft.recipe.json_schema import MODELINE, SCHEMA_FILE, recipe_schema, schema_text
from sft.training.optimizer import linear_schedule

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
        ("output_dir: run", "output_dir: run\nclip: 1", "clip: unknown key; did you mean 'training.clip'?"),
        (
            "output_dir: run",
            "output_dir: run\ntraining.clip: 1",
            "training.clip: unknown key; in a file, 'clip' stands inside 'training'",
        ),
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
        "toy.yaml:14: training: max_steps or epochs is required; epochs: 3 is usual"
    )
    assert refusal(tmp_path, text=TOY.replace("output_dir: run\n", "")) == "toy.yaml: output_dir: this key is required"


@pytest.mark.parametrize(
    ("found", "written", "expected"),
    [
        ("max_steps: 10", "max_steps: many", "training.max_steps: expected a whole number, found 'many'"),
        ("max_steps: 10", "max_steps: 0", "toy.yaml:15: training.max_steps: expected a number greater than 0, found 0"),
        ("1e-5", ".inf", "toy.yaml:17: training.learning_rate: expected a finite number, found inf"),
        ("share: 0.25", "share: -1", "toy.yaml:10: data.mixture.1.share: expected a number greater than 0, found -1"),
        ("path: toy", "path: [toy]", "toy.yaml:2: model.path: expected text, found a list"),
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
    ("override", "expected"),
    [
        ("data.mixture={toys: 1}", "data.mixture: expected a list of sources, found a mapping of keys"),
        ("data.mixture=[]", "data.mixture: expected one entry or more, found an empty list"),
        ("data.mixture.0.datasets=toys", "data.mixture.0.datasets: expected a list of datasets, found 'toys'"),
        ("data.mixture.0.path=x", "data.mixture.0.path: unknown key"),
        (
            "data.mixture.0.datasets.0={datset: toys}",
            "data.mixture.0.datasets.0.datset: unknown key; did you mean 'dataset'?",
        ),
        ("model.lora=[3]", "model.lora: expected a mapping of keys, found a list"),
        ("training.max_steps=", "training: max_steps or epochs is required; epochs: 3 is usual"),
        ("training.tokens_per_step=", "training.tokens_per_step: expected a whole number, found nothing"),
        ("training.max_steps=true", "training.max_steps: expected a number, found true"),
        ("training.betas=[0.9, 0.9, 0.9]", "training.betas: expected fewer entries, found a list"),
        ("output_dir=2026-01-01", "output_dir: expected text, found 2026-01-01"),
        ("training.num_train_epochs=3", "training.num_train_epochs: unknown key; here it is training.epochs"),
        ("epochs=3", "epochs: unknown key; here it is training.epochs"),
        ("micro_batch_size=4", "micro_batch_size: unknown key; here it is training.micro_batch_packs"),
        ("training.lr=1.0e-4", "training.lr: unknown key; here it is training.learning_rate"),
        ("training.logging_steps=1", "training.logging_steps: unknown key; here every step is in metrics.jsonl"),
        ("save_steps=9", "save_steps: unknown key; here it is checkpoints.every_steps"),
        ("eval_steps=9", "eval_steps: unknown key; here it is evaluation.every_steps"),
        ("training.seed=9", "training.seed: unknown key; did you mean 'evaluation.seed' or 'seed'?"),
        ("training.output_dir=x", "training.output_dir: unknown key; did you mean 'output_dir'?"),
        ("training.fp16=true", "training.fp16: unknown key; here it is training.precision"),
        ("training.epochs=0", "training.epochs: expected a number greater than 0, found 0"),
    ],
)
def test_a_wrong_value_is_one_message_without_words_of_python(tmp_path, override, expected):
    assert refusal(tmp_path, override) == f"override {override!r}: {expected}"


def test_of_two_ends_of_training_neither_wins(tmp_path):
    assert read(tmp_path, "training.epochs=3").training.max_steps is None, "the recipe's gives way"
    assert read(tmp_path, "training.max_steps=", "training.epochs=3").training.epochs == 3
    said = refusal(tmp_path, "training.max_steps=5", "training.epochs=3")
    assert said.endswith("max_steps and epochs both say when training ends; leave one out"), said
    assert said.startswith("overrides 'training.max_steps=5', 'training.epochs=3': ")


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
        (TOY, "- a list\n", "toy.yaml: a recipe is a mapping of keys, found a list"),
        (TOY, "", "toy.yaml: a recipe is a mapping of keys, found an empty file"),
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


def test_how_images_are_stored_may_be_one_word(tmp_path):
    short = TOY.replace("data:\n", "data:\n  images: reference\n")
    assert read(tmp_path, text=short).data.images.store == "reference"
    both = read(
        tmp_path, "data.images.orientation=ignore", "data.images.max_pixels=100_000_000", text=short
    ).data.images
    assert (both.store, both.orientation, both.max_pixels) == ("reference", "ignore", 100_000_000)
    assert read(tmp_path, "data.images=reference").data.images.store == "reference"
    assert "data.images.store: expected 'embed' or 'reference', found 'link'" in refusal(tmp_path, "data.images=link")


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
        ("max_step=3", "max_step: unknown key; did you mean 'training.max_steps'?"),
        ("training.every_steps=3", "did you mean 'checkpoints.every_steps' or 'evaluation.every_steps'?"),
        ("training.max_stepz=3", "training.max_stepz: unknown key; did you mean 'max_steps'?"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, expected):
    said = refusal(tmp_path, override)
    assert said.startswith(f"override {override!r}: ") and expected in said


def test_what_is_wrong_is_blamed_on_the_file_or_on_the_override_that_brought_it(tmp_path):
    abc, uneven = "training.max_steps=abc", "training.tokens_per_step=150"
    assert refusal(tmp_path, "seed=3", abc).startswith(f"override {abc!r}: training.max_steps: ")
    assert refusal(tmp_path, "seed=3", uneven).startswith(f"override {uneven!r}: training.tokens_per_step 150 is not")
    steps = "training.max_steps=4", "training.warmup_steps=5"
    assert refusal(tmp_path, *steps).startswith(f"overrides {steps[0]!r}, {steps[1]!r}: training.warmup_steps must be")
    both = refusal(tmp_path, abc, text=TOY.replace("1e-5", "fast")).split("; ")
    assert both[0].startswith(f"override {abc!r}: ") and both[1].startswith("toy.yaml:17: training.learning_rate: ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.mode=lora", "model.lora.alpa=2"], "model.lora.alpa: unknown key; did you mean 'alpha'?"),
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
    page = (Path(__file__).parent.parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert ModelConfig.model_validate(yaml.safe_load(snippet)["model"]).mode == "qlora"
    names = (*GROUPS, *TrainingConfig.model_fields)
    told_elsewhere = {"tokens_per_step", "micro_batch_packs", "betas"}
    assert {name for name in names if not re.search(rf"`([a-z_]+\.)?{name}`", page)} == told_elsewhere


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = read(tmp_path, "data.mixture.0.datasets.0.options={form: wild}")
    assert read(tmp_path, text=recipe.to_yaml()) == recipe


def test_the_recipe_of_an_older_run_is_read_though_a_key_of_it_is_a_constant_now(tmp_path):
    assert read(tmp_path, "training.max_nonfinite_steps=3") == read(tmp_path)
    assert "training.max_nonfinite_steps: unknown key" in refusal(tmp_path, "training.max_nonfinite_steps=4")


def test_the_store_is_named_after_what_is_asked(tmp_path):
    cats, dogs = (source.datasets[0].store_name for source in read(tmp_path).data.mixture)
    assert cats != dogs
    assert (
        cats
        == read(tmp_path, "data.mixture.0.share=0.5", "data.mixture.1.share=0.5").data.mixture[0].datasets[0].store_name
    )


# ------------------------------------------------------------------------------------------------------- shipped


SHIPPED = pytest.mark.parametrize("name", shipped_recipes())


@SHIPPED
def test_every_shipped_recipe_is_valid_and_opens_with_what_one_wants_to_know(name, capsys):
    assert status_of("validate", "--no-paths", name) == 0
    assert f"{name}: valid" in capsys.readouterr().out
    head, _, _ = shipped_recipes()[name].read_text().partition("\nmodel:")
    assert head.startswith(f"{MODELINE}\n# ")
    wanted = (rf"idefics-sft (train )?{name}\b", "^# Hardware: ", "^# (Memory and time|Time)", "^# Result: ")
    assert [pattern for pattern in wanted if not re.search(pattern, head, flags=re.MULTILINE)] == []


@SHIPPED
def test_every_shipped_recipe_is_planned_and_its_head_says_what_plan_says(name, capsys):
    text = shipped_recipes()[name].read_text()
    told = re.findall(
        r"^#   idefics-sft plan (.*?)  *([\d.]+) of ([\d.]+) GiB, ([\d.]+ \w+)$", text, flags=re.MULTILINE
    )
    assert told or name.startswith("quickstart"), "which needs no GPU"
    for arguments, *figures in told:
        assert status_of("plan", *shlex.split(arguments)) == 0
        printed = capsys.readouterr().out
        assert "\nfits, " in printed
        assert [f for pattern in PRINTED for f in re.findall(pattern, printed, flags=re.MULTILINE)] == figures
    assert status_of("plan", name) == 0


PRINTED = (r"^at the peak +([\d.,]+)", r"^usable +([\d.,]+)", r"^([\d.]+ \w+), ")

# Of the model card: tokens a step, learning rate at its peak and at the end.
CARD = {"9b": (205e3, 1e-5, 1.2e-6), "80b": (613e3, 3e-6, 3.6e-7)}


@pytest.mark.parametrize(("size", "tokens", "peak", "final"), [(size, *numbers) for size, numbers in CARD.items()])
def test_the_card_s_recipes_are_the_card(size, tokens, peak, final):
    recipe = load_recipe(recipe_path(f"idefics-{size}-instruct"))
    training = recipe.training
    assert recipe.model.trainable is None and recipe.data.train_on == "all" and recipe.data.sequence_length == 2048
    assert [source.share for source in recipe.data.mixture] == [7.7, 1.7, 5.9, 6.3, 11.4, 2.1, 29.1, 5.1, 30.7]
    assert training.tokens_per_step == pytest.approx(tokens, rel=0.003)
    assert (training.max_steps, training.warmup_steps, training.learning_rate) == (22_000, 1_000, peak)
    rate = peak * linear_schedule(1_000, training.decay_steps, 0.0)(22_000)
    assert rate == pytest.approx(final, rel=0.05), "the card rounds, or counts from the first step"
    assert (training.betas, training.weight_decay, training.clip, training.z_loss) == ((0.9, 0.999), 0.1, 1.0, 0.0)
    assert training.gradient_checkpointing and recipe.evaluation.protocol == "card" and recipe.evaluation.rule == "best"


def test_the_two_recipes_of_the_card_have_the_same_data():
    assert load_recipe(recipe_path("idefics-9b-instruct")).data == load_recipe(recipe_path("idefics-80b-instruct")).data


def test_the_reference_and_the_schema_are_those_of_the_keys():
    made = runpy.run_path(str(REPOSITORY / "scripts" / "build_reference.py"))
    advice = "run scripts/build_reference.py"
    assert (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8") == made["page"](), advice
    assert (REPOSITORY / "recipes" / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), advice


def test_every_key_says_what_it_means_and_no_other_is_known():
    for name, part in {"Recipe": recipe_schema(), **recipe_schema()["$defs"]}.items():
        assert part["additionalProperties"] is False, name
        assert all(len(key["description"]) > 5 for key in part["properties"].values()), name


def test_recipes_are_listed_shown_and_copied_with_their_schema(tmp_path, monkeypatch, capsys, refusal):
    monkeypatch.chdir(tmp_path)
    assert status_of("recipes", "list", "--json") == 0
    titles = json.loads(capsys.readouterr().out)["recipes"]
    assert list(titles) == list(shipped_recipes()) and all(titles.values())
    assert status_of("recipes", "show", "my-data") == 0
    text = capsys.readouterr().out
    assert status_of("recipes", "copy", "my-data") == 0
    assert "Next: idefics-sft validate my-data.yaml" in capsys.readouterr().out
    assert Path("my-data.yaml").read_text() == text and Path(SCHEMA_FILE).read_text() == schema_text()
    assert "my-data.yaml: is there already" in refusal("recipes", "copy", "my-data")
    assert "expected a .yaml file" in refusal("recipes", "copy", "my-data", "elsewhere")
    assert "did you mean 'my-data'?" in refusal("recipes", "show", "my-daat")


def test_a_changed_copy_and_the_shipped_recipe_are_not_confused(tmp_path, monkeypatch, refusal, capsys):
    monkeypatch.chdir(tmp_path)
    Path("caption.yaml").write_text(recipe_path("caption").read_text())
    assert status_of("validate", "--no-paths", "caption") == 0
    Path("caption.yaml").write_text(Path("caption.yaml").read_text().replace("max_steps: 40", "max_steps: 41"))
    capsys.readouterr()
    assert "caption.yaml here differs from it; write caption.yaml for yours" in refusal("plan", "caption")
    assert status_of("validate", "--no-paths", "caption.yaml") == 0


def test_shipped_files_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("quickstart").name == "quickstart.yaml"
    assert resolve("shipped:recipes/quickstart.yaml").is_file()
    assert resolve("somewhere/else") == Path("somewhere/else")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        recipe_path("quickstrat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^empty: a folder without recipe\.yaml, so no run; give the folder that"):
        recipe_path("empty")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"^store: a prepared dataset, not a recipe; give a recipe .*stats store"):
        recipe_path("store")
    with pytest.raises(UserError, match="no such file is shipped"):
        resolve("shipped:tiny_bass")
