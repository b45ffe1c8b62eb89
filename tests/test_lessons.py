"""The lessons' pictures: each is drawn by a function of `tutorials/figures.py`, and each is shown somewhere.

pytest tests/test_lessons.py tutorials        # `tutorials` runs every example of every lesson
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops

TUTORIALS = Path(__file__).parent.parent / "tutorials"
spec = importlib.util.spec_from_file_location("figures", TUTORIALS / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

LESSONS = sorted(TUTORIALS.glob("[0-9]*.md"))


def assert_shows_the_same(ours: Image.Image, theirs: Image.Image):
    """The numbers and words that were drawn, which `save` writes beside the pixels."""
    ours, theirs = (json.loads(picture.info["shown"]) for picture in (ours, theirs))
    assert ours["texts"] == theirs["texts"]
    assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_on_disk_is_what_its_function_draws(name):
    drawn, kept = figures.FIGURES[name](), Image.open(figures.FOLDER / f"{name}.png").convert("RGB")
    assert_shows_the_same(drawn, kept)
    assert drawn.size == kept.size
    far = ImageChops.difference(drawn, kept).convert("L").point(lambda level: 255 * (level > 64)).histogram()[255]
    assert far < 0.005 * drawn.width * drawn.height, "fonts differ a little from version to version, pictures do not"


@pytest.mark.parametrize("name, file", [("masks_compared", "masks.json"), ("measured", "bench_n.json")])
def test_one_changed_digit_in_a_run_is_noticed(name, file, tmp_path, monkeypatch):
    shutil.copytree(figures.RUNS, tmp_path / "runs")
    rows = json.loads((figures.RUNS / file).read_text())
    key = next(key for key in ("joint", "seconds") if key in rows[0])
    rows[0][key] += 0.001
    (tmp_path / "runs" / file).write_text(json.dumps(rows))
    monkeypatch.setattr(figures, "RUNS", tmp_path / "runs")
    with pytest.raises(AssertionError):
        assert_shows_the_same(figures.FIGURES[name](), Image.open(figures.FOLDER / f"{name}.png"))


def test_every_figure_has_a_lesson_and_every_shown_figure_is_drawn_here():
    shown = {name for path in LESSONS for name in re.findall(r"\(figures/(\w+)\.png\)", path.read_text())}
    assert shown == set(figures.FIGURES) == {path.stem for path in figures.FOLDER.glob("*.png")}
