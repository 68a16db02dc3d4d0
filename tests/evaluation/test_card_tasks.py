"""The benchmarks of the model card: their raw files, prompts and metrics, and values of other people's code."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import loaded_of
from PIL import Image

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.evaluation.metrics.cider import CiderD, tokenize
from sft.evaluation.metrics.ndcg import ndcg
from sft.evaluation.metrics.roc_auc import roc_auc_values
from sft.evaluation.run_tasks import ask
from sft.evaluation.task import Answer, AnswerScore
from sft.evaluation.tasks import NamedTask, open_tasks, task_type
from sft.recipe import EvaluationConfig

SAMPLES = os.environ.get("IDEFICS_SFT_SAMPLES")


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        file.write_text(content)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        file.write_text(json.dumps(content))


def paint(file, colour="red"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file)


def write_okvqa(folder):
    for part, first in (("val2014", 1), ("train2014", 101)):
        numbers = range(first, first + 4)
        asked = [{"image_id": n, "question": f"What is {n}?", "question_id": 10 * n} for n in numbers]
        people = [
            {"answer": "dog", "raw_answer": "dogs", "answer_confidence": "yes", "answer_id": k} for k in range(10)
        ]
        answered = [{"question_id": 10 * n, "image_id": n, "answers": people} for n in numbers]
        put(folder / f"OpenEnded_mscoco_{part}_questions.json", {"questions": asked})
        put(folder / f"mscoco_{part}_annotations.json", {"annotations": answered[::-1]})
        for n in numbers:
            paint(folder / part / f"COCO_{part}_{n:012d}.jpg")


def write_textvqa(folder):
    for split in ("val", "train"):
        data = [
            {"question": " what brand? ", "image_id": f"{split}{n}", "answers": ["acme"] * 10, "question_id": n}
            for n in range(4)
        ]
        put(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": data})
        for n in range(4):
            paint(folder / "train_images" / f"{split}{n}.jpg")


def write_vizwiz(folder):
    for split in ("val", "train"):
        people = [{"answer": a, "answer_confidence": "yes"} for a in ["unanswerable"] * 6 + ["soup"] * 4]
        records = [
            {"image": f"VizWiz_{split}_{n:08d}.jpg", "question": "What is this? ", "answers": people,
             "answer_type": "other", "answerable": 1}
            for n in range(4)
        ]  # fmt: skip
        put(folder / "Annotations" / f"{split}.json", records)
        for record in records:
            paint(folder / split / record["image"])


def write_hateful_memes(folder):
    for split, first in (("test_seen", 1000), ("train", 2000)):
        records = [
            {"id": first + n, "img": f"img/{first + n:05d}.png", "label": n % 2, "text": f"words {n}"} for n in range(6)
        ]
        put(folder / f"{split}.jsonl", records)
        for record in records:
            paint(folder / record["img"])


def write_rendered_sst2(folder):
    for split in ("test", "train"):
        for label in ("positive", "negative"):
            for n in range(3):
                paint(folder / split / label / f"{split}{n}.png")


def write_scienceqa(folder):
    def problem(n, image):
        return {
            "question": "Which is\n\nbigger?", "choices": ["ant", "dog"], "answer": n % 2, "hint": "Look.",
            "image": image, "subject": "natural science", "solution": "Dogs are.", "lecture": "",
        }  # fmt: skip

    problems = {str(n): problem(n, None if n == 3 else "image.png") for n in range(8)}
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"test": ["0", "1", "2", "3"], "val": [], "train": ["4", "5", "6", "7"]})
    for n in range(8):
        paint(folder / ("test" if n < 4 else "train") / str(n) / "image.png")


def write_winoground(folder):
    records = [
        {"id": n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "caption_0": "a dog on a cat",
         "caption_1": "a cat on a dog", "collapsed_tag": "Object"}
        for n in range(3)
    ]  # fmt: skip
    put(folder / "data" / "examples.jsonl", records)
    for n in range(3):
        paint(folder / "data" / "images" / f"ex_{n}_img_0.png")
        paint(folder / "data" / "images" / f"ex_{n}_img_1.png", "blue")


def write_imagenet(folder):
    put(folder / "LOC_synset_mapping.txt", "n02 dog, hound\nn01 tench, Tinca tinca\nn03 missile\n")
    rows = "ImageId,PredictionString\nval_1,n02 1 2 3 4\nval_2,n01 1 2 3 4\n"
    put(folder / "LOC_val_solution.csv", rows)
    for name in ("val_1", "val_2"):
        paint(folder / "val" / f"{name}.JPEG")
    for wnid in ("n01", "n02", "n03"):
        for n in range(7):
            paint(folder / "train" / wnid / f"{wnid}_{n}.JPEG")


def write_fairface(folder):
    for split in ("val", "train"):
        rows = ["file,age,gender,race,service_test"]
        for n, (age, gender, race) in enumerate(
            [("9-Mar", "Female", "Latino_Hispanic"), ("more than 70", "Male", "Black"), ("20-29", "Male", "White")]
        ):
            rows.append(f"{split}/{n}.jpg,{age},{gender},{race},TRUE")
            paint(folder / split / f"{n}.jpg")
        put(folder / f"fairface_label_{split}.csv", "\n".join(rows) + "\n")


def write_visdial(folder):
    answers = [f"answer {n}" for n in range(100)]
    for split in ("val", "train"):
        dialogs, judged = [], []
        for n in range(3):
            asked = [{"question": k, "answer": k, "answer_options": [*range(100)], "gt_index": k} for k in range(2)]
            dialogs.append({"image_id": 7 + n, "caption": "a cat", "dialog": asked})
            judged.append({"image_id": 7 + n, "round_id": 2, "gt_relevance": [0.0, 1.0] + [0.0] * 98})
            paint(folder / "VisualDialog_val2018" / f"VisualDialog_val2018_{7 + n:012d}.jpg")
            paint(folder / "train2014" / f"COCO_train2014_{7 + n:012d}.jpg")
        data = {"questions": ["is it big", "is it red"], "answers": answers, "dialogs": dialogs}
        put(folder / f"visdial_1.0_{split}.json", {"data": data})
        put(folder / f"visdial_1.0_{split}_dense_annotations.json", judged[::-1])


CAPTIONS = ["A dog runs.", "a dog (brown) runs past", "Two dogs' toys"]


def write_karpathy(folder, name):
    images = [
        {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": [{"raw": text} for text in CAPTIONS]}
        | ({"filepath": "val2014", "cocoid": 50 + n} if name == "coco" else {})
        for n, split in enumerate(["test", "test", "train", "restval", "train", "val"])
    ]
    put(folder / f"dataset_{name}.json", {"images": images})
    for n in range(6):
        paint(folder / ("val2014" if name == "coco" else "flickr30k-images") / f"{n}.jpg")


def write_coco_captions(folder):
    write_karpathy(folder, "coco")


def write_flickr30k(folder):
    write_karpathy(folder, "flickr30k")


def write_nocaps(folder):
    write_karpathy(folder, "coco")
    images = [{"id": n, "file_name": f"x{n}.jpg", "domain": ("near-domain", "out-domain")[n % 2]} for n in range(4)]
    captions = [{"image_id": n % 4, "id": n, "caption": CAPTIONS[n % 3]} for n in range(12)]
    put(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    for n in range(4):
        paint(folder / "val" / f"x{n}.jpg")


def write_textcaps(folder):
    for split in ("val", "train"):
        rows = [
            {"image_id": f"{split}{n}", "caption_str": text, "reference_strs": CAPTIONS}
            for text in CAPTIONS
            for n in range(3)
        ]
        put(folder / f"TextCaps_0.1_{split}.json", {"data": rows})
        for n in range(3):
            paint(folder / "train_images" / f"{split}{n}.jpg")


WRITERS = {
    "coco_captions": write_coco_captions,
    "flickr30k": write_flickr30k,
    "nocaps": write_nocaps,
    "textcaps": write_textcaps,
    "okvqa": write_okvqa,
    "textvqa": write_textvqa,
    "vizwiz": write_vizwiz,
    "hateful_memes": write_hateful_memes,
    "rendered_sst2": write_rendered_sst2,
    "scienceqa": write_scienceqa,
    "winoground": write_winoground,
    "imagenet": write_imagenet,
    "fairface": write_fairface,
    "visdial": write_visdial,
}


def opened(name, folder, **settings):
    return open_tasks([NamedTask(name, str(folder))], EvaluationConfig(**settings), folder)


def text_of(task, template, number=0):
    (query, *_) = task.queries(task.items[number])
    text = template.text(query.sample.messages, add_generation_prompt=query.sample.messages[-1].role != "document")
    return text.removesuffix("</s>").replace(
        "<fake_token_around_image><image><fake_token_around_image>", "<IMG>"
    ), query


PROMPTS = [
    ("okvqa", "chat", "<s>User:<IMG>What is 1?\nAnswer the question using a single word or phrase.<end_of_utterance>\n"
     "Assistant:", ()),
    ("coco_captions", "instruct", "<s>User:<IMG>Describe the image briefly.<end_of_utterance>\nAssistant:", ()),
    ("textcaps", "base", "<s>Image:Caption: A dog runs.\nImage:Caption: A dog runs.\nImage:<IMG>Caption:", ()),
    ("vizwiz", "base", "<s>Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n"
     "Image:Question: What is this? Answer: unanswerable\nImage:Question: What is this? Answer: unanswerable\n"
     "Image:<IMG>Question: What is this? Answer:", ()),
    ("hateful_memes", "base", "<s>It's a conversation between a human, the user, and an intelligent visual AI, Bot. "
     "The user sends memes with text written on them, and Bot has to say whether the meme is hateful or not.<IMG>is an "
     'image with written "words 0" on it. Is it hateful? Answer:', (" yes", " no")),
    ("hateful_memes", "instruct", "<s>The user sends memes with text written on them, and the assistant has to say "
     'whether the meme is hateful or not.\n\nUser:<IMG>is an image with written "words 0" on it. Is it hateful?'
     "<end_of_utterance>\nAssistant:", ("yes.", "no.")),
    ("rendered_sst2", "base", "<s>Instruction: A movie review is written on an image. Say if it is positive or "
     "negative.\nImage:<IMG>Sentiment:", (" negative.", " positive.")),
    ("scienceqa", "base", "<s><IMG>Context: Look.\nQuestion: Which is\nbigger?\nPossible answers:\nA: ant\nB: dog\n"
     "Answer: The best answer is", (" A.", " B.", " C.", " D.", " E.")),
    ("winoground", "base", "<s><IMG>Description of the image:", (" a dog on a cat", " a cat on a dog")),
    ("imagenet", "instruct", "<s>User:<IMG>What is represented in this image?<end_of_utterance>\nAssistant:",
     ("This is a photo of a tench.", "This is a photo of a dog.", "This is a photo of a missile.")),
    ("fairface", "base", "<s><IMG>a photo of a", (" female person.", " male person.")),
    ("visdial", "base", "<s><IMG>a cat. Question: is it big? Answer: answer 0. Question: is it red? Answer:",
     tuple(f" answer {n}." for n in range(100))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "style", "text", "options"), PROMPTS, ids=lambda value: str(value)[:14])
def test_the_words_around_a_question_are_the_card_s(tmp_path, template, name, style, text, options):
    WRITERS[name](tmp_path)
    found, query = text_of(opened(name, tmp_path, prompt=style)[0], template)
    assert found == text and query.options == options


@pytest.mark.parametrize("name", WRITERS)
def test_every_task_is_asked_with_shots_and_scored(tmp_path, model, template, name):
    WRITERS[name](tmp_path)
    tasks = opened(name, tmp_path, shots=0 if name == "winoground" else 2)
    answers = ask(loaded_of(model, template), tasks)
    for task in tasks:
        result = task.result(answers[task], task.protocol_hash(template), "")
        summary = json.loads(json.dumps(task.summary(result)))
        assert summary["questions"] == len(task.items) and summary["score"] is not None
        assert all(0 <= value <= (1 if task.metric.is_share else 10) for value in summary.get("figures", {}).values())
        for item in task.items:
            shots = [shot for shot, _ in task.answered_shots(item)]
            assert len(shots) == task.shots and item.cluster not in {shot.cluster for shot in shots}


@pytest.mark.parametrize("name", WRITERS)
def test_missing_files_and_other_layouts_are_one_line(tmp_path, name):
    with pytest.raises(UserError) as raised:
        opened(name, tmp_path)
    assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)
    WRITERS[name](tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".jsonl", ".csv", ".txt")]
    for file in files:
        file.write_text("[3]\n")
    if files:
        with pytest.raises(UserError, match=f"^{tmp_path}.*(not of the official layout|no images)"):
            opened(name, tmp_path)


def test_labels_that_a_spreadsheet_made_dates_of_are_mended(tmp_path):
    write_fairface(tmp_path)
    _, race, age = opened("fairface", tmp_path)
    assert [item.answers[0] for item in age.items][:2] == ["between 3 and 9 years old", "more than 70 years old"]
    assert race.items[0].answers == ("latino or hispanic",) and race.items[0].category == "Female, Latino_Hispanic"


def test_the_area_under_the_curve_is_a_mean_of_its_items_values():
    values = roc_auc_values([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    assert values.mean() == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert roc_auc_values([1, 1, 1], [True, False, False]).mean() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="items of both classes"):
        roc_auc_values([0.5], [True])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("It isn't a dog's (big) day...", "it is n't a dog 's -lrb- big -rrb- day"),
        ("A 3rd-floor U.S. flag; $5.00, 50% off", "a 3rd-floor u.s. flag $ 5.00 50 % off"),
        ("mid-air black/white cat, at 5:30 p.m.", "mid-air black/white cat at 5:30 p.m."),
        ("gonna\u2028go", "gon na go"),
        ("", ""),
    ],
)
def test_captions_are_cut_into_words_as_by_the_penn_treebank_s_tokenizer(caption, words):
    assert tokenize(caption) == words.split()


def test_words_that_all_images_have_count_nothing():
    cider = CiderD([["a dog"], ["a cat"]])
    assert cider.score("a dog", ["a dog"]) == pytest.approx(10 * 2 / 4)  # one word and one pair of four sizes
    assert cider.score("a", ["a dog"]) == 0 == cider.score("", ["a dog"])


def test_gain_is_counted_where_the_relevant_could_stand():
    assert ndcg([3, 2, 1], [0, 1, 0]) == 0  # one relevant answer, and it is not the first
    assert ndcg([3, 2, 1], [0, 1, 0], is_cut=False) == pytest.approx(1 / np.log2(3))
    assert ndcg([3, 2, 1], [0, 0, 0]) == 0


def test_the_names_of_classes_come_in_the_order_of_their_numbers(tmp_path):
    write_imagenet(tmp_path)
    put(tmp_path / "imagenet-simple-labels.json", ["tench", "dog", "dog"])
    (task,) = opened("imagenet", tmp_path)
    assert task.items[0].options == ("tench", "dog", "dog") and task.items[0].answers == ("dog",)
    assert len(task.read(tmp_path, "train")) == 15
    put(tmp_path / "imagenet-simple-labels.json", ["tench"])
    with pytest.raises(UserError, match="expected a list of 3 names"):
        opened("imagenet", tmp_path)


# ---------------------------------------------------------------------------------------- values of other people's code

needs_samples = pytest.mark.skipif(SAMPLES is None, reason="IDEFICS_SFT_SAMPLES names no real samples")


def sample_items(name, folder, split):
    """The items of real files whose images are not at hand."""
    task = task_type(name)
    return task, task.read(task.__new__(task), folder, split)


def scored(name, items, log_probs, **details):
    """The result of a task whose model finds these likelihoods."""
    task = task_type(name)
    asked = task.__new__(task)
    asked.items, asked.benchmark, asked.how = items, name, "rank"
    asked.style = next(iter(task.prompts))
    vars(asked).update(details)
    answers = [[Answer(scores=tuple(AnswerScore(p, 1) for p in each)) for each in own] for own in log_probs]
    return asked, asked.result(answers, "", "")


@needs_samples
def test_hateful_memes_has_both_areas():
    folder = Path(SAMPLES) / "benchmarks" / "hateful_memes"
    _, items = sample_items("hateful_memes", folder, "dev_seen")
    expected, yes = (json.loads((folder / f"{name}.json").read_text()) for name in ("expected", "p_yes"))
    chances = [[[np.log(yes[str(item.id)]), np.log(1 - yes[str(item.id)])]] for item in items]
    asked, result = scored("hateful_memes", items, chances)
    assert result.score == pytest.approx(expected["roc_auc_of_probability"])
    (hard,) = asked.all_figures(result).values()
    assert hard == pytest.approx(expected["roc_auc_of_hard_answer"])


@needs_samples
def test_winoground_has_strict_scores_and_those_with_equals():
    folder = Path(SAMPLES) / "benchmarks" / "winoground"
    _, (item, *_) = sample_items("winoground", folder, "test")
    scores = {line["id"]: line for line in json.loads((folder / "scores.json").read_text())}
    items = [replace(item, id=number) for number in scores]
    expected = json.loads((folder / "expected.json").read_text())
    table = [[[scores[item.id][f"c{c}_i{i}"] for c in (0, 1)] for i in (0, 1)] for item in items]
    asked, result = scored("winoground", items, table)
    figures = asked.all_figures(result)
    for kind in ("text", "image", "group"):
        assert figures[f"{kind} score"] == pytest.approx(expected["strict"][f"{kind}_score"])
        assert figures[f"{kind} score (m4)"] == pytest.approx(expected["ties_are_right_m4"][f"{kind}_score"])


@needs_samples
def test_visdial_has_both_gains_and_the_place_of_the_answer():
    folder = Path(SAMPLES) / "benchmarks" / "visdial"
    _, items = sample_items("visdial", folder, "val")
    expected = json.loads((folder / "expected.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    asked, result = scored("visdial", items, [[scores[str(item.id)]] for item in items])
    figures = asked.all_figures(result)
    assert result.score == pytest.approx(expected["ndcg_official"], abs=1e-6)
    assert figures["NDCG (m4)"] == pytest.approx(expected["ndcg_sklearn_all_100"], abs=1e-6)
    assert figures["mean reciprocal rank"] == pytest.approx(expected["sparse_of_that_round"]["mrr"], abs=1e-6)
    assert figures["recall at 5"] == pytest.approx(expected["sparse_of_that_round"]["r@5"], abs=1e-6)


@needs_samples
@pytest.mark.parametrize(
    ("name", "split", "file"), [("coco_captions", "test", "coco_test"), ("nocaps", "val", "nocaps_val")]
)
def test_captions_have_the_official_scores(name, split, file):
    folder = Path(SAMPLES) / "benchmarks" / "captions"
    task, items = sample_items(name, folder, split)
    asked = task.__new__(task)
    asked.items, asked.benchmark, asked.has_answers = items, name, True
    said = {line["image_id"]: line["caption"] for line in json.loads((folder / f"{file}_predictions.json").read_text())}
    expected = json.loads((folder / f"{file}_expected.json").read_text())
    result = asked.result([[Answer(text=said[item.id])] for item in items], "", "")
    assert result.score == pytest.approx(expected["CIDEr"])
    for outcome in result.outcomes:
        assert outcome.score == pytest.approx(expected["per_image_CIDEr"][str(outcome.item)])
    if name == "nocaps":
        own = {name.partition(",")[0]: value for name, value in asked.all_figures(result).items()}
        assert own == pytest.approx(expected["CIDEr_by_domain_idf_of_the_domain"])


@needs_samples
def test_real_captions_of_coco_are_cut_into_the_official_words():
    file = Path(SAMPLES) / "captions_cider" / "coco_val2014_80.json"
    real = json.loads(file.read_text())
    for image, captions in real["references"].items():
        for caption, words in zip(captions, real["ptb_tokenized_references"][image], strict=True):
            assert " ".join(tokenize(caption)) == words.replace("\xa0", " ")


@needs_samples
def test_fairface_has_the_spread_over_groups():
    folder = Path(SAMPLES) / "benchmarks" / "fairface"
    expected, predictions = (json.loads((folder / f"{name}.json").read_text()) for name in ("expected", "predictions"))
    with (folder / "fairface_label_val.csv").open() as file:
        labels = list(csv.DictReader(file))
    _, items = sample_items("fairface", folder, "val")
    table = [
        [[0.0 if option == said.lower() else -1.0 for option in item.options]]
        for item, said in zip(items, predictions["gender"], strict=True)
    ]
    asked, result = scored("fairface", items, table)
    assert len(items) == len(labels) and result.score == pytest.approx(expected["gender"]["accuracy"])
    assert asked.all_figures(result)["std over 14 groups"] == pytest.approx(expected["gender"]["std_population"])


@needs_samples
@pytest.mark.parametrize(("name", "split"), [("scienceqa", "val"), ("textvqa", "val")])
def test_real_rows_are_read(name, split):
    _, items = sample_items(name, Path(SAMPLES) / "benchmarks" / name, split)
    assert items and all(item.text and item.answers and isinstance(item.images[0], ImageRef) for item in items)
