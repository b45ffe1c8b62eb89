"""Pictures become exactly the patches, windows and grids that the released preprocessing makes.

    pytest tests/test_image.py

`data/molmo2_images.safetensors` was written by transformers 5.23's own Molmo2 processors: input pixels beside the
expected tensors. Indices and grids must be equal; at exact ties of the interpolation a pixel may fall on the
neighbouring grey level (2/255), which depends on the number of threads.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from yojo.core.config import ImageConfig
from yojo.core.image import choose_tiling, frames_to_patches, images_to_patches, pool_windows
from yojo.settings import read_image_config

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "molmo2_images.safetensors")
RELEASED = read_image_config(DATA)
TINY = ImageConfig(size=56, margins=(1, 1), max_crops=4)
CASES = [
    *((f"tiny.{i}", [f"tiny.{i}"], TINY) for i in range(6)),
    ("tiny.pair_1_4", ["tiny.1", "tiny.4"], TINY),
    *((f"full.{i}", [f"full.{i}"], RELEASED) for i in range(2)),
]


def assert_same_pixels(ours, golden):
    far = (ours - golden).abs() > 1e-7
    assert far.float().mean() < 1e-3 and (ours - golden).abs().max() < 2 / 255 + 1e-6


def picture(name):
    return Image.fromarray(GOLDEN[f"{name}.image"].numpy())


def test_the_release_is_the_default():
    assert RELEASED == ImageConfig()


@pytest.mark.parametrize("name, images, config", CASES, ids=[c[0] for c in CASES])
def test_images_equal_the_golden_tensors(name, images, config):
    seen = images_to_patches([picture(i) for i in images], config)
    assert torch.equal(seen.pooling, GOLDEN[f"{name}.image_token_pooling"].long())
    assert seen.grids == [tuple(row) for row in GOLDEN[f"{name}.image_grids"].tolist()]
    if name.startswith("full"):
        assert list(seen.patches.shape) == GOLDEN[f"{name}.pixel_values_shape"].tolist()
        every_97th = seen.patches.flatten(0, 1)[::97]
        assert_same_pixels(every_97th, GOLDEN[f"{name}.pixel_values_every_97th_patch"])
    else:
        assert_same_pixels(seen.patches, GOLDEN[f"{name}.pixel_values"])


def test_video_frames_equal_the_golden_tensors():
    frames = [Image.fromarray(f) for f in GOLDEN["video.frames"].numpy()]
    seen = frames_to_patches(frames, ImageConfig(size=84))
    assert_same_pixels(seen.patches, GOLDEN["video.pixel_values_videos"])
    assert torch.equal(seen.pooling, GOLDEN["video.video_token_pooling"])
    assert [(len(frames), *seen.grids[0])] == [tuple(row) for row in GOLDEN["video.video_grids"].tolist()]


@pytest.mark.parametrize(
    "height, width, tiling",
    [
        (378, 378, (1, 1)),
        (100, 2000, (1, 1)),
        (112, 2000, (1, 8)),
        (2000, 112, (8, 1)),
        (378, 644, (1, 2)),
        (1, 1, (1, 1)),
    ],
)
def test_tilings_at_the_edges(height, width, tiling):
    assert choose_tiling(height, width, RELEASED) == tiling


def test_odd_grids_are_padded_by_hand():
    windows, rows, columns = pool_windows(torch.arange(9).view(3, 3), (2, 2))
    assert (rows, columns) == (2, 2)
    assert windows.tolist() == [[0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]


def test_every_patch_of_the_tiling_has_one_owner():
    seen = images_to_patches([Image.new("RGB", (700, 500))], RELEASED)
    owned = seen.pooling[seen.pooling >= RELEASED.side**2]
    rows, columns = choose_tiling(500, 700, RELEASED)
    assert rows * columns > 1
    assert len(owned) == len(owned.unique()) == (19 * rows + 8) * (19 * columns + 8)
