"""Every fast way of `ops.py` against the plain one, and that it is used only where it was measured to be faster.

pytest tests/test_ops.py
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model
from torch.utils.flop_counter import FlopCounterMode

import yojo
from yojo.core import lora, molmo2, ops
from yojo.core.generate import Cache
from yojo.core.ops import attention, kernel_attention, product_attention, softmax_attention

LINE_BYTES = 64

# ------------------------------------------------------------------------------------------------------------ x W^T


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 7), (2, 7), (3, 5, 7), (16, 7), (17, 7), (32, 7), (0, 7)])
def test_column_major_it_is_the_same_product(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    y = ops.column_major_product(x, weight)
    assert y.shape == (*shape[:-1], 9)
    assert torch.allclose(y, F.linear(x, weight), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 16, 17, 420, 1024, 1444, 2048])
def test_its_columns_begin_at_cache_lines_an_odd_number_of_them_apart(tokens):
    y = ops.column_major_product(torch.randn(tokens, 3), torch.randn(5, 3))
    assert y.stride(0) == 1 and y.data_ptr() % LINE_BYTES == 0
    lines, rest = divmod(y.stride(1) * y.itemsize, LINE_BYTES)
    assert rest == 0 and lines % 2 == 1 and tokens <= y.stride(1) < tokens + 32


@pytest.mark.parametrize("here", [True, False])
def test_when_scoring_large_float32_matrices_go_another_way(here, monkeypatch):
    used = []
    monkeypatch.setattr(ops, "bf16_without_amx", lambda device: here and device == "cpu")
    monkeypatch.setattr(ops, "column_major_product", lambda *_: used.append("column major"))
    large, small, half = torch.zeros(1024, 1024), torch.zeros(1024, 1023), torch.zeros(1024, 1024).bfloat16()

    def way(tokens, weight):
        used.clear()
        ops.linear(torch.zeros(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device), weight)
        return used[0] if used else "linear"

    with torch.no_grad():
        assert way(2, large) == ("column major" if here else "linear") and way(1, large) == "linear"
        for weight in (small, small.double(), large.double(), half, large.to("meta"), half.to("meta")):
            assert way(1025, weight) == "linear"
        with torch.autocast("cpu", torch.bfloat16):
            assert way(2, large) == "linear"
    assert way(2, large) == "linear"


@pytest.mark.parametrize("able, like", [
    ({"avx512_bf16": True}, True), ({"avx512_bf16": True, "amx_tile": True}, False), ({"avx2": True}, False)
])  # fmt: skip
def test_bf16_without_amx_is_a_cpu_with_bfloat16_instructions_but_without_amx(able, like, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    ops.bf16_without_amx.cache_clear()
    try:
        assert ops.bf16_without_amx("cpu") == like and not ops.bf16_without_amx("cuda")
        assert ops.kernel_lags(torch.bfloat16, "cpu") == like and not ops.kernel_lags(torch.float32, "cpu")
    finally:
        ops.bf16_without_amx.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("adapter", [None, "a"])
def test_a_network_of_such_products_is_the_same_network(adapter, monkeypatch):
    """Rows, tokens that are read, an adapter beside, and a row after a cache; counted the same, too."""
    model = random_model()
    lora.add(model, "a", lora.LoraConfig(r=2, dropout=0), torch.Generator().manual_seed(0))
    for p in lora.parameters(model, "a"):
        p.normal_()
    ids, read = torch.randint(0, 399, (2, 11)), torch.tensor([[0, 4], [1, 10]])

    def hidden():
        cache = Cache(model.config, 13)
        with lora.use(model, adapter), FlopCounterMode(display=False) as counter:
            results = model(ids), model(ids, keep=read), model(ids, cache=cache), model(ids[:, :2], cache=cache)
        return [*results, torch.tensor(counter.get_total_flops())]

    plain = hidden()
    monkeypatch.setattr(ops, "linear", ops.column_major_product)
    for numbers in (ops.NUMBERS, 5 * 64):  # also with heads in pieces, which then are made row-major
        monkeypatch.setattr(ops, "NUMBERS", numbers)
        for ours, theirs in zip(hidden(), plain, strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("shape", [(7,), (2, 5, 7)])
def test_the_sum_with_a_product_is_written_over_only_when_nothing_is_learned(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    y = torch.randn(*shape[:-1], 9, dtype=torch.float64)
    before, expected = y.clone(), y + x @ weight.T
    assert (ops.add_product(y, x, weight) - expected).abs().max() < 1e-12 and torch.equal(y, before)
    with torch.no_grad():
        assert (ops.add_product(y, x, weight) - expected).abs().max() < 1e-12
    assert (y - expected).abs().max() < 1e-12


# -------------------------------------------------------------------------------------------------------- attention


def test_attention_repeats_key_heads_in_groups():
    """With grouped queries, query heads 0 and 1 read key head 0, and 2 and 3 read key head 1."""
    q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, 1, 2)
    v = torch.tensor([[[[1.0, 1.0]], [[2.0, 2.0]]]])
    assert attention(q, k, v, None)[0, :, 0, 0].tolist() == [1, 1, 2, 2]


# Queries, keys, causal.
REACHES = {"all": (5, 9, False), "past": (9, 9, True), "past, the last queries": (5, 9, True)}


def qkv(queries, keys, dtype, batch=2):
    """Six query heads on two key heads, laid out as the network has them."""
    g = torch.Generator().manual_seed(0)
    sizes = ((6, queries), (2, keys), (2, keys))
    return [torch.randn(batch, T, h, 8, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for h, T in sizes]


@pytest.mark.parametrize("reach", REACHES)
def test_plain_products_equal_the_kernel(reach):
    queries, keys, causal = REACHES[reach]
    q, k, v = qkv(queries, keys, torch.float64)
    kernel = kernel_attention(q, k, v, causal=causal)
    assert (product_attention(q, k, v, causal) - kernel).abs().max() < 1e-12


def test_plain_products_round_scores_no_worse_than_their_dtype():
    """In bf16, for scores of size 1, they err about twice as much as the kernel, which keeps its scores in float32."""
    q, k, v = qkv(300, 900, torch.bfloat16)
    exact = kernel_attention(q.double(), k.double(), v.double(), None, True)
    errors = [
        float((way(q, k, v, causal=True) - exact).abs().mean() / exact.abs().mean())
        for way in (kernel_attention, product_attention)
    ]
    assert errors[1] < 2.5 * errors[0] < 0.01


@pytest.mark.parametrize("lags", [True, False])
def test_plain_products_are_for_many_scores_in_bfloat16_where_the_kernel_lags(lags, monkeypatch):
    """And not for training, nor under a mask, nor for scores that fill the cache."""
    asked = []
    monkeypatch.setattr(ops, "kernel_lags", lambda dtype, device: lags and dtype == torch.bfloat16)
    for name in ("kernel_attention", "product_attention"):
        monkeypatch.setattr(ops, name, lambda *_, name=name: asked.append(name))
    few, many, exact = (qkv(*sizes, dtype, batch=1) for sizes, dtype in (
        ((100, 200), torch.bfloat16), ((100, 300), torch.bfloat16), ((100, 300), torch.float32)
    ))  # fmt: skip
    vast = qkv(2400, 2400, torch.bfloat16, batch=1)
    row = torch.ones(1, 1, 100, 300, dtype=torch.bool)
    with torch.no_grad():
        softmax_attention(*many)
        for q, k, v, allow in ((*few, None), (*vast, None), (*exact, None), (*many, row)):
            softmax_attention(q, k, v, allow)
    softmax_attention(*many)
    fast = "product_attention" if lags else "kernel_attention"
    assert asked == [fast, *["kernel_attention"] * 5]


def test_the_kernel_is_the_sum_it_stands_for():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 12, 8, generator=g, dtype=torch.float64) for h in (6, 2, 2))
    every = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    scores = q @ every[0].mT / 8**0.5
    back = torch.ones(12, 12, dtype=torch.bool).tril()
    reaches = {"everybody": (None, False, scores), "back": (None, True, scores.masked_fill(~back, -torch.inf))}
    reaches["a mask"] = (back.mT, False, scores.masked_fill(~back.mT, -torch.inf))
    for allow, causal, left in reaches.values():
        assert (softmax_attention(q, k, v, allow, causal) - left.softmax(-1) @ every[1]).abs().max() < 1e-12
    few = attention(q[:, :, 8:], k, v, None)  # the last queries beside the last keys
    assert (few - attention(q, k, v, None)[:, :, 8:]).abs().max() < 1e-12
    half = [x.bfloat16() for x in (q, k, v)]
    assert (attention(*half, None) - attention(q, k, v, None)).abs().max() < 0.03


# --------------------------------------------------------------------------------------------------- token by token


def marked():
    """Every method of the package that `tokenwise` marks, by its name."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(yojo.__path__, "yojo.")]
    return {
        f"{kind.__name__}.{name}": method
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and hasattr(method, "__wrapped__") and method.__code__.co_filename == ops.__file__
    }


def cases(model):
    """(name, the module, what is inside it and sees the pieces, the method's arguments): rows of a batch, picked
    tokens, views; with and without an adapter; a product that is column-major."""
    block = model.model.transformer.blocks[0]
    mlp, heads = block.mlp, block.self_attn
    tower = model.model.vision_backbone.image_vit.transformer["resblocks"][0].feed_forward
    g = torch.Generator().manual_seed(0)
    rows, picked, views, qkv = (
        torch.randn(size, generator=g, dtype=torch.float64) for size in ((2, 7, 32), (5, 32), (3, 4, 24), (2, 7, 64))
    )
    positions = torch.stack([torch.arange(7), torch.arange(7) + 3])
    angles = molmo2.rotary_angles(positions, 8, 10_000.0, torch.float64)
    column_major = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    return [
        ("VisionMLP.forward", tower, tower.w1, (views,)),
        ("MLP.forward", mlp, mlp.ff_proj, (rows, None)),
        ("MLP.forward", mlp, mlp.ff_proj, (picked, "a")),
        ("Attention.split_heads", heads, heads.q_norm, (qkv, *angles)),
        ("Attention.split_heads", heads, heads.q_norm, (column_major, *angles)),
    ]


def test_every_marked_method_in_pieces_of_three_equals_the_whole(monkeypatch):
    """And token by token, which is what the mark promises."""
    model = random_model()
    lora.add(model, "a", lora.LoraConfig(r=2, dropout=0), torch.Generator().manual_seed(0))
    for p in lora.parameters(model, "a"):
        p.data.normal_()
    methods, tested = marked(), cases(model)
    assert {name for name, *_ in tested} == set(methods)
    for name, module, inside, args in tested:
        pieces, tokens = [], args[0].shape[:-1].numel()
        whole = methods[name].__wrapped__(module, *args)
        hook = inside.register_forward_pre_hook(lambda _, xs, pieces=pieces: pieces.append(len(xs[0].flatten(0, -2))))
        heads = TINY.text.num_attention_heads if name == "Attention.split_heads" else 1  # a head's rows
        for size in (3, 1):
            monkeypatch.setattr(ops, "PIECE", size)
            monkeypatch.setattr(ops, "NUMBERS", size * args[0].shape[-1])
            pieces.clear()
            with torch.no_grad():
                parts = methods[name](module, *args)
            assert max(pieces) == size * heads and sum(pieces) == tokens * heads
            for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (parts, whole)), strict=True):
                assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()
        pieces.clear()
        methods[name](module, *args)  # with a gradient nothing goes in pieces
        assert pieces == [tokens * heads]
        hook.remove()


def test_swiglu_is_written_over_its_gate_only_when_nothing_is_learned():
    x = torch.randn(3, 8, dtype=torch.float64)
    up, gate = x[:, :4].clone(), x[:, 4:].clone()
    plain = ops.swiglu(x)
    assert (plain - F.silu(gate) * up).abs().max() < 1e-15 and torch.equal(x[:, 4:], gate)
    with torch.no_grad():
        assert torch.equal(ops.swiglu(x), plain)
    assert torch.equal(x[:, 4:], plain)
