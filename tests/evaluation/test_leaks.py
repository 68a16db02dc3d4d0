"""A benchmark's images in prepared datasets: the same bytes, the same picture, and others."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import status_of
from helpers.files import write_tsv
from helpers.stores import Toys, prepared, shown
from PIL import Image

from sft.core.images import decode_rgb
from sft.evaluation import leaks
from sft.evaluation.leaks import MAX_DISTANCE, benchmark_images, find_leaks, perceptual_hash, summary
from sft.evaluation.tasks import named_tasks, open_tasks
from sft.evaluation.tasks.mmbench.questions import read_tsv
from sft.recipe import EvaluationConfig


def scene(seed: int) -> Image.Image:
    """Soft blobs: a picture with features, whose lowest frequencies are its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def images_of(file):
    settings = EvaluationConfig(benchmark=str(file), protocol="card")
    return benchmark_images(*open_tasks(named_tasks(settings), settings, Path("stores")))


def benchmark(folder, contents):
    """A TSV with a question for each image, two for the first."""
    rows = [
        {"index": n, "question": "q", "A": "a", "B": "b", "answer": "A", "image": base64.b64encode(content).decode()}
        for n, content in enumerate([*contents, contents[0]])
    ]
    file = write_tsv(folder / "questions.tsv", rows[0])
    with file.open("a") as lines:
        lines.writelines("\t".join(map(str, row.values())) + "\n" for row in rows[1:])
    return file


def test_a_hash_has_32_bits_set_and_one_colour_has_no_features():
    found = perceptual_hash(saved(scene(0)))
    assert found.bits.bit_count() == 32 and found.has_features
    assert not perceptual_hash(saved(Image.new("RGB", (32, 32), "teal"))).has_features


def distance(first: bytes, second: bytes) -> int:
    return (perceptual_hash(first).bits ^ perceptual_hash(second).bits).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_near_and_other_pictures_are_far(seed):
    image = scene(seed)
    for copy in (image.resize((224, 224)), image.resize((80, 60)), image.convert("L")):
        assert distance(saved(image), saved(copy, "JPEG", quality=50)) <= MAX_DISTANCE
    assert distance(saved(image), saved(scene(seed + 100))) > MAX_DISTANCE


@pytest.fixture
def leaking(tmp_path):
    """A benchmark of four images, of which a store has one by its bytes, one compressed anew, and neither others."""
    contents = [saved(scene(0)), saved(scene(1)), saved(scene(2)), saved(Image.new("RGB", (32, 32), "teal"))]
    samples = [
        shown("same/0", contents[0], "A scene."),
        shown("copy/0", saved(scene(1).resize((160, 120)), "JPEG"), "A scene."),
        shown("copy/1", saved(scene(1).resize((160, 120)), "JPEG"), "Again."),
        shown("other/0", saved(scene(3)), "Another."),
        shown("plain/0", saved(Image.new("RGB", (32, 32), "navy")), "Blue."),
    ]
    return benchmark(tmp_path, contents), prepared(tmp_path, Toys(*samples)).path


def test_images_are_found_by_their_bytes_and_by_sight_with_their_questions_and_samples(leaking):
    file, store = leaking
    images = images_of(file)
    assert images.questions == ((0, 4), (1,), (2,), (3,)), "the first image has two questions"
    by_content, by_sight = find_leaks(images, store).leaks
    assert (by_content.by, by_content.distance, by_content.questions) == ("content", 0, (0, 4))
    assert by_content.samples == ("same/0",)
    assert by_sight.by == "sight" and by_sight.distance <= MAX_DISTANCE and by_sight.questions == (1,)
    assert by_sight.samples == ("copy/0", "copy/1")
    counts = summary("toy", images, [find_leaks(images, store)])
    assert (counts["leaked_images"], counts["leaked_questions"], counts["images_without_features"]) == (2, 3, 1)
    assert (counts["stores"][0]["by_content"], counts["stores"][0]["by_sight"]) == (1, 1)


@pytest.mark.skipif("IDEFICS_SFT_SAMPLES" not in os.environ, reason="IDEFICS_SFT_SAMPLES names no real samples")
def test_real_photographs_are_found_in_every_size_and_no_two_are_alike(tmp_path):
    file = Path(os.environ["IDEFICS_SFT_SAMPLES"]) / "mmbench_samples" / "mmbench_samples.tsv"
    rows = read_tsv(file)
    samples = [
        shown(f"{row.index}/{width}", saved(decode_rgb(row.image.source).resize((width, 200)), "JPEG", quality=60))
        for row in rows
        for width in (160, 300)
    ]
    found = find_leaks(images_of(file), prepared(tmp_path, Toys(*samples)).path).leaks
    expected = sorted((row.question_index, f"{row.index}/{width}") for row in rows for width in (160, 300))
    assert sorted((leak.questions[0], leak.samples[0]) for leak in found) == expected


def test_pieces_and_processes_change_nothing(leaking, monkeypatch):
    images = images_of(leaking[0])
    whole = find_leaks(images, leaking[1])
    monkeypatch.setattr(leaks, "_PIECE", 2)
    assert find_leaks(images, leaking[1]) == whole
    monkeypatch.undo()
    assert find_leaks(images, leaking[1], num_proc=2) == whole


def test_the_command_prints_counts_and_ids(leaking, capsys, refusal, tmp_path):
    file, store = leaking
    assert status_of("leaks", file, store, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["leaked_questions"] == 3 and found["stores"][0]["leaks"][1]["samples"] == ["copy/0", "copy/1"]
    assert status_of("leaks", file, store) == 0
    printed = capsys.readouterr().out
    assert "2 images are in them; 3 questions (60.0 %)" in printed
    assert "question 0, 4: same bytes as" in printed and "in same/0" in printed
    assert "no prepared dataset here" in refusal("leaks", file, store, tmp_path)
    assert "nowhere.tsv: No such file" in refusal("leaks", "nowhere.tsv", store)


def test_an_image_that_is_gone_is_counted(leaking, monkeypatch):
    images = images_of(leaking[0])

    def unreadable(self, row):
        raise leaks.SkipSample("image file missing")

    monkeypatch.setattr(leaks.Store, "image_bytes", unreadable)
    found = find_leaks(images, leaking[1])
    assert found.unreadable == found.images == 4
    assert [leak.by for leak in found.leaks] == ["content"]
