"""lmms-eval asks our models, offline, by tasks that are written here; without the package it says how to get it."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import loaded_of
from PIL import Image

from sft.core.errors import UserError
from sft.evaluation.tasks import NamedTask, open_tasks
from sft.recipe import EvaluationConfig

is_there = find_spec("lmms_eval") is not None
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_visual: !function utils.{shown}
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.5}}]
"""
WRITTEN = 'output_type: generate_until\ngeneration_kwargs: {until: ["\\n\\n"], max_new_tokens: 4, temperature: 0.0}\n'
CHOICE = 'output_type: multiple_choice\ndoc_to_choice: ["red", "blue"]\n'


def write_tasks(folder):
    rows = [{"question": f"{n}: what colour?", "answer": "red", "image": str(folder / "a.png")} for n in range(3)]
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, shown, metric, more in (
        ("toy_words", "images", "exact_match", WRITTEN),
        ("toy_choice", "images", "acc", CHOICE),
        ("toy_film", "film", "exact_match", WRITTEN),
    ):
        text = TASK.format(name=name, rows=folder / "rows.json", shown=shown, metric=metric)
        (folder / f"{name}.yaml").write_text(text + more)
    (folder / "utils.py").write_text(
        "from PIL import Image\ndef images(doc): return [Image.open(doc['image'])]\ndef film(doc): return ['/a.mp4']\n"
    )


@pytest.mark.skipif(is_there, reason="lmms-eval is installed")
def test_without_lmms_eval_one_line_says_how_to_get_it():
    with pytest.raises(UserError, match="pip install lmms-eval"):
        open_tasks([NamedTask("lmms_eval", "mme")], EvaluationConfig(), Path())


@pytest.mark.skipif(not is_there, reason="needs lmms-eval")
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_lmms_eval_give_a_score_for_each_item(tmp_path, model, template):
    write_tasks(tmp_path)
    named = [NamedTask("lmms_eval", name) for name in ("toy_words", "toy_choice", "toy_film")]
    words, choice, film = open_tasks(named, EvaluationConfig(benchmark=str(tmp_path)), tmp_path)
    loaded = loaded_of(model, template)
    for task in (words, choice):
        outcomes = task.measure(tmp_path, loaded, lambda done, total: None)
        assert [outcome.item for outcome in outcomes] == [0, 1, 2] and task.metric.is_share
        assert len({outcome.cluster for outcome in outcomes}) == 1 and outcomes[0].details["answers"] == ["red"]
        assert task.benchmark == f"lmms_{task._task}" and "1.5" in task.protocol(template)["metadata"]
    with pytest.raises(UserError, match=r"item 0 shows '/a.mp4', a video"):
        film.measure(tmp_path, loaded, lambda done, total: None)


@pytest.mark.skipif(not is_there, reason="needs lmms-eval")
@pytest.mark.filterwarnings("ignore")
def test_the_likeliest_choice_is_what_lmms_eval_takes(tmp_path, model, template):
    from sft.evaluation.bridges.lmms_eval import IdeficsSFT

    class Request:
        def __init__(self, end):
            self.args = ("what?", end, lambda doc: [], 0, "toy", "test")

    asked = IdeficsSFT(loaded=loaded_of(model, template))
    asked.task_dict = {"toy": {"test": [{}]}}
    said = asked._written([Request("")], 3)[0]
    (mine, is_mine), (other, _) = (one.text for one in asked.loglikelihood([Request(said), Request("zebra crossing")]))
    assert is_mine and 0 < mine < other
