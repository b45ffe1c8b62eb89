"""The three losses, each worked by hand.

pytest tests/test_loss.py
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yojo.core.loss import best, best_of_n, bradley_terry, plackett_luce

LN2, LN3 = math.log(2), math.log(3)
ALL = [best_of_n, plackett_luce, bradley_terry]


def t(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def ranks(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "loss, scores, rank, value",
    [
        # equal scores: softmax is uniform
        (best_of_n, (0, 0, 0, 0), (1, 2, 3, 4), math.log(4)),
        # softmax(ln 3, 0) = (3/4, 1/4)
        (best_of_n, (LN3, 0), (1, 2), math.log(4 / 3)),
        (best_of_n, (LN3, 0), (2, 1), math.log(4)),
        # (1/2, 1/4, 1/4), two best share the target: (ln 2 + ln 4) / 2
        (best_of_n, (LN2, 0, 0), (1, 1, 3), 1.5 * LN2),
        # a rank of 0 is no response: only the first two count
        (best_of_n, (LN3, 0, 9), (1, 2, 0), math.log(4 / 3)),
        # first 1/2 among (2, 1, 1)/4, then 1/2 among the two left, then alone
        (plackett_luce, (LN2, 0, 0), (1, 2, 3), 2 * LN2),
        # two tied firsts do not compete: each against the third, 2/3 and 1/2
        (plackett_luce, (LN2, 0, 0), (1, 1, 3), math.log(3 / 2) + LN2),
        (plackett_luce, (LN2, 0, 0, 9), (1, 2, 3, 0), 2 * LN2),
        # sigmoid(ln 3) = 3/4
        (bradley_terry, (LN3, 0), (1, 2), math.log(4 / 3)),
        # pairs (1,2): 2/3, (1,3): 2/3, (2,3): 1/2
        (bradley_terry, (LN2, 0, 0), (1, 2, 3), (2 * math.log(3 / 2) + LN2) / 3),
        # a tie is no pair
        (bradley_terry, (LN2, 0, 0), (1, 2, 2), math.log(3 / 2)),
        (bradley_terry, (LN2, 0, 0, 5), (1, 2, 2, 0), math.log(3 / 2)),
        (bradley_terry, (1, 2), (1, 1), 0),
    ],
)
def test_by_hand(loss, scores, rank, value):
    assert loss(t(scores), ranks(rank)).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("loss", ALL)
def test_a_batch_is_the_mean_of_its_records(loss):
    rows = [((0.3, -1.0, 2.0), (2, 1, 3)), ((1.0, 1.5, 0.0), (1, 2, 2))]
    alone = [loss(t(s), ranks(r)).item() for s, r in rows]
    together = loss(t(*[s for s, _ in rows]), ranks(*[r for _, r in rows])).item()
    assert together == pytest.approx(sum(alone) / 2)


@pytest.mark.parametrize("loss", ALL)
def test_padding_responses_get_no_gradient_and_make_no_nan(loss):
    scores = t((0.3, -1.0, 7.0), (1.0, 2.0, 3.0)).requires_grad_(True)
    loss(scores, ranks((2, 1, 0), (3, 1, 2))).backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 2] == 0 and scores.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [best_of_n, plackett_luce])
def test_two_responses_are_bradley_terry(loss):
    scores, rank = t((0.4, -0.7)), ranks((2, 1))
    assert loss(scores, rank).item() == pytest.approx(bradley_terry(scores, rank).item())


@pytest.mark.parametrize("loss", ALL)
def test_at_least_float32(loss):
    assert loss(t((1.0, 0.0), dtype=torch.bfloat16), ranks((1, 2))).dtype == torch.float32
    assert loss(t((1.0, 0.0)), ranks((1, 2))).dtype == torch.float64


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 4)), min_size=2, max_size=6), st.floats(-3, 3))
def test_property_only_differences_of_scores_matter_and_order_does_not(items, shift):
    scores, rank = zip(*items, strict=True)
    for loss in ALL:
        value = loss(t(scores), ranks(rank)).item()
        assert loss(t(scores) + shift, ranks(rank)).item() == pytest.approx(value, abs=1e-9)
        assert loss(t(scores[::-1]), ranks(rank[::-1])).item() == pytest.approx(value, abs=1e-9)


def test_the_best_are_those_of_the_lowest_rank():
    assert best(ranks((2, 3, 2), (0, 5, 7))).tolist() == [[True, False, True], [False, True, False]]


def test_nothing_to_learn_from_raises():
    with pytest.raises(ValueError, match="every record needs a ranked response"):
        best_of_n(t((1, 2)), ranks((0, 0)))
