"""How the arithmetic is done fast. Closed at a first reading: each function computes the mathematics in its docstring,
and everything else here is about time and memory. `molmo2.py` says what is computed.

    linear(x, W)               x W^T
    attention(q, k, v, mask)   softmax(q k^T / sqrt(d)) v
    swiglu(x)                  silu(gate) * up

See it: `pytest tests/test_ops.py`; figures in LOG.md.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from yojo.files import InputError
from yojo.mask import AttentionMask, Run, joined

# Torch takes memory from the system 4 kB at a time unless it is told before its first tensor to ask for large pages. A
# pass makes tensors of tens of megabytes, and fetching them is up to a tenth of its time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

LARGE = 2**20  # numbers in a matrix; for smaller ones `F.linear` is the faster
LINE = 16  # float32 numbers in a cache line
PIECE = 1024  # tokens that an MLP, or a bfloat16 product, works on at a time
NORMED = 2**20  # numbers of queries, keys and values that are normed and rotated at a time: 170 tokens of the 4B
DENSE_UP_TO = 512  # tokens in a row; beyond this a [T, T] mask costs more than a call for every run
QUERIES = 128  # of a call, at most: fewer make more calls, more compute more in vain
PRODUCTS = range(2**16, 2**24)  # scores of one key head: fewer are too many small calls, more leave the cache


def linear(x: Tensor, weight: Tensor) -> Tensor:
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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | Tensor | None = None,
    causal: bool = False,
    read: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.  q [B, H, Q, d], k and v [B, K, S, d] -> [B, H, Q, d]; H / K query heads share a key
    head.

    mask: an `AttentionMask` of Q = S tokens, or bool [B, 1, Q, S]; a query that may attend to nothing gets 0. None =
    everybody attends to everybody, or, if causal, to itself and back, the last query beside the last key. read int
    [R, 2]: the only (row, index) that are asked for; others may be left at 0.
    """
    if not isinstance(mask, AttentionMask):
        return softmax_attention(q, k, v, mask, causal)
    if not by_runs(q.shape[2]):
        return softmax_attention(q, k, v, mask.dense[:, None])
    (B, H, T, d), wanted = q.shape, None if read is None else read.tolist()
    k, v = k.contiguous(), v.contiguous()  # head by head, as the kernel reads them, once for all calls
    parts, end = [], 0  # of all rows, one after the other; where no call stands, 0
    for run in calls(mask):
        if holds(run, wanted):
            start = run.row * T + run.start
            parts += [q.new_zeros(start - end, H, d), attend(q, k, v, run)]
            end = start + run.stop - run.start
    parts.append(q.new_zeros(B * T - end, H, d))
    return torch.cat(parts).unflatten(0, (B, T)).transpose(1, 2)


def by_runs(tokens: int) -> bool:
    """Are rows of so many tokens computed run by run? Short ones are in one call, under a mask of all pairs."""
    return tokens > DENSE_UP_TO


def calls(mask: AttentionMask) -> list[Run]:
    """The runs of a mask, as a kernel computes them: a causal run that attends to all of the one before it is one with
    that; on a CPU, whose kernel computes all keys of a call for all its queries, runs are cut."""
    runs: list[Run] = []
    for run in mask.runs:
        if runs and goes_on(runs[-1], run):
            runs[-1] = runs[-1]._replace(stop=run.stop)
        else:
            runs.append(run)
    return runs if mask.record.is_cuda else [piece for run in runs for piece in cut(run)]


def goes_on(last: Run, run: Run) -> bool:
    """Are these two side by side one causal run?"""
    side_by_side = (last.row, last.stop) == (run.row, run.start)
    return side_by_side and last.causal and run.causal and run.keys == reach(last)


def cut(run: Run) -> Iterator[Run]:
    """A run in pieces of at most QUERIES tokens, which attend to the pieces before them as to other keys."""
    for start in range(run.start, run.stop, QUERIES):
        keys = joined([*run.keys, (run.start, start)]) if run.causal else run.keys
        yield run._replace(start=start, stop=min(start + QUERIES, run.stop), keys=keys)


def reach(run: Run) -> list[tuple[int, int]]:
    """All keys that a run's last token attends to; if the run is causal its own come last."""
    return joined([*run.keys, (run.start, run.stop)]) if run.causal else run.keys


def holds(run: Run, read: Sequence[Sequence[int]] | None) -> bool:
    """Is one of these (row, index) in the run? None = all tokens are asked for."""
    return read is None or any(row == run.row and run.start <= t < run.stop for row, t in read)


def attend(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """One run's queries at its keys -> [tokens, H, d]."""
    q = q[run.row, None, :, run.start : run.stop]
    k, v = ([x[run.row, None, :, a:z] for a, z in reach(run)] for x in (k, v))
    k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in (k, v))
    return softmax_attention(q, k, v, None, run.causal)[0].transpose(0, 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, q [B, H, Q, d], k and v [B, K, S, d] -> [B, H, Q, d], in the fastest way at hand.

    allow bool [Q, S], or [B, 1, Q, S] where a query may see nothing and gets 0: who may look at whom; None = everybody,
    or, if causal, at itself and back, the last query beside the last key. Query heads share key heads, H / K of them
    each.
    """
    worth = q.shape[1] // k.shape[1] * q.shape[2] * k.shape[2] in PRODUCTS
    sure = allow is None or allow.ndim == 2  # that every query sees a key
    if kernel_lags(q.dtype, q.device.type) and worth and sure and not torch.is_grad_enabled():
        return product_attention(q, k, v, allow, causal)
    return kernel_attention(q, k, v, allow, causal)


def kernel_lags(dtype: torch.dtype, device: str) -> bool:
    """Does torch's kernel take nearly twice the time of plain products? Yes in bf16 on a CPU that multiplies it fast,
    but not by AMX; with AMX they take twice the kernel's."""
    return dtype == torch.bfloat16 and bf16_without_amx(device)


def product_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None = None, causal: bool = False) -> Tensor:
    """`softmax_attention` as it is written, one key head after the other, so that its scores stay in the cache. They
    are rounded to q's dtype. Every query must see a key."""
    B, H, Q, d = q.shape
    K, seen = k.shape[1], k.shape[2]
    if causal:  # of the keys, only those beside the queries need a mask
        allow, seen = torch.ones(Q, Q, dtype=torch.bool, device=q.device).tril(), Q
    out = []
    for few, key, value in zip(q.reshape(B * K, -1, d), k.flatten(0, 1), v.flatten(0, 1), strict=True):
        scores = torch.addmm(few.new_zeros(()), few, key.T, beta=0, alpha=d**-0.5)
        if allow is not None:
            scores.view(H // K, Q, -1)[..., -seen:].masked_fill_(~allow, -math.inf)
        out.append(scores.softmax(-1) @ value)
    return torch.stack(out).view(B, H, Q, d)


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None, causal: bool) -> Tensor:
    """`softmax_attention` by torch's kernels."""
    queries, keys, shared = q.shape[2], k.shape[2], k.shape[1] < q.shape[1]
    later = causal and queries < keys  # the queries come after some of the keys, or torch's own `is_causal` would do
    flash = q.is_cuda and allow is None and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, shared))
    if later and flash:  # this kernel's causal mask is the right one, but only so can it be asked for
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
    if later:
        allow = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if q.is_cuda and not flash:  # the other kernels of a GPU want a key head for every query head
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        shared = False
    allow = None if allow is None else allow.to(q.device)
    return F.scaled_dot_product_attention(q, k, v, allow, is_causal=causal and not later, enable_gqa=shared)


def in_pieces(do: Callable, size: int, *xs: Tensor) -> Tensor | tuple[Tensor, ...]:
    """do(*xs), all [tokens, ...]; on a CPU without gradients `size` tokens at a time: to fetch pages for large
    temporaries costs as much as to fill them."""
    if xs[0].is_cuda or torch.is_grad_enabled() or len(xs[0]) <= size:
        return do(*xs)
    pieces = [do(*few) for few in zip(*(x.split(size) for x in xs), strict=True)]
    return torch.cat(pieces) if isinstance(pieces[0], Tensor) else tuple(map(torch.cat, zip(*pieces, strict=True)))


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of both side by side. x [..., 2 * inner] -> [..., inner]. Where no gradient is asked for it is
    written over the gate, and x is lost."""
    up, gate = x.chunk(2, dim=-1)  # the checkpoint stacks up first, gate second
    free = not torch.is_grad_enabled() and not torch.compiler.is_compiling()  # a compiler would write all of x anew
    return F.silu(gate, inplace=free).mul_(up)


@torch.no_grad()
def fuse(parts: list[nn.Module], trial: Callable[[], object]) -> None:
    """Let `torch.compile` make one program of each of these modules, and try one of them: where nothing can be compiled
    this raises InputError."""
    import torch._dynamo as dynamo  # takes a second, which no other use has to wait for

    # One program each for rows and for picked tokens, one and many, with and without a gradient: more than the 8 of a
    # function that torch allows before it goes on without.
    dynamo.config.recompile_limit = max(32, dynamo.config.recompile_limit)
    for part in parts:
        part.compile(dynamic=True)
    try:
        trial()
    except dynamo.exc.TorchDynamoException as error:
        raise InputError(f"torch.compile can't compile here: {str(error).splitlines()[0]}") from None
