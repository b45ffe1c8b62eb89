"""What may show something and is read by nobody is refused by name: an answer that is judged without its picture gets a
plausible number that is wrong.

See it: `pytest tests/test_messages.py tests/test_data.py`.
"""

import re
from collections.abc import Iterable, Mapping
from numbers import Number
from pathlib import Path

import numpy as np
from PIL import Image

from yojo.files import InputError
from yojo.media import MOVIES, address_of

# Names that speak of something shown, alone or with words that say how it is stored: image, pixel_values, audio_path.
STRONG = set("attachment audio image img media modal multi multimodal photo picture pixel screenshot video".split())
WEAK = set("clip figure frame movie scan sound speech voice wav waveform".split())  # of texts, too
STORED = set("array b64 base64 byte data file input list original path raw uri url value".split())
FILES = ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .avif .heic .heif .jp2 .svg .npy .npz .pdf .wav .mp3 .flac .ogg"
FILES = (*MOVIES, *FILES.split(), ".m4a", ".opus", ".aac")
BASE64 = ("iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin in it
NAMES = {"id", "item", "key", "uid"}  # whose value names a row, whatever it looks like
LIBRARIES = ("torchcodec", "decord", "av", "cv2", "soundfile")  # of open videos and sounds


def refuse_unread(row: Mapping, read: Iterable[str], where: str, remedy: str) -> None:
    """Every value of a row that may show something must be among those that are read."""
    for name, value in row.items():
        if name not in read and may_show(str(name), value):
            raise InputError(f"{where} {name!r} may show something, and it is not read: {remedy}")


def may_show(name: str, value: object) -> bool:
    """By what it holds, or by its name; a single number shows nothing."""
    words = re.findall(r"[a-z]+(?:64)?", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    words = {word.removesuffix("s") for word in words}
    if words & NAMES and isinstance(value, str):
        return holds(value)
    named = bool(words & STRONG or (words & WEAK and not is_text(value))) and words <= STRONG | WEAK | STORED
    return shows(value) or (named and not empty(value) and not isinstance(value, (Number, np.generic)))


def is_text(value: object) -> bool:
    return isinstance(value, str) and not address_of(value)


def shows(value: object) -> bool:
    """Is it a picture, a sound or a video, or the name of a file of one?"""
    if isinstance(value, (list, tuple, set)) or str(getattr(value, "dtype", "")) == "object":
        return any(map(shows, value))
    if isinstance(value, Mapping):
        held = [value.get(key) for key in ("bytes", "array", "sampling_rate")]
        return not all(map(empty, held)) or any(map(shows, value.values()))
    if isinstance(value, (str, Path)):
        text = str(value).strip()
        file = re.split(r"[?#]", text.lower())[0].endswith(FILES) and ("/" in text or not re.search(r"\s", text))
        return file or holds(text)
    known = isinstance(value, (Image.Image, bytes, bytearray, memoryview)) or hasattr(value, "read")
    return known or getattr(value, "ndim", 0) > 1 or type(value).__module__.partition(".")[0] in LIBRARIES


def holds(text: str) -> bool:
    """Is it a picture, a sound or a video, in base64?"""
    return text.strip()[:10].lower() in ("data:image", "data:video", "data:audio") or text.strip().startswith(BASE64)


def empty(value: object) -> bool:
    """Null, or nothing in it."""
    if isinstance(value, dict):
        return all(v is None for v in value.values())
    missing = value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)
    return missing or (isinstance(value, (str, list, tuple)) and not value)
