"""Column-major, or in pieces, a product is the same, and it is used where it was measured to be faster, only there.

pytest tests/test_ops.py
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch.utils.flop_counter import FlopCounterMode

from yojo import lora, ops
from yojo.molmo2 import Cache

LINE_BYTES = 64


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


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (3, 5, 7), (0, 7)])
def test_in_pieces_it_is_the_same_product(shape, monkeypatch):
    monkeypatch.setattr(ops, "PIECE", 5)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    y = ops.product_in_pieces(x, weight)
    assert y.shape == (*shape[:-1], 9) and y.is_contiguous()
    assert torch.allclose(y, F.linear(x, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("here", [True, False])
def test_when_scoring_large_float32_matrices_and_many_tokens_of_bfloat16_go_other_ways(here, monkeypatch):
    used = []
    monkeypatch.setattr(ops, "bf16_without_amx", lambda device: here and device == "cpu")
    for name in ("column_major_product", "product_in_pieces"):
        monkeypatch.setattr(ops, name, lambda *_, name=name: used.append(name))
    large, small, many = torch.zeros(1024, 1024), torch.zeros(1024, 1023), ops.PIECE + 1
    half = torch.zeros(1, 8, dtype=torch.bfloat16)

    def way(tokens, weight):
        used.clear()
        ops.linear(torch.zeros(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device), weight)
        return used[0] if used else "linear"

    with torch.no_grad():
        assert way(2, large) == ("column_major_product" if here else "linear") and way(1, large) == "linear"
        assert way(many, half) == ("product_in_pieces" if here else "linear") and way(many - 1, half) == "linear"
        for weight in (small, small.double(), large.double(), large.to("meta"), half.to("meta")):
            assert way(many, weight) == "linear"
        with torch.autocast("cpu", torch.bfloat16):
            assert way(many, large) == way(many, half) == "linear"
    assert way(many, large) == way(many, half) == "linear"


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
@pytest.mark.parametrize("way", [ops.column_major_product, ops.product_in_pieces])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_a_network_of_such_products_is_the_same_network(way, adapter, monkeypatch):
    """Rows, tokens that are read, an adapter beside, and a row after a cache; counted the same, too."""
    monkeypatch.setattr(ops, "PIECE", 5)
    model = random_model()
    lora.add(model, "a", lora.LoraConfig(r=2, dropout=0), torch.Generator().manual_seed(0))
    for p in lora.parameters(model, "a"):
        p.normal_()
    ids, read = torch.randint(0, 399, (2, 11)), torch.tensor([[0, 4], [1, 10]])

    def hidden():
        cache = Cache(model.config)
        with lora.use(model, adapter), FlopCounterMode(display=False) as counter:
            results = model(ids), model(ids, read=read), model(ids, cache=cache), model(ids[:, :2], cache=cache)
        return [*results, torch.tensor(counter.get_total_flops())]

    plain = hidden()
    monkeypatch.setattr(ops, "linear", way)
    for ours, theirs in zip(hidden(), plain, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
