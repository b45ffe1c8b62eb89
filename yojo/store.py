"""Adapters and reward models in files.

An adapter is in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, both ways.

A saved reward model is a folder: the adapter in PEFT's files, `value_head.safetensors`, and `reward_model_config.json`,
which names the base (relative to the folder), its fingerprint, the separator's id, the layout and the mode; a base that
is not the one it was trained on is refused.

What the released training code writes (yinuoy/MR2-Molmo2-4B-RM) is read, too: the merged folder, a checkpoint with
`value_head.pt` beside it, and an unmerged run, a PEFT adapter with `value_head.pt`. Both are read in layout "released"
(`prompt.py`), joint.

See it: `pytest tests/test_reward.py tests/test_released.py tests/test_lora.py`.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from yojo.core import lora
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import SEPARATOR, Processor
from yojo.core.reward import ADAPTER, RewardModel, ValueHead
from yojo.files import (
    InputError,
    as_path,
    open_tensors,
    read_json,
    read_pickle,
    read_tensors,
    whole_folder,
    write_json,
)
from yojo.settings import check_keys, check_tokens, read_adapter_config
from yojo.weights import fingerprint, load_backbone

MOST_INNER = 65_536  # hidden units of a head: beyond this a file is not believed, since it would cost memory
CONFIG, HEAD, RELEASED_HEAD = "reward_model_config.json", "value_head.safetensors", "value_head.pt"
# What the released config may say of its head, with the only value this one computes.
RELEASED = {"value_head_type": "mlp", "value_head_activation": "silu", "resp_repr_mode": "last"}
PREFIX = "base_model.model."

# ------------------------------------------------------------------------------------------------------------- adapters


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {
        f"{PREFIX}{path}.{key}.weight": getattr(adapter, key).detach()
        for path, _, adapter in lora.matrices(model, name)
        for key in ("lora_A", "lora_B")
    }


def save_adapter(model: nn.Module, name: str, folder: str | Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a folder that exists."""
    c = lora.config_of(model, name)
    peft = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None}
    peft |= {"r": c.r, "lora_alpha": c.alpha, "lora_dropout": c.dropout, "target_modules": list(c.targets)}
    peft |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    tensors = {k: v.contiguous() for k, v in adapter_tensors(model, name).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", peft)


def load_adapter(model: nn.Module, name: str, folder: str | Path) -> list[nn.Parameter]:
    """Add the adapter in `folder` under `name`, strictly: exactly its tensors, in their shapes."""
    path = Path(folder) / "adapter_model.safetensors"
    config = read_adapter_config(folder)
    with open_tensors(path) as file:  # before anything of that size is made
        ranks = [file.get_slice(key).get_shape()[:1] for key in file.keys() if key.endswith("lora_A.weight")]
    if [config.r] not in ranks:
        raise InputError(f"{path} holds no matrix of rank {config.r}, which its adapter_config.json names")
    parameters = lora.add(model, name, config)
    try:
        tensors = read_tensors(path, expected={k: v.shape for k, v in adapter_tensors(model, name).items()})
    except InputError:
        lora.remove(model, name)
        raise
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, name).items():
            tensor.copy_(tensors[key])
    return parameters


# -------------------------------------------------------------------------------------------------------- reward models


def save_reward_model(rm: RewardModel, folder: str | Path, overwrite: bool, also: Sequence[Path]) -> None:
    """`RewardModel.save`."""
    folder = as_path(folder, "folder")
    config = {"format": "yojo", "base": os.path.relpath(rm.base.resolve(), folder.resolve()), "mode": rm.mode}
    config |= {"fingerprint": rm.fingerprint, "layout": rm.processor.layout, "separator": SEPARATOR}
    config["separator_id"] = rm.processor.tokenizer.separator_id
    config["value_head_hidden_dim"] = rm.head[0].out_features
    with whole_folder(folder, overwrite) as new:
        save_adapter(rm.backbone, ADAPTER, new)
        save_file({k: v.detach().contiguous() for k, v in rm.head.state_dict().items()}, new / HEAD)
        write_json(new / CONFIG, config)
        for path in also:
            shutil.copy(path, new)


def load_reward_model(kind: type[RewardModel], folder: str | Path, base: str | Path | None, **how) -> RewardModel:
    """`RewardModel.load`; kind: the class that is made; how: dtype, device and lm_head, as in `load_backbone`."""
    folder, base = as_path(folder, "folder"), base if base is None else as_path(base, "base")
    config = read_json(folder / CONFIG)
    released = "value_head_type" in config
    base = (_check_released if released else _check_ours)(folder, config, base)
    backbone, processor, digest = open_base(base, "released" if released else config["layout"], **how)
    if not released:
        _check_base(folder, base, config, digest, processor.tokenizer.separator_id)
    if not released or (folder / "adapter_config.json").exists():
        load_adapter(backbone, ADAPTER, folder)
    if (inner := config["value_head_hidden_dim"]) > MOST_INNER:
        raise InputError(f"value_head_hidden_dim {inner} in {CONFIG}: at most {MOST_INNER}")
    head = ValueHead(backbone.config.text.hidden_size, inner)
    head.to(backbone.device, torch.promote_types(backbone.dtype, torch.float32))
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}
    head.load_state_dict(
        read_pickle(folder / RELEASED_HEAD, shapes) if released else read_tensors(folder / HEAD, shapes)
    )
    mode = "joint" if released else config["mode"]
    return kind(backbone, processor, head, mode, base, digest).requires_grad_(False).eval()


def _check_ours(folder: Path, config: dict, base: str | Path | None) -> Path:
    """-> where its base is."""
    kinds = {"base": str, "layout": str, "mode": str, "fingerprint": dict, "separator_id": int}
    kinds["value_head_hidden_dim"] = int
    wrong = [key for key, kind in kinds.items() if type(config.get(key)) is not kind]
    wrong += [key for key in ("separator_id", "value_head_hidden_dim") if key not in wrong and config[key] < 1]
    if config.get("format") != "yojo" or wrong:
        why = f"{', '.join(wrong) or 'format'} missing or wrong"
        raise InputError(f"{folder / CONFIG} is no reward model of this project: {why}")
    check_keys(config, str(folder / CONFIG), {*kinds, "format"}, {"separator": SEPARATOR})
    base = folder / config["base"] if base is None else Path(base)
    if not base.is_dir():
        raise InputError(f"{folder} needs its backbone, and there is no folder {base}: say where it is (`base`)")
    return base


def _check_base(folder: Path, base: Path, config: dict, digest: dict[str, str], separator_id: int) -> None:
    for part in ("weights", "tokenizer"):
        if digest[part] != config["fingerprint"].get(part):
            raise InputError(
                f"{folder} was trained on another base: the {part} in {base} are not the ones it remembers"
            )
    if separator_id != config["separator_id"]:
        theirs = f"the tokenizer in {base} gives {separator_id}"
        raise InputError(f"{folder} uses separator id {config['separator_id']}, {theirs}")


def _check_released(folder: Path, config: dict, base: str | Path | None) -> Path:
    """-> where its base is: itself, unless it was not merged."""
    for key, only in RELEASED.items():
        if config.get(key) != only:
            raise InputError(f"{folder / CONFIG}: {key} = {config.get(key)!r} is not supported, only {only!r}")
    widths = {"value_head_hidden_dim", "value_head_input_dim"}  # the second one is the backbone's
    check_keys(config, str(folder / CONFIG), widths, RELEASED)
    inner = config.get("value_head_hidden_dim")
    if type(inner) is not int or inner < 1:
        raise InputError(f"{folder / CONFIG}: value_head_hidden_dim must be a whole number from 1, got {inner!r}")
    unmerged = (folder / "adapter_config.json").exists()
    if not unmerged and base is not None and Path(base).resolve() != folder.resolve():
        raise InputError(f"{folder} is a merged model and its own base: leave {base} out")
    if base is None:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") if unmerged else folder
    if base is None or not Path(base).is_dir():
        raise InputError(f"{folder} is an adapter for {base}, which is no folder here: pass its folder as `base`")
    return Path(base)


def open_base(base: str | Path, layout: str = "default", **how) -> tuple[Molmo2, Processor, dict[str, str]]:
    """Backbone with a row for the separator, processor, fingerprint. how: as in `load_backbone`."""
    if how.get("dtype") not in (None, torch.float32, torch.float64, torch.bfloat16):
        raise InputError(f"dtype must be torch.float32, float64 or bfloat16, got {how['dtype']!r}")
    backbone = load_backbone(base, **how)
    processor = Processor.from_folder(base, backbone.config.text.max_position_embeddings, layout)
    views, tower = processor.images, backbone.config.vision
    if (views.patch, views.side**2) != (tower.patch_size, tower.num_position_embeddings):
        raise InputError(
            f"{base}: preprocessor_config.json cuts views into {views.side**2} patches of {views.patch} pixels, the "
            f"vision tower reads {tower.num_position_embeddings} of {tower.patch_size}"
        )
    check_tokens(base, processor)
    digest = fingerprint(backbone, processor.tokenizer.path)
    place_separator(backbone, processor.tokenizer.separator_id)
    return backbone, processor, digest


def place_separator(backbone: Molmo2, separator_id: int) -> None:
    """Make sure the table has the separator's row. One that is there is used as it is, as in the release; one that is
    just missing is appended as zeros; it is frozen either way."""
    wte, c = backbone.model.transformer.wte, backbone.config
    height = len(wte.embedding)
    if separator_id > height:
        over = separator_id - height
        raise InputError(f"the separator's id {separator_id} lies {over} beyond the {height} embedding rows")
    if separator_id == height:
        grown = torch.cat([wte.embedding.detach(), torch.zeros_like(wte.embedding[:1])])
        wte.embedding = nn.Parameter(grown, requires_grad=False)
        text = replace(c.text, additional_vocab_size=c.text.additional_vocab_size + 1)
        backbone.config = replace(c, text=text)


def digest(folder: str | Path) -> str:
    """One digest of a saved reward model's adapter, head and config."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in (CONFIG, HEAD, RELEASED_HEAD, "adapter_config.json", "adapter_model.safetensors"):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()
