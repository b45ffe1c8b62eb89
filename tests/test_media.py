"""Pictures as they are stored: whatever the mode, the depth and the way up, what is seen is what a viewer would show.

pytest tests/test_media.py
"""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yojo.core.config import ImageConfig
from yojo.core.image import images_to_patches
from yojo.files import InputError
from yojo.media import open_picture, picture_size


def test_a_pipe_is_no_picture(tmp_path):
    """It would be waited for."""
    os.mkfifo(tmp_path / "p.png")
    for path in (tmp_path / "p.png", "/dev/zero"):
        with pytest.raises(InputError, match="is no file"):
            open_picture(path)


GREY = np.linspace(0, 255, 24 * 32).round().astype(np.uint8).reshape(24, 32)  # from black to white: zeros see nothing
UPRIGHT = Image.fromarray(GREY).convert("RGB")


def grey_of(picture) -> np.ndarray:
    """The grey levels that are seen; all three channels alike."""
    seen = np.asarray(open_picture(picture))
    assert seen.dtype == np.uint8 and (seen == seen[..., :1]).all()
    return seen[..., 0].astype(int)


@pytest.mark.parametrize("mode", "L P RGB RGBA CMYK YCbCr HSV LA PA La RGBa RGBX I F I;16 I;16B".split())
def test_a_gradient_looks_the_same_in_every_mode(mode):
    via = {"PA": "P", "La": "LA", "RGBa": "RGBA", "I;16B": "I;16"}  # what Pillow converts from
    picture = Image.fromarray(GREY).convert(via.get(mode, mode))
    picture = (
        picture.convert(mode) if mode != "I;16B" else Image.frombytes(mode, (32, 24), GREY.astype(">u2").tobytes())
    )
    assert abs(grey_of(picture) - GREY).max() <= 1


def test_black_and_white_are_black_and_white():
    assert set(grey_of(UPRIGHT.convert("1")).flatten().tolist()) == {0, 255}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_any_mode_from_one_pixel_upwards(mode, size):
    seen = images_to_patches([open_picture(Image.new(mode, size))], ImageConfig(size=56, margins=(1, 1), max_crops=4))
    assert seen.patches.isfinite().all() and seen.patches.abs().max() <= 1


DEEP = GREY.astype(np.uint32)


@pytest.mark.parametrize(
    "levels",
    [
        DEEP.astype(np.uint16),
        (DEEP * 4).astype(np.uint16),
        (DEEP * 16).astype(np.uint16),
        (DEEP * 64).astype(np.uint16),
        (DEEP * 256).astype(np.uint16),
        (DEEP * 257).astype(np.uint16),
        DEEP.astype(np.int32),
        (DEEP * 257).astype(np.int32),
        (GREY / 255).astype(np.float32),
        GREY.astype(np.float32),
    ],
    ids="8in16 10in16 12in16 14in16 16in16 to65535 8in32 16in32 0..1 0..255".split(),
)
def test_more_than_8_bits_are_scaled_by_the_range_of_the_data(tmp_path, levels):
    for suffix in ("tif", "png") if levels.dtype == np.uint16 else ("tif",):
        Image.fromarray(levels).save(path := tmp_path / f"deep.{suffix}")
        assert (grey_of(path) == GREY).all()


@pytest.mark.parametrize(
    "levels, why",
    [
        (GREY.astype(np.float32) / 127.5 - 1, "holds grey levels from -1.0 to 1.0, in F: scale or clip them to 0..255"),
        (GREY.astype(np.float32) * 257, "to 65535.0, in F"),
        (np.full((4, 4), np.nan, np.float32), "from nan to nan"),
        (np.full((4, 4), np.inf, np.float32), "to inf"),
        (GREY.astype(np.int32) - 1, "from -1 to 254, in I"),
        (GREY.astype(np.int32) * 65_536, "to 16711680, in I"),
    ],
    ids=str,
)
def test_levels_of_no_usual_range_are_refused(tmp_path, levels, why):
    Image.fromarray(levels).save(tmp_path / "odd.tif")
    with pytest.raises(InputError, match=f"odd.tif .*{why}"):
        open_picture(tmp_path / "odd.tif")


def test_floats_may_miss_their_range_by_an_eighth():
    """As resizing overshoots. Not by more: 1.2 may also be the brightest level of a dark picture."""
    for most in (1, 255):
        small = Image.fromarray(np.float32([[0, most] * 4] * 8))
        ringing = small.resize((40, 40), Image.Resampling.BICUBIC)
        assert np.asarray(ringing).max() > most and grey_of(ringing).max() == 255 and grey_of(ringing).min() == 0
    for most in (1.2, 10.0):
        with pytest.raises(InputError, match="holds grey levels from 0.0 to .* in F"):
            open_picture(Image.fromarray((GREY / 255 * most).astype(np.float32)))


def png_of(levels: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write; kind: 2 RGB, 4 grey and alpha, 6 RGBA."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    height, width, _ = levels.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    pieces = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + pieces


@pytest.mark.parametrize("kind, channels", [(2, 3), (6, 4), (4, 2)])
def test_16_bits_a_colour_are_seen_where_they_are_used_and_refused_where_not(kind, channels):
    """Pillow keeps the upper 8 bits: of data in 0..1023 nothing is left."""
    for bits in (8, 10, 12, 16):
        levels = np.repeat((DEEP << (bits - 8))[..., None], channels, 2)
        if channels % 2 == 0:
            levels[..., -1] = 65_535
            levels[0, 0] = 0  # and black, where it cannot be seen
        data = png_of(levels, kind)
        if bits == 16:
            assert (grey_of(data).flatten()[1:] == GREY.flatten()[1:]).all()
        else:
            with pytest.raises(InputError, match="star.png has 16 bits a colour and uses the lower ones only"):
                open_picture(data, "star.png")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_an_animation_is_no_picture(tmp_path, suffix):
    UPRIGHT.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[Image.new("RGB", UPRIGHT.size)])
    for read in (open_picture, picture_size):
        with pytest.raises(InputError, match=f"a.{suffix} holds 2 frames: show it as a video"):
            read(tmp_path / f"a.{suffix}")


def test_a_picture_of_a_phone_holds_itself_several_times(tmp_path):
    UPRIGHT.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", UPRIGHT.size)], quality=100)
    assert abs(grey_of(tmp_path / "a.jpg") - GREY).max() <= 3


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(InputError, match="has no pixels"):
        open_picture(Image.new("RGB", (0, 0)))


def test_a_deep_picture_that_counts_from_white_is_refused(tmp_path):
    Image.fromarray((DEEP * 257).astype(np.uint16)).save(tmp_path / "negative.tif", tiffinfo={262: 0})
    with pytest.raises(InputError, match="negative.tif: 0 is white in it"):
        open_picture(tmp_path / "negative.tif")


def test_what_can_be_seen_through_is_laid_on_white(tmp_path):
    rgba = Image.new("RGBA", (4, 1))
    for x, pixel in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 51)]):
        rgba.putpixel((x, 0), pixel)
    expected = [(255, 0, 0), (255, 255, 255), (255, 255, 255), (204, 204, 204)]
    rgba.save(tmp_path / "a.png")
    for picture in (rgba, tmp_path / "a.png"):
        seen = open_picture(picture)
        assert [seen.getpixel((x, 0)) for x in range(4)] == expected
    assert grey_of(Image.fromarray(np.uint8([[[9, 255], [9, 0]]]), "LA")).tolist() == [[9, 255]]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16"])
def test_one_transparent_colour_is_white(tmp_path, mode):
    """PNG and GIF can name one colour that is not there."""
    picture = Image.fromarray(np.uint8([[0, 100, 200]])).convert(mode)
    name, suffix = ((0, 0, 0) if mode == "RGB" else 0), ("gif" if mode == "P" else "png")
    picture.save(tmp_path / f"t.{suffix}", transparency=name)
    assert grey_of(tmp_path / f"t.{suffix}").tolist() == [[255, 100, 200]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("number", [*range(10), 6000])
def test_upright_means_the_same_for_the_size_and_for_the_pixels(tmp_path, suffix, number):
    """EXIF numbers eight ways to hold a camera; any other number turns nothing. Pillow turns TIFFs itself."""
    path, exif = tmp_path / f"photo.{suffix}", Image.Exif()
    exif[0x0112] = number
    UPRIGHT.save(path, exif=exif, **{"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {}))
    turned = {
        2: np.fliplr(GREY),
        3: np.rot90(GREY, 2),
        4: np.flipud(GREY),
        5: GREY.T,
        6: np.rot90(GREY, -1),
        7: np.rot90(GREY, 2).T,
        8: np.rot90(GREY),
    }.get(number, GREY)
    assert picture_size(path) == open_picture(path).size == turned.shape[::-1]
    assert abs(grey_of(path) - turned).max() <= (3 if suffix == "jpg" else 0)


def test_metadata_that_cannot_be_read_do_not_refuse_pixels(tmp_path):
    path = tmp_path / "odd.jpg"
    UPRIGHT.save(path, quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03")
    assert picture_size(path) == (32, 24) and abs(grey_of(path) - GREY).max() <= 3


MODES = st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "I", "F", "I;16", "I;16B"])


@given(MODES, st.integers(1, 6), st.integers(1, 6), st.floats(allow_nan=True), st.floats(allow_nan=True), st.randoms())
def test_property_a_picture_of_any_mode_and_range_is_seen_or_refused(mode, width, height, low, high, rng):
    """What is seen of grey levels is never flat where they are not, nor in another order."""
    picture = Image.new(mode, (width, height))
    if mode in ("F", "I", "I;16", "I;16B"):
        kind = {"F": np.float32, "I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        with np.errstate(all="ignore"):
            levels = np.array([rng.choice([low, high, 0.0, 1.0]) for _ in range(width * height)]).astype(kind)
        picture.frombytes(levels.tobytes())
    else:
        picture.frombytes(bytes(rng.randrange(256) for _ in range(len(picture.tobytes()))))
    try:
        seen = np.asarray(open_picture(picture))
    except InputError as error:
        assert "grey levels" in str(error) and mode[0] in "FI"
        return
    assert seen.shape == (height, width, 3) and seen.dtype == np.uint8
    if mode[0] in "FI":
        order = np.argsort(levels, kind="stable")
        assert (np.diff(seen[..., 0].flatten()[order].astype(int)) >= 0).all()
        most = levels.max() * (255 if mode == "F" and levels.max() <= 1 else 1)
        assert seen.max() >= min(64, most) - 0.5, "the brightest is as bright as the data are"


def test_bad_pictures_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((200, 200), 90).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    for name, why in [("none.png", "no picture at"), ("cut.png", "cannot be read"), ("text.png", "not a picture")]:
        with pytest.raises(InputError) as error:
            open_picture(tmp_path / name)
        assert why in str(error.value) and name in str(error.value)


def test_a_decompression_bomb_is_refused_and_100_megapixels_are_not(tmp_path):
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="bomb.png is too large"):
        open_picture(tmp_path / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert open_picture(tmp_path / "large.png").size == (10_000, 10_000)
