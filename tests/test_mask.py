"""Who may attend to whom, compared with 0/1 matrices typed by hand.

    pytest tests/test_mask.py

Rows are queries, columns are keys. In the comments P = prompt, I = picture token, 1..3 = response, . = padding.
"""

import random

import pytest
import torch
from conftest import TINY, random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from yojo.core import mask as masks
from yojo.core import ops
from yojo.core.mask import AttentionMask
from yojo.core.ops import attention, softmax_attention
from yojo.drawing import draw_mask


def make(kinds, mode, record=None):
    """'PII112' -> the mask of one row."""
    response = torch.tensor([[int(k) - 1 if k.isdigit() else -1 for k in kinds]])
    image = torch.tensor([[k == "I" for k in kinds]])
    number = [[-1 if k == "." else 0 for k in kinds]] if record is None else [record]
    return AttentionMask(torch.tensor(number), response, image, mode)


def matrix(text):
    return torch.tensor([[int(c) for c in line.split()] for line in text.strip().splitlines()]).bool()


CASES = {
    "text only": (
        make("PPP", "joint"),
        """1 0 0
           1 1 0
           1 1 1""",
    ),
    "one image: its tokens see each other both ways": (
        make("PIIIP", "joint"),
        """1 0 0 0 0
           1 1 1 1 0
           1 1 1 1 0
           1 1 1 1 0
           1 1 1 1 1""",
    ),
    "two images with text between: all image tokens see each other": (
        make("IPIP", "joint"),
        """1 0 1 0
           1 1 0 0
           1 1 1 0
           1 1 1 1""",
    ),
    "N = 1 is the same in both modes": (
        make("PP11", "isolated"),
        """1 0 0 0
           1 1 0 0
           1 1 1 0
           1 1 1 1""",
    ),
    "N = 3 joint: plain causal": (
        make("P11233", "joint"),
        """1 0 0 0 0 0
           1 1 0 0 0 0
           1 1 1 0 0 0
           1 1 1 1 0 0
           1 1 1 1 1 0
           1 1 1 1 1 1""",
    ),
    "N = 3 isolated: the prompt and itself": (
        make("P11233", "isolated"),
        """1 0 0 0 0 0
           1 1 0 0 0 0
           1 1 1 0 0 0
           1 0 0 1 0 0
           1 0 0 0 1 0
           1 0 0 0 1 1""",
    ),
    "isolated with an image": (
        make("II12", "isolated"),
        """1 1 0 0
           1 1 0 0
           1 1 1 0
           1 1 0 1""",
    ),
    "two records in a row": (
        make("P1P12", "isolated", record=[0, 0, 1, 1, 1]),
        """1 0 0 0 0
           1 1 0 0 0
           0 0 1 0 0
           0 0 1 1 0
           0 0 1 0 1""",
    ),
    "two records in a row, images do not meet": (
        make("I1I1", "joint", record=[0, 0, 1, 1]),
        """1 0 0 0
           1 1 0 0
           0 0 1 0
           0 0 1 1""",
    ),
    "padding sees nothing and is seen by nobody": (
        make("P12..", "isolated"),
        """1 0 0 0 0
           1 1 0 0 0
           1 0 1 0 0
           0 0 0 0 0
           0 0 0 0 0""",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_dense_equals_the_matrix_typed_by_hand(name):
    mask, typed = CASES[name]
    assert torch.equal(mask.dense[0], matrix(typed))


def covered(runs, T):
    """The pairs that a list of runs stands for, bool [T, T]; no query may be in two runs."""
    pairs, times = torch.zeros(T, T, dtype=torch.bool), torch.zeros(T, dtype=torch.long)
    for run in runs:
        keys = torch.cat([torch.arange(a, z) for a, z in run.keys])
        every = torch.ones(run.stop - run.start, len(keys), dtype=torch.bool)
        # what a kernel is told: no mask, or causal with the last query beside the last key
        pairs[run.start : run.stop, keys] = every.tril(len(keys) - len(every)) if run.causal else every
        times[run.start : run.stop] += 1
    assert times.max() <= 1
    return pairs


def on_a_gpu(mask):
    """The calls that a GPU would get."""
    return ops.calls(mask, "cuda")


@pytest.mark.parametrize("name", CASES)
def test_runs_and_the_calls_made_of_them_cover_exactly_the_same_pairs(name, monkeypatch):
    mask, typed = CASES[name]
    T = mask.record.shape[1]
    for runs in (mask.runs, ops.calls(mask), on_a_gpu(mask)):
        assert torch.equal(covered(runs, T), matrix(typed))
    for queries in (1, 2, 3):
        monkeypatch.setattr(ops, "QUERIES", queries)
        assert torch.equal(covered(ops.calls(mask), T), matrix(typed))
        assert all(run.stop - run.start <= queries for run in ops.calls(mask))


def random_row(rng):
    """Records of prompts, pictures and responses, of one to four tokens each; one row in five in any order."""
    tokens = []
    for record in range(rng.randint(1, 3)):
        for _ in range(rng.randint(1, 4)):
            tokens += [(record, -1, rng.random() < 0.4)] * rng.randint(1, 4)
        for response in range(rng.randint(0, 4)):
            tokens += [(record, response, False)] * rng.randint(1, 4)
    tokens += [(-1, -1, False)] * rng.randint(0, 3)
    if rng.random() < 0.2:
        rng.shuffle(tokens)
    record, response, image = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    return AttentionMask(record, response, image, rng.choice(masks.MODES))


def test_runs_cover_the_pairs_of_3000_random_rows(monkeypatch):
    rng = random.Random(0)
    for _ in range(3000):
        mask = random_row(rng)
        monkeypatch.setattr(ops, "QUERIES", rng.choice((1, 2, 3, 128)))
        for runs in (mask.runs, ops.calls(mask), on_a_gpu(mask)):
            assert torch.equal(covered(runs, mask.record.shape[1]), mask.dense[0]), mask


def test_tokens_of_one_kind_make_a_run_and_the_predicate_is_asked_once_for_all_of_them(monkeypatch):
    """8,000 tokens of four kinds: a mask of 4 x 4 says everything. Joint, all that stands behind the picture is one
    causal run."""
    asked, allow = [], AttentionMask.allow
    monkeypatch.setattr(AttentionMask, "allow", lambda *a: (asked.append(allow(*a).shape), allow(*a))[1])
    mask = make("P" * 10 + "I" * 3000 + "1" * 3000 + "2" * 1990, "isolated")
    pictures = [(0, 0, 10, [(0, 10)], True), (0, 10, 3010, [(0, 3010)], False)]
    assert mask.runs == [
        *pictures,
        (0, 3010, 6010, [(0, 6010)], True),
        (0, 6010, 8000, [(0, 3010), (6010, 8000)], True),
    ]
    joint = AttentionMask(mask.record, mask.response, mask.image, "joint")
    assert joint.runs == [*pictures, (0, 3010, 8000, [(0, 8000)], True)]
    assert asked == [(4, 4), (4, 4)]


@pytest.mark.parametrize("mode", masks.MODES)
def test_on_a_gpu_a_record_with_one_picture_takes_few_calls(mode):
    """Text, 3,000 picture tokens, text, two responses of 2,000. A GPU's kernel passes over what a causal call hides:
    joint, all that stands behind the picture is one call; isolated, the prompt's end and the first response are one
    call, and so is every other response."""
    mask = make("P" * 10 + "I" * 3000 + "P" * 20 + "1" * 2000 + "2" * 2000, mode)
    behind = [(3010, 7030)] if mode == "joint" else [(3010, 5030), (5030, 7030)]
    assert [(run.start, run.stop) for run in on_a_gpu(mask)] == [(0, 10), (10, 3010), *behind]
    assert all(run.stop - run.start <= ops.QUERIES for run in ops.calls(mask))


class Calls(TorchDispatchMode):
    """What torch is asked to compute inside the block, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket != torch.ops.prim.device:
            self.names.append(func.overloadpacket)
        return func(*args, **kwargs or {})


def test_on_a_gpu_a_causal_run_is_one_call_of_the_flash_kernel(monkeypatch):
    """Tensors that only pretend to be on a GPU, and a flash kernel that pretends to be there, for half precision."""
    monkeypatch.setattr(ops, "can_use_flash_attention", lambda params: params.query.dtype == torch.bfloat16)
    names = {}
    for dtype in (torch.bfloat16, torch.float32):
        with FakeTensorMode():
            sizes = ((32, 5), (8, 9), (8, 9))  # fewer key heads than query heads, and fewer queries than keys
            q, k, v = (torch.empty(1, heads, tokens, 128, dtype=dtype, device="cuda") for heads, tokens in sizes)
            with Calls() as calls:
                out = softmax_attention(q, k, v, causal=True)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
        names[dtype] = calls.names
    aten = torch.ops.aten
    assert names[torch.bfloat16] == [aten._scaled_dot_product_flash_attention]  # no mask is made, no key head copied
    assert aten.tril in names[torch.float32] and aten._scaled_dot_product_flash_attention not in names[torch.float32]


def batch_mask(mode):
    """A padded batch: a short row, a packed row, a row with padding before an image and two responses."""
    rows = ["P1.......", "PP11P1122", "..PIIP122"]
    record = torch.tensor([[0] * 2 + [-1] * 7, [0] * 4 + [1] * 5, [-1] * 2 + [0] * 7])
    response = torch.tensor([[int(k) - 1 if k.isdigit() else -1 for k in row] for row in rows])
    image = torch.tensor([[k == "I" for k in row] for row in rows])
    return AttentionMask(record, response, image, mode)


def qkv(T, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    heads = (4, 2, 2)
    return [torch.randn(3, h, T, 8, generator=g, dtype=torch.float64).requires_grad_(grad) for h in heads]


@pytest.mark.parametrize("mode", masks.MODES)
def test_all_forms_give_the_same_attention(mode, monkeypatch):
    mask = batch_mask(mode)
    q, k, v = qkv(9)
    dense = attention(q, k, v, mask.dense[:, None])
    assert (attention(q, k, v, mask) - dense).abs().max() < 1e-12
    monkeypatch.setattr(ops, "DENSE_UP_TO", 0)
    for queries in (1, 2, 128):
        monkeypatch.setattr(ops, "QUERIES", queries)
        assert (attention(q, k, v, mask) - dense).abs().max() < 1e-12
    blocks = flex_attention(q, k, v, block_mask=mask.block_sparse(), enable_gqa=True)
    assert (blocks - dense).abs().max() < 1e-12


@pytest.mark.parametrize("mode", masks.MODES)
def test_runs_have_the_gradients_of_dense(mode, monkeypatch):
    mask = batch_mask(mode)
    grads = []
    for dense_up_to, queries in ((512, 128), (0, 128), (0, 2)):
        monkeypatch.setattr(ops, "DENSE_UP_TO", dense_up_to)
        monkeypatch.setattr(ops, "QUERIES", queries)
        inputs = qkv(9, grad=True)
        attention(*inputs, mask).square().sum().backward()
        grads.append([x.grad for x in inputs])
    dense = grads.pop(0)
    assert all((a - b).abs().max() < 1e-12 for other in grads for a, b in zip(other, dense, strict=True))


def test_a_fully_masked_row_gives_zeros_never_nan(monkeypatch):
    mask = make("P1..", "joint")
    q, k, v = (x[:1] for x in qkv(4))
    for dense_up_to in (0, 512):
        monkeypatch.setattr(ops, "DENSE_UP_TO", dense_up_to)
        out = attention(q, k, v, mask)
        assert torch.equal(out[:, :, 2:], torch.zeros_like(out[:, :, 2:])) and out.isfinite().all()
    model = random_model()
    assert model(torch.tensor([[1, 2, 0, 0]]), mask=mask).isfinite().all()


@pytest.mark.parametrize("mode", masks.MODES)
def test_the_network_is_the_same_under_dense_and_runs(mode, monkeypatch):
    mask, model = batch_mask(mode), random_model()
    ids = torch.randint(0, TINY.text.vocab_size, (3, 9))
    dense = model(ids, mask=mask)
    monkeypatch.setattr(ops, "DENSE_UP_TO", 0)
    assert (model(ids, mask=mask) - dense).abs().max() < 1e-12


def test_wrong_shapes_and_modes_are_named():
    with pytest.raises(ValueError, match="mode 'both'"):
        make("P1", "both")
    with pytest.raises(ValueError, match="must share one"):
        AttentionMask(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 2), "joint")


def test_rows_in_any_order_are_exact():
    """A response in two pieces, a response before its prompt, a record in two pieces: no form cares."""
    record = torch.tensor([[0, 1, 0]])
    torn = AttentionMask(record, torch.full_like(record, -1), torch.zeros_like(record, dtype=torch.bool), "joint")
    for mask in (make("P121", "isolated"), make("11PP", "isolated"), torn):
        assert torch.equal(covered(ops.calls(mask), mask.record.shape[1]), mask.dense[0])
    assert make("P121", "isolated").dense[0, 3].tolist() == [True, True, False, True]


def test_the_picture_shows_the_matrix():
    """Every cell of the drawing, read back from its pixels."""
    mask, typed = CASES["isolated with an image"]
    picture = draw_mask(mask, cell=20)
    for i, row in enumerate(matrix(typed)):
        for j, allowed in enumerate(row):
            pixel = picture.getpixel((120 + 20 * j + 8, 120 + 20 * i + 8))
            assert (pixel != (238, 238, 238)) == bool(allowed)
