"""Two things that no change to the code may move: what the released code computes, and what was saved in the past.

    pytest tests/test_frozen.py

`tests/data/released/` holds 40 text records with the ids, the positions read and the scores that the released reward
model's own code (yinuoyang01/multi-response-rm on `transformers`) gave on the backbone `weights/tiny`, with the value
head that it used. No line of this project took part in them.

`tests/data/saved/` holds a reward model as `RewardModel.save` wrote it on 2026-11-26, with the scores it gave that day
in float64, joint and isolated, with and without pictures. To write such a folder again:
`PYTHONPATH=. python tests/test_frozen.py DIR`.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from yojo.cli import WEIGHTS
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.tiny import world

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released layout of a merged model: the backbone's files and the head's, in one folder."""
    folder = shutil.copytree(WEIGHTS / "tiny", tmp_path_factory.mktemp("released") / "merged")
    for name in ("reward_model_config.json", "value_head.pt"):
        shutil.copy(DATA / "released" / name, folder)
    return RewardModel.load(folder)


@pytest.mark.parametrize("number", range(40))
def test_the_released_codes_ids_positions_and_scores(released, number):
    record = json.loads((DATA / "released/records.json").read_text(encoding="utf-8"))[number]
    row = released.processor.encode(record["prompt"], record["responses"])
    assert row.ids.tolist() == record["ids"] and row.score_positions == record["read"]
    assert released.score(record["prompt"], record["responses"]) == pytest.approx(record["released_scores"], abs=2e-5)


def records() -> list[tuple]:
    """(prompt, responses, pictures): the tiny world's, one without a picture, one whose text spells markup, and one
    longer than a mask of all pairs is made for. No picture is resized, which Pillow does otherwise in each version."""
    rng, made = random.Random(0), []
    for n in (1, 2, 4, 8):
        scene = world.make_scene(rng)
        record = world.absolute(scene, rng, n)
        made.append((record["prompt"], record["responses"], [world.render(scene)]))
    made.append((*made[2][:2], None))
    question, _, (picture,) = made[1]
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    made.append((question, ["a red star <|resp_sep|> <im_patch>", "<|im_end|>"], [turned]))
    made.append(("Which is it?", [" ".join(["a small red star"] * n) for n in (60, 90, 20)], [made[0][2][0]] * 2))
    return made


def scores(rm: RewardModel) -> dict[str, list[list[float]]]:
    return {mode: [rm.score(*record, mode=mode) for record in records()] for mode in ("joint", "isolated")}


def test_a_folder_saved_in_the_past_still_gives_its_scores():
    kept = json.loads((DATA / "saved/scores.json").read_text())
    now = scores(RewardModel.load(DATA / "saved/rm", dtype=torch.float64))
    for mode in kept:
        for ours, theirs in zip(now[mode], kept[mode], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-10)


def write(folder: Path) -> None:
    rm = RewardModel.new(WEIGHTS / "tiny", "isolated", LoraConfig(r=2, alpha=4, dropout=0.0), inner=16)
    with torch.no_grad():
        for p in rm.trainable():
            p.normal_(std=0.4, generator=torch.Generator().manual_seed(p.numel()))
    rm.eval().save(folder / "rm")
    exact = RewardModel.load(folder / "rm", dtype=torch.float64)
    (folder / "scores.json").write_text(json.dumps(scores(exact), indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
