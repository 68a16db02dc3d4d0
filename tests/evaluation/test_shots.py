"""Shots: whose images are alike, and what groups of items share."""

import json

import numpy as np
import pytest
import torch
from conftest import loaded_of, status_of
from PIL import Image

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.core.shipped import resolve
from sft.evaluation import alike
from sft.evaluation.alike import clip, find_alike, nearest, tower, vectors_of
from sft.evaluation.prompts import TaskItem
from sft.evaluation.rank_answers import _forwards, _plan
from sft.evaluation.results import Outcome, Result
from sft.evaluation.run_tasks import score_model
from sft.evaluation.shots import Shots, random_order
from sft.evaluation.tasks import NamedTask, open_tasks
from sft.recipe import EvaluationConfig

RED, GREEN, BLUE, PINK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 60, 60)


def image(folder, name, colour):
    file = folder / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(file)
    return ImageRef(source=file)


def item(name, *images, cluster=None):
    return TaskItem(id=name, answers=("x",), images=images, cluster=cluster or name)


def toy(tmp_path):
    """Three items and four that may be shown: vectors on a circle, by hand."""
    angles = {"q": 0, "r": 90, "none": None, "a": 80, "b": 10, "c": 10, "d": 45}
    refs = {name: ImageRef(source=tmp_path / name) for name, angle in angles.items() if angle is not None}
    vectors = {
        ref: np.array([np.cos(np.radians(angles[name])), np.sin(np.radians(angles[name]))], np.float32)
        for name, ref in refs.items()
    }
    items = [item("q", refs["q"]), item("r", refs["r"], cluster="a"), item("none")]
    support = [item(name, refs[name]) for name in "abcd"] + [item("e")]
    return items, support, vectors


def test_the_nearest_come_first_of_equals_the_first_and_none_of_the_own_cluster(tmp_path):
    items, support, vectors = toy(tmp_path)
    found = nearest(items, support, vectors, 3)
    assert found.tolist() == [[1, 2, 3], [3, 1, 2], [-1, -1, -1]] and found.dtype == np.int32
    assert nearest(items, support, {}, 2).tolist() == [[-1, -1]] * 3
    assert nearest(items, support, vectors, 6).tolist()[0] == [1, 2, 3, 0, -1, -1]


def test_the_most_alike_is_shown_last_and_items_without_an_image_are_drawn(tmp_path):
    items, support, vectors = toy(tmp_path)
    drawn = random_order(len(support), "key")
    shots = Shots(support, 2, drawn)
    rows = nearest(items, support, vectors, 2)
    shots.prefer({own.id: [n for n in row if n >= 0] for own, row in zip(items, rows, strict=True)}, "toy")
    assert [shot.id for shot in shots.of(items[0])] == ["c", "b"]
    assert [shot.id for shot in shots.of(items[2])][::-1] == [support[n].id for n in drawn(items[2])][:2]
    assert shots.num_at_random == 1
    shots.number = 5  # more than are listed: the others are drawn
    assert [shot.id for shot in shots.of(items[0])][3:] == ["c", "b"]
    assert sorted(shot.id for shot in shots.of(items[0])) == list("abcde")


def test_the_tower_finds_images_alike_and_what_does_not_decode_is_left_out(tmp_path, model, template, monkeypatch):
    monkeypatch.setattr(alike, "BATCH", 2)
    refs = [image(tmp_path, name, colour) for name, colour in [("r", RED), ("g", GREEN), ("p", PINK)]]
    broken = ImageRef(source=tmp_path / "broken.png")
    broken.source.write_bytes(b"no image")
    done = []
    encode = tower(loaded_of(model, template))
    found = vectors_of([*refs, broken], encode, lambda *args: done.append(args))
    assert list(found) == refs and done == [(2, 4), (4, 4)]
    for vector in found.values():
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    with torch.inference_mode():
        alone = encode([refs[1]])[0].numpy()
    assert np.allclose(found[refs[1]], alone / np.linalg.norm(alone), atol=1e-5)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A tiny random CLIP as a whole and as its vision half alone."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 16, "projection_dim": 8}
    text = small | {"vocab_size": 20, "projection_dim": 8}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    half = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    half.load_state_dict(whole.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("clips")
    for name, own in (("whole", whole), ("half", half)):
        own.save_pretrained(folder / name)
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / name)
    return folder


def test_clip_gives_the_embeddings_of_transformers_whole_or_as_its_vision_half(tmp_path, clips):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ref = image(tmp_path, "r", RED)
    pixels = CLIPImageProcessorPil.from_pretrained(clips / "whole")(Image.open(ref.source), return_tensors="pt")
    with torch.inference_mode():
        features = CLIPModel.from_pretrained(clips / "whole").get_image_features(**pixels).pooler_output[0]
    expected = (features / features.norm()).numpy()
    for name in ("whole", "half"):
        assert np.allclose(vectors_of([ref], clip(str(clips / name)), print)[ref], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "no config.json"),
        (str(resolve("shipped:tiny_base")), "model_type is 'idefics'; expected clip or clip_vision_model"),
    ],
)
def test_a_folder_that_is_no_clip_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        clip(name)


def write_sst2(folder):
    for split, colours in (("test", [RED, GREEN]), ("train", [BLUE, PINK, GREEN])):
        for number, colour in enumerate(colours):
            label = ("positive", "negative")[number % 2]
            image(folder / split / label, str(number), colour)
    return folder


def opened(folder, **shots):
    settings = EvaluationConfig(shots={"number": 1, "select": "rices", **shots}, prompt="base")
    (task,) = open_tasks([NamedTask("rendered_sst2", str(folder))], settings, folder)
    return task


def test_lists_are_made_once_kept_and_the_same_for_other_models(tmp_path, monkeypatch, model, template, clips):
    monkeypatch.setenv("IDEFICS_SFT_CACHE", str(tmp_path / "cache"))
    data, base = write_sst2(tmp_path / "sst2"), resolve("shipped:tiny_base")
    loaded = loaded_of(model, template)
    for name in ("run_tasks", "alike"):
        monkeypatch.setattr(f"sft.evaluation.{name}.find_family", lambda path: loaded.family)
        monkeypatch.setattr(f"sft.evaluation.{name}.load_template", lambda family, path: template)
    task = opened(data)
    (result,) = score_model(base, [task], load=lambda path: loaded)
    summary = task.summary(result)
    (file,) = (tmp_path / "cache" / "rices").glob("*.npy")
    assert np.load(file).shape == (2, 32) and summary["shots_at_random"] == 0
    assert summary["shots_alike_by"] == f"tiny_base ({file.stem[:8]})"
    shown = [task.shots_drawn.of(own)[0].id for own in task.items]
    again, by_clip = opened(data), opened(data, features=str(clips / "half"))
    with monkeypatch.context() as patched:
        patched.setattr(alike, "vectors_of", lambda *args: pytest.fail("they are read back"))
        score_model(base, [again], load=lambda path: loaded)
        score_model(tmp_path, [again], load=lambda path: loaded)  # of another model: the first one's stay
    assert [again.shots_drawn.of(own)[0].id for own in again.items] == shown
    with pytest.raises(AssertionError):
        by_clip.shots_drawn.of(by_clip.items[0])
    for colour in (BLUE, (0, 0, 250)):  # another image: other lists
        image(data / "train" / "positive", "0", colour)
        find_alike(by_clip, base, None, lambda path: loaded, print)
        assert by_clip.shots_drawn.alike_by.startswith("half")
    assert len(list((tmp_path / "cache" / "rices").glob("*.npy"))) == 3


def test_features_without_rices_are_refused():
    with pytest.raises(ValueError, match=r"shots\.features says which images are alike; set select: rices"):
        EvaluationConfig(shots={"number": 1, "features": "clip"})


# ------------------------------------------------------------------------------------------------------------- groups


def result_of(groups):
    """Scores by group; two items an image."""
    outcomes = [
        Outcome(
            item=f"{name}{n}", cluster=f"{name}{n // 2}", image_sha256="", category="", score=s, details={"group": name}
        )
        for name, scores in groups.items()
        for n, s in enumerate(scores)
    ]
    return Result(benchmark="toy", protocol_hash="", outcomes=tuple(outcomes))


def test_the_spread_of_groups_is_said_without_the_noise_of_their_items():
    # Means 1 and 0 of two images each, without noise: the standard deviation is that of (1, 0), sqrt(1 / 2).
    sure = result_of({"a": [1, 1, 1, 1], "b": [0, 0, 0, 0]})
    (spread,) = sure.spread_of_groups().values()
    assert list(sure.spread_of_groups()) == ["std beyond noise over 2 groups of shots"]
    assert spread == pytest.approx(0.5**0.5)
    # Errors by image sqrt(4 * 1^2) / 8 and by group sqrt(2 * 2^2) / 8: the larger is taken.
    assert sure.standard_error == pytest.approx(8**0.5 / 8)
    # Each group has an image of hits and one of misses: all of it is noise, and images make the larger error.
    noisy = result_of({"a": [1, 1, 0, 0], "b": [0, 0, 1, 1]})
    assert noisy.spread_of_groups() == {"std beyond noise over 2 groups of shots": 0}
    assert noisy.standard_error == pytest.approx(0.25)
    assert result_of({"a": [1, 0, 1]}).spread_of_groups() == {}


def tokens_of(folder, template, select):
    """The distinct tokens of all forwards over the images of one split, after 4 shots each."""
    settings = EvaluationConfig(shots={"number": 4, "select": select, "groups": 2}, prompt="base")
    (task,) = open_tasks([NamedTask("rendered_sst2", str(folder))], settings, folder)
    paths, _, _ = _plan(template, [query for queries in task.all_queries() for query in queries], None)
    return [len(forward.tokens_T) for forward in _forwards(paths, 10_000)], task


def test_the_shots_of_a_group_are_computed_once_a_forward(tmp_path, template):
    for number in range(12):
        image(tmp_path / "test" / "positive", f"q{number}", (number, 0, 0))
        image(tmp_path / "train" / "negative", f"s{number}", (0, number, 0))
    (alone,), task = tokens_of(tmp_path, template, "random")
    (shared,), groups = tokens_of(tmp_path, template, "groups")
    lengths = []
    for shown in (task, opened(tmp_path, number=0)):
        (query,) = shown.queries(shown.items[0])
        lengths.append(len(template.encode_prompt(query.sample.messages).input_ids))
    assert {groups.shots_drawn.group(own) for own in groups.items} == {"0", "1"}
    assert alone - shared >= 0.8 * 10 * (lengths[0] - lengths[1])  # 2 beginnings for 12; some are alike by chance


def test_a_run_keeps_the_lists_of_its_prepared_base(copied, tmp_path, capsys):
    data = write_sst2(tmp_path / "sst2")
    asked = [f"rendered_sst2={data}", "--shots", "1", "--select", "rices", "--no-baseline", "--json"]
    assert status_of("evaluate", copied, "--task", *asked) == 0
    (file,) = (copied / "evaluations" / "rices").glob("*.npy")
    by = json.loads(capsys.readouterr().out)["shots_alike_by"]
    assert by.endswith(f"({file.stem[:8]})") and "checkpoint" not in by
