"""Micro-batches: every record once an epoch, records of like size side by side, all of it from the seed.

pytest tests/test_order.py
"""

import random

import pytest
from conftest import names

from yojo.core.data import Record
from yojo.core.order import SORTED_AMONG, MicroBatches


@pytest.fixture
def batches(processor):
    rng = random.Random(0)
    ns = [rng.randint(2, 8) for _ in range(256)]
    records = [Record(f"{i}?", [f"{i}{j}" for j in range(n)], [*range(1, n + 1)]) for i, n in enumerate(ns)]
    return lambda seed: MicroBatches(records, processor, 4, 2, seed)


def epoch(batches, number):
    return [batches.records_of(step, k) for step in range(32 * number, 32 * (number + 1)) for k in range(2)]


def test_an_epoch_holds_every_record_once_in_an_order_of_its_own(batches):
    first, second = (epoch(batches(0), number) for number in (0, 1))
    prompts = [[record.prompt for batch in some for record in batch] for some in (first, second)]
    assert sorted(prompts[0]) == sorted(prompts[1]) == sorted(f"{i}?" for i in range(256))
    assert prompts[0] != prompts[1] and epoch(batches(0), 1) == second and epoch(batches(1), 0) != first


def test_records_of_like_size_stand_together(batches):
    """Sorted among 16 micro-batches: each holds hardly more than one size, and the sizes come in any order."""
    sizes = [[len(record.responses) for record in batch] for batch in epoch(batches(0), 0)]
    assert SORTED_AMONG == 16 and sum(max(some) - min(some) for some in sizes) < len(sizes)
    assert [max(some) for some in sizes[:16]] != sorted(max(some) for some in sizes[:16])


def test_responses_are_shuffled_and_take_their_ranks_with_them(batches, processor):
    rows, ranks = batches(0)(3, 1)
    records = batches(0).records_of(3, 1)
    for row, given, record in zip(rows, ranks.tolist(), records, strict=True):
        said = ["".join(names(processor, row)[a:z]) for a, z in row.spans]
        assert [record.responses[rank - 1] for rank in given if rank] == said
    assert any(given != sorted(given) for given in ranks.tolist())
