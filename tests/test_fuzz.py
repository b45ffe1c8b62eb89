"""Files of random JSON, random EXIF and random paths: every command ends as it should, or with one line.

pytest tests/test_fuzz.py                                   (200 files each; 10,000 with --hypothesis-profile=long)
pytest tests/test_fuzz.py --hypothesis-profile=thousands    (2,000)
"""

import contextlib
import copy
import io
import json
import shutil
import sys
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yojo import evaluate, grpo, score, train, votes
from yojo.benchmarks import FORMATS
from yojo.cli import WEIGHTS
from yojo.core.data import KEYS
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.core.training import FitConfig, Recipe
from yojo.media import open_picture, picture_size

# ---------------------------------------------------------------------------------------------------- what is made up

TEXTS = st.sampled_from(["", " ", "a", "b\n", "é", "\u2028", "\x00", "\ud800", "<|resp_sep|>", "x " * 3000]) | st.text(
    max_size=6
)
NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 10**30, 0.5, 1e300, float("nan"), float("inf"), True])
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
PATHS = st.sampled_from(
    [
        "ok.png",
        "cut.png",
        "empty.png",
        "clip",
        "cut",
        "nothing",
        "none.png",
        ".",
        "..",
        "/",
        "/dev/null",
        "/dev/zero",
        "~",
    ]
    + [
        "file:///ok.png",
        "https://a.b/c.png",
        "data:image/png;base64,AAAA",
        "data:,",
        "a\0b",
        "x" * 300,
        "x/" * 2000,
        "C:\\a.png",
    ]
    + ["clip.mp4", "loop", "ok.png/", "deep/../ok.png", "%s", "-x", "movie.gif", "iVBORw0KGgo" + "A" * 80]
)
MEDIA = {"image": PATHS | VALUES, "video": PATHS | VALUES, "images": st.lists(PATHS, max_size=3) | PATHS | VALUES}
FIELDS = dict.fromkeys(KEYS, VALUES) | MEDIA | {"sampling_interval": NUMBERS | VALUES, "fps": NUMBERS | VALUES}
ANSWERS = st.lists(st.sampled_from(["a star", "a small star", "no"]), min_size=2, max_size=3)
RANKED = {n: [list(ranks) for ranks in product(range(1, n + 1), repeat=n) if 1 in ranks] for n in (2, 3)}
GOOD = ANSWERS.flatmap(
    lambda texts: st.fixed_dictionaries(
        {"prompt": st.just("?"), "responses": st.just(texts), "rankings": st.sampled_from(RANKED[len(texts)])}
    )
)
ROWS = {  # of other commands and formats
    "votes": {"item": "q", "a": "m1", "b": "m2", "winner": "m1"},
    "answers": {"item": "q", "prompt": "?", "responses": {"m1": "a", "m2": "b"}},
    "vl-rewardbench": {"query": "?", "response": ["a", "b"], "human_ranking": [0, 1], "id": "x"},
    "multimodal-rewardbench": {"Text": "?", "Output1": "a", "Output2": "b", "Better": "Output1", "Category": "x"},
    "mm-rlhf": {"prompt": "?", "chosen": "a", "rejected": "b", "id": "x"},
    "videorewardbench": {"prompt": "?", "chosen": "a", "rejected": "b", "category": "x"},
}
NAMES = st.sampled_from([*FIELDS, "item", "a", "b", "winner", "id", "response", "image_path", "timestamps"])
CHANGES = NAMES.flatmap(lambda name: st.tuples(st.just(name), FIELDS.get(name, VALUES)))
SHOWN = st.sampled_from(["ok.png", "clip", "cut.png", "cut", "movie.gif", "loop", "empty.png", "nothing"])
SHOWN = st.lists(st.tuples(st.sampled_from(["image", "video"]), SHOWN), max_size=1)
CHANGED = st.integers(0, 3).flatmap(lambda k: SHOWN if k else st.lists(CHANGES, min_size=1, max_size=2))


@st.composite
def files(draw, name: str) -> str:
    """A file for a command: lines that it takes, lines that are changed, and other things."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.just(ROWS[name]) if name in ROWS else GOOD) | dict(draw(CHANGED))
        lines.append(json.dumps(row) if draw(st.integers(0, 9)) else draw(VALUES.map(json.dumps) | st.text(max_size=9)))
    return draw(st.sampled_from(["\n".join(lines), "\ufeff" + "\r\n".join(lines), "[" + ",".join(lines) + "]"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures and frames, whole and not, and links that lead nowhere."""
    folder = tmp_path_factory.mktemp("fuzz")
    picture = Image.effect_noise((60, 50), 60).convert("RGB")
    for name in ("ok.png", "clip/1.png", "clip/2.png", "deep/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        picture.save(folder / name)
    picture.save(folder / "movie.gif", save_all=True, append_images=[picture.rotate(90)])
    (folder / "cut.png").write_bytes((folder / "ok.png").read_bytes()[:900])
    (folder / "empty.png").touch()
    shutil.copytree(folder / "clip", folder / "cut")
    shutil.copyfile(folder / "cut.png", folder / "cut/2.png")
    (folder / "nothing").mkdir()
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture(scope="module")
def run(folder, tiny_folder):
    """Run a command in this process -> its status and what it said. A model is loaded once, and training is small."""
    rm = RewardModel.load(WEIGHTS / "tiny-rm", lm_head=True)
    small = Recipe(LoraConfig(r=2, dropout=0.0), 8, fit=FitConfig(steps=0, accumulate=1))
    new = RewardModel.new(WEIGHTS / "tiny", "joint", small.lora, small.inner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Recipe", lambda: replace(small))
        patch.setattr(RewardModel, "load", lambda *_, **__: copy.deepcopy(rm))
        patch.setattr(RewardModel, "new", lambda *_, **__: copy.deepcopy(new))

        def call(module, words):
            said = io.StringIO()
            patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                try:
                    module.main()
                    return 0, said.getvalue()
                except SystemExit as stop:
                    return stop.code, said.getvalue()

        yield call


def words_of(folder, data, out):
    """Of each command, what it is asked with one file."""
    good = folder / "good.jsonl"
    good.write_text(json.dumps({"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}))
    model = ["--model", WEIGHTS / "tiny-rm", "--data", data]
    training = ["--weights", "x", "--data", data, "--test", good, "--mode", "joint", "--steps", 1, "--out", out]
    grpo_words = ["--reward", WEIGHTS / "tiny-rm", "--data", data, "--out", out, "--steps", 1, "--prompts", 1]
    grpo_words += ["--group", 2, "--max-new-tokens", 2]
    return {
        "score": (score, model),
        "evaluate": (evaluate, model),
        "evaluate, going on": (evaluate, [*model, "--keep-going"]),
        **{form: (evaluate, [*model, "--format", form, "--keep-going"]) for form in FORMATS},
        "train": (train, training),
        "train, going on": (train, [*training, "--keep-going"]),
        "tested on": (train, [*training[:3], good, training[4], data, *training[6:]]),
        "grpo": (grpo, grpo_words),
        "grpo, going on": (grpo, [*grpo_words, "--keep-going"]),
        "votes": (votes, ["--votes", data]),
        "answers": (votes, ["--votes", folder / "votes.jsonl", "--answers", data, "--out", out]),
    }


@given(data=st.data())
def test_property_a_command_ends_well_or_with_one_line(folder, run, data):
    path, out = folder / "data.jsonl", folder / "out"
    asked = words_of(folder, path, out)
    name = data.draw(st.sampled_from(sorted(asked)))
    path.write_bytes(data.draw(files(name)).encode("utf-8", "surrogatepass"))
    (folder / "votes.jsonl").write_text(json.dumps({"item": "q", "a": "m1", "b": "m2", "winner": "m1"}))
    module, words = asked[name]
    status, said = run(module, words)
    assert status in (0, 2) and "Traceback" not in said
    *before, error = said.split(f"python -m {module.__name__}: ")
    assert len(before) == (status == 2) and (status == 0 or error.count("\n") == 1), said
    for left in (out, folder / "out.training"):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- EXIF


@given(
    exif=st.binary(max_size=80) | st.binary(max_size=60).map(lambda rest: b"Exif\0\0II*\0\x08\0\0\0" + rest),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
)
def test_property_metadata_never_refuse_a_picture(exif, kind):
    """Whatever they say, the pixels are whole: what can be changed is which side is up."""
    picture = Image.effect_noise((24, 16), 60).convert("RGB")
    picture.save(plain := io.BytesIO(), kind)
    picture.save(odd := io.BytesIO(), kind, exif=exif)
    seen = open_picture(odd.getvalue())
    assert seen.size == picture_size(odd.getvalue()) and sorted(seen.size) == [16, 24]
    assert sorted(seen.tobytes()) == sorted(open_picture(plain.getvalue()).tobytes())
