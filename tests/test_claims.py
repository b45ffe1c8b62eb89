"""The studies behind the table of claims, made small; and that the tables say what the committed runs hold.

    pytest tests/test_claims.py

What the whole studies wrote is in tutorials/runs.
"""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from yojo import claims
from yojo.cli import WEIGHTS
from yojo.core.data import Record
from yojo.core.grpo import GrpoConfig
from yojo.core.loss import best_of_n, bradley_terry
from yojo.metrics import interval_over_seeds
from yojo.tiny import captions, studies
from yojo.tiny.captions import with_policy
from yojo.tiny.experiment import KINDS, SINGLE, TINY, disjoint_pairs, train_kind

ROOT = Path(__file__).parent.parent
SMALL = replace(TINY, records=4, fit=replace(TINY.fit, steps=2))
FOUR = Record("Describe the star.", ["w", "x", "y", "z"], [2, 1, 1, 4], images=[Path("p.png")])


# ----------------------------------------------------------------------------------------------------- the baseline


def test_a_record_of_four_gives_two_disjoint_pairs():
    first, second = disjoint_pairs(FOUR)
    assert (first.responses, first.rankings) == (["w", "x"], [2, 1])
    assert (second.responses, second.rankings) == (["y", "z"], [1, 2])
    assert first.prompt == second.prompt == FOUR.prompt and first.images == second.images == FOUR.images
    three = replace(FOUR, responses=["w", "x", "y"], rankings=[1, 1, 3])
    assert [(p.responses, p.rankings) for p in disjoint_pairs(three)] == [(["w", "x"], [1, 1])]  # the odd one is left


def test_on_pairs_the_two_losses_are_one():
    """So what sets the baseline apart from isolated is what it is shown: pairs instead of groups."""
    scores, ranks = torch.randn(6, 2, dtype=torch.float64), torch.tensor([[1, 2], [2, 1]] * 3)
    assert torch.allclose(best_of_n(scores, ranks), bradley_terry(scores, ranks))


@pytest.mark.parametrize("sizes", [(4,), studies.MIXED])
def test_the_baseline_reads_as_many_responses_a_step_and_one_at_a_time(monkeypatch, sizes):
    shown = {}
    monkeypatch.setattr("yojo.tiny.experiment.train", lambda rm, records, c, *_, **__: shown.update({rm: (records, c)}))
    with studies.groups("pairs", 0, 60, sizes) as made:
        for kind in KINDS:
            train_kind(kind, SMALL, made, 0, "cpu", kind)
    assert [(rm.mode, c.loss) for rm, (_, c) in shown.items()] == [
        ("joint", "best-of-n"),
        ("isolated", "best-of-n"),
        ("isolated", "bradley-terry"),
        ("isolated", "bradley-terry"),
    ]
    read = [c.records * sum(len(r.responses) for r in records) / len(records) for records, c in shown.values()]
    assert read == pytest.approx([read[0]] * 4, abs=1)


# ---------------------------------------------------------------------------------------------------------- studies


def test_ranks_are_swapped_inside_the_pairs_that_the_baseline_learns_from():
    rng = random.Random(0)
    assert studies.with_ranks_swapped(FOUR, 0.0, rng) == FOUR
    assert studies.with_ranks_swapped(FOUR, 1.0, rng).rankings == [1, 2, 4, 1]
    swapped = [studies.with_ranks_swapped(FOUR, 0.4, rng).rankings for _ in range(2000)]
    for pair in (slice(0, 2), slice(2, 4)):
        assert sum(ranks[pair] != FOUR.rankings[pair] for ranks in swapped) / 2000 == pytest.approx(0.4, abs=0.04)


def test_arms_learn_from_the_same_groups_and_are_tested_on_others():
    def read(*which):
        with studies.groups(*which) as made:
            return [(r.prompt, r.responses, r.rankings, r.images[0].read_bytes()) for r in made]

    assert read("test 4", 0, 20) == read("test 4", 0, 20) != read("test 4", 1, 20)
    pictures = [{picture for *_, picture in read(name, 0, 40)} for name in ("test 4", "train 100")]
    assert not pictures[0] & pictures[1]


def test_a_small_study_of_answers_and_of_data(monkeypatch):
    monkeypatch.setattr(studies, "TESTS", 12)
    for kind in ("joint", "isolated"):
        found = studies.run_answers(kind, "2 to 8", 0, SMALL, "cpu")
        assert {k for k in found if k.isdecimal()} == {"2", "4", "8", "16"}
        assert all(0 <= found[n] <= 1 for n in ("2", "4", "8", "16"))
    for kind in KINDS:
        first, again = (studies.run_data(kind, 10, 0.4, 1, SMALL, "cpu") for _ in range(2))
        assert first == again and 0 <= first["accuracy"] <= 1


def test_a_small_study_of_grpo(monkeypatch):
    monkeypatch.setattr(studies, "TESTS", 12)
    monkeypatch.setattr(studies, "EVERY", 2)
    monkeypatch.setattr(studies, "ASKED", 8)
    monkeypatch.setattr(captions, "EXAMINED", 8)
    found = studies.run_grpo(
        SINGLE, "100 groups, 40% swapped", 0, SMALL, GrpoConfig(steps=3, prompts=2, group=3), "cpu"
    )
    assert [look["step"] for look in found["curve"]] == [-1, 1, 2]
    assert all(0 <= look["held_out_quality"] <= 1 for look in found["curve"])
    assert 0 <= found["identical"] <= found["even"] <= 1, "isolated: one text, one reward"
    assert set(found["skills"]) == {"backbone", "before", "after"}
    assert found["skills"]["backbone"]["look up"] > 0.9


def test_skills_are_those_of_the_adapter_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(studies, "ASKED", 32)
    rm = with_policy(WEIGHTS / "tiny-rm", "cpu")
    before = {who: studies.skills(rm, 0, who) for who in (None, "policy", "reference")}
    assert before["policy"] == before["reference"] != before[None]
    assert before[None]["place"] > before["policy"]["place"]  # fine-tuned on noisy captions, it says more than asked


# ----------------------------------------------------------------------------------------------------------- tables


def test_pairing_is_by_seed():
    """Seeds may stand in any order; one that is missing is no pair."""
    runs = [{"kind": a, "seed": s, "x": x} for a, s, x in (("j", 1, 5.0), ("j", 0, 3.0), ("i", 0, 1.0), ("i", 1, 4.0))]
    assert claims.picked(runs, "x", kind="j") == [3.0, 5.0]
    assert claims.minus(runs, "x", "j", "i") == [2.0, 1.0]
    with pytest.raises(AssertionError):
        claims.minus(runs[:-1], "x", "j", "i")


def test_the_table_of_the_study_of_data_by_hand():
    """One setting, two seeds: means, and Student's t of one degree of freedom (12.71) by hand."""
    cases = [(s, n) for s in studies.SWAPPED for n in studies.GROUPS]
    runs = [
        {"kind": kind, "groups": n, "swapped": s, "seed": seed, "accuracy": value + seed / 100}
        for s, n in cases
        for seed in (0, 1)
        for kind, value in zip(KINDS, (0.9, 0.8, 0.7, 0.5), strict=True)
    ]
    first = claims.data_table(runs).splitlines()[1]
    assert "0.905 [0.841, 0.969]" in first, "0.9, 0.91: half a width of 12.71 * 0.00707 / sqrt(2)"
    assert re.findall(r"(\S+ \[[^]]+\])", first)[4:] == [f"{gap} [{gap}, {gap}]" for gap in ("0.100", "0.100", "0.200")]


@pytest.mark.parametrize("count, t", [*enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2)])
def test_intervals_over_seeds(count, t):
    """Half a width of t * deviation / sqrt(n), t with n - 1 degrees of freedom (printed tables of Student's t)."""
    values = [float(i) for i in range(count)]
    low, high = interval_over_seeds(values)
    deviation = (sum((v - sum(values) / count) ** 2 for v in values) / (count - 1)) ** 0.5
    assert low + high == pytest.approx(2 * sum(values) / count)
    assert high - low == pytest.approx(2 * t * deviation / count**0.5, rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_other_numbers_of_seeds_have_no_interval(count, command):
    with pytest.raises(ValueError, match="2 to 10"):
        interval_over_seeds([0.5] * count)
    status, _, err = command(claims, "data", "--seeds", count)
    assert status == 2 and ("at most 10" in err or "whole number from 2" in err)


# --------------------------------------------------------------------------------------------------- what is committed


def committed(name):
    return json.loads((ROOT / f"tutorials/runs/{name}.json").read_text())


@pytest.mark.parametrize("name", claims.STUDIES)
def test_the_page_shows_the_table_of_a_study(name):
    found = committed(f"claims_{name}")
    _, seeds, tabled, _ = claims.STUDIES[name]
    assert len(found["seeds"]) == seeds and found["hardware"]
    kinds = {r["kind"] for r in found["runs"]}
    assert len(found["runs"]) % (seeds * len(kinds)) == 0 and kinds <= set(KINDS)
    assert tabled(found["runs"]) in (ROOT / "BENCHMARKS.md").read_text()


def test_the_page_shows_the_table_of_claims(command):
    status, out, err = command(claims, "table")
    assert status == 0, err
    assert out.strip() in (ROOT / "BENCHMARKS.md").read_text(), "python -m yojo.claims table prints what belongs there"
    assert len(out.splitlines()) == 2 + len(claims.CLAIMS)
    _, out, _ = command(claims, "table", "--short")
    assert out.strip() in (ROOT / "README.md").read_text(), "python -m yojo.claims table --short prints it"


def test_what_the_table_names_is_there():
    for c in claims.CLAIMS:
        for words in re.findall(r"`([^`]+)`", c.commands):
            assert (ROOT / f"yojo/{words.split()[0]}.py").exists()
        assert not c.lesson or list((ROOT / "tutorials").glob(f"{c.lesson}_*.md"))


def test_the_verdicts_of_the_table_hold():
    """What stands in words in a row, read off the same files: intervals over seeds."""
    f = claims.Files()
    alone, beside = ({s["seed"]: s for s in f[name]["per_seed"]} for name in claims.TRAINED)
    for other in ("isolated", "single"):  # alone nothing is gained by comparing; beside each other everything
        low, high = interval_over_seeds([alone[s]["joint"] - alone[s][other] for s in alone])
        assert low <= 0.01
        low, high = interval_over_seeds([beside[s]["joint"] - beside[s][other] for s in beside])
        assert low > 0.5
    assert all(s["isolated_vote"] > 0.99 for s in beside.values())
    runs, few = f["claims_data"]["runs"], {"groups": 100, "swapped": 0.0}
    for whole in ("joint", "isolated", "pairs"):
        low, high = interval_over_seeds(claims.minus(runs, "accuracy", whole, "single", **few))
        assert low > 0
    for swap in studies.SWAPPED:
        for count in studies.GROUPS:
            low, high = interval_over_seeds(
                claims.minus(runs, "accuracy", "isolated", "pairs", groups=count, swapped=swap)
            )
            assert low < 0 < high, "no difference between the losses beyond that of seeds"
            for other in ("isolated", "pairs"):
                low, high = interval_over_seeds(
                    claims.minus(runs, "accuracy", "joint", other, groups=count, swapped=swap)
                )
                assert low < 0 < high, "nor one of attention between the answers"
    policies = f["claims_grpo"]["runs"]
    judged, became = ([r[key] for r in policies] for key in ("reward_accuracy", "sampled_after"))
    assert np.corrcoef(judged, became)[0, 1] == pytest.approx(0.87, abs=0.005)
    good = [r for r in policies if r["reward_accuracy"] >= claims.GOOD]  # lesson 11: eleven good policies, four not
    places = sorted((r["sampled_after"], r["skills"]["after"]["place"]) for r in good)
    assert len(places) == 15
    assert all(sampled < 0.92 and 0.53 <= round(place, 2) <= 0.65 for sampled, place in places[:4])
    assert all(sampled >= claims.BEST and round(place, 2) >= 0.98 for sampled, place in places[4:])
    noisy = {"groups": 3000, "swapped": 0.4}  # lesson 08: all pairs are ahead of joint, in every seed
    assert min(claims.minus(runs, "accuracy", "pairs", "joint", **noisy)) > 0
    assert [round(x, 2) for x in claims.picked(runs, "accuracy", kind="single", **noisy)] == [0.85, 0.73, 0.26]
    for learned in studies.LEARNED_FROM:
        low, high = interval_over_seeds(claims.minus(policies, "sampled_after", "joint", "single", learned=learned))
        assert (low > 0) == ("swapped" in learned)
    for r in f["masks"]:
        if r.get("trained") == "joint" and r["task"] == "absolute":
            assert abs(r["joint, mean of 4 orders"] - r["joint"]) < 0.02
