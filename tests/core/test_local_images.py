"""Which file a record names: below the folder of the images, or a skip that says what was found."""

from pathlib import Path

import pytest

from sft.core.images import local_image
from sft.core.sample import SkipSample


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of images, reached through a link, with links inside it and out of it."""
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("real/a.jpg", "real/sub/b.jpg", "outside/c.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "images").symlink_to("real")
    for name, target in (
        ("in.jpg", "sub/b.jpg"),
        ("out.jpg", "../outside/c.jpg"),
        ("away", "../outside"),
        ("again", "sub"),
    ):
        (tmp_path / "real" / name).symlink_to(target)
    return tmp_path / "images"


@pytest.mark.parametrize(
    "name", ["a.jpg", "sub/b.jpg", "./a.jpg", "sub/../a.jpg", "in.jpg", "again/b.jpg", "not there.jpg"]
)
def test_a_path_inside_the_folder_is_taken_as_it_is(folder, name):
    for _ in range(2):
        assert local_image(folder, name).source == folder / name
    assert local_image(folder, str(folder / "a.jpg")).source == folder / "a.jpg"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("{outside}/c.jpg", "is absolute"),
        ("../outside/c.jpg", "has .."),
        ("sub/../../outside/c.jpg", "has .."),
        ("..", "has .."),
        ("out.jpg", "follows a symbolic link"),
        ("away/c.jpg", "follows a symbolic link"),
        ("away/not there.jpg", "follows a symbolic link"),
    ],
)
def test_a_path_that_leaves_the_folder_says_how_and_what_to_do(folder, name, found):
    with pytest.raises(SkipSample, match="image path leaves the folder") as caught:
        local_image(folder, name.format(outside=folder.parent / "outside"))
    assert found in caught.value.detail
    assert f"the images' folder is {folder} (option image_folder names another)" in caught.value.detail


@pytest.mark.parametrize(
    ("name", "reason", "found"),
    [
        ("https://x.org/a.jpg", "image is not a local path", "is a URL, and none is fetched"),
        ("file:///a.jpg", "image path leaves the folder", "is absolute"),
        ({"src": "a.jpg"}, "image is not a local path", "{'src': 'a.jpg'}; expected a path below the images' folder"),
        ("sub\\b.jpg", "image file missing", "has backslashes, as Windows writes paths"),
        ("a.jpg ", "image file missing", "or blanks around it"),
        ("\ud83d.jpg", "image is not a local path", r"\ud83d"),
        ("a\0", "image is not a local path", r"\x00"),
        (" ", "image is not a local path", "' '"),
        (7, "image is not a local path", "7"),
    ],
)
def test_what_is_no_path_below_the_folder_is_named(folder, name, reason, found):
    with pytest.raises(SkipSample, match=reason) as caught:
        local_image(folder, name)
    assert found in caught.value.detail


def test_a_file_url_below_the_folder_is_the_path_in_it(folder):
    assert local_image(folder, f"file://{folder}/a.jpg").source == folder / "a.jpg"
