"""What pre-training is taught, read off its rows: answers to say, and what is true and wrong at each word to check.

pytest tests/test_pretrain.py            (that it learns: `-m slow`, test_tiny.py)
"""

import json
import random

import pytest
import torch

from yojo import pretrain
from yojo.cli import WEIGHTS
from yojo.core.mask import MODES
from yojo.core.prompt import Processor
from yojo.core.training import fit
from yojo.pretrain import NOTHING, PretrainLoss, Rows, facts_asked_about, wrong_so_far
from yojo.tiny import world
from yojo.tiny.talks import CHECK, talks

QUESTION = "Describe the star. a large red star, top left, one of three. Right?"


@pytest.fixture(scope="module")
def rows(tiny_folder):
    return Rows(Processor.from_folder(tiny_folder, 4096), seed=0)


def test_a_wrong_fact_is_wrong_from_its_word_on(rows):
    talk, start, labels = rows.encode(QUESTION, "wrong size, row")
    verdicts = labels[:, 1:].tolist()
    names = [rows.processor.tokenizer.name(token).strip() for token in talk[:start]]
    size, row = (list(world.SLOTS).index(slot) for slot in ("size", "row"))
    assert len(verdicts) == len(talk)
    for name, verdict in zip(names[: names.index("large")], verdicts, strict=False):
        assert verdict == NOTHING, f"nothing has been said yet at {name!r}"
    described = slice(names.index("large"), names.index("Right") + 2)
    top = names.index("top")
    for t in range(described.start, described.stop):
        wrong = [i for i, mark in enumerate(verdicts[t]) if mark]
        assert wrong == ([size, row] if t >= top else [size]), names[t]
    assert all(verdict == NOTHING for verdict in verdicts[described.stop :]), "the answer itself is not judged"


def test_only_a_description_to_check_is_judged():
    assert wrong_so_far("What size is the star?", "large", 10) == NOTHING
    assert wrong_so_far(QUESTION.removesuffix(" Right?"), "right", 60) == NOTHING
    assert wrong_so_far(QUESTION, "right", len(QUESTION)) == [0] * 6


def test_what_is_true_of_the_thing_asked_about():
    scene = world.make_scene(random.Random(0))
    for thing in scene.things:
        for by in ("shape", "colour"):
            values = facts_asked_about(scene, world.ask(thing, by))
            words = [list(world.SLOTS[slot])[value] for slot, value in zip(world.SLOTS, values, strict=True)]
            assert words == [scene.facts(thing)[slot] for slot in world.SLOTS]
    assert facts_asked_about(scene, "Is there a red star?") == [-1] * 6


@pytest.mark.parametrize("micro_batch", range(len(MODES)))
def test_a_batch_lines_up(rows, micro_batch):
    """Every answer's tokens are to be said, every description to check is judged, and labels stand at their tokens."""
    batch, learned = rows.batch(step=3, micro_batch=micro_batch, size=4)
    assert batch.mask.mode == MODES[micro_batch]
    rng = random.Random(f"0 3 {micro_batch}")
    scenes = [world.make_scene(rng) for _ in range(4)]
    said = [talk for scene in scenes for talk in talks(scene, rng, pretrain.TALKS)]
    tokenizer = rows.processor.tokenizer
    end = tokenizer.id("<|im_end|>")
    assert len(learned["target"]) == sum(len(tokenizer.encode(answer)) + 1 for _, answer in said)
    for (row, t), target in zip(learned["spoken"].tolist(), learned["target"].tolist(), strict=True):
        assert batch.input_ids[row, t + 1] == target
    assert int((learned["target"] == end).sum()) == len(said)
    checks = [question for question, _ in said if question.endswith(CHECK)]
    judged = batch.input_ids[tuple(learned["judged"].T)].tolist()
    assert sum("Right" in tokenizer.name(token) for token in judged) == len(checks)
    assert len(learned["wrong"]) == len(learned["true"]) == len(judged) and (learned["true"] >= 0).all()


def test_every_part_of_the_loss_reaches_the_network(rows):
    model = pretrain.new_model(rows.processor.tokenizer, torch.Generator().manual_seed(0))
    loss_of = PretrainLoss(model, rows, torch.Generator().manual_seed(0))
    loss, logged = loss_of(0, 1)
    loss.backward()
    assert {"words", "cells", "facts", "verdict"} <= logged.keys()
    assert loss.item() == pytest.approx(
        logged["words"]
        + pretrain.AUXILIARY * logged["cells"]
        + pretrain.FACTS * logged["facts"]
        + pretrain.VERDICT * logged["verdict"],
        rel=1e-5,
    )
    assert all(p.grad is not None and p.grad.any() for p in loss_of.parameters())


def test_the_shipped_curve_begins_as_the_committed_recipe_does(tmp_path):
    """The first 21 steps, done again. Later ones agree only on the same processor: rounding adds up."""
    shipped = [json.loads(line) for line in (WEIGHTS / "tiny/metrics.jsonl").read_text().splitlines()]
    assert shipped[-1]["step"] == pretrain.FIT.steps - 1
    processor = pretrain.write_companions(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (WEIGHTS / "tiny/tokenizer.json").read_bytes()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    loss_of = PretrainLoss(pretrain.new_model(processor.tokenizer, generator), Rows(processor, 0), generator)
    words_lost = []

    def watched(step, micro_batch):
        if step == 21:
            raise KeyboardInterrupt
        loss, about = loss_of(step, micro_batch)
        words_lost.append(about["words"])
        return loss, about

    with pytest.raises(KeyboardInterrupt):
        fit(watched, loss_of.parameters(), pretrain.FIT)
    for entry, step in zip(shipped, (0, 20), strict=False):
        words = sum(words_lost[2 * step : 2 * step + 2]) / 2
        assert entry["step"] == step and words == pytest.approx(entry["words"], rel=2e-3)
