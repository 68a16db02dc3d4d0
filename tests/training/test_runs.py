"""Folders and models as a run meets them: nothing foreign is deleted, nothing damaged is trusted, one run at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, base_tokenizer, make_tiny_model, status_of, tiny_config
from helpers.training import printed, write_recipe
from safetensors.torch import load_file, save_file

from sft.cli.quickstart import REPORT, _delete_run
from sft.core.errors import UserError
from sft.core.file_lock import locked
from sft.core.launch import STOPPED
from sft.core.shipped import recipe_path, resolve
from sft.models import family_at
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.text import END_OF_UTTERANCE
from sft.models.idefics.weights import weights
from sft.recipe import load_recipe
from sft.runs.names import find_model, find_recipe
from sft.runs.status import RunStatus
from sft.training.run_folder import OUTPUTS, delete_outputs

SHORT = ("training.max_steps=2", "checkpoints.every_steps=1")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_lock(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".lock"}


# ----------------------------------------------------------------------------------------------------- foreign files


def fill(folder: Path) -> dict[str, bytes]:
    """Files that bear the names of a run's, and others."""
    for name in (*OUTPUTS, REPORT, "thesis.tex", "stores/kept.arrow"):
        file = folder / name if "." in name else folder / name / "mine.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return contents(folder)


@pytest.mark.parametrize("options", [(), ("--resume", "none")], ids=["train", "anew"])
@pytest.mark.parametrize("status", [None, "", "[]", '{"kilometres": 5}'], ids=["none", "empty", "list", "of a jogger"])
def test_training_never_deletes_what_is_not_of_a_run(recipe, refusal, options, status):
    run_dir = recipe.parent / "run"
    before = fill(run_dir)
    if status is not None:
        (run_dir / "run.json").write_text(status)
        before = contents(run_dir)
    assert "choose another output_dir" in refusal("train", recipe, *options)
    assert without_lock(contents(run_dir)) == before
    assert not (recipe.parent / "stores").exists(), "it is told before hours of preparation"


def test_quickstart_never_deletes_what_is_not_of_a_run(tmp_path):
    before = fill(tmp_path)
    _delete_run(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "run.json").write_text('{"kilometres": 5}')
    with pytest.raises(UserError, match="choose another output_dir"):
        _delete_run(tmp_path)
    assert contents(tmp_path) == before | {"run.json": b'{"kilometres": 5}'}


def test_quickstart_deletes_its_run_and_nothing_else(tmp_path):
    fill(tmp_path)
    RunStatus(status="finished", step=4, max_steps=4).write(tmp_path)
    _delete_run(tmp_path)
    assert contents(tmp_path).keys() == {"thesis.tex", "stores/kept.arrow"}


def test_quickstart_shows_a_finished_run_of_the_same_settings_only(tmp_path, refusal):
    (tmp_path / REPORT).write_text('{"overrides": ["training.max_steps=200"]}')
    options = ("quickstart", "--output-dir", tmp_path)
    other = (*options, "--family", "smolvlm")
    assert "holds a finished run with other settings" in refusal(*other, "training.max_steps=200")
    assert "`idefics-sft train quickstart-smolvlm` takes every key" in refusal(*other, "evaluation.seed=1")
    assert "holds a finished run with other settings" in refusal(*options, "training.max_steps=100")
    assert "quickstart writes to --output-dir" in refusal(*options, "output_dir=runs/other")
    assert "training.max_stepz: unknown key" in refusal(*options, "training.max_stepz=100")


def test_quickstart_of_another_family_that_was_stopped_says_how_to_resume_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fixtures = REPOSITORY / "tests" / "fixtures" / "easy_vqa"
    paths = [f"data.mixture.{number}.datasets.0.path={fixtures}" for number in (0, 1, 3)]
    sizes = ("training.tokens_per_step=256", "training.micro_batch_packs=1", "data.sequence_length=256")
    (tmp_path / "runs" / "quickstart-smolvlm").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart-smolvlm" / "stop").touch()
    assert status_of("quickstart", "--family", "smolvlm", *paths, *sizes) == STOPPED
    assert "Resume with: idefics-sft quickstart --family smolvlm data.mixture.0." in capsys.readouterr().out
    assert family_at("runs/quickstart-smolvlm/checkpoints/checkpoint-1").name == "idefics3"


def test_outputs_are_deleted_and_nothing_else(tmp_path):
    fill(tmp_path)
    delete_outputs(tmp_path)
    assert contents(tmp_path).keys() == {REPORT, "thesis.tex", "stores/kept.arrow"}
    delete_outputs(tmp_path)  # nothing is there any more


# ------------------------------------------------------------------------------------------------- runs in the way


def test_a_run_of_another_recipe_is_left_alone(recipe, refusal, capsys):
    run_dir = recipe.parent / "run"
    assert status_of("train", recipe, *SHORT) == 0
    capsys.readouterr()
    before = contents(run_dir)
    expected = "holds a run of another recipe (other: training.learning_rate); choose another output_dir"
    assert expected in refusal("train", recipe, *SHORT, "training.learning_rate=2e-3")
    assert contents(run_dir) == before
    others = ("training.learning_rate=2e-3", "data.store=elsewhere", "distributed.engine=ddp", "--nproc", 2)
    assert expected in refusal("train", recipe, *SHORT, *others)
    assert not Path("elsewhere").exists(), "it is told before hours of preparation"
    (run_dir / "recipe.yaml").unlink()
    assert "has a run.json but no recipe.yaml; --resume none starts anew" in refusal("train", recipe, *SHORT)


@pytest.mark.parametrize(
    ("command", "folder"), [("train", "run"), ("train", "stores"), ("prepare", "stores")], ids=" ".join
)
def test_a_folder_is_written_by_one_process(recipe, refusal, command, folder):
    with locked(recipe.parent / folder):
        assert f"{folder}: another idefics-sft is writing here; wait for it" in refusal(command, recipe)
    assert not (recipe.parent / "run" / "run.json").exists()
    assert status_of("prepare", recipe) == 0, "the lock is let go"


# ---------------------------------------------------------------------------------------------------- model folders


def write_model(folder: Path, extra: int = 3, missing_pieces: int = 0) -> Path:
    """A whole model folder of toy size; `missing_pieces` says how many pieces its tokenizer lacks."""
    tokenizer = base_tokenizer()
    model = make_tiny_model(tokenizer, extra=extra)
    if missing_pieces:
        model = PackedIdefics(tiny_config(tokenizer.vocab_size + missing_pieces, extra))
    weights.save_model(model, folder, torch.float32)
    if extra == 3:
        tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def without_norm(tensors):
    del tensors["model.norm.weight"]


def short_norm(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_norm, "1 weights are missing, model.norm.weight among them"),
        (short_norm, "model.norm.weight has shape (63,), config.json asks for (64,)"),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path, refusal, change, expected):
    file = write_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    assert expected in refusal("chat", tmp_path / "model")


@pytest.mark.parametrize("kept", [0, 4, -1], ids=["empty", "head", "cut"])
def test_a_truncated_weight_file_is_refused(tmp_path, refusal, kept):
    file = write_model(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors: not readable as safetensors" in refusal("chat", tmp_path / "model")


def test_a_tokenizer_one_piece_short_is_refused(tmp_path, refusal):
    folder = write_model(tmp_path / "model", missing_pieces=1)
    assert "with this model's vocabulary they are" in refusal("chat", folder)


def test_a_base_that_is_not_prepared_is_no_partner_to_talk_to(tmp_path, refusal):
    refused = refusal("chat", write_model(tmp_path / "model", extra=2))
    assert "<end_of_utterance>" in refused
    assert "a base gets it by `idefics-sft prepare RECIPE`; then name it as RUN@base" in refused


@pytest.mark.parametrize(
    ("isolation", "expected"),
    [
        ("true", "none of 28 samples fits into data.sequence_length, into the positions of the model"),
        ("false", "without pack_isolation a pack has 128 tokens, the model has 16 positions"),
    ],
)
def test_samples_must_fit_the_positions_of_the_model(recipe, refusal, isolation, expected):
    base = shutil.copytree(resolve("shipped:tiny_base"), recipe.parent / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    refused = refusal("train", recipe, f"model.path={base}", f"data.pack_isolation={isolation}")
    assert expected in refused
    assert not (recipe.parent / "run" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------- select, evaluate


def test_a_copied_run_is_the_one_that_is_used(trained, copied, capsys):
    before = contents(trained.parent / "run")
    selection, _ = printed(capsys, "select", copied)
    assert find_model(str(copied)) == copied / "checkpoints" / selection["selected"]
    _, said = printed(capsys, "evaluate", copied, "--blind")
    assert f"model: {copied / 'checkpoints' / selection['selected']}, selected by {selection['benchmark']}\n" in said
    assert (copied / "evaluations").is_dir()
    assert contents(trained.parent / "run") == before, "nothing is written where it was copied from"


@pytest.mark.slow
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_moved_run_finds_the_store_that_moved_with_it(tmp_path, is_inside):
    """Inside the run, it is the run's own even while the old one is still there."""
    old, new = tmp_path / "old", tmp_path / "new"
    store = "run/stores" if is_inside else "stores"
    for folder in (old, new):
        (folder / store).mkdir(parents=True)
    recipe = load_recipe(recipe_path("quickstart"), [f"output_dir={old}/run", f"data.store={old}/{store}"])
    (new / "run").mkdir(exist_ok=True)
    (new / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    assert find_recipe(str(new / "run")).data.store == str((new if is_inside else old) / store)
    shutil.rmtree(old)
    assert find_recipe(str(new / "run")).data.store == str(new / store)
    assert find_recipe(str(new / "run"), ["data.store=other"]).data.store == "other"


def test_a_run_is_selected_again_after_its_questions_changed(copied, capsys):
    assert printed(capsys, "select", copied)[0]["questions"] == 8
    values = yaml.safe_load((copied / "recipe.yaml").read_text())
    values["evaluation"]["max_questions"] = 6
    (copied / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert printed(capsys, "select", copied)[0]["questions"] == 6


def test_evaluation_is_by_the_recipe(copied, capsys, monkeypatch):
    assert status_of("select", copied) == 0
    capsys.readouterr()
    first, _ = printed(capsys, "evaluate", copied)
    assert first["by_rank"].keys() == {"text", "letter"}
    for rank, summary in first["by_rank"].items():
        assert (summary["rank"], summary["protocol"], summary["questions"]) == (rank, "vanilla", 8)
        assert summary["blind"] is not None
    assert first["rank"] == "text" and first["accuracy"] == first["by_rank"]["text"]["accuracy"]
    with monkeypatch.context() as patched:
        patched.setattr("sft.evaluation.run_tasks.ask", None)  # whoever asks again, fails
        assert printed(capsys, "evaluate", copied)[0] == first

    letters, _ = printed(capsys, "evaluate", copied, "--rank", "letter", "--protocol", "circular")
    assert (letters["rank"], letters["protocol"], letters["questions"]) == ("letter", "circular", 8)


def test_a_model_without_a_run_is_asked_everything(trained, tmp_path, capsys):
    benchmark = trained.parent / "colours.tsv"
    command = ("evaluate", write_model(tmp_path / "model"), "--benchmark", benchmark, "--rank", "text")
    assert printed(capsys, *command)[0]["questions"] == 8


def test_the_base_of_a_run_has_a_name(trained, copied, capsys):
    summary, said = printed(capsys, "evaluate", f"{copied}@base", "--rank", "text", "--no-baseline")
    (base,) = (trained.parent / "stores" / "bases").iterdir()
    assert f"model: {base}\n" in said
    assert [file.name for file in (copied / "evaluations").rglob("base.json")] == ["base.json"]
    assert summary["rank"] == "text"


def test_after_training_select_is_named_where_something_can_choose_else_chat(recipe, capsys):
    found = find_recipe(str(recipe), ["data.validation={share: 0.1}"])
    folder = Path(found.output_dir)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(found.to_yaml())
    RunStatus(status="finished", step=4, max_steps=4).write(folder)
    assert status_of("train", folder) == 0
    assert f"Next: idefics-sft chat {folder}\n" in capsys.readouterr().out, "nothing was held out"
    (folder / "before.json").write_text("{}")
    assert status_of("train", folder) == 0
    assert f"Next: idefics-sft select {folder}\n" in capsys.readouterr().out


def test_an_image_named_on_the_command_line_must_be_one(trained, refusal):
    refused = refusal("chat", trained, "--image", trained)
    assert f"{trained}: image does not decode; expected a JPEG, PNG, WEBP, GIF, BMP, AVIF or HEIC image" in refused
