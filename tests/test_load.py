"""Much of everything: many records, many answers, a long answer, a large picture; and no network.

pytest tests/test_load.py               (`-m slow` scores 10,000 records in one run)
"""

import os
import random
import subprocess
import sys

import pytest
from PIL import Image

import yojo
from yojo import instruments
from yojo.cli import WEIGHTS
from yojo.files import InputError
from yojo.tiny import world


@pytest.fixture(scope="module")
def judge():
    return yojo.RewardModel.load(WEIGHTS / "tiny-rm-isolated")


def test_64_answers_to_one_prompt_score_as_each_alone(judge):
    answers = [f"a {colour} {shape}" for colour, shape in world.PAIRS]
    answers = (answers + [f"{a}, one of two" for a in answers])[:64]
    together = judge.score("What is in the picture?", answers, Image.new("RGB", (84, 84), "grey"))
    assert len(together) == len(set(answers)) == 64
    for i in (0, 31, 63):
        alone = judge.score("What is in the picture?", [answers[i]], Image.new("RGB", (84, 84), "grey"))
        assert together[i] == pytest.approx(alone[0], abs=2e-5)


def test_an_answer_that_just_fits_and_one_that_just_does_not(judge):
    room = judge.processor.max_tokens - len(judge.processor.encode("?", ["star"]).ids) + 1
    long = " star" * (room - 1)
    assert len(judge.processor.encode("?", ["star" + long]).ids) == judge.processor.max_tokens
    (score,) = judge.score("?", ["star" + long])
    assert abs(score) < 1000
    with pytest.raises(InputError, match="1 more than the model's limit of 4096"):
        judge.score("?", ["star" + long + " star"])


def test_a_picture_of_100_megapixels_is_scored(judge, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert len(judge.score("?", ["a", "b"], tmp_path / "large.png")) == 2


OFFLINE = """
import socket
def refused(*args, **kwargs):
    raise AssertionError(f"the network was asked for: {args}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
import yojo
from yojo import bench, checkpoint, evaluate, flops, grpo, hacking, pretrain, score, train, trainers, votes
from PIL import Image
rm = yojo.RewardModel.load("weights/tiny-rm")
print(len(rm.score("Describe the star.", ["a red star", "a star"], Image.new("RGB", (84, 84)))))
"""


def test_nothing_asks_for_a_network_and_nothing_warns():
    """In a process whose sockets refuse, with every warning an error."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    root = WEIGHTS.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr


@pytest.mark.slow
def test_10_000_records_take_no_more_memory_than_500(judge):
    rng, held = random.Random(0), []
    pictures = [world.render(world.make_scene(rng)) for _ in range(50)]

    def records():
        for i in range(10_000):
            asked = world.absolute(world.make_scene(rng), rng, rng.randint(2, 8))
            yield judge.processor.encode(asked["prompt"], asked["responses"], pictures[i % 50])

    for i, scores in enumerate(judge.score_all(records())):
        assert len(scores) > 1
        if i <= 500 or i == 9_999:
            held.append(instruments.memory()["anon"])
    assert held[-1] < 1.03 * max(held[:-1]), f"{held[-1] / 1e6:.0f} MB, at most {max(held[:-1]) / 1e6:.0f} at first"
