"""Pictures to patches: what the vision tower reads.

    image --resize--> one global view + overlapping crops --cut--> patches [views, P, 588], one row a 14x14 square
    pooling indices [M, window]: which patches each picture token is pooled from, -1 = none

An image gives one global view of size x size, then a tiling of crops that overlap by the margins, so that no object is
cut in a place where neither crop sees it whole; the shared patches are dealt out so that each token has one owner.
A video frame gives one view and coarser windows.

Resizing is bilinear without antialiasing, rounded to whole grey levels, as in the released preprocessing; aspect ratio
is not kept. Facts: `preprocessor_config.json` of the release; `tests/data/molmo2_images.safetensors` holds the expected
tensors.

See it: `pytest tests/test_image.py`.
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from yojo.files import InputError, read_json


@dataclass(frozen=True)
class ImageConfig:
    """Defaults are the release's. Sizes in pixels, margins and windows in patches."""

    size: int = 378
    patch: int = 14
    margins: tuple[int, int] = (4, 4)  # top and left, bottom and right
    max_crops: int = 8
    pooling: tuple[int, int] = (2, 2)
    video_pooling: tuple[int, int] = (3, 3)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def side(self) -> int:
        """Patches along one side of a view."""
        return self.size // self.patch

    @property
    def window(self) -> int:
        """Pixels along one side of the part of a crop that is its own."""
        return (self.side - sum(self.margins)) * self.patch

    @property
    def overlap(self) -> int:
        """Pixels along one side that the margins take."""
        return sum(self.margins) * self.patch


def read_image_config(folder: str | Path) -> ImageConfig:
    """`preprocessor_config.json`; the video window from `video_preprocessor_config.json` where there is one."""
    path = Path(folder) / "preprocessor_config.json"
    raw = read_json(path)
    try:
        size, resample = raw["size"], raw.get("resample", 2)
        if size["height"] != size["width"] or resample != 2:
            raise InputError(f"{path}: views must be square and resampled bilinearly (2), got {size} and {resample}")
        video = Path(folder) / "video_preprocessor_config.json"
        window = read_json(video).get("pooling_size") if video.exists() else None
        return ImageConfig(
            size["height"],
            raw["patch_size"],
            tuple(raw["overlap_margins"]),
            raw["max_crops"],
            tuple(raw["pooling_size"]),
            tuple(window or ImageConfig.video_pooling),
            tuple(raw["image_mean"]),
            tuple(raw["image_std"]),
        )
    except KeyError as missing:
        raise InputError(f"{path} lacks {missing}") from None
    except TypeError as error:
        raise InputError(f"{path} has a value of the wrong kind: {error}") from None


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture, upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as picture:
                turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                return picture.size[::-1] if turned else picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be read as a picture: {error}") from None


def preprocessor_json(c: ImageConfig) -> dict:
    """What `read_image_config` reads back to `c`."""
    return {
        "size": {"height": c.size, "width": c.size},
        "patch_size": c.patch,
        "overlap_margins": c.margins,
        "max_crops": c.max_crops,
        "pooling_size": c.pooling,
        "image_mean": c.mean,
        "image_std": c.std,
        "resample": 2,
    }


@dataclass(frozen=True)
class Pictures:
    """What one record shows the tower: patches float32 [views, P, 3 * patch^2], pooling int64 [M, window], and the
    token grids: for each image (global rows, columns, high-resolution rows, columns), for each frame (rows,
    columns)."""

    patches: Tensor
    pooling: Tensor
    grids: list[tuple[int, ...]]


def open_picture(source: "str | Path | Image.Image") -> Image.Image:
    """A path or a Pillow picture of any mode -> RGB, upright. Up to twice Pillow's pixel limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns at its limit, raises at twice
        try:
            picture = source if isinstance(source, Image.Image) else Image.open(source)
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 and 32 bit grey: Pillow would clip, not scale
                picture = picture.convert("I").point(lambda level: level / 256).convert("L")
            return picture.convert("RGB")
        except FileNotFoundError:
            raise InputError(f"no picture at {source}") from None
        except Image.DecompressionBombError as error:
            raise InputError(f"{source} is too large to open safely: {error}") from None
        except UnidentifiedImageError:
            raise InputError(f"{source} is not a picture that Pillow can read") from None
        except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # Pillow's decoders raise any of these
            raise InputError(f"{source} cannot be read as a picture: {error}") from None


FRAMES, INTERVAL = 16, 4.0  # at most so many frames of a video, so many seconds apart where nothing says otherwise
MOVIES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


def open_video(source: str | Path, frames: int = FRAMES, interval: float = INTERVAL) -> list[tuple[float, Image.Image]]:
    """A folder of pictures or an animated GIF or WebP -> [(seconds, RGB frame)], at most `frames`, evenly spaced, the
    first and the last among them.

    The pictures of a folder are taken in the order of their names, at the seconds that `timestamps.json` beside them
    lists, or else `interval` seconds apart; an animation brings its own times, or else is spaced in the same way.
    """
    source = Path(source)
    if not 0 < interval < math.inf:
        raise InputError(f"frames {interval} seconds apart: more than 0 is needed")
    if source.suffix.lower() in MOVIES:
        raise InputError(
            f"{source} must be a folder of frames first: mkdir {source.stem} && ffmpeg -i {source} -vf "
            f"fps=1/{interval:g} {source.stem}/%05d.png, then give {source.stem}"
        )
    if not source.exists():
        raise InputError(f"no video at {source}")
    return [(seconds, frame) for seconds, frame in _opened(source, video_plan(source, frames, interval))]


def video_plan(source: str | Path, frames: int = FRAMES, interval: float = INTERVAL) -> list[tuple[float, int]]:
    """Of the frames that `open_video` opens: the second of each, and its number among all."""
    if Path(source).is_dir():
        paths = _frames(source)
        times = _times(Path(source) / TIMES, len(paths))
    else:
        with _movie(source) as movie:
            durations = [_seek(movie, i).info.get("duration", 0) for i in range(getattr(movie, "n_frames", 1))]
        times = [sum(durations[:i]) / 1000 for i in range(len(durations))] if any(durations) else None
        paths = durations
    return [(i * interval if times is None else times[i], i) for i in spread(len(paths), frames)]


TIMES = "timestamps.json"


def _opened(source: Path, plan: list[tuple[float, int]]) -> Iterator[tuple[float, Image.Image]]:
    if source.is_dir():
        paths = _frames(source)
        yield from ((seconds, open_picture(paths[i])) for seconds, i in plan)
    else:
        with _movie(source) as movie:
            yield from ((seconds, open_picture(_seek(movie, i).copy())) for seconds, i in plan)


def _frames(source: str | Path) -> list[Path]:
    paths = sorted(path for path in Path(source).iterdir() if path.name != TIMES and not path.name.startswith("."))
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


@contextmanager
def _movie(source: str | Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(source) as movie:
                yield movie
        except Image.DecompressionBombError as error:
            raise InputError(f"{source} is too large to open safely: {error}") from None
        except (OSError, SyntaxError, EOFError) as error:
            raise InputError(f"{source} cannot be read as an animation: {error}") from None


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


def measure(height: int, width: int, c: ImageConfig) -> tuple[int, tuple[int, int, int, int]]:
    """Of a picture of this size, without opening it: how many views it is cut into, and its token grid."""
    rows, columns = choose_tiling(height, width, c)
    inner, (h, w) = c.side - sum(c.margins), c.pooling
    high = (-(-(n * inner + sum(c.margins)) // size) for n, size in ((rows, h), (columns, w)))
    return 1 + rows * columns, (-(-c.side // h), -(-c.side // w), *high)


def images_to_patches(images: Sequence[Image.Image], c: ImageConfig) -> Pictures:
    """RGB pictures -> global view and crops of each, in order; pooling indices count through all of them."""
    patches, pooling, grids, seen = [], [], [], 0
    for image in images:
        pixels = _pixels(image)
        crops, crop_index = _crops(pixels, c)
        views = torch.cat([_resize(pixels, c.size, c.size, c)[None], crops])
        global_windows, *global_grid = pool_windows(torch.arange(c.side**2).view(c.side, c.side), c.pooling)
        crop_windows, *crop_grid = pool_windows(crop_index + c.side**2, c.pooling)
        windows = torch.cat([global_windows, crop_windows])
        patches.append(_cut(views, c.patch))
        pooling.append(torch.where(windows >= 0, windows + seen, -1))
        grids.append((*global_grid, *crop_grid))
        seen += len(views) * c.side**2
    return Pictures(torch.cat(patches), torch.cat(pooling), grids)


def frames_to_patches(frames: Sequence[Image.Image], c: ImageConfig) -> Pictures:
    """RGB frames of a video -> one view each, pooled in coarser windows."""
    views = torch.stack([_resize(_pixels(frame), c.size, c.size, c) for frame in frames])
    index = torch.arange(len(frames) * c.side**2).view(-1, c.side, c.side)
    windows, rows, columns = zip(*(pool_windows(frame, c.video_pooling) for frame in index), strict=True)
    return Pictures(_cut(views, c.patch), torch.cat(windows), list(zip(rows, columns, strict=True)))


def _pixels(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, height, width]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)


def _resize(pixels: Tensor, height: int, width: int, c: ImageConfig) -> Tensor:
    """uint8 [3, h, w] -> normalised float32 [3, height, width]. Grey levels are whole before they are scaled."""
    x = F.interpolate(pixels[None].float(), (height, width), mode="bilinear", align_corners=False, antialias=False)[0]
    x = x.round_().clamp_(0, 255) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (c.mean, c.std))
    return (x - mean) / std


def _cut(views: Tensor, patch: int) -> Tensor:
    """[views, 3, size, size] -> [views, P, patch * patch * 3], patches row by row, values in (y, x, channel) order."""
    x = views.unfold(2, patch, patch).unfold(3, patch, patch)  # [views, 3, rows, columns, y, x]
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2).contiguous()


def choose_tiling(height: int, width: int, c: ImageConfig) -> tuple[int, int]:
    """(rows, columns) of crops for a picture of height x width pixels, rows * columns <= max_crops.

    The scale of a tiling is how much the picture must be stretched to fill it, on the tighter side. The smallest scale
    that does not shrink the picture wins; if all shrink it, the largest. Ties: fewer crops, then fewer rows.
    """
    n = c.max_crops
    tilings = [(r, k) for r in range(1, n + 1) for k in range(1, n + 1) if r * k <= n]
    tilings.sort(key=lambda t: (t[0] * t[1], t[0]))
    inner = torch.tensor([height - c.overlap, width - c.overlap], dtype=torch.float32)
    scale = (torch.tensor(tilings, dtype=torch.float32) * c.window / inner).amin(1)  # a side of `overlap` gives inf
    if bool((scale < 1).all()):
        return tilings[int(scale.argmax())]
    return tilings[int(scale.masked_fill(scale < 1, 1e10).argmin())]


def _crops(pixels: Tensor, c: ImageConfig) -> tuple[Tensor, Tensor]:
    """The overlapping crops [crops, 3, size, size], and for each patch of the whole tiling which crop patch owns it
    [rows, columns], counted through the crops."""
    rows, columns = choose_tiling(*pixels.shape[1:], c)
    canvas = _resize(pixels, rows * c.window + c.overlap, columns * c.window + c.overlap, c)
    crops = canvas.unfold(1, c.size, c.window).unfold(2, c.size, c.window)  # [3, rows, columns, size, size]
    crops = crops.permute(1, 2, 0, 3, 4).flatten(0, 1)

    def owners(tiles: int) -> tuple[Tensor, Tensor]:
        """Along one axis: the crop that owns each patch, and the patch's place inside that crop."""
        first, last = c.margins
        crop = torch.arange(tiles).repeat_interleave(c.side - first - last)
        crop = torch.cat([torch.zeros(first, dtype=torch.long), crop, torch.full((last,), tiles - 1)])
        return crop, torch.arange(len(crop)) - crop * (c.side - first - last)

    (crop_y, y), (crop_x, x) = owners(rows), owners(columns)
    crop = crop_y[:, None] * columns + crop_x
    return crops, crop * c.side**2 + y[:, None] * c.side + x


def pool_windows(index: Tensor, window: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Patch numbers [rows, columns] -> windows [M, h * w], row by row, with the grid's size in windows.

    Where a side is no multiple of the window, it is padded with -1: half before, rounded down, the rest after.
    """
    (h, w), (rows, columns) = window, index.shape
    pad_y, pad_x = -rows % h, -columns % w
    index = F.pad(index, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2), value=-1)
    windows = index.unfold(0, h, h).unfold(1, w, w)  # [M rows, M columns, h, w]
    return windows.flatten(2).flatten(0, 1), *windows.shape[:2]
