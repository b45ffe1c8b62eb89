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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

MODES = ("joint", "isolated")
PROMPT = -1  # value in `response`
PADDING = -1  # value in `record`
ALL, PAST, SOME = "all", "past", "some"  # what a segment's queries see of its keys
DENSE_UP_TO = 512  # tokens in a row; beyond this a [T, T] mask costs more than one attention call per segment
CHUNK = 256  # queries of a segment, at most: fewer make more calls, more compute more in vain
CHUNK_CUDA = 2048  # on a GPU, where only a segment with a mask is cut; chosen, not measured


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
        """`segments` for the device the mask is on."""
        return self.segments(whole=self.record.is_cuda)

    def segments(self, whole: bool) -> "list[list[Segment]]":
        """Per row, the segments that tile it: some queries each, with the ranges of keys that they may look at. A row
        must be laid out as `collate` does it: records one after the other, each its prompt first, then its responses,
        padding last.

        whole: cut only where what is seen changes, for a GPU, whose kernel needs no mask for the rest. Otherwise, for a
        CPU, whose kernel computes every key of a segment for every query, into CHUNK queries, too."""
        rows = range(len(self.record))
        return [[s for record in self._runs(b) for s in self._segments(b, *record, whole)] for b in rows]

    def block_sparse(self):
        """The same predicate as a `BlockMask` for `flex_attention`, which then skips every block that is all zeros."""
        from torch.nn.attention.flex_attention import create_block_mask

        def allow(b, h, q, k):  # flex_attention counts arguments, and would count a method's `self`
            return self.allow(b, h, q, k)

        (B, T), device = self.record.shape, self.record.device
        return create_block_mask(allow, B=B, H=None, Q_LEN=T, KV_LEN=T, device=str(device))

    def view(self) -> "Tensor | list[list[Segment]]":
        """The form the decoder uses."""
        return self.dense[:, None] if self.form == "dense" else self.structured

    @property
    def form(self) -> str:
        """For short rows "dense", one call with a mask [B, 1, T, T]; for long ones "structured", a call a segment."""
        return "dense" if self.record.shape[1] <= DENSE_UP_TO else "structured"

    # ---------------------------------------------------------------------------------------------------- structure

    def _runs(self, b: int) -> list[tuple[int, int]]:
        """[start, stop) of every record of one row, and of its padding."""
        runs = _cut(self.record[b])
        whose = [int(self.record[b, start]) for start, _ in runs]
        if len(set(whose)) < len(whose):
            raise ValueError(f"row {b}: the tokens of a record must stand side by side, got records {whose}")
        return runs

    def _segments(self, b: int, first: int, last: int, whole: bool) -> "Iterator[Segment]":
        """Those of one record. Joint: the whole record is one causal run. Isolated: the prompt is one run, and so is
        every response, which sees the prompt and itself. A run is cut where the pictures begin and where they end."""
        if self.record[b, first] == PADDING:
            yield Segment(self, b, first, last, (), SOME)
            return
        image = (self.image[b, first:last]).nonzero().flatten()
        # from the first picture token to the last, which see each other
        pictures, seen = (first + int(image[0]), first + int(image[-1]) + 1) if len(image) else (first, first)
        runs = [(first, last)]
        if self.mode == "isolated":
            runs = [(first + start, first + stop) for start, stop in _cut(self.response[b, first:last])]
        whose = [int(self.response[b, start]) for start, _ in runs]
        if len(set(whose)) < len(whose):
            raise ValueError(f"row {b}: the tokens of a response must stand side by side, got responses {whose}")
        if self.mode == "isolated" and whose[0] != PROMPT:
            raise ValueError(f"row {b}: a record must begin with its prompt, got responses {whose}")
        prompt = runs[0][1]
        for start, stop in runs:
            edges = sorted({start, stop, *(edge for edge in (pictures, seen) if start < edge < stop)})
            for left, right in pairwise(edges):
                shown = self.image[b, left:right]
                sees = ALL if bool(shown.all()) and seen <= stop else SOME if bool(shown.any()) else PAST
                chunk = CHUNK if not whole else CHUNK_CUDA if sees == SOME else right - left
                for a in range(left, right, chunk):
                    z = min(a + chunk, right)
                    reach = max(z, seen) if bool(self.image[b, a:z].any()) else z
                    own = (first, reach) if start <= prompt else (start, reach)  # the first response follows the prompt
                    yield Segment(self, b, a, z, (own,) if own[0] == first else ((first, prompt), own), sees)


def _cut(values: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of the runs of equal values."""
    starts = [0, *((values[1:] != values[:-1]).nonzero().flatten() + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


@dataclass(frozen=True)
class Segment:
    """The queries [start, stop) of row b, and the ranges of keys that hold every key they may look at: ALL of them,
    those of its PAST (the last query sits beside the last key), or SOME, as the predicate says."""

    mask: AttentionMask
    b: int
    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]
    sees: str

    def holds(self, read: list[list[int]] | None) -> bool:
        """Is one of these (row, index) among its queries? None = all tokens are."""
        return read is None or any(b == self.b and self.start <= t < self.stop for b, t in read)

    @cached_property
    def keys(self) -> Tensor:
        """int [S], the keys one by one."""
        device = self.mask.record.device
        return torch.cat([torch.arange(0, device=device), *(torch.arange(*r, device=device) for r in self.ranges)])

    @cached_property
    def allow(self) -> Tensor:
        """bool [Q, S], who of them looks at whom."""
        queries = torch.arange(self.start, self.stop, device=self.keys.device)
        return self.mask.allow(self.b, None, queries[:, None], self.keys[None, :])


# ---------------------------------------------------------------------------------------------------------- picture

# Neighbours differ in lightness, not only in hue: they can be told apart in grey.
COLOURS = {"prompt": (175, 175, 175), "picture": (200, 140, 50)}
RESPONSES = ((25, 50, 110), (95, 165, 60), (185, 40, 70), (150, 120, 190), (0, 90, 90), (205, 120, 30))
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
        ImageDraw.Draw(strip).text((MARGIN - 6, 12), text, fill=_dark(kinds[first][1]), font=font, anchor="rm")
        at = int(MARGIN + (first + last + 1) * cell / 2) - 13
        image.paste(strip, (0, at), strip)
        turned = strip.rotate(-90, expand=True)
        image.paste(turned, (at, 0), turned)
    return image


def _dark(colour: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(level * 3 // 5 for level in colour)


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
