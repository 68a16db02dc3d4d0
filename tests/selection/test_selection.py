"""Choosing among the evaluated checkpoints of a run, and what is asked of them."""

import json
import shutil
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from conftest import batch_of, conversation, place, status_of
from helpers.training import printed
from rich.console import Console
from safetensors.torch import load_file

from sft.cli.select import show
from sft.core.errors import RunError, UserError
from sft.core.metric import ACCURACY, LOSS
from sft.evaluation.held_out_loss import recorded_losses
from sft.evaluation.results import Outcome, Result, read_lines, result_file, write_result
from sft.evaluation.run_tasks import score_model
from sft.evaluation.statistics import t_quantile, wilson_interval
from sft.evaluation.task import Task
from sft.evaluation.tasks import named_tasks, open_tasks
from sft.inference.average import average_weights
from sft.models.idefics.weights import weights
from sft.models.loaded_model import load_for_inference
from sft.recipe import EvaluationConfig
from sft.runs.checkpoint import checkpoints, keep_newest_states, problem_of_weights, write_folder
from sft.runs.names import find_recipe
from sft.runs.status import RunStatus
from sft.selection import session
from sft.selection.benchmarks import Benchmarks
from sft.selection.outcomes import read_outcomes
from sft.selection.plot import write_plot
from sft.selection.pruning import prune_weights, weights_to_prune
from sft.selection.record import current_selection, write_selection
from sft.selection.recorded_loss import choose_by_recorded_loss
from sft.selection.rules import choose


def write(run, checkpoint, hits, rank="text", with_images=True, protocol_hash=None):
    """`x` is a hit; each question has an image of its own; every other one is of the category `even`."""
    result = Result(
        benchmark="toy",
        protocol_hash=protocol_hash or f"hash-{rank}",
        outcomes=tuple(
            Outcome(
                item=number,
                cluster=f"image {number}",
                image_sha256=f"image {number}",
                category="odd" if number % 2 else "even",
                score=float(hit == "x"),
                details={"hit": hit == "x"},
            )
            for number, hit in enumerate(hits)
        ),
    )
    summary = {"protocol_hash": result.protocol_hash, "rank": rank, "with_images": with_images}
    write_result(result, summary, run, checkpoint)


def write_losses(run, checkpoint, losses, weights):
    """A held-out sample for each loss, of as many trained tokens as its weight."""
    own = tuple(
        Outcome(
            item=n, cluster=str(n), image_sha256="", category="s", score=loss, weight=weight,
            details={"loss": loss, "trained_tokens": weight},
        )
        for n, (loss, weight) in enumerate(zip(losses, weights, strict=True))
    )  # fmt: skip
    result = Result(benchmark="held_out_loss", protocol_hash="hash", outcomes=own)
    write_result(result, {"protocol_hash": "hash"}, run, checkpoint)


def task(name="", benchmark="toy", metric=ACCURACY):
    """What the table needs to know of a task."""
    scores = partial(Task.paired_scores, None)
    return SimpleNamespace(name=name, benchmark=benchmark, metric=metric, paired_scores=scores)


TOY, HELD_OUT = task(), task("loss", "held_out_loss", LOSS)


def outcomes(run, hits_by_step):
    for step, hits in hits_by_step.items():
        write(run, f"checkpoint-{step}", hits)
    return read_outcomes(run, TOY)


# ------------------------------------------------------------------------------------------------------- outcomes


def test_answers_are_read_back_as_one_table(tmp_path):
    table = outcomes(tmp_path, {100: "xx-x", 20: "x---"})
    assert table.steps == (20, 100) and table.checkpoints == ("checkpoint-20", "checkpoint-100")
    assert table.values_KQ.tolist() == [[1, 0, 0, 0], [1, 1, 0, 1]]
    assert table.categories_Q.tolist() == ["even", "odd", "even", "odd"]


def test_a_value_is_the_mean_over_rankings_and_blind_answers_do_not_count(tmp_path):
    for rank, hits in (("letter", "----"), ("text", "xx--")):
        write(tmp_path, "checkpoint-10", hits, rank)
    write(tmp_path, "checkpoint-10", "xxxx", with_images=False, protocol_hash="blind")
    write(tmp_path, "base", "xxxx")
    table = read_outcomes(tmp_path, TOY)
    assert table.ranks == ("letter", "text")
    assert table.values_KQ.tolist() == [[0.5, 0.5, 0, 0]]


def test_losses_count_by_their_trained_tokens_with_their_sign_turned(tmp_path):
    write_losses(tmp_path, "checkpoint-5", [1.0, 4.0], [3, 1])
    table = read_outcomes(tmp_path, HELD_OUT)
    assert table.values_KQ.tolist() == [[-1, -4]] and table.weights_Q.tolist() == [3, 1]


def test_a_run_without_comparable_evaluations_is_refused(tmp_path):
    with pytest.raises(UserError, match="no evaluations of checkpoints found"):
        read_outcomes(tmp_path, TOY)
    write(tmp_path, "checkpoint-10", "xx")
    write(tmp_path, "checkpoint-10", "xx", "letter")
    write(tmp_path, "checkpoint-20", "xx")
    with pytest.raises(UserError, match="checkpoint-20 lacks some of the rankings letter, text"):
        read_outcomes(tmp_path, TOY)
    write(tmp_path, "checkpoint-20", "xx", "letter", protocol_hash="other")
    with pytest.raises(UserError, match="evaluations by letter of several protocols found"):
        read_outcomes(tmp_path, TOY)
    assert read_outcomes(tmp_path, TOY, protocol_hashes=["hash-text"]).steps == (10, 20)


def test_checkpoints_that_were_asked_other_questions_are_refused(tmp_path):
    with pytest.raises(UserError, match="checkpoint-20: was asked other questions"):
        outcomes(tmp_path, {10: "x" * 40, 20: "x" * 39})


# --------------------------------------------------------------------------------------------------------- choice

CLOSE = {10: "x" * 60 + "-" * 40, 20: "x" * 88 + "-" * 12, 30: "-" + "x" * 89 + "-" * 10}
"""The third is better than the second by one question in which they differ by three; the first is far behind."""


def test_the_rules_choose_from_the_same_set(tmp_path):
    table = outcomes(tmp_path, CLOSE)
    by_score, earliest = choose(table), choose(table, rule="earliest_not_worse")
    assert (by_score.selected, earliest.selected) == ("checkpoint-30", "checkpoint-20")
    assert by_score.best == earliest.best == "checkpoint-30", "the card's rule, beside whatever rule"
    assert by_score.tied == earliest.tied == ("checkpoint-20", "checkpoint-30")
    assert [score.score for score in by_score.scores] == [0.6, 0.88, 0.89]
    assert sum(score.p_best for score in by_score.scores) == pytest.approx(1)
    assert all(score.interval[0] < score.score < score.interval[1] for score in by_score.scores)
    assert by_score.cross_fitted == pytest.approx(0.89, abs=0.02)
    assert by_score.cross_fitted_interval[0] < by_score.cross_fitted < by_score.cross_fitted_interval[1]
    assert by_score.questions == 100 and by_score.images == 100
    assert by_score.categories["odd"].questions == 50 and by_score.categories["odd"].scores[0] == 0.6


def test_a_benchmark_that_is_too_small_to_tell_is_warned_of(tmp_path):
    (warning,) = choose(outcomes(tmp_path / "close", CLOSE)).warnings
    assert warning.startswith("100 questions cannot tell 2 of 3 checkpoints apart; the smallest difference")
    clear = outcomes(tmp_path / "clear", {10: "x" * 10 + "-" * 90, 20: "x" * 90 + "-" * 10})
    assert choose(clear).warnings == ()
    few = choose(outcomes(tmp_path / "few", {10: "x" * 20 + "-" * 10})).warnings
    assert few == ()
    tiny = choose(outcomes(tmp_path / "tiny", {10: "x" * 14 + "-" * 10})).warnings
    assert tiny == ("24 images are fewer than the 25 from which on figures were checked",)


def test_what_is_always_right_is_not_certain(tmp_path):
    selection = choose(outcomes(tmp_path, {10: "x" * 100, 20: "x" * 100}))
    assert selection.scores[0].interval == pytest.approx(wilson_interval(1, 100, t_quantile(99)))
    assert selection.cross_fitted == 1 and selection.cross_fitted_interval == selection.scores[0].interval
    assert selection.warnings == ("100 questions cannot tell 2 of 2 checkpoints apart; all of them are answered alike",)


def test_only_what_has_its_weights_is_selected_and_all_that_was_evaluated_is_compared(tmp_path):
    table = outcomes(tmp_path, CLOSE)
    selection = choose(table, rule="earliest_not_worse", with_weights=["checkpoint-10", "checkpoint-30"])
    assert selection.selected == "checkpoint-30"
    assert [score.has_weights for score in selection.scores] == [True, False, True]
    assert selection.tied == ("checkpoint-20", "checkpoint-30")


def test_of_losses_the_lowest_is_the_best(tmp_path):
    for step, losses in {1: [3.0, 2.0] * 40, 2: [2.5, 1.5] * 40}.items():
        write_losses(tmp_path, f"checkpoint-{step}", losses, [2] * len(losses))
    selection = choose(read_outcomes(tmp_path, HELD_OUT))
    assert selection.selected == "checkpoint-2" and selection.tied == ("checkpoint-2",)
    assert [score.score for score in selection.scores] == [2.5, 2.0]
    low, high = selection.scores[1].interval
    assert low < 2.0 < high and selection.cross_fitted == 2.0


def test_the_loss_that_training_wrote_down_is_the_mean_over_trained_tokens(tmp_path):
    parts = {"a": {"loss": 1.0, "trained_tokens": 30}, "b": {"loss": 3.0, "trained_tokens": 10}}
    lines = [{"step": 1}, {"step": 2, "validation": parts}, {"step": 4, "validation": {"a": parts["a"]}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorded_losses(tmp_path) == {2: 1.5, 4: 1.0}
    selection = choose_by_recorded_loss({2: 1.5, 4: 1.0})
    assert selection.selected == "checkpoint-4" and selection.scores[0].standard_error is None
    assert recorded_losses(tmp_path / "nowhere") == {}


def test_a_choice_by_another_benchmark_is_kept_and_replaces_the_first_one_when_asked(tmp_path):
    first = choose_by_recorded_loss({1: 2.5, 2: 1.5}, {"checkpoint-1", "checkpoint-2"})
    other = replace(first, by="exact_match", benchmark="mine", selected="checkpoint-1")
    assert write_selection(first, tmp_path) == "selection.svg"
    assert write_selection(other, tmp_path) == "selections/mine.svg"
    assert (current_selection(tmp_path) or {})["selected"] == "checkpoint-2"
    again = replace(first, benchmark="held_out_loss", selected="checkpoint-1")
    assert write_selection(again, tmp_path) == "selection.svg", "the same task chooses again"
    assert write_selection(other, tmp_path, use=True) == "selection.svg"
    assert (current_selection(tmp_path) or {})["benchmark"] == "mine"
    assert sorted(file.stem for file in (tmp_path / "selections").iterdir()) == ["held_out_loss", "mine"]


def test_one_image_cannot_be_halved(tmp_path):
    selection = choose(outcomes(tmp_path, {10: "-", 20: "x"}))
    assert selection.selected == "checkpoint-20" and selection.cross_fitted is None


@pytest.mark.parametrize(
    ("settings", "by"),
    [
        ({}, "loss"),
        ({"benchmark": "b.tsv"}, "mmbench"),
        ({"benchmark": "b.jsonl"}, "exact_match"),
        ({"benchmark": "easy_vqa"}, "mmbench"),
        ({"benchmark": "b.tsv", "by": "loss"}, "loss"),
        ({"benchmark": "coco", "by": "vqav2"}, "vqav2"),
        ({"by": "mmbench"}, "mmbench needs its data"),
        ({"by": "vqav2"}, "vqav2 needs its data"),
        ({"benchmark": "b.tsv", "by": "exact_match"}, "reads a .jsonl"),
        ({"benchmark": "b.jsonl", "by": "mmbench"}, "reads a TSV"),
        ({"benchmark": "b.tsv", "by": "mmbemch"}, r"mmbemch: no such task; did you mean 'mmbench'\?"),
    ],
)
def test_the_benchmark_tells_what_it_is_scored_by(tmp_path, settings, by):
    evaluation = EvaluationConfig(**settings)
    if " " not in by:
        assert [task.name for task in named_tasks(evaluation)] == [by]
    else:
        with pytest.raises(UserError, match=by):
            open_tasks(named_tasks(evaluation), evaluation, tmp_path)


def test_several_tasks_are_named_with_data_of_their_own():
    settings = EvaluationConfig(by=["vqav2=coco", "mmbench"], benchmark="b.tsv")
    assert named_tasks(settings) == [("vqav2", "coco"), ("mmbench", "b.tsv")]


# ----------------------------------------------------------------------------------------------------------- plot


def test_the_plot_stands_by_itself_and_is_the_same_every_time(tmp_path):
    selection = choose(outcomes(tmp_path, CLOSE), rule="earliest_not_worse")
    for name in ("first.svg", "second.svg"):
        write_plot(selection, tmp_path / name)
    content = (tmp_path / "first.svg").read_bytes()
    assert content == (tmp_path / "second.svg").read_bytes()
    nodes = [*ElementTree.fromstring(content).iter()]
    assert [value for node in nodes for name, value in node.items() if "href" in name] == []
    assert b"var(" not in content and b"url(" not in content, "no style of a page is missing"
    classes = [node.get("class") for node in nodes]
    assert classes.count("ring") == 3 and classes.count("tied") == 3, "in the whole and in both categories"
    texts = [node.text for node in nodes if node.tag.endswith("text")]
    assert {"toy, 100 questions, with 95 % intervals", "even", "odd", "50 questions"} <= {*texts}
    rings = "ring: checkpoint-20, selected; thin rings: cannot be told apart from the best, checkpoint-30"
    assert rings in texts
    write_plot(choose_by_recorded_loss({2: 1.5, 4: 1.0}), tmp_path / "loss.svg")


# -------------------------------------------------------------------------------------------------------- pruning


def write_checkpoint(run, step, state=False):
    folder = run / "checkpoints" / f"checkpoint-{step}"
    write_folder(folder, lambda path: (path / "model.safetensors").write_text(str(step)))
    if state:
        (folder / "state").mkdir()
        (folder / "state" / "optimizer.pt").write_text("state")
    return folder


def names(run):
    return [path.name for path in checkpoints(run / "checkpoints")]


def test_pruning_keeps_the_selected_the_best_the_newest_and_what_is_not_evaluated(tmp_path):
    selection = choose(outcomes(tmp_path, CLOSE | {5: "-" * 100}), rule="earliest_not_worse")
    assert (selection.selected, selection.best) == ("checkpoint-20", "checkpoint-30")
    present = [f"checkpoint-{step}" for step in (5, 10, 15, 20, 30, 40)]
    assert weights_to_prune(selection, present) == ["checkpoint-5", "checkpoint-10"]
    assert weights_to_prune(selection, ["checkpoint-10"]) == [], "the newest"
    assert weights_to_prune(selection, []) == []


def test_pruned_weights_are_not_found_and_the_state_beside_them_is_whole(tmp_path):
    for step in (5, 10, 20, 30):
        write_checkpoint(tmp_path, step, state=step == 10)
    selection = choose(outcomes(tmp_path, CLOSE | {5: "-" * 100}))
    assert prune_weights(tmp_path, selection) == ["checkpoint-5", "checkpoint-10", "checkpoint-20"]
    assert names(tmp_path) == ["checkpoint-30"]
    left = tmp_path / "checkpoints" / "checkpoint-10"
    assert [path.name for path in left.iterdir()] == ["state"]
    write_checkpoint(tmp_path, 40, state=True)
    keep_newest_states(left.parent, 1)
    assert not left.exists()
    assert prune_weights(tmp_path, selection) == []


def test_state_is_pruned_from_beside_weights_and_what_a_kill_has_left_goes_with_the_next(tmp_path):
    folder, torn = (write_checkpoint(tmp_path, step, state=True) for step in (10, 20))
    keep_newest_states(folder.parent, 1)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"] and not (folder / "state").exists()
    (torn / "manifest.json").unlink()  # where a kill stopped removing weights
    prune_weights(tmp_path, choose(outcomes(tmp_path, {10: "x-" * 20})))
    assert [path.name for path in torn.iterdir()] == ["state"]


# ---------------------------------------------------------------------------------------------------- the command


def kept(run) -> dict[str, int]:
    """The evaluations of a run, and when each was written."""
    return {str(file): file.stat().st_mtime_ns for file in (run / "evaluations").rglob("checkpoint-*.json")}


def test_a_run_is_selected_from_with_a_plot_and_not_asked_twice(copied, capsys):
    selection, _ = printed(capsys, "select", copied)
    before = kept(copied)
    assert len(before) == 4, "two checkpoints, each by text and by letter"
    assert selection.keys() >= {"by", "rule", "selected", "scores", "tied", "cross_fitted"}
    assert selection["scores"][0].keys() >= {"checkpoint", "step", "score", "standard_error", "p_best"}
    assert json.loads((copied / "selection.json").read_text()) == selection
    assert (copied / "selection.svg").is_file()
    again, _ = printed(capsys, "select", copied, "--rule", "earliest_not_worse")
    assert again["rule"] == "earliest_not_worse" and again["scores"] == selection["scores"]
    assert kept(copied) == before
    assert status_of("select", copied) == 0
    assert "was selected: it has the highest score" in " ".join(capsys.readouterr().out.split())


def test_the_base_of_adapters_is_loaded_once_for_all_checkpoints(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    options = (f"output_dir={run}", "model.mode=lora", "training.learning_rate=0.1")
    assert status_of("train", trained, *options) == 0
    loaded = []
    load_model = weights.load_model
    monkeypatch.setattr(weights, "load_model", lambda path, **kwargs: loaded.append(path) or load_model(path, **kwargs))
    assert [score["step"] for score in printed(capsys, "select", run)[0]["scores"]] == [1, 2]
    assert len(loaded) == 1
    recipe = find_recipe(str(run))
    for path in checkpoints(run / "checkpoints"):
        tasks = open_tasks(named_tasks(recipe.evaluation), recipe.evaluation, Path(recipe.data.store))
        assert [task.label for task in tasks] == ["text", "letter"]
        for result in score_model(path, tasks, run_dir=None, name=path.name):
            file = result_file(run, result.benchmark, result.protocol_hash, path.name)
            assert read_lines(file.with_suffix(".jsonl")) == result.outcomes, "as loaded alone"


@pytest.mark.slow
def test_two_processes_select_as_one_does(copied, capfd):
    found = []
    for nproc in (1, 2):
        assert status_of("select", copied, "--average", "--nproc", nproc, "--json") == 0
        answers = {file: file.read_text() for file in (copied / "evaluations").rglob("checkpoint-*.jsonl")}
        found.append((json.loads(capfd.readouterr().out), answers))
        shutil.rmtree(copied / "evaluations")
    assert found[0] == found[1] and len(found[0][1]) == 4


def test_a_run_is_selected_from_by_short_answers(copied, tmp_path, capsys):
    lines = [{"question": f"What is {n}?", "answer": "red", "category": "ab"[n % 2]} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    selection, _ = printed(capsys, "select", copied, "--benchmark", tmp_path / "own.jsonl")
    assert (selection["by"], selection["benchmark"], selection["questions"]) == ("exact_match", "own", 20)
    before = kept(copied)
    assert len(before) == 2
    assert printed(capsys, "select", copied, "--benchmark", tmp_path / "own.jsonl")[0] == selection
    assert kept(copied) == before
    (file,) = (copied / "evaluations" / "own").glob("*/checkpoint-1.jsonl")
    assert json.loads(file.read_text().splitlines()[0]).keys() >= {"question", "cluster", "prediction", "hit"}


def test_a_run_is_selected_from_by_the_loss_of_every_held_out_sample(copied, tmp_path, capsys):
    chats = [[f"Say {n}.", "one two three"[: 3 + 2 * n]] for n in range(6)]
    lines = [{"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]} for u, a in chats]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = yaml.safe_load((copied / "recipe.yaml").read_text())
    values["data"]["validation"] = {"path": str(tmp_path / "own")}
    values["evaluation"]["rule"] = "earliest_not_worse"  # for which recorded means are not enough
    (copied / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert status_of("prepare", copied) == 0
    selection, _ = printed(capsys, "select", copied, "--by", "loss")
    assert (selection["by"], selection["questions"]) == ("loss", 6)

    loaded = load_for_inference(copied / "checkpoints" / "checkpoint-2", precision="float32")
    (file,) = (copied / "evaluations" / "held_out_loss").glob("*/checkpoint-2.jsonl")
    kept_lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["question"])
    for (user, assistant), line in zip(chats, kept_lines, strict=True):
        alone = place(loaded.template, conversation(user, assistant))
        with torch.inference_mode():
            loss = loaded.model(batch=batch_of([alone], train_on="assistant")).loss
        assert line["loss"] == pytest.approx(float(loss), rel=0.02), "in bfloat16 where the processor has it"


def test_what_does_not_go_together_is_refused(copied, refusal):
    assert "tea: no such task" in refusal("select", copied, "--by", "tea")
    assert "'--rule': 'tea' is not one of 'best', 'earliest_not_worse'" in refusal("select", copied, "--rule", "tea")
    assert "--by loss takes no --benchmark" in refusal("select", copied, "--by", "loss", "--benchmark", "x.tsv")
    assert "nothing to choose by" in refusal("select", copied, "--by", "loss")
    assert "x.jsonl: No such file" in refusal("select", copied, "--benchmark", "x.jsonl")


def test_watching_ends_with_the_run_and_asks_what_came_meanwhile(copied, capsys, monkeypatch):
    last = copied / "checkpoints" / "checkpoint-2"
    hidden = last.rename(copied / "hidden")
    RunStatus(status="running", step=1, max_steps=2).write(copied)

    def training_goes_on(seconds):
        hidden.rename(last)
        RunStatus(status="finished", step=2, max_steps=9, why="evaluation.patience: …").write(copied)

    monkeypatch.setattr(session.time, "sleep", training_goes_on)
    selection, said = printed(capsys, "select", copied, "--watch")
    assert [score["step"] for score in selection["scores"]] == [1, 2]
    assert said.count("running; waiting for checkpoints") == 1
    assert "finished at step 2: evaluation.patience: …" in said


def test_an_evaluation_that_fails_while_watching_is_told_and_left_out(copied, capsys, monkeypatch):
    ask = session.score_model

    def broken(path, *arguments, **options):
        if path.name == "checkpoint-2":
            raise RuntimeError("out of memory")
        return ask(path, *arguments, **options)

    monkeypatch.setattr(session, "score_model", broken)
    assert status_of("select", copied, "--watch") == 1
    said = capsys.readouterr()
    assert "could not be evaluated: checkpoint-2 (RuntimeError: out of memory)" in said.err
    assert "checkpoint-2: the evaluation failed" in said.out
    selection = json.loads((copied / "selection.json").read_text())
    assert selection["selected"] == "checkpoint-1"
    assert selection["warnings"][-1] == "left out: checkpoint-2: RuntimeError: out of memory"


def test_a_checkpoint_that_cannot_be_evaluated_is_left_out_by_name(copied, capsys, monkeypatch):
    ask = session.score_model
    other = copied / "checkpoints" / "checkpoint-1"

    def diverged(path, *arguments, **options):
        if path.name == "checkpoint-1":
            raise RunError("the model gives no finite likelihood")
        return ask(path, *arguments, **options)

    monkeypatch.setattr(session, "score_model", diverged)
    assert status_of("select", copied) == 1
    said = capsys.readouterr()
    assert "could not be evaluated: checkpoint-1 (the model gives no finite likelihood)" in said.err
    assert json.loads((copied / "selection.json").read_text())["selected"] == "checkpoint-2"

    def vanished(path, *arguments, **options):
        if path.name == "checkpoint-1":
            shutil.rmtree(other)
        return ask(path, *arguments, **options)

    monkeypatch.setattr(session, "score_model", vanished)
    assert status_of("select", copied, "--watch") == 0
    assert "checkpoint-1: was removed before it was evaluated" in capsys.readouterr().out


def test_damaged_files_of_a_run_are_asked_anew_or_named(copied, capsys):
    selection, _ = printed(capsys, "select", copied)
    one, other = sorted((copied / "evaluations").rglob("checkpoint-1.jsonl"))
    one.with_suffix(".json").write_text("{")
    other.write_text(other.read_text().splitlines()[0])
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "vali')  # where training was killed
    assert printed(capsys, "select", copied)[0] == selection and recorded_losses(copied) == {}


def in_its_size_but_other(checkpoint):
    weights = next(checkpoint.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4000] + bytes(4000))


def cut_off(checkpoint):
    (checkpoint / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (in_its_size_but_other, "model.safetensors changed since it was written"),
        (cut_off, "files of its weights are missing or cut off"),
    ],
)
def test_a_damaged_checkpoint_is_left_out_by_name_whatever_was_kept_of_it(copied, capsys, damage, what):
    printed(capsys, "select", copied)
    damage(copied / "checkpoints" / "checkpoint-1")
    assert status_of("select", copied) == 1
    said = capsys.readouterr()
    assert said.out.count(f"checkpoint-1: it is left out: {what}") == 1
    assert f"could not be evaluated: checkpoint-1 ({what})" in said.err
    selection = json.loads((copied / "selection.json").read_text())
    assert [score["checkpoint"] for score in selection["scores"]] == [selection["selected"]] == ["checkpoint-2"]
    assert selection["warnings"][-1] == f"left out: checkpoint-1: {what}" and "cannot be told apart" not in said.out
    assert status_of("report", copied) == 0
    assert f"Left out: checkpoint-1: {what}." in (copied / "report.html").read_text()
    damage(copied / "checkpoints" / "checkpoint-2")
    assert status_of("select", copied) != 0
    assert "checkpoint-1" in capsys.readouterr().err, "and with none left, why"


def test_a_damaged_checkpoint_is_not_chosen_by_a_loss_written_down(copied, capsys):
    lines = [{"step": n, "validation": {"mine": {"loss": 0.1 * n, "trained_tokens": 9}}} for n in (1, 2)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert printed(capsys, "select", copied, "--by", "loss")[0]["selected"] == "checkpoint-1"
    in_its_size_but_other(copied / "checkpoints" / "checkpoint-1")
    assert status_of("select", copied, "--by", "loss") == 1
    selection = json.loads((copied / "selection.json").read_text())
    assert [score["checkpoint"] for score in selection["scores"]] == [selection["selected"]] == ["checkpoint-2"]
    assert [warning.partition(": model")[0] for warning in selection["warnings"]] == ["left out: checkpoint-1"]


def test_answers_of_weights_that_are_no_more_do_not_count(copied, capsys):
    before = printed(capsys, "select", copied)[0]["scores"]
    for file in [*(copied / "evaluations").rglob("checkpoint-1.json*")]:
        (file.parent / file.name.replace("-1.", "-9.")).write_bytes(file.read_bytes())
    assert printed(capsys, "select", copied)[0]["scores"] == before, "of a run that was resumed before step 9"


def test_weights_go_when_the_recipe_says_so(copied, capsys):
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace("keep_weights: all", "keep_weights: best+last"))
    selection, _ = printed(capsys, "select", copied)
    stay = {selection["selected"], selection["best"], "checkpoint-2"}
    assert set(names(copied)) == stay
    assert printed(capsys, "select", copied)[0] == selection
    assert [score["has_weights"] for score in selection["scores"]] == [f"checkpoint-{step}" in stay for step in (1, 2)]


# ------------------------------------------------------------------------------- several benchmarks, base, average


def of_benchmark(table, name, **changes):
    return replace(table, benchmark=name, task=name, **changes)


STEEP = {10: "x" * 20 + "-" * 80, 20: "x" * 60 + "-" * 40, 30: "x" * 80 + "-" * 20}
FALLEN = {10: "x" * 90 + "-" * 10, 20: "x" * 88 + "-" * 12, 30: "x" * 30 + "-" * 70}
FLAT = {10: "x" * 50 + "-" * 50, 20: "x" * 50 + "-" * 50, 30: "x" * 50 + "-" * 50}


def test_several_benchmarks_choose_together_by_what_they_tell_apart(tmp_path):
    steep, fallen, flat = (
        of_benchmark(outcomes(tmp_path / name, hits), name)
        for name, hits in (("steep", STEEP), ("fallen", FALLEN), ("flat", FLAT))
    )
    selection = choose(steep, flat)
    assert (selection.by, selection.benchmark, selection.metric.name) == ("steep+flat", "steep+flat", "index")
    assert selection.selected == "checkpoint-30" and selection.questions == 200
    assert selection.benchmarks["flat"].weight == selection.benchmarks["flat"].reliability == 0
    assert len(selection.benchmarks["flat"].tied) == 3 and selection.benchmarks["steep"].tied == ("checkpoint-30",)
    assert selection.benchmarks["steep"].cross_fitted == pytest.approx(0.8, abs=0.01)
    assert sum(score.p_best for score in selection.scores) == pytest.approx(1)
    assert selection.cross_fitted_interval[0] < selection.cross_fitted < selection.cross_fitted_interval[1]

    both = choose(steep, fallen)
    assert both.selected == "checkpoint-20", "good on both, though best on none"
    assert both.selected not in both.benchmarks["steep"].tied
    by_weights = choose(of_benchmark(steep, "steep", weight=9.0), of_benchmark(fallen, "fallen", weight=1.0))
    assert by_weights.selected == "checkpoint-30" and by_weights.benchmarks["steep"].weight == 0.9
    watched = choose(steep, of_benchmark(fallen, "fallen", weight=0.0))
    assert (watched.by, watched.selected, watched.metric.name) == ("steep", "checkpoint-30", "accuracy")
    assert watched.scores == choose(steep).scores and watched.benchmarks["fallen"].weight == 0

    words = printed_of(both)
    assert "index of steep+fallen" in words and "below its best, checkpoint-30" in words
    assert "cannot tell the checkpoints apart" in printed_of(selection)
    write_plot(both, tmp_path / "plot.svg")
    assert {"steep", "fallen"} <= {
        node.text for node in ElementTree.parse(tmp_path / "plot.svg").iter() if node.tag.endswith("text")
    }


def printed_of(selection) -> str:
    out = Console(file=StringIO(), width=80)
    show(selection, out)
    return " ".join(out.file.getvalue().split())


def test_checkpoints_that_one_benchmark_lacks_are_left_out_by_name(tmp_path):
    short = of_benchmark(outcomes(tmp_path / "short", {10: STEEP[10], 30: STEEP[30]}), "short")
    selection = choose(outcomes(tmp_path / "toy", STEEP), short)
    assert [score.step for score in selection.scores] == [10, 30]
    assert selection.warnings[-1] == "left out: checkpoint-20: not evaluated on every benchmark"


def test_a_checkpoint_that_is_worse_than_the_base_is_marked_and_not_selected(tmp_path):
    steep = outcomes(tmp_path / "steep", STEEP)
    base = np.array([1.0] * 85 + [0.0] * 15)
    gate = of_benchmark(outcomes(tmp_path / "gate", FALLEN), "gate", weight=0.0, others={"base": base})
    selection = choose(steep, gate)
    assert (selection.best, selection.selected) == ("checkpoint-30", "checkpoint-20")
    assert [score.worse_than_base for score in selection.scores] == [(), (), ("gate",)]
    assert selection.benchmarks["gate"].base == 0.85
    words = printed_of(selection)
    assert "worse than the base on gate" in words and "the best of those that are not worse than the base" in words
    none = choose(steep, replace(gate, values_KQ=np.zeros_like(gate.values_KQ)))
    assert none.selected == "checkpoint-30" and "every checkpoint is significantly worse" in none.warnings[-1]


@pytest.mark.parametrize(("hits", "is_taken"), [(94, True), (90, False)])
def test_the_average_is_taken_only_where_it_is_significantly_better(tmp_path, hits, is_taken):
    table = outcomes(tmp_path, CLOSE)
    own = np.array([1.0] * hits + [0.0] * (100 - hits))
    of = ("checkpoint-20", "checkpoint-30")
    selection = choose(replace(table, others={"average-20-30": own}), average_of=of)
    assert selection.average.is_taken is is_taken and selection.average.compared_with == "checkpoint-30"
    assert selection.selected == ("average-20-30" if is_taken else "checkpoint-30")
    assert selection.average.difference == pytest.approx(hits / 100 - 0.89)
    assert ("and was taken" if is_taken else "and was not taken") in printed_of(selection)
    assert selection.scores == choose(table).scores
    write_plot(selection, tmp_path / "plot.svg")


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"mmbench": 1}, "found mmbench; expected a weight for each of exact_match, mmbench"),
        ({"mmbench": 0, "exact_match": 0}, "one of them over 0"),
        ({"mmbench": 1, "exact_match": 2, "tea": 1}, "found mmbench, exact_match, tea; expected"),
    ],
)
def test_weights_that_do_not_fit_the_tasks_are_refused(weights, problem):
    settings = EvaluationConfig(by=["mmbench", "exact_match"], benchmark="x", weights=weights)
    with pytest.raises(UserError, match=problem):
        Benchmarks(settings, Path(), None)


def test_a_run_is_selected_from_by_two_tasks_and_by_the_mean_of_its_weights(copied, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "red"}) + "\n" for n in range(20)))
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(
        recipe.replace("not_worse_than_base: []", f"not_worse_than_base: [exact_match={own}]")
    )
    by = ("--by", "mmbench", "--by", f"exact_match={own}")
    selection, said = printed(capsys, "select", copied, *by, "--average")
    assert selection["benchmarks"].keys() == {selection["benchmark"].split("+")[0], "own"}
    assert selection["benchmarks"]["own"]["base"] is not None and "choose together" in said
    assert list((copied / "evaluations" / "own").glob("*/base.json"))
    average = copied / "checkpoints" / "average-1-2"
    assert selection["average"]["of"] == ["checkpoint-1", "checkpoint-2"]
    assert average.exists() is selection["average"]["is_taken"]
    assert (copied / "selections" / f"{selection['benchmark']}.json").is_file()
    assert status_of("report", copied) == 0

    paths = [copied / "checkpoints" / f"checkpoint-{step}" for step in (1, 2)]
    average_weights(paths, average)
    first, second, mean = (load_file(path / "model.safetensors") for path in (*paths, average))
    assert mean.keys() == first.keys()
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((first[name].float() + second[name].float()) / 2).to(tensor.dtype))
    assert load_for_inference(average).family and problem_of_weights(average) is None


def test_two_checkpoints_are_compared_on_the_same_questions(copied, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "red"}) + "\n" for n in range(20)))
    tasks = ("--task", "mmbench", "--task", f"exact_match={own}")
    found, _ = printed(capsys, "compare", f"{copied}@2", f"{copied}@1", *tasks)
    assert [row["questions"] for row in found["tasks"]][1] == 20
    for row in found["tasks"]:
        assert row["difference"] == pytest.approx(row["a"] - row["b"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert found["tasks"][1]["p_a_better"] == pytest.approx(0.5), "both answer nothing right"
    before = kept(copied)
    assert status_of("compare", f"{copied}@2", f"{copied}@1", *tasks) == 0
    assert "P(A better)" in capsys.readouterr().out and kept(copied) == before
