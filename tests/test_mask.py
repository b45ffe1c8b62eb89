"""Who may look at whom, compared with 0/1 matrices typed by hand.

    pytest tests/test_mask.py

Rows are queries, columns are keys. In the comments P = prompt, I = picture token, 1..3 = response, . = padding.
"""

import pytest
import torch
from conftest import TINY, random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from yojo import mask as masks
from yojo import ops
from yojo.mask import ALL, PAST, SOME, AttentionMask, draw
from yojo.ops import attention, softmax_attention


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


@pytest.fixture(params=["cpu", "cpu-1", "cpu-2", "gpu", "gpu-1", "gpu-2"])
def cut(request, monkeypatch):
    """The segments of a row as for a CPU or a GPU; with a number, of at most so many queries where they are cut."""
    kind, _, chunk = request.param.partition("-")
    for name in ("CHUNK", "CHUNK_CUDA") if chunk else ():
        monkeypatch.setattr(masks, name, int(chunk))
    return lambda mask: mask.segments(whole=kind == "gpu")[0]


@pytest.mark.parametrize("name", CASES)
def test_structured_covers_exactly_the_same_pairs(name, cut):
    mask, typed = CASES[name]
    covered = torch.zeros_like(matrix(typed))
    segments = cut(mask)
    for s in segments:
        covered[s.start : s.stop, s.keys] = s.allow
    assert torch.equal(covered, matrix(typed))
    cuts = [(s.start, s.stop) for s in segments]
    assert cuts[0][0] == 0 and cuts[-1][1] == len(typed.split("\n"))
    assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))


@pytest.mark.parametrize("name", CASES)
def test_a_segment_that_needs_no_mask_really_needs_none(name, cut):
    """ALL: every key; PAST: the last query beside the last key. Then the kernel is told so, and gets no mask."""
    for s in cut(CASES[name][0]):
        full = torch.ones_like(s.allow)
        if s.sees == ALL:
            assert torch.equal(s.allow, full)
        if s.sees == PAST:
            assert torch.equal(s.allow, full.tril(s.allow.shape[1] - s.allow.shape[0]))


@pytest.mark.parametrize("mode", masks.MODES)
def test_with_one_picture_no_mask_is_needed_at_all(mode):
    """Text, 3,000 picture tokens, text, two responses of 2,000: on a GPU one call each, joint one for all behind the
    picture; only pictures with text between them (numbered ones, videos) ask the predicate."""
    kinds = "P" * 10 + "I" * 3000 + "P" * 20 + "1" * 2000 + "2" * 2000
    behind = [(PAST, 3010, 7030)] if mode == "joint" else [(PAST, 3010, 3030), (PAST, 3030, 5030), (PAST, 5030, 7030)]
    segments = make(kinds, mode).segments(whole=True)[0]
    assert [(s.sees, s.start, s.stop) for s in segments] == [(PAST, 0, 10), (ALL, 10, 3010), *behind]
    between = [s.sees for s in make("PIPIP1", mode).segments(whole=True)[0]]
    assert between == ([PAST, SOME, PAST] if mode == "joint" else [PAST, SOME, PAST, PAST])


class Calls(TorchDispatchMode):
    """What torch is asked to compute inside the block, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket != torch.ops.prim.device:
            self.names.append(func.overloadpacket)
        return func(*args, **kwargs or {})


def test_on_a_gpu_a_causal_segment_is_one_call_of_the_flash_kernel(monkeypatch):
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
    """A padded batch: a packed row, a row with an image and three responses, a short row."""
    rows = ["PP11P1122", "PIIP12233", "P1......."]
    record = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 2 + [-1] * 7])
    response = torch.tensor([[int(k) - 1 if k.isdigit() else -1 for k in row] for row in rows])
    image = torch.tensor([[k == "I" for k in row] for row in rows])
    return AttentionMask(record, response, image, mode)


def qkv(T, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    heads = (4, 2, 2)
    return [torch.randn(3, h, T, 8, generator=g, dtype=torch.float64).requires_grad_(grad) for h in heads]


@pytest.mark.parametrize("mode", masks.MODES)
def test_all_views_give_the_same_attention(mode):
    mask = batch_mask(mode)
    q, k, v = qkv(9)
    dense = attention(q, k, v, mask.dense[:, None])
    for whole in (False, True):
        assert (attention(q, k, v, mask.segments(whole)) - dense).abs().max() < 1e-12
    blocks = flex_attention(q, k, v, block_mask=mask.block_sparse(), enable_gqa=True)
    assert (blocks - dense).abs().max() < 1e-12


@pytest.mark.parametrize("mode", masks.MODES)
def test_structured_has_the_gradients_of_dense(mode):
    mask = batch_mask(mode)
    grads = []
    for look in (mask.dense[:, None], mask.segments(whole=False), mask.segments(whole=True)):
        inputs = qkv(9, grad=True)
        attention(*inputs, look).square().sum().backward()
        grads.append([x.grad for x in inputs])
    dense = grads.pop(0)
    assert all((a - b).abs().max() < 1e-12 for other in grads for a, b in zip(other, dense, strict=True))


def test_a_fully_masked_row_gives_zeros_never_nan():
    mask = make("P1..", "joint")
    q, k, v = (x[:1] for x in qkv(4))
    for look in (mask.dense[:, None], mask.structured):
        out = attention(q, k, v, look)
        assert torch.equal(out[:, :, 2:], torch.zeros_like(out[:, :, 2:])) and out.isfinite().all()
    model = random_model()
    assert model(torch.tensor([[1, 2, 0, 0]]), mask=mask).isfinite().all()


@pytest.mark.parametrize("mode", masks.MODES)
def test_the_network_is_the_same_under_dense_and_structured(mode, monkeypatch):
    mask, model = batch_mask(mode), random_model()
    ids = torch.randint(0, TINY.text.vocab_size, (3, 9))
    dense = model(ids, mask=mask)
    monkeypatch.setattr(masks, "DENSE_UP_TO", 0)
    assert (model(ids, mask=mask) - dense).abs().max() < 1e-12


def test_wrong_shapes_and_modes_are_named():
    with pytest.raises(ValueError, match="mode 'both'"):
        make("P1", "both")
    with pytest.raises(ValueError, match="must share one"):
        AttentionMask(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 2), "joint")


def test_what_does_not_stand_side_by_side_is_refused_by_the_structured_form():
    """It would lose the keys that stand elsewhere; the dense form knows no such limit."""
    torn = make("P121", "isolated")
    assert torn.dense[0, 3].tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match=r"side by side, got responses \[-1, 0, 1, 0\]"):
        _ = torn.structured
    with pytest.raises(ValueError, match=r"must begin with its prompt, got responses \[0, -1\]"):
        _ = make("11PP", "isolated").structured
    record = torch.tensor([[0, 1, 0]])
    torn = AttentionMask(record, torch.full_like(record, -1), torch.zeros_like(record, dtype=torch.bool), "joint")
    with pytest.raises(ValueError, match=r"side by side, got records \[0, 1, 0\]"):
        _ = torn.structured


def test_the_picture_shows_the_matrix():
    """Every cell of the drawing, read back from its pixels."""
    mask, typed = CASES["isolated with an image"]
    picture = draw(mask, cell=20)
    for i, row in enumerate(matrix(typed)):
        for j, allowed in enumerate(row):
            pixel = picture.getpixel((120 + 20 * j + 8, 120 + 20 * i + 8))
            assert (pixel != (238, 238, 238)) == bool(allowed)
