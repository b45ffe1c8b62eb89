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
    if json.loads(drawn.info["shown"])["drawn by"] != json.loads(kept.info["shown"])["drawn by"]:
        return  # other versions draw letters and margins otherwise
    assert drawn.size == kept.size
    far = ImageChops.difference(drawn, kept).convert("L").point(lambda level: 255 * (level > 64)).histogram()[255]
    assert far < 0.005 * drawn.width * drawn.height


@pytest.mark.parametrize(
    "name, file, row, key",
    [
        ("masks_compared", "masks.json", 0, "joint"),
        ("more_answers", "masks.json", -1, "isolated"),
        ("measured", "bench_n.json", 0, "seconds"),
        ("measured", "bench_p.json", 0, "seconds"),
        ("grpo_runs", "grpo/joint-0.jsonl", 0, "quality"),
    ],
)
def test_one_changed_digit_that_a_figure_draws_is_noticed(name, file, row, key, tmp_path, monkeypatch):
    kept, text = Image.open(figures.FOLDER / f"{name}.png"), (figures.RUNS / file).read_text(encoding="utf-8")
    assert_shows_the_same(figures.FIGURES[name](), kept)
    lines = file.endswith(".jsonl")
    rows = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    rows[row][key] += 0.001
    shutil.copytree(figures.RUNS, tmp_path / "runs", copy_function=shutil.copyfile)
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / "runs" / file).write_text(text, encoding="utf-8")
    monkeypatch.setattr(figures, "RUNS", tmp_path / "runs")
    with pytest.raises(AssertionError):
        assert_shows_the_same(figures.FIGURES[name](), kept)


def test_every_figure_has_a_lesson_and_every_shown_figure_is_drawn_here():
    shown = {
        name for path in LESSONS for name in re.findall(r"\(figures/(\w+)\.png\)", path.read_text(encoding="utf-8"))
    }
    assert shown == set(figures.FIGURES) == {path.stem for path in figures.FOLDER.glob("*.png")}
