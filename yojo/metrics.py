"""How good scores are. scores: one list of floats a record; ranks: one list of ints, 1 = best.

    best-of-N accuracy   is the top-scored response among the best-ranked? (tied tops count by their share)
    pairwise accuracy    over all pairs of different rank: is the better one scored higher? (a tie counts one half)
    Kendall's tau-b      (concordant - discordant) / sqrt(pairs untied in scores * pairs untied in ranks)

Every accuracy comes with a bootstrap interval over records, and with baselines that read no picture.

See it: `pytest tests/test_metrics.py`.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from yojo.core.data import Record

Scores = Sequence[float]
Ranks = Sequence[int]


def best_of_n(scores: Scores, ranks: Ranks) -> float:
    """1, 0, or the share of best-ranked among tied top scores."""
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores must be finite, got {list(scores)}")
    top = [r for s, r in zip(scores, ranks, strict=True) if s == max(scores)]
    return top.count(min(ranks)) / len(top)


def accuracies(scores: Sequence[Scores], records: Sequence[Record]) -> list[float]:
    """`best_of_n` of every record."""
    return [best_of_n(s, r.rankings) for s, r in zip(scores, records, strict=True)]


def pairwise(scores: Scores, ranks: Ranks) -> float | None:
    """Share of ordered pairs the scores agree with; None where all ranks are tied."""
    pairs = [(scores[i], scores[j]) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else None


def tau_b(scores: Scores, ranks: Ranks) -> float | None:
    """Kendall's tau-b between scores and quality; None where one of them is all ties."""
    agree = [np.sign(scores[i] - scores[j]) * np.sign(ranks[j] - ranks[i]) for i in range(len(ranks)) for j in range(i)]
    untied = [sum(x[i] != x[j] for i in range(len(x)) for j in range(i)) for x in (scores, ranks)]
    return float(sum(agree)) / math.sqrt(untied[0] * untied[1]) if all(untied) else None


def mean(values: Sequence[float | None]) -> float:
    """Over the records where the figure is defined."""
    return float(np.mean([v for v in values if v is not None]))


DRAWS = 2000  # of the bootstrap


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean: records drawn again with replacement."""
    return macro_interval(values, [""] * len(values))


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, of 1 to 9 degrees of freedom


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of what 2 to 10 seeds gave, by Student's t: how much runs differ, where `interval` says
    how much records do. It may reach beyond 0 and 1. Other numbers of seeds raise `ValueError`."""
    if not 2 <= len(values) <= len(T_95) + 1:
        raise ValueError(f"an interval over {len(values)} seeds: 2 to {len(T_95) + 1} can be")
    half = T_95[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def by_category(values: Sequence[float], categories: Sequence[str]) -> dict[str, list[float]]:
    """The values of each category, in the order in which these appear."""
    pairs = list(zip(values, categories, strict=True))
    return {name: [v for v, c in pairs if c == name] for name in dict.fromkeys(categories)}


def macro(values: Sequence[float], categories: Sequence[str]) -> float:
    """The mean of the categories' means."""
    return mean([mean(some) for some in by_category(values, categories).values()])


def macro_interval(values: Sequence[float], categories: Sequence[str]) -> tuple[float, float]:
    """95% bootstrap interval of `macro`: records drawn again inside their category."""
    rng, total, parts = np.random.default_rng(0), np.zeros(DRAWS), by_category(values, categories)
    for some in map(np.array, parts.values()):
        total += some[rng.integers(0, len(some), (DRAWS, len(some)))].mean(1)
    low, high = np.quantile(total / len(parts), [0.025, 0.975])
    return float(low), float(high)


# Baselines: responses -> scores, without any picture. What a model must beat before it has learned anything.


def medoid(responses: Sequence[str]) -> list[float]:
    """The answer that shares most words, place by place, with the others."""
    words = [r.split() for r in responses]
    return [float(sum(x == y for other in words for x, y in zip(mine, other, strict=False))) for mine in words]


BASELINES: dict[str, Callable[[Sequence[str]], list[float]]] = {
    "random": lambda responses: [0.0] * len(responses),  # all tied: the share of best-ranked responses
    "longest": lambda responses: [float(len(r)) for r in responses],
    "shortest": lambda responses: [-float(len(r)) for r in responses],
    "first": lambda responses: [-float(i) for i in range(len(responses))],
    "last": lambda responses: [float(i) for i in range(len(responses))],
    "medoid": medoid,
}


def vote(scores: Scores, responses: Sequence[str]) -> list[float]:
    """Comparison by hand, after the fact: how often a text occurs, for texts in the upper half of the scores' range."""
    middle = (max(scores) + min(scores)) / 2
    return [float(responses.count(r) * (s > middle)) for s, r in zip(scores, responses, strict=True)]


def with_noise(scores: Scores, rng: random.Random, size: float = 0.5) -> list[float]:
    """Scores with normal noise of `size` times their spread: what a model gains that merely breaks ties at random."""
    spread = float(np.std(scores))
    return [s + rng.gauss(0, size * spread) for s in scores]
