"""The memory that is announced before a run is the memory that it takes.

    pytest tests/test_memory.py

Weights, adapter and head are counted exactly. What the backward pass keeps is an estimate, held against the storages
that autograd really saves, in bfloat16 as on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from yojo import memory
from yojo.core import flops, grpo, lora
from yojo.core.config import Config, TextConfig
from yojo.core.data import collate
from yojo.core.generate import Cache
from yojo.core.lora import LoraConfig
from yojo.core.molmo2 import Molmo2
from yojo.core.reward import ValueHead

LORA = LoraConfig(r=8)


@pytest.mark.parametrize("config", [TINY, Config()], ids=["tiny", "4b"])
def test_parameters_are_counted_exactly(config):
    with torch.device("meta"):
        model = Molmo2(config, lm_head=False).to(torch.bfloat16)
        learned = lora.add(model, "reward", LORA)
        head = ValueHead(config.text.hidden_size, 16)
    base = sum(p.nbytes for name, p in model.named_parameters() if ".adapters." not in name)
    assert memory.weights(config, torch.bfloat16) == base
    assert memory.adapter(config, LORA) == sum(p.numel() for p in learned)
    assert memory.head(config, 16) == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(
    ("mode", "responses"),
    [("joint", (100,) * 3), ("isolated", (100,) * 3), ("isolated", (20,) * 16), ("isolated", (5,) * 32)],
)
def test_the_inside_of_a_block_is_estimated_well(mode, responses):
    """One block, one record: what autograd saves, against the closed form less its gradients and one block's input."""
    text = TextConfig(256, 1, 8, 2, 32, 768, 400, 24, 4096, 10000.0)
    config = Config(text, TINY.vision, TINY.connector, image_patch_id=407)
    model = Molmo2(config, lm_head=False).to(torch.bfloat16).requires_grad_(False).train()
    lora.add(model, "reward", LORA)
    row = flops.row_of_lengths(700, responses)
    batch = collate([row], mode)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batch.input_ids, None, batch.mask, adapter="reward")
    saved = sum(size for key, size in kept.items() if key not in weights)
    s, T = 2, len(row.ids)
    gradients = T * 2 * s * 2 * text.intermediate_size
    estimate = memory.activations(config, torch.bfloat16, LORA, row, mode) - gradients
    assert estimate == pytest.approx(saved, rel=0.05)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which is made inside the block."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_logits_are_held_for_a_piece_of_the_tokens_at_a_time(monkeypatch):
    """Forward and back; and the pieces change no log-probability and no gradient."""
    model = random_model(replace(TINY, text=replace(TINY.text, vocab_size=3000), image_patch_id=3001))
    parameters = lora.add(model, grpo.POLICY, LoraConfig(r=2, dropout=0.0), torch.Generator().manual_seed(0))
    for p in parameters:
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    answers = [torch.randint(0, 3000, (40,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    groups, found = [(flops.row_of_lengths(10, []), answers)] * 2, []
    for piece in (1000, 32):
        monkeypatch.setattr(grpo, "PIECE", piece)
        with Largest() as largest:
            said = grpo.log_probs(model, groups, grpo.POLICY, 0.7)
            said.square().sum().backward()
        assert largest.numbers == min(piece, 240) * 3000
        found.append([said.detach(), *(p.grad for p in parameters)])
        for p in parameters:
            p.grad = None
    assert all((a - b).abs().max() <= 1e-12 * a.abs().max() for a, b in zip(*found, strict=True))


def test_keys_and_values_are_counted_exactly():
    model, cache = random_model(dtype=torch.bfloat16), Cache(TINY, 13)
    with torch.no_grad():
        model(torch.randint(0, 399, (1, 6)), cache=cache)
        cache.expand(5)
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.k, layer.v))
    assert held == memory.cache(TINY, torch.bfloat16, 5, 13)


def test_a_grpo_step_of_64_answers_of_512_tokens_at_full_size_is_no_more_than_80_gigabytes():
    """Computed: eight prompts with a picture and eight answers to each. All logits at once would be too many: in
    float32, with their softmax and its gradient, three times 32,768 rows of the vocabulary."""
    config, lora_config = Config(), LoraConfig(r=64, dropout=0.0)
    group = flops.row_of_lengths(1040, [513] * 8, 1000)
    held = memory.training(config, torch.bfloat16, lora_config) + 2 * config.text.vocab_size * config.text.hidden_size
    learns = 8 * memory.activations(config, torch.bfloat16, lora_config, group, "isolated")
    speaks = memory.cache(config, torch.bfloat16, 64, 1040 + 512)
    assert held + max(learns + memory.logits(config, 64 * 512), speaks) < 80e9
    assert held + learns + 3 * 4 * 64 * 512 * config.text.vocab_size > 80e9
