"""What is exported, other toolkits read: `datasets`, TRL, and our own adapter."""

import io
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from conftest import base_tokenizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import SFTConfig, SFTTrainer

from sft.core.errors import RunError, UserError
from sft.core.images import read_bytes
from sft.core.sample import ImageRef, Message, Sample
from sft.data import export
from sft.data.datasets import Adapter
from sft.data.export import export_messages
from sft.data.formats import record_limit
from sft.data.store import Settings, prepare_store

DATA = Path(__file__).parent.parent / "fixtures"


def encoded(colour: str, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")
SPOKEN = ("user", "assistant", "user", "assistant")


def talk(key: str, *contents: tuple[str | bytes, ...], roles: tuple[str, ...] = SPOKEN) -> Sample:
    """Messages of texts and encoded images."""

    def content(items):
        return tuple(ImageRef(source=item) if isinstance(item, bytes) else item for item in items)

    messages = (Message(role=role, content=content(items)) for role, items in zip(roles, contents, strict=False))
    return Sample(key=key, messages=tuple(messages))


SAMPLES = [
    talk("one", (RED, "What is this?"), ("A colour.",), ("Which?",), ("Red.",)),
    talk("two", ("Compare ", RED, BLUE, " line\n\nbreaks"), ("They differ.",)),
    talk("text", ("Hi.",), ("Hello.",)),
    talk("system", ("Be brief.",), ("Hi.",), ("Ü",), roles=("system", *SPOKEN)),
]
OURS = [*SAMPLES, talk("literal", (RED, "Is <image> text, and </s>?"), ("<image> is.",))]
OURS += [talk("page", ("Above. ", BLUE, "Below."), roles=("document",))]


class Toys(list):
    """A store in memory."""

    def sample(self, row: int) -> Sample:
        return self[row]


@pytest.fixture
def exported(tmp_path):
    return export_messages(Toys(SAMPLES), tmp_path / "out").path


def read_back(file) -> list[Sample]:
    adapter = Adapter("messages", str(file), "train", {})
    return [adapter.to_sample(row) for file in adapter.files() for row in adapter.rows(file)]


# ---------------------------------------------------------------------------------------------------------- itself


def test_our_own_adapter_reads_equal_messages_back(tmp_path):
    done = export_messages(Toys(OURS), tmp_path / "out")
    assert done == (tmp_path / "out" / "train.parquet", 6, 5, 1)
    for where in (tmp_path / "out", done.path):
        assert [sample.messages for sample in read_back(where)] == [sample.messages for sample in OURS]


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_store_is_exported(tmp_path, images):
    adapter = Adapter("messages", str(DATA / "messages"), "train", {})
    store = prepare_store(adapter, tmp_path / "store", asked={}, settings=Settings(images=images))
    file = export_messages(store, tmp_path / "out").path
    for number, sample in enumerate(read_back(file)):
        stored = store.sample(number)
        assert [read_bytes(image) for image in sample.images] == [read_bytes(image) for image in stored.images]
        assert images == "reference" or sample.messages == stored.messages
    assert pq.read_table(file)["key"].to_pylist() == list(store.keys)


def test_a_file_is_written_in_row_groups_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROW_GROUP_BYTES", 3 * len(RED))
    progress = []
    samples = [talk(str(number), (RED, "Hm?"), ("Yes.",)) for number in range(10)]
    file = export_messages(Toys(samples), tmp_path / "all.parquet", on_progress=progress.append).path
    groups = pq.ParquetFile(file).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [3, 3, 3, 1]
    assert progress == [3, 6, 9, 10]
    assert [sample.messages for sample in read_back(file)] == [sample.messages for sample in samples]


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    gone = Sample(key="gone", messages=(Message(role="user", content=(ImageRef(source=tmp_path / "a.png"),)),))
    with pytest.raises(RunError, match=r"gone: image file missing: .*a.png; it was there when"):
        export_messages(Toys([*SAMPLES, gone]), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_images_that_are_small_enough_one_by_one_are_read_back(tmp_path):
    """Raw files may hold a record of many images piece by piece; exported it is one row."""
    images = [encoded(colour, (20, 20)) for colour in ("red", "blue", "lime")]
    sample = talk("three", (*images, "Same?"), ("No.",))
    file = export_messages(Toys([sample]), tmp_path / "all.parquet").path
    with record_limit(2 * max(map(len, images))):
        assert [back.messages for back in read_back(file)] == [sample.messages]


def test_a_file_that_is_there_is_kept(exported):
    before = exported.read_bytes()
    with pytest.raises(UserError, match=r"out/train.parquet: exists already; remove it or name another"):
        export_messages(Toys(SAMPLES[:1]), exported.parent)
    assert exported.read_bytes() == before


def test_a_store_without_samples_is_a_file_without_rows(tmp_path):
    assert pq.read_table(export_messages(Toys(), tmp_path / "none.parquet").path).num_rows == 0


# ------------------------------------------------------------------------------------------------------ datasets


@pytest.mark.parametrize("by_folder", [True, False])
def test_datasets_gives_pictures(exported, tmp_path, by_folder):
    where = {"path": str(exported.parent)} if by_folder else {"path": "parquet", "data_files": str(exported)}
    rows = datasets.load_dataset(**where, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["messages", "images", "key"]
    assert [len(row["images"]) for row in rows] == [1, 2, 0, 0]
    red, blue = rows[1]["images"]
    assert (red.size, red.getpixel((0, 0)), blue.getpixel((0, 0))) == ((6, 4), (255, 0, 0), (0, 0, 255))
    assert rows[1]["messages"][0]["content"][:2] == [
        {"type": "text", "text": "Compare "},
        {"type": "image", "text": None},
    ]


# ----------------------------------------------------------------------------------------------------------- TRL

TEMPLATE = (  # as simple as a template of parts can be
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}</s>{% endfor %}"
)
PATCHES = 4


def tiny_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A vision-language model that TRL trains, and a processor that works without torchvision."""
    tokenizer = base_tokenizer()
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **narrow),
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **narrow),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def test_trl_trains_on_it(exported, tmp_path):
    rows = datasets.load_dataset("parquet", data_files=str(exported), split="train", cache_dir=str(tmp_path / "cache"))
    model, processor = tiny_llava()
    options = SFTConfig(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, max_length=None, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", activation_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=processor)
    batch = trainer.data_collator(list(rows))
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    is_image = batch["input_ids"] == processor.image_token_id
    assert is_image.sum(dim=1).tolist() == [PATCHES, 2 * PATCHES, 0, 0], "each image stands where its part does"
    red, again, blue = batch["pixel_values"].mean(dim=(2, 3))
    assert torch.equal(red, again) and not torch.equal(red, blue)
    text = processor.tokenizer.decode(batch["input_ids"][1]).replace("<image>", "")
    assert text.split()[:4] == ["user:Compare", "line", "breaks</s>", "assistant:They"]
    assert trainer.train().training_loss > 0
