"""Encoded images to pixels: the training crop, the distance from transformers' pixels, images out of the ordinary."""

import io
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import square_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from sft.core import images
from sft.core.images import DOES_NOT_DECODE, TOO_MANY_PIXELS, TOO_NARROW, decode_rgb, size_of, verified
from sft.core.sample import Decoding, SkipSample
from sft.models import image_transform
from sft.models.image_transform import Crop, load_tiles, training_crop

AS_STORED = Decoding(orientation="ignore")


def load_pixels(content, size, crop=None):
    """The one tile of an image of IDEFICS."""
    return load_tiles(content, square_images(size), crop and (lambda width, height: crop))[0]


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def distance(left, right):
    """Mean absolute difference."""
    return np.abs(np.asarray(left, dtype=float) - np.asarray(right, dtype=float)).mean()


def to_pixels(image, size):
    """Squashed by Pillow."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def colour(loaded):
    """The one colour of all pixels."""
    assert (loaded == loaded[:, :1, :1]).all()
    return tuple(loaded[:, 0, 0].tolist())


# ------------------------------------------------------------------------------------------- close to the reference


def noise(width, height):
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([128 + 90 * np.sin(x / 30 + y / period) for period in (7, 20, 60)], axis=-1)
    noisy = waves + np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def letters(width, height):
    image = Image.new("RGB", (width, height), "white")
    for y in range(0, height, 16):
        ImageDraw.Draw(image).text((2, y), "sharp edges " * (width // 60), "black", ImageFont.load_default(12))
    return image


def gradient(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([255 * x // width, 255 * y // height, 0 * x], axis=-1).astype(np.uint8))


def reference(content, size):
    """What transformers resizes to, before it normalises."""
    processor = IdeficsImageProcessorPil(image_size=size, do_rescale=False, do_normalize=False)
    return np.asarray(processor([Image.open(io.BytesIO(content))], return_tensors="np")[0])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(640, 480), (480, 1000), (224, 224), (100, 80)], ids=str)
@pytest.mark.parametrize("picture", [noise, letters, gradient])
def test_evaluation_is_within_one_level_of_transformers(picture, size, format):
    content = encoded(picture(*size), format)
    assert distance(load_pixels(content, 224), reference(content, 224)) < 1  # of 255


@pytest.mark.parametrize("picture", [noise, letters, gradient])
def test_a_crop_is_within_one_level_of_cropping_and_resizing_with_pillow(picture):
    content = encoded(picture(640, 480), "JPEG")
    crop = Crop(13, 7, 631, 470)
    assert distance(load_pixels(content, 224, crop), to_pixels(decode_rgb(content).crop(crop), 224)) < 1


def test_a_crop_of_the_whole_image_is_the_image():
    content = encoded(noise(50, 40), "JPEG")
    assert (load_pixels(content, 30, Crop(0, 0, 50, 40)) == load_pixels(content, 30)).all()


def test_a_crop_shows_what_is_in_the_box():
    image = Image.new("RGB", (8, 4), "white")
    image.paste((255, 0, 0), (2, 1, 5, 4))
    assert colour(load_pixels(encoded(image), 6, Crop(2, 1, 5, 4))) == (255, 0, 0)


@pytest.mark.parametrize("crop", [Crop(0, 0, 9, 4), Crop(-1, 0, 8, 4), Crop(3, 3, 3, 4)], ids=str)
def test_a_crop_that_is_not_in_the_image_is_a_bug(crop):
    with pytest.raises(ValueError, match="not inside an image of 8 x 4"):
        load_pixels(encoded(Image.new("RGB", (8, 4))), 6, crop)


def test_pixels_do_not_depend_on_threads():
    content, threads = encoded(noise(300, 200), "JPEG"), torch.get_num_threads()
    loaded = []
    for number in (1, 4):
        torch.set_num_threads(number)
        loaded.append(load_pixels(content, 224))
    torch.set_num_threads(threads)
    assert (loaded[0] == loaded[1]).all()


# ------------------------------------------------------------------------------------------------ the training crop

sides = st.integers(1, 3000)


def crops(width, height, number):
    return [training_crop(width, height, seed=0, step=step, image_key=7) for step in range(number)]


def test_the_crop_depends_on_seed_step_and_image_alone():
    key = {"seed": 1, "step": 3, "image_key": 5}
    crop = training_crop(1000, 900, **key)
    assert crop == training_crop(1000, 900, **key) == (21, 1, 978, 883)  # on every machine
    for change in ({"seed": 2}, {"step": 4}, {"image_key": 8}):
        assert training_crop(1000, 900, **key | change) != crop


@given(width=sides, height=sides, seed=st.integers(), step=st.integers(0), image_key=st.integers(0, 2**63 - 1))
def test_the_crop_is_inside_the_image(width, height, seed, step, image_key):
    left, top, right, bottom = training_crop(width, height, seed=seed, step=step, image_key=image_key)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(height=st.integers(200, 2000), shape=st.floats(0.8, 1.25), step=st.integers(0))
def test_the_crop_has_nine_tenths_of_an_ordinary_image_or_more(height, shape, step):
    width = round(height * shape)
    crop = training_crop(width, height, seed=0, step=step, image_key=7)
    w, h = crop.right - crop.left, crop.bottom - crop.top
    assert 0.89 < w * h / (width * height) <= 1
    assert 0.74 < w / h < 1.35


@pytest.mark.parametrize(
    ("size", "central"),
    [((2000, 300), (800, 0, 1200, 300)), ((300, 2000), (0, 800, 300, 1200)), ((1, 40), (0, 19, 1, 20))],
    ids=str,
)
def test_the_crop_of_a_wide_or_tall_image_is_the_central_one_of_an_allowed_aspect(size, central):
    assert set(crops(*size, 50)) == {central}


def torchvision_crop(rng, width, height):
    """RandomResizedCrop.get_params of torchvision, as width, height, left and top."""
    for _ in range(10):
        area = width * height * rng.uniform(0.9, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if w <= width and h <= height:
            return w, h, rng.integers(width - w + 1), rng.integers(height - h + 1)
    return width, height, 0, 0  # for an image of an allowed aspect


@pytest.mark.parametrize("size", [(640, 480), (1000, 1000)], ids=str)
def test_crops_are_distributed_as_those_of_torchvision(size):
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    theirs = np.array([torchvision_crop(rng, *size) for _ in range(3000)]).T
    ours = np.array([(c.right - c.left, c.bottom - c.top, c.left, c.top) for c in crops(*size, 3000)]).T
    for one, other in zip(ours, theirs, strict=True):
        assert ks_2samp(one, other).pvalue > 0.01


def test_a_step_after_another_gives_another_crop_mostly():
    drawn = crops(1000, 1000, 200)
    assert sum(one == other for one, other in pairwise(drawn)) < 20  # both the whole image: 1 in 7, squared


# ------------------------------------------------------------------------------------------ images out of the ordinary


def half_clear():
    """Red that is not there, in every mode that can say so."""
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    return {
        "RGBA": encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
        "LA": encoded(Image.new("LA", (4, 4), (0, 0))),
        "P": encoded(palette, transparency=0),
        "GIF": encoded(palette, "GIF", transparency=0),
        "WEBP": encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "WEBP", lossless=True),
    }


@pytest.mark.parametrize("mode", list(half_clear()))
def test_transparency_is_laid_over_white(mode):
    assert colour(load_pixels(half_clear()[mode], 6)) == (255, 255, 255)


def test_half_transparency_is_half_white():
    red, green, blue = colour(load_pixels(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128))), 6))
    assert (red, green, blue) == (255, 127, 127)


def sixteen_bits():
    return Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))


ODD = {
    "L": encoded(noise(64, 48).convert("L")),
    "1": encoded(noise(64, 48).convert("1")),
    "P": encoded(noise(64, 48).convert("P")),
    "16 bit": encoded(sixteen_bits()),
    "JPEG L": encoded(noise(64, 48).convert("L"), "JPEG"),
    "JPEG CMYK": encoded(noise(64, 48).convert("CMYK"), "JPEG"),
    "JPEG progressive": encoded(noise(64, 48), "JPEG", progressive=True),
    "JPEG RGB": encoded(noise(64, 48), "JPEG", keep_rgb=True),
    "JPEG 4:4:4": encoded(noise(64, 48), "JPEG", subsampling=0),
    "JPEG of odd size": encoded(noise(63, 47), "JPEG"),
    "BMP": encoded(noise(64, 48), "BMP"),
    "1x1": encoded(Image.new("RGB", (1, 1), "red")),
    "1x40": encoded(noise(1, 40)),
    "JPEG 1x1": encoded(Image.new("RGB", (1, 1), "red"), "JPEG"),
    "JPEG 40x1": encoded(noise(40, 1), "JPEG"),
    "JPEG 2000x40": encoded(noise(2000, 40), "JPEG"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_every_kind_of_image_is_as_pillow_has_it(name):
    loaded = load_pixels(ODD[name], 56)
    assert (loaded.shape, loaded.dtype) == ((3, 56, 56), np.uint8)
    assert distance(loaded, to_pixels(decode_rgb(ODD[name]), 56)) < 0.1


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_scaled_to_8(byte_order):
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=byte_order)
    decoded = np.asarray(decode_rgb(encoded(Image.fromarray(levels))))
    assert decoded.tolist() == [[[level] * 3 for level in (0, 1, 128, 255)]]


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(load_pixels(content, 6)) == (255, 0, 0)


# --------------------------------------------------------------------------------------------------- as it is shown


def oriented(orientation, format, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(64, 48), format, exif=exif, **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_as_exif_says(orientation, format):
    content = oriented(orientation, format)
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert size_of(content) == verified(content).size == seen.size == decode_rgb(content).size
    assert (np.asarray(decode_rgb(content)) == np.asarray(seen)).all()
    assert distance(load_pixels(content, 56), to_pixels(seen, 56)) < 1


def test_orientation_can_be_ignored():
    content = oriented(6, "JPEG")
    loaded = load_tiles(content, square_images(56), decoding=AS_STORED)[0]
    assert (loaded == load_pixels(encoded(noise(64, 48), "JPEG"), 56)).all()
    assert size_of(content, AS_STORED) == (64, 48) and size_of(content) == (48, 64)
    assert distance(loaded, reference(content, 56)) < 0.1, "as transformers' processor, which leaves it to its callers"


def test_a_crop_is_of_the_image_as_it_is_seen():
    boxes = []
    load_tiles(oriented(6, "JPEG"), square_images(56), lambda *size: boxes.append(size) or Crop(0, 0, 48, 64))
    assert boxes == [(48, 64)]


TURNED = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def test_exif_of_a_png_may_follow_its_pixels():
    content = encoded(noise(64, 48))
    chunk = struct.pack(">I", len(TURNED)) + b"eXIf" + TURNED + struct.pack(">I", zlib.crc32(b"eXIf" + TURNED))
    assert size_of(content[:-12] + chunk + content[-12:]) == (48, 64)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"MM",
        b"no TIFF at all",
        TURNED[:-9],  # ends inside the entry
        TURNED.replace(b"\x08", b"\xf0"),  # begins behind its end
        TURNED.replace(b"\x12\x01\x03", b"\x12\x01\x02"),  # a text
        TURNED.replace(b"\x06", b"\x09"),
    ],
)
def test_broken_exif_is_no_orientation(exif):
    content = encoded(noise(64, 48), "JPEG", exif=b"Exif\0\0" + exif)
    assert size_of(content) == decode_rgb(content).size == (64, 48)


def test_a_jpeg_of_telephones_may_hold_others():
    content = encoded(noise(64, 48), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 12))])
    assert distance(load_pixels(content, 56), load_pixels(encoded(noise(64, 48), "JPEG"), 56)) == 0


def test_a_large_jpeg_is_decoded_smaller(monkeypatch):
    whole = load_pixels(LARGE, 56)
    monkeypatch.setattr(images, "MAX_DECODED_PIXELS", 640 * 480 // 4)
    sizes = []
    load_tiles(LARGE, square_images(56), lambda *size: sizes.append(size) or Crop(0, 0, *size))
    assert sizes == [(320, 240)] and decode_rgb(LARGE).size == (320, 240) and size_of(LARGE) == (640, 480)
    assert distance(load_pixels(LARGE, 56), whole) < 1


LARGE = encoded(noise(640, 480), "JPEG")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_is_read_by_a_library_that_may_not_be_there(monkeypatch, brand):
    content = bytes(4) + b"ftyp" + brand + bytes(4) + b"mif1heic"
    monkeypatch.setattr(images, "can_read_heic", lambda: False)
    with pytest.raises(SkipSample, match=r"needs pillow-heif; pip install 'idefics-sft\[heic\]'"):
        decode_rgb(content)


def test_heic_is_read():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    content = encoded(gradient(64, 48), "HEIF", quality=95)
    assert verified(content).size == (64, 48)
    assert distance(load_pixels(content, 56), load_pixels(encoded(gradient(64, 48)), 56)) < 3
    with pytest.raises(SkipSample, match=DOES_NOT_DECODE):
        verified(content[:-200])


# ----------------------------------------------------------------------------------------------------------- damage

JPEG = encoded(noise(64, 48), "JPEG")
TIFF = encoded(noise(4, 4), "TIFF")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image does not decode"),
        (JPEG[:10], "image does not decode"),
        (JPEG[: len(JPEG) // 2], "image does not decode"),
        (TIFF, "image is TIFF, which is not read; expected JPEG, PNG, WEBP, GIF, BMP, AVIF or HEIC"),
        (encoded(Image.new("1", (8126, 8000))), TOO_MANY_PIXELS),
        (encoded(Image.new("L", (8126, 8000)), "JPEG"), TOO_MANY_PIXELS),
        (encoded(Image.new("RGB", (51, 1)), "JPEG"), TOO_NARROW),
    ],
    ids=["empty", "no header", "cut", "format", "pixels", "pixels of a JPEG", "narrow"],
)
def test_an_image_that_is_not_fit_has_the_reason_it_had_in_the_store(content, reason):
    for load in (decode_rgb, lambda content: load_pixels(content, 56)):
        with pytest.raises(SkipSample) as caught:
            load(content)
        assert caught.value.reason == reason


def test_limits_are_checked_before_a_jpeg_is_decoded(monkeypatch):
    monkeypatch.setattr(image_transform.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(SkipSample, match="too many pixels") as caught:
        load_tiles(JPEG, square_images(56), decoding=Decoding(max_pixels=64 * 48 - 1))
    assert caught.value.detail == "64 x 48, over the 3,071 of data.images.max_pixels"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_may_lack_its_end_marker_and_nothing_else(mode, options):
    """libjpeg fills what is not there with grey; a viewer that shows it is no reason to train on it."""
    content = encoded(noise(64, 48).convert(mode), "JPEG", **options)
    whole = load_pixels(content, 56)
    for lost in (1, 2):
        assert verified(content[:-lost]).lacks_end
        assert (load_pixels(content[:-lost], 56) == whole).all()
    assert not verified(content).lacks_end and not verified(content + b"\0\r\n").lacks_end
    scans = [at for at in range(len(content)) if content[at : at + 2] == b"\xff\xda"]
    for end in (len(content) - 3, len(content) - 4, len(content) - 20, len(content) // 2, *scans[-1:], 100, 2):
        for load in (verified, decode_rgb, lambda content: load_pixels(content, 56)):
            with pytest.raises(SkipSample, match=DOES_NOT_DECODE):
                load(content[:end])


def test_a_progressive_jpeg_without_its_fine_scans_is_cut():
    content = encoded(noise(64, 48), "JPEG", progressive=True)
    coarse = content.find(b"\xff\xc4", content.find(b"\xff\xda"))  # the tables of the second scan
    with pytest.raises(SkipSample, match=DOES_NOT_DECODE):
        verified(content[:coarse])


def test_a_jpeg_with_stray_bytes_is_read_as_pillow_reads_it():
    content = JPEG[:20] + b"\0\0" + JPEG[20:]  # between two headers
    with pytest.raises(ValueError, match="extraneous"):
        image_transform.simplejpeg.decode_jpeg(content)
    assert (load_pixels(content, 56) == load_pixels(JPEG, 56)).all()
