"""Pictures to patches: what the vision tower reads.

    image --resize--> one global view + overlapping crops --cut--> patches [views, P, 588], one row a 14x14 square
    pooling indices [M, window]: which patches each picture token is pooled from, -1 = none

An image gives one global view of size x size, then a tiling of crops that overlap by the margins, so that a small
object on a seam is whole in one of the crops. Each shared patch belongs to one crop, its owner. A video frame gives one
view and coarser windows.

Resizing is bilinear without antialiasing, rounded to whole grey levels, as in the released preprocessing; aspect ratio
is not kept. Facts: `preprocessor_config.json` of the release; `tests/data/molmo2_images.safetensors` holds the expected
tensors.

See it: `pytest tests/test_image.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from yojo.core.config import ImageConfig


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a record, from their files to the decoder; `Pictures()` is none.

    patches float32 [views, P, 3 * patch^2]; pooling int64 [M, window]; grids: of each image (global rows, columns,
    high-resolution rows, columns), of each frame (rows, columns); ids: its tokens in the row (`prompt.py`); features
    [M, D]: what a frozen tower made of the patches, which are gone then, or None (`Molmo2.keep_features`).
    """

    patches: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    pooling: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    grids: list[tuple[int, ...]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    features: Tensor | None = None

    def keeping(self, features: Tensor) -> "Pictures":
        """The same, with features in place of patches."""
        return replace(self, patches=self.patches[:0], features=features)


Size = tuple[int, int]  # width and height of a picture that is not opened; its patches have a shape and no contents


def images_to_patches(images: Sequence[Image.Image | Size], c: ImageConfig) -> Pictures:
    """RGB pictures -> global view and crops of each, in order; pooling indices count through all of them."""
    patches, pooling, grids, before = [], [], [], 0
    for image in images:
        pixels = _pixels(image)
        crops, crop_index = _crops(pixels, c)
        views = torch.cat([_resize(pixels, c.size, c.size, c)[None], crops])
        global_windows, *global_grid = pool_windows(torch.arange(c.side**2).view(c.side, c.side), c.pooling)
        crop_windows, *crop_grid = pool_windows(crop_index + c.side**2, c.pooling)
        windows = torch.cat([global_windows, crop_windows])
        patches.append(_cut(views, c.patch))
        pooling.append(torch.where(windows >= 0, windows + before, -1))
        grids.append((*global_grid, *crop_grid))
        before += len(views) * c.side**2
    return Pictures(torch.cat(patches), torch.cat(pooling), grids)


def frames_to_patches(frames: Sequence[Image.Image | Size], c: ImageConfig) -> Pictures:
    """RGB frames of a video -> one view each, pooled in coarser windows."""
    views = torch.stack([_resize(_pixels(frame), c.size, c.size, c) for frame in frames])
    index = torch.arange(len(frames) * c.side**2).view(-1, c.side, c.side)
    windows, rows, columns = zip(*(pool_windows(frame, c.video_pooling) for frame in index), strict=True)
    return Pictures(_cut(views, c.patch), torch.cat(windows), list(zip(rows, columns, strict=True)))


def _pixels(image: Image.Image | Size) -> Tensor:
    """RGB picture -> uint8 [3, height, width]; of a mere size on the meta device."""
    if isinstance(image, tuple):
        return torch.empty(3, *image[::-1], dtype=torch.uint8, device="meta")
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)


def _resize(pixels: Tensor, height: int, width: int, c: ImageConfig) -> Tensor:
    """uint8 [3, h, w] -> normalised float32 [3, height, width]. Grey levels are whole before they are scaled."""
    if pixels.is_meta:  # a shape is known at once; torch would work it out operation by operation
        return pixels.new_empty(3, height, width, dtype=torch.float32)
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

    The scale of a tiling is its size over the picture's, margins left out: the smaller of the ratios of the two sides.
    The smallest scale that is at least 1 wins; if there is none, the largest. Ties: fewer crops, then fewer rows.
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
        before, after = c.margins
        crop = torch.arange(tiles).repeat_interleave(c.side - before - after)
        crop = torch.cat([torch.zeros(before, dtype=torch.long), crop, torch.full((after,), tiles - 1)])
        return crop, torch.arange(len(crop)) - crop * (c.side - before - after)

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
