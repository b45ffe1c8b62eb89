"""Pictures and videos, opened strictly: what cannot be read raises `InputError` with its name.

See it: `pytest tests/test_image.py tests/test_video.py`.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from yojo.files import InputError

FRAMES, INTERVAL = 16, 4.0  # at most so many frames of a video, so many seconds apart where nothing says otherwise
MOVIES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
TIMES = "timestamps.json"


@contextmanager
def opened(source: "str | Path | Image.Image") -> Iterator[Image.Image]:
    """A picture or an animation, up to twice Pillow's limit; whatever it raises in the block gets the file's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns at its limit, raises at twice
        try:
            with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as picture:
                yield picture
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"no picture at {source}") from None
        except Image.DecompressionBombError as error:
            raise InputError(f"{source} is too large to open safely: {error}") from None
        except UnidentifiedImageError:
            raise InputError(f"{source} is not a picture that Pillow can read") from None
        except (OSError, EOFError, SyntaxError, ValueError, RuntimeError) as error:  # decoders raise any of these
            raise InputError(f"{source} cannot be read as a picture: {error}") from None


def picture_size(source: "str | Path | Image.Image") -> tuple[int, int]:
    """(width, height) of a picture, upright."""
    with opened(source) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return picture.size[::-1] if turned else picture.size


def open_picture(source: "str | Path | Image.Image") -> Image.Image:
    """A path or a Pillow picture of any mode -> RGB, upright."""
    with opened(source) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 and 32 bit grey: Pillow would clip, not scale
            picture = picture.convert("I").point(lambda level: level / 256).convert("L")
        return picture.convert("RGB")


def open_video(source: str | Path, frames: int = FRAMES, interval: float = INTERVAL) -> list[tuple[float, Image.Image]]:
    """A folder of pictures or an animated GIF or WebP -> [(seconds, RGB frame)], at most `frames`, evenly spaced, the
    first and the last among them.

    The pictures of a folder are taken in the order of their names, at the seconds that `timestamps.json` beside them
    lists, or else `interval` seconds apart; an animation brings its own times, or else is spaced in the same way.
    """
    source, plan = Path(source), video_plan(source, frames, interval)
    if source.is_dir():
        paths = _frames(source)
        return [(seconds, open_picture(paths[i])) for seconds, i in plan]
    with opened(source) as movie:
        return [(seconds, open_picture(_seek(movie, i).copy())) for seconds, i in plan]


def video_plan(source: str | Path, frames: int = FRAMES, interval: float = INTERVAL) -> list[tuple[float, int]]:
    """Of the frames that `open_video` opens: the second of each, and its number among all."""
    source = Path(source)
    if not 0 < interval < math.inf:
        raise InputError(f"frames {interval} seconds apart: more than 0 is needed")
    if source.suffix.lower() in MOVIES:
        make = f"mkdir {source.stem} && ffmpeg -i {source} -vf fps=1/{interval:g} {source.stem}/%05d.png"
        raise InputError(f"{source} must be a folder of frames first: {make}, then give {source.stem}")
    if not source.exists():
        raise InputError(f"no video at {source}")
    if source.is_dir():
        count = len(_frames(source))
        times = _times(source / TIMES, count)
    else:
        with opened(source) as movie:
            lengths = [_seek(movie, i).info.get("duration", 0) for i in range(getattr(movie, "n_frames", 1))]
        count, times = len(lengths), [ms / 1000 for ms in accumulate(lengths, initial=0)] if any(lengths) else None
    return [(i * interval if times is None else times[i], i) for i in spread(count, frames)]


def _frames(source: Path) -> list[Path]:
    paths = sorted(path for path in source.iterdir() if path.name != TIMES and not path.name.startswith("."))
    if not paths:
        raise InputError(f"{source} holds no frames")
    return paths


def _times(path: Path, count: int) -> list[float] | None:
    if not path.exists():
        return None
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        good = len(times) == count and all(0 <= a <= b < math.inf for a, b in pairwise([0.0, *times]))
    except (OSError, ValueError, TypeError):
        good = False
    if not good:
        raise InputError(f"{path} must be a list of {count} rising seconds, one a frame")
    return [float(t) for t in times]


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
