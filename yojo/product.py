"""One large matrix, many tokens: the same product in three ways.

    Y = X W^T              X [tokens, in], W [out, in] -> Y [tokens, out], as `F.linear` computes it
    Y = (W X^T)^T          the same sums, but memory holds Y output by output instead of token by token
    Y = [X1 W^T; X2 W^T]   some tokens after the others

On a CPU the second may be the fastest in float32: a little for many tokens, 1.4 to 2.4 times for two to four. The
rows of W X^T must lie an odd number of cache lines apart: whole lines, and not 4,096 bytes, for rows that far apart
are kept in the same few places of the cache and push each other out. In bfloat16 the third may be: some numbers of
tokens make a product slow, 1,333 by a third, and cut it is not, or only in part.

See it: `pytest tests/test_product.py`; figures in LOG.md, 2026-11-25.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**20  # numbers in a matrix; for smaller ones `F.linear` is the faster
LINE = 16  # float32 numbers in a cache line
PIECE = 1024  # tokens that are multiplied at a time


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in], transposed -> [..., out], in the way that is the fastest where that is
    known. The result need not be contiguous."""
    tokens = x.shape[:-1].numel()
    free = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))  # other ways are for CPUs
    if free and tokens > 1 and turns(weight):
        return turned_product(x, weight)
    if free and tokens > PIECE and cuts(weight):
        return cut_product(x, weight)
    return F.linear(x, weight)


def turns(weight: Tensor) -> bool:
    """Is it faster to turn the products of this matrix with several tokens?"""
    return weight.dtype == torch.float32 and weight.numel() >= LARGE and like_zen4(weight.device.type)


def cuts(weight: Tensor) -> bool:
    """Is it faster to cut the products of this matrix with more than PIECE tokens?"""
    return weight.dtype == torch.bfloat16 and like_zen4(weight.device.type)


def turned_product(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` as (W X^T)^T."""
    rows = x.flatten(0, -2)
    lines = -(-len(rows) // LINE) | 1  # odd
    turned = x.new_empty(len(weight), lines * LINE)[:, : len(rows)]
    return torch.mm(weight, rows.T, out=turned).T.unflatten(0, x.shape[:-1])


def cut_product(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)`, PIECE tokens at a time."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    for few, result in zip(x.flatten(0, -2).split(PIECE), y.flatten(0, -2).split(PIECE), strict=True):
        torch.mm(few, weight.T, out=result)
    return y


@cache
def like_zen4(device: str) -> bool:
    """Is this a CPU with bfloat16 instructions but without AMX? What is chosen by this was measured on one of these
    only, an AMD EPYC (Zen 4)."""
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return able.get("avx512_bf16", False) and not able.get("amx_tile", False)
