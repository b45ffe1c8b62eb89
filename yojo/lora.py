"""LoRA by hand: named low-rank side paths beside frozen matrices.

    y = W x + (alpha / r) B A x          A [r, in] random, B [out, r] zero: at the start y = W x, bit for bit

A backbone can carry several adapters and use one at a time. Which one is active is a plain attribute of the model,
read ONCE at the start of a forward pass and handed by value to every layer (`Linear.forward(x, adapter)`). A layer that
looked it up itself would look again when activation checkpointing recomputes it, after the `with` block has ended, and
return the gradient of another function.

    lora.add(model, "policy", LoraConfig(r=16, alpha=32))
    with lora.use(model, "policy"): ...          lora.use(model, None) is the base

Beside a bf16 base A and B stay in at least float32, since an optimiser's steps are small, and their products run in
bf16, as mixed precision has it. Files are PEFT's (`adapter_config.json`, `adapter_model.safetensors`), both ways.
Paper: Hu et al., arXiv 2106.09685.

See it: `pytest tests/test_lora.py`.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from yojo.files import InputError, open_tensors, read_json, read_tensors
from yojo.product import product

TARGETS = ("att_proj", "attn_out", "ff_proj", "ff_out")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraConfig:
    """Defaults are the paper's: rank 128, alpha 16, dropout 0.05, on all decoder matrices."""

    r: int = 128
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = TARGETS


class Adapter(nn.Module):
    """y -> y + (alpha / r) B A dropout(x). A and B are at least float32, and multiply in x's type."""

    def __init__(self, base: nn.Linear, c: LoraConfig, generator: torch.Generator | None):
        super().__init__()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        make = {"device": base.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(c.r, base.in_features, **make))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, c.r, **make))
        bound = 1 / math.sqrt(base.in_features)
        with torch.no_grad():  # drawn on the CPU, so that a seed means the same numbers on every device
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        self.scale, self.dropout = c.alpha / c.r, c.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in], y [..., out] -> [..., out], written over y where no gradient is asked for."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(y.dtype)
        low = F.linear(F.dropout(x, self.dropout, self.training), A) * self.scale  # scaled where it is narrow
        low, rows = (z.reshape(-1, z.shape[-1]) for z in (low, y))
        return torch.addmm(rows, low, B.T, out=None if torch.is_grad_enabled() else rows).view_as(y)


class Linear(nn.Linear):
    """A bias-free matrix that can carry adapters. `adapter` None = the matrix alone."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        y = product(x, self.weight)
        if adapter not in self.adapters:  # none is active, or the active one sits on other matrices
            return y
        return self.adapters[adapter](x, y)


def targets(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Linear]]:
    """(dotted name, matrix) of everything an adapter sits on, in the model's order."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in names:
            found.add(name.rpartition(".")[2])
            yield name, module
    if missing := set(names) - found:
        raise InputError(f"LoRA target(s) {sorted(missing)} name no matrix of this model; it has {sorted(TARGETS)}")


def add(
    model: nn.Module, name: str, config: LoraConfig, generator: torch.Generator | None = None
) -> list[nn.Parameter]:
    """Lay a fresh adapter beside every target matrix and return its parameters. It is not active until `use`d."""
    if name in adapters(model):
        raise InputError(f"the model has an adapter {name!r} already: remove it first, or choose another name")
    for _, linear in list(targets(model, config.targets)):  # all names are checked before the first is touched
        linear.adapters[name] = Adapter(linear, config, generator).train(linear.training)
    model.lora_configs = {**adapters(model), name: config}
    return parameters(model, name)


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters a model carries, by name."""
    return getattr(model, "lora_configs", {})


def _config(model: nn.Module, name: str) -> LoraConfig:
    if name not in adapters(model):
        raise InputError(f"no adapter {name!r}: the model has {sorted(adapters(model)) or 'none'}")
    return adapters(model)[name]


def _matrices(model: nn.Module, name: str) -> Iterator[tuple[str, Linear, Adapter]]:
    for path, linear in targets(model, _config(model, name).targets):
        yield path, linear, linear.adapters[name]


def parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for *_, adapter in _matrices(model, name) for p in adapter.parameters()]


@contextmanager
def use(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside the block the model's forward passes use adapter `name`; None = the base alone."""
    if name is not None:
        _config(model, name)
    before, model.adapter = model.adapter, name
    try:
        yield
    finally:
        model.adapter = before


def remove(model: nn.Module, name: str) -> None:
    for _, linear, _ in list(_matrices(model, name)):
        del linear.adapters[name]
    model.lora_configs = {k: v for k, v in adapters(model).items() if k != name}


@torch.no_grad()
def merge(model: nn.Module, name: str) -> None:
    """Fold an adapter into the base, W <- W + (alpha / r) B A, and remove it. The sum is in the adapter's dtype."""
    for _, linear, a in _matrices(model, name):
        linear.weight.copy_(linear.weight.to(a.lora_A.dtype) + a.scale * (a.lora_B @ a.lora_A))
    remove(model, name)


# ------------------------------------------------------------------------------------------------- files, as in PEFT


def state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {
        f"{PREFIX}{path}.{key}.weight": getattr(adapter, key).detach()
        for path, _, adapter in _matrices(model, name)
        for key in ("lora_A", "lora_B")
    }


def save(model: nn.Module, name: str, folder: str | Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a folder that exists."""
    c = _config(model, name)
    peft = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": c.r,
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        "target_modules": list(c.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {k: v.contiguous() for k, v in state_dict(model, name).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(peft, indent=2) + "\n")


# What PEFT can write and this file does not compute, with the value under which both mean the same.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "alora_invocation_tokens": None,
}


def read_config(folder: str | Path) -> LoraConfig:
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    for key, plain in PLAIN.items():
        if (raw.get(key) or plain) != plain:
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported, only {plain!r}")
    try:
        names = raw["target_modules"]
        if not isinstance(names, list):
            raise TypeError(f"target_modules must be a list of names, got {names!r}")
        config = LoraConfig(raw["r"], raw["lora_alpha"], raw["lora_dropout"], tuple(sorted(map(str, names))))
        if not isinstance(config.r, int) or config.r < 1 or not 0 <= config.dropout < 1:
            raise TypeError(f"r must be a whole number from 1 and lora_dropout in [0, 1), got {config}")
        if missing := set(config.targets) - set(TARGETS):
            raise ValueError(f"{sorted(missing)} name no matrix of this model; it has {sorted(TARGETS)}")
        return replace(config, alpha=float(config.alpha))
    except KeyError as missing:
        raise InputError(f"{path} has no {missing}: is this a PEFT LoRA adapter?") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def load(model: nn.Module, name: str, folder: str | Path) -> list[nn.Parameter]:
    """Add the adapter in `folder` under `name`, strictly: exactly its tensors, in their shapes."""
    path = Path(folder) / "adapter_model.safetensors"
    config = read_config(folder)
    with open_tensors(path) as file:  # before anything of that size is made
        ranks = [file.get_slice(key).get_shape()[:1] for key in file.keys() if key.endswith("lora_A.weight")]
    if [config.r] not in ranks:
        raise InputError(f"{path} holds no matrix of rank {config.r}, which its adapter_config.json names")
    parameters = add(model, name, config)
    try:
        tensors = read_tensors(path, expected={k: v.shape for k, v in state_dict(model, name).items()})
    except InputError:
        remove(model, name)
        raise
    with torch.no_grad():
        for key, tensor in state_dict(model, name).items():
            tensor.copy_(tensors[key])
    return parameters
