"""Everything the benchmark times computes the same scores; no time is ever asserted.

pytest tests/test_bench.py            (`-m slow`: training, loading and several prompts, too)
"""

import json
import math
from argparse import Namespace

import pytest
import torch

from yojo import bench, instruments, loading
from yojo.core import flops
from yojo.initial import size_config, write_random


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "weights"
    write_random(folder, "tiny", size_config("tiny"), torch.float32, 0)
    args = Namespace(device="cpu", seed=0, peer=True, compile=False)
    return bench.Setting(folder, args, torch.float32).prompted(60), loading.load_peer(folder, args, torch.float32)


@pytest.mark.parametrize("n, R", [(1, 10), (3, 10), (4, 200)])
@torch.no_grad()
def test_every_alternative_gives_the_same_scores(setting, n, R):
    s, peer = setting
    ways = bench.ways_of(s, n, R, peer)
    isolated, joint = ways["one pass, isolated"](), ways["one pass, joint"]()
    close = {"rtol": 2e-5, "atol": 1e-7}
    torch.testing.assert_close(torch.cat(ways["N separate passes"]()), isolated, **close)
    torch.testing.assert_close(ways["one padded batch of N"](), isolated, **close)
    torch.testing.assert_close(ways["prompt once, batch of N after it"](), isolated, **close)
    ends = [len(s.prompt.ids) + i * (R + 1) + R - 1 for i in range(n)]
    theirs = ways["transformers, bare trunk"]()[0, ends]
    torch.testing.assert_close(s.head(theirs), joint, **close)
    released = ways["transformers, released way"]()
    assert released.logits.shape[1] == len(s.prompt.ids) + n * (R + 1)
    torch.testing.assert_close(s.head(released.hidden_states[-1][0, ends]), joint, **close)


SMALL = ("--size", "tiny", "--rounds", 1, "--prompt-tokens", 60, "--response-tokens", 10, "--n", 2)


def test_score_prints_a_row_for_every_alternative(command, tmp_path):
    status, out, err = command(bench, "score", *SMALL, "--dtypes", "float32", "--json", tmp_path / "r.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())
    ways = ["N separate passes", "one padded batch of N", bench.CACHED, "one pass, isolated", "one pass, joint"]
    assert [row["way"] for row in rows] == [*ways, "N separate passes, picture 1x", "N separate passes, picture 2x"]
    assert all(row["way"] in out for row in rows)
    assert rows[4]["times_joint"] == rows[2]["times_cached"] == 1
    assert [row["way"] for row in rows if "of_peak" in row] == ways[3:]
    row = flops.row_of_lengths(60, (11, 11), 24, views=2, pooled=18)
    joint = sum(flops.one_pass(size_config("tiny"), row, "joint").values())
    assert rows[0]["counted"] == pytest.approx(flops.separate(size_config("tiny"), row) / joint, rel=0.01)
    picture = flops.images(size_config("tiny"), row.pictures)
    both = (flops.separate(size_config("tiny"), row) + picture) / (joint + picture)
    assert rows[5]["counted"] == pytest.approx(both, rel=0.01)


def test_alternatives_take_turns(monkeypatch):
    """Every round has each way once, every other one is its forerunner's reverse, and a ratio is a median of rounds."""
    calls, now = [], iter(range(1000))
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: next(now) ** 2)
    seconds, _ = instruments.take_turns(ways, 4, torch.device("cpu"), 0)
    rounds = [calls[i : i + 3] for i in range(6, 18, 3)]  # before these each once to warm up, once for its memory
    assert len(calls) == 18 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert rounds[1] == rounds[0][::-1] and rounds[3] == rounds[2][::-1]
    assert [seconds[name][0] for name in rounds[0]] == [1, 5, 9]  # (2 i + 1)^2 - (2 i)^2 of the i-th call
    assert instruments.ratio([1, 9, 4], [1, 3, 1]) == 3


def test_the_largest_of_numbers_that_hold_nan_is_nan():
    assert math.isnan(instruments.largest([0.0, math.nan, 1.0])) and instruments.largest([0.0, 2.0, 1.0]) == 2


@pytest.mark.slow
def test_several_prompts_are_measured_on_one_model(command, tmp_path):
    words = [*SMALL[:4], "--prompt-tokens", 60, 90, "--response-tokens", 10, "--n", 2, "--dtypes", "float32"]
    status, _, err = command(bench, "score", *words, "--json", tmp_path / "r.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["prompt_tokens"] for row in rows] == 7 * [60] + 7 * [90]


def test_sorted_batches_give_the_scores_of_one_by_one(command, tmp_path):
    status, out, err = command(bench, "batch", "--n", 20, "--rounds", 1, "--json", tmp_path / "r.json")
    assert status == 0 and "20 records" in out, err
    assert all(row["difference"] < 1e-5 for row in json.loads((tmp_path / "r.json").read_text()))


@pytest.mark.slow
def test_train_and_load_run(command, tmp_path):
    status, out, err = command(bench, "train", *SMALL, "--dtypes", "float32", "--peer")
    assert status == 0 and "our trunk in peft" in out, err
    words = ["--size", "tiny", "--rounds", 1, "--dtype", "float32", "--peer", "--json", tmp_path / "l.json"]
    status, out, err = command(bench, "load", *words)
    assert status == 0 and "transformers" in out, err
    cloned, ours, theirs = json.loads((tmp_path / "l.json").read_text())
    assert ours["difference"] < 2e-5 and theirs["weights"] > ours["weights"] > 4e6
    assert min(ours[f"{key}_s"] for key in ("load", "joint", "isolated")) > 0 and "joint_s" not in cloned


@pytest.mark.parametrize(
    "words, why",
    [
        (("score", "--n", "0", "--size", "tiny"), "'0' is no whole number from 1"),
        (("score", "--prompt-tokens", "5", "--size", "tiny"), "at least 27, with the picture's 25, at most 4096"),
        (("score", "--prompt-tokens", "60", "5000", "--size", "tiny"), "--prompt-tokens 5000: at least 27"),
        (("score", "--layers", "99"), "--layers 99: molmo2-4b has 1 to 36"),
        (("score", "--device", "cuda", "--size", "tiny"), "torch sees no CUDA device"),
        (("load", "--rounds", "0"), "'0' is no whole number from 1"),
        (("load", "--n", "0"), "'0' is no whole number from 1"),
        (("load", "--weights", "nowhere"), "nowhere holds no checkpoint"),
    ],
)
def test_bad_input_gets_one_line(command, words, why):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    status, _, err = command(bench, *words)
    assert status == 2 and why in err.splitlines()[-1] and "Traceback" not in err


def test_a_missing_peer_package_gets_one_line(command, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    status, _, err = command(bench, "load", "--size", "tiny", "--peer")
    assert status == 2 and "--peer needs the package transformers: pip install -r requirements-dev.txt" in err
