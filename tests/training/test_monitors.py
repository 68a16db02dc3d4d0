"""What is looked at while a model is trained: it is written down, it fails aloud, and it changes nothing."""

import base64
import io
import json
import random
import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import status_of
from helpers.training import metrics_of, printed, write_recipe
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from sft.cli.train import note
from sft.core.errors import UserError
from sft.core.files import hash_file
from sft.data.prepare import prepare
from sft.evaluation import run_tasks
from sft.recipe import load_recipe
from sft.report.page import render
from sft.report.run_files import read_run, source_totals
from sft.runs.checkpoint import checkpoints, listed_hashes, write_folder
from sft.runs.status import RunStatus
from sft.selection import session
from sft.training import run, trackers, validation
from sft.training.preserve_state import preserve_state
from sft.training.trackers import tracked

HELD_OUT = ("data.validation.share=0.4", "training.max_steps=3", "checkpoints.every_steps=2")


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A recipe with held-out data that was trained, and what was said."""
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("validated")), HELD_OUT)
    said = []
    run.train(recipe, prepare(recipe), log=said.append)
    return recipe, said


def names_of(run_dir):
    return [path.name for path in checkpoints(run_dir / "checkpoints")]


def again(recipe, folder, *overrides):
    """The same recipe, to be trained into another folder."""
    return load_recipe(Path(recipe.output_dir) / "recipe.yaml", (f"output_dir={folder}", *overrides))


# --------------------------------------------------------------------------------------------------------- validation


@pytest.fixture
def one_image(tmp_path):
    """A recipe whose samples are about one image, so that none can be held out."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": turns, "images": ["red.png"]}) + "\n") * 2)
    mixture = f"[{{name: one, share: 100, datasets: [{{dataset: messages, path: {tmp_path}}}]}}]"
    return write_recipe(tmp_path), f"data.mixture={mixture}", "data.validation.share=0.001", "training.max_steps=1"


def test_what_nothing_can_be_held_out_of_is_trained_unless_that_is_to_choose(one_image, refusal, capsys):
    said = refusal("train", *one_image, "evaluation.every_steps=2")
    assert "holds out none of 2 samples, for nothing would be left to train on" in said
    assert not list(Path(one_image[0]).parent.glob("run/checkpoints/*")), "told before the first step"
    assert status_of("train", *one_image) == 0
    assert "source 'one': data.validation holds out no sample of it" in capsys.readouterr().out


def test_held_out_loss_and_answers_are_written_at_every_checkpoint_and_at_the_end(validated):
    recipe, said = validated
    first, second, third = metrics_of(recipe)
    assert "validation" not in first
    for line in (second, third):
        assert line["validation"].keys() == {"pictures", "talk"}
        for own in line["validation"].values():
            assert own["loss"] > 0 and own["trained_tokens"] > 0
        assert f"step {line['step']}: held-out loss" in "\n".join(said)
    asked = [[(one["key"], one["prompt"]) for one in line["generations"]] for line in (second, third)]
    assert asked[0] == asked[1] and len(asked[0]) == len(set(asked[0])) == validation.NUM_ANSWERS
    assert {key.partition("/")[0] for key, _ in asked[0]} == {"easy_vqa", "messages"}, "one source after the other"
    assert any(prompt.startswith("<image>") for _, prompt in asked[0])


def test_what_the_base_says_is_kept_with_the_images_for_who_wants_to_compare(validated):
    recipe, _ = validated
    before = json.loads((Path(recipe.output_dir) / "before.json").read_text())
    last = metrics_of(recipe)[-1]
    assert before["validation"].keys() == last["validation"].keys()
    for name, own in before["validation"].items():
        assert own["trained_tokens"] == last["validation"][name]["trained_tokens"]
        assert own["loss"] != last["validation"][name]["loss"]
    assert before["validation"]["pictures"]["loss"] > last["validation"]["pictures"]["loss"]
    assert [one["key"] for one in before["generations"]] == [one["key"] for one in last["generations"]]
    for one in before["generations"]:
        assert one["expected"]
        assert not one["images"] or "<image>" in one["prompt"]
        for image in one["images"]:
            assert max(Image.open(io.BytesIO(base64.b64decode(image))).size) <= validation.THUMBNAIL
    assert any(one["images"] for one in before["generations"])


def test_the_report_of_a_run_knows_its_data_and_shows_its_answers(validated):
    recipe, _ = validated
    read = read_run(Path(recipe.output_dir))
    assert [(source.name, bool(source.records)) for source in source_totals(read)] == [
        ("pictures", True),
        ("talk", True),
    ]
    page = render(read)
    assert page.count("data:image/jpeg;base64,") == sum(len(one["images"]) for one in read.before["generations"]) > 0
    assert "held out" in page and "easy_vqa" in page


def test_the_loss_in_training_is_the_one_that_select_takes(validated, tmp_path, capsys):
    """Up to the rounding of the snapshot."""
    recipe, _ = validated
    copy = shutil.copytree(recipe.output_dir, tmp_path / "copy")
    recorded, _ = printed(capsys, "select", copy)
    assert recorded["benchmark"] == "metrics.jsonl"
    asked, _ = printed(capsys, "select", copy, "--rule", "earliest_not_worse")
    assert asked["benchmark"] == "held_out_loss"
    for one, other in zip(recorded["scores"], asked["scores"], strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=0.02)
    for name, category in asked["categories"].items():
        assert category["scores"][-1] == pytest.approx(metrics_of(recipe)[-1]["validation"][name]["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_trained_is_the_same_bit_by_bit_whatever_validation_does(validated, tmp_path, monkeypatch, precision):
    """With dropout, which draws random numbers; here so does what answers the questions, and it changes the mode."""
    generate = validation.generate

    def careless(model, *arguments, **options):
        model.train()
        random.random(), np.random.rand(), torch.rand(1)
        return generate(model, *arguments, **options)

    monkeypatch.setattr(validation, "generate", careless)
    weights = []
    for name in ("with", "without"):
        options = (
            "model.mode=lora",
            "model.trainable=[gates]",
            "model.lora.dropout=0.5",
            f"training.precision={precision}",
        )
        recipe = again(validated[0], tmp_path / name, *options, "checkpoints.every_steps=1")
        if name == "without":
            monkeypatch.setattr(validation.Validation, "__call__", lambda self, model, step: {})
        run.train(recipe, prepare(recipe))
        lines = metrics_of(recipe)
        assert all(("validation" in line) == (name == "with") for line in lines)
        weights.append(load_file(tmp_path / name / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors"))
        weights[-1] |= {f"loss at {line['step']}": torch.tensor(line["loss"]) for line in lines}
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_module_gets_its_mode_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))
    model[0].eval()
    with pytest.raises(ValueError, match="whatever"), preserve_state(model):
        assert not model.training and not model[1].training
        raise ValueError("whatever")
    assert [module.training for module in model.modules()] == [True, False, True]


def test_a_validation_that_fails_is_told_and_training_goes_on(validated, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(validation, "shared_losses", broken)
    recipe, said = again(validated[0], tmp_path / "run"), []
    run.train(recipe, prepare(recipe), log=said.append)
    assert "step 2: validation failed, training goes on: RuntimeError: out of memory" in said
    assert [line.get("validation_failed") for line in metrics_of(recipe)] == [None] + [
        "RuntimeError: out of memory"
    ] * 2
    status = RunStatus.read(tmp_path / "run")
    assert status.status == "finished"
    assert status.failed_evaluations.keys() == {f"validation at step {step}" for step in (0, 2, 3)}


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluated(trained, folder, *overrides):
    """What was said while a recipe with a benchmark was trained, and evaluated meanwhile."""
    recipe, said = load_recipe(trained, (f"output_dir={folder}", *overrides)), []
    run.train(recipe, prepare(recipe), log=said.append)
    return said


@pytest.fixture(scope="module")
def still(trained, tmp_path_factory):
    """A run whose checkpoints are all the base, so that they score the same, and of which one could not be scored; and
    what was said."""
    ask = session.score_model

    def broken(path, *arguments, **options):
        if path.name == "checkpoint-2":
            raise RuntimeError("out of memory")
        return ask(path, *arguments, **options)

    folder = tmp_path_factory.mktemp("still")
    options = ("training.learning_rate=1e-12", "training.max_steps=5", "evaluation.every_steps=1")
    options += ("evaluation.patience=2", "checkpoints.keep_weights=best+last")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "score_model", broken)
        return folder, evaluated(trained, folder, *options)


def test_training_ends_when_so_many_evaluations_bring_nothing(still):
    folder, said = still
    status = RunStatus.read(folder)
    assert (status.status, status.step) == ("finished", 4)
    assert "step 4: 2 evaluations brought no better score than checkpoint-1; training ends" in said[-1]
    assert status.why == "evaluation.patience: 2 evaluations brought no better score than checkpoint-1"


def test_only_the_best_and_the_newest_weights_stay_and_those_that_have_no_score(still):
    folder, said = still
    assert sorted(names_of(folder)) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert "checkpoints.keep_weights: removed the weights of checkpoint-3" in said


def test_an_evaluation_that_fails_is_told_and_training_goes_on(still):
    folder, said = still
    status = RunStatus.read(folder)
    assert status.status == "finished"
    assert status.failed_evaluations == {"checkpoint-2": "RuntimeError: out of memory"}
    assert "checkpoint-2: the evaluation failed, it is left out: RuntimeError: out of memory" in said
    scores = json.loads((folder / "selection.json").read_text())["scores"]
    assert [score["step"] for score in scores] == [1, 3, 4]


@pytest.fixture(scope="module")
def tracked_run(validated, tmp_path_factory):
    """A run that is evaluated by recorded losses, and whose tracker fails at step 3; what was logged and tracked."""
    options = ("evaluation.every_steps=1", "checkpoints.every_steps=1", "checkpoints.keep_weights=best+last")
    options += ("training.learning_rate=1e-2", "training.report_to=[wandb]")
    recipe, said = again(validated[0], tmp_path_factory.mktemp("tracked") / "run", *options), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tracker, "told", [])
        patched.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
        patched.setattr(trackers, "PACKAGES", {"wandb": ("torch",)})
        run.train(recipe, prepare(recipe), log=said.append)
        return recipe, said, Tracker.told


def test_of_recorded_losses_too(tracked_run):
    recipe, _, _ = tracked_run
    folder = Path(recipe.output_dir)
    selection = json.loads((folder / "selection.json").read_text())
    assert [score["step"] for score in selection["scores"]] == [1, 2, 3], "those that were pruned are still compared"
    kept = [score["checkpoint"] for score in selection["scores"] if score["has_weights"]]
    assert sorted(names_of(folder)) == kept == sorted({selection["best"], "checkpoint-3"})


@pytest.mark.slow
def test_training_evaluates_as_select_does(trained, tmp_path, capsys, monkeypatch):
    said = evaluated(trained, tmp_path / "run", "evaluation.every_steps=2", "training.max_steps=4")
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert [score["step"] for score in selection["scores"]] == [2, 4]
    assert re.fullmatch(r"checkpoint-2: score 0\.\d+ \(0\.\d+ to \d\.\d+\); selected so far: checkpoint-2", said[-2])
    assert RunStatus.read(tmp_path / "run").failed_evaluations == {}
    later, _ = printed(capsys, "select", tmp_path / "run")
    assert [later["scores"][1]["score"], later["scores"][3]["score"]] == [s["score"] for s in selection["scores"]]
    monkeypatch.setattr(run_tasks, "ask", None)  # whoever asks again, fails
    assert printed(capsys, "select", tmp_path / "run")[0] == later


def test_what_cannot_choose_is_told_before_training(trained, tmp_path, refusal):
    file = tmp_path / "test.tsv"
    header, *rows = (trained.parent / "colours.tsv").read_text().splitlines()
    place = header.split("\t").index("answer")
    blank = ["\t".join(cell * (n != place) for n, cell in enumerate(row.split("\t"))) for row in rows]
    file.write_text("\n".join([header, *blank]) + "\n")
    options = (f"output_dir={tmp_path / 'run'}", "evaluation.every_steps=1")
    assert "test.tsv: has no answers, so it cannot choose" in refusal(
        "train", trained, *options, f"evaluation.benchmark={file}"
    )
    assert "nothing to choose by" in refusal("train", trained, *options, "evaluation.benchmark=null")
    assert not (tmp_path / "run" / "run.json").exists()
    assert "has no answers" in refusal("select", trained, "--benchmark", file)


def test_a_checkpoints_hash_is_read_from_its_manifest(tmp_path):
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, lambda path: (path / "model.safetensors").write_bytes(b"weights"))
    assert run_tasks.weights_hash(folder) == hash_file(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"others")
    assert listed_hashes(folder) == {}
    assert run_tasks.weights_hash(folder) == hash_file(folder / "model.safetensors")
    assert listed_hashes(tmp_path) == {}


# ----------------------------------------------------------------------------------------------------------- trackers


class Tracker(TrainerCallback):
    """What transformers' integrations do, into a list."""

    told: ClassVar[list] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.told.append((args.run_name, args.project))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 3:
            raise ConnectionError("no\nnetwork")
        self.told.append((state.global_step, integration_utils.rewrite_logs(logs)))

    def on_train_end(self, args, state, control, **kwargs):
        self.told.append("end")


def test_trackers_get_every_line_until_they_fail(tracked_run):
    recipe, said, (begin, first, first_score, second, second_score) = tracked_run
    lines, scores = metrics_of(recipe), json.loads((Path(recipe.output_dir) / "selection.json").read_text())["scores"]
    assert begin == ("run", "idefics-sft")
    assert (first[0], first[1]["train/loss"]) == (1, lines[0]["loss"])
    assert first[1]["train/loss/talk"] == lines[0]["sources"]["talk"]["loss"]
    assert second[1]["eval/loss/talk"] == lines[1]["validation"]["talk"]["loss"]
    assert second[1]["eval/answer/0"].endswith(lines[1]["generations"][0]["answer"])
    assert [first_score[1], second_score[1]] == [{"eval/score": score["score"]} for score in scores[:2]]
    assert "wandb: gets nothing more of this run, training goes on: ConnectionError: no network" in said
    assert RunStatus.read(Path(recipe.output_dir)).status == "finished"


def test_a_tracker_that_refuses_at_the_start_ends_it(validated, tmp_path, monkeypatch):
    def refuses(self, args, state, control, **kwargs):
        raise ValueError("no key")

    monkeypatch.setattr(Tracker, "on_train_begin", refuses)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": ("torch",)})
    recipe = again(validated[0], tmp_path / "run", "training.report_to=[wandb]")
    with pytest.raises(UserError, match=r"training\.report_to: wandb cannot be used: ValueError: no key"):
        run.train(recipe, prepare(recipe))


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_prepared(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(trackers, "PACKAGES", {"trackio": ("no_such_package",)})
    refused = refusal("train", write_recipe(tmp_path), "training.report_to=[trackio]")
    assert "training.report_to: trackio is not installed; run `pip install trackio`" in refused
    assert not (tmp_path / "stores").exists() and not (tmp_path / "run").exists()


def test_tensorboard_writes_into_the_run(validated, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = again(validated[0], tmp_path / "run", "training.report_to=[tensorboard]")
    run.train(recipe, prepare(recipe))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in metrics_of(recipe)]
    )
    assert [event.step for event in events.Scalars("eval/loss/talk")] == [2, 3]


def test_only_numbers_and_texts_are_tracked():
    line = {
        "step": 7, "time": 1.0, "loss": 2.0, "grad_norm": None, "validation_failed": "why",
        "sources": {"a": {"loss": None, "tokens": 5, "trained_tokens": 0}},
        "validation": {"a": {"loss": 1.0, "trained_tokens": 3}, "b": {"loss": 5.0, "trained_tokens": 1}},
    }  # fmt: skip
    assert tracked(line) == {
        "loss": 2.0, "validation_failed": "why", "trained_tokens/a": 0,
        "eval_loss/a": 1.0, "eval_loss/b": 5.0, "eval_loss": 2.0,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- bar


def test_the_bar_shows_the_loss_of_as_many_sources_as_fit():
    sources = {name: {"loss": loss} for name, loss in (("pictures", 1.0), ("talk", 2.5), ("pages", None))}
    line = {"loss": 1.25, "tokens_per_second": 1234.5, "sources": sources}
    assert note(line, None) == "loss 1.250 (pictures 1.000, talk 2.500)  1,234 tokens/s"
    assert note(line, 50) == "loss 1.250 (pictures 1.000, …)  1,234 tokens/s"
    assert note(line, 30) == "loss 1.250  1,234 tokens/s"
    assert note(line | {"sources": {"talk": {"loss": 1.25}}}, None) == "loss 1.250  1,234 tokens/s"
