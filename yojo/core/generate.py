"""Generation: a cache of keys and values, and tokens sampled one by one. Only a policy needs it; a reward model never
generates.

    p = softmax(W h_last / temperature);  token = the first i with p_1 + ... + p_i > u,  u uniform in [0, 1)

All numbers u are drawn in advance on the CPU, a list for each row. So a seed gives the same numbers on every device and
for any number of rows in the batch. Tokens can still differ if logits are rounded differently.

See it: `pytest tests/test_generate.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from yojo.core import lora
from yojo.core.config import Config
from yojo.core.mask import PADDING, AttentionMask
from yojo.core.molmo2 import Molmo2


class LayerCache:
    """Keys and values of one layer, [B, K, room, d] each, filled from the left, in place: without gradients."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of T more tokens, [B, K, T, d] each -> all so far."""
        if self.k is None:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.room, x.shape[-1]) for x in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        if self.length > self.room:
            raise ValueError(f"a cache with room for {self.room} tokens was given {self.length}")
        self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Cache:
    """The keys and values of everything the model has read so far, and room for as many tokens as it will read. padding
    bool [B, T]: which tokens of the first reading are padding; None = none."""

    def __init__(self, config: Config, room: int, padding: Tensor | None = None):
        self.layers = [LayerCache(room) for _ in range(config.text.num_hidden_layers)]
        self.padding = padding

    @property
    def length(self) -> int:
        return self.layers[0].length

    def expand(self, n: int) -> None:
        """Every row becomes n rows side by side, which share what was read."""
        for layer in self.layers:
            layer.k, layer.v = (x.repeat_interleave(n, dim=0) for x in (layer.k, layer.v))
        self.padding = None if self.padding is None else self.padding.repeat_interleave(n, dim=0)

    def allow(self, T: int) -> Tensor | None:
        """bool [B, 1, T, S]: what T more tokens may attend to, all tokens up to themselves but no padding; None = plain
        causal attention."""
        if self.padding is None:
            return None
        read = F.pad(~self.padding, (0, self.length + T - self.padding.shape[1]), value=True)[:, None, None]
        return read & read.new_ones(T, read.shape[-1]).tril(self.length)


@torch.no_grad()
def generate(
    model: Molmo2,
    input_ids: Tensor,
    features: Tensor | None = None,
    mask: AttentionMask | None = None,
    n: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    adapter: str | None = lora.IN_USE,
) -> Tensor:
    """n continuations of each of B prompts [B, T] -> int [B n, L], L <= max_new_tokens; those of a prompt side by side.

    Prompts are read once, whatever n, and may be padded on the right, as the mask says. temperature 0 = greedy.
    generator: on the CPU. A sample ends with one of `config.eos_ids`, after which its row is filled with
    `config.pad_id`. adapter: as in `Molmo2.forward`.
    """
    (B, T), device = input_ids.shape, input_ids.device
    room = model.config.text.max_position_embeddings - T
    if n < 1 or temperature < 0 or not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"generate takes n >= 1 ({n}), temperature >= 0 ({temperature}) and 1 to {room} new tokens "
            f"({max_new_tokens}), which is what the model's positions leave"
        )
    padding = torch.zeros(B, T, dtype=torch.bool) if mask is None else (mask.record == PADDING).cpu()
    lengths = T - padding.sum(1)
    there = padding.to(device, non_blocking=True) if bool(padding.any()) else None
    cache = Cache(model.config, T + max_new_tokens, there)
    last = torch.stack([torch.arange(B), lengths - 1], dim=1)
    hidden = model(input_ids, features, mask, keep=last, cache=cache, adapter=adapter)
    hidden = hidden.repeat_interleave(n, dim=0)
    lengths = lengths.repeat_interleave(n)[:, None].to(device, non_blocking=True)
    cache.expand(n)
    shape = (B * n, max_new_tokens)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32) if temperature else torch.zeros(shape)
    uniforms = drawn.to(device, non_blocking=True)
    done = torch.zeros(B * n, dtype=torch.bool, device=device)
    ends, out = torch.tensor(model.config.eos_ids, device=device), []
    while True:
        token = sample(model.logits(hidden), temperature, uniforms[:, len(out)])
        out.append(torch.where(done, model.config.pad_id, token))
        done = done | torch.isin(token, ends)
        if len(out) == max_new_tokens or bool(done.all()):
            return torch.stack(out, dim=1)
        hidden = model(out[-1][:, None], positions=lengths + len(out) - 1, cache=cache, adapter=adapter)[:, 0]


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """logits [n, V], uniforms float32 [n] in [0, 1) -> ids [n], drawn from softmax(logits / temperature); 0 takes the
    largest."""
    if temperature == 0:
        return logits.argmax(-1)
    # In float64: devices add in different orders, which must not decide between two tokens.
    p = (at_least_float32(logits) / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(p, uniforms[:, None] * p[:, -1:], right=True).squeeze(1)
    return token.clamp_max(logits.shape[-1] - 1)  # of logits that are not finite, which `update_policy` refuses
