"""Who may look at whom.

One predicate, composed of readable ones, and four views of it: dense, structured, block-sparse, a picture.

    allow(q, k) = neither is padding
              AND same record
              AND (k is not after q  OR  both are picture tokens)
              AND (joint  OR  k is in the prompt  OR  k is in q's own response)

`joint` is the paper's attention: plain causal, response i sees the responses before it. `isolated` cuts the last
line: a response sees the prompt and itself, so N responses in one row are N separate passes that share a prompt.

The predicate takes index tensors of any broadcastable shape, which is also the signature that
`torch.nn.attention.flex_attention` asks of a mask.

See it: `python -m yojo.score --tiny --draw-mask mask.png`; `pytest tests/test_mask.py` compares with matrices typed
by hand.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("joint", "isolated")
PROMPT = -1  # value in `response`
PADDING = -1  # value in `record`
DENSE_UP_TO = 512  # tokens in a row; beyond this a [T, T] mask costs more than one attention call per segment


@dataclass(frozen=True)
class AttentionMask:
    """The mask of a batch of rows: three [B, T] tensors and a mode.

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

    # ------------------------------------------------------------------------------------------------ the predicate

    def allow(self, b, h, q, k) -> Tensor:
        """May query q look at key k, in row b? Broadcastable index tensors -> bool; h, the head, plays no part."""
        return self.real(b, q, k) & self.same_record(b, q, k) & self.ordered(b, q, k) & self.open(b, q, k)

    def real(self, b, q, k) -> Tensor:
        return (self.record[b, q] != PADDING) & (self.record[b, k] != PADDING)

    def same_record(self, b, q, k) -> Tensor:
        return self.record[b, q] == self.record[b, k]

    def ordered(self, b, q, k) -> Tensor:
        return (k <= q) | (self.image[b, q] & self.image[b, k])

    def open(self, b, q, k) -> Tensor:
        if self.mode == "joint":
            return torch.ones_like(self.image[b, q] & self.image[b, k])
        return (self.response[b, k] == PROMPT) | (self.response[b, k] == self.response[b, q])

    # ---------------------------------------------------------------------------------------------------- the views

    @cached_property
    def dense(self) -> Tensor:
        """bool [B, T, T], the predicate for every pair: the reference."""
        (B, T), device = self.record.shape, self.record.device
        b, t = torch.arange(B, device=device), torch.arange(T, device=device)
        return self.allow(b[:, None, None], None, t[None, :, None], t[None, None, :])

    @cached_property
    def structured(self) -> "list[list[Segment]]":
        """Per row, the segments that tile it: the prompt looks at itself once, each response at what it may see."""
        return [[self._segment(b, *cut) for cut in self._cuts(b)] for b in range(len(self.record))]

    def block_sparse(self):
        """The same predicate as a `BlockMask` for `flex_attention`, which then skips every block that is all zeros."""
        from torch.nn.attention.flex_attention import create_block_mask

        def allow(b, h, q, k):  # flex_attention counts arguments, and would count a method's `self`
            return self.allow(b, h, q, k)

        (B, T), device = self.record.shape, self.record.device
        return create_block_mask(allow, B=B, H=None, Q_LEN=T, KV_LEN=T, device=str(device))

    def view(self) -> "Tensor | list[list[Segment]]":
        """The form the decoder uses: dense [B, 1, T, T] for short rows, structured for long ones."""
        return self.dense[:, None] if self.record.shape[1] <= DENSE_UP_TO else self.structured

    # ---------------------------------------------------------------------------------------------------- structure

    def _cuts(self, b: int) -> list[tuple[int, int]]:
        """[start, stop) of the maximal runs of one row that share record and response."""
        key = torch.stack([self.record[b], self.response[b]])
        starts = [0, *((key[:, 1:] != key[:, :-1]).any(0).nonzero().flatten() + 1).tolist()]
        return list(zip(starts, [*starts[1:], key.shape[1]], strict=True))

    def _segment(self, b: int, start: int, stop: int) -> "Segment":
        """The keys a run of queries can need: everything its record has written so far, less what isolation hides."""
        record, response = self.record[b, start], self.response[b, start]
        reach = torch.arange(stop, device=self.record.device)
        keys = reach[(self.record[b, :stop] == record) & (record != PADDING)]
        if self.mode == "isolated":
            theirs = self.response[b, keys]
            keys = keys[(theirs == PROMPT) | (theirs == response)]
        queries = torch.arange(start, stop, device=self.record.device)
        return Segment(b, start, stop, keys, self.allow(b, None, queries[:, None], keys[None, :]))


@dataclass(frozen=True)
class Segment:
    """A run of queries [start, stop) of row b, the S keys they may need, and who of them looks at whom [Q, S]."""

    b: int
    start: int
    stop: int
    keys: Tensor
    allow: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, T, d] -> [H, Q, d]. Padding has no keys and gives zeros."""
        q = q[self.b, :, self.start : self.stop]
        if not len(self.keys):
            return torch.zeros_like(q)
        k, v = k[self.b, :, self.keys], v[self.b, :, self.keys]
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=self.allow)[0]


# ---------------------------------------------------------------------------------------------------------- picture

COLOURS = {"prompt": (120, 120, 120), "picture": (190, 150, 70)}
RESPONSES = ((52, 101, 164), (78, 154, 6), (164, 40, 60), (117, 80, 123), (6, 130, 130), (196, 110, 20))
MARGIN = 120  # pixels for labels
DRAWN_UP_TO = 1000  # tokens


def draw(mask: AttentionMask, b: int = 0, labels: list[str] | None = None, cell: int = 12):
    """Row b of a mask as a Pillow picture: queries downwards, keys to the right, a filled cell where q looks at k.

    The colour is the key's: grey prompt, ochre picture, one colour a response. `labels` [T] name every token; without
    them each span is named at its middle.
    """
    from PIL import Image, ImageDraw, ImageFont

    real = (mask.record[b] != PADDING).nonzero().flatten().tolist()
    if len(real) > DRAWN_UP_TO:
        raise ValueError(f"a mask of {len(real)} tokens is too large to draw: at most {DRAWN_UP_TO}")
    allow, kinds = mask.dense[b][real][:, real], [_kind(mask, b, t) for t in real]
    side = MARGIN + len(real) * cell + 12
    image, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(size=max(11, cell - 2))
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(allow.tolist()):
        for j, seen in enumerate(row):
            box = [MARGIN + k * cell for k in (j, i, j + 1, i + 1)]
            pen.rectangle([*box[:2], box[2] - 2, box[3] - 2], fill=kinds[j][1] if seen else (238, 238, 238))
    for first, last, text in _spans(kinds) if labels is None else ((i, i, t) for i, t in enumerate(labels)):
        strip = Image.new("RGBA", (MARGIN, 24))
        ImageDraw.Draw(strip).text((MARGIN - 6, 12), text, fill=kinds[first][1], font=font, anchor="rm")
        at = int(MARGIN + (first + last + 1) * cell / 2) - 13
        image.paste(strip, (0, at), strip)
        turned = strip.rotate(-90, expand=True)
        image.paste(turned, (at, 0), turned)
    return image


def _kind(mask: AttentionMask, b: int, t: int) -> tuple[str, tuple[int, int, int]]:
    r = int(mask.response[b, t])
    if r != PROMPT:
        return f"response {r + 1}", RESPONSES[r % len(RESPONSES)]
    name = "picture" if mask.image[b, t] else "prompt"
    return name, COLOURS[name]


def _spans(kinds: list[tuple]) -> list[tuple[int, int, str]]:
    """(first, last, name) of the runs of one kind."""
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    return [(a, z - 1, kinds[a][0]) for a, z in zip(starts, [*starts[1:], len(kinds)], strict=True)]
