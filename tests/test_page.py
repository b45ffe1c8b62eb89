"""The page to play with, `tutorials/mask.html`: its rule is that of `AttentionMask`, and its positions are those of
`Encoded`, whatever is chosen on it. And `score --html` fills it with a record, whose texts all stay text.

    pytest tests/test_page.py

A JavaScript engine runs the page's own script. One test plants faults in it, which must be found.
"""

import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from py_mini_racer import MiniRacer
from test_single_pass import noise

from yojo import page, score
from yojo.cli import WEIGHTS
from yojo.core.data import Record, collate, encode
from yojo.core.image import Pictures
from yojo.core.mask import MODES
from yojo.core.prompt import LAYOUTS, Encoded, Processor
from yojo.core.reward import RewardModel

TEMPLATE = (WEIGHTS.parent / "tutorials/mask.html").read_text(encoding="utf-8")
RULE = re.search(r'<script id="rule">(.*?)</script>', TEMPLATE, re.DOTALL)[1]
HOSTILE = [
    "a red star <script>alert(1)</script><|resp_sep|>a blue star",
    "<!-- /mask --> <!-- /head --> & &amp; 'single' \"double\"",
    "</script><script>alert(2)</script>\n<img src=x onerror=alert(3)>",
    'type="application/json">null<',
]


def choices(count: int = 50) -> list[tuple]:
    """What can be chosen on the page: a picture or none, the lengths of one to six answers, the attention."""
    rng = random.Random(0)
    lengths = [tuple(rng.randint(1, 8) for _ in range(rng.randint(1, 6))) for _ in range(count)]
    return [(rng.random() < 0.5, chosen, MODES[i % 2]) for i, chosen in enumerate(lengths)]


def engine(rule: str = RULE):
    """Evaluates an expression in the page's script."""
    racer = MiniRacer()
    racer.eval(rule)
    return lambda expression: json.loads(racer.eval(f"JSON.stringify({expression})"))


def said(js, tokens: list[dict], mode: str) -> tuple[list, list, list]:
    """What the page says of every token: which others it attends to, its position, its caption."""
    given = f"{json.dumps(tokens)}, {json.dumps(mode)}"
    every = f"((tokens, mode) => tokens.map((_, q) => tokens.map((_, k) => allow(tokens, mode, q, k))))({given})"
    captions = f"((tokens, mode) => tokens.map((_, q) => caption(tokens, mode, q)))({given})"
    return js(every), js(f"positions({given})"), js(captions)


def agrees(js, picture: bool, lengths: tuple[int, ...], mode: str) -> bool:
    """Does the page's row have the mask, the positions and the places of scores that the package gives it?"""
    tokens = js(f"row({json.dumps(picture)}, {json.dumps(lengths)})")
    image = torch.tensor([token["image"] for token in tokens if token["response"] == -1])
    assert image.any() == picture
    prompt = Encoded(torch.zeros(len(image)).long(), torch.full_like(image.long(), -1), image, [], Pictures())
    row = prompt.continued([[0] * length for length in lengths], separator=1)
    batch = collate([row], mode)
    allowed, positions, captions = said(js, tokens, mode)
    read = {at: i for i, at in enumerate(row.score_positions)}
    return (
        [token["response"] for token in tokens] == row.response.tolist()
        and [token["image"] for token in tokens] == row.image.tolist()
        and [token["score"] for token in tokens] == [read.get(t) for t in range(len(tokens))]
        and allowed == batch.mask.dense[0].tolist()
        and positions == row.positions(mode).tolist() == batch.positions[0].tolist()
        and all(f"attends to {sum(keys)} token" in text for keys, text in zip(allowed, captions, strict=True))
        and all(f"position {at}," in text for at, text in zip(positions, captions, strict=True))
        and [t for t, text in enumerate(captions) if "is read here" in text] == row.score_positions
    )


def test_the_page_says_what_the_package_computes_in_fifty_settings():
    js = engine()
    assert len(set(choices())) == 50 and {picture for picture, *_ in choices()} == {True, False}
    assert all(agrees(js, *chosen) for chosen in choices())


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("k <= q", "k < q"),
        (" || (query.image && key.image)", ""),
        (" || key.response === query.response", ""),
        ('mode === "joint" || key', "key"),
        ("next = afterPrompt;", "next = afterPrompt + 1;"),
        ("tokens[tokens.length - 1].score = i;", "tokens[tokens.length - 2].score = i;"),
        ("sum + key.count", "sum + 2 * key.count"),
        ("token.score !== null ? `", "token.score === null ? `"),
    ],
)
def test_a_planted_fault_is_found(right, wrong):
    assert RULE.count(right) == 1
    js = engine(RULE.replace(right, wrong))
    assert not all(agrees(js, *chosen) for chosen in choices())


PROMPT, FIRST = "the prompt up to itself", "the prompt and its own answer up to itself"
JOINT = "the prompt, the answers before it and its own answer up to itself"
ISOLATED, LAST, SCORE = f"{FIRST}, but no other answer", ", the last token of its text", "the score of answer"
CAPTIONS = [  # of a row with a picture and answers of two, one and three tokens
    ("joint", 1, "“picture 2”, position 1", 4, f"{PROMPT} and all picture tokens, also later ones"),
    ("joint", 5, "“the”, position 5", 6, PROMPT),
    ("joint", 8, "“a” of answer 1, position 8", 9, f"{FIRST}; {SCORE} 1 is read at “small”{LAST}"),
    ("joint", 11, "“a” of answer 2, position 11", 12, f"{JOINT}; {SCORE} 2 is read here"),
    ("joint", 12, "“<|resp_sep|>” of answer 2, position 12", 13, f"{JOINT}; {SCORE} 2 is read at “a”{LAST}"),
    ("isolated", 9, "“small” of answer 1, position 9", 10, f"{ISOLATED}; {SCORE} 1 is read here"),
    ("isolated", 14, "“pink” of answer 3, position 9", 10, f"{ISOLATED}; {SCORE} 3 is read at “star”{LAST}"),
]


@pytest.mark.parametrize("mode, q, who, many, whom", CAPTIONS)
def test_a_caption_typed_by_hand(mode, q, who, many, whom):
    text = f"{who}, attends to {many} tokens: {whom}."
    assert engine()(f"caption(row(true, [2, 1, 3]), {json.dumps(mode)}, {q})") == text


def test_a_token_that_stands_for_several_has_a_range_of_positions():
    tokens = [dict(text="picture of 25 tokens", response=-1, image=True, count=25, score=None)]
    text = f"“picture of 25 tokens”, position 0 to 24, attends to 25 tokens: {PROMPT} and all picture tokens"
    assert engine()(f"caption({json.dumps(tokens)}, 'joint', 0)") == f"{text}, also later ones."


def test_the_page_is_one_small_file_that_asks_for_no_other():
    assert len(TEMPLATE.encode()) < 25_000
    assert not re.findall(r"https?:|url\(|\bsrc\s*=|<link|\bimport\b|\bfetch\b|innerHTML|document\.write", TEMPLATE)


def test_every_script_of_the_page_can_be_parsed():
    for script in Parsed(TEMPLATE).scripts:
        MiniRacer().eval(f"new Function({json.dumps(script)}), 0")


def test_neighbours_differ_in_lightness_in_both_palettes():
    """So that they are told apart in grey: prompt, picture and answers where they meet, and all from what is empty."""
    palettes = re.findall(r":root \{(.*?)\}", TEMPLATE, re.DOTALL)
    assert len(palettes) == 2
    for palette in palettes:
        light = {name: luminance(value) for name, value in re.findall(r"--(\w+): (#\w+);", palette)}
        answers = [light[f"c{i}"] for i in range(6)]
        meet = list(pairwise([light["picture"], light["prompt"], *answers, answers[0]]))
        filled = [light["picture"], light["prompt"], *answers]
        assert all(contrast(a, b) >= 1.5 for a, b in meet + [(x, light["none"]) for x in filled])
        assert contrast(light["ink"], light["back"]) >= 7 and contrast(light["soft"], light["back"]) >= 4.5


def luminance(colour: str) -> float:
    """As WCAG 2 defines it, of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    levels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


# --------------------------------------------------------------------------------------------------- a record's page

RECORDS = {
    "text": Record("Which?", ["a star", "no", "a star"]),
    "one token": Record("Which?", ["star", "star"]),
    "two pictures": Record("Which?", ["a red star", "no"], images=[noise(1), noise(2)]),
    "video": Record("Which?", ["a red star", "no"], video=[(0.0, noise(1)), (2.5, noise(2))]),
    "hostile": Record("</script>", HOSTILE),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RECORDS)
def test_a_records_tokens_keep_their_mask_when_pictures_are_shown_as_one(name, layout, mode):
    processor = Processor.from_folder(WEIGHTS / "tiny", 4096, layout)
    row = encode(RECORDS[name], processor)
    tokens = page.merged(row, [processor.tokenizer.name(token) for token in row.ids.tolist()])
    allowed, positions, captions = said(engine(), tokens, mode)
    counts = torch.tensor([token["count"] for token in tokens])
    wide = torch.tensor(allowed).repeat_interleave(counts, 0).repeat_interleave(counts, 1)
    assert torch.equal(wide, collate([row], mode).mask.dense[0])
    starts = counts.cumsum(0) - counts
    assert positions == row.positions(mode)[starts].tolist()
    assert [starts[i].item() for i, token in enumerate(tokens) if token["score"] is not None] == row.score_positions
    assert bool((counts > 1).any()) == bool(row.image.any())
    assert not any("undefined" in text or "NaN" in text for text in captions)


class Parsed(HTMLParser):
    """The scripts and the title of a page, the texts of what has the class "text", and the widths of its bars."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.texts, self.widths, self.tags, self.titles, self.into = [], [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        into = {"script": self.scripts, "title": self.titles}
        self.into = into.get(tag, self.texts if attributes.get("class") == "text" else None)
        if self.into is not None:
            self.into.append("")
        if attributes.get("class") == "bar":
            self.widths.append(float(re.search(r"width: ([\d.]+)%", attributes["style"])[1]))

    def handle_endtag(self, tag):
        self.into = None

    def handle_data(self, data):
        if self.into is not None:
            self.into[-1] += data


def test_markup_in_an_answer_is_shown_as_text(command, tmp_path):
    answers = [word for text in HOSTILE for word in ("--response", text)]
    words = ("--prompt", "</p> <b>?", *answers, "--html", tmp_path / "p", "--json", tmp_path / "s")
    status, _, err = command(score, "--tiny", *words)
    assert status == 0, err
    shown, empty = Parsed((tmp_path / "p").read_text(encoding="utf-8")), Parsed(TEMPLATE)
    scores = json.loads((tmp_path / "s").read_text())["scores"]
    order = sorted(range(len(HOSTILE)), key=lambda i: -scores[i])
    assert shown.texts == ["</p> <b>?", *(HOSTILE[i] for i in order)] and shown.titles == ["A judgement"]
    assert shown.scripts[1:] == empty.scripts[1:] and shown.tags.count("script") == 3 and "img" not in shown.tags
    record = json.loads(shown.scripts[0])
    row = encode(Record("</p> <b>?", HOSTILE), RewardModel.load(WEIGHTS / "tiny-rm").processor)
    assert record["mode"] == "joint" and record["scores"] == scores and len(record["tokens"]) == len(row.ids)
    assert [token["text"] for token in record["tokens"]].count("<|resp_sep|>") == len(HOSTILE), "no text made one"


def test_a_judgement_shows_picture_bars_and_true_facts(command, tmp_path):
    status, out, err = command(score, "--tiny", "--html", tmp_path / "page.html", "--json", tmp_path / "s.json")
    assert status == 0, err
    text, found = (tmp_path / "page.html").read_text(encoding="utf-8"), json.loads((tmp_path / "s.json").read_text())
    shown, scores = Parsed(text), sorted(found["scores"], reverse=True)
    low, high = scores[-1], scores[0]
    assert shown.widths == pytest.approx([100 * (s - low) / (high - low) for s in scores], abs=0.051)
    assert shown.tags.count("img") == 1 and text.count("data:image/jpeg;base64,") == 1
    listed = re.findall(r"<b>(.*?)</b> answer (\d), (\d of 6) facts true", text)
    assert len(listed) == 4 and listed == re.findall(r"^ +\d +(-?\d+\.\d+) +(\d) +(\d of 6)", out, re.MULTILINE)
    assert "http" not in text


def test_equal_scores_and_one_answer_have_a_page(command, tmp_path):
    for answers in (["star"], ["star", "star"]):
        words = [word for text in answers for word in ("--response", text)]
        assert command(score, "--tiny", "--mode", "isolated", "--prompt", "?", *words, "--html", tmp_path / "p")[0] == 0
        assert Parsed((tmp_path / "p").read_text(encoding="utf-8")).widths == [0.0] * len(answers)


def test_of_many_records_the_first_has_the_page(command, tmp_path):
    lines = [{"prompt": "first", "responses": ["a", "b"]}, {"prompt": "second", "responses": ["c"]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert command(score, "--tiny", "--data", tmp_path / "d.jsonl", "--html", tmp_path / "p")[0] == 0
    assert Parsed((tmp_path / "p").read_text(encoding="utf-8")).texts[0] == "first"


def test_a_row_that_no_browser_could_show_says_so(command, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 20)
    assert command(score, "--tiny", "--html", tmp_path / "p")[0] == 0
    text = (tmp_path / "p").read_text(encoding="utf-8")
    assert "The row has 62 tokens: too many to show, at most 20." in text and Parsed(text).scripts == []
