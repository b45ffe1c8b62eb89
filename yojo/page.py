"""A judgement as a web page: the pictures, the answers ranked with bars, and the mask of their row, to play with.

    python -m yojo.score --tiny --html judgement.html

The page is `tutorials/mask.html` with its marked parts filled in, and needs no other file. All text of a record is
escaped: an answer may hold markup.

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
from yojo.drawing import printable
from yojo.media import open_picture
from yojo.video import open_video

PICTURE, FRAME, SMALL = 512, 128, 168  # pixels of the longer side: at most, at most, and what smaller ones are drawn at
MOST = 4000  # tokens that a browser shows without a pause
HEAD = """<h1>A judgement</h1>
<p class="text" dir="auto">{prompt}</p>
{pictures}{answers}<p class="soft">{scores} Scores have no zero: a bar begins at the lowest one.</p>
<h2>Which token attends to which</h2>
<p>What is chosen below changes no score. Neighbouring picture tokens are shown as one, and ␣ is a blank.</p>
"""
SCORES = {
    "joint": "Scores of joint attention.",
    "isolated": "Scores of isolated attention, in which equal answers are read once.",
}


def judgement(template: str, record: Record, row: Encoded, names: Sequence[str], ranking: list[dict], mode: str) -> str:
    """The page. names [T]: the text of each token of the row; ranking: dicts of `rank`, `score`, `#`, `true_facts`
    (None = unknown) and `response`, best first; mode: the attention that the scores were computed with."""
    parts = dict(prompt=escape(record.prompt), pictures=shown(record), answers=listed(ranking), scores=SCORES[mode])
    page = filled(filled(template, "title", "<title>A judgement</title>\n"), "head", HEAD.format(**parts))
    tokens, scores = merged(row, names), [answer["score"] for answer in sorted(ranking, key=lambda answer: answer["#"])]
    if len(tokens) > MOST:
        return filled(page, "mask", f"<p>The row has {len(tokens)} tokens: too many to show, at most {MOST}.</p>\n")
    data = json.dumps({"mode": mode, "tokens": tokens, "scores": scores})
    data = data.replace("<", r"\u003c")  # or a text could end the script
    return filled(page, "record", f'<script id="record" type="application/json">{data}</script>\n')


def filled(page: str, part: str, inside: str) -> str:
    start, end = f"<!-- {part} -->\n", f"<!-- /{part} -->"
    return page[: page.index(start) + len(start)] + inside + page[page.index(end) :]


def merged(row: Encoded, names: Sequence[str]) -> list[dict]:
    """A row's tokens as the page's script takes them. Neighbouring picture tokens become one: they attend to the same
    tokens, and the same attend to them."""
    read, tokens = {t: i for i, t in enumerate(row.score_positions)}, []
    for _, group in groupby(range(len(row.ids)), key=lambda t: "picture" if row.image[t] else t):
        first, *more = group
        image, count = bool(row.image[first]), 1 + len(more)
        text = f"picture of {count} tokens" if image else printable(names[first]).replace(" ", "␣")
        owner, score = int(row.response[first]), read.get(first)
        tokens.append({"text": text, "response": owner, "image": image, "count": count, "score": score})
    return tokens


def shown(record: Record) -> str:
    """What the judge was shown, as pictures inside the page."""
    pictures = [(open_picture(image), PICTURE) for image in record.images]
    if record.video is not None:
        pictures += [(frame, FRAME) for _, frame in open_video(record.video)]
    tags = [img(picture, side, i) for i, (picture, side) in enumerate(pictures, 1)]
    return f'<div class="pictures">{"".join(tags)}</div>\n' if pictures else ""


def img(picture: Image.Image, side: int, i: int) -> str:
    """A picture inside its tag, made smaller if it is larger than `side`."""
    picture, file = picture.copy(), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(file, "JPEG", quality=95, subsampling=0)
    times = max(1, SMALL // max(picture.size))
    small, data = ' class="small"' if times > 1 else "", base64.b64encode(file.getvalue()).decode()
    return f'<img{small} alt="picture {i}" width="{picture.width * times}" src="data:image/jpeg;base64,{data}">'


def listed(ranking: list[dict]) -> str:
    """The answers, best first: score, place in the input, true facts, bar and text."""
    low, high = ranking[-1]["score"], ranking[0]["score"]
    items = []
    for answer in ranking:
        percent = 100 * (answer["score"] - low) / (high - low) if high > low else 0
        facts = f", {answer['true_facts']} facts true" if answer["true_facts"] else ""
        colour = f"var(--c{(answer['#'] - 1) % 6})"
        bar = f'<span class="bar" style="width: {percent:.1f}%; --c: {colour}"></span>'
        text = f'<span class="text" dir="auto">{escape(answer["response"])}</span>'
        items.append(f"<li><b>{answer['score']:.3f}</b> answer {answer['#']}{facts}{bar}{text}</li>\n")
    return f'<ol class="ranking">\n{"".join(items)}</ol>\n'
