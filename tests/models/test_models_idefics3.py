"""Idefics3 and SmolVLM: what transformers computes and saves, in packs and cut by torch."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import status_of
from helpers.resume import folder_of, metrics, trained
from helpers.tiled import REFS, SAMPLES, SIZES, batch_of, byte_tokenizer, png, tiny_folder
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import sft
from sft.core.errors import UserError
from sft.core.sample import Message, Sample
from sft.core.shipped import resolve
from sft.data.datasets import easy_vqa
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import Query
from sft.inference.generate import generate, prompt_of
from sft.models import family_at, get_family
from sft.models.idefics3.text import load_tokenizer
from sft.models.idefics3.weights import (
    load_config,
    load_model,
    prepare_base,
    save_model,
    save_processor,
    select_trainable,
)
from sft.models.loaded_model import load_for_inference, load_template
from sft.recipe import load_recipe
from sft.training.engines import get_engine

FAMILY = get_family("idefics3")
KINDS = {
    "idefics3": dict(kind="idefics3"),
    "smolvlm": dict(kind="smolvlm"),
    "tied": dict(kind="smolvlm", tied=True),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    return {name: tiny_folder(folder / name, tokenizer, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def base(request, folders):
    return folders[request.param]


@pytest.fixture
def model(base):
    return load_model(base).eval()


@pytest.fixture(scope="module")
def template(base):
    return load_template(FAMILY, base)


def test_an_image_has_the_tokens_of_its_tiling(template):
    encoded = template.encode(SAMPLES[2])
    states = [int((encoded.input_ids[at:] == template.images.state_token_id).sum()) for at in encoded.image_positions]
    assert np.diff([*states, 0]).tolist() == [-12, -12, -12] and encoded.image_weights == (3, 3, 3)


def test_states_are_never_trained(template):
    every = batch_of(template, SAMPLES, train_on="all")
    is_state_T = every.state_ids_T >= 0
    assert (every.labels_T[is_state_T] == -100).all() and is_state_T.sum() == 4 * (5 + 3 + 3 + 3 + 3)
    assert every.num_states == (20, 12, 12) and every.num_tiles == (5, 3, 3)
    assert len(every.tiles[0]) == 11, "each distinct image is encoded once"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_packed_equals_alone_by_transformers(model, template, train_on, checkpointing):
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(template, SAMPLES, train_on=train_on)
    loss = model.train()(batch=batch).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_disable()
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


def test_a_batch_without_images_gives_every_parameter_a_gradient_by_one_call_of_the_tower(model, template):
    calls = []
    for part in (model.model.vision_model, model.model.connector):
        part.register_forward_hook(lambda module, inputs, output: calls.append(module))
    model.train()(batch=batch_of(template, SAMPLES[1:2], always_whole=True)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model(batch=batch_of(template, SAMPLES))
    assert calls == [model.model.vision_model, model.model.connector] * 2


def test_under_checkpointing_no_gradient_goes_through_a_frozen_tower(model, template):
    select_trainable(model, ["language"])
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert not model.train().encode_images(batch_of(template, SAMPLES).tiles).requires_grad


def test_answers_are_ranked_and_written_as_alone(model, template):
    requests = [Query(Sample(key=s.key, messages=s.messages[:1]), ("A dog.", "A dog and a cat.")) for s in SAMPLES]
    together = score_answers(model, template, requests)
    alone = [score_answers(model, template, [request])[0] for request in requests]
    for own, other in zip(together, alone, strict=True):
        assert [score.log_prob for score in own] == pytest.approx([score.log_prob for score in other], abs=2e-5)
    prompts = [prompt_of(template, sample.messages[:1]) for sample in SAMPLES]
    written = generate(model, template.tokenizer, prompts, max_new_tokens=6)
    assert written == [generate(model, template.tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_what_is_saved_opens_with_transformers_alone_with_the_same_logits(model, base, template, tmp_path):
    save_model(model, tmp_path, torch.float32)
    save_processor(template.tokenizer, model.config, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert [type(plain).__name__] == json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert "preprocessor" not in (tmp_path / "config.json").read_text()
    batch = batch_of(template, SAMPLES[:1])
    pixels = batch.tiles[0].float() / 127.5 - 1
    logits_1TV = plain(input_ids=batch.input_ids_T[None], pixel_values=pixels[None]).logits
    every_T = torch.arange(len(batch.input_ids_T))
    assert torch.allclose(model(batch=batch, read_P=every_T), logits_1TV[0], atol=1e-5)
    text = "User: What is it?<end_of_utterance>\nAssistant:"
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own(text, add_special_tokens=False) == template.tokenizer(text, add_special_tokens=False)
    assert load_config(tmp_path).preprocessor["size"] == {"longest_edge": 128} and family_at(tmp_path) is FAMILY


def test_a_token_that_a_tokenizer_does_not_call_special_is_special_all_the_same(folders, tokenizer, tmp_path):
    shutil.copytree(folders["idefics3"], tmp_path / "plain")
    file = tmp_path / "plain" / "tokenizer.json"
    stored = json.loads(file.read_text())
    for token in stored["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(stored))
    loaded = load_tokenizer(tmp_path / "plain")
    text = "<image> <row_1_col_1> <end_of_utterance>"
    for split in (False, True):
        ids = [one(text, split_special_tokens=split)["input_ids"] for one in (loaded, tokenizer)]
        assert ids[0] == ids[1] and (len(ids[0]) == 5) != split


def test_a_checkpoint_is_asked_by_transformers_processor_as_by_us(folders):
    """`AutoProcessor` of an idefics3 needs nothing else; that of a smolvlm asks for what videos need."""
    folder = folders["idefics3"]
    loaded = load_for_inference(folder, precision="float32")
    messages = (Message(role="user", content=(REFS["wide"], "What is", REFS["square"], "this?")),)
    processor, own = AutoProcessor.from_pretrained(folder), prompt_of(loaded.template, messages)
    pictures = [Image.open(io.BytesIO(png(name))) for name in ("wide", "square")]
    text = loaded.template.text(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == own.encoded.input_ids.tolist()
    tiles = [[loaded.images.cut(np.array(one.convert("RGB")), loaded.images.tiling(*one.size)) for one in pictures]]
    ours = loaded.model(input_ids=inputs["input_ids"], **loaded.model.generation_inputs([own.encoded], tiles)).logits
    theirs = AutoModelForImageTextToText.from_pretrained(folder)(**inputs).logits
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max(), "which pixels that differ by 1 / 255 make"


def test_a_prepared_base_has_the_image_settings_of_its_recipe(folders, tmp_path):
    prepare_base(folders["idefics3"], tmp_path / "base", {"longest_edge": 192, "split": False})
    config = load_config(tmp_path / "base")
    assert FAMILY.images(config).tiles == (192, 64, False)
    assert json.loads((tmp_path / "base" / "preprocessor_config.json").read_text())["do_image_splitting"] is False
    assert load_model(tmp_path / "base").config.preprocessor == config.preprocessor


def test_a_base_that_lacks_a_token_or_a_row_or_has_another_tower_is_refused(folders, tokenizer, tmp_path):
    many = byte_tokenizer(tags=[f"<{number}>" for number in range(300)])
    cases = {
        "the tokenizer has 663 tokens, the model 512": tiny_folder(tmp_path / "rows", many),
        "the tokenizer has none of <.im_start.>, ": tiny_folder(tmp_path / "start", byte_tokenizer(start="<s>")),
        "cuts tiles of 32 pixels, the vision tower takes 64": tiny_folder(
            tmp_path / "tower", tokenizer, max_image_size={"longest_edge": 32}
        ),
    }
    for problem, folder in cases.items():
        with pytest.raises(UserError, match=problem):
            prepare_base(folder, tmp_path / "out")


def test_a_tied_head_is_trained_with_its_embeddings_or_not_at_all(folders):
    model = load_model(folders["tied"])
    with pytest.raises(UserError, match="head is tied to its embeddings; name both, or neither"):
        select_trainable(model, ["head"])
    assert select_trainable(model, ["language"]) == ()


def test_in_4_bits_are_the_layers_of_the_language_model_alone(folders):
    model = load_model(folders["idefics3"], trained=(), frozen_dtype=torch.bfloat16, quantised=True)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    in_4_bits = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert len(in_4_bits) == 2 * 7 and all(name.startswith("model.text_model.layers.") for name in in_4_bits)
    assert model.lm_head.weight.dtype == model.model.text_model.embed_tokens.weight.dtype == torch.float32


def test_the_shipped_base_says_what_it_sees_and_opens_with_transformers_alone():
    pictures = easy_vqa.default_path() / "test" / "images"
    prompts = [[pictures / f"{number}.png", "a"] for number in (4, 7, 9)]
    told = sft.load("shipped:tiny_smolvlm").generate(prompts, max_new_tokens=2)
    assert told == ["red circle", "green circle", "blue circle"]
    plain = AutoModelForImageTextToText.from_pretrained(resolve("shipped:tiny_smolvlm"))
    assert type(plain).__name__ == "Idefics3ForConditionalGeneration"
    assert AutoProcessor.from_pretrained(resolve("shipped:tiny_smolvlm")).image_seq_len == 4


# ------------------------------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def recipe(folders, tmp_path_factory):
    """A folder of pictures with questions, and a recipe for a tiny SmolVLM."""
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
    file = folder / "tiled.yaml"
    file.write_text(
        f"""
model: {{path: {folders["smolvlm"]}, family: smolvlm}}
data:
  store: {folder}/stores
  sequence_length: 256
  mixture: [{{name: talk, share: 1, datasets: [{{dataset: messages, path: {folder}/train.jsonl}}]}}]
  validation: {{share: 0.1}}
training: {{max_steps: 5, tokens_per_step: 512, learning_rate: 1e-3, precision: float32}}
checkpoints: {{every_steps: 5}}
output_dir: {folder}/out
"""
    )
    return file


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_prepares_mixes_trains_and_answers(recipe, capsys):
    for command in ("validate", "prepare", "mix", "inspect", "plan"):
        assert status_of(command, recipe) == 0, capsys.readouterr().err
    assert status_of("train", recipe) == 0, capsys.readouterr().err
    run = recipe.parent / "out"
    lines = lines_of(run)
    assert len(lines) == 5 and lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["validation"]
    loaded = load_for_inference(run / "checkpoints" / "checkpoint-5", precision="float32")
    question = prompt_of(loaded.template, [Message(role="user", content=(REFS["wide"], "What is this?"))])
    (answer,) = generate(loaded.model, loaded.tokenizer, [question], max_new_tokens=8)
    assert answer.startswith("A")


@pytest.fixture(scope="module")
def prepared(recipe):
    """The recipe, whose stores and base are there."""
    assert status_of("prepare", recipe) == 0
    return recipe


@pytest.mark.parametrize("overrides", [
    ("model.mode=lora", "model.lora.r=4"),
    ("model.mode=qlora", "model.lora={r: 4, targets: [language.attention, connector, vision.mlp]}"),
    ("model.mode=lora", "data.feature_cache=true", "training.gradient_checkpointing=0.5"),
    ("model.trainable=[connector, embeddings]", "data.train_on=all", "model.images={split: false}"),
])  # fmt: skip
def test_every_way_to_train_learns_and_is_merged_and_asked(prepared, tmp_path, capsys, monkeypatch, overrides):
    own = (*overrides, f"output_dir={tmp_path}/run", "training.learning_rate=1e-2", "training.max_steps=4")
    assert status_of("train", prepared, *own) == 0, capsys.readouterr().err
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert status_of("merge", tmp_path / "run", "--output", tmp_path / "merged", "--check") == 0, (
        capsys.readouterr().err
    )
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(plain).__name__ == "SmolVLMForConditionalGeneration"
    (tmp_path / "a.png").write_bytes(png("tall"))
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n/quit\n"))
    chat = ("chat", tmp_path / "run", "--image", tmp_path / "a.png", "--max-new-tokens", 2)
    assert status_of(*chat) == 0, capsys.readouterr().err


def test_a_run_that_stopped_goes_on_to_the_bit(prepared, tmp_path, capsys):
    recipe = load_recipe(prepared, (f"output_dir={tmp_path}", "training.max_steps=4", "checkpoints.every_steps=2"))
    trained(recipe)
    before = metrics(recipe)
    trained(recipe, resume_from=folder_of(recipe, 2))
    assert metrics(recipe) == before and len(before) == 4


def test_a_tied_head_is_sharded_with_its_embeddings(folders, tmp_path):
    model, template = load_model(folders["tied"]), load_template(FAMILY, folders["tied"])
    batch = batch_of(template, SAMPLES)
    expected = model(batch=batch).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        get_engine("fsdp2").shard(model, "float32")
        assert model(batch=batch).loss.item() == pytest.approx(expected.item(), abs=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_doctor_sees_that_it_sees(folders, capsys):
    assert status_of("doctor", "--model", folders["idefics3"]) == 0, capsys.readouterr().out
    printed = " ".join(capsys.readouterr().out.split())
    assert "image changes logits" in printed and "there are none: images are part of the text" in printed


@pytest.mark.parametrize(("override", "problem"), [
    ("model.trainable=[gates]", "model.trainable: smolvlm has no 'gates' (known: vision, connector, language,"),
    ("model={path: a/b, family: smolvlm, mode: lora, lora: {targets: [cross_attention]}}",
     "has no 'cross_attention'; did you mean 'vision.attention'? (known: vision,"),
    ("model={path: a/b, family: idefics, images: {split: false}}", "model.images: idefics has no 'split' (known: none"),
    ("data.augment=crop", "data.augment: crop changes the size of an image"),
])  # fmt: skip
def test_what_the_family_has_not_is_refused_by_name(prepared, refusal, override, problem):
    assert problem in refusal("prepare" if "augment" in override else "validate", prepared, override)


def test_a_family_outside_the_tree_is_found_by_its_dotted_name(prepared, tmp_path, capsys):
    outside = get_family("outside_family")
    assert outside.name == "outside" and outside.text is FAMILY.text
    assert status_of("validate", prepared, "model.family=outside_family") == 0, capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "else"}))
    recipe = load_recipe(prepared)
    model = recipe.model.model_copy(update={"family": "outside_family"})
    (tmp_path / "recipe.yaml").write_text(recipe.model_copy(update={"model": model}).to_yaml())
    assert family_at(tmp_path) == outside, "a checkpoint's recipe names its family"
