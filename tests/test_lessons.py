"""The lessons' pictures: each is drawn by a function of `tutorials/figures.py`, and each is shown somewhere. Their
notebooks: each is what `tutorials/notebooks.py` makes of its lesson. And the lines that lesson 07 breaks on purpose:
the tests that it names turn red.

    pytest tests/test_lessons.py tutorials        # `tutorials` runs every example of every lesson
    pytest tests/test_lessons.py -m slow          # breaks the lines
"""

import doctest
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image, ImageChops

from tutorials import notebooks
from yojo.core import molmo2

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


def test_lesson_02_defines_heads_and_joined_as_the_network_does():
    text = (TUTORIALS / "02_the_network.md").read_text(encoding="utf-8")
    for function in (molmo2.heads, molmo2.joined):
        assert inspect.getsource(function).splitlines()[-1].strip() in text


def test_a_word_of_the_glossary_stands_in_the_lessons_that_it_names():
    rows = re.findall(
        r"^\| ([^|]+) \| .* \| (\d\d(?:, \d\d)*) \|$", (TUTORIALS / "glossary.md").read_text(encoding="utf-8"), re.M
    )
    assert len(rows) > 40 and rows == sorted(rows, key=lambda row: row[0].lower())
    for words, numbers in rows:
        for number in numbers.split(", "):
            (lesson,) = TUTORIALS.glob(f"{number}_*.md")
            text = " ".join(lesson.read_text(encoding="utf-8").lower().split())
            for word in words.lower().split(", "):
                assert re.search(rf"\b{re.escape(word)}(s|es|d)?\b", text), (word, number)


# ----------------------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_on_disk_is_what_its_lesson_makes(lesson):
    kept = (notebooks.FOLDER / f"{lesson.stem}.ipynb").read_text(encoding="utf-8")
    assert notebooks.notebook(lesson) == kept, "`python -m tutorials.notebooks` makes it again"


def test_there_is_a_notebook_for_each_lesson_and_no_other():
    assert [path.stem for path in sorted(notebooks.FOLDER.glob("*.ipynb"))] == [path.stem for path in LESSONS]


@pytest.mark.parametrize(
    "old, new",
    [
        ("A *separator* is", "The *separator* is"),
        (">>> row.prompt_length\n", ">>> row.prompt_length + 0\n"),
        ("\n13\n", "\n14\n"),
        ("(figures/mask_joint.png)", "(figures/mask_isolated.png)"),
    ],
)
def test_a_lesson_that_is_changed_alone_is_noticed(old, new, tmp_path):
    """In its prose, its code, what it prints, or a link."""
    lesson, changed = TUTORIALS / "04_separators_and_masks.md", tmp_path / "04_separators_and_masks.md"
    text = lesson.read_text(encoding="utf-8")
    assert text.count(old) == 1
    changed.write_text(text.replace(old, new), encoding="utf-8")
    assert notebooks.notebook(changed) != (notebooks.FOLDER / f"{lesson.stem}.ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_holds_every_example_and_all_prose_in_order_and_no_output(lesson):
    text = lesson.read_text(encoding="utf-8")
    cells = nbformat.reads(notebooks.notebook(lesson), as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    examples = doctest.DocTestParser().get_examples(text)
    assert "\n".join(cell.source for cell in code[1:]) + "\n" == "".join(example.source for example in examples)
    assert not any(cell.outputs or cell.execution_count for cell in code)
    shown = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    at = 0
    for want in (example.want for example in examples if example.want):
        at = shown.index(f"```text\n{want}```", at) + 1
    rest = iter(shown.split())
    prose = [part for part in doctest.DocTestParser().parse(notebooks.CONSOLE.sub("", text)) if isinstance(part, str)]
    words = re.sub(r"^```(python)?$", "", "".join(prose), flags=re.MULTILINE).split()
    assert all(word in rest for word in words if "](" not in word and not word.startswith("```"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(lesson):
    cells = nbformat.reads(notebooks.notebook(lesson), as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", re.sub(r"```.*?```", "", prose, flags=re.DOTALL)):
        assert (notebooks.FOLDER / target).exists(), target


# ------------------------------------------------------------------------------------- lines that lesson 07 breaks

BREAKS = TUTORIALS / "07_train_a_judge.md"


def breaks() -> list[tuple[str, str, list[bool]]]:
    """What the lesson says: a line, what takes its place, and which of the two tests turn red."""
    text = BREAKS.read_text(encoding="utf-8")
    lines = re.findall(r"```diff\n-(.*)\n\+(.*)\n```", text)
    rows = re.findall(r"^\|[^|]*\| (\S+) \| (\S+) \|$", text[text.index("```diff") :], re.MULTILINE)
    return [(*line, ["red" in cell for cell in row]) for line, row in zip(lines, rows[1:], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("old, new, red", breaks())
def test_a_broken_line_turns_the_tests_red_that_the_lesson_names(old, new, red, tmp_path):
    root = TUTORIALS.parent
    for name in ("yojo", "tests"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "weights").symlink_to(root / "weights")
    shutil.copy(root / "pyproject.toml", tmp_path)
    (file,) = (path for path in (tmp_path / "yojo/core").glob("*.py") if old in path.read_text().splitlines())
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")
    (command,) = re.findall(r"^python -m (pytest .*)$", BREAKS.read_text(encoding="utf-8"), re.MULTILINE)
    words = [sys.executable, "-m", *shlex.split(command), "-p", "no:cacheprovider"]
    printed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout
    assert [f"FAILED tests/{name}.py" in printed for name in ("test_single_pass", "test_frozen")] == red, printed
