"""The packed forward: exact against each sample alone and against plain transformers; and what is written to disk."""

import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import (
    IMAGE_SIZE,
    base_tokenizer,
    batch_of,
    conversation,
    document,
    image_number,
    make_tiny_model,
    pixels_of,
    place,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import IdeficsConfig, IdeficsImageProcessor
from transformers import IdeficsForVisionText2Text as PlainIdefics
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm

from sft.core.errors import UserError
from sft.models import fused_layers
from sft.models.idefics.images import CLIP_MEAN, CLIP_STD, IdeficsImages, normalise
from sft.models.idefics.layers import FUSED
from sft.models.idefics.text import load_tokenizer
from sft.models.idefics.weights import EXTRA_EMBEDDING, EXTRA_HEAD, weights

TEXT = conversation("Hi.", "Hello.", system="A dog and a cat.")
DOG = conversation(("<dog>", "What is it?"), "A dog.")
SAME_DOG = conversation(("Describe this.", "<dog>"), "The lazy dog.", "Sure?", "Yes.")
TWO_IMAGES = conversation(("<cat>", "A cat.", "<dog>", "And this?"), "A dog.")
PAGE = document("A fox.", "<fox>", "The quick brown fox.", "<cat>", "A cat.")
SAMPLES = (TEXT, DOG, TWO_IMAGES, SAME_DOG, PAGE)

KEY_BIASES = ("k_proj.bias", "k_layer_norm.bias")
"""A bias on all keys moves all scores of a query alike: its gradient is zero but for rounding."""


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_gates_as_one(gradients):
    """The gates as one vector: each is a single number, whose gradient is a sum that may cancel to nearly nothing."""
    gates = [name for name in gradients if ".alpha_" in name]
    others = {name: gradient for name, gradient in gradients.items() if name not in gates}
    return others | {"gates": torch.cat([gradients[name] for name in gates])}


def step(model, batches):
    """Loss and gradients summed over `batches`."""
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in batches:
        output = model(batch=batch)
        output.loss.backward()
        loss += output.loss.item()
    return loss, gradients(model)


def losses_of(model, batch, source=0):
    """Per-token losses of one of the batch's sources."""
    with torch.no_grad():
        output = model(batch=batch)
    return output.token_losses_P[output.source_ids_P == source]


def plain_copy(model):
    """transformers' own model with the same weights."""
    plain = PlainIdefics(model.config.__class__.from_dict(model.config.to_dict()))
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    return plain.eval()


def plain_inputs(template, *samples):
    """One row for transformers' forward: the samples end to end, each image once per mention, the mask by hand."""
    encoded = [template.encode(sample) for sample in samples]
    images = [image for sample in samples for image in sample.images]
    pixels = [torch.from_numpy(pixels_of(image_number(image))) for image in images]
    input_ids = torch.cat([torch.from_numpy(e.input_ids) for e in encoded])
    mask = torch.zeros(len(input_ids), max(len(images), 1), dtype=torch.long)
    start = column = 0
    for e in encoded:
        end = start + len(e.input_ids)
        for position in e.image_positions:
            mask[start + position : end] = 0  # the last image at or before a token, of its own sample
            mask[start + position : end, column] = 1
            column += 1
        start = end
    return {
        "input_ids": input_ids[None],
        "attention_mask": torch.ones_like(input_ids)[None],
        "pixel_values": normalise(torch.stack(pixels or [torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)]))[None],
        "image_attention_mask": mask[None],
    }


def plain_losses(model, template, *samples):
    """Next-token losses over base and extra vocabulary by transformers' forward and a cross entropy written out."""
    inputs = plain_inputs(template, *samples)
    with torch.no_grad():
        logits = plain_copy(model)(**inputs).logits[0, :-1].double()
    targets = inputs["input_ids"][0, 1:]
    return (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).float()


def check_equal(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance


# ------------------------------------------------------------------------------------------------- packed = alone


@pytest.mark.parametrize(("train_on", "checkpointing"), [("assistant", False), ("all", False), ("assistant", True)])
def test_packed_equals_alone(model, template, train_on, checkpointing):
    placed = [place(template, sample) for sample in SAMPLES]
    packed = batch_of(placed[:3], placed[3:], train_on=train_on)
    total = packed.num_trained_tokens
    alone = [batch_of([sample], train_on=train_on, num_trained_tokens=total) for sample in placed]
    weights.select_trainable(model)
    expected_loss, expected = step(model, alone)

    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    loss, found = step(model, [packed])
    assert len(calls) == (2 if checkpointing else 1)

    assert packed.num_images == 3, "the dog and the cat are encoded once"
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    found, expected = with_gates_as_one(found), with_gates_as_one(expected)
    for name, gradient in found.items():
        if name.endswith(KEY_BIASES):
            assert gradient.norm() < 1e-6
        else:
            assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(
    "other",
    [
        conversation(("<cat>", "What is it?"), "A dog."),  # another image
        conversation(("<dog>", "Describe this image, a red circle."), "The fox."),  # another text, longer
        TEXT,  # no image at all
        SAME_DOG,  # an image that the neighbour looks at too
    ],
    ids=["image", "text", "no image", "shared image"],
)
def test_a_sample_does_not_feel_its_neighbours(model, template, other):
    neighbours = [place(template, SAME_DOG, source=1), place(template, TEXT, source=2)]
    before = batch_of([place(template, DOG), *neighbours])
    after = batch_of([place(template, other), *neighbours])
    for source in (1, 2):
        check_equal(losses_of(model, after, source), losses_of(model, before, source), 1e-6)


# --------------------------------------------------------------------------------- packed = transformers' own forward


@pytest.mark.parametrize("sample", SAMPLES, ids=["text", "image", "two images", "turns", "document"])
def test_packed_equals_plain_transformers(model, template, sample):
    pack = batch_of([place(template, TWO_IMAGES, source=1), place(template, sample)])
    check_equal(losses_of(model, pack), plain_losses(model, template, sample), 1e-5)


def test_the_loss_divides_the_sum_by_the_tokens_of_the_step(model, template):
    losses = plain_losses(model, template, DOG)
    batch = batch_of([place(template, DOG)], num_trained_tokens=1000)
    assert model(batch=batch).loss.item() == pytest.approx(losses.sum().item() / 1000, rel=1e-5)
    extra = batch.input_ids_T[1:] >= model.config.vocab_size
    assert extra.sum() == 5, "<fake> <image> <fake> and two <end_of_utterance> are predicted too"


def test_a_batch_without_labels_has_a_loss_of_zero(model, template):
    """All its samples are dirty."""
    batch = batch_of([place(template, DOG)], num_trained_tokens=5)
    nothing = torch.full_like(batch.labels_T, -100)
    loss, found = step(model.train(), [replace(batch, labels_T=nothing)])
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())


def test_without_isolation_a_pack_is_one_text_but_images_stay_with_their_sample(model, template):
    placed = [place(template, DOG), place(template, TEXT), place(template, TWO_IMAGES)]
    batch = batch_of(placed, pack_isolation=False)
    assert batch.position_ids_T.tolist() == list(range(len(batch.input_ids_T)))
    found = losses_of(model, batch)

    as_one = plain_losses(model, template, DOG, TEXT, TWO_IMAGES)  # positions run on, one causal mask over all
    check_equal(found, as_one, 1e-5)  # the `<s>` after each `</s>` among it, as in 2023
    assert batch.num_trained_tokens == len(as_one)
    isolated = batch_of(placed)
    inside = isolated.labels_T[1:] != -100
    assert (found[inside] - losses_of(model, isolated)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- the image matters


def test_pixels_are_normalised_as_by_transformers():
    image = pixels_of(1)
    (expected,) = IdeficsImageProcessor(image_size=IMAGE_SIZE)([Image.fromarray(image.transpose(1, 2, 0))])
    (found,) = normalise(torch.from_numpy(image)[None])
    check_equal(found, torch.as_tensor(expected), 1e-6)


def test_normalising_in_place_gives_the_same_bits_and_spares_its_input():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(normalise(levels), (levels.float() / 255 - mean) / std)
    values = torch.ones(1, 3, 1, 1)
    normalise(values)
    assert (values == 1).all()


def test_the_backward_pass_of_a_norm_gives_a_gpu_numbers_of_one_type():
    """Half-precision heads are normed by float32 weights; the kernel of a GPU refuses the two together."""
    backward, seen = torch.ops.aten.native_layer_norm_backward, []
    norm = IdeficsRMSNorm(8)
    fused_layers.replace_layers(norm, FUSED)
    gradients = []
    for mixes in (True, False):
        x = torch.linspace(-1, 2, 24).view(3, 8).bfloat16().requires_grad_()
        spy = lambda *given: seen.append({x.dtype for x in (given[0], given[1], given[5])}) or backward(*given)  # noqa: E731
        with (
            patch.object(fused_layers, "_mixes_types", lambda x, mixes=mixes: mixes),
            patch.object(torch.ops.aten, "native_layer_norm_backward", spy),
            torch.autocast("cpu", torch.bfloat16),
        ):
            (norm(x) * torch.linspace(1, 2, 8)).sum().backward()
        gradients.append(x.grad)
    assert seen == [{torch.bfloat16, torch.float32}, {torch.float32}]
    assert gradients[0].dtype == gradients[1].dtype == torch.bfloat16
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.01)


def test_an_image_of_idefics_9b_costs_23_tokens():
    config = IdeficsConfig(
        cross_layer_interval=4, use_resampler=True, qk_layer_norms=True, vision_config={"embed_dim": 1280},
        perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True},
    )  # fmt: skip
    tower = 257 * 32 * (4 * 1280**2 + 2 * 1280 * 5120)
    resampler = 6 * (64 * (2 * 1280 * 1536 + 8 * 1280**2) + 321 * 2 * 1280 * 1536)
    read = 64 * 8 * 2 * 1280 * 4096
    mlp = 3 * 4096 * 11008
    token = 32 * (4 * 4096**2 + mlp) + 8 * (2 * 4096**2 + mlp)
    by_hand = (tower + resampler + read) / token  # without norms and biases
    assert by_hand == pytest.approx(23, abs=0.5)
    assert IdeficsImages(config).cost_in_tokens == pytest.approx(by_hand, rel=0.002)
    plain = IdeficsConfig(cross_layer_interval=4, vision_config={"embed_dim": 1280})
    without_resampler = (tower + 257 * 8 * 2 * 1280 * 4096) / token
    assert IdeficsImages(plain).cost_in_tokens == pytest.approx(without_resampler, rel=0.002)


def test_an_image_changes_what_follows_it_and_nothing_else(model, template):
    question = ("Describe this.", "<dog>", "And this?")
    before = conversation((*question, "<cat>", "The same?"), "No.")
    after = conversation((*question, "<fox>", "The same?"), "No.")
    pack = [place(template, sample, source) for source, sample in enumerate((before, TEXT, DOG))]
    swapped = [place(template, after), *pack[1:]]
    image = pack[0].encoded.image_positions[1]  # loss i is of token i + 1, seen from token i
    difference = (losses_of(model, batch_of(pack)) - losses_of(model, batch_of(swapped))).abs()
    assert difference[:image].max() < 1e-6
    assert difference[image:].min() > 1e-6
    for source in (1, 2):
        check_equal(losses_of(model, batch_of(swapped), source), losses_of(model, batch_of(pack), source), 1e-6)


# ------------------------------------------------------------------------------------------------- what is trained


def test_every_trainable_tensor_gets_a_gradient(model, template):
    frozen = weights.select_trainable(model)
    assert frozen == ("model.vision_model.post_layernorm.weight", "model.vision_model.post_layernorm.bias")
    _, found = step(model, [batch_of([place(template, sample) for sample in SAMPLES])])
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if name not in found} == set(frozen)
    assert not any(parameters[name].requires_grad for name in frozen)
    assert [name for name, gradient in found.items() if not gradient.any() and not name.endswith(KEY_BIASES)] == []
    for extra in (EXTRA_EMBEDDING, EXTRA_HEAD):
        assert found[extra].any(dim=1).tolist() == [True] * 3, "each of the extra tokens"


def test_text_alone_needs_no_image_and_skips_the_tower(model, template):
    weights.select_trainable(model)
    batch = batch_of([place(template, TEXT)])
    assert batch.num_images == 0
    _, found = step(model, [batch])
    assert not any(name.startswith(("model.vision_model", "model.perceiver_resampler")) for name in found)
    assert found["model.gated_cross_attn_layers.0.mlp.up_proj.weight"].any(), "the gated MLP still trains"


# ------------------------------------------------------------------------------------------------- on disk


def test_a_saved_model_opens_in_plain_transformers(model, tokenizer, template, tmp_path):
    weights.save_model(model, tmp_path, torch.bfloat16)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["IdeficsForVisionText2Text"]

    plain = PlainIdefics.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    ours = weights.load_model(tmp_path)
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    for loaded in (plain, ours):
        assert all(torch.equal(tensor, rounded[name]) for name, tensor in loaded.state_dict().items())
    inputs = plain_inputs(template, TWO_IMAGES)
    with torch.no_grad():
        check_equal(ours(**inputs).logits, plain(**inputs).logits, 1e-5)
    written = [m.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False) for m in (plain, ours)]
    assert written[0].tolist() == written[1].tolist()
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base folder as published: two extra tokens, weights in several shards."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = base_tokenizer()
    model = make_tiny_model(tokenizer, extra=2)
    weights.save_model(model, folder, torch.float32)
    model.save_pretrained(folder, max_shard_size="150KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_preparing_a_base_adds_a_row_and_changes_nothing_else(base, template, tmp_path):
    untouched = contents(base)
    weights.prepare_base(base, tmp_path / "grown")
    assert contents(base) == untouched

    old = PlainIdefics.from_pretrained(base, dtype=torch.float32)
    new = PlainIdefics.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    inputs = plain_inputs(template, document("A fox.", "<fox>", "The quick brown fox."))
    with torch.no_grad():
        assert torch.equal(new(**inputs).logits[..., :-1], old(**inputs).logits)
    mean = old.model.embed_tokens.weight.mean(0)
    for rows in (new.model.embed_tokens.additional_embedding.weight, new.lm_head.additional_fc.weight):
        assert len(rows) == new.config.additional_vocab_size == 3
        torch.testing.assert_close(rows[2], mean, rtol=0, atol=1e-7)
    tokenizer = load_tokenizer(tmp_path / "grown")
    assert tokenizer.convert_tokens_to_ids("<end_of_utterance>") == old.config.vocab_size + 2


def test_preparing_a_base_rewrites_only_the_shards_that_grow(base, tmp_path):
    weights.prepare_base(base, tmp_path / "grown")
    shards = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    growing = {shards[EXTRA_EMBEDDING], shards[EXTRA_HEAD]}
    linked = {name for name in set(shards.values()) if (tmp_path / "grown" / name).samefile(base / name)}
    assert len(set(shards.values())) > 3
    assert linked == set(shards.values()) - growing


def test_a_prepared_base_is_prepared_to_itself(base, tmp_path):
    weights.prepare_base(base, tmp_path / "once")
    weights.prepare_base(tmp_path / "once", tmp_path / "twice")
    weights.prepare_base(base, tmp_path / "twice_over")
    weights.prepare_base(base, tmp_path / "twice_over")
    assert contents(tmp_path / "twice") == contents(tmp_path / "once") == contents(tmp_path / "twice_over")


def test_a_shard_that_lacks_what_the_index_says_is_refused(base, tmp_path):
    """transformers would invent the weight."""
    folder = shutil.copytree(base, tmp_path / "base")
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / shards["model.norm.weight"]
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, model\.norm\.weight among them"):
        weights.load_model(folder)


def test_a_missing_shard_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: not readable as safetensors"):
        weights.load_model(folder)


def test_a_base_that_is_damaged_is_not_prepared(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name}: not readable as safetensors"):
        weights.prepare_base(folder, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_another_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for refuses in (weights.load_model, lambda path: weights.prepare_base(path, tmp_path / "grown")):
        with pytest.raises(UserError) as error:
            refuses(tmp_path)
        assert str(error.value) == f"{tmp_path}: model_type is 'llama'; model.family loads 'idefics'"


def test_an_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(UserError) as error:
        weights.load_model(tmp_path)
    assert str(error.value) == f"{tmp_path}: no config.json found; expected a model folder or a hub id"


def test_a_dummy_changes_no_gradient_and_gives_every_parameter_one(model, template):
    """So that ranks without an image or a label walk through the same modules as the others."""
    weights.select_trainable(model)
    pack = [place(template, conversation("Hi.", "Hello."))]
    alone, whole = batch_of(pack), batch_of(pack, always_whole=True)
    assert len(whole.input_ids_T) == len(alone.input_ids_T) + 2
    gradients = []
    for batch in (alone, whole):
        model.zero_grad(set_to_none=True)
        loss = model(batch=batch).loss
        loss.backward()
        gradients.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, own), (same_loss, all_of_them) = gradients
    torch.testing.assert_close(same_loss, loss)
    for name, gradient in all_of_them.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if own[name] is None else own[name])
    assert any(gradient is None for gradient in own.values())
