"""`tutorials/one_file.py` computes what the package computes, though it takes only the tiny world from it.

    pytest tests/test_one_file.py

So each checks the other: scores of the shipped judges, the random start of a new one, gradients. Then it learns.
"""

import random
from pathlib import Path

import pytest
import torch

from tutorials import one_file
from yojo.core import lora
from yojo.core.data import collate
from yojo.core.loss import best_of_n
from yojo.core.reward import RewardModel
from yojo.tiny import world

WEIGHTS = one_file.WEIGHTS


def draw(seed, n=4):
    rng = random.Random(seed)
    scene = world.make_scene(rng)
    record = world.absolute(scene, rng, n)
    return record["prompt"], record["responses"], world.render(scene), record["rankings"]


@pytest.fixture(scope="module", params=["tiny-rm", "tiny-rm-isolated"])
def judges(request):
    """The same shipped judge, read by the one file and by the package, in float64."""
    folder = WEIGHTS / request.param
    return one_file.load_judge(folder, torch.float64), RewardModel.load(folder, dtype=torch.float64)


@torch.no_grad()
def assert_same_scores(judges, *records):
    """All records in one batch of the one file; each alone in the package."""
    judge, rm = judges
    ours = one_file.score(judge, [one_file.encode(judge, *record[:3]) for record in records])
    for scores, (question, answers, picture, _) in zip(ours, records, strict=True):
        assert scores.tolist() == pytest.approx(rm.score(question, answers, picture), abs=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_scores_are_the_packages(judges, n):
    assert_same_scores(judges, draw(n, n))


def test_scores_of_a_padded_batch(judges):
    assert_same_scores(judges, draw(5, 2), draw(6, 8), draw(7, 4))


def test_text_that_spells_a_separator_stays_text(judges):
    question, answers, picture, ranks = draw(8)
    answers = ["a red star<|resp_sep|>a blue star", "<im_patch> <|im_end|>", *answers[2:]]
    assert_same_scores(judges, (question + " <|im_start|>", answers, picture, ranks))


@pytest.mark.parametrize("size", [(130, 61), (40, 200), (84, 84)])
def test_a_picture_of_another_size_and_kind(judges, size):
    question, answers, picture, ranks = draw(9)
    assert_same_scores(judges, (question, answers, picture.resize(size).convert("L"), ranks))


@pytest.fixture(params=[False, True], ids=["joint", "isolated"])
def fresh(request):
    """A new judge of either kind, and the package's with the same settings."""
    judge = one_file.new_judge(isolated=request.param, seed=3)
    config = lora.LoraConfig(r=16, alpha=64, dropout=0.0)
    mode = "isolated" if request.param else "joint"
    return judge, RewardModel.new(WEIGHTS / "tiny", mode, config, inner=128, seed=3)


def test_a_new_judge_starts_with_the_same_numbers_bit_for_bit(fresh):
    judge, rm = fresh
    ours, theirs = one_file.trainable(judge), rm.trainable()
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_gradients_are_the_packages(mode):
    """In float64, where nothing but rounding is left: 1e-10 of each tensor's largest."""
    judge = one_file.new_judge(isolated=mode == "isolated")
    judge.weights = {name: w.double() for name, w in judge.weights.items()}
    g = torch.Generator().manual_seed(0)

    def moved(x):  # away from the start, where B is zero and so is the gradient of A
        return (x.detach().double() + 0.02 * torch.randn(x.shape, generator=g)).requires_grad_(True)

    judge.lora = {name: (moved(A), moved(B)) for name, (A, B) in judge.lora.items()}
    judge.head = [moved(x) for x in judge.head]
    config = lora.LoraConfig(r=16, alpha=64, dropout=0.0)
    rm = RewardModel.new(WEIGHTS / "tiny", mode, config, inner=128, dtype=torch.float64)
    ours, theirs = one_file.trainable(judge), rm.trainable()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    records = [draw(seed) for seed in (1, 2, 3)]
    scores = one_file.score(judge, [one_file.encode(judge, *record[:3]) for record in records])
    losses = [one_file.best_of_n(s, torch.tensor(ranks)) for s, (*_, ranks) in zip(scores, records, strict=True)]
    batch = collate([rm.processor.encode(*record[:3]) for record in records], mode)
    loss = best_of_n(torch.stack(rm(batch).split(batch.counts)), torch.tensor([ranks for *_, ranks in records]))
    ours = torch.autograd.grad(torch.stack(losses).mean(), ours)
    for a, b in zip(ours[:-1], torch.autograd.grad(loss, theirs)[:-1], strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    assert ours[-1].abs().max() < 1e-15  # the head's last bias moves all scores alike


def test_a_short_training_run_learns_to_judge_records_that_it_has_not_seen():
    unseen = one_file.world("unseen")
    test = [unseen() for _ in range(64)]
    judge = one_file.new_judge(isolated=True)
    assert one_file.accuracy(judge, test) < 0.5
    assert one_file.train(judge, one_file.world("seen"), test, steps=30) >= 0.6


def test_it_uses_nothing_of_the_package_but_the_tiny_world():
    source = Path(one_file.__file__).read_text(encoding="utf-8")
    assert [line.strip() for line in source.splitlines() if "import" in line and "yojo" in line] == [
        "from yojo.tiny.world import absolute, make_scene, render"
    ]
