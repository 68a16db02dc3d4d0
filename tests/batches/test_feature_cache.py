"""The feature cache changes no loss but by float16's rounding, and no state of it changes anything at all."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch_of, conversation, place, toy_images
from helpers.processes import assert_same_steps, sft
from helpers.resume import assert_same_state, folder_of, metrics, recipe_of, trained
from helpers.sources import BLUE, GREEN, RED, key_of
from helpers.training import write_recipe
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import IdeficsConfig
from two_processes import OPTIONS

from sft.batches.collate import collate
from sft.batches.feature_cache import Encoder, FeatureCache, fingerprint
from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.cost.idefics.cost import trained_config
from sft.models.idefics.family import FAMILY
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.weights import weights
from sft.models.image_transform import load_tiles
from sft.recipe import load_recipe
from sft.training.cached_features import open_feature_cache
from sft.training.open_model import OpenedModel

SHAPE = (2, 3)


class Toy:
    """Images of two states of three numbers."""

    depends_on_size, one_tile, state_size = False, None, 3

    def num_states(self, tiling):
        return 2


TOY = Toy()
CACHED = ("model.mode=lora", "data.feature_cache=on", "data.validation=null")


def features(number: float) -> np.ndarray:
    return np.full(SHAPE, number, np.float16)


def kept(cache, key):
    """What the cache has of an image, None where it has nothing."""
    found = cache.read(key)
    return None if found is None else found.tolist()


@pytest.fixture
def stores(sources):
    return [part.store for own in sources.parts for part in own]


def files_of(store) -> dict[str, Path]:
    return {file.suffix: file for file in (store.path / "features").iterdir()}


# ---------------------------------------------------------------------------------------------------------- the files


def test_features_are_kept_by_image_for_whoever_looks(stores):
    cache = FeatureCache(stores, "tower", TOY)
    assert kept(cache, key_of(RED)) is None
    cache.write(key_of(RED), features(7))  # of all three stores
    cache.write(key_of(GREEN), features(-0.5))
    again = pickle.loads(pickle.dumps(cache))
    for one in (cache, again, FeatureCache(stores[::-1], "tower", TOY)):
        assert kept(one, key_of(RED)) == features(7).tolist()
        assert kept(one, key_of(GREEN)) == features(-0.5).tolist()
        assert kept(one, key_of(BLUE)) is kept(one, key_of(b"another")) is None
        assert one.count() == (2, 3)
    assert kept(FeatureCache(stores, "other", TOY), key_of(RED)) is None


def test_the_file_is_a_plain_array_in_the_order_of_the_images(stores):
    store = stores[1]
    cache = FeatureCache([store], "tower", TOY)
    for number, key in enumerate(store.image_keys.tolist()):
        cache.write(key, features(number))
    mapped = np.memmap(files_of(store)[".f16"], np.float16, "r").reshape(-1, *SHAPE)
    assert mapped[:, 0, 0].tolist() == [0, 1]


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 2 * 2 * 3), old=st.sampled_from([None, 1.0]), sums=st.booleans())
def test_what_was_not_written_to_its_end_is_not_there(stores, size, old, sums):
    """A kill, a full disk, or another process in the middle of the same record: some bytes are new, others not."""
    cache, key = FeatureCache(stores[:1], "tower", TOY), key_of(RED)
    files = files_of(stores[0])
    before = {name: bytes(file.stat().st_size) for name, file in files.items()}
    if old is not None:
        cache.write(key, features(old))
        before = {name: file.read_bytes() for name, file in files.items()}
    cache.write(key, features(2))
    torn = files[".f16"].read_bytes()[:size] + before[".f16"][size:]
    whole = torn == files[".f16"].read_bytes()
    files[".f16"].write_bytes(torn)
    if not sums:
        files[".xxh3"].write_bytes(before[".xxh3"])
    expected = features(2).tolist() if whole and sums else None
    if old is not None and torn == before[".f16"] and not sums:
        expected = features(old).tolist()
    assert kept(cache, key) == kept(FeatureCache(stores[:1], "tower", TOY), key) == expected


def test_a_record_of_another_image_is_not_read(stores):
    store = stores[1]
    cache = FeatureCache([store], "tower", TOY)
    red = store.find_image(key_of(RED))
    cache.write(key_of(BLUE), features(3))
    for file in files_of(store).values():  # as if rows had moved
        halves = [file.read_bytes()[: file.stat().st_size // 2], file.read_bytes()[file.stat().st_size // 2 :]]
        file.write_bytes(halves[1 - red] * 2)
    assert kept(cache, key_of(BLUE)) and kept(cache, key_of(RED)) is None


def test_the_fingerprint_is_of_everything_that_bears_on_features(model):
    def of(model, precision="float32", **changes):
        settings = weights.encoder_settings(model.config) | changes
        return fingerprint(model.model.vision_model.named_parameters(), {"model": settings, "precision": precision})

    found = {of(model), of(model, "bfloat16"), of(model, use_resampler=False)}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert of(model) in found, "the language model does not"
        model.model.vision_model.embeddings.class_embedding[3].add_(1e-3)
    assert len({*found, of(model), of(model.to(torch.bfloat16))}) == 5


# --------------------------------------------------------------------------------------------------- batch and encoder


class Shelf:
    """A cache in memory."""

    def __init__(self, known=None):
        self.state_size, self.known = 64, dict(known or {})
        self.full = False

    def read(self, key):
        return self.known.get(key)

    def write(self, key, features):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.known[key] = features.copy()


def loss_of(model, batch) -> float:
    with torch.no_grad():
        return model(batch=batch).loss.item()


def encoder_of(model, shelf, said=None):
    return Encoder(model, shelf, torch.no_grad, (said if said is not None else []).append)


SAMPLES = (
    conversation(("<dog>", "What is it?"), "A dog."),
    conversation(("<cat>", "A cat.", "<dog>", "And this?"), "A dog.", ("<fox>", "Sure?"), "Yes."),
    conversation("Hi.", "Hello."),
)


def test_any_mixture_of_known_and_unknown_images_gives_the_same_loss(model, template):
    packs = [[place(template, sample) for sample in SAMPLES]]
    exact = loss_of(model, batch_of(*packs))
    shelf = Shelf()
    cold = batch_of(*packs, features=shelf)
    assert len(cold.to_encode) == len(cold.tiles[0]) == 3
    model.train()
    expected = encoder_of(model, shelf)(cold)
    assert model.training
    assert len(shelf.known) == 3 and not expected.to_encode and not expected.tiles
    assert loss_of(model, expected) == pytest.approx(exact, rel=1e-3)
    assert loss_of(model, expected) != exact, "rounded"
    for number in range(1, 8):
        some = Shelf({key: value for i, (key, value) in enumerate(shelf.known.items()) if number >> i & 1})
        batch = batch_of(*packs, features=some)
        assert sum(map(len, batch.tiles)) == 3 - number.bit_count()
        assert torch.equal(encoder_of(model, some)(batch).features_RE, expected.features_RE)
    shelf.known.update(dict.fromkeys(shelf.known, np.ones((8, 64), np.float16)))
    late = encoder_of(model, shelf)(cold)
    assert (late.features_RE == 1).all(), "what came to be known since the batch was made is not encoded again"


def test_dummies_and_images_that_fail_are_zeros_and_not_kept(model, template):
    def fails(image):
        raise SkipSample("image does not decode")

    shelf, options = (
        Shelf(),
        {"train_on": "all", "always_whole": True, "num_trained_tokens": 9},
    )
    for packs, rows in (([], 1), ([[place(template, SAMPLES[2])]], 1), ([[place(template, SAMPLES[0])]], 2)):
        batch = collate(packs, toy_images(fails), features=shelf, forgive_images=True, **options)
        whole = encoder_of(model, shelf)(batch)
        assert whole.features_RE.shape == (rows * 8, 64) and not whole.features_RE.any()
        assert not whole.to_encode and not shelf.known and np.isfinite(loss_of(model, whole))


def test_text_alone_needs_no_features(model, template):
    batch = batch_of([place(template, SAMPLES[2])], features=Shelf())
    assert len(batch.features_RE) == 0
    assert loss_of(model, batch) == loss_of(model, batch_of([place(template, SAMPLES[2])]))


def test_features_that_float16_cannot_hold_stay_exact_and_are_not_kept(model, template):
    with torch.no_grad():
        model.model.perceiver_resampler.layer_norm.weight.mul_(1e6)
    packs, shelf, said = [[place(template, sample) for sample in SAMPLES]], Shelf(), []
    exact = loss_of(model, batch_of(*packs))
    whole = encoder_of(model, shelf, said)(batch_of(*packs, features=shelf))
    assert whole.features_RE.dtype == torch.float32 and not shelf.known
    assert loss_of(model, whole) == pytest.approx(exact, rel=1e-6)
    assert said == ["features of an image are over float16's 65,504; such images are encoded each time"]


def test_a_full_disk_is_told_once_and_training_goes_on(model, template):
    packs, shelf, said = [[place(template, sample) for sample in SAMPLES]], Shelf(), []
    expected = encoder_of(model, Shelf())(batch_of(*packs, features=Shelf()))
    shelf.full = True
    encoder = encoder_of(model, shelf, said)
    for _ in range(2):
        assert torch.equal(encoder(batch_of(*packs, features=shelf)).features_RE, expected.features_RE)
    (line,) = said
    assert "no more features are kept" in line and "No space left on device" in line


def test_a_store_that_cannot_be_written_is_read(stores, monkeypatch):
    FeatureCache(stores, "tower", TOY).write(key_of(RED), features(5))
    opened = os.open

    def read_only(file, flags, *mode):
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(file, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    cache = FeatureCache(stores, "tower", TOY)
    assert kept(cache, key_of(RED)) == features(5).tolist() and cache.count() == (1, 3)
    with pytest.raises(OSError, match="Read-only"):
        cache.write(key_of(BLUE), features(5))
    assert FeatureCache(stores, "other", TOY).count() == (0, 3)


# --------------------------------------------------------------------------------------------------------- whole runs


OF_CHECKS = 2
"""Images that are encoded by what is looked at before every training."""


@pytest.fixture
def work(monkeypatch):
    """Counts images that are encoded, and decoded."""
    done = {"encoded": 0, "decoded": 0}
    encode, decode = PackedIdefics.encode_images, "sft.batches.image_source.load_tiles"

    def encoded(self, tiles, tilings):
        done["encoded"] += sum(map(len, tiles))
        return encode(self, tiles, tilings)

    def decoded(*arguments):
        done["decoded"] += 1
        return load_tiles(*arguments)

    monkeypatch.setattr(PackedIdefics, "encode_images", encoded)
    monkeypatch.setattr(decode, decoded)

    def since() -> dict[str, int]:
        found = dict(done)
        done.update(encoded=0, decoded=0)
        return found

    return since


def losses(recipe):
    return [line["loss"] for line in metrics(recipe)]


@pytest.mark.slow
def test_an_image_is_encoded_once_and_losses_are_those_without_a_cache(tmp_path, work):
    epochs = ("training.max_steps=6", "training.precision=float32")
    plain = recipe_of(tmp_path / "run", *CACHED, *epochs, "data.feature_cache=off", f"output_dir={tmp_path / 'plain'}")
    trained(plain)
    assert work()["encoded"] - OF_CHECKS > 10, "five images, again and again"
    cached = [
        recipe_of(tmp_path / "run", *CACHED, *epochs, *more, f"output_dir={tmp_path / str(number)}")
        for number, more in enumerate([(), ("data.num_workers=1",), ("model.mode=qlora",)])
    ]
    trained(cached[0])
    assert work() == {"encoded": 5 + OF_CHECKS, "decoded": 5}
    assert losses(cached[0]) == pytest.approx(losses(plain), rel=1e-3)
    assert losses(cached[0]) != losses(plain), "rounded"
    for recipe in cached[1:]:  # a second run; another recipe with the same tower
        trained(recipe)
        assert work() == {"encoded": OF_CHECKS, "decoded": 0}
    assert metrics(cached[1]) == metrics(cached[0])
    assert losses(cached[2]) != losses(cached[0])


@pytest.mark.slow
def test_a_run_with_a_break_is_the_run_without_whatever_became_of_the_cache(tmp_path):
    whole, broken = (recipe_of(tmp_path / name, *CACHED, "model.lora.dropout=0.1") for name in ("whole", "broken"))
    trained(whole)
    trained(broken, until=2)
    for file in Path(broken.data.store).glob("*/features/*.xxh3"):
        file.write_bytes(bytes(8) + file.read_bytes()[8:])  # the first image of each store is gone
    trained(broken, resume_from=folder_of(broken, 2))
    assert metrics(broken) == metrics(whole)
    assert_same_state(folder_of(broken, 4), folder_of(whole, 4))


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_write_the_same_cache(tmp_path):
    """Some ranks have no pack, some none with images, some none to encode: none waits for another."""
    file, stores = write_recipe(tmp_path), tmp_path / "stores"
    options = (*OPTIONS, *CACHED, "training.max_steps=4")
    alone = load_recipe(file, (*options, f"output_dir={tmp_path / 'alone'}"))
    trained(alone)
    expected = {file: file.read_bytes() for file in stores.glob("*/features/*")}
    for folder in {file.parent for file in expected}:
        shutil.rmtree(folder)
    together = tmp_path / "together"
    done = sft("train", file, f"output_dir={together}", *options, "--nproc", 2, "--json", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert_same_steps(together, tmp_path / "alone")
    assert {file: file.read_bytes() for file in stores.glob("*/features/*")} == expected


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.mode=full",), "data.feature_cache keeps what does not change, and vision is trained"),
        (("model.lora.targets=[resampler.mlp]",), "and resampler is trained; leave it out of model.trainable"),
        (("model.trainable=[resampler]",), "and resampler is trained"),
        (("data.augment=crop",), "feature_cache keeps whole images, and augment is crop; leave one of them out"),
    ],
)
def test_a_cache_of_what_changes_is_refused_in_a_line(tmp_path, refusal, overrides, expected):
    mode = ("model.mode=lora", "data.feature_cache=on")
    assert expected in refusal("validate", write_recipe(tmp_path), *mode, *overrides)


def test_full_training_without_the_tower_may_have_one(tmp_path):
    values = load_recipe(write_recipe(tmp_path), ("data.feature_cache=on", "model.trainable=[language,gates]"))
    assert values.data.feature_cache


def test_a_tower_that_is_sharded_has_no_cache(sources, model, template, tmp_path):
    opened = OpenedModel(family=FAMILY, model=model, template=template)
    recipe = load_recipe(write_recipe(tmp_path), CACHED)
    with pytest.raises(UserError, match=r"data\.feature_cache: zero3 shards the tower"):
        open_feature_cache(recipe, opened, sources, "zero3", print)


def test_an_image_of_idefics_9b_takes_164_kilobytes():
    config = IdeficsConfig.from_dict(trained_config("HuggingFaceM4/idefics-9b"))
    images = IdeficsImages(config)
    assert 2 * images.num_states(images.one_tile) * images.state_size == 163_840
    config.use_resampler = False
    assert (images.num_states(images.one_tile), images.state_size) == (257, 1280)
