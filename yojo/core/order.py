"""Which records a step learns from, and in which order their responses stand.

See it: `pytest tests/test_order.py`.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from yojo.core.data import Record, encode, in_order, random_order, with_preference
from yojo.core.prompt import Encoded, Processor

SORTED_AMONG = 16  # micro-batches among which records are sorted by their number of responses


class MicroBatches:
    """`size` records to a micro-batch, `accumulate` of these to a step; all follows from the seed."""

    def __init__(self, records: Sequence[Record], processor: Processor, size: int, accumulate: int, seed: int):
        self.records, self.processor = with_preference(records), processor
        self.size, self.accumulate, self.seed = size, accumulate, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> list[Record]:
        """Every record once, in an order drawn anew for each epoch; within each window of micro-batches, records with
        equal numbers of responses stand together, which saves padding, and the micro-batches are shuffled again."""
        rng, size = random.Random(f"{self.seed} epoch {number}"), self.size
        order = rng.sample(self.records, len(self.records))
        batches = []
        for start in range(0, len(order), SORTED_AMONG * size):
            window = sorted(order[start : start + SORTED_AMONG * size], key=lambda record: len(record.responses))
            batches += [window[k : k + size] for k in range(0, len(window), size)]
        return [record for batch in rng.sample(batches, len(batches)) for record in batch]

    def records_of(self, step: int, micro_batch: int) -> list[Record]:
        n, start = len(self.records), (step * self.accumulate + micro_batch) * self.size
        return [self.epoch(k // n)[k % n] for k in range(start, start + self.size)]

    def __call__(self, step: int, micro_batch: int) -> tuple[list[Encoded], Tensor]:
        """Rows, the responses of each shuffled, and their ranks [B, N], 0 = no response here."""
        rng = random.Random(f"{self.seed} shuffle {step} {micro_batch}")
        records = [in_order(record, random_order(record, rng)) for record in self.records_of(step, micro_batch)]
        ranks = pad_sequence([torch.tensor(record.rankings) for record in records], batch_first=True)
        return [encode(record, self.processor) for record in records], ranks
