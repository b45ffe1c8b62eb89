"""What one pass costs, counted: closed forms, equal to the last integer to what torch counts.

A product of [m, k] and [k, n] costs 2 m k n FLOPs: a multiplication and an addition for each of k terms of each of m n
results. Nothing but products is counted, as `torch.utils.flop_counter` does; norms, softmax and activations are a few
operations a number. Every count below is for a whole network and a whole batch.

Why one pass is cheaper: N passes read the prompt N times. With P prompt tokens and N responses of R,

    N passes / one pass  =  N (P + R) / (P + N R)   in matrices;  for many responses it tends to (P + R) / R.

See it: `pytest tests/test_flops.py` holds each form against the counter, on the meta device.
"""

from collections.abc import Sequence

import torch

from yojo.core import ops
from yojo.core.config import Config
from yojo.core.data import collate
from yojo.core.image import Pictures
from yojo.core.mask import PROMPT
from yojo.core.prompt import Encoded

# ---------------------------------------------------------------------------------------------------------- forward


def tower(config: Config, views: int) -> int:
    """`views` pictures of P patches: embedding; a layer has q, k, v, o (4 W A), attention (2 P A), MLP (2 W I)."""
    c, P = config.vision, config.vision.num_position_embeddings
    W, inner, heads = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    layer = 4 * W * heads + 2 * P * heads + 2 * W * inner
    return 2 * views * P * (3 * c.patch_size**2 * W + config.vision_depth * layer)


def connector(config: Config, tokens: int, window: int) -> int:
    """`tokens` windows of `window` patches: query and output of one, keys and values of all; then the SwiGLU."""
    c, D = config.connector, config.text.hidden_size
    width, heads = config.vision.hidden_size * len(config.vision_layers), c.num_attention_heads * c.head_dim
    pooling = width * heads + 2 * window * width * heads + 2 * window * heads + heads * c.hidden_size
    projector = 2 * c.hidden_size * c.intermediate_size + c.intermediate_size * D
    return 2 * tokens * (pooling + projector)


def each(config: Config, tokens: int, kept: int) -> list[tuple[str, int, int, int]]:
    """(name, in, out, tokens it is applied to) of every decoder matrix. In the last block all but the first matrix are
    applied to the `kept` tokens only."""
    c = config.text
    return [
        (name, *size, kept if block == c.num_hidden_layers - 1 and name != "att_proj" else tokens)
        for block in range(c.num_hidden_layers)
        for name, size in c.matrices.items()
    ]


def matrices(config: Config, tokens: int, kept: int) -> int:
    return sum(2 * t * m * n for _, m, n, t in each(config, tokens, kept))


def adapter(config: Config, r: int, tokens: int, kept: int) -> int:
    """Down to r and up again, beside every matrix."""
    return sum(2 * t * r * (m + n) for _, m, n, t in each(config, tokens, kept))


def attention(config: Config, pairs: int, last: int) -> int:
    """Scores and values: `pairs` of a query and a key in every block but the last, which has `last`. A pair costs two
    products of d terms a head."""
    c = config.text
    return 2 * 2 * c.num_attention_heads * c.head_dim * ((c.num_hidden_layers - 1) * pairs + last)


def head(config: Config, inner: int, kept: int) -> int:
    return 2 * kept * inner * (config.text.hidden_size + 1)


# --------------------------------------------------------------------------------------------------- pairs of tokens


def executed(row: Encoded, mode: str) -> tuple[int, int]:
    """Pairs of a query and a key that are computed in a block, and in the last one: all pairs of a short row, otherwise
    each call's queries with its keys. The last block skips calls in which no score is read."""
    T = len(row.ids)
    if not ops.by_runs(T):
        return T * T, T * T
    batch = collate([row], mode)
    kept = batch.score_positions.tolist()
    runs = [(run, (run.stop - run.start) * sum(z - a for a, z in run.keys)) for run in ops.calls(batch.mask)]
    return sum(pairs for _, pairs in runs), sum(pairs for run, pairs in runs if ops.holds(run, kept))


def needed(prompt: int, pictures: int, responses: Sequence[int], mode: str) -> tuple[int, int]:
    """Pairs that one record's mask allows in a block, and in the last one. Causal: the t-th token attends to t tokens.
    The `pictures` picture tokens, one after the other, also attend to later ones. A response attends to the prompt and,
    if joint, to the responses before it. In the last block only the last token of each response attends."""
    pairs, last = prompt * (prompt + 1) // 2 + pictures * (pictures - 1) // 2, 0
    before = prompt
    for R in responses:
        pairs += R * before + R * (R + 1) // 2
        last += before + R - 1
        before += R if mode == "joint" else 0
    return pairs, last


# --------------------------------------------------------------------------------------------------------- training


def backward(config: Config, r: int, inner: int, tokens: int, kept: int, pairs: tuple[int, int]) -> int:
    """A frozen matrix needs the gradient of its input (1 product), a trained one also its own (2). In attention both
    factors of a product need theirs (2). The embeddings need none, so the first block's first matrix and the adapter
    beside it skip the gradient of their input."""
    first = config.text.matrices["att_proj"]
    spared = 2 * tokens * first[0] * (first[1] + r)
    learned = adapter(config, r, tokens, kept) + head(config, inner, kept)
    return matrices(config, tokens, kept) + 2 * learned + 2 * attention(config, *pairs) - spared


def recomputation(config: Config, r: int, tokens: int, kept: int, pairs: tuple[int, int]) -> int:
    """Activation checkpointing runs every block again, up to the last thing that its backward needs: the product with
    the adapter's up-matrix at the end of a block is not repeated."""
    forward = matrices(config, tokens, kept) + adapter(config, r, tokens, kept) + attention(config, *pairs)
    return forward - sum(2 * t * r * n for name, _, n, t in each(config, tokens, kept) if name == "ff_out")


# --------------------------------------------------------------------------------------------------------- one record


def row_of_lengths(
    prompt: int, responses: Sequence[int], image_tokens: int = 0, views: int = 0, pooled: int = 0
) -> Encoded:
    """A row from numbers alone, enough for counting: prompt tokens, tokens of each response with its separator, picture
    tokens (after BOS), views, <im_patch> tokens (of windows of 2 x 2)."""
    ids, place = torch.zeros(prompt, dtype=torch.long), torch.arange(prompt)
    patches, pooling = torch.empty(views, 0, 0), torch.empty(pooled, 4, dtype=torch.long)
    image = (place >= 1) & (place <= image_tokens)
    start = Encoded(ids, torch.full_like(ids, PROMPT), image, [], Pictures(patches, pooling))
    return start.continued([[0] * (R - 1) for R in responses], separator=0)


def images(config: Config, pictures: Pictures) -> int:
    """Tower and connector, which run once, however often the features are read. Kept features cost nothing."""
    if pictures.features is not None:
        return 0
    return tower(config, len(pictures.patches)) + connector(config, *pictures.pooling.shape)


def one_pass(config: Config, row: Encoded, mode: str, inner: int = 1024, r: int = 0) -> dict[str, int]:
    """FLOPs of the decoder, an adapter of rank r beside every matrix, and the head, by part; no pictures."""
    tokens, kept = len(row.ids), len(row.spans)
    return {
        "matrices": matrices(config, tokens, kept),
        "attention": attention(config, *executed(row, mode)),
        "adapter": adapter(config, r, tokens, kept),
        "head": head(config, inner, kept),
    }


def separate(config: Config, row: Encoded, inner: int = 1024) -> int:
    """N passes over one response each, without the pictures."""
    lengths = torch.bincount(row.response - PROMPT).tolist()
    alone = [row_of_lengths(lengths[0], [R], int(row.image.sum())) for R in lengths[1:]]
    return sum(sum(one_pass(config, a, "joint", inner).values()) for a in alone)


def training_step(config: Config, row: Encoded, mode: str, r: int, inner: int) -> int:
    """One record of a training step with activation checkpointing, its pictures included."""
    tokens, kept, pairs = len(row.ids), len(row.spans), executed(row, mode)
    return (
        images(config, row.pictures)
        + sum(one_pass(config, row, mode, inner, r).values())
        + backward(config, r, inner, tokens, kept, pairs)
        + recomputation(config, r, tokens, kept, pairs)
    )
