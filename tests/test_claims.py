"""The studies behind the table of claims, made small; and that the tables say what the committed runs hold.

    pytest tests/test_claims.py

Whole studies take an hour and more (`python -m yojo.claims grpo`). What they wrote is in tutorials/runs.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from yojo.cli import WEIGHTS
from yojo.core.data import Record
from yojo.core.grpo import GrpoConfig
from yojo.core.loss import best_of_n, bradley_terry
from yojo.metrics import interval_over_seeds
from yojo.tiny import captions, studies
from yojo.tiny.captions import with_policy
from yojo.tiny.experiment import ARMS, SINGLE, TINY, disjoint_pairs, train_arm

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
        for arm in ARMS:
            train_arm(arm, SMALL, made, 0, "cpu", arm)
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


def test_a_small_study_of_answers_and_of_data():
    for arm in ("joint", "isolated"):
        found = studies.run_answers(arm, "2 to 8", 0, SMALL, 12, "cpu")
        assert {k for k in found if k.isdecimal()} == {"2", "4", "8", "16"}
        assert all(0 <= found[n] <= 1 for n in ("2", "4", "8", "16"))
    for arm in ARMS:
        first, again = (studies.run_data(arm, 10, 0.4, 1, SMALL, 12, "cpu") for _ in range(2))
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


def test_intervals_over_seeds_by_hand():
    """0, 1, 2: mean 1, standard deviation 1, half width 4.303 / sqrt(3)."""
    low, high = interval_over_seeds([0.0, 1.0, 2.0])
    assert (low + high) / 2 == pytest.approx(1) and high - 1 == pytest.approx(4.303 / 3**0.5, abs=0.01)
