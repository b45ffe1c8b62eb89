"""A judgement as a web page: the pictures, the answers ranked with bars, and the mask of their row, to play with.

    python -m yojo.score --tiny --html judgement.html

The page is `tutorials/mask.html`, whose two marked parts are filled in, and needs no other file. All text of a record
is escaped: an answer may hold markup.

See it: `pytest tests/test_page.py`.
"""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from itertools import groupby

from PIL import Image

from yojo.core.data import Record
from yojo.core.prompt import Encoded
from yojo.media import open_picture
from yojo.video import open_video

SIDES = {"picture": 512, "frame": 128}  # pixels, at most
MOST = 4000  # tokens that a browser shows without a pause


def judgement(template: str, record: Record, row: Encoded, names: Sequence[str], ranking: list[dict], mode: str) -> str:
    """The page. names [T]: how each token of the row reads; ranking: dicts of `rank`, `score`, `#`, `true_facts` (None
    = unknown) and `response`, best first; mode: the attention that the scores were computed with."""
    head = f'<h1>A judgement</h1>\n<p class="text">{escape(record.prompt)}</p>\n{shown(record)}{listed(ranking)}'
    head += f'<p class="soft">Scores of {mode} attention. Scores have no zero: a bar begins at the lowest one.</p>\n'
    head += "<h2>Which token attends to which</h2>\n"
    page, tokens = filled(template, "head", head), merged(row, names)
    if len(tokens) > MOST:
        return filled(page, "mask", f"<p>The row has {len(tokens)} tokens: too many to show, at most {MOST}.</p>\n")
    data = json.dumps({"mode": mode, "tokens": tokens}).replace("<", r"\u003c")  # or a text could end the script
    return page.replace('type="application/json">null<', f'type="application/json">{data}<')


def filled(page: str, part: str, inside: str) -> str:
    start, end = f"<!-- {part} -->\n", f"<!-- /{part} -->"
    return page[: page.index(start) + len(start)] + inside + page[page.index(end) :]


def merged(row: Encoded, names: Sequence[str]) -> list[dict]:
    """A row's tokens as the page's script takes them. Neighbouring picture tokens become one: they attend to the same
    tokens, and the same attend to them."""
    read, tokens = {t: i for i, t in enumerate(row.score_positions)}, []
    for image, run in groupby(range(len(row.ids)), key=lambda t: bool(row.image[t])):
        run = list(run)
        for some in [run] if image else [[t] for t in run]:
            text = f"picture of {len(some)} tokens" if image else names[some[0]]
            owner = int(row.response[some[0]])
            tokens.append(dict(text=text, response=owner, image=image, count=len(some), score=read.get(some[0])))
    return tokens


def shown(record: Record) -> str:
    """What the judge was shown, as pictures inside the page."""
    pictures = [("picture", open_picture(image)) for image in record.images]
    if record.video is not None:
        pictures += [("frame", frame) for _, frame in open_video(record.video)]
    tags = [f'<img class="{k}" alt="{k} {i}" src="{data_url(x, k)}">' for i, (k, x) in enumerate(pictures, 1)]
    return f'<div class="pictures">{"".join(tags)}</div>\n' if pictures else ""


def data_url(picture: Image.Image, kind: str) -> str:
    """A picture as a data URL, made smaller if it is larger than the page shows it."""
    picture, file = picture.copy(), io.BytesIO()
    picture.thumbnail((SIDES[kind],) * 2)
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def listed(ranking: list[dict]) -> str:
    """The answers, best first: score, place in the input, true facts, bar and text."""
    low, high = ranking[-1]["score"], ranking[0]["score"]
    items = []
    for row in ranking:
        long = (row["score"] - low) / (high - low) if high > low else 0
        facts = f", {row['true_facts']} facts true" if row["true_facts"] else ""
        bar = f'<span class="bar" style="width: {100 * long:.1f}%; --c: var(--c{(row["#"] - 1) % 6})"></span>'
        text = f'<span class="text">{escape(row["response"])}</span>'
        items.append(f"<li><b>{row['score']:.3f}</b> answer {row['#']}{facts}{bar}{text}</li>\n")
    return f'<ol class="ranking">\n{"".join(items)}</ol>\n'
