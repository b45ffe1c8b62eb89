"""What the Markdown files say can be done: links lead somewhere, commands and examples run, the first page is a page.

    pytest tests/test_docs.py USAGE.md
    pytest tests/test_docs.py -m slow        # every command of README and USAGE that takes no minutes, as printed

(Python examples are run where they stand: `pytest USAGE.md tutorials`.)
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tutorials.examples import make
from yojo import score

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "USAGE.md", "BENCHMARKS.md", "LOG.md", "weights/README.md")
PAGES = [*map(ROOT.joinpath, TOP), *sorted(ROOT.glob("tutorials/**/*.md"))]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:python -m|torchrun)\s")
# What takes minutes: the suite itself, and what test_tiny.py runs.
MINUTES = ("-m pytest", "yojo.train --tiny", "yojo.evaluate --tiny", "yojo.grpo --tiny", "yojo.claims answers")
MINUTES += ("yojo.claims data", "yojo.claims grpo")


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def commands(path: Path) -> list[str]:
    """The commands of the code blocks, and those in running text, which may be wrapped."""
    blocks = [block.replace("\\\n", " ") for _, block in FENCE.findall(path.read_text(encoding="utf-8"))]
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [line for line in [*lines, *re.findall(r"`([^`]+)`", prose(path))] if COMMAND.match(line)]


def anchors(path: Path) -> set[str]:
    """The names that a hub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        page = (path.parent / file if file else path).resolve()
        assert page.exists() and page.is_relative_to(ROOT) and not page.is_relative_to(ROOT / "runs"), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_no_line_of_prose_is_longer_than_120_characters(path):
    assert not [line for line in prose(path).splitlines() if len(line) > 120 and not line.startswith("|")]


def test_the_first_page_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_every_file_is_named_in_readme_or_usage():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "USAGE.md"))
    names = {path.stem for path in (ROOT / "yojo").rglob("*.py")} - {"__init__"}
    assert names <= set(re.findall(r"[`\[](\w+)(?:\.py)?[`\]]", text))


def test_the_first_page_shows_what_score_prints(command):
    """Ranks and texts to the letter; scores differ in their last digits by processor."""
    status, printed, _ = command(score, "--tiny")
    shown = next(
        block for _, block in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")) if "true facts" in block
    )
    ours, theirs = (re.findall(r"-?\d+\.\d+", text) for text in (printed, shown))
    assert status == 0 and [float(n) for n in ours] == pytest.approx([float(n) for n in theirs], abs=0.005)
    without = [re.sub(r"-?\d+\.\d+", "", text).split() for text in (printed[printed.index("\n\n") :], shown)]
    assert without[0] == without[1]


def parse_only(parser, _):
    """In place of `cli.run`; a command that is only named takes no options."""
    args = parser.parse_args()
    if len(sys.argv) > 1:
        parser.check(args)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_command_has_the_options_it_is_shown_with(path, command, monkeypatch):
    for line in commands(path):
        words = shlex.split(line, comments=True)
        name, *words = words[words.index("-m") + 1 :]
        module = importlib.import_module(name)
        if name.startswith("yojo."):
            monkeypatch.setattr(module, "run", parse_only)
            status, _, err = command(module, *words)
            assert status == 0, f"{line}: {err}"


def test_every_option_that_usage_names_is_one(command):
    names = sorted(
        {path.stem for path in (ROOT / "yojo").glob("*.py") if "Parser(" in path.read_text(encoding="utf-8")} - {"cli"}
    )
    helps = [command(importlib.import_module(f"yojo.{name}"), "--help")[1] for name in names]
    helps += [command(importlib.import_module("yojo.bench"), sub, "--help")[1] for sub in ("score", "train", "load")]
    helps.append(command(importlib.import_module("yojo.claims"), "table", "--help")[1])
    known = set(re.findall(r"--[a-z-]+", " ".join(helps)))
    assert set(re.findall(r"`(--[a-z-]+)", prose(ROOT / "USAGE.md"))) <= known


@pytest.mark.parametrize("card", ["H200", "H100"])
def test_benchmarks_shows_what_a_gpu_took(card):
    """Of the committed run: milliseconds and, in brackets, the ratio to joint."""
    found = json.loads((ROOT / f"tutorials/runs/gpu_{card.lower()}_now.json").read_text(encoding="utf-8"))
    (rows,) = (value for name, value in found.items() if name.startswith("bench score --n 2 4 8 16"))
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").split(f"## Speed on one NVIDIA {card}\n")[1]
    names = {"transformers, bare trunk": "`transformers`' bare trunk", "transformers, released way": "the released way"}
    for way in dict.fromkeys(row["way"] for row in rows if "picture" not in row["way"]):
        took = [row for row in rows if row["way"] == way]
        cells = [f"{1000 * row['seconds']:.0f} ({row['times_joint']:.1f})" for row in took]
        cells = [cell.removesuffix(" (1.0)") for cell in cells] if way == "one pass, joint" else cells
        assert f"| {names.get(way, way)} | {' | '.join(cells)} |" in text


def test_the_example_files_are_what_their_script_makes(tmp_path):
    make.write(tmp_path)
    made, kept = (
        {p.relative_to(at): p for p in at.rglob("*") if p.suffix in (".png", ".jsonl")} for at in (tmp_path, make.HERE)
    )
    assert made.keys() == kept.keys()
    for name in made:
        if name.suffix == ".png":
            ours, theirs = (Image.open(path[name]).convert("RGB") for path in (made, kept))
            assert ours.size == theirs.size
            assert max(most for _, most in ImageChops.difference(ours, theirs).getextrema()) <= 2, name
        else:
            assert made[name].read_bytes() == kept[name].read_bytes(), name


@pytest.mark.slow
def test_every_command_runs_as_printed(tmp_path):
    """Beside links to the project's folders, in the order in which README and USAGE show them."""
    for name in ("yojo", "tutorials", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for line in (line for page in ("README.md", "USAGE.md") for line in commands(ROOT / page)):
        if not any(word in line for word in MINUTES):
            done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            ran += 1
    assert ran >= 15
