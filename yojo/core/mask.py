"""Which token may attend to which.

One predicate in three forms. Rows of up to 512 tokens use `dense`. Longer ones use `runs`, the same mask with fewer
pairs computed (`ops.attention`; skip it at a first reading). `block_sparse` is for `flex_attention`. `drawing.py` makes
a picture.

    allow(q, k) = neither is padding
              AND same record
              AND (k is not after q  OR  both are picture tokens)
              AND (joint  OR  k is in the prompt  OR  k is in q's own response)

`joint` is the paper's attention: plain causal, response i attends to the responses before it. `isolated` adds the last
line: a response attends to the prompt and itself, so N responses in one row are N separate passes that share a prompt.

The predicate takes index tensors of any broadcastable shape, as `torch.nn.attention.flex_attention` requires of a mask.

See it: `tutorials/mask.html` in a browser; `python -m yojo.score --tiny --draw-mask mask.png`; `pytest
tests/test_mask.py` compares with matrices typed by hand.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("joint", "isolated")
PROMPT = -1  # value in `response`
PADDING = -1  # value in `record`, which alone says what is padding


class Run(NamedTuple):
    """Tokens [start, stop) of a row that attend to the same ranges of keys: each token to all of them or, if causal, to
    those not after it. The keys of a causal run end with the run itself."""

    row: int
    start: int
    stop: int
    keys: list[tuple[int, int]]
    causal: bool

    def until(self, stop: int) -> "Run":
        """A causal run as it is if it ends elsewhere."""
        return self._replace(stop=stop, keys=[*self.keys[:-1], (self.keys[-1][0], stop)])

    def goes_on_in(self, other: "Run") -> bool:
        """Are this run and the next one a single causal run?"""
        side_by_side = (self.row, self.stop) == (other.row, other.start)
        return side_by_side and self.causal and other.causal and self.until(other.stop).keys == other.keys


@dataclass(frozen=True)
class AttentionMask:
    """The mask of a batch of rows: three [B, T] tensors and a mode. Best kept on the host, where `runs` are made.

    record int: which record of the row a token belongs to, -1 = padding; response int: which response of its record,
    -1 = the prompt; image bool: a picture token.
    """

    record: Tensor
    response: Tensor
    image: Tensor
    mode: str

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is none of {MODES}")
        if not self.record.shape == self.response.shape == self.image.shape or self.record.ndim != 2:
            shapes = [tuple(x.shape) for x in (self.record, self.response, self.image)]
            raise ValueError(f"record, response and image must share one [B, T] shape, got {shapes}")

    def allow(self, b, h, q, k) -> Tensor:
        """May query q attend to key k, in row b? Broadcastable index tensors -> bool; h, the head, plays no part."""
        real = (self.record[b, q] != PADDING) & (self.record[b, k] != PADDING)
        same_record = self.record[b, q] == self.record[b, k]
        ordered = (k <= q) | (self.image[b, q] & self.image[b, k])
        if self.mode == "joint":
            return real & same_record & ordered
        open_to_q = (self.response[b, k] == PROMPT) | (self.response[b, k] == self.response[b, q])
        return real & same_record & ordered & open_to_q

    @cached_property
    def dense(self) -> Tensor:
        """bool [B, T, T], the predicate for every pair: the reference."""
        (B, T), device = self.record.shape, self.record.device
        b, t = torch.arange(B, device=device), torch.arange(T, device=device)
        return self.allow(b[:, None, None], None, t[None, :, None], t[None, None, :])

    @cached_property
    def runs(self) -> list[Run]:
        """The same mask as ranges of keys, without a [T, T] tensor. Padding is in no run.

        Neighbouring tokens of one kind (record, response, picture or not) form a segment. Whether one segment may
        attend to another depends only on their kinds and their order, so the predicate is evaluated for first tokens
        alone. Inside a segment, picture tokens attend to all of it and text is causal.
        """
        runs: list[Run] = []
        for b, kinds in enumerate(torch.stack([self.record, self.response, self.image], dim=-1)):
            changes = (kinds[1:] != kinds[:-1]).any(-1).nonzero().flatten() + 1
            starts = torch.cat([changes.new_zeros(1), changes])
            spans = list(pairwise([*starts.tolist(), len(kinds)]))
            allowed = self.allow(b, None, starts[:, None], starts[None, :]).tolist()
            for i, image in enumerate(self.image[b, starts].tolist()):
                keys = merged([span for span, yes in zip(spans, allowed[i], strict=True) if yes])
                run = Run(b, *spans[i], keys, not image)
                if runs and runs[-1].goes_on_in(run):
                    runs[-1] = runs[-1].until(run.stop)
                elif keys:  # padding has none
                    runs.append(run)
        return runs

    def block_sparse(self):
        """The same predicate as a `BlockMask` for `flex_attention`, which then skips every block that is all zeros."""
        from torch.nn.attention.flex_attention import create_block_mask

        def allow(b, h, q, k):  # flex_attention counts arguments, and would count a method's `self`
            return self.allow(b, h, q, k)

        (B, T), device = self.record.shape, self.record.device
        return create_block_mask(allow, B=B, H=None, Q_LEN=T, KV_LEN=T, device=str(device))


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in ascending order, those that touch made one."""
    out: list[tuple[int, int]] = []
    for start, stop in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out
