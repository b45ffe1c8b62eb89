"""THE claim: one pass over N responses gives the scores that N passes over one response give.

    pytest tests/test_single_pass.py

Isolated mode: every response sees the prompt and itself, at the positions it would have alone. So scoring N responses
together must equal scoring each alone, to 1e-10 in float64 and 2e-5 in float32: nothing but rounding is left.
Joint mode: response i sees the responses before it, so its score may depend on those, and on nothing after it.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from yojo.cli import WEIGHTS
from yojo.data import collate
from yojo.lora import LoraConfig
from yojo.reward import RewardModel

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
WORDS = "a small large red blue star circle, left right. ümlaut 猫 <|resp_sep|> <im_patch> 42 \n\n".split(" ")


def words(rng, longest=12):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest))) + "!"


def noise(seed, width=84, height=84):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


SEEN = {
    "text": {},
    "image": {"image": noise(1)},
    "images": {"image": [noise(1), noise(2, 60, 130)]},
    "video": {"video": [(0.0, noise(3)), (2.5, noise(4)), (5.0, noise(5))]},
}


def make_model(base, mode="joint", dtype=torch.float64, trained=True):
    """A reward model on random weights; `trained` gives the adapter and the head random values that matter."""
    rm = RewardModel.new(base, mode, LoraConfig(r=4, alpha=8, dropout=0.0), inner=16, dtype=dtype)
    if trained:
        with torch.no_grad():
            for p in rm.trainable():
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    return rm.eval()


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request, tiny_folder):
    return make_model(tiny_folder, dtype=request.param)


@pytest.fixture(scope="module")
def exact(tiny_folder):
    return make_model(tiny_folder)


def assert_equal(ours, theirs, rm):
    far = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert far <= TOLERANCE[rm.backbone.dtype], f"scores differ by {far}"


def one_by_one(rm, prompt, responses, mode="isolated", **seen):
    return [rm.score(prompt, [r], mode=mode, **seen)[0] for r in responses]


# ----------------------------------------------------------------------------------------------------- isolated mode


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("n", range(1, 17))
def test_one_pass_equals_n_passes(model, kind, n):
    rng = random.Random(n)
    prompt, responses = words(rng), [words(rng) for _ in range(n)]
    together = model.score(prompt, responses, mode="isolated", **SEEN[kind])
    assert_equal(together, one_by_one(model, prompt, responses, **SEEN[kind]), model)
    if n > 1:
        assert max(together) - min(together) > 1e-3, "the scores do not differ: this test would prove nothing"


@pytest.mark.parametrize("name", ["tiny-rm", "tiny-rm-isolated"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_pass_equals_n_passes_with_the_shipped_weights(name, dtype):
    from yojo import shapes

    rm = RewardModel.load(WEIGHTS / name, dtype=dtype)
    rng = random.Random(0)
    for n in (1, 2, 3, 4, 8, 16):
        scene = shapes.make_scene(rng)
        record = shapes.absolute(scene, rng, n)
        ask = record["prompt"], record["responses"]
        together = rm.score(*ask, image=shapes.render(scene), mode="isolated")
        assert_equal(together, one_by_one(rm, *ask, image=shapes.render(scene)), rm)


def test_one_pass_equals_n_passes_without_lora(tiny_folder):
    rm = make_model(tiny_folder, trained=False)
    responses = ["one", "two words", "and three more"]
    together = rm.score("prompt", responses, mode="isolated")
    assert_equal(together, one_by_one(rm, "prompt", responses), rm)


def test_long_rows_take_the_structured_form_and_give_the_same_scores(exact):
    """Beyond 512 tokens the decoder stops building a [T, T] mask; nothing may change."""
    responses = [f"{i} " * 90 for i in range(8)]
    encoded = exact.processor.encode("prompt", responses, noise(1))
    assert len(encoded.ids) > 512
    together = exact.score("prompt", responses, noise(1), mode="isolated")
    assert_equal(together, one_by_one(exact, "prompt", responses, image=noise(1)), exact)


def test_the_order_of_the_responses_does_not_matter(model):
    rng = random.Random(5)
    responses = [words(rng) for _ in range(6)]
    order = rng.sample(range(6), 6)
    straight = model.score("prompt", responses, SEEN["image"]["image"], mode="isolated")
    shuffled = model.score("prompt", [responses[i] for i in order], SEEN["image"]["image"], mode="isolated")
    assert_equal(shuffled, [straight[i] for i in order], model)


# -------------------------------------------------------------------------------------------------------- joint mode


@pytest.mark.parametrize("kind", SEEN)
def test_joint_editing_a_response_moves_only_what_comes_after_it(exact, kind):
    rng = random.Random(1)
    prompt, responses = words(rng), [words(rng) for _ in range(6)]
    before = exact.score(prompt, responses, mode="joint", **SEEN[kind])
    for j in range(6):
        edited = responses[:j] + ["something else altogether"] + responses[j + 1 :]
        after = exact.score(prompt, edited, mode="joint", **SEEN[kind])
        assert max([abs(a - b) for a, b in zip(before[:j], after[:j], strict=True)], default=0) < 1e-10
        assert all(abs(a - b) > 1e-6 for a, b in zip(before[j:], after[j:], strict=True))


@pytest.mark.parametrize("kind", SEEN)
def test_the_first_response_is_judged_blind_in_both_modes(exact, kind):
    responses = ["first", "second one", "the third of them"]
    joint, isolated = (exact.score("prompt", responses, mode=mode, **SEEN[kind]) for mode in ("joint", "isolated"))
    assert abs(joint[0] - isolated[0]) < 1e-10
    assert abs(joint[1] - isolated[1]) > 1e-6


@pytest.mark.parametrize("kind", SEEN)
def test_a_single_response_scores_the_same_in_both_modes(exact, kind):
    joint, isolated = (exact.score("prompt", ["only"], mode=mode, **SEEN[kind]) for mode in ("joint", "isolated"))
    assert abs(joint[0] - isolated[0]) < 1e-10


# ------------------------------------------------------------------------------------- the company a record keeps


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_scores_do_not_depend_on_the_batch_or_the_row(model, mode):
    rng = random.Random(2)
    records = [
        model.processor.encode(words(rng), [words(rng) for _ in range(n)], **SEEN[kind])
        for n, kind in ((3, "image"), (1, "text"), (5, "images"), (2, "video"))
    ]
    alone = [s for e in records for s in model.score_encoded([e], mode)[0]]
    in_a_batch = [s for scores in model.score_encoded(records, mode) for s in scores]
    with torch.no_grad():
        in_one_row = model(collate([records], mode)).tolist()
        in_two_rows = model(collate([records[:1], records[1:]], mode)).tolist()
    for other in (in_a_batch, in_one_row, in_two_rows):
        assert max(abs(a - b) for a, b in zip(alone, other, strict=True)) < 1e-5


# --------------------------------------------------------------------------------- the same, hunted for exceptions

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
answers = st.lists(texts, min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(prompt=texts, responses=answers, picture=st.booleans())
def test_property_one_pass_equals_n_passes(exact, prompt, responses, picture):
    seen = SEEN["image"] if picture else {}
    together = exact.score(prompt, responses, mode="isolated", **seen)
    assert_equal(together, one_by_one(exact, prompt, responses, **seen), exact)


@settings(max_examples=200, deadline=None)
@given(prompt=texts, responses=answers, seed=st.integers(0, 999))
def test_property_order_does_not_matter(exact, prompt, responses, seed):
    order = random.Random(seed).sample(range(len(responses)), len(responses))
    straight = exact.score(prompt, responses, mode="isolated")
    shuffled = exact.score(prompt, [responses[i] for i in order], mode="isolated")
    assert_equal(shuffled, [straight[i] for i in order], exact)


@settings(max_examples=200, deadline=None)
@given(prompt=texts, responses=answers, other=texts, seed=st.integers(0, 999))
def test_property_joint_scores_ignore_what_comes_later(exact, prompt, responses, other, seed):
    j = seed % len(responses)
    before = exact.score(prompt, responses, mode="joint")
    after = exact.score(prompt, responses[:j] + [other] + responses[j + 1 :], mode="joint")
    assert max([abs(a - b) for a, b in zip(before[:j], after[:j], strict=True)], default=0) < 1e-10
