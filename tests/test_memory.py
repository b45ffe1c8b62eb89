"""The memory that is announced before a run is the memory that it takes.

    pytest tests/test_memory.py

Weights, adapter and head are counted exactly. What the backward pass keeps is an estimate, held against the storages
that autograd really saves, in bfloat16 as on a GPU.
"""

import pytest
import torch
from conftest import TINY

from yojo import memory
from yojo.core import flops, lora
from yojo.core.config import Config, TextConfig
from yojo.core.data import collate
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
