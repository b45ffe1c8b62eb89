"""A mask as a picture: `python -m yojo.score --tiny --draw-mask mask.png`."""

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from yojo.core.mask import PADDING, PROMPT, AttentionMask

# Neighbours differ in lightness, not only in hue: they can be distinguished in grey.
COLOURS = {"prompt": (175, 175, 175), "picture": (200, 140, 50)}
RESPONSES = ((25, 50, 110), (95, 165, 60), (185, 40, 70), (150, 120, 190), (0, 90, 90), (205, 120, 30))
MARGIN = 120  # pixels for labels
DRAWN_UP_TO = 1000  # tokens


def printable(name: str) -> str:
    r"""What cannot be printed is escaped: a line break is \n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def readable(names: Iterable[str]) -> list[str]:
    """Names of tokens to print beside a row, without the blank before a word."""
    return [printable(name).strip() or "space" for name in names]


def draw_mask(mask: AttentionMask, b: int = 0, labels: list[str] | None = None, cell: int = 12):
    """Row b of a mask as a Pillow picture: queries downwards, keys to the right, a filled cell where q attends to k.

    The colour is the key's: grey prompt, ochre picture, one colour a response. `labels` [T] name every token; without
    them each span is named at its middle.
    """
    real = (mask.record[b] != PADDING).nonzero().flatten().tolist()
    if len(real) > DRAWN_UP_TO:
        raise ValueError(f"a mask of {len(real)} tokens is too large to draw: at most {DRAWN_UP_TO}")
    allow, kinds = mask.dense[b][real][:, real], [_kind(mask, b, t) for t in real]
    side = MARGIN + len(real) * cell + 12
    image, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(size=max(11, cell - 2))
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(allow.tolist()):
        for j, allowed in enumerate(row):
            box = [MARGIN + k * cell for k in (j, i, j + 1, i + 1)]
            pen.rectangle([*box[:2], box[2] - 2, box[3] - 2], fill=kinds[j][1] if allowed else (238, 238, 238))
    for start, last, text in _spans(kinds) if labels is None else ((i, i, t) for i, t in enumerate(labels)):
        strip = Image.new("RGBA", (MARGIN, 24))
        ImageDraw.Draw(strip).text((MARGIN - 6, 12), text, fill=_dark(kinds[start][1]), font=font, anchor="rm")
        at = int(MARGIN + (start + last + 1) * cell / 2) - 13
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
    """(start, last, name) of the runs of one kind."""
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    return [(a, z - 1, kinds[a][0]) for a, z in zip(starts, [*starts[1:], len(kinds)], strict=True)]
