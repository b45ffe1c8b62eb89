"""THE claim: one pass over N responses gives the scores that N passes over one response give.

    pytest tests/test_single_pass.py

Isolated mode: every response attends to the prompt and itself, at the positions it would have alone. So scoring N
responses together must equal scoring each alone, to 1e-10 in float64 and 2e-5 in float32: only rounding differs.
Joint mode: response i attends to the responses before it, so its score may depend on those, and on nothing after it.
"""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yojo.cli import WEIGHTS
from yojo.core.data import collate
from yojo.core.lora import LoraConfig
from yojo.core.mask import MODES
from yojo.core.ops import DENSE_UP_TO
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.tiny import world

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.mark.parametrize("name", ["tiny-rm", "tiny-rm-isolated"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_pass_equals_n_passes_with_the_shipped_weights(name, dtype):
    rm = RewardModel.load(WEIGHTS / name, dtype=dtype)
    rng = random.Random(0)
    for n in (1, 2, 3, 4, 8, 16):
        scene = world.make_scene(rng)
        record, picture = world.absolute(scene, rng, n), world.render(scene)
        together = rm.score(record["prompt"], record["responses"], image=picture, mode="isolated")
        alone = [rm.score(record["prompt"], [r], image=picture, mode="isolated")[0] for r in record["responses"]]
        assert_equal(together, alone, TOLERANCE[dtype])


def assert_equal(ours, theirs, tolerance):
    """Written so that NaN fails: NaN is within no tolerance, but `max` over Python numbers can skip it."""
    apart = [(a, b) for a, b in zip(ours, theirs, strict=True) if not abs(a - b) <= tolerance]
    assert not apart, f"scores differ by more than {tolerance}: {apart}"


def test_scores_that_are_no_numbers_are_never_equal():
    for ours, theirs in (([0.0, math.nan], [0.0, 0.0]), ([math.nan], [math.nan]), ([math.inf], [math.inf])):
        with pytest.raises(AssertionError, match="differ by more"):
            assert_equal(ours, theirs, 1.0)


# --------------------------------------------------------------------- random networks, and every kind of record

WORDS = "a small large red blue star circle, left right. ümlaut 猫 <|resp_sep|> <im_patch> 42 \n\n".split(" ")


def words(rng, longest=12):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest))) + "!"


def noise(seed, width=84, height=84):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


SHOWN = {
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


class Judge:
    """`RewardModel.score` for the four kinds of record, with their pictures cut once."""

    def __init__(self, rm):
        self.rm, self.tolerance = rm, TOLERANCE[rm.backbone.dtype]
        self.pictures = {kind: rm.processor.open_pictures(**shown) for kind, shown in SHOWN.items()}

    def encode(self, prompt, responses, kind):
        return self.rm.processor.encode(prompt, responses, pictures=self.pictures[kind])

    def __call__(self, prompt, responses, kind="text", mode="isolated"):
        return self.rm.score_encoded([self.encode(prompt, responses, kind)], mode)[0]

    def one_by_one(self, prompt, responses, kind="text"):
        return [self(prompt, [r], kind)[0] for r in responses]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def judge(request, tiny_folder):
    return Judge(make_model(tiny_folder, dtype=request.param))


@pytest.fixture(scope="module")
def exact(tiny_folder):
    return Judge(make_model(tiny_folder))


# ----------------------------------------------------------------------------------------------------- isolated mode


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("n", range(1, 17))
def test_one_pass_equals_n_passes(judge, kind, n):
    rng = random.Random(n)
    prompt, responses = words(rng), [words(rng) for _ in range(n)]
    together = judge(prompt, responses, kind)
    assert_equal(together, judge.one_by_one(prompt, responses, kind), judge.tolerance)
    if n > 1:
        assert max(together) - min(together) > 1e-3, "the scores do not differ: this test would prove nothing"


def test_one_pass_equals_n_passes_without_lora(tiny_folder):
    judge = Judge(make_model(tiny_folder, trained=False))
    responses = ["one", "two words", "and three more"]
    assert_equal(judge("prompt", responses), judge.one_by_one("prompt", responses), judge.tolerance)


def test_long_rows_are_computed_run_by_run_and_give_the_same_scores(exact):
    """Beyond 512 tokens the decoder stops building a [T, T] mask; nothing may change."""
    responses = [f"{i} " * 90 for i in range(8)]
    assert len(exact.encode("prompt", responses, "image").ids) > DENSE_UP_TO
    together = exact("prompt", responses, "image")
    assert_equal(together, exact.one_by_one("prompt", responses, "image"), exact.tolerance)


def test_the_order_of_the_responses_does_not_matter(judge):
    rng = random.Random(5)
    responses = [words(rng) for _ in range(6)]
    order = rng.sample(range(6), 6)
    straight = judge("prompt", responses, "image")
    shuffled = judge("prompt", [responses[i] for i in order], "image")
    assert_equal(shuffled, [straight[i] for i in order], judge.tolerance)


# -------------------------------------------------------------------------------------------------------- joint mode


@pytest.mark.parametrize("kind", SHOWN)
def test_joint_editing_a_response_moves_only_what_comes_after_it(exact, kind):
    rng = random.Random(1)
    prompt, responses = words(rng), [words(rng) for _ in range(6)]
    before = exact(prompt, responses, kind, "joint")
    for j in range(6):
        edited = responses[:j] + ["something else altogether"] + responses[j + 1 :]
        after = exact(prompt, edited, kind, "joint")
        assert_equal(before[:j], after[:j], exact.tolerance)
        assert all(abs(a - b) > 1e-6 for a, b in zip(before[j:], after[j:], strict=True))


@pytest.mark.parametrize("kind", SHOWN)
def test_the_first_response_is_judged_blind_in_both_modes(exact, kind):
    responses = ["first", "second one", "the third of them"]
    joint, isolated = (exact("prompt", responses, kind, mode) for mode in MODES)
    assert abs(joint[0] - isolated[0]) < exact.tolerance
    assert abs(joint[1] - isolated[1]) > 1e-6


@pytest.mark.parametrize("kind", SHOWN)
def test_a_single_response_scores_the_same_in_both_modes(exact, kind):
    joint, isolated = (exact("prompt", ["only"], kind, mode) for mode in MODES)
    assert abs(joint[0] - isolated[0]) < exact.tolerance


# ------------------------------------------------------------------------------------- the company a record keeps


@pytest.mark.parametrize("mode", MODES)
def test_scores_do_not_depend_on_the_batch_or_the_row(judge, mode):
    rng = random.Random(2)
    records = [
        judge.encode(words(rng), [words(rng) for _ in range(n)], kind)
        for n, kind in ((3, "image"), (1, "text"), (5, "images"), (2, "video"))
    ]
    alone = [s for e in records for s in judge.rm.score_encoded([e], mode)[0]]
    in_a_batch = [s for scores in judge.rm.score_encoded(records, mode) for s in scores]
    with torch.no_grad():
        in_one_row = judge.rm(collate([records], mode)).tolist()
        in_two_rows = judge.rm(collate([records[:1], records[1:]], mode)).tolist()
    for other in (in_a_batch, in_one_row, in_two_rows):
        assert_equal(alone, other, 1e-5)


# --------------------------------------------------------------------------------- the same, hunted for exceptions

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
answers = st.lists(texts, min_size=1, max_size=6)


@given(prompt=texts, responses=answers, kind=st.sampled_from(sorted(SHOWN)))
def test_property_one_pass_equals_n_passes(exact, prompt, responses, kind):
    together = exact(prompt, responses, kind)
    assert_equal(together, exact.one_by_one(prompt, responses, kind), exact.tolerance)


@given(prompt=texts, responses=answers, seed=st.integers(0, 999))
def test_property_order_does_not_matter(exact, prompt, responses, seed):
    order = random.Random(seed).sample(range(len(responses)), len(responses))
    straight, shuffled = exact(prompt, responses), exact(prompt, [responses[i] for i in order])
    assert_equal(shuffled, [straight[i] for i in order], exact.tolerance)


@given(prompt=texts, responses=answers, other=texts, seed=st.integers(0, 999))
def test_property_joint_scores_ignore_what_comes_later(exact, prompt, responses, other, seed):
    j = seed % len(responses)
    before = exact(prompt, responses, mode="joint")
    after = exact(prompt, responses[:j] + [other] + responses[j + 1 :], mode="joint")
    assert_equal(before[:j], after[:j], exact.tolerance)


@given(
    records=st.lists(st.tuples(texts, answers), min_size=1, max_size=4),
    cuts=st.integers(0, 7),
    mode=st.sampled_from(MODES),
)
def test_property_records_may_share_rows_and_batches(exact, records, cuts, mode):
    encoded, rows = [exact.rm.processor.encode(prompt, responses) for prompt, responses in records], [[]]
    for i, record in enumerate(encoded):
        rows[-1].append(record)
        if cuts >> i & 1 and i + 1 < len(encoded):
            rows.append([])
    with torch.no_grad():
        together = exact.rm(collate(rows, mode)).tolist()
    alone = [score for record in encoded for score in exact.rm.score_encoded([record], mode)[0]]
    assert_equal(together, alone, exact.tolerance)


# --------------------------------------------------------------------------------------------------------- equal texts


@pytest.mark.parametrize("layout", ["default", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_texts_are_read_once_and_share_a_score_in_isolated_mode(tiny_folder, monkeypatch, layout, dtype):
    """Read twice, they would differ by rounding, and GRPO would take that for a preference. NFC and NFD are equal."""
    rm, lengths, real = make_model(tiny_folder, dtype=dtype), [], RewardModel.forward
    rm.processor.layout = layout
    monkeypatch.setattr(RewardModel, "forward", lambda rm, batch: lengths.append(batch.counts) or real(rm, batch))
    texts = ["\u00e9", "a star", "e\u0301", "a star", "a star ", "b"]
    scores = rm.score("?", texts, noise(1), mode="isolated")
    assert lengths == [[4]] and scores[0] == scores[2] and scores[1] == scores[3] and len(set(scores)) == 4
    assert scores[:2] + scores[4:] == rm.score("?", texts[:2] + texts[4:], noise(1), mode="isolated")
    several = [rm.processor.encode("?", some) for some in (texts, ["b", "b"], ["a"])]
    assert [len(set(some)) for some in rm.score_encoded(several, "isolated")] == [4, 1, 1]


def test_equal_texts_of_a_joint_pass_are_as_many_as_they_are(tiny_folder):
    """As in the paper: the second sees the first. Nothing is shared and nothing left out."""
    rm = make_model(tiny_folder)
    row = rm.processor.encode("?", ["a star"] * 3)
    scores = rm.score("?", ["a star"] * 3, mode="joint")
    with torch.no_grad():
        assert rm(collate([row], "joint")).tolist() == scores and len(set(scores)) == 3


def test_scores_that_are_not_finite_never_leave_the_model(tiny_folder):
    rm = make_model(tiny_folder)
    with torch.no_grad():
        rm.head[2].bias.fill_(math.nan)
    for score in (
        lambda: rm.score("?", ["a", "b"]),
        lambda: list(rm.score_all([rm.processor.encode("?", ["a"])] * 3)),
        lambda: rm.score_encoded([rm.processor.encode("?", ["a"])]),
    ):
        with pytest.raises(InputError, match="scores are not finite"):
            score()
