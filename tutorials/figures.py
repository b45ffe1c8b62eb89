"""Every picture of the lessons, drawn from the project's own objects.

python -m tutorials.figures          redraws all of them into tutorials/figures/
"""

import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from yojo import Processor, shapes
from yojo.cli import WEIGHTS
from yojo.data import collate
from yojo.mask import draw

FOLDER = Path(__file__).parent / "figures"


def scene() -> Image.Image:
    """The picture that lesson 00 judges answers about, four times its size."""
    picture = shapes.render(shapes.make_scene(random.Random(0)))
    return picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST)


def mask_joint() -> Image.Image:
    return _mask("joint")


def mask_isolated() -> Image.Image:
    return _mask("isolated")


def _mask(mode: str) -> Image.Image:
    processor = Processor.from_folder(WEIGHTS / "tiny", max_tokens=4096)
    encoded = processor.encode("Describe the star.", ["a red star", "a star", "a small star"])
    labels = [processor.tokenizer.name(t).strip() or "newline" for t in encoded.ids.tolist()]
    return draw(collate([encoded], mode).mask, labels=labels, cell=16)


def masks_with_a_picture() -> Image.Image:
    """Both modes side by side, for a prompt with a picture."""
    processor = Processor.from_folder(WEIGHTS / "tiny", max_tokens=4096)
    world = shapes.make_scene(random.Random(0))
    encoded = processor.encode("Describe the star.", ["a red star", "a star", "a small star"], shapes.render(world))
    halves = [draw(collate([encoded], mode).mask, cell=7) for mode in ("joint", "isolated")]
    width, height = halves[0].size
    both = Image.new("RGB", (2 * width + 20, height + 30), "white")
    for i, (half, name) in enumerate(zip(halves, ("joint", "isolated"), strict=True)):
        both.paste(half, (i * (width + 20), 30))
        ImageDraw.Draw(both).text((i * (width + 20) + width / 2, 8), name, "black", ImageFont.load_default(18), "ma")
    return both


FIGURES: dict[str, Callable[[], Image.Image]] = {
    f.__name__: f for f in (scene, mask_joint, mask_isolated, masks_with_a_picture)
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        figure().save(FOLDER / f"{name}.png")
        print(FOLDER / f"{name}.png")
