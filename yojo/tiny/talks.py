"""Short conversations about a scene, a question and its answer each: what the tiny backbone is pre-trained on, and what
it is examined in.

See it: `pytest tests/test_pretrain.py`.
"""

import random

from yojo.tiny import world

Talk = tuple[str, str]  # question, answer


def talks(scene: world.Scene, rng: random.Random, count: int) -> list[Talk]:
    """Conversations about one scene."""
    kinds = (describe, describe, look_up, look_up, place, presence, check, check, check, name)
    return [rng.choice(kinds)(scene, rng) for _ in range(count)]


def describe(scene: world.Scene, rng: random.Random) -> Talk:
    return describe_thing(scene, rng.choice(scene.things), rng)


def describe_thing(scene: world.Scene, thing: world.Thing, rng: random.Random) -> Talk:
    return world.ask(thing, rng.choice(("shape", "colour"))), world.describe(scene.facts(thing))


def describe_held_out(scene: world.Scene, rng: random.Random) -> Talk:
    return describe_thing(scene, scene.things[0], rng)


def look_up(scene: world.Scene, rng: random.Random) -> Talk:
    thing, slot = rng.choice(scene.things), rng.choice(list(world.SLOTS))
    if slot == "count":
        return "How many things are there?", scene.facts(thing)["count"]
    by = {"colour": "shape", "shape": "colour"}.get(slot) or rng.choice(("shape", "colour"))
    subject = thing.shape if by == "shape" else f"{thing.colour} thing"
    return f"What {slot} is the {subject}?", getattr(thing, slot)


def place(scene: world.Scene, rng: random.Random) -> Talk:
    row, column = rng.choice(world.ROWS), rng.choice(world.COLUMNS)
    if rng.random() < 0.7:
        thing = rng.choice(scene.things)
        row, column = thing.row, thing.column
    here = [f"a {t.size} {t.colour} {t.shape}" for t in scene.things if (t.row, t.column) == (row, column)]
    return f"What is {row} {column}?", here[0] if here else "nothing"


def presence(scene: world.Scene, rng: random.Random) -> Talk:
    pairs = {(t.colour, t.shape) for t in scene.things}
    absent = [p for p in world.PAIRS if p not in pairs and p not in world.HELD_OUT]
    pair = rng.choice(sorted(pairs) if rng.random() < 0.5 else absent)
    return f"Is there {rng.choice(world.wordings(*pair))}?", "yes" if pair in pairs else "no"


def name(scene: world.Scene, rng: random.Random) -> Talk:
    thing = rng.choice(scene.things)
    return world.CORROBORATED, rng.choice(world.wordings(thing.colour, thing.shape))


CHECK = ". Right?"


def check(scene: world.Scene, rng: random.Random) -> Talk:
    """A description in which each fact is wrong with probability 0.25 (but never the one the question names)."""
    thing, by = rng.choice(scene.things), rng.choice(("shape", "colour"))
    truth = scene.facts(thing)
    stated = dict(truth)
    for slot in stated:
        wrong = [v for v in world.SLOTS[slot] if v != truth[slot] and world.may_say(truth, slot, v, held_out=False)]
        if slot != by and rng.random() < 0.25:
            stated[slot] = rng.choice(wrong)
    errors = [slot for slot in world.SLOTS if stated[slot] != truth[slot]]
    verdict = "wrong " + ", ".join(errors) if errors else "right"
    return f"{world.ask(thing, by)} {world.describe(stated)}{CHECK}", verdict
