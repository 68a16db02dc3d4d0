"""Small pieces of the real datasets go through: records -> store -> token ids; questions are asked.

They are not part of this repository. The folder named in IDEFICS_SFT_SAMPLES has them, one folder a dataset; without
it every test here is skipped.
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import loaded_of

from sft.core.errors import UserError
from sft.core.sample import Sample
from sft.data.datasets import Adapter
from sft.data.encoded_arrays import encode_samples
from sft.data.store import Settings, Store, prepare_store
from sft.evaluation.run_tasks import ask
from sft.evaluation.tasks.mmbench.benchmark import load_benchmark
from sft.evaluation.tasks.mmbench.multiple_choice import MMBench, chance
from sft.models.chat_template import ChatTemplate

VARIABLE = "IDEFICS_SFT_SAMPLES"
pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder of real samples")
REAL = Path(os.environ.get(VARIABLE, "."))
IMAGE = "<fake_token_around_image><image><fake_token_around_image>"


@pytest.fixture
def prepared(tmp_path):
    """Makes the store of a dataset."""

    def prepare(dataset: str, path: Path, **options) -> Store:
        adapter = Adapter(dataset, str(path), "train", options)
        asked = {"dataset": dataset, "path": str(path), "split": "train", "options": options}
        return prepare_store(adapter, tmp_path / "store", asked=asked, settings=Settings(max_skip_share=0.0))

    return prepare


@pytest.fixture
def encoded(template: ChatTemplate):
    """Encodes a store, and checks of every sample that each of its images has a place and that something is trained."""

    def encode(store: Store) -> list[str]:
        arrays = encode_samples(store, template, store.path / "encoded" / "toy")
        for row in range(len(store)):
            assert len(arrays[row].image_positions) == len(arrays.image_rows(row)) == len(store.sample(row).images)
            assert arrays[row].trained_spans
        return [template.tokenizer.decode(arrays[row].input_ids) for row in range(len(store))]

    return encode


def all_samples(store: Store) -> list[Sample]:
    return [store.sample(row) for row in range(len(store))]


def texts(sample: Sample) -> list[str]:
    return [item for message in sample.messages for item in message.content if isinstance(item, str)]


def pictures() -> list[Path]:
    """Seven photographs of odd sizes, in the order of their names."""
    return sorted((REAL / "laion_img2dataset").glob("*.jpg"))


# ------------------------------------------------------------------------------------------------- conversations


def test_three_records_of_llava_instruct(tmp_path, prepared, encoded):
    raw = tmp_path / "records.json"
    shutil.copyfile(REAL / "llava_instruct" / "conversation_58k.3records_from_docs.json", raw)
    records = json.loads(raw.read_text())
    (tmp_path / "train2017").mkdir()
    for record, picture in zip(records, pictures(), strict=False):
        shutil.copyfile(picture, tmp_path / "train2017" / record["image"])
    store = prepared("llava_instruct", raw)
    assert [len(sample.messages) for sample in all_samples(store)] == [6, 4, 6]
    assert [store.image_bytes(row) for row in range(3)] == [picture.read_bytes() for picture in pictures()[:3]]
    for sample, record, text in zip(all_samples(store), records, encoded(store), strict=True):
        said = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        assert texts(sample) == said
        comes_first = record["conversations"][0]["value"].startswith("<image>")
        question = f"{IMAGE} {said[0]}" if comes_first else f" {said[0]}{IMAGE}"
        assert text.startswith(f"<s> User:{question}<end_of_utterance>")
        assert text.endswith(f"Assistant: {said[-1]}<end_of_utterance></s>")
    assert texts(store.sample(0))[0].startswith("What are the colors of the bus")


def test_a_record_of_lrv_instruction(tmp_path, prepared, encoded):
    raw = REAL / "lrv_instruction" / "filter_cap.1record_from_readme.json"
    (record,) = json.loads(raw.read_text())
    shutil.copyfile(raw, tmp_path / "filter_cap.json")
    (tmp_path / "image").mkdir()
    shutil.copyfile(REAL / "lrv_instruction" / "demo1.png", tmp_path / "image" / f"{record['image_id']}.jpg")
    (text,) = encoded(prepared("lrv_instruction", tmp_path))
    assert text.startswith(f"<s> User:{IMAGE} Can you see")
    assert text == (
        f"<s> User:{IMAGE} {record['question']}<end_of_utterance> \nAssistant: {record['answer']}<end_of_utterance></s>"
    )


def test_a_dialogue_of_ultrachat(prepared, encoded):
    raw = REAL / "ultrachat" / "train_0.first1.jsonl"
    store = prepared("ultrachat", raw)
    (dialogue,) = all_samples(store)
    assert [message.role for message in dialogue.messages] == ["user", "assistant"] * 3
    assert texts(dialogue) == [text.strip() for text in json.loads(raw.read_text().splitlines()[0])["data"]]
    (text,) = encoded(store)
    assert text.startswith("<s> User: How can cross training")
    assert text.count("Assistant: ") == text.count("<end_of_utterance>") / 2 == 3


def test_the_held_out_images_of_svit(tmp_path, prepared):
    listed = REAL / "svit" / "test_image_ids.txt"
    assert len(listed.read_text().split()) == 10_808
    shutil.copyfile(listed, tmp_path / "test_image_ids.txt")
    turns = [{"from": "user", "value": "What is it?"}, {"from": "gpt", "value": "A square."}]
    records = [{"image_id": number, "conversations": [{"topic": "toy", "content": turns}]} for number in (7, 8)]
    (tmp_path / "conversation.json").write_text(json.dumps(records))
    for number in (7, 8):
        shutil.copyfile(pictures()[0], tmp_path / f"{number}.jpg")
    store = prepared("svit", tmp_path, tasks=["conversation"])
    assert [sample.key for sample in all_samples(store)] == ["svit/conversation.json:1/7/0"]
    assert store.manifest["filtered"] == {"held-out test image": 1}


# ----------------------------------------------------------------------------------------------- image-text pairs


@pytest.mark.parametrize(("name", "rows"), [("test_1000", "1,000"), ("sample_image", "2"), ("test_bbox", "1")])
def test_rows_of_laion_are_links_alone_and_nothing_is_fetched(prepared, name, rows):
    with pytest.raises(UserError, match=f"no record of {rows} is left: {rows} image not downloaded"):
        prepared("image_text_pairs", REAL / "laion_img2dataset" / f"{name}.parquet")


def test_rows_of_laion_whose_images_are_there(tmp_path, prepared, encoded):
    """As img2dataset leaves them: the parquet lists every row, and the pictures lie in a folder beside it."""
    listed = pq.read_table(REAL / "laion_img2dataset" / "test_1000.parquet").to_pylist()
    (tmp_path / "00000").mkdir()
    rows = []
    for number, row in enumerate(listed):
        is_there, key = number < len(pictures()), f"{number:09d}"
        if is_there:
            shutil.copyfile(pictures()[number], tmp_path / "00000" / f"{key}.jpg")
        status = "success" if is_there else "failed_to_download"
        rows.append({"url": row["URL"], "caption": row["TEXT"], "key": key, "status": status})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    store = prepared("image_text_pairs", tmp_path)
    assert (len(store), store.num_images, store.manifest["filtered"]) == (7, 7, {"download failed": 993})
    assert sorted(store.image_sizes) == sorted(tuple(map(int, picture.stem.split("_"))) for picture in pictures())
    assert encoded(store) == [f"<s>{IMAGE} {row['TEXT']}</s>" for row in listed[:7]]


def test_a_shard_of_webdataset(prepared, encoded):
    raw = REAL / "webdataset" / "sample.tgz"
    with tarfile.open(raw) as tar:
        classes = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".cls")]
    store = prepared("image_text_pairs", raw, text_column="cls")
    assert len(store) == len(classes) == 90
    assert set(store.image_sizes) == {(28, 28)}
    assert encoded(store) == [f"<s>{IMAGE} {number}</s>" for number in classes]


# -------------------------------------------------------------------------------------------------------- MMBench


def test_twenty_questions_of_mmbench_are_read_and_asked(model, template):
    file = REAL / "mmbench_samples" / "mmbench_samples.tsv"
    benchmark = load_benchmark(file)
    firsts = [question.first for question in benchmark.questions]
    assert len({row.category for row in firsts}) == 20 and len({row.l2_category for row in firsts}) == 6
    assert sorted(len(question.rotations) for question in benchmark.questions) == [3] * 2 + [4] * 18
    assert [row.index for row in firsts if row.hint] == [318]
    card = load_benchmark(file, protocol="card")
    loaded, task = loaded_of(model, template), MMBench(card, "letter")
    result = task.result(ask(loaded, [task])[task], "", "")
    assert task.summary(result)["questions"] == task.summary(result)["rows"] == 20
    assert (chance(result), result.filtered) == (0.25, {})
    for protocol in ("vanilla", "circular"):
        toy = load_benchmark(file, protocol=protocol, max_questions=3)
        tasks = [MMBench(toy, scoring) for scoring in ("letter", "text")]
        answers = ask(loaded, tasks)
        assert [len(task.result(answers[task], "", "").outcomes) for task in tasks] == [3, 3]
