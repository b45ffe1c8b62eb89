"""The tiny world: pictures of shapes, questions, graded answers, and an oracle that knows the truth.

A scene is two to four things on a 3 x 3 grid; no two share a colour or a shape, so "the star" names one thing. A few
colour-shape pairs (`HELD_OUT`) never occur in training: neither in a picture nor in a text.

Two tasks, both written as ordinary preference records:

- `absolute`: "Describe the star." Each answer states five checkable facts; rank = number of true ones. An answer set
  is a factorial design: a few facts take k values each, and every combination is an answer. Which of the k values is
  the truth is exchangeable, so by symmetry NO rule that reads only the texts (the longest, the first, the medoid of the
  set) beats chance. (For n = 5 and 7, which no design gives, answers of the next larger one are left out.)
- `corroborated`: six answers {T, T, U, V, F, F}, each "a COLOUR SHAPE"; T, U, V are true, F is false; the best is T,
  the true fact that another answer confirms. F differs from U and V in both words, as T does: without the picture, T
  and F are exchangeable. Exact ceilings: `CEILINGS`.

See it: `pytest tests/test_world.py`.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from yojo.files import write_lines

CELL, GRID = 28, 3
NOISE = 0.06  # share of noise in every pixel
COLOURS = {"red": (214, 39, 40), "orange": (255, 140, 0), "yellow": (240, 225, 40), "green": (30, 150, 50)}
COLOURS |= {"cyan": (60, 220, 230), "blue": (40, 70, 220), "pink": (245, 130, 200), "white": (250, 250, 250)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
COUNTS = ("two", "three", "four")
SLOTS = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES, "row": ROWS, "column": COLUMNS, "count": COUNTS}
HELD_OUT = frozenset({("cyan", "star"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")})
HELD_OUT_WORDS = {word for pair in HELD_OUT for word in pair}
CORROBORATED = "What is in the picture?"
PAIRS = tuple(itertools.product(COLOURS, SHAPES))

# The highest possible best-of-6 accuracy on `corroborated`, by what a model has access to. Isolated: T, U and V are
# alike, and a score that differs from text to text puts one of the three on top (only exact ties would share it, 2 of
# 4). Without the picture T and F are alike: one of two. With both, causal attention is enough: the second copy
# attends to the first. They hold for pairs seen in training: in held-out records T alone is a held-out pair among the
# true ones.
CEILINGS = {"isolated": 1 / 3, "any_true": 1 / 2, "joint_blank": 1 / 2, "joint": 1.0}
# With copies worded in both of two ways, T always has an answer in the first wording, U and V with probability 1/2
# each: an isolated model that prefers a wording finds T among 1 + Bin(2, 1/2) true answers, 1/4 + 1/4 + 1/12.
PARAPHRASED = CEILINGS | {"isolated": 7 / 12}


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    row: str
    column: str


@dataclass(frozen=True)
class Scene:
    """`seed` fixes what no question asks about: background, jitter, noise."""

    things: tuple[Thing, ...]
    seed: int

    def facts(self, thing: Thing) -> dict[str, str]:
        return {**vars(thing), "count": COUNTS[len(self.things) - 2]}

    def find(self, word: str) -> Thing:
        """The one thing of this colour or shape."""
        return next(t for t in self.things if word in (t.colour, t.shape))


def make_scene(rng: random.Random, held_out: bool = False, fewest: int = 2) -> Scene:
    """Things of distinct colours and shapes in distinct cells. With `held_out`, the first has a held-out pair and the
    others share no word with any."""
    pairs = [rng.choice(sorted(HELD_OUT))] if held_out else []
    others = [p for p in PAIRS if not (held_out and set(p) & HELD_OUT_WORDS) and p not in HELD_OUT]
    count = rng.randint(fewest, 3 if held_out else 4)  # two shapes are in no held-out pair
    while len(pairs) < count:
        pair = rng.choice(others)
        if all(pair[0] != c and pair[1] != s for c, s in pairs):
            pairs.append(pair)
    cells = rng.sample(list(itertools.product(ROWS, COLUMNS)), count)
    things = tuple(Thing(rng.choice(SIZES), *pair, *cell) for pair, cell in zip(pairs, cells, strict=True))
    return Scene(things, rng.getrandbits(32))


# --------------------------------------------------------------------------------------------------------- pictures


def render(scene: Scene, noisy: float = NOISE) -> Image.Image:
    """84 x 84 pixels, drawn at three times the size and reduced; `noisy` is the share of noise in every pixel."""
    rng, zoom = random.Random(scene.seed), 3
    shade = rng.randint(20, 90)
    picture = Image.new("RGB", (GRID * CELL * zoom,) * 2, tuple(shade + rng.randint(-15, 15) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y = (CELL * (words.index(w) + 0.5) for words, w in ((COLUMNS, thing.column), (ROWS, thing.row)))
        x, y = (zoom * (v + rng.uniform(-2, 2)) for v in (x, y))
        radius = zoom * (rng.uniform(5.5, 6.5) if thing.size == "small" else rng.uniform(10, 11))
        colour = tuple(min(255, max(0, level + rng.randint(-20, 20))) for level in COLOURS[thing.colour])
        _draw(pen, thing.shape, x, y, radius, colour)
    noise = Image.frombytes("RGB", (GRID * CELL,) * 2, rng.randbytes(3 * (GRID * CELL) ** 2))
    return Image.blend(picture.reduce(zoom), noise, noisy)


def _draw(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
    outlines = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
        "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
        "star": [(0, -1), (0.25, -0.3), (0.97, -0.3), (0.4, 0.15), (0.6, 0.85), (0, 0.42)]
        + [(-0.6, 0.85), (-0.4, 0.15), (-0.97, -0.3), (-0.25, -0.3)],
        "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]
        + [(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    }
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    else:
        pen.polygon([(x + r * u, y + r * v) for u, v in outlines[shape]], fill=colour)


# ----------------------------------------------------------------------------------------------- texts and the oracle


def describe(facts: dict[str, str]) -> str:
    return "a {size} {colour} {shape}, {row} {column}, one of {count}".format(**facts)


DESCRIPTION = re.compile(
    r"a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+), (?P<row>\w+) (?P<column>\w+), one of (?P<count>\w+)"
)


def ask(thing: Thing, by: str) -> str:
    """A question that names the thing by its `shape` or by its `colour`."""
    return f"Describe the {thing.shape}." if by == "shape" else f"Describe the {thing.colour} thing."


def oracle(scene: Scene, prompt: str, answer: str) -> int:
    """The truth about any answer text: how many of the facts it states hold, 0 to 6 for a description (the fact the
    question gave away counts too), 0 or 1 for "a COLOUR SHAPE". A text of neither form states nothing: 0."""
    asked = re.fullmatch(r"Describe the (\w+)( thing)?\.", prompt)
    if asked and (found := DESCRIPTION.fullmatch(answer)):
        thing = scene.find(asked[1])
        return sum(scene.facts(thing)[slot] == word for slot, word in found.groupdict().items())
    return int(not asked and any(answer in wordings(t.colour, t.shape) for t in scene.things))


def wordings(colour: str, shape: str) -> tuple[str, str]:
    """Two ways to say the same."""
    return f"a {colour} {shape}", f"a {shape} in {colour}"


# ------------------------------------------------------------------------------------------------------------- tasks


def rank(quality: list[int]) -> list[int]:
    """Best = 1; equal quality shares a rank."""
    return [1 + sum(other > mine for other in quality) for mine in quality]


# Of each number of answers, how many values the crossed facts take.
DESIGNS = {2: [(2,)], 3: [(3,)], 4: [(2, 2), (4,)], 6: [(2, 3)], 8: [(2, 2, 2), (2, 4)], 12: [(2, 2, 3)]}
DESIGNS[16] = [(2, 2, 2, 2)]


def absolute(scene: Scene, rng: random.Random, n: int = 4, held_out: bool = False) -> dict:
    """ "Describe the star.": n descriptions crossed by design; rank = number of true facts.

    With `held_out` the question is about the scene's first thing, and texts may name held-out pairs.
    """
    thing = scene.things[0] if held_out else rng.choice(scene.things)
    by = rng.choice(("colour", "shape"))
    truth = scene.facts(thing)
    slots = [slot for slot in SLOTS if slot != by]
    values = {slot: [v for v in SLOTS[slot] if may_say(truth, slot, v, held_out)] for slot in slots}
    size = next(size for size in DESIGNS if size >= n)
    design = rng.choice(DESIGNS[size])
    while True:
        columns = rng.sample(slots, len(slots))
        if all(len(values[slot]) >= k for slot, k in zip(columns, design, strict=False)):
            break
    crossed = [_choices(rng, truth[slot], values[slot], k) for slot, k in zip(columns, design, strict=False)]
    tied, fixed = {}, {}
    for slot in columns[len(design) :]:  # the facts left over move together with a two-valued one, or stand still
        partner = rng.randrange(len(design))
        if design[partner] == 2 and rng.random() < 0.25:
            wrong = rng.choice([v for v in values[slot] if v != truth[slot]])
            true = truth[columns[partner]]
            tied[slot] = partner, {v: truth[slot] if v == true else wrong for v in crossed[partner]}
        else:
            fixed[slot] = _choices(rng, truth[slot], values[slot], 1, chance=0.7)[0]
    answers = []
    for combination in itertools.product(*crossed):
        facts = {by: truth[by], **fixed, **dict(zip(columns, combination, strict=False))}
        facts |= {slot: follow[combination[partner]] for slot, (partner, follow) in tied.items()}
        answers.append(describe(facts))
    prompt, answers = ask(thing, by), rng.sample(answers, n)
    ranks = rank([oracle(scene, prompt, answer) for answer in answers])
    return {"prompt": prompt, "responses": answers, "rankings": ranks}


def may_say(truth: dict[str, str], slot: str, value: str, held_out: bool) -> bool:
    pair = {**truth, slot: value}
    return held_out or (pair["colour"], pair["shape"]) not in HELD_OUT


def _choices(rng: random.Random, true: str, values: list[str], k: int, chance: float = 0.97) -> list[str]:
    """k distinct values; the true one among them with `chance`, or always where there are no more than k."""
    wrong = [v for v in values if v != true]
    if len(wrong) < k or rng.random() < chance:
        return [true, *rng.sample(wrong, k - 1)]
    return rng.sample(wrong, k)


def corroborated(scene: Scene, rng: random.Random, paraphrase: bool = False, held_out: bool = False) -> dict:
    """{T, T, U, V, F, F} in random order; best = T. With `paraphrase` the two copies are worded differently, so that
    no comparison of strings finds them. With `held_out`, T is the scene's first thing."""
    t, u, v = (scene.things[0], *rng.sample(scene.things[1:], 2)) if held_out else rng.sample(scene.things, 3)
    there = {(x.colour, x.shape) for x in scene.things}
    taken = {u.colour, v.colour, u.shape, v.shape}
    f = rng.choice([p for p in PAIRS if (p in HELD_OUT) == held_out and p not in there and not taken & set(p)])

    def say(pair: tuple[str, str], times: int) -> list[str]:
        ways = list(wordings(*pair))
        return rng.sample(ways, times) if paraphrase else [ways[0]] * times

    answers = [(a, 1) for a in say((t.colour, t.shape), 2)]
    answers += [(a, 2) for x in (u, v) for a in say((x.colour, x.shape), 1)]
    answers += [(a, 3) for a in say(f, 2)]
    rng.shuffle(answers)
    responses, order = zip(*answers, strict=True)
    return {"prompt": CORROBORATED, "responses": list(responses), "rankings": rank([-o for o in order])}


def records(
    rng: random.Random, task: str, count: int, scenes: int, n: Sequence[int] = (4,), held_out=False, paraphrase=False
) -> Iterator[tuple[int, Scene, dict]]:
    """`count` records over `scenes` scenes in turn, roles drawn anew at every use -> (scene number, scene, record)."""
    world = [make_scene(rng, held_out, 3 if task == "corroborated" else 2) for _ in range(scenes)]
    for i in range(count):
        scene = world[i % scenes]
        if task == "absolute":
            yield i % scenes, scene, absolute(scene, rng, rng.choice(n), held_out)
        else:
            yield i % scenes, scene, corroborated(scene, rng, paraphrase, held_out)


def write_records(folder: str | Path, name: str, made: Iterable[tuple[int, Scene, dict]], noisy: float = NOISE) -> Path:
    """`<name>.jsonl` and `<name>/<scene>.png` in `folder`, in the record format of `data.py` -> the JSONL's path."""
    pictures, path, made = Path(folder) / name, Path(folder) / f"{name}.jsonl", list(made)
    pictures.mkdir(parents=True)
    for number, scene in {number: scene for number, scene, _ in made}.items():
        render(scene, noisy).save(pictures / f"{number}.png", compress_level=0)
    write_lines(path, ({**record, "image": f"{name}/{number}.png"} for number, _, record in made))
    return path
