"""What may show something and is read by nobody is refused by name: an answer that is judged without its picture gets a
plausible number that is wrong.

See it: `pytest tests/test_messages.py tests/test_data.py`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from numbers import Number
from pathlib import Path

import numpy as np
from PIL import Image

from yojo.files import InputError
from yojo.media import BASE64, address_of
from yojo.video import MOVIES

# Names that speak of something shown, alone or with words that say how it is stored: image, pixel_values, audio_path.
STRONG = "attachment audio clip frame image img keyframe media modal multi multimodal photo picture pixel screenshot"
STRONG = {*STRONG.split(), "video", "visual"}
WEAK = set("figure movie scan sound speech voice wav waveform".split())  # alone, of texts, too
STORED = set("array b64 base64 byte data dir directory file folder input list name original path raw root".split())
STORED |= {"stem", "uri", "url", "value"}
NAMES = {"id", "item", "key", "uid"}  # whose value names a row, whatever it looks like
# Names that say when frames were taken, which matters where there is a video.
PACED = {"fps", "rate", "timestamp", "interval"}
PACES = PACED | {"frame", "sample", "sampling", "second", "time", "video"}
FILES = ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .avif .heic .heif .jp2 .svg .npy .npz .pdf .wav .mp3 .flac .ogg"
FILES = (*MOVIES, *FILES.split(), ".m4a", ".opus", ".aac")
LIBRARIES = ("torchcodec", "decord", "av", "cv2", "soundfile")  # of open videos and sounds


def refuse_unread(row: Mapping, read: Iterable[str], where: str, remedy: str, video: bool = False) -> None:
    """Every value of a row that may show something, or say when the frames of its video were taken, must be among those
    that are read."""
    for name, value in row.items():
        if name in read or empty(value):
            continue
        words = words_of(str(name))
        if video and words & PACED and words <= PACES:
            raise InputError(f"{where} {name!r} may say when frames were taken, and it is not read: {remedy}")
        try:
            shown = may_show(str(name), value)
        except RecursionError:
            raise InputError(f"{where} {name!r} is nested too deeply to be looked at") from None
        if shown:
            raise InputError(f"{where} {name!r} may show something, and it is not read: {remedy}")


def words_of(name: str) -> set[str]:
    """video_fps, videoFps, Videos FPS -> video, fps."""
    words = re.findall(r"[a-z]+(?:64)?", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return {word if word == "fps" else word.removesuffix("s") for word in words}


def may_show(name: str, value: object) -> bool:
    """By what it holds, or by its name; a single number shows nothing."""
    words = words_of(name)
    if words & NAMES and isinstance(value, str):
        return holds(value)
    strong = words & STRONG or (words & WEAK and (words & STORED or not is_text(value)))
    named = bool(strong) and words <= STRONG | WEAK | STORED
    return shows(value) or (named and not empty(value) and not isinstance(value, (Number, np.generic)))


def is_text(value: object) -> bool:
    return isinstance(value, str) and not address_of(value)


def shows(value: object) -> bool:
    """Is it a picture, a sound or a video, or the name of a file of one?"""
    if isinstance(value, (list, tuple, set)) or str(getattr(value, "dtype", "")) == "object":
        return any(map(shows, value))
    if isinstance(value, Mapping):
        stored = isinstance(value.get("bytes"), (bytes, bytearray, str)) or "sampling_rate" in value
        return (stored and not empty(value)) or any(map(shows, value.values()))
    if isinstance(value, (str, Path)):
        text = str(value).strip()
        file = (re.split(r"[?#]", text)[0] if address_of(text) else text).lower().endswith(FILES)
        sentence = re.search(r"\s", text) and not os.path.exists(text)
        return (file and not sentence) or holds(text)
    if isinstance(value, (Image.Image, bytes, bytearray, memoryview)) or (
        hasattr(value, "read") and hasattr(value, "seek")
    ):
        return True
    pixels = getattr(value, "ndim", 0) > (1 if "uint8" in str(getattr(value, "dtype", "")) else 2)
    return pixels or type(value).__module__.partition(".")[0] in LIBRARIES


def holds(text: str) -> bool:
    """Is it a picture, a sound or a video, in base64?"""
    text = text.strip()
    coded = len(text) > 64 and text.startswith(BASE64) and re.fullmatch(r"[A-Za-z0-9+/\s]+=*", text)
    return bool(coded) or text[:10].lower() in ("data:image", "data:video", "data:audio")


def empty(value: object) -> bool:
    """Null, or nothing in it."""
    if isinstance(value, dict):
        return all(v is None for v in value.values())
    missing = value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)
    return missing or (isinstance(value, (str, list, tuple)) and not value) or getattr(value, "shape", None) == (0,)
