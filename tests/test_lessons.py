"""The lessons' pictures: each is drawn by a function of `tutorials/figures.py`, and each is shown somewhere.

pytest tests/test_lessons.py tutorials        # `tutorials` runs every example of every lesson
"""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

TUTORIALS = Path(__file__).parent.parent / "tutorials"
spec = importlib.util.spec_from_file_location("figures", TUTORIALS / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

LESSONS = sorted(TUTORIALS.glob("[0-9]*.md"))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_on_disk_is_what_its_function_draws(name):
    drawn, kept = figures.FIGURES[name](), Image.open(figures.FOLDER / f"{name}.png").convert("RGB")
    assert drawn.size == kept.size
    far = ImageChops.difference(drawn, kept).convert("L").point(lambda level: 255 * (level > 64)).histogram()[255]
    assert far < 0.005 * drawn.width * drawn.height, "fonts differ a little from version to version, pictures do not"


def test_every_figure_has_a_lesson_and_every_shown_figure_is_drawn_here():
    shown = {name for path in LESSONS for name in re.findall(r"\(figures/(\w+)\.png\)", path.read_text())}
    assert shown == set(figures.FIGURES) == {path.stem for path in figures.FOLDER.glob("*.png")}


@pytest.mark.parametrize("path", [*LESSONS, TUTORIALS.parent / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (path.parent / target).exists(), target
