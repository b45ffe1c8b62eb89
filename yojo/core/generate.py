"""Speaking: a cache of keys and values, and tokens drawn one after the other. Only a policy needs it; a reward model
never speaks.

    logits = W h_last;  token ~ softmax(logits / temperature)

See it: `pytest tests/test_molmo2.py tests/test_grpo.py`.
"""

import torch
from torch import Tensor

from yojo.core import lora
from yojo.core.config import Config
from yojo.core.mask import AttentionMask
from yojo.core.molmo2 import Molmo2


class LayerCache:
    """Keys and values of one layer, [B, K, S, d] each, growing along S."""

    def __init__(self) -> None:
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v = k.contiguous(), v.contiguous()  # a view of v would keep the queries, too
        return self.k, self.v


class Cache:
    """The keys and values of everything the model has read so far."""

    def __init__(self, config: Config):
        self.layers = [LayerCache() for _ in range(config.text.num_hidden_layers)]

    @property
    def length(self) -> int:
        return 0 if self.layers[0].k is None else self.layers[0].k.shape[2]

    def expand(self, n: int) -> None:
        """One row becomes n rows that share what was read."""
        for layer in self.layers:
            layer.k, layer.v = (x.expand(n, -1, -1, -1) for x in (layer.k, layer.v))


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
    """n continuations of one prompt [1, T] -> int [n, L], L <= max_new_tokens.

    The prompt is read once, whatever n. temperature 0 = greedy. A sample ends with one of `config.eos_ids`, after
    which its row is filled with `config.pad_id`. adapter: as in `Molmo2.forward`.
    """
    room = model.config.text.max_position_embeddings - input_ids.shape[1]
    if len(input_ids) != 1 or n < 1 or temperature < 0 or not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"generate takes one prompt (got {len(input_ids)}), n >= 1 ({n}), temperature >= 0 ({temperature}) and "
            f"1 to {room} new tokens ({max_new_tokens}), which is what the model's positions leave"
        )
    cache = Cache(model.config)
    hidden = model(input_ids, features, mask, cache=cache, adapter=adapter)[:, -1:].expand(n, -1, -1)
    cache.expand(n)
    done = torch.zeros(n, dtype=torch.bool, device=input_ids.device)
    ends = torch.tensor(model.config.eos_ids, device=input_ids.device)
    out = []
    while True:
        token = sample(model.logits(hidden[:, -1]), temperature, generator)
        out.append(torch.where(done, model.config.pad_id, token))
        done = done | torch.isin(token, ends)
        if len(out) == max_new_tokens or bool(done.all()):
            return torch.stack(out, dim=1)
        hidden = model(out[-1][:, None], cache=cache, adapter=adapter)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """logits [n, V] -> ids [n], drawn from softmax(logits / temperature); 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (at_least_float32(logits) / temperature).softmax(-1)
    return torch.multinomial(p.cpu(), 1, generator=generator).squeeze(1).to(p.device)  # drawn where the generator is
