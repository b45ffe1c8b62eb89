"""The tiny world is honest: the oracle is right, held-out pairs are unseen, and no text-only rule finds the best
answer.

pytest tests/test_world.py
"""

import itertools
import json
import random
from collections import Counter

import pytest

from yojo import metrics
from yojo.core.data import read_records
from yojo.tiny import world
from yojo.tiny.world import Scene, Thing

SCENE = Scene(
    (Thing("small", "red", "star", "top", "left"), Thing("large", "blue", "cross", "middle", "right")), seed=0
)


def test_a_scene_is_drawn_where_and_as_it_says():
    """The pixel at the centre of a thing has its colour; of an empty cell, the background's."""
    picture = world.render(SCENE)
    assert picture.size == (84, 84)

    def near(pixel, colour):
        return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 45

    assert near(picture.getpixel((14, 14)), world.COLOURS["red"])
    assert near(picture.getpixel((70, 42)), world.COLOURS["blue"])
    assert max(picture.getpixel((14, 70))) < 130
    assert world.render(SCENE).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "answer, true",
    [
        ("a small red star, top left, one of two", 6),
        ("a large red star, top left, one of two", 5),
        ("a small red star, top left, one of three", 5),
        ("a large blue star, middle right, one of four", 1),
        ("a large blue cross, middle right, one of two", 1),  # true of the cross, but the star was asked for
        ("a small red star", 0),
        ("", 0),
    ],
)
def test_the_oracle_counts_true_facts(answer, true):
    assert world.oracle(SCENE, "Describe the star.", answer) == true


def test_the_oracle_knows_what_is_in_the_picture():
    for answer, true in [("a red star", 1), ("a star in red", 1), ("a blue star", 0), ("a star", 0)]:
        assert world.oracle(SCENE, world.CORROBORATED, answer) == true


def made(task, held_out=False, count=4000, n=(4,), paraphrase=False):
    return [(s, r) for _, s, r in world.records(random.Random(1), task, count, count, n, held_out, paraphrase)]


def test_ranks_are_the_number_of_true_facts():
    assert world.rank([3, 5, 3, 1]) == [2, 1, 2, 4]
    for scene, record in made("absolute", count=300):
        quality = [world.oracle(scene, record["prompt"], a) for a in record["responses"]]
        assert record["rankings"] == world.rank(quality)
        assert len(set(record["responses"])) == 4


def test_ties_and_near_misses_occur():
    records = [r for _, r in made("absolute")]
    assert 0.01 < sum(r["rankings"].count(1) > 1 for r in records) / len(records) < 0.1
    words = [[a.split() for a in r["responses"]] for r in records]
    near = [min(sum(x != y for x, y in zip(a, b, strict=True)) for a, b in itertools.combinations(w, 2)) for w in words]
    assert near.count(1) / len(near) > 0.7


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 16])
def test_no_text_only_rule_finds_the_best_of_an_absolute_set(n):
    """By design each answer is the best equally often, whatever its text: every rule scores the share of best answers.
    (With held-out pairs a rule that had the list of them would do better; nothing that is trained can have it.)"""
    records = [r for _, r in made("absolute", n=(n,))]
    share = sum(r["rankings"].count(1) / n for r in records) / len(records)
    for name, rule in metrics.BASELINES.items():
        wins = [metrics.best_of_n(rule(r["responses"]), r["rankings"]) for r in records]
        assert metrics.mean(wins) == pytest.approx(share, abs=0.03), name
    alone = [[-v for v in metrics.medoid(r["responses"])] for r in records]  # the odd one out
    wins = [metrics.best_of_n(s, r["rankings"]) for s, r in zip(alone, records, strict=True)]
    assert metrics.mean(wins) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 16])
def test_every_answer_of_a_full_design_is_as_central_as_any_other(n):
    for _, record in made("absolute", count=200, n=(n,)):
        assert len(set(metrics.medoid(record["responses"]))) == 1


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("paraphrase", [False, True])
def test_corroborated_sets_are_what_they_say(held_out, paraphrase):
    for scene, record in made("corroborated", held_out, 400, paraphrase=paraphrase):
        truth = [world.oracle(scene, record["prompt"], a) for a in record["responses"]]
        assert sorted(zip(record["rankings"], truth, strict=True)) == [(1, 1), (1, 1), (3, 1), (3, 1), (5, 0), (5, 0)]
        best = [a for a, rank in zip(record["responses"], record["rankings"], strict=True) if rank == 1]
        assert (len(set(best)) == 2) == paraphrase
        words = [set(a.split()) - {"a", "in"} for a in record["responses"]]
        others = set().union(*(w for w, rank in zip(words, record["rankings"], strict=True) if rank == 3))
        assert all(not w & others for w, rank in zip(words, record["rankings"], strict=True) if rank != 3)


@pytest.mark.parametrize("held_out", [False, True])
def test_without_the_picture_the_true_and_the_false_pair_are_alike(held_out):
    """What is said twice is T or F: no word of it tells which. Every rule is right half the time."""
    records = [r for _, r in made("corroborated", held_out, 8000)]
    first_twice, by_word = [], Counter()
    for r in records:
        twice = [a for a in dict.fromkeys(r["responses"]) if r["responses"].count(a) == 2]
        best = r["responses"][r["rankings"].index(1)]
        first_twice.append(twice[0] == best)
        by_word.update((word, a == best) for a in twice for word in a.split()[1:])
    assert sum(first_twice) / len(records) == pytest.approx(0.5, abs=0.02)
    for word in {w for w, _ in by_word}:
        true, false = by_word[word, True], by_word[word, False]
        assert true / (true + false) == pytest.approx(0.5, abs=0.07), word


@pytest.mark.parametrize("paraphrase", [False, True])
def test_what_an_isolated_judge_can_reach(paraphrase):
    """It knows which answers are true, and may like one wording better; among alike answers it guesses."""
    rng, found = random.Random(0), []
    for _, scene, record in world.records(rng, "corroborated", 4000, 400, paraphrase=paraphrase):
        liked = {
            text: (world.oracle(scene, record["prompt"], text), " in " not in text, rng.random())
            for text in record["responses"]
        }
        best = max(record["responses"], key=liked.get)
        found.append(record["rankings"][record["responses"].index(best)] == 1)
    ceilings = world.PARAPHRASED if paraphrase else world.CEILINGS
    assert sum(found) / len(found) == pytest.approx(ceilings["isolated"], abs=0.025)


def test_held_out_pairs_never_occur_in_training():
    for task in ("absolute", "corroborated"):
        for scene, record in made(task, count=1000, n=(4, 8)):
            assert not {(t.colour, t.shape) for t in scene.things} & world.HELD_OUT
            for answer in record["responses"]:
                assert not any(c in answer.split() and s in answer.replace(",", "").split() for c, s in world.HELD_OUT)
        for scene, record in made(task, held_out=True, count=200):
            thing = scene.things[0]
            assert (thing.colour, thing.shape) in world.HELD_OUT
            assert task == "corroborated" or thing.colour in record["prompt"] or thing.shape in record["prompt"]


def test_records_are_written_as_ordinary_files(tmp_path):
    stream = world.records(random.Random(0), "absolute", 6, 3, (4,))
    path = world.write_records(tmp_path, "train", stream)
    records = read_records(path)
    assert len(records) == 6 and len(list((tmp_path / "train").glob("*.png"))) == 3
    assert records[0].images == records[3].images == [tmp_path / "train/0.png"]
    assert json.loads(path.read_text().splitlines()[0]).keys() == {"prompt", "responses", "rankings", "image"}
