"""Pictures are opened ahead by threads: order, results and errors are as without them, and every command does it.

pytest tests/test_ahead.py
"""

import json
import os
import random
import signal
import threading
import warnings

import pytest
import torch
from PIL import Image
from test_single_pass import noise

from yojo import evaluate, grpo, media, score, train
from yojo.cli import WEIGHTS
from yojo.core import data as records_file
from yojo.core.ahead import MOST, THREADS, ahead
from yojo.core.data import Record, encode
from yojo.core.held_out import Blanked, score_records
from yojo.core.image import images_to_patches
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.core.training import FitConfig, Recipe
from yojo.files import InputError, write_lines


def test_things_come_in_their_order_however_long_each_takes():
    pause, rng = threading.Event(), random.Random(0)

    def make(i):
        pause.wait(rng.random() / 100)
        return i * i

    for items in (range(50), []):
        with ahead(make, items) as made:
            assert list(made) == [i * i for i in items]


def test_the_next_ones_are_made_while_the_caller_works_and_no_more_than_that():
    made = [threading.Event() for _ in range(100)]
    taken = []
    with ahead(lambda i: made[i].set(), (taken.append(i) or i for i in range(100))) as squares:
        next(squares)
        assert all(event.wait(10) for event in made[: MOST + 1]), "nobody asks, and they are made"
        assert not any(event.is_set() for event in made[MOST + 1 :]) and len(taken) == MOST + 1
    assert no_thread_is_left()


def no_thread_is_left():
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


def test_once_the_block_is_left_nothing_more_is_begun():
    """Also by an error whose traceback somebody keeps."""
    begun, go = [], threading.Event()

    def make(i):
        begun.append(i)
        return i == 0 or go.wait(10)

    with pytest.raises(ZeroDivisionError) as kept, ahead(make, range(100)) as made:
        next(made)
        1 / 0  # noqa: B018
    go.set()
    assert no_thread_is_left() and len(begun) <= 1 + THREADS and kept.value is not None


@pytest.mark.parametrize("where", ["in a thread", "in the items"])
def test_an_error_is_raised_when_its_turn_comes(where):
    def items():
        for i in range(9):
            if i == 5 and where == "in the items":
                raise InputError("the fifth")
            yield i

    def make(i):
        if i == 5:
            raise InputError("the fifth")
        return i

    got = []
    with pytest.raises(InputError, match="the fifth"), ahead(make, items()) as made:
        got.extend(i for i in made if got.append(i))
    assert got == [0, 1, 2, 3, 4]


def test_ctrl_c_ends_a_loop_that_waits_for_a_thread():
    """At once, but for what is being made."""
    begun, go = threading.Event(), threading.Event()

    def make(i):
        begun.set()
        go.wait(10)

    def interrupt():
        begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        go.set()

    made, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt), ahead(make, range(100)) as things:
            made.extend(things)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(made) < 100


def test_a_picture_that_many_records_share_is_opened_by_one_thread_at_a_time(tmp_path):
    """Pillow loads a file at its first use, and two threads would read from one place of it."""
    noise(1, 600, 500).save(tmp_path / "p.png")
    expected = noise(1, 600, 500).tobytes()
    for _ in range(10):
        lazy = Image.open(tmp_path / "p.png")
        with ahead(media.open_picture, [lazy] * 16) as pictures:
            assert all(picture.tobytes() == expected for picture in pictures)


def test_opening_in_threads_leaves_the_filters_of_warnings_as_they_are(tmp_path, monkeypatch):
    """A filter that is set for a while is everyone's, and threads that take theirs back at any time leave anything. So
    one of Pillow's own warnings is set and stays; even where all others are errors, they are not heard."""
    picture = noise(1)
    exif = picture.getexif()
    exif[0x9286] = "x"
    picture.save(tmp_path / "p.jpg", exif=exif.tobytes()[:-6])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 84 * 84 - 1)  # of which it warns, and at twice that raises
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = [*warnings.filters]
        with ahead(media.open_picture, [tmp_path / "p.jpg"] * 40) as pictures:
            assert len(list(pictures)) == 40
        assert warnings.filters == [media.QUIET, *before]


@pytest.fixture(scope="module")
def prefs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefs")
    lines = []
    for i in range(12):
        noise(i).save(folder / f"{i}.png")
        lines.append({"prompt": f"{i}?", "responses": ["good", "bad"], "rankings": [1, 2], "image": f"{i}.png"})
    write_lines(folder / "prefs.jsonl", lines)
    return folder / "prefs.jsonl"


COMMANDS = {
    "score": (score, ["--model", WEIGHTS / "tiny-rm"]),
    "evaluate": (evaluate, ["--model", WEIGHTS / "tiny-rm"]),
    "train": (train, ["--weights", WEIGHTS / "tiny", "--mode", "joint", "--steps", 2, "--out", "rm"]),
    "grpo": (grpo, ["--reward", WEIGHTS / "tiny-rm", "--steps", 2, "--prompts", 2, "--group", 2, "--out", "policy"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_cuts_its_pictures_in_threads(name, command, prefs, tmp_path, monkeypatch):
    """The main thread opens them once before a run, to know that it can, and cuts none."""
    module, words = COMMANDS[name]
    cut_by = []

    def watched(images, config):
        if not any(isinstance(image, tuple) for image in images):  # sizes alone
            cut_by.append(threading.current_thread().name)
        return images_to_patches(images, config)

    monkeypatch.setattr("yojo.core.prompt.images_to_patches", watched)
    monkeypatch.chdir(tmp_path)
    small = Recipe(LoraConfig(r=2), 8, records=1, fit=FitConfig(steps=0, accumulate=2))
    monkeypatch.setattr(train, "Recipe", lambda: small)
    status, _, err = command(module, "--data", prefs, *words)
    assert status == 0, err
    assert len(cut_by) >= 4 and all(thread.startswith("ahead") for thread in cut_by)


@pytest.mark.parametrize("name", ["score", "evaluate"])
def test_a_picture_that_cannot_be_opened_costs_nothing_that_stands_before_it(name, command, prefs, tmp_path):
    lines = [json.loads(line) for line in prefs.read_text().splitlines()]
    for line in lines:
        line["image"] = str(prefs.parent / line["image"])
    (tmp_path / "half.png").write_bytes((prefs.parent / "7.png").read_bytes()[:9000])
    lines[7]["image"] = "half.png"
    write_lines(tmp_path / "bad.jsonl", lines)
    module, words = COMMANDS[name]
    status, _, err = command(module, "--data", tmp_path / "bad.jsonl", *words, "--json", tmp_path / "found.json")
    assert status == 2 and "half.png cannot be read as a picture" in err and "bad.jsonl:8" in err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found[:-1] if name == "score" else found["scores"]) == 7


@torch.no_grad()
def test_scores_are_those_of_one_record_after_the_other(prefs):
    rm = RewardModel.load(WEIGHTS / "tiny-rm")
    records = records_file.read_records(prefs)
    in_turn = list(rm.score_all((encode(record, rm.processor) for record in records), tokens=1))
    with ahead(lambda record: encode(record, rm.processor), records) as made:
        assert list(rm.score_all(made, tokens=1)) == in_turn


def test_an_error_of_a_record_that_is_made_when_it_is_asked_for(prefs, tmp_path):
    """Grey pictures are: the third one's size is nowhere."""
    rm = RewardModel.load(WEIGHTS / "tiny-rm")
    records = [Record("?", ["a", "b"], images=[prefs.parent / "1.png"], where=f"line {i}") for i in range(4)]
    records[2] = Record("?", ["a", "b"], images=[tmp_path / "none.png"], where="line 2")
    with pytest.raises(InputError, match="line 2: no picture"):
        score_records(rm, Blanked(records), 0)
