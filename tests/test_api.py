"""What callers in Python hand over works as they would expect, or `InputError` names the argument.

pytest tests/test_api.py
"""

import base64
import io
import math
import os
import warnings
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import yojo
from yojo import InputError, RewardModel, load_backbone, weights
from yojo.cli import WEIGHTS
from yojo.core.data import Record, encode
from yojo.core.grpo import prompt_row
from yojo.core.order import MicroBatches
from yojo.trainers import GroupReward
from yojo.video import Clip

ANSWERS = ["a small cyan cross, bottom centre, one of three", "a large cyan cross, bottom centre, one of three"]
PICTURE = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
ASKED = "Describe the cross."


class Table:
    """As of pandas, without it."""

    ndim = 2

    def __iter__(self):
        return iter(["a", "b"])


@pytest.fixture(scope="module")
def rm():
    return RewardModel.load(WEIGHTS / "tiny-rm")


def as_png() -> bytes:
    Image.fromarray(PICTURE).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_a_picture_in_any_form_is_the_same_picture(rm, tmp_path):
    (tmp_path / "p.png").write_bytes(as_png())
    expected = rm.score(ASKED, ANSWERS, image=tmp_path / "p.png")
    assert expected != rm.score(ASKED, ANSWERS)
    coded = base64.b64encode(as_png()).decode()
    forms = [str(tmp_path / "p.png"), Image.fromarray(PICTURE), PICTURE, torch.tensor(PICTURE).permute(2, 0, 1)]
    forms += [as_png(), f"data:image/png;base64,{coded}", (tmp_path / "p.png").as_uri(), {"bytes": as_png()}]
    forms += [io.BytesIO(as_png()), (tmp_path / "p.png").open("rb"), next(os.scandir(tmp_path)), coded]
    for form in [*forms, [PICTURE], (PICTURE,), iter([PICTURE]), [io.BytesIO(as_png())]]:
        assert rm.score(ASKED, ANSWERS, image=form) == expected, type(form)
    two = rm.score(ASKED, ANSWERS, image=[PICTURE, PICTURE])
    assert two == rm.score(ASKED, ANSWERS, image=(p for p in [PICTURE, PICTURE])) != expected


def test_frames_with_or_without_seconds(rm, tmp_path):
    frames = [PICTURE // k for k in (1, 2, 3)]
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"clip/{i}.png")
    expected = rm.score(ASKED, ANSWERS, video=tmp_path / "clip")
    forms = [frames, tuple(frames), iter(frames), np.stack(frames), torch.tensor(np.stack(frames)).permute(0, 3, 1, 2)]
    forms += [deque(frames), [[4.0 * i, frame] for i, frame in enumerate(frames)], (tmp_path / "clip").as_uri()]
    for number in (float, torch.tensor, np.float32, Decimal, Fraction):
        forms.append([(number(4 * i), frame) for i, frame in enumerate(frames)])
    for form in forms:
        assert rm.score(ASKED, ANSWERS, video=form) == expected, type(form)
    assert rm.score(ASKED, ANSWERS, video=[(2.0 * i, frame) for i, frame in enumerate(frames)]) != expected


def test_responses_in_whatever_yields_them_in_order(rm):
    expected = rm.score(ASKED, ANSWERS)
    for form in (tuple(ANSWERS), iter(ANSWERS), (a for a in ANSWERS), np.array(ANSWERS)):
        assert rm.score(ASKED, form) == expected, type(form)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"prompt": None}, "prompt must be a string"),
        ({"prompt": b"x"}, "prompt must be a string"),
        ({"responses": None}, "responses a list of strings"),
        ({"responses": "one"}, "responses a list of strings"),
        ({"responses": 3}, "responses a list of strings"),
        ({"responses": set(ANSWERS)}, "responses a list of strings"),
        ({"responses": {"a": 1.0}}, "responses a list of strings"),
        ({"responses": ["a", None]}, "responses a list of strings"),
        ({"responses": []}, "there are no responses"),
        ({"responses": iter([])}, "there are no responses"),
        ({"responses": ["a", " "]}, "response 2 is empty"),
        ({"mode": "both"}, "mode 'both'"),
        ({"mode": 1}, "mode 1"),
        ({"image": []}, "list of images is empty"),
        ({"image": [None]}, "image 1 is a NoneType"),
        ({"image": [PICTURE, None]}, "image 2 is a NoneType"),
        ({"image": 5}, "image 1 is a int"),
        ({"image": ""}, "image 1 is a str that is no picture"),
        ({"image": PICTURE[:0]}, "image 1 has no pixels"),
        ({"image": Image.new("RGB", (0, 5))}, "image 1 has no pixels"),
        ({"image": Image.new("RGB", (5, 0))}, "image 1 has no pixels"),
        ({"image": PICTURE / 255}, r"image 1 is a ndarray of float64 \[84, 84, 3\]"),
        ({"image": torch.rand(3, 84, 84)}, "image 1 is a Tensor of torch.float32"),
        ({"image": PICTURE[None]}, r"image 1 is a ndarray of uint8 \[1, 84, 84, 3\]"),
        ({"image": b"no picture"}, "image 1 is not a picture"),
        ({"image": "none.png"}, "no picture at none.png"),
        ({"image": "https://example.org/a.png"}, "nothing is fetched"),
        ({"image": "a\0b"}, "picture"),
        ({"image": "x" * 5000}, "picture|base64"),
        ({"image": PICTURE, "video": [PICTURE]}, "images or a video, not both"),
        ({"video": []}, "the video has no frames"),
        ({"video": iter([])}, "the video has no frames"),
        ({"video": [None]}, "frame 1 is a NoneType"),
        ({"video": [PICTURE, PICTURE[:0]]}, "frame 2 has no pixels"),
        ({"video": PICTURE}, "the video is a ndarray"),
        ({"video": 5}, "the video is a int"),
        ({"video": "none"}, "no video at none"),
        ({"video": "clip.mp4"}, "must be a folder of frames first"),
        ({"video": "https://example.org/a.mp4"}, "the video is an address, 'https://example.org/a.mp4'"),
        ({"video": ""}, "a video must be a path, got ''"),
        ({"video": "file://clip"}, "'file://clip' names no absolute path"),
        ({"image": "file://p.png"}, "'file://p.png' names no absolute path"),
        ({"image": "images/" + 16 * "0a1b"}, "no picture at images/0a1b"),
        ({"image": [[PICTURE, PICTURE], [PICTURE]]}, "image 1 is a list"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta")}, "image 1 is a Tensor of .* cannot be read"),
        ({"image": torch.zeros(84, 84, 3, dtype=torch.uint8)}, r"give \[3, height, width\]"),
        ({"responses": Table()}, "responses a list of strings"),
        ({"video": [(1.0, PICTURE), (0.5, PICTURE)]}, "rising seconds"),
        ({"video": [(0.0, PICTURE), PICTURE]}, "seconds"),
        ({"video": [("0", PICTURE)]}, "seconds"),
        ({"video": [(math.nan, PICTURE)]}, "seconds"),
        ({"video": [(10**30, PICTURE)]}, "seconds"),
        ({"video": [(None, PICTURE)]}, "seconds"),
        ({"video": [(Decimal("NaN"), PICTURE)]}, "seconds"),
        ({"video": [(Decimal("sNaN"), PICTURE)]}, "seconds"),
        ({"video": [(10**400, PICTURE)]}, "seconds"),
        ({"video": [(np.str_("1"), PICTURE)]}, "seconds"),
        ({"video": [(np.timedelta64(1, "s"), PICTURE)]}, "seconds"),
        ({"video": [(np.complex64(1), PICTURE)]}, "seconds"),
        ({"video": Clip("none")}, "no video at none"),
    ],
)
def test_what_cannot_be_scored_names_its_argument(rm, change, why):
    with pytest.raises(InputError, match=why):
        rm.score(**{"prompt": ASKED, "responses": ANSWERS} | change)


@pytest.mark.parametrize("frames, interval", [(0, 1), ("2", 1), (None, 1), (2.5, 1), (2, "4"), (2, 0), (2, math.nan)])
def test_a_clip_is_checked_where_it_is_made(frames, interval):
    with pytest.raises(InputError, match="frames"):
        Clip("clip", frames, interval)


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_an_autocast_outside_leaves_scores_alone(rm, mode):
    """In bfloat16 scores near 1 would lie 1/128 apart, and answers would tie that do not."""
    many = [f"a small cyan cross, bottom centre, one of {n}" for n in range(30)]
    expected = rm.score(ASKED, many, image=PICTURE, mode=mode)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert rm.score(ASKED, many, image=PICTURE, mode=mode) == expected
            rows = [encode(Record(ASKED, many, images=[PICTURE]), rm.processor)]
            assert list(rm.score_all(rows, mode)) == [expected]
            assert torch.is_autocast_enabled("cpu")
            kept = prompt_row(rm, Record(ASKED, images=[PICTURE])).pictures
        assert torch.equal(kept.features, prompt_row(rm, Record(ASKED, images=[PICTURE])).pictures.features)
    on_grid = [float(torch.tensor(s).to(torch.bfloat16)) for s in expected]
    assert on_grid != expected, "or this would show nothing"


def test_training_in_python_leaves_out_what_prefers_nothing(rm):
    good, records = Record("?", ["a", "b"], [2, 1]), [Record("?", ["a"], [1]), Record("?", ["a", "b"], [1, 1])]
    assert MicroBatches([*records, good], rm.processor, 1, 1, 0).records == [good]
    for nothing in (records, [], [Record("?", ["a", "b"])]):
        with pytest.raises(InputError, match="says which of its responses is better"):
            MicroBatches(nothing, rm.processor, 1, 1, 0)
    with pytest.raises(InputError, match="rankings must be"):
        Record("?", "abc", [1, 2, 3])


@pytest.mark.parametrize("prompts, completions", [("?", ["a"]), (["?"], "a"), (None, ["a"]), (["?"], {"a"}), ({}, [])])
def test_a_group_reward_is_asked_with_lists(prompts, completions):
    with pytest.raises(InputError, match="(prompts|completions) must be a list"):
        GroupReward(WEIGHTS / "tiny-rm")(prompts, completions)


@pytest.mark.parametrize("nothing", [None, 5, b"x"])
def test_a_folder_must_be_a_path(nothing):
    for load in (
        GroupReward,
        RewardModel.load,
        load_backbone,
        lambda path: RewardModel.new(path, "joint", yojo.LoraConfig()),
    ):
        with pytest.raises(InputError, match="must be a path"):
            load(nothing)


def test_half_precision_is_refused_where_a_base_must_be_known():
    """Weights rounded to float16 are not those that a fingerprint remembers."""
    with pytest.raises(InputError, match="dtype must be torch.float32, float64 or bfloat16, got torch.float16"):
        RewardModel.load(WEIGHTS / "tiny-rm", dtype=torch.float16)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, float, "x"])
def test_a_dtype_must_be_one_of_torch(dtype):
    for load, folder in ((RewardModel.load, "tiny-rm"), (load_backbone, "tiny")):
        with pytest.raises(InputError, match="dtype must be "):
            load(WEIGHTS / folder, dtype=dtype)


# -------------------------------------------------------------------------------------------------------------- device


def test_one_rule_says_which_device(monkeypatch):
    """CUDA if there is one, else the CPU: commands, `RewardModel.load`, `.new`, `load_backbone` and `GroupReward`."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(weights, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(weights, "_read", lambda pieces, shape, dtype, device: asked.append(device) or _stop())
    reward = GroupReward(WEIGHTS / "tiny-rm")
    doors = [lambda: RewardModel.load(WEIGHTS / "tiny-rm"), lambda: load_backbone(WEIGHTS / "tiny")]
    doors += [lambda: RewardModel.new(WEIGHTS / "tiny", "joint", yojo.LoraConfig()), lambda: reward(["?"], ["a"])]
    for door in doors:
        with pytest.raises(StopIteration):
            door()
    assert asked == [torch.device("cuda")] * 4
    assert weights.pick_device("cpu") == torch.device("cpu"), "or what is asked for"
    monkeypatch.setattr(weights, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    with pytest.raises(InputError, match="an old card has no bfloat16: say --dtype float32"):
        load_backbone(WEIGHTS / "tiny")
    with pytest.raises(StopIteration):
        load_backbone(WEIGHTS / "tiny", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert weights.pick_device() == torch.device("cpu")


def _stop():
    raise StopIteration


@pytest.mark.parametrize(
    "device, why", [("cuda", "sees no CUDA device"), ("gpu", "device .gpu."), ("meta", ".meta."), ([], "device")]
)
def test_a_device_that_is_not_there_is_named(monkeypatch, device, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=why):
        RewardModel.load(WEIGHTS / "tiny-rm", device=device)


def test_scoring_warns_of_nothing(rm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rm.score(ASKED, ANSWERS, image=PICTURE)
