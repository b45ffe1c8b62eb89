"""Pictures, opened strictly: what cannot be read raises `InputError` with its name.

Whatever a picture is stored as, what is seen is RGB, upright, on white where it is transparent. Grey levels of more
than 8 bits are scaled by the range of the data, since the same mode holds 0..1, 0..255 and 0..65535; those of a video's
frames by one range.

See it: `pytest tests/test_media.py`.
"""

import base64
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from yojo.files import InputError

Source = str | Path | bytes | Image.Image  # of a picture: where it lies, what its file holds, or itself

# Pillow warns of metadata that nobody needs, and at its limit; at twice that, it raises. This filter is never taken
# back: filters belong to all threads, and these would take back each other's.
QUIET = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)
SHARED = threading.RLock()  # a picture or a file that a caller holds may be shown in several records


@contextmanager
def opened(source: Source, name: str | None = None) -> Iterator[Image.Image]:
    """A picture or an animation, in any form that `picture_from` knows, up to twice Pillow's limit; whatever it raises
    in the block gets the file's name, or the one given."""
    name = name or "the picture"
    with nullcontext() if isinstance(source, (str, Path, bytes)) else SHARED:
        yield from _opened(source, name)


def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    source = picture_from(source, name)
    name = str(source) if isinstance(source, Path) else name
    if isinstance(source, Path) and os.path.exists(source) and not (os.path.isfile(source) or os.path.isdir(source)):
        raise InputError(f"{name} is no file: a device or a pipe cannot be read as a picture")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    if warnings.filters[:1] != [QUIET]:
        warnings.filterwarnings("ignore", module=QUIET[3].pattern)
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(file) as picture:
            yield picture
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no picture at {name}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large to open safely: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that Pillow can read") from None
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise InputError(f"{name} cannot be read as a picture: {error}") from None


def picture_size(source: Source, name: str | None = None) -> tuple[int, int]:
    """(width, height) of a picture, upright."""
    with opened(source, name) as picture:
        check_still(picture, getattr(picture, "filename", "") or name or "the picture")
        turn = turn_of(picture)
        return picture.size[::-1] if turn in SIDEWAYS else picture.size


def open_picture(source: Source, name: str | None = None, most: float = 0) -> Image.Image:
    """A picture of any mode -> RGB, upright, on white. `most`: the brightest level of the clip that it is a frame of,
    if it has more than 8 bits."""
    with opened(source, name) as picture:
        name = getattr(picture, "filename", "") or name or "the picture"
        check_still(picture, name)
        wide = has_16_bits_a_colour(picture)
        turn = turn_of(picture)
        if deep(picture):
            picture = eight_bits(picture, name, most)
        else:
            if wide and max(upper_bits(picture), most) < 64:
                raise InputError(f"{name} has 16 bits a colour and uses the lower ones only: save it in 8 bits")
            picture = on_white(picture)
        return picture if turn is None else picture.transpose(turn)


def check_still(picture: Image.Image, name: str) -> None:
    """One picture, with something in it."""
    if picture.format in ANIMATED and getattr(picture, "n_frames", 1) > 1:
        raise InputError(f"{name} holds {picture.n_frames} frames: show it as a video, or one of them as a picture")
    if 0 in picture.size:
        raise InputError(f"{name} has no pixels")


def open_frames(sources: Sequence, names: Sequence[str | None]) -> list[Image.Image]:
    """Frames of one clip: as `open_picture`, but levels of more than 8 bits share one range."""
    found = [brightest(source, name) for source, name in zip(sources, names, strict=True)]
    most = {kind: max(level for k, level in found if k == kind) for kind, _ in found}
    shown = zip(sources, names, found, strict=True)
    return [open_picture(source, name, most[kind]) for source, name, (kind, _) in shown]


def brightest(source: Source, name: str | None = None) -> tuple[str, float]:
    """The kind of a picture of more than 8 bits a channel, and its brightest level; of others, 0."""
    with opened(source, name) as picture:
        if has_16_bits_a_colour(picture):
            return "colour", upper_bits(picture)
        return (picture.mode[0], float(np.asarray(picture).max(initial=0))) if deep(picture) else ("", 0.0)


def has_16_bits_a_colour(picture: Image.Image) -> bool:
    """Pillow keeps the upper 8 of them, and says so only until the picture is loaded."""
    return any(re.search(r";16[BLN]", str(tile[3])) for tile in getattr(picture, "tile", ())) and not deep(picture)


def upper_bits(picture: Image.Image) -> int:
    return max(picture.getchannel(band).getextrema()[1] for band in picture.getbands() if band != "A")


def picture_from(value: object, what: str) -> Source:
    """A picture in any form in which other libraries hand one over, `what` its name in errors: a path or file URL, a
    Pillow picture, bytes, base64, a data URL, `{"bytes", "path"}`, an array or tensor of uint8, or a list of one of
    these. Nothing is fetched."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"} and any(v is not None for v in value.values()):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (Path, Image.Image)):
        return value
    if isinstance(value, os.PathLike):
        return Path(value)
    if hasattr(value, "read"):
        value = value.read()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _from_array(value, what)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is a {type(value).__name__} that is no picture here: give a path or a Pillow picture")
    value = value.strip()
    scheme = address_of(value)
    if scheme == "data":
        head, _, data = value.partition(",")
        if not re.fullmatch(r"data:(image/[^;]+|application/octet-stream)?(;.*)?;base64", head, re.IGNORECASE):
            raise InputError(f"{what} is a data URL, {head[:60]!r}: only pictures in base64 can be read")
        return _from_base64(data, what)
    if scheme == "file":
        return file_of(value)
    if scheme:
        raise InputError(f"{what} is an address, {value[:80]!r}: nothing is fetched, so download it and give its path")
    coded = len(value) > 64 and value.startswith(BASE64) and re.fullmatch(r"[A-Za-z0-9+/_\s-]+=*\s*", value)
    if coded and not os.path.exists(value):
        return _from_base64(value, what)
    return Path(value)


def address_of(text: str) -> str:
    """The scheme of an address, such as https, file or data; "" of a path."""
    found = re.match(r"(data|file):|([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def file_of(url: str) -> Path:
    """The path in a file URL, which is absolute."""
    found = re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).+)", url, re.IGNORECASE | re.DOTALL)
    if not found:
        raise InputError(f"{url[:80]!r} names no absolute path: write file:///..., or the path alone")
    return Path(unquote(found[1]))


def _from_array(array: object, what: str) -> Image.Image:
    """[height, width] or [height, width, 1, 3 or 4], as numpy has it; of torch, the channels stand first."""
    kind = f"{type(array).__name__} of {array.dtype} {list(array.shape)}"
    if "uint8" not in str(array.dtype):
        raise InputError(f"{what} is a {kind} that is no picture here: give uint8, or a path")
    try:
        levels = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    except Exception as error:  # by how the tensor is stored
        raise InputError(f"{what} is a {kind} that cannot be read: {error}") from None
    if levels.ndim == 3 and hasattr(array, "detach"):
        levels = levels.transpose(1, 2, 0)
    if levels.ndim not in (2, 3) or levels.shape[2:] not in ((), (1,), (3,), (4,)):
        form = "[3, height, width]" if hasattr(array, "detach") else "[height, width, 3]"
        raise InputError(f"{what} is a {kind} that is no picture here: give {form}, or a path")
    return Image.fromarray(np.ascontiguousarray(levels.squeeze(2) if levels.shape[2:] == (1,) else levels))


def _from_base64(text: str, what: str) -> bytes:
    text = "".join(text.split()).translate(str.maketrans("-_", "+/"))  # of URLs, too
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise InputError(f"{what} is not base64: {error}") from None


def data_url(picture: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(picture).decode()}"


# How files of pictures, sounds and videos begin in base64.
BASE64 = tuple("iVBORw0KGgo /9j/ R0lGOD UklGR Qk SUkq TU0AK AAAA SUQz T2dnUw GkXfo JVBERi".split())
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # MPO, a format of phones, holds one picture several times
Turn = Image.Transpose
SIDEWAYS = (Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90)
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM}
TURNS |= dict(enumerate(SIDEWAYS, 5))  # EXIF's numbers, 1 = upright


def turn_of(picture: Image.Image) -> Turn | None:
    """What brings a picture upright. Metadata that cannot be read turn nothing: the pixels are whole."""
    if picture.format == "TIFF":
        picture.load()  # where Pillow turns these itself
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # struct.error and others, by what is wrong
        return None


def on_white(picture: Image.Image) -> Image.Image:
    """Any picture of 8 bits a channel -> RGB; what can be seen through is laid on white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    straight = picture.convert("LA") if picture.mode == "La" else picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")


def deep(picture: Image.Image) -> bool:
    """Does it hold grey levels of more than 8 bits?"""
    return picture.mode == "F" or picture.mode.startswith("I")


def eight_bits(picture: Image.Image, name: str, most: float = 0) -> Image.Image:
    """Grey levels in 16 or 32 bits, or as floats -> RGB. Their range is the smallest of the usual ones that holds them:
    whole numbers of 8, 10, 12, 14 or 16 bits, floats in 0..1 or 0..255, which resizing may have overshot by an eighth.
    Any other raises, and so do floats up to 16 that may belong to either."""
    levels, mode = np.asarray(picture), picture.mode
    if getattr(picture, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:
        raise InputError(f"{name}: 0 is white in it, and its levels are {mode}: save it in 8 bits")
    low, high = levels.min(), max(levels.max(), most)
    if mode == "F":
        one = high <= 1.125
        good = (one or high >= 16) and low >= (-0.125 if one else -32) and high <= 287  # NaN is neither
    else:
        good = low >= 0 and high <= 65_535
    if not good:
        raise InputError(f"{name} holds grey levels from {low} to {high}, in {mode}: scale or clip them to 0..255")
    if mode == "F":
        grey = np.rint(levels * 255 if one else levels).clip(0, 255)
    else:
        grey = levels >> next(bits - 8 for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
    if isinstance(clear := picture.info.get("transparency"), int):
        grey = np.where(levels == clear, 255, grey)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def pictures_in(value: object) -> list:
    """One picture, or several in a list or whatever yields them -> a list."""
    several = isinstance(value, (list, tuple, Iterator)) and not hasattr(value, "read")  # an open file yields lines
    return list(value) if several else [value]


def short(value: object) -> str:
    """A value of others, to name it in an error."""
    return repr(value[:60]) if isinstance(value, str) else f"a {type(value).__name__}"
