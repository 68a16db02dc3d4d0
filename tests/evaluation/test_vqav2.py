"""VQA accuracy in its variants, and VQAv2: its files, its prompts, and the commands that take it as any other task."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
from conftest import loaded_of, status_of
from helpers.training import printed
from PIL import Image

from sft.core.errors import UserError
from sft.evaluation.metrics.vqa_accuracy import normalise, vqa_accuracy
from sft.evaluation.questions import most_common
from sft.evaluation.run_tasks import ask
from sft.evaluation.task import Answer
from sft.evaluation.tasks import NamedTask, named_tasks, open_tasks
from sft.evaluation.tasks.vqav2 import VQAv2
from sft.recipe import EvaluationConfig

ANSWERS = ["net"] * 7 + ["netting", "mesh", "Net!"]


@pytest.mark.parametrize(
    ("variant", "prediction", "accuracy"),
    [
        ("m4", "The net.", 1),
        ("m4", "mesh", 0.3),  # 3 of 10 leave one out and see 0; the 9 others see 1 of 3
        ("official", "mesh", 0.3),
        ("min_n_over_3", "mesh", 1 / 3),
        ("m4", "tennis", 0),
    ],
)
def test_an_answer_is_right_as_far_as_people_gave_it(variant, prediction, accuracy):
    assert vqa_accuracy(prediction, ANSWERS, variant=variant) == pytest.approx(accuracy)


def test_the_official_variant_normalises_nothing_where_all_agree():
    assert vqa_accuracy("a dog", ["a dog"] * 10, variant="official") == 1
    assert vqa_accuracy("dog", ["a dog"] * 10, variant="official") == 0
    assert vqa_accuracy("dog", ["a dog"] * 10, variant="m4") == 1


def test_equal_records_are_left_out_at_once_by_two_variants():
    marks = ["yes"] * 10
    assert vqa_accuracy("dog", ["dog"] * 4 + ["cat"] * 6, variant="open_flamingo", marks=marks) == pytest.approx(0.6)
    assert vqa_accuracy("dog", ["dog"] * 4 + ["cat"] * 6, variant="m4", marks=marks) == 1


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [("dont", "don't"), ("couldnt've", "couldn't've"), ("the a an", ""), ("Two 10,000", "2 10000"), ("1.5.", "1.5")],
)
def test_the_normaliser_is_the_official_one(answer, normalised):
    assert normalise(answer) == normalised


@pytest.mark.skipif("IDEFICS_SFT_SAMPLES" not in os.environ, reason="IDEFICS_SFT_SAMPLES names no real samples")
def test_reference_values_of_other_people_s_code_hold():
    folder = Path(os.environ["IDEFICS_SFT_SAMPLES"]) / "benchmarks"

    def read(name):
        return json.loads((folder / name).read_text())

    wrong = [line for line in read("vqa_normaliser/expected.json") if normalise(line["answer"]) != line["official"]]
    assert wrong == []
    said = {line["image"]: line["answer"] for line in read("vizwiz/predictions.json")}
    expected, questions = read("vizwiz/expected.json"), read("vizwiz/val.json")
    names = {"official": "official", "open_flamingo": "normalised_dict", "m4": "normalised_index"}
    for variant, name in (names | {"min_n_over_3": "min_n_over_3"}).items():
        for question, scores in zip(questions, expected["per_question"], strict=True):
            answers = [one["answer"] for one in question["answers"]]
            marks = [one["answer_confidence"] for one in question["answers"]]
            found = vqa_accuracy(said[question["image"]], answers, variant=variant, marks=marks)
            assert found == pytest.approx(scores[name]), question
    real = VQAv2.__new__(VQAv2).read(folder / "vqav2", "train")
    assert [question.id for question in real] == [458752000, 458752001, 458752002]
    assert [vqa_accuracy(most_common(question.answers), question.answers) for question in real] == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------- the task


def write_split(folder, part="val2014", questions=6, annotated=True, first=100):
    """The official layout: two questions about each image, annotations in another order."""
    images = part.replace("-dev", "")
    (folder / images).mkdir(parents=True, exist_ok=True)
    asked, answered = [], []
    for number in range(questions):
        image, question = first + number // 2, 1000 + number
        Image.new("RGB", (8, 8), ("red", "green", "blue")[number // 2 % 3]).save(
            folder / images / f"COCO_{images}_{image:012d}.jpg"
        )
        asked.append({"image_id": image, "question": f" What is {number}? ", "question_id": question})
        people = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(ANSWERS, 1)]
        answered.append({"question_id": question, "image_id": image, "answer_type": "other", "answers": people})
    files = {"OpenEnded_mscoco_{}_questions": ("questions", asked)}
    if annotated:
        files["mscoco_{}_annotations"] = ("annotations", answered[::-1])
    for name, (key, records) in files.items():
        (folder / f"v2_{name.format(part)}.json").write_text(json.dumps({key: records}))
    return folder


def opened(folder, store, **settings):
    (task,) = open_tasks([NamedTask("vqav2", str(folder))], EvaluationConfig(**settings), store)
    return task


def test_questions_are_joined_with_their_annotations_by_number(tmp_path):
    task = opened(write_split(tmp_path), tmp_path)
    first = task.items[0]
    assert (first.id, first.text, first.answers[:1], first.category) == (
        1000, "What is 0?", ("net",), "other",
    )  # fmt: skip
    assert (task.benchmark, task.metric.name, task.how) == ("vqav2_val", "VQA accuracy (m4)", "generate")
    assert [item.cluster for item in task.items] == [f"image {100 + n // 2}" for n in range(6)]
    assert [item.id for item in opened(tmp_path, tmp_path, max_questions=3).items] in (
        [1000, 1001],
        [1002, 1003],
        [1004, 1005],
    )


def test_what_is_asked_and_its_score_depend_on_the_files_alone(tmp_path, model, template):
    task = opened(write_split(tmp_path), tmp_path)
    loaded = loaded_of(model, template)
    result = task.result(ask(loaded, [task])[task], task.protocol_hash(template), "")
    for item, outcome in zip(task.items, result.outcomes, strict=True):
        assert outcome.score == vqa_accuracy(outcome.details["prediction"], item.answers)
    assert task.protocol_hash(template) == opened(tmp_path, tmp_path).protocol_hash(template)
    others = [
        task.without_images(),
        opened(tmp_path, tmp_path, max_questions=3),
        opened(write_split(tmp_path, "train2014"), tmp_path, split="train"),
        opened(tmp_path, tmp_path, shots=1),
    ]
    hashes = {task.protocol_hash(template), *(other.protocol_hash(template) for other in others)}
    assert len(hashes) == 5


def test_shots_are_answered_questions_about_other_images_the_same_every_time(tmp_path):
    write_split(tmp_path, "train2014", questions=12)
    task = opened(write_split(tmp_path), tmp_path, shots=3)
    for item in task.items:
        (query,) = task.queries(item)
        roles = [message.role for message in query.sample.messages]
        assert roles == ["user", "assistant"] * 3 + ["user"]
        assert {message.content for message in query.sample.messages if message.role == "assistant"} == {("net",)}
        assert item.cluster not in {shot.cluster for shot in task.shots_drawn.of(item)}
    again = opened(tmp_path, tmp_path, shots={"number": 5})
    assert again.answered_shots(task.items[0])[-3:] == task.answered_shots(task.items[0])  # draws are nested
    with pytest.raises(UserError, match="vqav2_val: shots: 11 are asked for, of 12 questions"):
        opened(tmp_path, tmp_path, shots=11)


def test_groups_of_questions_have_the_same_shots(tmp_path):
    write_split(tmp_path, "train2014", questions=40, first=500)
    task = opened(write_split(tmp_path, questions=30), tmp_path, shots={"number": 2, "select": "groups", "groups": 3})
    assert len({tuple(shot.id for shot, _ in task.answered_shots(item)) for item in task.items}) == 3


def test_the_card_s_base_prompt_is_a_document_that_goes_on(tmp_path, template):
    write_split(tmp_path, "train2014", questions=12)
    task = opened(write_split(tmp_path), tmp_path, prompt="base", shots=1)
    (query,) = task.queries(task.items[0])
    shot = task.shots_drawn.of(task.items[0])[0]
    image = "<fake_token_around_image><image><fake_token_around_image>"
    head = "<s>Instruction: provide an answer to the question. Use the image to answer.\n"
    text = f"{head}Image:{image}Question: {shot.text} Answer: net\nImage:{image}Question: What is 0? Answer:"
    assert template.text(query.sample.messages).removesuffix("</s>") == text
    prompt = template.encode_prompt(query.sample.messages)
    answered, (start, end) = template.encode_answer(query.sample.messages, " net")
    assert (start, end) == (len(prompt.input_ids), len(answered.input_ids))
    assert template.tokenizer.decode(answered.input_ids[start:end]).strip() == "net"
    assert task.cut("net Question: Who") == "net" and task.forbidden() == ("\n", "\n\n")


def test_without_shots_it_shows_two_examples_without_their_images(tmp_path):
    write_split(tmp_path, "train2014", questions=12)
    task = opened(write_split(tmp_path), tmp_path, prompt="base")
    (query,) = task.queries(task.items[0])
    (message,) = query.sample.messages
    assert message.role == "document" and len(query.sample.images) == 1
    assert message.content[0].count("Image:Question: What is") == 2
    with pytest.raises(UserError, match="vqav2: there is no prompt 'instruct'; expected chat or base"):
        opened(tmp_path, tmp_path, prompt="instruct")


def test_what_is_wrong_with_the_files_is_one_line(tmp_path):
    for settings, message in (
        ({}, r"v2_OpenEnded_mscoco_val2014_questions\.json: No such file"),
        ({"split": "dev"}, "split dev: expected val, train, test-dev or test"),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path, tmp_path, **settings)
    with pytest.raises(UserError, match="nowhere: not there; give --benchmark PATH of vqav2"):
        opened(tmp_path / "nowhere", tmp_path)
    file = write_split(tmp_path) / "v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"annotations": content["annotations"][1:]}))
    with pytest.raises(UserError, match="question 1005 has no answers"):
        opened(tmp_path, tmp_path)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"annotations\.json: not of the official layout"):
        opened(tmp_path, tmp_path)
    write_split(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000101.jpg").unlink()
    with pytest.raises(UserError, match=r"COCO_val2014_000000000101\.jpg: no such image; 1 of 3 are missing"):
        opened(tmp_path, tmp_path)


# ------------------------------------------------------------------------------------------------------ the commands


def test_evaluate_select_and_report_take_it(copied, tmp_path, capsys):
    coco = write_split(tmp_path / "coco")
    summary, _ = printed(capsys, "evaluate", copied, "--task", "vqav2", "--data", coco)
    assert (summary["benchmark"], summary["task"], summary["questions"]) == ("vqav2_val", "vqav2", 6)
    assert summary.keys() >= {"score", "standard_error", "interval", "blind", "protocol_hash", "metric", "categories"}
    assert status_of("evaluate", copied, "--task", "vqav2", "--data", coco) == 0
    assert "vqav2_val, VQA accuracy (m4)" in capsys.readouterr().out

    selection, _ = printed(capsys, "select", copied, "--by", "vqav2", "--data", coco)
    assert (selection["by"], selection["benchmark"], selection["questions"]) == ("vqav2", "vqav2_val", 6)
    (file,) = (copied / "evaluations" / "vqav2_val").glob("*/checkpoint-1.jsonl")
    line = json.loads(file.read_text().splitlines()[0])
    assert line["figures"]["VQA accuracy (m4)"] == line["score"] and len(line["figures"]) == 4
    assert isinstance(line["score"], float) and line.keys() >= {"question", "cluster", "answers", "prediction"}
    assert status_of("report", copied) == 0
    assert "of vqav2_val" in (copied / "report.html").read_text()

    test = write_split(tmp_path / "test", "test2015", annotated=False)
    assert status_of("evaluate", copied, "--task", "vqav2", "--data", test, "--split", "test") == 2
    assert "a test split, without answers" in capsys.readouterr().err


def test_several_tasks_are_a_line_each_and_choose_together(copied, tmp_path, capsys):
    coco = write_split(tmp_path / "coco")
    (tmp_path / "own.jsonl").write_text(
        '{"question": "Is it?", "answer": "no"}\n{"question": "Or?", "answer": "yes"}\n'
    )
    tasks = ("--task", f"vqav2={coco}", "--task", f"exact_match={tmp_path / 'own.jsonl'}")
    summary, _ = printed(capsys, "evaluate", copied, *tasks)
    assert summary["by_task"].keys() == {"vqav2_val", "own"} and summary["benchmark"] == "vqav2_val"
    assert status_of("evaluate", copied, *tasks) == 0
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("vqav2_val ", "own ")) for line in shown) == 2
    by = [part.replace("--task", "--by") for part in tasks]
    selection, _ = printed(capsys, "select", copied, *by)
    assert selection["by"] == "vqav2+exact_match" and selection["benchmarks"].keys() == {"vqav2_val", "own"}
    evaluated = {file.stem for file in (copied / "evaluations" / "own").glob("*/checkpoint-*.json")}
    assert evaluated == {"checkpoint-1", "checkpoint-2"}


def test_a_dotted_name_loads_a_task_of_the_user_s_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_tools").mkdir()
    (tmp_path / "my_tools" / "own_vqa.py").write_text(
        "from sft.evaluation.tasks.vqav2 import VQAv2\n\n\nclass Own(VQAv2):\n    name = 'own_vqa'\n\n\nTASK = Own\n"
    )
    settings = EvaluationConfig(by=f"my_tools.own_vqa={write_split(tmp_path / 'coco')}")
    (task,) = open_tasks(named_tasks(settings), settings, tmp_path)
    assert task.name == "own_vqa" and len(task.items) == 6
    with pytest.raises(UserError, match=r"my_tools.other.: no such module can be imported"):
        named_tasks(EvaluationConfig(by="my_tools.other"))


OWN = """
from sft.evaluation.tasks.vqav2 import VQAv2

class Own(VQAv2):
    {}

TASK = {}
"""


@pytest.mark.parametrize(
    ("body", "task", "expected"),
    [
        ("pass", "3", "TASK is 3; expected a class"),
        ("pass", "Own.__mro__[3]", "has no score, name, metric"),
        ("def __init__(self, source): pass", "Own", "Own has no benchmark; see "),
        ("how = 'ask'", "Own", "how is 'ask'; expected rank or generate or loss"),
        ("max_new_tokens = 0", "Own", "max_new_tokens is 0; expected 1 or more"),
        (
            "check_images = lambda self, _=None: self.__dict__.update(items=[])",
            "Own",
            "has no items; expected one at least",
        ),
        ("check_images = lambda self, _=None: self.__dict__.update(items=[3])", "Own", "int has no id, cluster, "),
    ],
)
def test_what_a_task_lacks_is_one_line(tmp_path, monkeypatch, body, task, expected):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_tasks").mkdir()
    (tmp_path / "own_tasks" / "own.py").write_text(OWN.format(body, task))
    for module in ("own_tasks", "own_tasks.own"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    settings = EvaluationConfig(by=f"own_tasks.own={write_split(tmp_path / 'coco')}")
    with pytest.raises(UserError, match=f"task 'own_tasks.own': .*{expected}"):
        open_tasks(named_tasks(settings), settings, tmp_path)


@pytest.mark.parametrize("score", ["high", None, math.nan, 1.5])
def test_a_score_that_is_no_number_of_the_metric_is_refused(tmp_path, monkeypatch, score):
    task = opened(write_split(tmp_path), tmp_path)
    monkeypatch.setattr(task, "score", lambda item, answers: score)
    with pytest.raises(UserError, match=f"vqav2_val: item 1000 scores {score!r}; expected a number from 0 to 1"):
        task.result([[Answer(text="yes")] for _ in task.items], "0", "")


def test_tasks_are_listed_and_shown(capsys):
    assert status_of("tasks", "list", "--json") == 0
    listed = {task["name"]: task for task in json.loads(capsys.readouterr().out)}
    assert listed.keys() >= {"exact_match", "loss", "mmbench", "vqav2"}
    splits = ["val", "train", "test-dev", "test"]
    assert listed["vqav2"] == {
        "name": "vqav2", "metric": "VQA accuracy (m4)", "how": "generate", "splits": splits,
    }  # fmt: skip
    assert status_of("tasks", "list") == status_of("tasks", "show", "vqav2") == 0
    assert "v2_mscoco_val2014_annotations.json" in capsys.readouterr().out
    assert status_of("tasks", "show", "vqa2") == 2
    assert "vqa2: no such task; did you mean 'vqav2'?" in capsys.readouterr().err
