"""Idefics2, Idefics3 and SmolVLM: what transformers computes and saves, in packs and cut by torch."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import status_of
from helpers.resume import folder_of, metrics, trained
from helpers.tiled import (
    KINDS,
    REFS,
    SAMPLES,
    SIZES,
    batch_of,
    byte_tokenizer,
    piece_tokenizer,
    png,
    shown,
    tiny_folder,
    write_recipe,
)
from helpers.training import printed
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import sft
from sft.core.errors import UserError
from sft.core.sample import Message, Sample
from sft.core.shipped import resolve
from sft.data.datasets import easy_vqa
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import Query
from sft.inference.chat import responder
from sft.inference.generate import generate, prompt_of
from sft.models import family_at, family_of, fused_layers, get_family, inline_model, plain_folder
from sft.models.idefics3.text import END_OF_UTTERANCE, NEVER_WRITTEN, load_tokenizer
from sft.models.image_transform import load_tiles, tiling_of
from sft.models.loaded_model import load_for_inference, load_template
from sft.recipe import load_recipe
from sft.training.engines import get_engine
from sft.training.open_model import OpenedModel, choose_trained
from sft.training.run import _share_encoded

FAMILY = get_family("idefics3")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tokenizer_of(kind):
    return piece_tokenizer() if kind == "idefics2" else byte_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    return {
        name: tiny_folder(folder / name, tokenizer_of(options["kind"]), **options) for name, options in KINDS.items()
    }


@pytest.fixture(scope="module", params=KINDS)
def base(request, folders):
    return folders[request.param]


@pytest.fixture
def model(base):
    return family_at(base).weights.load_model(base).eval()


@pytest.fixture(scope="module")
def template(base):
    return load_template(family_at(base), base)


def test_an_image_has_the_tokens_of_its_tiling(template):
    encoded, images = template.encode(SAMPLES[2]), template.images
    tilings = [images.tiling(*SIZES[name]) for name in ("wide", "tall", "wide")]
    states = [int((encoded.input_ids[at:] == images.state_token_id).sum()) for at in encoded.image_positions]
    assert np.diff([*states, 0]).tolist() == [-images.num_states(tiling) for tiling in tilings]
    assert encoded.image_weights == tuple(map(images.weight, tilings))


def test_states_are_never_trained(template):
    every = batch_of(template, SAMPLES, train_on="all")
    is_state_T = every.state_ids_T >= 0
    assert (every.labels_T[is_state_T] == -100).all() and (every.labels_T != -100).sum() == (~is_state_T).sum() - 4
    assert every.num_states == tuple(4 * tiling.num_tiles for tiling in every.tilings)
    assert sum(map(len, every.tiles)) == sum(tiling.num_tiles for tiling in every.tilings), "each image is encoded once"


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


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_what_samples_begin_with_is_computed_once_with_the_same_gradients(model, template, monkeypatch, train_on):
    asked = [("What is it?", "A dog."), ("What is it?", "A cat."), ("And this?", "The quick brown fox.")]
    samples = [SAMPLES[3], *(shown(("<square>", question), answer) for question, answer in asked), SAMPLES[1]]
    batch = batch_of(template, samples, train_on=train_on)
    found, rows = [], []
    model.train().model.text_model.layers[0].register_forward_hook(lambda _, given, out: rows.append(out.shape[1]))
    for share in (inline_model.share_beginnings, lambda batch, read_P: (batch, read_P)):
        monkeypatch.setattr(inline_model, "share_beginnings", share)
        model.zero_grad()
        output = model(batch=batch)
        output.loss.backward()
        found.append([output.token_losses_P, *(parameter.grad.clone() for parameter in model.parameters())])
    assert rows[0] <= rows[1] - 2 * min(batch.num_states) and rows[1] == len(batch.input_ids_T)
    for shared, alone in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)


def test_a_frozen_tower_works_on_a_few_tiles_at_a_time_with_the_same_states(model, template, monkeypatch):
    batch = batch_of(template, SAMPLES)
    trained = model.image_states(batch)
    assert trained.requires_grad
    family_of(model).weights.select_trainable(model, ["language"])
    monkeypatch.setattr(fused_layers, "_WORKED_ON", (1, 1))
    states = model.image_states(batch)
    assert not states.requires_grad
    torch.testing.assert_close(states, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["smolvlm"], indirect=True)
def test_dealing_counts_what_a_tower_does(model, template, base):
    opened = OpenedModel(family=family_at(base), model=model, template=template)
    recipe = SimpleNamespace(data=SimpleNamespace(feature_cache=False))
    choose = opened.family.weights.select_trainable
    choose(model)
    assert _share_encoded(recipe, opened) == 1
    choose(model, ["language", "connector"])
    assert _share_encoded(recipe, opened) == 1 / 3
    recipe.data.feature_cache = True
    assert _share_encoded(recipe, opened) == 0


def test_a_batch_without_images_gives_every_parameter_a_gradient_by_one_call_of_the_tower(model, template):
    calls = []
    tower, connector = model.model.vision_model, model.model.connector
    parts = (tower.encoder, getattr(connector, "perceiver_resampler", connector))
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: calls.append(module))
    model.train()(batch=batch_of(template, SAMPLES[1:2], always_whole=True)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model(batch=batch_of(template, SAMPLES))
    assert calls == [*parts, *parts]


def test_under_checkpointing_no_gradient_goes_through_a_frozen_tower(model, template):
    family_of(model).weights.select_trainable(model, ["language"])
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert not model.train().image_states(batch_of(template, SAMPLES)).requires_grad


def test_answers_are_ranked_as_by_one_forward_of_transformers_for_each(base, model, template):
    """Options and questions share what they begin with, images included."""
    requests = [Query(Sample(key=s.key, messages=s.messages[:1]), ("A dog.", "A dog and a cat.")) for s in SAMPLES]
    plain = AutoModelForImageTextToText.from_pretrained(base).eval()
    for request, scores in zip(requests, score_answers(model, template, requests), strict=True):
        images = request.sample.images
        tiles = [load_tiles(image.source, template.images) for image in images]
        tilings = [tiling_of(image, template.images) for image in images]
        pixels = model.generation_inputs((), [tiles], [tilings]) if tiles else {}
        for answer, score in zip(request.options, scores, strict=True):
            encoded, (start, end) = template.encode_answer(request.sample.messages, answer)
            ids_T = torch.from_numpy(encoded.input_ids)
            with torch.no_grad():
                log_probs_TV = plain(input_ids=ids_T[None], **pixels).logits[0, start - 1 : end - 1].log_softmax(-1)
            expected = log_probs_TV.gather(1, ids_T[start:end, None]).sum().item()
            assert score.log_prob == pytest.approx(expected, abs=2e-6 * (end - start), rel=1e-6)


def test_answers_of_a_padded_batch_are_those_of_each_prompt_alone(model, template):
    prompts = [prompt_of(template, sample.messages[:1]) for sample in SAMPLES]  # with one image, none, two, one
    written = generate(model, template.tokenizer, prompts, max_new_tokens=6)
    assert written == [generate(model, template.tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_what_is_saved_opens_with_transformers_alone_with_the_same_logits(model, base, template, tmp_path):
    weights = family_at(base).weights
    weights.save_model(model, tmp_path, torch.float32)
    weights.save_processor(template.tokenizer, model.config, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert [type(plain).__name__] == json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert "preprocessor" not in (tmp_path / "config.json").read_text()
    batch = batch_of(template, SAMPLES[:1])
    pixels = model.generation_inputs((), [[batch.tiles[0].numpy()]], [batch.tilings])
    logits_1TV = plain(input_ids=batch.input_ids_T[None], **pixels).logits
    every_T = torch.arange(len(batch.input_ids_T))
    assert torch.allclose(model(batch=batch, read_P=every_T), logits_1TV[0], atol=1e-5)
    text = "User: What is it?<end_of_utterance>\nAssistant:"
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own(text, add_special_tokens=False) == template.tokenizer(text, add_special_tokens=False)
    assert weights.load_config(tmp_path).preprocessor["size"]["longest_edge"] == 128
    assert family_at(tmp_path) is family_at(base)


@pytest.mark.parametrize("base", ["idefics3", "smolvlm", "tied"], indirect=True)
def test_saved_files_have_the_keys_of_the_published_ones(base, template, tmp_path):
    """What transformers of both major versions and servers like vLLM read besides the weights."""
    config = FAMILY.weights.load_config(base)
    name = "SmolVLM" if config.model_type == "smolvlm" else "Idefics3"
    plain_folder.save_processor(FAMILY, template, config, tmp_path)
    FAMILY.weights.write_config(config.to_dict(), tmp_path, torch.bfloat16)
    files = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert files["preprocessor_config.json"] == {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": f"{name}ImageProcessor",
        "max_image_size": {"longest_edge": 64}, "processor_class": f"{name}Processor", "resample": 1,
        "rescale_factor": 1 / 255, "size": {"longest_edge": 128},
    }  # fmt: skip
    assert files["processor_config.json"] == {"image_seq_len": 4, "processor_class": f"{name}Processor"}
    ids = template.tokenizer.get_vocab()
    generation = files["generation_config.json"]
    assert [generation[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [
        ids["<|im_start|>"], [ids["<end_of_utterance>"]], ids["<|endoftext|>"]
    ]  # fmt: skip
    own = files["config.json"]
    assert own["architectures"] == [f"{name}ForConditionalGeneration"] and own["model_type"] == name.lower()
    assert (own["image_token_id"], own["scale_factor"], own["dtype"]) == (ids["<image>"], 2, "bfloat16")
    assert own["text_config"]["model_type"] == "llama" and "preprocessor" not in own
    assert files["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "chat_template.jinja").read_text() == template.template


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


@pytest.mark.parametrize("name", ["idefics3", "idefics2", "idefics2, split and tied"])
def test_a_checkpoint_is_asked_by_transformers_processor_as_by_us(folders, monkeypatch, name):
    """`AutoProcessor` of an idefics3 needs nothing else; that of a smolvlm asks for what videos need. Pillow makes the
    pixels of both, so that they are equal. That of an idefics2 puts a space before a word that follows an image, a "▁"
    more than the model was trained with."""
    monkeypatch.setattr("sft.models.idefics3.images._torch_has_lanczos", lambda: False)
    folder = folders[name]
    loaded = load_for_inference(folder, precision="float32")
    content = (REFS["wide"], "What is", REFS["square"], "this?")
    if name.startswith("idefics2"):
        content = ("What is this?", REFS["wide"], REFS["square"])
    messages = (Message(role="user", content=content),)
    processor, own = AutoProcessor.from_pretrained(folder), prompt_of(loaded.template, messages)
    pictures = [Image.open(io.BytesIO(png(name))) for name in ("wide", "square")]
    text = loaded.template.text(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == own.encoded.input_ids.tolist()
    tilings = [loaded.images.tiling(*one.size) for one in pictures]
    tiles = [loaded.images.cut(np.array(one.convert("RGB")), own) for one, own in zip(pictures, tilings, strict=True)]
    ours = loaded.model(
        input_ids=inputs["input_ids"], **loaded.model.generation_inputs([own.encoded], [tiles], [tilings])
    ).logits
    theirs = AutoModelForImageTextToText.from_pretrained(folder)(**inputs).logits
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max(), "which pixels that differ by 1 / 255 make"
    if name != "idefics3":
        return  # pixels that differ by 1 / 255 may write other words
    stop = loaded.tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE)
    never = [[index] for index in loaded.tokenizer.convert_tokens_to_ids(NEVER_WRITTEN) if index is not None]
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    written = plain.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=stop, bad_words_ids=never)
    expected = loaded.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert responder(loaded.model, loaded.template, max_new_tokens=12)(messages, None) == expected.strip() != ""


def test_a_prepared_base_has_the_image_settings_of_its_recipe(folders, tmp_path):
    FAMILY.weights.prepare_base(folders["idefics3"], tmp_path / "base", {"longest_edge": 192, "split": False})
    config = FAMILY.weights.load_config(tmp_path / "base")
    assert FAMILY.images(config).tiles == (192, 64, False)
    assert json.loads((tmp_path / "base" / "preprocessor_config.json").read_text())["do_image_splitting"] is False
    assert FAMILY.weights.load_model(tmp_path / "base").config.preprocessor == config.preprocessor


def test_a_base_that_lacks_a_token_or_a_row_or_has_another_tower_is_refused(folders, tokenizer, tmp_path):
    many = byte_tokenizer(tags=[f"<{number}>" for number in range(300)])
    tower = tiny_folder(tmp_path / "tower", tokenizer)
    (tower / "preprocessor_config.json").write_text('{"max_image_size": {"longest_edge": 32}}')
    cases = {
        "the tokenizer has 663 tokens, the model 512": tiny_folder(tmp_path / "rows", many),
        "the tokenizer has none of <.im_start.>, ": tiny_folder(tmp_path / "start", byte_tokenizer(start="<s>")),
        "tower: preprocessor_config.json cuts tiles of 32 pixels, the vision tower takes 64": tower,
    }
    for problem, folder in cases.items():
        with pytest.raises(UserError, match=problem):
            FAMILY.weights.prepare_base(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["smolvlm", "idefics2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": 128}, {"size": {"height": 64, "width": 64}}, {"size": {"longest_edge": "big"}},
        {"size": {"longest_edge": 0}}, {"size": {"longest_edge": 128.5}}, {"size": {"longest_edge": None}},
        {"do_image_splitting": "false"}, {"do_resize": False}, {"rescale_factor": 1}, {"image_mean": [0.48, 0.45, 0.4]},
        {"resample": 3}, [1],
    ],
)  # fmt: skip
def test_a_base_whose_pixels_are_made_otherwise_is_refused(folders, tmp_path, name, settings):
    folder = shutil.copytree(folders[name], tmp_path / "base")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    named = "damaged" if isinstance(settings, list) else f": {next(iter(settings))} is "
    with pytest.raises(UserError, match=f"preprocessor_config.json.*{named}"):
        family_at(folder).weights.load_config(folder)


def test_a_head_that_a_config_ties_without_cause_is_kept(folders, tmp_path):
    folder = shutil.copytree(folders["smolvlm"], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, ids = FAMILY.weights.load_model(folder), torch.arange(1, 9)[None]
    FAMILY.weights.save_model(model, tmp_path / "saved", torch.float32)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(saved(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_tied_head_is_trained_with_its_embeddings_or_not_at_all(folders):
    model = FAMILY.weights.load_model(folders["tied"])
    with pytest.raises(UserError, match="head is tied to its embeddings; name both, or neither"):
        FAMILY.weights.select_trainable(model, ["head"])
    assert FAMILY.weights.select_trainable(model, ["language"]) == ()


def test_settings_of_a_group_that_a_model_has_nothing_of_are_refused(folders, recipes):
    folder = folders["tied"]
    model = FAMILY.weights.load_model(folder)
    tied = OpenedModel(family=FAMILY, model=model, template=load_template(FAMILY, folder))
    asked = load_recipe(recipes / "smolvlm.yaml", ("training.groups={head: {learning_rate: 1e-3}}",))
    with pytest.raises(
        UserError, match=r"head has no weights of its own here \(vision, connector, embeddings, language have\)"
    ):
        choose_trained(asked, tied, print)


@pytest.mark.parametrize("name", ["idefics3", "idefics2"])
def test_in_4_bits_are_the_layers_of_the_language_model_alone(folders, name):
    weights = family_at(folders[name]).weights
    model = weights.load_model(folders[name], trained=(), frozen_dtype=torch.bfloat16, quantised=True)
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
def recipes(folders, tmp_path_factory):
    """A folder of pictures with questions, and a recipe for each tiny model."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("smolvlm", "idefics2"):
        write_recipe(folder, folders[name], name)
    return folder


HAS = "(known: vision, connector, language, embeddings, head)"
TARGETS = "(known: vision, vision.attention, vision.mlp, language, language.attention, language.mlp, connector)"
REFUSED = {
    ("model.trainable=[gates]",): f"model.trainable: smolvlm has no 'gates' {HAS}",
    ("model.trainable=[cross_attention]",): f"model.trainable: smolvlm has no 'cross_attention' {HAS}",
    ("model.mode=lora", "model.trainable=[resampler]"): f"model.trainable: smolvlm has no 'resampler' {HAS}",
    (
        "model.mode=qlora",
        "model.lora.targets=[language, gates]",
    ): f"model.lora.targets: smolvlm has no 'gates' {TARGETS}",
    ("training.groups={gates: {learning_rate: 1e-3}}",): f"training.groups: smolvlm has no 'gates' {HAS}",
    ("data.augment=crop",): "crop changes the tokens of a split image; set none, or model.images: {split: false}",
    ("data.feature_cache=true",): "data.feature_cache keeps what does not change, and vision is trained",
    ("data.feature_cache=true", "model.mode=lora", "model.lora.targets=[connector]"): "and connector is trained",
    ("model.images={longest_edge: 5000}",): "expected a number less than or equal to 4096, found 5000",
    ("model={path: a/b, family: idefics2, trainable: [resampler]}",): "idefics2 has no 'resampler' (known: vision,",
    ("model.images={shortest_edge: 9}",): "model.images: smolvlm has no 'shortest_edge'",
    ("model.images={resampler: 3}",): "model.images.resampler: unknown key",
    ("model.path=shipped:tiny_base",): "model_type is 'idefics'; model.family loads 'idefics3' or 'smolvlm'",
    (
        "model={path: a/b, family: idefics, images: {split: false}}",
    ): "model.images: idefics has no 'split' (known: none",
    ("model.family=idefics",): "model_type is 'smolvlm'; model.family loads 'idefics'",
}
"""What IDEFICS-1 has and SmolVLM has not, and the line that says so."""


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_what_a_family_has_not_is_refused_by_name(recipes, refusal, overrides):
    command = "plan" if "model_type" in REFUSED[overrides] else "validate"
    assert REFUSED[overrides] in refusal(command, recipes / "smolvlm.yaml", *overrides)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["smolvlm", "idefics2"])
def test_a_recipe_prepares_mixes_trains_and_answers(recipes, capsys, name):
    recipe = recipes / f"{name}.yaml"
    for command in ("validate", "prepare", "mix", "inspect", "plan"):
        assert status_of(command, recipe) == 0, capsys.readouterr().err
    assert status_of("train", recipe) == 0, capsys.readouterr().err
    run = recipes / f"out_{name}"
    lines = lines_of(run)
    assert len(lines) == 5 and lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["validation"]
    loaded = load_for_inference(run / "checkpoints" / "checkpoint-5", precision="float32")
    question = prompt_of(loaded.template, [Message(role="user", content=(REFS["wide"], "What is this?"))])
    (answer,) = generate(loaded.model, loaded.tokenizer, [question], max_new_tokens=8)
    assert answer.startswith("A")
    assert status_of("evaluate", run, "--data", recipes / "own.jsonl") == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared(recipes):
    """The recipe of a SmolVLM, whose stores and base are there."""
    assert status_of("prepare", recipes / "smolvlm.yaml") == 0
    return recipes / "smolvlm.yaml"


@pytest.mark.parametrize(("name", "overrides"), [
    ("smolvlm", ("model.mode=lora", "model.lora.r=4")),
    ("smolvlm", ("model.mode=qlora", "model.lora={r: 4, targets: [language.attention, connector, vision.mlp]}")),
    ("smolvlm", ("model.mode=lora", "data.feature_cache=true", "training.gradient_checkpointing=0.5")),
    ("smolvlm", ("model.trainable=[connector, embeddings]", "data.train_on=all", "model.images={split: false}")),
    ("idefics2", ("model.mode=qlora", "model.lora={r: 4, targets: [language, connector.mlp, vision.attention]}")),
    ("idefics2", ("model.mode=lora", "data.feature_cache=true", "model.images={split: true, shortest_edge: 32}")),
])  # fmt: skip
def test_every_way_to_train_learns_and_is_merged_and_asked(recipes, tmp_path, capsys, monkeypatch, name, overrides):
    prepared = recipes / f"{name}.yaml"
    own = (*overrides, f"output_dir={tmp_path}/run", "training.learning_rate=1e-2", "training.max_steps=4")
    own = (*own, "checkpoints.every_steps=2")  # held-out loss between steps
    assert status_of("train", prepared, *own) == 0, capsys.readouterr().err
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[1]["validation"]
    exact = ("--base-dtype", "fp32") if "lora" in overrides[0] else ()
    merged, _ = printed(capsys, "merge", tmp_path / "run", "--output", tmp_path / "merged", *exact, "--check")
    assert all(found["largest"] <= 1e-5 for name, found in merged["check"].items() if "4-bit" not in name)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(plain).__name__ == {"smolvlm": "SmolVLM", "idefics2": "Idefics2"}[name] + "ForConditionalGeneration"
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


@pytest.mark.parametrize("name", ["tied", "idefics2, split and tied"])
def test_a_tied_head_is_sharded_with_its_embeddings(folders, tmp_path, name):
    family = family_at(folders[name])
    model, template = family.weights.load_model(folders[name]), load_template(family, folders[name])
    batch = batch_of(template, SAMPLES)
    expected = model(batch=batch).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        get_engine("fsdp2").shard(model, "float32")
        assert model(batch=batch).loss.item() == pytest.approx(expected.item(), abs=1e-5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["idefics3", "idefics2"])
def test_doctor_sees_that_it_sees(folders, capsys, name):
    assert status_of("doctor", "--model", folders[name]) == 0, capsys.readouterr().out
    printed = " ".join(capsys.readouterr().out.split())
    assert "image changes logits" in printed and "there are none: images are part of the text" in printed


def test_a_family_outside_the_tree_is_found_by_its_dotted_name(prepared, tmp_path, capsys):
    outside = get_family("outside_family")
    assert outside.name == "outside" and outside.text is FAMILY.text
    assert status_of("validate", prepared, "model.family=outside_family") == 0, capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "else"}))
    recipe = load_recipe(prepared)
    model = recipe.model.model_copy(update={"family": "outside_family"})
    (tmp_path / "recipe.yaml").write_text(recipe.model_copy(update={"model": model}).to_yaml())
    assert family_at(tmp_path) == outside, "a checkpoint's recipe names its family"
