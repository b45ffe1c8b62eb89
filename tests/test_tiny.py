"""What the commands with `--tiny` must show, typed as a user types it. Minutes, so marked slow.

    pytest -m slow tests/test_tiny.py

Accuracies are floors, not the figures themselves: those differ a little by processor. The default seed holds them;
BENCHMARKS.md shows what three seeds gave.
"""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def tiny(tmp_path, *words, command="train"):
    file = tmp_path / "result.json"
    subprocess.run([sys.executable, "-m", f"yojo.{command}", "--tiny", "--json", file, *words], check=True)
    return json.loads(file.read_text())


def test_absolute(tmp_path):
    r = tiny(tmp_path, "--baseline")
    assert r["groups"] + r["without_preference"] >= 2000 and r["without_preference"] < 50 and r["n"] == 4
    for mode in ("joint", "isolated", "single"):
        assert r[mode] >= 0.90, mode
        assert r[f"{mode}_blank"] <= 0.30 and r[f"{mode}_swapped"] <= 0.30, mode
        assert abs(r[f"{mode}_heldout"] - r[mode]) <= 0.05, mode
    for baseline in ("random", "longest", "first", "medoid"):
        assert r[baseline] <= 0.30, baseline


def test_corroborated(tmp_path):
    r = tiny(tmp_path, "--task", "corroborated")
    assert r["groups"] >= 2000 and r["n"] == 6
    assert r["joint"] >= 0.85
    assert abs(r["isolated"] - 1 / 3) <= 0.05
    assert r["joint_blank"] <= 0.52
    assert r["any_true"] == pytest.approx(1 / 2)


def test_pretraining_learns_to_see(tmp_path):
    """The first minute of the recipe: the read-out of the cells falls far below a guess by frequency."""
    words = ["--out", tmp_path / "tiny", "--steps", "200"]
    subprocess.run([sys.executable, "-m", "yojo.pretrain", *words], check=True)
    log = [json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines()]
    assert log[0]["cells"] > 1.3 and log[-1]["cells"] < 0.5
    assert log[-1]["words"] < log[0]["words"] / 4


def test_grpo_learns_to_tell_the_truth(tmp_path):
    for row in tiny(tmp_path, command="grpo")[:2]:
        assert row["reward"] in ("joint", "isolated")
        assert row["sampled_after"] >= row["sampled_before"] + 0.15, row
        assert row["greedy_after"] >= row["greedy_before"], row


def test_what_comparison_adds(tmp_path):
    """Under the mask it was trained with, on `corroborated`: joint far above isolated's ceiling, and above itself
    without comparison."""
    rows = tiny(tmp_path, command="evaluate")
    joint = next(r for r in rows if r.get("task") == "corroborated" and r["trained"] == "joint")
    assert joint["joint"] >= 0.8 > joint["isolated"]
    assert [r["n"] for r in rows if "n" in r] == [2, 4, 8, 16]
