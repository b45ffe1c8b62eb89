"""How the arithmetic is made fast. Skip this file at a first reading: each function computes the formula in its
docstring, and `molmo2.py`, which calls them, contains nothing else about speed.

    linear(x, W)               x W^T
    add_product(y, x, W)       y + x W^T
    attention(q, k, v, mask)   softmax(q k^T / sqrt(d)) v
    swiglu(x)                  silu(gate) * up
    @tokenwise(...)            marks a method that treats every token by itself, so it can run in chunks
    fuse(modules, trial)       compiles each into one program

Without gradients there are faster ways than torch's own, most of them on a CPU. A way is kept if it saves about 5% of a
whole pass; `tutorials/runs/speed.md` says what each saved, and on which processor. Results differ only by rounding.

See it: `pytest tests/test_ops.py tests/test_mask.py tests/test_fuse.py` hold the fast ways against the plain ones.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from yojo.core.mask import AttentionMask, Run
from yojo.files import InputError

# Torch uses memory pages of 4 kB unless this is set before its first tensor. A pass makes tensors of tens of megabytes,
# and page-faulting them takes up to a tenth of its time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# On a GPU torch prefers cuDNN's attention. It makes a plan for every new length, 38 to 336 ms on an H100, and there it
# was wrong for a query that may attend to nothing. The switch is process-wide, so it is set once, for all threads.
torch.backends.cuda.enable_cudnn_sdp(False)

LARGE = 2**20  # numbers in a matrix; smaller ones are multiplied faster by `F.linear`
LINE = 16  # float32 numbers in a cache line
DENSE_UP_TO = 512  # tokens in a row; beyond this a [T, T] mask costs more than a call for every run
QUERIES = 128  # in a call, at most: fewer mean more calls, more mean more masked pairs computed
SCORES = range(2**16, 2**24)  # of one key head: fewer mean too many small calls, more do not fit into the cache
PIECE = 1024  # tokens of a tokenwise method that multiplies by matrices, at a time
NUMBERS = 2**20  # of the first tensor of one that does not multiply by matrices


def plain_only() -> bool:
    """Is a gradient needed, or does autocast or a compiler decide how to compute? Only the plain ways support these."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


@cache
def bf16_without_amx(device: str) -> bool:
    """Is this a CPU with bfloat16 instructions but without AMX? Measured was one of these, an AMD EPYC (Zen 4)."""
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return able.get("avx512_bf16", False) and not able.get("amx_tile", False)


# ------------------------------------------------------------------------------------------------------------ x W^T


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. x [..., in], weight [out, in], of one dtype -> [..., out], which need not be contiguous."""
    large = weight.dtype == torch.float32 and weight.numel() >= LARGE and x.shape[:-1].numel() > 1
    if large and not plain_only() and bf16_without_amx(weight.device.type):
        return column_major_product(x, weight)
    return F.linear(x, weight)


def column_major_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T as (W x^T)^T: memory holds the result output by output instead of token by token.

    Its columns lie an odd number of cache lines apart, so that they spread over all sets of the cache; 4,096 bytes
    apart they would share one and evict each other.
    """
    rows = x.flatten(0, -2)
    lines = -(-len(rows) // LINE) | 1  # odd
    columns = x.new_empty(len(weight), lines * LINE)[:, : len(rows)]
    return torch.mm(weight, rows.T, out=columns).T.unflatten(0, x.shape[:-1])


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T. y [..., out], x [..., in], weight [out, in] -> [..., out]; without gradients it overwrites y."""
    rows, few = (z.reshape(-1, z.shape[-1]) for z in (y, x))
    return torch.addmm(rows, few, weight.T, out=None if plain_only() else rows).view_as(y)


# -------------------------------------------------------------------------------------------------------- attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | Tensor | None = None,
    causal: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.  q [B, H, Q, d], k and v [B, K, S, d] -> [B, H, Q, d]; H / K query heads share a key
    head.

    mask: an `AttentionMask` of Q = S tokens, or bool [B, 1, Q, S]; a query that may attend to nothing gets 0. None =
    no mask or, if causal, the causal one, with the last query aligned to the last key. keep int [R, 2], on the host:
    the only (row, index) that are needed; others may be left at 0.
    """
    mask = laid_out(mask, q.device) if isinstance(mask, AttentionMask) else mask
    if not isinstance(mask, AttentionMask):
        return softmax_attention(q, k, v, mask, causal)
    (B, H, T, d), kept = q.shape, None if keep is None else keep.tolist()
    k, v = k.contiguous(), v.contiguous()  # head by head, as the kernel reads them, once for all calls
    parts, end = [], 0  # of all rows, one after the other; what no call computes is 0
    for run in calls(mask, q.device.type):
        if holds(run, kept):
            start = run.row * T + run.start
            parts += [q.new_zeros(start - end, H, d)] if start > end else []
            parts.append(attend(q, k, v, run))
            end = start + run.stop - run.start
    parts += [q.new_zeros(B * T - end, H, d)] if B * T > end else []
    return torch.cat(parts).unflatten(0, (B, T)).transpose(1, 2)


def by_runs(tokens: int) -> bool:
    """Are rows of so many tokens computed run by run? Short ones are one call, under a mask of all pairs."""
    return tokens > DENSE_UP_TO


def laid_out(mask: AttentionMask, device: torch.device) -> AttentionMask | Tensor:
    """A mask in the form that `attention` computes with. Short rows: all pairs, bool [B, 1, T, T], made on the device.
    Long rows: the mask itself, because its runs are made on the host."""
    if by_runs(mask.record.shape[1]):
        return mask
    moved = (x.to(device, non_blocking=True) for x in (mask.record, mask.response, mask.image))
    return AttentionMask(*moved, mask.mode).dense[:, None]


def calls(mask: AttentionMask, device: str = "cpu") -> list[Run]:
    """The runs of a mask, one kernel call each. On a CPU they are cut into pieces, because its kernel computes every
    key of a call for every query, masked or not."""
    return mask.runs if device == "cuda" else [piece for run in mask.runs for piece in cut(run)]


def cut(run: Run) -> Iterator[Run]:
    """A run in pieces of at most QUERIES tokens."""
    for start in range(run.start, run.stop, QUERIES):
        stop = min(start + QUERIES, run.stop)
        yield (run.until(stop) if run.causal else run)._replace(start=start, stop=stop)


def holds(run: Run, keep: Sequence[Sequence[int]] | None) -> bool:
    """Is one of these (row, index) in the run? None = every token is needed."""
    return keep is None or any(row == run.row and run.start <= t < run.stop for row, t in keep)


def attend(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """One run's queries at its keys -> [tokens, H, d]."""
    q = q[run.row, None, :, run.start : run.stop]
    k, v = ([x[run.row, None, :, a:z] for a, z in run.keys] for x in (k, v))
    k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in (k, v))
    return softmax_attention(q, k, v, None, run.causal)[0].transpose(0, 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in one call; arguments as in `attention`, allow bool [Q, S] or [B, 1, Q, S]."""
    scores = q.shape[1] // k.shape[1] * q.shape[2] * k.shape[2]
    if allow is None and scores in SCORES and kernel_lags(q.dtype, q.device.type) and not plain_only():
        return product_attention(q, k, v, causal)
    return kernel_attention(q, k, v, allow, causal)


def kernel_lags(dtype: torch.dtype, device: str) -> bool:
    """Do plain products beat torch's fused kernel? In bfloat16 on a CPU with fast bfloat16 but no AMX, nearly twofold;
    with AMX the kernel is twice as fast."""
    return dtype == torch.bfloat16 and bf16_without_amx(device)


def product_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as it is written, one key head after the other, so that its scores stay in the cache.
    They are rounded to q's dtype before the softmax."""
    B, H, Q, d = q.shape
    K = k.shape[1]
    out = []
    for few, key, value in zip(q.reshape(B * K, -1, d), k.flatten(0, 1), v.flatten(0, 1), strict=True):
        scores = torch.addmm(few.new_zeros(()), few, key.T, beta=0, alpha=d**-0.5)
        if causal:  # of the keys, only those beside the queries need a mask
            later = torch.ones(Q, Q, dtype=torch.bool, device=q.device).triu(1)
            scores.view(H // K, Q, -1)[..., -Q:].masked_fill_(later, -math.inf)
        out.append(scores.softmax(-1) @ value)
    return torch.stack(out).view(B, H, Q, d)


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's kernels."""
    (queries, keys), shared = (q.shape[2], k.shape[2]), k.shape[1] < q.shape[1]
    if queries == 1 and shared:  # the last token attends to all: heads that share a key head are queries of one head
        return kernel_attention(q.reshape(*k.shape[:2], -1, q.shape[-1]), k, v, allow).reshape(q.shape)
    flash = q.is_cuda and allow is None and q.shape[-1] % 8 == 0
    if flash and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, shared)):
        # Called directly: its causal mask aligns the last query with the last key, which `is_causal` below does not.
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[0]
    later = causal and queries < keys  # or torch's own `is_causal` would do
    if later:
        allow = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if q.is_cuda and shared:  # the other kernels of a GPU want a key head for every query head
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        shared = False
    return F.scaled_dot_product_attention(q, k, v, allow, is_causal=causal and not later, enable_gqa=shared)


# --------------------------------------------------------------------------------------------------- token by token


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up.  x [..., 2 * inner], up first, gate second -> [..., inner]. Without gradients the result
    overwrites the gate, and x is lost."""
    up, gate = x.chunk(2, dim=-1)
    return F.silu(gate, inplace=not plain_only()).mul_(up)


def tokenwise(products: bool) -> Callable:
    """Marks a method of x [..., width] that treats every token by itself, f(x)[t] = f(x[t]), and likewise all other
    tensors [..., *] that it takes and returns. products: does it multiply by matrices?

    On a CPU without gradients it runs in chunks of tokens, and x is made contiguous: page-faulting large temporaries
    costs as much as computing them. Methods with matrix products need larger chunks.
    """

    def mark(method: Callable) -> Callable:
        @wraps(method)
        def in_pieces(self, x: Tensor, *more):
            tokens, size = x.shape[:-1], PIECE if products else max(1, NUMBERS // x.shape[-1])
            if plain_only() or x.is_cuda or tokens.numel() <= size:
                return method(self, x.contiguous(), *more)
            rows = (y.flatten(0, x.ndim - 2).split(size) if isinstance(y, Tensor) else repeat(y) for y in (x, *more))
            pieces = [method(self, few.contiguous(), *rest) for few, *rest in zip(*rows)]  # noqa: B905
            if isinstance(pieces[0], Tensor):
                return torch.cat(pieces).unflatten(0, tokens)
            return tuple(torch.cat(column).unflatten(0, tokens) for column in zip(*pieces, strict=True))

        return in_pieces

    return mark


@torch.no_grad()
def fuse(modules: Sequence[nn.Module], trial: Callable[[], object]) -> None:
    """Let `torch.compile` make one program of each module. `trial` runs one of them; if it cannot be compiled, it
    raises InputError."""
    import torch._dynamo as dynamo  # takes a second, which no other use has to wait for

    # One program each for rows and for picked tokens, one and many, with and without a gradient: more than the 8 of a
    # function that torch allows before it goes on without.
    dynamo.config.recompile_limit = max(32, dynamo.config.recompile_limit)
    for module in modules:
        module.compile(dynamic=True)
    try:
        trial()
    except dynamo.exc.TorchDynamoException as error:
        raise InputError(f"torch.compile can't compile here: {str(error).splitlines()[0]}") from None
