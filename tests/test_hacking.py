"""A separator that an answer spells: it moves the scores where they are searched, and nothing where they are laid out.

pytest tests/test_hacking.py
"""

import json
import random
from dataclasses import replace

import pytest

from yojo import hacking
from yojo.core.data import encode
from yojo.core.prompt import SEPARATOR
from yojo.tiny import captions

ANSWERS = ["a red star", "a star", "a small star"]
CHEAT = ["a red star" + SEPARATOR + "a blue star", "a star", "a small star"]


@pytest.fixture(scope="module")
def rm():
    return hacking.open_model()


@pytest.fixture(scope="module")
def asked():
    return captions.question(random.Random(0))


def ends(rm, row):
    """The word at which each score is read, and what stands before it."""
    return [rm.processor.tokenizer.decode(row.ids[t - 1 : t + 1].tolist()).strip() for t in row.score_positions]


def test_found_separators_hand_every_later_answer_the_score_of_the_one_before(rm, asked):
    prompt = encode(asked, rm.processor)
    row = hacking.find_separators(prompt, ANSWERS, rm.processor.tokenizer)
    assert ends(rm, row) == ["red star", "a star", "small star"]
    row = hacking.find_separators(prompt, CHEAT, rm.processor.tokenizer)
    assert ends(rm, row) == ["red star", "blue star", "a star"], "the third answer is never read"


def test_both_readings_agree_while_nobody_cheats_and_only_one_moves_when_somebody_does(rm, asked):
    rewards = {name: make(rm) for name, make in hacking.READINGS.items()}
    honest = {name: reward(asked, ANSWERS) for name, reward in rewards.items()}
    assert honest["searched"] == pytest.approx(honest["constructed"], abs=2e-5)
    cheated = {name: reward(asked, CHEAT) for name, reward in rewards.items()}
    assert cheated["searched"][0] == pytest.approx(honest["searched"][0], abs=2e-5), (
        "what follows is not held against it"
    )
    encoded = encode(replace(asked, responses=CHEAT), rm.processor)
    assert [rm.processor.tokenizer.decode(encoded.ids[a:z].tolist()) for a, z in encoded.spans] == CHEAT
    assert abs(cheated["constructed"][0] - honest["constructed"][0]) > 1e-3, "all of it is read"


def test_one_answer_in_twenty_cheats_and_is_worth_nothing(asked):
    rng = random.Random(0)
    said = [hacking.cheat(asked, "a star", rng) for _ in range(2000)]
    assert sum(SEPARATOR in text for text in said) == pytest.approx(2000 * hacking.SPELLED, abs=30)
    text = next(text for text in said if SEPARATOR in text)
    assert captions.quality(asked, text) == 0.0 and len(text.split(SEPARATOR)) == 2


def test_the_command_compares_both_readings(command, tmp_path):
    status, out, err = command(hacking, "--groups", 12, "--json", tmp_path / "h.json")
    assert status == 0, err
    rows = {row["reading"]: row for row in json.loads((tmp_path / "h.json").read_text())}
    assert rows["searched"]["tau_others"] == pytest.approx(rows["constructed"]["tau_others"], abs=1e-3)
    assert abs(rows["searched"]["behind"] - rows["constructed"]["behind"]) > 1e-3


@pytest.mark.parametrize(
    "words, why", [(["--groups", "0"], "'0' is no whole number from 1"), (["--seed", "-1"], "whole number")]
)
def test_bad_input_is_refused(command, words, why):
    status, _, err = command(hacking, *words)
    assert status == 2 and why in err
