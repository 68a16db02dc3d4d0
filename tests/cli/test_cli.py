"""The command line: one line and status 2 for what the user got wrong, one JSON object for programs."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import status_of
from helpers.files import write_tsv
from helpers.training import DATA, write_recipe
from PIL import Image

from sft.cli.main import main
from sft.core.errors import UserError
from sft.core.shipped import recipe_path, shipped_root
from sft.recipe import load_recipe
from sft.runs.checkpoint import checkpoint_name, write_folder
from sft.runs.names import find_model, find_recipe, recipe_of_model, run_checkpoints

COMMANDS = (
    *(
        "quickstart",
        "new",
        "validate",
        "prepare",
        "mix",
        "inspect",
        "plan",
        "train",
        "evaluate",
        "select",
        "merge",
        "chat",
    ),
    *("report", "stats", "export", "leaks", "doctor", "recipes", "tasks", "schema"),
)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


# ---------------------------------------------------------------------------------------------------------- recipes


def test_each_mistake_of_a_recipe_is_a_line_and_nothing_that_follows_from_it_is(recipe, refusal):
    said = refusal("validate", recipe, "data.train_on=none", "model.mode=loral", problems=2)
    mode, train_on = said.splitlines()
    assert (
        mode.endswith("found 'loral'; did you mean 'lora'?")
        and train_on.endswith("found 'none'")
        and "at least" not in said
    )
    names = ("model.trainable=[visoin,hed]", "training.groups={hed: {learning_rate: 1}}", "model.path=nowhere")
    said = refusal("validate", recipe, *names, "data.mixture.0.datasets.0.dataset=mesages", problems=5)
    assert "model.trainable: idefics has no 'visoin'; did you mean 'vision'?" in said
    assert "training.groups: idefics has no 'hed'; did you mean 'head'?" in said


def test_a_terminal_folds_a_problem_between_words(recipe, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert status_of("validate", recipe, f"model.path={'x' * 30}") == 2
    said = capsys.readouterr().err
    assert f"model.path: {'x' * 30} is not a folder; expected" in " ".join(said.split())
    assert all(len(line) <= 50 for line in said.splitlines())


def test_what_is_wrong_with_a_recipe_is_one_line(recipe, refusal):
    assert "no shipped recipe has that name; did you mean 'quickstart'?" in refusal("validate", "quikstart")
    assert "training.max_stepz: unknown key; did you mean 'max_steps'?" in refusal(
        "validate", recipe, "training.max_stepz=5"
    )
    recipe.write_text(recipe.read_text().replace("  max_steps: 4", "  max_steps: four"))
    assert "toy.yaml:" in refusal("prepare", recipe)


@pytest.mark.parametrize("command", ["validate", "prepare", "train"])
def test_raw_files_that_are_not_there_are_named(recipe, refusal, command):
    assert "dataset 'messages': path nowhere.jsonl does not exist" in refusal(
        command, recipe, "data.mixture.1.datasets.0.path=nowhere.jsonl"
    )
    assert not (recipe.parent / "run").exists()


def test_a_dataset_of_the_hub_is_no_missing_path(recipe):
    assert status_of("validate", recipe, "data.mixture.1.datasets.0.path=owner/name") == 0


def test_all_that_is_not_there_is_named_at_once(recipe, refusal):
    paths = [f"data.mixture.0.datasets.{number}.path=nowhere/{number}" for number in (0, 1)]
    wrong = (*paths, "data.mixture.1.datasets.0.dataset=mesages", "model.path=nowhere")
    said = refusal("validate", recipe, *wrong, problems=5)
    assert said.count("path nowhere/0 does not exist") == said.count("path nowhere/1 does not exist") == 1
    assert said.count("a source that you do not have can be deleted") == 1
    assert "unknown dataset 'mesages'; did you mean 'messages'?" in said and "model.path: nowhere is not" in said


def test_data_are_no_recipe_and_what_makes_one_is_named(recipe, refusal):
    Path("train.jsonl").write_text("{}\n")
    Path("photos").mkdir()
    for data in ("train.jsonl", "photos"):
        assert f"`idefics-sft new {data}` writes a recipe" in refusal("train", data)


def test_a_file_of_a_dataset_that_is_not_there_is_named(recipe, refusal):
    assert "no dev.jsonl, dev.json or dev.parquet" in refusal("prepare", recipe, "data.mixture.1.datasets.0.split=dev")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path=nowhere", "model.path: nowhere is not a folder; expected one, or a hub id like owner/name"),
        ("evaluation.benchmark=mmbench", "mmbench is not a file; expected a TSV of MMBench layout, or easy_vqa"),
        ("evaluation.support=dev.tsv", "dev.tsv is not a file; expected a TSV of MMBench layout with answers"),
        ("output_dir=toy.yaml", "output_dir: toy.yaml is a file; expected a folder, or a name for a new one"),
        ("data.store=toy.yaml", "data.store: toy.yaml is a file; expected a folder, or a name for a new one"),
    ],
)
def test_validate_looks_at_every_path(recipe, refusal, capsys, override, expected):
    assert expected in refusal("validate", recipe, override)
    assert status_of("validate", recipe, override, "--no-paths") == 0
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_made_is_one_line(recipe, refusal):
    assert f"{recipe}/stores: cannot be made or written to: Not a directory" in refusal(
        "prepare", recipe, f"data.store={recipe}/stores"
    )


def test_records_that_are_bad_are_a_mistake_of_the_source_and_path_that_are_named(recipe, refusal):
    bad = DATA / "messages" / "bad.jsonl"
    said = refusal("prepare", recipe, f"data.mixture.1.datasets.0.path={bad}")
    assert f": messages ({bad}): 100.0 % of 14 records bad (allowed: 0.0 %): " in said


def test_validate_names_the_next_command(recipe, capsys):
    assert status_of("validate", recipe) == 0
    assert capsys.readouterr().out == f"{recipe}: valid, 2 sources, 4 steps\nNext: idefics-sft prepare {recipe}\n"
    one = "data.mixture=[{name: all, share: 1.0, datasets: [{dataset: messages, path: x}]}]"
    assert status_of("validate", recipe, "--no-paths", one, "training.max_steps=1") == 0
    assert ": valid, 1 source, 1 step\nNext: " in capsys.readouterr().out
    assert status_of("validate", recipe, "--json", "data.mixture.1.datasets.0.path=nowhere", "--no-paths") == 0
    assert json.loads(capsys.readouterr().out) == {
        "valid": True,
        "sources": ["pictures", "talk"],
        "next": f"idefics-sft prepare {recipe} data.mixture.1.datasets.0.path=nowhere",
    }


# ------------------------------------------------------------------------------------------------------ prepare, mix


def test_mix_before_prepare_names_the_command(recipe, refusal):
    assert f"no prepared dataset here; run `idefics-sft prepare {recipe} seed=2` first" in refusal(
        "mix", recipe, "seed=2"
    )


def test_prepare_and_mix_print_one_json_object(recipe, capsys):
    assert status_of("prepare", recipe, "--json") == 0
    stores = json.loads(capsys.readouterr().out)["stores"]
    assert [(Path(store["path"]).name.split("-")[0], store["samples"], store["images"]) for store in stores] == [
        ("easy_vqa", 8, 3),
        ("easy_vqa", 20, 3),
        ("messages", 5, 2),
    ]
    assert status_of("mix", recipe, "--json", "--steps", 32) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {
        "unit", "steps", "steps_asked", "packs_per_step", "ended_by", "sources", "budget", "packs",
        "largest_error_in_packs", "largest_error_inside_in_packs", "windows", "tokens_left_over", "warnings",
    }  # fmt: skip
    assert (report["unit"], report["steps"]) == ("tokens", 32)
    for source in report["sources"]:
        assert source.keys() == {
            "name", "asked", "achieved", "achieved_in", "error_in_packs", "error_inside_in_packs", "tokens",
            "trained_tokens", "samples", "images", "epochs", "ended_at_step", "when_exhausted", "pieces", "budget",
            "tokens_left_over", "held_out", "filtered", "skipped", "fitted",
        }  # fmt: skip
    assert [source["asked"] for source in report["sources"]] == [0.75, 0.25]
    assert sum(source["achieved"] for source in report["sources"]) == pytest.approx(1)
    assert report["sources"][1]["achieved"] == pytest.approx(0.25, abs=3 / 64)
    assert report["packs"].keys() == {
        "count", "fill", "images_per_pack", "distinct_images_per_pack", "encodes_saved", "by_fill",
        "by_distinct_images", "image_weight", "left_out", "advice",
    }  # fmt: skip
    assert report["largest_error_in_packs"] <= 3
    assert report["packs"]["count"] == 64

    assert status_of("mix", recipe) == 0
    assert "Mixture by tokens, 4 steps" in capsys.readouterr().out


def test_a_changed_raw_file_is_prepared_anew(recipe, capsys):
    folder = shutil.copytree(DATA / "messages", recipe.parent / "messages")
    prepare = ("prepare", recipe, f"data.mixture.1.datasets.0.path={folder}", "--json")

    def prepared():
        assert status_of(*prepare) == 0
        return json.loads(capsys.readouterr().out)["stores"]

    before = prepared()
    manifests = [Path(store["path"]) / "manifest.json" for store in before]
    written = [file.stat().st_ino for file in manifests]
    assert prepared() == before
    assert [file.stat().st_ino for file in manifests] == written, "nothing changed, nothing is made again"
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "Ho."}, {"role": "assistant", "content": "Hi."}]}\n')
    assert [store["samples"] for store in prepared()] == [8, 20, 6]
    assert status_of("mix", *prepare[1:], "--steps", 1) == 0, "the new sample is encoded too"


def test_a_limited_preparation_is_none_to_train_on(recipe, capsys, refusal):
    assert status_of("prepare", recipe, "--limit", 2) == 0
    printed = capsys.readouterr().out
    stores = sorted(path.name for path in (recipe.parent / "stores").iterdir() if path.name.endswith("-first-2"))
    assert len(stores) == 3
    assert f"Next: idefics-sft stats {recipe.parent}/stores/easy_vqa-" in printed.replace(str(recipe), "")
    assert "The first 2 records are for looking" in printed and "idefics-sft train" not in printed
    assert f"no prepared dataset here; run `idefics-sft prepare {recipe}` first" in refusal("mix", recipe)
    assert status_of("prepare", recipe) == status_of("prepare", recipe, "--limit", 2) == 0
    capsys.readouterr()
    assert status_of("prepare", recipe, "--json") == 0
    assert [store["samples"] for store in json.loads(capsys.readouterr().out)["stores"]] == [8, 20, 5], "all of them"


def test_filtered_questions_are_counted_by_source(recipe, capsys):
    assert status_of("prepare", recipe) == 0
    assert "\npictures (easy_vqa-" in capsys.readouterr().out, "a source of several datasets: the folder too"
    assert status_of("mix", recipe) == 0
    assert "pictures: 3 filtered, yes/no question" in capsys.readouterr().out


def test_a_sample_that_fits_no_pack_shows_in_the_mixture(recipe, capsys):
    answers = ("No.", "No. " * 200)
    turns = [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}] for answer in answers]
    file = recipe.parent / "long.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    override = f"data.mixture.1.datasets.0.path={file}"
    assert status_of("prepare", recipe, override) == 0
    capsys.readouterr()
    assert status_of("mix", recipe, override, "--json") == 0
    pictures, talk = json.loads(capsys.readouterr().out)["sources"]
    assert pictures["filtered"] == {"yes/no question": 3}
    assert talk["fitted"] == {"conversation left out: too long": 1}
    assert talk["skipped"] == {}


# ------------------------------------------------------------------------------------------------------------ models


@pytest.fixture
def llama(tmp_path):
    """A model folder of another family."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "llama"


@pytest.fixture
def questions(tmp_path):
    """A TSV of MMBench layout with one question."""
    image = base64.b64encode((DATA / "easy_vqa" / "train" / "images" / "0.png").read_bytes()).decode()
    columns = {"index": 1, "question": "What is it?", "A": "A circle.", "B": "A square.", "answer": "A", "image": image}
    return write_tsv(tmp_path / "questions.tsv", columns)


def test_a_model_that_is_not_idefics_is_refused(llama, questions, refusal):
    expected = "model_type is 'llama', which is no known family (idefics, idefics2, idefics3)"
    assert expected in refusal("chat", llama)
    assert expected in refusal("evaluate", llama, "--benchmark", questions)


def test_a_model_that_is_not_there_is_refused(tmp_path, refusal):
    assert "neither a model folder" in refusal("chat", tmp_path)
    assert "neither a model folder" in refusal("chat", "no-such-model")


def test_what_chat_is_given_wrong_is_told_before_a_model_is_loaded(tmp_path, refusal):
    (tmp_path / "config.json").write_text("{}")
    inside, outside = tmp_path / "photos" / "a.png", tmp_path / "a.png"
    inside.parent.mkdir()
    for file in (inside, outside):
        Image.new("RGB", (8, 8)).save(file)
    for images in (["nope.png"], [outside, "nope.png"], ["nope.png", outside]):
        options = [part for image in images for part in ("--image", image)]
        assert "nope.png: image file missing" in refusal("chat", tmp_path, *options)
    kept = refusal("chat", tmp_path, "--allow-dir", inside.parent, "--image", inside, "--image", outside)
    assert f"{outside}: not in {inside.parent}" in kept
    assert "--allow-dir: nope is not a folder" in refusal("chat", tmp_path, "--allow-dir", "nope")


def test_a_benchmark_that_is_none_is_refused(llama, questions, tmp_path, refusal):
    assert "'--rank': 'tea' is not one of 'letter', 'text', 'generate'" in refusal("evaluate", llama, "--rank", "tea")
    refused = refusal("evaluate", llama, "--protocol", "tea")
    assert "'--protocol': 'tea' is not one of 'card', 'vanilla', 'circular'" in refused
    assert "--benchmark is needed" in refusal("evaluate", llama)
    assert "--generate and --rank text exclude each other" in refusal("evaluate", llama, "--generate", "--rank", "text")
    card = ("evaluate", llama, "--benchmark", questions, "--protocol", "card", "--rank", "text")
    assert "protocol card ranks letters, found text" in refusal(*card)
    assert "nowhere.tsv: No such file" in refusal("evaluate", llama, "--benchmark", "nowhere.tsv")
    assert "give --shots K too" in refusal("evaluate", llama, "--benchmark", questions, "--support", questions)
    assert "own.jsonl: No such file" in refusal("evaluate", llama, "--benchmark", "own.jsonl")
    assert "--rank goes with multiple-choice questions" in refusal(
        "evaluate", llama, "--task", "exact_match=own.jsonl", "--rank", "text"
    )
    assert "tea: no such task" in refusal("evaluate", llama, "--task", "tea")
    assert "loss: nothing to choose by" in refusal("evaluate", llama, "--task", "loss")
    details = ("--details", tmp_path, "--benchmark", questions)
    assert f"--details {tmp_path}: no file can be written there" in refusal("evaluate", llama, *details)
    many = ("--shots", "2", "--support", questions, "--benchmark", questions)
    assert "can be shown 0 others with answers, 2 are asked for" in refusal("evaluate", llama, *many)
    poem = write_tsv(tmp_path / "poem.tsv", {"line": "Tyger Tyger", "verse": 1})
    assert "missing columns index, question" in refusal("evaluate", llama, "--benchmark", poem)
    questions.write_text(questions.read_text().rsplit("\t", 1)[0] + "\tbm8gaW1hZ2U=\n")  # "no image" in base64
    assert "questions.tsv, line 2: image does not decode" in refusal("evaluate", llama, "--benchmark", questions)


def test_a_test_split_needs_a_file_to_submit(llama, questions, tmp_path, refusal):
    lines = [line.split("\t") for line in questions.read_text().splitlines()]
    (tmp_path / "test.tsv").write_text("".join("\t".join([*line[:4], line[5]]) + "\n" for line in lines))
    refused = refusal("evaluate", llama, "--benchmark", tmp_path / "test.tsv")
    assert "test.tsv: a test split, without answers to score by; give --submission FILE.xlsx" in refused
    refused = refusal("evaluate", llama, "--benchmark", tmp_path / "test.tsv", "--submission", "answers.csv")
    assert "--submission answers.csv: expected the name of an .xlsx file" in refused
    refused = refusal("evaluate", llama, "--benchmark", tmp_path / "test.tsv", "--shots", "1")
    assert "no questions are left to ask beside those set aside for 1 shots" in refused


def test_train_then_evaluate_the_run(recipe, questions, capsys):
    assert status_of("train", recipe, "training.max_steps=2", "--json") == 0
    printed = capsys.readouterr()
    status = json.loads(printed.out)
    assert (status["status"], status["step"], status["output_dir"]) == ("finished", 2, str(recipe.parent / "run"))
    assert "training 2/2 loss" in printed.err

    assert status_of("train", recipe, "training.max_steps=2", "--quiet") == 0
    assert capsys.readouterr().out.startswith(f"{recipe.parent / 'run'}: finished at step 2. Next: "), "and no notes"
    assert status_of("train", recipe, "training.max_steps=2") == 0
    assert "a finished run is here already; nothing is trained" in capsys.readouterr().out

    for rank in ("text", "letter"):
        command = ("evaluate", recipe.parent / "run", "--benchmark", questions, "--rank", rank, "--json")
        assert status_of(*command) == 0
        printed = capsys.readouterr()
        result = json.loads(printed.out)
        assert result.keys() >= {
            "benchmark", "protocol", "protocol_hash", "rank", "shots", "questions", "accuracy", "standard_error",
            "interval", "chance", "blind", "categories", "letters",
        }  # fmt: skip
        assert (result["questions"], result["chance"], result["rank"]) == (1, 0.5, rank)
        assert result["blind"] in (0, 1), "the same question without its image"
        assert "checkpoint-2" in printed.err, "which model answers is said"


def test_select_before_train_names_the_command(recipe, refusal):
    assert "no complete checkpoint here; run `idefics-sft train` first" in refusal("select", recipe)
    assert "no complete checkpoint here" in refusal("chat", recipe)


# ------------------------------------------------------------------------------------------------------------ naming


@pytest.fixture
def finished(recipe):
    """A run with two checkpoints, as far as names go."""
    found = find_recipe(str(recipe))
    run_dir = Path(found.output_dir)
    for step in (2, 10):
        write_folder(
            run_dir / "checkpoints" / checkpoint_name(step),
            lambda folder: [
                (folder / "config.json").write_text("{}"),
                (folder / "recipe.yaml").write_text(found.to_yaml()),
            ],
        )
    (run_dir / "recipe.yaml").write_text(found.to_yaml())
    return run_dir


def test_a_model_has_many_names(finished, recipe):
    newest, second = finished / "checkpoints" / "checkpoint-10", finished / "checkpoints" / "checkpoint-2"
    assert find_model(str(second)) == second
    assert find_model(str(finished)) == newest
    assert find_model(str(recipe)) == newest
    assert find_model(f"{finished}@2") == second
    assert find_model(f"{recipe}@2") == second
    assert find_model("owner/model") == "owner/model", "a hub id"
    assert find_model("shipped:tiny_base") == shipped_root() / "tiny_base"
    (finished / "selection.json").write_text('{"selected": "checkpoint-2"}')
    assert find_model(str(finished)) == second, "what was selected goes before what is newest"


def test_a_step_without_a_checkpoint_is_refused(finished):
    with pytest.raises(UserError, match=r"run@7: no complete checkpoint .*run/checkpoints/checkpoint-7$"):
        find_model(f"{finished}@7")


@pytest.mark.parametrize("step", ["last", "²", "٣", "-2", "2@10"])
def test_a_step_is_a_number(finished, step):
    with pytest.raises(UserError, match=rf"run@{step}: '{step}' is not a step; expected a number, as in .*run@100$"):
        find_model(f"{finished}@{step}")


def test_an_incomplete_checkpoint_is_not_found(finished):
    (finished / "checkpoints" / "checkpoint-10" / "config.json").unlink()
    assert [path.name for path in run_checkpoints(finished)] == ["checkpoint-2"]
    (finished / "checkpoints" / "checkpoint-2" / "config.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint here; of checkpoint-2, checkpoint-10, files .* are missing"):
        run_checkpoints(finished)
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(UserError, match="no complete checkpoint here; run `idefics-sft train` first"):
        run_checkpoints(finished)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choice": 2}'])
def test_a_damaged_selection_is_refused(finished, content):
    (finished / "selection.json").write_text(content)
    with pytest.raises(UserError, match=r"selection.json: damaged; delete it and run `idefics-sft select .*run` again"):
        find_model(str(finished))


def test_a_selected_checkpoint_that_is_gone_is_refused(finished):
    (finished / "selection.json").write_text('{"selected": "checkpoint-3"}')
    with pytest.raises(UserError, match=r"no complete checkpoint .*checkpoint-3$"):
        find_model(str(finished))


def test_a_checkpoint_that_changed_is_refused(finished):
    file = finished / "checkpoints" / "checkpoint-10" / "config.json"
    file.write_text("[]")  # as long as before
    for name in (finished, f"{finished}@10"):
        with pytest.raises(UserError, match=r"checkpoint-10: config\.json changed since it was written"):
            find_model(str(name))


def test_a_folder_that_is_no_run_does_not_stand_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart").output_dir == load_recipe(recipe_path("quickstart")).output_dir


def test_a_model_leads_to_its_recipe(finished, recipe):
    expected = find_recipe(str(recipe))
    for name in (recipe, finished, f"{finished}@2", finished / "checkpoints" / "checkpoint-2"):
        assert recipe_of_model(str(name)) == expected
    assert recipe_of_model("owner/model") is None
    assert find_recipe(str(finished)) == expected, "a RUN is a recipe too"


def test_a_run_is_the_folder_that_was_given(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert find_recipe(str(copy)).output_dir == str(copy)
    assert recipe_of_model(f"{copy}@2").output_dir == str(copy)
    assert recipe_of_model(str(copy / "checkpoints" / "checkpoint-2")).output_dir == str(copy)
    assert find_recipe(str(copy), ("output_dir=else",)).output_dir == "else"


def test_a_recipe_that_is_wrong_says_what(recipe, refusal):
    recipe.write_text(recipe.read_text() + "sed: 1\n")
    assert "sed: unknown key; did you mean 'seed'?" in refusal("chat", recipe)


# -------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert status_of(command, "--help") == 0
    assert f"idefics-sft {command}" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_command_is_a_mistake(capsys):
    assert status_of("trian") == 2
    assert "trian" in capsys.readouterr().err


def test_quiet_shows_results_without_progress_and_may_stand_anywhere(recipe, capsys):
    for arguments in (("prepare", recipe, "--quiet"), ("-q", "prepare", recipe), ("prepare", recipe)):
        assert status_of(*arguments) == 0
        printed = capsys.readouterr().out
        assert "Prepared\n" in printed and ("preparing" in printed) is (arguments == ("prepare", recipe))


def test_debug_shows_the_traceback_wherever_it_stands():
    for arguments in (["--debug", "validate", "nothing"], ["validate", "nothing", "--debug"]):
        with pytest.raises(UserError, match="nothing: no such recipe"):
            main(arguments)


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_ctrl_c_is_one_line(recipe, monkeypatch, capsys):
    monkeypatch.setattr("sft.data.check_recipe.check_recipe", interrupt)
    assert status_of("validate", recipe) == 130
    assert capsys.readouterr().err == "idefics-sft: stopped\n"


def test_ctrl_c_is_one_line_while_modules_are_imported():
    code = (
        "import sys\nfrom sft.cli import start\n"
        "class Finder:\n    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\nstart()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=shipped_root())
    assert (ended.returncode, ended.stderr) == (130, "idefics-sft: stopped\n")


def test_the_shell_completes_recipes_keys_and_choices(recipe):
    (recipe.parent / "my_data").mkdir()

    def completed(words):
        values = {"_IDEFICS_SFT_COMPLETE": "complete_bash", "COMP_WORDS": f"idefics-sft {words}"}
        values["COMP_CWORD"] = str(len(words.split(" ")))
        code = "from sft.cli.main import main; main([])"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | values)
        return found.stdout.split()

    assert completed("train m") == ["my-data", "my_data/"]
    assert completed("train to") == ["toy.yaml"]
    assert completed("train my-data training.max_s") == ["training.max_steps="]
    assert completed("train my-data training.max_steps=") == []
    assert completed("train my-data model.mode=q") == ["model.mode=qlora"]
    assert completed("plan my-data --gpu t") == ["t4-16"]


def test_bash_completes_by_the_script_that_is_shown(tmp_path):
    command = tmp_path / "idefics-sft"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m sft.cli.main "$@"\n')
    command.chmod(0o755)
    script = """
        source <(idefics-sft --show-completion bash)
        set -- $(complete -p idefics-sft)          # complete -o default -F FUNCTION idefics-sft
        compopt() { printf '%s ' "$@"; }
        FUNCTION=$5
        press_tab() {                              # bash parts words at = too
            COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDS=(${1//=/ = })
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            $FUNCTION idefics-sft "${COMP_WORDS[COMP_CWORD]#=}"
            echo "${COMPREPLY[*]}"
        }
        press_tab "idefics-sft tra"
        press_tab "idefics-sft recipes show capt"
        press_tab "idefics-sft train quickstart training.max_s"
        press_tab "idefics-sft train quickstart training.max_steps="
        press_tab "idefics-sft train quickstart training.max_steps=1 model.mode="
        press_tab "idefics-sft train quickstart model.mode=lo"
    """
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert shell.stdout.split("\n") == [
        "train",
        "caption",
        "-o nospace training.max_steps=",
        "",
        "full lora qlora",
        "lora",
        "",
    ], shell.stderr


def test_help_starts_without_torch():
    code = (
        "import sys\nfrom sft.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=shipped_root())
    assert ended.returncode == 0, ended.stderr
    assert all(command in ended.stdout for command in COMMANDS)
