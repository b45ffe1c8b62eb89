"""A product in another layout, or cut, is the same product, and used where it was measured to be faster, only there.

pytest tests/test_product.py
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch.utils.flop_counter import FlopCounterMode

from yojo import lora, molmo2, product
from yojo.molmo2 import Cache

LINE_BYTES = 64


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 7), (2, 7), (3, 5, 7), (16, 7), (17, 7), (32, 7), (0, 7)])
def test_turned_it_is_the_same_product(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    turned = product.turned_product(x, weight)
    assert turned.shape == (*shape[:-1], 9)
    assert torch.allclose(turned, F.linear(x, weight), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 16, 17, 420, 1024, 1444, 2048])
def test_its_rows_begin_at_cache_lines_an_odd_number_of_them_apart(tokens):
    turned = product.turned_product(torch.randn(tokens, 3), torch.randn(5, 3))
    assert turned.stride(0) == 1 and turned.data_ptr() % LINE_BYTES == 0
    lines, rest = divmod(turned.stride(1) * turned.itemsize, LINE_BYTES)
    assert rest == 0 and lines % 2 == 1 and tokens <= turned.stride(1) < tokens + 32


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (3, 5, 7), (0, 7)])
def test_cut_it_is_the_same_product(shape, monkeypatch):
    monkeypatch.setattr(product, "PIECE", 5)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    cut = product.cut_product(x, weight)
    assert cut.shape == (*shape[:-1], 9) and cut.is_contiguous()
    assert torch.allclose(cut, F.linear(x, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("here", [True, False])
def test_when_scoring_large_float32_matrices_are_turned_and_many_tokens_of_bfloat16_cut(here, monkeypatch):
    used = []
    monkeypatch.setattr(product, "like_zen4", lambda device: here and device == "cpu")
    for name in ("turned", "cut"):
        monkeypatch.setattr(product, f"{name}_product", lambda *_, name=name: used.append(name))
    large, small, many = torch.zeros(1024, 1024), torch.zeros(1024, 1023), product.PIECE + 1
    half = torch.zeros(1, 8, dtype=torch.bfloat16)

    def way(tokens, weight):
        used.clear()
        product.product(torch.zeros(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device), weight)
        return used[0] if used else "plain"

    with torch.no_grad():
        assert way(2, large) == ("turned" if here else "plain") and way(1, large) == "plain"
        assert way(many, half) == ("cut" if here else "plain") and way(many - 1, half) == "plain"
        for weight in (small, small.double(), large.double(), large.to("meta"), half.to("meta")):
            assert way(many, weight) == "plain"
        with torch.autocast("cpu", torch.bfloat16):
            assert way(many, large) == way(many, half) == "plain"
    assert way(many, large) == way(many, half) == "plain"


@pytest.mark.parametrize("able, like", [
    ({"avx512_bf16": True}, True), ({"avx512_bf16": True, "amx_tile": True}, False), ({"avx2": True}, False)
])  # fmt: skip
def test_like_zen4_is_a_cpu_with_bfloat16_instructions_but_without_amx(able, like, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    product.like_zen4.cache_clear()
    try:
        assert product.like_zen4("cpu") == like and not product.like_zen4("cuda")
        assert molmo2.kernel_lags(torch.bfloat16, "cpu") == like and not molmo2.kernel_lags(torch.float32, "cpu")
    finally:
        product.like_zen4.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("way", [product.turned_product, product.cut_product])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_a_network_of_such_products_is_the_same_network(way, adapter, monkeypatch):
    """Rows, tokens that are read, an adapter beside, and a row after a cache; counted the same, too."""
    monkeypatch.setattr(product, "PIECE", 5)
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
    monkeypatch.setattr(lora, "product", way)
    for ours, theirs in zip(hidden(), plain, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
