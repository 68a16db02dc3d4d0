"""VisDial 1.0: which of 100 answers goes on a dialogue about a photograph.

Needs the official files of https://visualdialog.org/data (CC BY 4.0):

    visdial_1.0_val.json    visdial_1.0_val_dense_annotations.json    VisualDialog_val2018/VisualDialog_val2018_*.jpg

Of each dialogue the round is asked whose 100 answers people judged by relevance. The score is NDCG by the official
code, which counts as many places as there are relevant answers. `NDCG (m4)` counts all 100, as HuggingFaceM4's code
does. That code also takes the round of the first dialogue for every one, so that answers and judgements do not belong
together; it is not repeated here, and the card's 47 to 49 % cannot be reached. `test` has no judgements in public.
Shots come from `train`, with COCO's images of 2014 in train2014 and val2014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sft.core.metric import Metric
from sft.core.sample import ImageRef
from sft.evaluation.metrics.ndcg import ndcg
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import RankedQuestions
from sft.evaluation.task import Answer, Typical


class VisDial(RankedQuestions):
    """NDCG on VisDial."""

    name = "visdial"
    metric = Metric(name="NDCG (official)")
    splits = ("val", "train")
    typical = Typical(items={"val": 2_064}, query=80, shot=130, options=100, option=3, tree=162, shots=(0, 4, 8))
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "base": Prompt(question="{image}{caption}. {text}Answer:", answer=" {answer}.", is_document=True),
        "chat": Prompt(question="{image}{caption}. {text}", answer="{answer}."),
    }

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the judged round of each dialogue of a split, in the order of its file."""
        file, judged = (folder / f"visdial_1.0_{split}{end}.json" for end in ("", "_dense_annotations"))
        with official_layout(judged):
            judgements = {record["image_id"]: record for record in read_json(judged)}
        data = read_json(file)["data"]
        with official_layout(file):
            return [
                _item(dialogue, judgements[dialogue["image_id"]], data, _image(folder, split, dialogue["image_id"]))
                for dialogue in data["dialogs"]
                if dialogue["image_id"] in judgements
            ]

    def query_ids(self, item: TaskItem) -> list[str]:
        """Return the name of the round, since official results have all rounds."""
        return [f"{item.id} round {item.data['round']}"]

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return the NDCG of an item by the official code."""
        return ndcg(_log_probs(answers[0]), item.data["relevance"])

    def figures(self, item: TaskItem, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the other NDCG, and where the answer that was given stands."""
        log_probs = _log_probs(answers[0])
        right = item.options.index(item.answers[0])
        place = 1 + sum(one > log_probs[right] for one in log_probs)
        recalls = {f"recall at {limit}": float(place <= limit) for limit in (1, 5, 10)}
        m4 = {"NDCG (m4)": ndcg(log_probs, item.data["relevance"], is_cut=False)}
        return m4 | {"mean reciprocal rank": 1 / place} | recalls


def _log_probs(answer: Answer) -> list[float]:
    return [score.log_prob if answer.is_finite else 0.0 for score in answer.scores]


def _item(dialogue: Mapping[str, Any], judgement: Mapping[str, Any], data: Mapping[str, Any], image: Path) -> TaskItem:
    rounds, asked = dialogue["dialog"], judgement["round_id"] - 1
    questions, answers = data["questions"], data["answers"]
    before = "".join(
        f"Question: {questions[one['question']]}? Answer: {answers[one['answer']]}. " for one in rounds[:asked]
    )
    options = [answers[number] for number in rounds[asked]["answer_options"]]
    return TaskItem(
        id=dialogue["image_id"],
        text=f"{before}Question: {questions[rounds[asked]['question']]}? ",
        options=tuple(options),
        answers=(options[rounds[asked]["gt_index"]],),
        images=(ImageRef(source=image),),
        cluster=f"image {dialogue['image_id']}",
        fields={"caption": dialogue["caption"]},
        data={"round": asked + 1, "relevance": judgement.get("gt_relevance", judgement.get("relevance"))},
    )


def _image(folder: Path, split: str, image_id: int) -> Path:
    if split != "train":
        return folder / f"VisualDialog_{split}2018" / f"VisualDialog_{split}2018_{image_id:012d}.jpg"
    train, val = (folder / part / f"COCO_{part}_{image_id:012d}.jpg" for part in ("train2014", "val2014"))
    return train if train.is_file() else val


TASK = VisDial
