"""Accuracies, tau-b and intervals against values worked by hand.

pytest tests/test_metrics.py
"""

import random

import numpy as np
import pytest

from yojo import metrics


@pytest.mark.parametrize(
    "scores, ranks, value",
    [
        ([3, 1, 2], [1, 2, 3], 1.0),
        ([1, 3, 2], [1, 2, 3], 0.0),
        ([3, 3, 2], [1, 2, 3], 0.5),  # a tie for the top counts by its share
        ([0, 0, 0, 0], [2, 1, 3, 4], 0.25),
        ([1, 5, 2], [1, 1, 3], 1.0),  # any of several best will do
    ],
)
def test_best_of_n(scores, ranks, value):
    assert metrics.best_of_n(scores, ranks) == value


def test_a_score_that_is_not_finite_raises():
    with pytest.raises(ValueError, match="finite"):
        metrics.best_of_n([1.0, float("nan")], [1, 2])


def test_pairwise():
    assert metrics.pairwise([3, 2, 1], [1, 2, 3]) == 1
    assert metrics.pairwise([3, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert metrics.pairwise([1, 1], [1, 2]) == 0.5
    assert metrics.pairwise([1, 2], [1, 1]) is None


def test_tau_b():
    assert metrics.tau_b([4, 3, 2, 1], [1, 2, 3, 4]) == 1
    assert metrics.tau_b([1, 2, 3, 4], [1, 2, 3, 4]) == -1
    # pairs: (a,b) tied in ranks, (a,c) and (b,c) agree: 2 / sqrt(3 * 2)
    assert metrics.tau_b([3, 2, 1], [1, 1, 2]) == pytest.approx(2 / 6**0.5)
    assert metrics.tau_b([1, 1], [1, 2]) is None


def test_the_interval_of_a_coin():
    """500 of 1000: the textbook interval is 0.5 +- 1.96 sqrt(0.25 / 1000) = 0.031."""
    low, high = metrics.interval([0, 1] * 500)
    assert low == pytest.approx(0.469, abs=0.005) and high == pytest.approx(0.531, abs=0.005)


def test_means_leave_out_what_is_undefined():
    assert metrics.mean([1.0, None, 0.0]) == 0.5


def test_baselines_read_texts_only():
    answers = ["a b c", "a b d e", "x y z"]
    choice = {name: int(np.argmax(baseline(answers))) for name, baseline in metrics.BASELINES.items()}
    assert choice == {"random": 0, "longest": 1, "shortest": 0, "first": 0, "last": 2, "medoid": 1}
    assert metrics.medoid(answers) == [5, 6, 3]  # its own words, and two shared between the first two
    assert metrics.best_of_n(metrics.BASELINES["random"](answers), [1, 2, 3]) == pytest.approx(1 / 3)


def test_a_vote_prefers_what_is_said_twice_among_what_scores_high():
    responses = ["t", "f", "u", "t", "f"]
    assert metrics.vote([2, -2, 2.1, 2, -2], responses) == [2, 0, 1, 2, 0]


def test_noise_breaks_ties_at_random():
    rng = random.Random(0)
    wins = [metrics.best_of_n(metrics.with_noise([1.0, 1.0, 0.0], rng, 0.01), [1, 2, 3]) for _ in range(400)]
    assert 0.4 < np.mean(wins) < 0.6
