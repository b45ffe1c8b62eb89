"""One large matrix, many tokens: the same product in three ways.

    Y = X W^T               X [tokens, in], W [out, in] -> Y [tokens, out], as `F.linear` computes it
    Y = (W X^T)^T           the same sums, column-major: memory holds Y output by output instead of token by token
    Y = [X1 W^T; X2 W^T]    some tokens after the others

On some CPUs the second is the fastest in float32: a little for many tokens, 1.4 to 2.4 times for two to four. Its
columns lie an odd number of cache lines apart, so that they spread over all sets of the cache; 4,096 bytes apart they
would share one and push each other out. The third is in bfloat16, where some numbers of tokens make a product slow,
1,444 by a sixth: in pieces it is not, or only a part of it.

See it: `pytest tests/test_product.py`; figures in LOG.md, 2026-11-25.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**20  # numbers in a matrix; for smaller ones `F.linear` is the faster
LINE = 16  # float32 numbers in a cache line
PIECE = 1024  # tokens


def product(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T. x [..., in], weight [out, in], of one dtype -> [..., out], which need not be contiguous."""
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")  # which have rules for `F.linear`
    return F.linear(x, weight) if plain else way(weight, x.shape[:-1].numel())(x, weight)


def way(weight: Tensor, tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The fastest to multiply so many tokens by this matrix, where that is known; else `F.linear`."""
    if bf16_without_amx(weight.device.type):
        if weight.dtype == torch.float32 and weight.numel() >= LARGE and tokens > 1:
            return column_major_product
        if weight.dtype == torch.bfloat16 and tokens > PIECE:
            return product_in_pieces
    return F.linear


def column_major_product(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` as (W X^T)^T."""
    rows = x.flatten(0, -2)
    lines = -(-len(rows) // LINE) | 1  # odd
    columns = x.new_empty(len(weight), lines * LINE)[:, : len(rows)]
    return torch.mm(weight, rows.T, out=columns).T.unflatten(0, x.shape[:-1])


def product_in_pieces(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)`, PIECE tokens at a time."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    for few, result in zip(x.flatten(0, -2).split(PIECE), y.flatten(0, -2).split(PIECE), strict=True):
        torch.mm(few, weight.T, out=result)
    return y


@cache
def bf16_without_amx(device: str) -> bool:
    """Is this a CPU with bfloat16 instructions but without AMX? What is chosen by this was measured on one of these
    only, an AMD EPYC (Zen 4)."""
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return able.get("avx512_bf16", False) and not able.get("amx_tile", False)
