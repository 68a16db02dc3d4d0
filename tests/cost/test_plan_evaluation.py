"""`plan --evaluation`: the work of tasks, by hand and against the sums of the model card's table."""

import json

import pytest
from conftest import status_of
from PIL import Image

from sft.cost.evaluation import plan_evaluation, work
from sft.evaluation.task import Typical
from sft.recipe import EvaluationConfig

SIZE = Typical(items={}, query=10, shot=20, options=100, option=2, tree=50)


@pytest.mark.parametrize(
    ("how", "settings", "tokens", "naive"),
    [
        # 5 items, 2 shots, images of 23: each 40 + 10 + 23 + 50, and 10 images of shots
        ("rank", {}, 5 * 123 + 10 * 23, 5 * 100 * (40 + 10 + 3 * 23 + 2)),
        # the 40 tokens of shots once in the one forward
        ("rank", {"shots": {"select": "groups"}}, 5 * 83 + 40 + 10 * 23, 5 * 100 * (40 + 10 + 3 * 23 + 2)),
        # nothing is shared; 3 beams of 2 tokens
        ("generate", {"num_beams": 3}, 5 * (40 + 10 + 3 * 23 + 6), 5 * (40 + 10 + 3 * 23 + 6)),
    ],
)
def test_work_is_counted_by_hand(how, settings, tokens, naive):
    found = work(how, SIZE, 5, 2, 23, EvaluationConfig(**settings))
    assert (found["queries"], found["tokens"], found["naive_tokens"]) == (5, tokens, naive)


def test_the_card_s_table_takes_a_thirtieth_of_the_naive_way():
    found = plan_evaluation("HuggingFaceM4/idefics-9b", (), (), (), None, 125e12)
    ranked = {row["task"]: row["tokens"] / 1e6 for row in found["tasks"] if row["tokens"] < row["naive_tokens"]}
    # Counted by hand with images of 23 tokens: 59,762 M naively; 301 M where options are ranked, 288 of it ImageNet.
    assert found["naive_tokens"] == pytest.approx(59_762e6, rel=0.05)
    assert sum(ranked.values()) == pytest.approx(301, rel=0.05) and ranked["imagenet_val"] == pytest.approx(
        288, rel=0.02
    )
    assert found["naive_tokens"] / found["tokens"] > 30
    assert found["naive_gpu_hours"] == pytest.approx(2_205, rel=0.05)  # at 125 TFLOP/s


def test_files_are_measured_and_parts_have_their_standard_error(tmp_path, capsys):
    for split in ("test", "train"):
        for n in range(6):
            file = tmp_path / split / ("positive", "negative")[n % 2] / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
    asked = ["plan", "HuggingFaceM4/idefics-9b", "--evaluation", "--task", f"rendered_sst2={tmp_path}", "--json"]
    asked += ["--task", "vqav2", "--shots", "0,4", "--max-questions", "4", "--price-per-hour", "2"]
    assert status_of(*asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["from"], row["items"]) for row in found["tasks"]] == [
        ("rendered_sst2_test", "files", 4), ("vqav2_val", "typical", 4),
    ]  # fmt: skip
    assert found["tasks"][1]["standard_error"] == 0.25 and found["cost"] == pytest.approx(2 * found["gpu_hours"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shots", "4"], "go with --evaluation"),
        (["--evaluation", "--shots", "four"], "--shots as in 0,4,8"),
        (["--evaluation", "--gpu-memory", "40"], "give --gpu, whose speed is known"),
        (["--evaluation", "--task", "exact_match"], "exact_match: plan knows no prompts that are typical of it"),
        (["--evaluation", "--task", "nothing"], "nothing: no such task"),
    ],
)
def test_what_plan_cannot_tell_is_one_line(refusal, more, message):
    assert message in refusal("plan", "HuggingFaceM4/idefics-9b", *more)
