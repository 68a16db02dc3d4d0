"""The family seam carries a family whose images are part of the text, of which `sft/` says nothing."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from build_tiny_base import train_tokenizer
from conftest import CORPUS, conversation, status_of
from inline_family.family import FAMILY, InlineImages
from inline_family.packed import PackedInline
from PIL import Image
from transformers import Idefics3Config

from sft import models
from sft.batches.collate import collate
from sft.batches.image_source import OpenedImages
from sft.core.sample import ImageRef, Message, PlacedSample, Sample
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import Query
from sft.inference.generate import generate, prompt_of
from sft.models import get_family
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.loaded_model import load_for_inference, load_template

SIZES = {"small": (20, 30), "wide": (90, 40), "tall": (30, 200)}  # 1, 2 x 3 + 1 and 2 x 1 + 1 tiles


def png(name):
    width, height = SIZES[name]
    noise = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


get_family("inline_family")  # from now on its models are known by their model_type
REFS = {name: ImageRef(source=png(name)) for name in SIZES}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(iter(CORPUS), vocab_size=400)
    tokenizer.add_tokens(["<end_of_utterance>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A tiny random model with shared key and value heads, and its tokenizer."""
    torch.manual_seed(0)
    text = dict(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    vision = dict(
        hidden_size=64, patch_size=8, image_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=image_token_id, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = PackedInline(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    folder = tmp_path_factory.mktemp("inline") / "base"
    folder.mkdir()
    FAMILY.weights.save_model(model, folder, torch.float32)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    return FAMILY.weights.load_model(base).eval()


@pytest.fixture(scope="module")
def template(tokenizer, base):
    source = load_chat_template(Path(FAMILY.text.CHAT_TEMPLATE))
    return ChatTemplate(source, tokenizer, InlineImages(Idefics3Config.from_pretrained(base)))


def shown(*turns):
    """A conversation whose `<words>` are pictures."""
    sample = conversation(*turns)
    messages = [
        Message(
            role=m.role,
            content=tuple(REFS[i.source.decode()[1:-1]] if isinstance(i, ImageRef) else i for i in m.content),
        )
        for m in sample.messages
    ]
    return Sample(key="toy", messages=tuple(messages))


SAMPLES = [
    shown(("<small>", "What is it?"), "A dog."),
    shown("The quick brown fox?", "It jumps over the lazy dog."),
    shown(("<wide>", "What is in", "<tall>", "this image?"), "A cat.", ("And", "<wide>", "this?"), "A red circle."),
    shown(("<tall>", "A square?"), "A green triangle and a blue square."),
]


def batch_of(template, samples, **options):
    names = list(REFS.values())
    placed = [PlacedSample(template.encode(s), tuple(map(names.index, s.images)), 0) for s in samples]
    return collate([placed], OpenedImages(names, template.images), **{"train_on": "assistant"} | options)


def test_an_image_has_the_tokens_of_its_tiling(template):
    encoded = template.encode(SAMPLES[2])
    states = [int((encoded.input_ids[at:] == template.images.state_token_id).sum()) for at in encoded.image_positions]
    assert np.diff([*states, 0]).tolist() == [-28, -12, -28] and encoded.image_weights == (7, 3, 7)


def test_states_are_never_trained(template):
    every = batch_of(template, SAMPLES, train_on="all")
    is_state_T = every.state_ids_T >= 0
    assert (every.labels_T[is_state_T] == -100).all() and is_state_T.sum() == 4 * (1 + 7 + 3 + 7 + 3)
    assert every.num_states == (4, 28, 12) and every.num_tiles == (1, 7, 3)
    assert len(every.tiles[0]) == 11, "each distinct image is encoded once"


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_packed_equals_alone_by_transformers(model, template, train_on):
    batch = batch_of(template, SAMPLES, train_on=train_on)
    model.zero_grad()
    loss = model.train()(batch=batch).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for segment in range(len(SAMPLES)):
        labels_T = batch.labels_T[batch.segment_ids_T == segment]
        logits_TV = model.plain_logits(batch, segment)
        own = torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], reduction="sum", ignore_index=-100)
        (own / batch.num_trained_tokens).backward()
        total += own.item() / batch.num_trained_tokens
    assert loss.item() == pytest.approx(total, abs=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-5, rtol=1e-5), name
        assert parameter.grad.abs().sum() > 0, f"{name} is trained"


def test_a_batch_without_images_gives_every_parameter_a_gradient(model, template):
    whole = batch_of(template, SAMPLES[1:2], always_whole=True)
    model.train()(batch=whole).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_answers_are_ranked_and_written_as_alone(model, template):
    requests = [Query(Sample(key=s.key, messages=s.messages[:1]), ("A dog.", "A dog and a cat.")) for s in SAMPLES]
    together = score_answers(model, template, requests)
    alone = [score_answers(model, template, [request])[0] for request in requests]
    for own, other in zip(together, alone, strict=True):
        assert [score.log_prob for score in own] == pytest.approx([score.log_prob for score in other], abs=2e-5)
    prompts = [prompt_of(template, sample.messages[:1]) for sample in SAMPLES]
    written = generate(model, template.tokenizer, prompts, max_new_tokens=6)
    assert written == [generate(model, template.tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    """A folder of pictures with questions, and a recipe that names the family by its dotted name."""
    folder = tmp_path_factory.mktemp("run")
    for name in SIZES:
        (folder / f"{name}.png").write_bytes(png(name))
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>What is this?" if number % 4 else "What is a dog?"},
                {"role": "assistant", "content": f"A {name} image."},
            ],
            "images": [f"{name}.png"] * (number % 4 > 0),
        }
        for number, name in enumerate([*SIZES] * 8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "inline.yaml"
    file.write_text(
        f"""
model: {{path: {base}, family: inline_family}}
data:
  store: {folder}/stores
  sequence_length: 256
  max_images_per_pack: 20
  mixture: [{{name: talk, share: 1, datasets: [{{dataset: messages, path: {folder}/train.jsonl}}]}}]
training: {{max_steps: 5, tokens_per_step: 512, learning_rate: 1e-3, precision: float32}}
checkpoints: {{every_steps: 5}}
output_dir: {folder}/out
"""
    )
    return file


def test_a_recipe_prepares_mixes_trains_and_answers(recipe, capsys, monkeypatch):
    for command in ("validate", "prepare", "mix", "inspect"):
        assert status_of(command, recipe) == 0, capsys.readouterr().err
    assert status_of("train", recipe) == 0, capsys.readouterr().err
    run = recipe.parent / "out"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and lines[-1]["loss"] < lines[0]["loss"]
    checkpoint = run / "checkpoints" / "checkpoint-5"
    monkeypatch.setattr(models, "_known", {})  # as in a new process: the checkpoint's recipe names its family
    loaded = load_for_inference(checkpoint, precision="float32")
    template = load_template(get_family("inline_family"), checkpoint)
    question = prompt_of(template, [Message(role="user", content=(REFS["wide"], "What is this?"))])
    (answer,) = generate(loaded.model, template.tokenizer, [question], max_new_tokens=8)
    assert answer.startswith("A")


def test_a_crop_that_would_change_the_tokens_of_an_image_is_refused(recipe, refusal):
    assert "data.augment: crop changes the size of an image" in refusal("prepare", recipe, "data.augment=crop")


def test_a_name_that_the_family_lacks_is_refused(recipe, refusal):
    assert "model.trainable: inline_family has no 'gates' (known: vision," in refusal(
        "validate", recipe, "model.trainable=[gates]"
    )
