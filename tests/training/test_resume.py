"""A run that is stopped or killed goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import status_of
from helpers.resume import STEPS, assert_same_state, folder_of, metrics, recipe_of, trained
from helpers.training import write_recipe
from safetensors.torch import load_file

from sft.cli.terminal import console
from sft.cli.train import train
from sft.core.errors import RunError, UserError
from sft.data.prepare import prepare
from sft.recipe import load_recipe
from sft.report.run_files import held_out, losses, read_run, series, source_losses, source_totals
from sft.runs.checkpoint import STATE, checkpoints, newest_state, step_of
from sft.runs.status import RunStatus
from sft.training import run
from sft.training.resume import changed_settings


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("training.tokens_per_step=512",),
        ("model.mode=lora", "model.lora.dropout=0.1", "data.num_workers=2", "data.augment=crop"),
        ("model.mode=qlora", "training.optimizer=adamw_8bit"),
        ("training.optimizer=paged_adamw_8bit", "training.precision=float32"),
        ("training.optimizer=adafactor",),
    ],
    ids=["full", "lora, dropout, crops, workers", "qlora, 8 bits", "full, paged, float32", "full, adafactor"],
)
def test_a_run_with_a_break_is_the_run_without_to_the_bit(tmp_path, overrides):
    whole, broken = recipe_of(tmp_path / "whole", *overrides), recipe_of(tmp_path / "broken", *overrides)
    assert trained(whole).status == "finished"
    stopped = trained(broken, until=2)
    assert (stopped.status, stopped.step) == ("stopped", 2) and stopped.why.endswith("stop is there")
    assert not (Path(broken.output_dir) / "stop").exists()
    finished = trained(broken, resume_from=folder_of(broken, 2))
    assert (finished.status, finished.step, finished.tokens) == (
        "finished",
        4,
        RunStatus.read(Path(whole.output_dir)).tokens,
    )
    assert metrics(broken) == metrics(whole)
    assert_same_state(folder_of(broken, 4), folder_of(whole, 4))


def test_only_the_newest_states_are_kept_and_all_weights(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    trained(recipe)
    found = checkpoints(folder_of(recipe, 4).parent)
    assert [step_of(path) for path in found] == [1, 2, 3, 4]
    assert [step_of(path) for path in found if (path / STATE).is_dir()] == [3, 4]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 3."""
    recipe = recipe_of(tmp_path_factory.mktemp("stopped") / "run", "checkpoints.keep_state=3")
    trained(recipe, until=3)
    return recipe


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of it, which may be damaged."""
    shutil.copytree(stopped.output_dir, tmp_path / "run")
    return stopped.model_copy(update={"output_dir": str(tmp_path / "run")})


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_state_that_is_not_whole_is_passed_over_and_it_is_said_why(copied):
    said = []
    folder = folder_of(copied, 3).parent
    assert newest_state(folder, said.append) == folder_of(copied, 3) and not said
    damage(folder_of(copied, 3) / STATE / "optimizer.pt")
    (folder_of(copied, 2) / STATE / "trained.safetensors").unlink()
    assert newest_state(folder, said.append) == folder_of(copied, 1)
    assert "checkpoint-3: not resumed from: state/optimizer.pt is not what its hash says" in said[0]
    assert "checkpoint-2: not resumed from: files of state/ are missing or cut off" in said[1]
    with pytest.raises(UserError, match=r"checkpoint-3: cannot be resumed from: state/optimizer\.pt is not"):
        trained(copied, resume_from=folder_of(copied, 3))
    for asked, expected in ((folder_of(copied, 7), "it is not there"), (folder.parent, "not a checkpoint of this run")):
        with pytest.raises(UserError, match=expected):
            train(copied, console(to_stderr=True), resume=str(asked))


def test_going_back_removes_what_comes_again_and_knows_what_was_usual(copied, monkeypatch):
    there, usual = [], []
    monkeypatch.setattr("sft.training.loss_spikes.Spikes.add", lambda self, line: usual.append(line["step"]))
    for name in ("nonfinite.jsonl", "spikes.jsonl"):
        (Path(copied.output_dir) / name).write_text('{"step": 1}\n{"step": 2}\n')

    def on_step(step, line):
        steps = [step_of(path) for path in checkpoints(folder_of(copied, 1).parent)]
        there.append((steps, [line["step"] for line in metrics(copied)]))

    run.train(copied, prepare(copied), on_step, resume_from=folder_of(copied, 1))
    assert there == [([1], [1, 2]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2, 3, 4])]
    assert usual == [1, 2, 3, 4]
    for name in ("nonfinite.jsonl", "spikes.jsonl"):
        assert (Path(copied.output_dir) / name).read_text() == '{"step": 1}\n'


def test_the_report_of_a_run_that_went_back_has_each_step_once(tmp_path):
    recipe = recipe_of(tmp_path / "run", "data.validation={share: 0.2}")
    trained(recipe, until=3)
    status = trained(recipe, resume_from=folder_of(recipe, 2))  # as after a kill: step 3 comes again
    read = read_run(Path(recipe.output_dir))
    sources = [source_losses(read.lines, source.name) for source in recipe.data.mixture]
    for points in (losses(read.lines), series(read.lines, "tokens_per_second"), series(read.lines, "learning_rate")):
        assert [step for step, *_ in points] == [1, 2, 3, 4]
    assert [step for step, _ in held_out(read)] == [0, 1, 2, 3, 4]
    for points in sources:
        steps = [step for step, *_ in points]
        assert steps == sorted(set(steps)) and steps
    assert sum(source.tokens for source in source_totals(read)) == status.tokens


def test_a_run_that_was_killed_at_its_end_is_not_trained_further(copied):
    """After its last checkpoint, before run.json said so; transformers would make a fifth step."""
    assert trained(copied, resume_from=folder_of(copied, 3)).step == 4
    before = metrics(copied)
    RunStatus(status="running", step=4, max_steps=4).write(Path(copied.output_dir))
    finished = train(copied, console(to_stderr=True))
    assert (finished.status, finished.step, finished.why) == ("finished", 4, "training.max_steps")
    assert RunStatus.read(Path(copied.output_dir)).status == "finished"
    assert metrics(copied) == before and not folder_of(copied, 5).exists()


def test_checkpoints_without_a_state_are_not_deleted_unasked(copied):
    run_dir = Path(copied.output_dir)
    found = checkpoints(run_dir / "checkpoints")
    for path in found:
        shutil.rmtree(path / STATE)
    with pytest.raises(UserError, match="holds checkpoints, but none with a state to go on from"):
        train(copied, console(to_stderr=True))
    assert checkpoints(run_dir / "checkpoints") == found != []


def test_other_data_are_refused(copied, monkeypatch):
    monkeypatch.setattr("sft.data.sources.Sources.fingerprint", lambda self: "other")
    with pytest.raises(UserError, match="was trained on other prepared data"):
        trained(copied, resume_from=folder_of(copied, 3))


def test_settings_that_change_what_is_trained_are_named(copied):
    def changed(*overrides):
        return changed_settings(
            load_recipe(Path(copied.output_dir) / "recipe.yaml", overrides), Path(copied.output_dir)
        )

    assert changed("data.num_workers=2", "checkpoints.every_steps=7", "evaluation.seed=3") == []
    assert changed("training.learning_rate=1e-9", "data.augment=crop", "seed=5") == [
        "data.augment",
        "seed",
        "training.learning_rate",
    ]


def test_settings_that_changed_hold_from_the_next_step(copied):
    settings = copied.training.model_copy(
        update={"learning_rate": 1e-5, "weight_decay": 0.25, "betas": (0.5, 0.75), "max_steps": 5}
    )
    recipe = copied.model_copy(update={"training": settings})
    before = metrics(copied)
    trained(recipe, resume_from=folder_of(copied, 3))
    assert metrics(recipe)[:3] == before
    rates = [line["learning_rate"] for line in metrics(recipe)]
    assert rates[3:] == pytest.approx([1e-5 * (1 - 2 / 4), 1e-5 * (1 - 3 / 4)])
    groups = torch.load(folder_of(recipe, 5) / STATE / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.75)}
    assert {group["initial_lr"] for group in groups} == {1e-5}
    assert load_recipe(Path(recipe.output_dir) / "recipe.yaml").training == settings


def test_an_extended_run_goes_on_at_the_rate_of_the_longer_schedule(copied):
    """Its first step once had the 0.0 at which the shorter schedule ended."""
    assert trained(copied, resume_from=folder_of(copied, 3)).status == "finished"
    longer = copied.model_copy(update={"training": copied.training.model_copy(update={"max_steps": 8})})
    finished = train(longer, console(to_stderr=True), allow_changed=True)
    assert (finished.status, finished.step) == ("finished", 8)
    peak, rates = copied.training.learning_rate, [line["learning_rate"] for line in metrics(longer)]
    assert rates[4:] == pytest.approx([peak * (1 - (step - 1) / 7) for step in range(4, 8)])


def test_a_run_of_epochs_goes_on_with_more_of_them(tmp_path):
    """Each sample is seen as often as there are epochs, and the schedule ends with the last step."""
    short = recipe_of(tmp_path, "training.max_steps=", "training.epochs=1")
    first = train(short, console(to_stderr=True))
    assert first.why == "training.epochs"
    longer = recipe_of(tmp_path, "training.max_steps=", "training.epochs=2")
    finished = train(longer, console(to_stderr=True), allow_changed=True)
    assert (finished.status, finished.step) == ("finished", finished.max_steps) and finished.step > first.step
    lines = metrics(longer)
    once = sum(line["sources"]["pictures"]["tokens"] for line in lines[: first.step])
    assert sum(line["sources"]["pictures"]["tokens"] for line in lines) == 2 * once
    assert lines[-1]["learning_rate"] < longer.training.learning_rate / finished.step * 1.5
    assert train(short, console(to_stderr=True), allow_changed=True).step == finished.step, "nothing is left to train"
    assert load_recipe(Path(longer.output_dir) / "recipe.yaml").training == longer.training


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_stops_with_75_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, number):
    path = write_recipe(tmp_path)
    real = run.train

    def interrupted(recipe, sources, on_step, *others):
        def then(step, line):
            on_step(step, line)
            if step == 1:
                os.kill(os.getpid(), number)

        return real(recipe, sources, then, *others)

    monkeypatch.setattr(run, "train", interrupted)
    before = signal.getsignal(number)
    assert status_of("train", path, *STEPS) == 75
    assert signal.getsignal(number) == before
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"stopped after step 2 ({number.name})" in said and f"Resume with: idefics-sft train {path}" in said
    monkeypatch.setattr(run, "train", real)
    assert status_of("train", path, *STEPS) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "checkpoint-2" in said and "finished at step 4" in said
    assert status_of("train", path, *STEPS) == 0
    assert "nothing is trained" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_killed_runs_end_like_one_that_was_left_alone():
    """Really killed, in processes of their own; `scripts/kill_test.py --kills 20` is the long form."""
    script = Path(__file__).parent.parent.parent / "scripts" / "kill_test.py"
    command = [sys.executable, str(script), "--kills", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["kills"], result["equal"]) == (1, True)


# --------------------------------------------------------------------------------------------------- not finite


def poisoned(monkeypatch, steps):
    """Gradients that are not finite at some steps."""
    from sft.training.trainer import Trainer

    compute = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


def test_a_step_that_is_not_finite_changes_nothing_and_lists_its_samples(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path / "run")
    poisoned(monkeypatch, {2})
    trained(recipe)
    first, second = (load_file(folder_of(recipe, step) / "model.safetensors") for step in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["grad_norm"] is None for line in metrics(recipe)] == [False, True, False, False]
    (line,) = map(json.loads, (Path(recipe.output_dir) / "nonfinite.jsonl").read_text().splitlines())
    assert line["step"] == 2 and line["grad_norm"] == "nan" and all(keys for keys in line["micro_batches"])


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.training.write_metrics.MAX_NONFINITE_STEPS", 2)
    recipe = recipe_of(tmp_path / "run")
    poisoned(monkeypatch, {2, 3, 4})
    with pytest.raises(RunError, match=r"step 3: .* not finite, as in 2 steps in a row"):
        trained(recipe)
    assert RunStatus.read(Path(recipe.output_dir)).status == "failed"
