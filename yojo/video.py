"""Videos: folders of frames, animations, and frames as callers hand them over; and what a line of a file of records
shows, pictures or a video.

See it: `pytest tests/test_video.py`.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from yojo.files import InputError
from yojo.media import address_of, file_of, open_frames, opened, picture_from, short

FRAMES, INTERVAL = 16, 4.0  # at most so many frames of a video, so many seconds apart where nothing says otherwise
MOVIES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
TIMES = "timestamps.json"
LITTER = ("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir")  # that systems leave in folders
LONGEST = 1e9  # seconds; beyond it is no time in a video


@dataclass(frozen=True)
class Clip:
    """A video by path, at most so many of its frames, and the seconds between them where nothing else says so."""

    path: Path
    frames: int = FRAMES
    interval: float = INTERVAL

    def __post_init__(self):
        if not isinstance(self.path, (str, os.PathLike)) or not str(self.path):
            raise InputError(f"a video must be a path, got {self.path!r:.99}")
        scheme = address_of(str(self.path))
        if scheme and (scheme != "file" or isinstance(self.path, Path)):
            raise InputError(f"the video is an address, {str(self.path)[:80]!r}: download it and make it into frames")
        object.__setattr__(self, "path", file_of(self.path) if scheme else Path(self.path))
        if type(self.frames) is not int or self.frames < 1:
            raise InputError(f"{self.frames!r:.99} frames: give a whole number from 1")
        if seconds_of(self.interval) is None or self.interval == 0:
            raise InputError(f"frames {self.interval!r:.99} seconds apart: give more than 0, less than {LONGEST:g}")


def seconds_of(value: object) -> float | None:
    """Seconds in a video, as a number of any library; None of anything else."""
    try:
        value = value.item() if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0 else value
        seconds = float(value) if isinstance(value, (int, float, Decimal, Fraction)) else -1.0
    except (OverflowError, ValueError, RuntimeError):  # RuntimeError: a tensor without numbers
        return None
    return seconds if 0 <= seconds < LONGEST else None


Frames = list[tuple[float, Image.Image]]  # with their seconds
Video = str | Path | Clip | Sequence | None  # by path; or frames, alone or each with its second


class NoClip(InputError):
    """A value that is no video in any form that is read."""


def timed(frames: object, apart: float = INTERVAL, what: str = "the video") -> list[tuple[float, object]]:
    """Frames, or (seconds, frame) of each, in a list or array or whatever yields them -> (seconds, frame). Without
    times, frames are `apart` seconds apart."""
    listed = isinstance(frames, (Sequence, Iterator)) and not isinstance(frames, (str, bytes, bytearray, memoryview))
    if not (listed or getattr(frames, "ndim", 0) == 4) or hasattr(frames, "read"):
        raise NoClip(
            f"{what} is {short(frames)}: give a list of frames, or the path of a folder of frames, which "
            f"`ffmpeg -i clip.mp4 -vf fps=1/{apart:g} clip/%05d.png` makes"
        )
    frames = list(frames)
    paired = [isinstance(frame, (tuple, list)) and len(frame) == 2 for frame in frames]
    times = [seconds_of(frame[0]) for frame in frames] if all(paired) else [i * apart for i in range(len(frames))]
    if not frames:
        raise InputError(f"{what} has no frames")
    if any(paired) != all(paired) or None in times or sorted(times) != times:
        raise InputError(f"{what}: (seconds, frame) needs rising seconds from 0, for every frame")
    return [(t, frame[1] if all(paired) else frame) for t, frame in zip(times, frames, strict=True)]


def open_video(source: Video, frames: int = FRAMES, interval: float = INTERVAL) -> Frames:
    """A folder of pictures or an animated GIF or WebP -> [(seconds, RGB frame)], at most `frames`, evenly spaced, the
    first and the last among them. What is a list of frames, or of (seconds, frame), is opened whole.

    The pictures of a folder are taken in the order of the numbers in their names, at the seconds that `timestamps.json`
    beside them lists, or else `interval` seconds apart; an animation brings its own times, or else is spaced in the
    same way. A `Clip` brings its own number of frames and interval.
    """
    plan = video_plan(source, frames, interval)
    if not isinstance(source, (str, Path, Clip)):
        names = [f"frame {i}" for i in range(1, len(plan) + 1)]
        return [*zip([t for t, _ in plan], open_frames([frame for _, frame in plan], names), strict=True)]
    source = (source if isinstance(source, Clip) else Clip(source)).path
    if source.is_dir():
        paths = frames_of(source)
        shown, names = [paths[i] for _, i in plan], [None] * len(plan)
    else:
        with opened(source) as movie:
            shown, names = [_seek(movie, i).copy() for _, i in plan], [str(source)] * len(plan)
    return [(seconds, frame) for (seconds, _), frame in zip(plan, open_frames(shown, names), strict=True)]


def video_plan(source: Video, frames: int = FRAMES, interval: float = INTERVAL) -> list[tuple[float, object]]:
    """Of the frames that `open_video` opens: the second of each, and its number among all, or itself in a list."""
    if not isinstance(source, (str, Path, Clip)):
        return timed(source, interval)
    clip = source if isinstance(source, Clip) else Clip(source, frames, interval)
    source, frames, interval = clip.path, clip.frames, clip.interval
    if source.suffix.lower() in MOVIES:
        make = f"mkdir {source.stem} && ffmpeg -i {source} -vf fps=1/{interval:g} {source.stem}/%05d.png"
        raise InputError(f"{source} must be a folder of frames first: {make}, then give {source.stem}")
    if not os.path.exists(source):  # which a name too long for Path.exists does not
        raise InputError(f"no video at {source}")
    if source.is_dir():
        count = len(frames_of(source))
        times = _times(source / TIMES, count)
    else:
        with opened(source) as movie:
            lengths = [_seek(movie, i).info.get("duration", 0) for i in range(getattr(movie, "n_frames", 1))]
        count, times = len(lengths), [ms / 1000 for ms in accumulate(lengths, initial=0)] if any(lengths) else None
    return [(i * interval if times is None else times[i], i) for i in spread(count, frames)]


def frames_of(folder: Path) -> list[Path]:
    """The frames of a folder, in the order of the numbers in their names: 2 before 10, however they are padded. Names
    that differ in more than their numbers raise: they tell no order. So do those whose order depends on whether a point
    or comma is a number's, and those that begin with a minus."""
    paths = [path for path in folder.iterdir() if path.name not in {TIMES, *LITTER} and not path.name.startswith(".")]
    if not paths:
        raise InputError(f"{folder} holds no frames")
    known = Image.registered_extensions()
    if strange := [p for p in paths if p.is_dir() or (re.search(r"[a-z]", p.suffix) and p.suffix.lower() not in known)]:
        raise InputError(f"{strange[0]} is not a picture that Pillow can read: take it out of the folder of frames")
    names = {path: re.sub(r"\.[a-z]\w*$", "", path.name.casefold()) for path in paths}

    def numbered(number: str) -> list[Path]:
        numbers = {path: [Decimal(n.replace(",", ".")) for n in re.findall(number, names[path])] for path in paths}
        return sorted(paths, key=lambda path: (numbers[path], path.name))

    order, alike = numbered(r"\d+"), {re.sub(r"\d+", "0", name) for name in names.values()}
    decimal = numbered(r"\d+(?:[.,]\d+)?")
    if len(paths) > 1 and (len(alike) > 1 or "0" not in (name := alike.pop()) or name[:2] == "-0" or order != decimal):
        raise InputError(f"{folder}: {order[0].name} and {order[-1].name} tell no order of frames: number them alike")
    return order


def _times(path: Path, count: int) -> list[float] | None:
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        times = [float(t) for t in raw if type(t) in (int, float)]
        rising = all(0 <= a <= b < LONGEST for a, b in pairwise([0.0, *times]))
        good = isinstance(raw, list) and len(raw) == len(times) == count and rising
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        good = False
    if not good:
        raise InputError(f"{path} must be a list of {count} rising seconds, one a frame")
    return times


def _seek(movie: Image.Image, i: int) -> Image.Image:
    movie.seek(i)
    movie.load()
    return movie


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 .. count - 1, evenly spaced, both ends included."""
    if most < 1:
        raise InputError(f"{most} frames: at least 1")
    if count <= most:
        return list(range(count))
    return [0] if most == 1 else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def shown_by(raw: dict, where: str, folder: Path) -> tuple[list[Path | bytes], Clip | None]:
    """The pictures and the video of one line of a file of records. Paths are relative to the file's `folder`, and what
    is not there raises, as does more than one of the keys; a picture may be a data URL."""
    named = {key: raw.get(key) for key in ("image", "images", "video")}
    given = {key: value for key, value in named.items() if value not in (None, []) and value == value}  # pandas' NaN
    if len(given) > 1:
        raise InputError(f"{where} has both {' and '.join(given)}: keep one")
    key, names = next(iter(given.items()), ("images", []))
    listed = names if key == "images" else [names]
    if not isinstance(listed, list) or not all(isinstance(name, str) and name.strip() for name in listed):
        kinds = "image and video must be a path, images a list of paths, or null"
        raise InputError(f"{where}: {kinds}, got {names!r:.99}")
    apart = [raw[key] for key in ("sampling_interval", "fps") if raw.get(key) is not None] or [INTERVAL]
    if any(type(seconds) not in (int, float) or seconds != apart[0] for seconds in apart):
        raise InputError(f"{where}: sampling_interval and fps are the seconds between frames, got {apart!r:.99}")
    try:
        sources = [source_of(name, folder, key) for name in listed]
        return ([], Clip(sources[0], interval=apart[0])) if key == "video" else (sources, None)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def source_of(name: str, folder: Path, key: str) -> Path | bytes:
    """A picture or a video that a line of records names."""
    if os.path.exists(folder / name):
        return folder / name
    source = picture_from(name, key)
    if isinstance(source, Path) and not os.path.exists(source := folder / source):
        raise InputError(f"no {'video' if key == 'video' else 'picture'} at {str(source)[:300]}")
    if key == "video" and not isinstance(source, Path):
        raise InputError("video must be a path: a folder of frames or an animation")
    return source
