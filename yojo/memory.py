"""How many bytes scoring and training need, before a run starts.

    scoring:   weights without lm_head
    training:  + adapter and head, each number four times in float32: itself, its gradient, AdamW's two moments
               + what the backward pass needs: with activation checkpointing the input of every block, and the inside
                 of the one block that is being recomputed
    GRPO:      + the logits of some of the answers' tokens, while it learns; keys and values, while it speaks

The parts that grow with the number of tokens are an estimate of this network's own code; `tests/test_memory.py` holds
it against what autograd really keeps.
"""

import torch

from yojo.core import flops, ops
from yojo.core.config import Config
from yojo.core.data import collate
from yojo.core.grpo import PIECE
from yojo.core.lora import LoraConfig
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Encoded


def weights(config: Config, dtype: torch.dtype) -> int:
    """Bytes of everything that scoring reads."""
    with torch.device("meta"):
        return sum(p.numel() for p in Molmo2(config, lm_head=False).parameters()) * dtype.itemsize


def adapter(config: Config, lora: LoraConfig) -> int:
    """Parameters of an adapter: r (in + out) for each matrix it sits on."""
    c = config.text
    return c.num_hidden_layers * lora.r * sum(sum(c.matrices[target]) for target in lora.targets)


def head(config: Config, inner: int) -> int:
    """Parameters of the value head."""
    return (config.text.hidden_size + 2) * inner + 1


def training(config: Config, dtype: torch.dtype, lora: LoraConfig, inner: int = 1024) -> int:
    """Bytes of weights, gradients and optimiser state."""
    return weights(config, dtype) + 4 * 4 * (adapter(config, lora) + head(config, inner))


def activations(config: Config, dtype: torch.dtype, lora: LoraConfig, row: Encoded, mode: str) -> int:
    """Bytes that one record adds: the inputs of all blocks, the inside of one, and the gradients that are wide at the
    same time, `s` bytes a number."""
    c, s = config.text, dtype.itemsize
    D, heads, inner = c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size
    keys = c.num_key_value_heads * c.head_dim
    adapters = 2 * s * (2 * D + heads + inner) + 4 * s * lora.r  # dropout's mask and its output, A x
    attention = s * (2 * (heads + keys) + keys + heads)  # q and k before their norm and turned, v, what comes out
    rest = s * D + 3 * s * inner  # what the second norm reads; up, gate and silu(gate)
    gradients = 2 * s * 2 * inner  # of up and gate, apart and side by side
    per_token = c.num_hidden_layers * s * D + adapters + attention + rest + gradients
    # a call with several ranges of keys (an isolated response: its prompt's and its own) copies them side by side
    runs = ops.calls(collate([row], mode).mask) if ops.by_runs(len(row.ids)) else []
    copied = 2 * keys * sum(stop - start for run in runs if len(run.keys) > 1 for start, stop in run.keys)
    pairs, _ = flops.executed(row, mode)  # the mask in numbers
    return len(row.ids) * per_token + s * (pairs + copied)


def logits(config: Config, tokens: int) -> int:
    """Bytes that the logits of so many answer tokens take, and going back through their softmax: four times a piece of
    them in float32."""
    return 4 * 4 * min(tokens, PIECE) * config.text.vocab_size


def cache(config: Config, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of the keys and values of `rows` rows of so many tokens."""
    c = config.text
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * rows * tokens * dtype.itemsize
