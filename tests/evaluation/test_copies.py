"""Copies of benchmarks: parquet files of the hub and tables of VLMEvalKit give the items of the official files."""

import base64
import csv
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_card_tasks import CAPTIONS, WRITERS, opened

from sft.core.errors import UserError
from sft.evaluation.copies import copied_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IDEFICS_SFT_CACHE", str(tmp_path / "cache"))
    copied_rows.cache_clear()
    return tmp_path / "cache" / "benchmark_images"


def encoded(number):
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (number * 20 % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shown(number):
    return {"bytes": encoded(number), "path": None}


def write_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def write_table(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


PEOPLE = ["unanswerable"] * 6 + ["soup"] * 4
CHOICES = {"question": "Which is\n\nbigger?", "hint": "Look.", "subject": "natural science", "solution": "Dogs are."}
COPIES = {
    ("okvqa", "val"): [
        {"question_id": str(10 * n), "image": shown(n), "question": f"What is {n}?", "answers": ["dog"] * 10,
         "question_type": "one", "answer_type": ""}
        for n in range(1, 5)
    ],
    ("textvqa", "val"): [
        {"image_id": f"val{n}", "question_id": n, "question": " what brand? ", "answers": ["acme"] * 10,
         "image": shown(n), "ocr_tokens": ["x"]}
        for n in range(4)
    ],
    ("vizwiz", "val"): [
        {"question_id": f"VizWiz_val_{n:08d}", "image": shown(n), "question": "What is this? ", "answers": PEOPLE,
         "category": "other"}
        for n in range(4)
    ],
    ("textcaps", "val"): [{"image_id": f"val{n}", "image": shown(n), "caption_str": CAPTIONS} for n in range(3)],
    ("nocaps", "val"): [
        {"image_id": n, "image": shown(n), "annotations_captions": [CAPTIONS[(n + 4 * k) % 3] for k in range(3)],
         "domain": ("near-domain", "out-domain")[n % 2]}
        for n in range(4)
    ],
    ("flickr30k", "test"): [{"img_id": str(n), "image": shown(n), "caption": CAPTIONS} for n in range(2)],
    ("coco_captions", "test"): [
        {"question_id": str(50 + n), "image": shown(n), "answer": CAPTIONS, "id": n}
        for n in range(2)
    ],
    ("scienceqa", "test"): [
        {**CHOICES, "choices": ["ant", "dog"], "answer": n % 2, "image": shown(n) if n < 3 else None} for n in range(4)
    ],
}  # fmt: skip
"""Rows of the hub's copies of what the writers of official files write."""


def words(task):
    return [(str(item.id), item.text, item.answers, item.options, item.fields) for item in task.items]


@pytest.mark.parametrize(("name", "split"), COPIES, ids=lambda value: value)
def test_parquet_files_of_the_hub_give_the_official_items(tmp_path, cache, name, split):
    WRITERS[name](tmp_path / "official")
    rows, folder = COPIES[name, split], tmp_path / "hub" / "data"
    part = {"okvqa": "val2014", "nocaps": "validation"}.get(name, split)
    for number, own in enumerate((rows[:1], rows[1:])):
        write_parquet(folder / f"{part}-{number:05d}-of-00002-0a1b.parquet", own)
    (official,), (copied,) = (opened(name, place, split=split) for place in (tmp_path / "official", folder.parent))
    assert words(copied) == words(official) and copied.benchmark == official.benchmark
    files = [item.images[0].source for item in copied.items]
    assert all(file.is_relative_to(cache) for file in files)
    assert [file.read_bytes() for file in files] == [row["image"]["bytes"] for row in rows if row["image"]]
    if name not in ("okvqa", "coco_captions"):  # these copies do not number the images
        assert [item.cluster for item in copied.items] == [item.cluster for item in official.items]


def test_tables_of_vlmevalkit_are_read(tmp_path):
    image = base64.b64encode(encoded(1)).decode()
    write_table(
        tmp_path / "TextVQA_VAL.tsv",
        [{"index": 3, "image": image, "question": "what?", "answer": repr(["it's", "b"])},
         {"index": 4, "image": "3", "question": "who?", "answer": "b"}],
    )  # fmt: skip
    write_table(tmp_path / "COCO_VAL.tsv", [{"index": 0, "image": image, "question": "", "answer": repr(CAPTIONS)}])
    choices = {"A": "ant", "B": "dog", "C": ""}
    row = {"index": 5, "image": image, "question": "Which?", "hint": "", **choices, "answer": "B", "category": "x"}
    write_table(tmp_path / "ScienceQA_TEST.tsv", [row])
    (asked,) = opened("textvqa", tmp_path)
    assert [(item.id, item.answers) for item in asked.items] == [("3", ("it's", "b")), ("4", ("b",))]
    assert asked.items[0].images == asked.items[1].images and asked.items[0].cluster == asked.items[1].cluster
    (captions,) = opened("coco_captions", tmp_path / "COCO_VAL.tsv", split="val")
    assert captions.items[0].answers == tuple(CAPTIONS)
    (science,) = opened("scienceqa", tmp_path)
    assert science.items[0].answers == ("B",) and science.items[0].options == ("A", "B")


def test_a_copy_without_images_names_files_of_the_folder(tmp_path):
    WRITERS["coco_captions"](tmp_path)
    (tmp_path / "dataset_coco.json").unlink()
    rows = [{"cocoid": 50, "filepath": "val2014", "filename": "0.jpg", "sentences": CAPTIONS, "url": "http://x"}]
    write_parquet(tmp_path / "default" / "test" / "0000.parquet", rows)
    (task,) = opened("coco_captions", tmp_path)
    assert task.items[0].images[0].source == tmp_path / "val2014" / "0.jpg" and task.items[0].id == 50


ONE = COPIES["textvqa", "val"][:1]
FAULTS = {
    "is in .* and .*name one": {"a/val.parquet": ONE, "b/val.parquet": ONE},
    "1 of 2 files of val": {"val-00000-of-00002.parquet": ONE},
    "no 'question'": {"val.parquet": [{"image": shown(1), "question_id": 3, "answers": ["a"]}]},
    "or a copy as val-00000-of-00001.parquet of the hub or VLMEvalKit's TextVQA_VAL.tsv": {"train.parquet": ONE},
    "row 1: image is not base64": {"val.parquet": [{**ONE[0], "image": "?"}]},
    "no such image; 1 of 1": {"val.parquet": [{**ONE[0], "image": None}]},
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_is_wrong_with_a_copy_is_one_line(tmp_path, message):
    for name, rows in FAULTS[message].items():
        write_parquet(tmp_path / name, rows)
    with pytest.raises(UserError, match=message) as raised:
        opened("textvqa", tmp_path)
    assert "\n" not in str(raised.value)


def test_scores_by_shots_stand_beside_the_card_s(capsys):
    from rich.console import Console

    from sft.cli.evaluation_tables import card_figure, show_summaries

    about = {"metric": {"name": "VQA accuracy (m4)"}, "task": "okvqa", "benchmark": "okvqa_val", "questions": 9}
    own = [about | {"shots": shots, "score": 0.4, "interval": [0.3, 0.5]} for shots in (0, 4)]
    model = "HuggingFaceM4/idefics-9b"
    show_summaries([one | card_figure(model, "random", one) for one in own], Console(width=80))
    printed = capsys.readouterr().out.replace("\xa0", " ")
    assert "38.4 %" in printed and "45.5 %" in printed and "4 shots" in printed and "30.0 % to 50.0 %" in printed
    assert card_figure("runs/mine", "random", own[0]) == {} == card_figure(model, "rices", own[1])
