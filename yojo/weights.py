"""Safetensors <-> network.

A checkpoint folder is Molmo2's: `config.json`, `model.safetensors` or shards with `model.safetensors.index.json`,
`generation_config.json`, `tokenizer.json`, `preprocessor_config.json`, `processor_config.json`.

Module attributes carry the tensor names, so loading is one concatenation (the embedding table, cut in two in files) and
one strict check of names and shapes. The JSON files are read by `settings.py`.

See it: `python -m yojo.checkpoint show weights/tiny`; `pytest tests/test_checkpoint.py`.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from yojo.core.config import Config
from yojo.core.molmo2 import Molmo2
from yojo.files import InputError, as_path, check_tensors, open_tensors, read_json, whole_folder
from yojo.settings import read_config, write_settings

WTE = "model.transformer.wte."
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# What stands beside the weights, for this reader and for others.
COMPANIONS = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt"
COMPANIONS += " preprocessor_config.json video_preprocessor_config.json processor_config.json chat_template.jinja"


def shards(folder: str | Path) -> list[Path]:
    """The weight files of a checkpoint: one, or what the index names."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(f"{folder} holds no checkpoint: neither {single.name} nor {index.name} is there")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} has no weight_map")
    files = sorted(set(map(str, names.values())))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}: a shard is a .safetensors file in the checkpoint's own folder")
    return [folder / name for name in files]


@contextmanager
def open_weights(path: str | Path, config: Config, lm_head: bool = True) -> Iterator[dict[str, list]]:
    """Our tensor names -> the pieces each is stored in: one memory-mapped slice, or two for the embedding table.

    Only headers are read. A missing, unknown or mis-shaped tensor raises `InputError` with its name, and so does one
    that is not floating-point.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Molmo2(config, lm_head).state_dict().items()}
    with ExitStack() as stack:
        stored: dict[str, object] = {}
        for shard in shards(path):
            file = stack.enter_context(open_tensors(shard))
            for name in file.keys():
                if name in stored:
                    raise InputError(f"{path}: {name} stands in two shards")
                if not _unread(name, config, lm_head):
                    stored[name] = file.get_slice(name)
                    if stored[name].get_dtype() not in FLOATS:
                        raise InputError(f"{path}: {name} is {stored[name].get_dtype()}, weights are one of {FLOATS}")
        pieces = {name: [piece] for name, piece in stored.items() if not name.startswith(WTE)}
        if table := [stored[WTE + name] for name in ("embedding", "new_embedding") if WTE + name in stored]:
            if len({tuple(piece.get_shape()[1:]) for piece in table}) > 1:
                cuts = [piece.get_shape() for piece in table]
                raise InputError(f"{path}: the two parts of the embedding table differ in width: {cuts}")
            pieces[WTE + "embedding"] = table
        sizes = {name: [piece.get_shape() for piece in parts] for name, parts in pieces.items()}
        check_tensors(path, {k: [sum(sum(s[:1]) for s in some), *some[0][1:]] for k, some in sizes.items()}, expected)
        yield pieces


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device that was named; None = CUDA if there is one, else the CPU."""
    found = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if found else "cpu")
    if str(device).startswith("cuda") and not found:
        raise InputError(f"device {device}: torch sees no CUDA device")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds, by what is missing
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def has_bfloat16(device: torch.device) -> bool:
    """Of a CUDA device: in its arithmetic, not emulated."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def load_backbone(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None, lm_head: bool = True
) -> Molmo2:
    """A checkpoint folder -> the network in eval mode, its weights frozen.

    device None = CUDA if there is one, else the CPU; dtype None = float32 on CPU, bfloat16 on CUDA. Files are
    memory-mapped and cast tensor by tensor: at no time is there a second copy of the model, on the host or on the
    device. A tensor that needs no cast on the CPU stays the mapped file. Without `lm_head` the vocabulary matrix is not
    read: scoring never needs it. What does not fit raises `InputError` with its name.
    """
    path, device = as_path(path, "path"), pick_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if device.type == "cuda" and dtype == torch.bfloat16 and not has_bfloat16(device):
        raise InputError(f"{torch.cuda.get_device_name(device)} has no bfloat16: say --dtype float32 (torch.float32)")
    config = read_config(path)
    with torch.device("meta"):
        model = Molmo2(config, lm_head)
    with open_weights(path, config, lm_head) as pieces:
        large = sum(tensor.nbytes for tensor in model.state_dict().values()) > 2**30
        state = {
            name: _read(pieces[name], tensor.shape, dtype, device)
            for name, tensor in tqdm(model.state_dict().items(), "loading", disable=not large, leave=False)
        }
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _read(pieces: list, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor from its pieces, cast and moved piece by piece."""
    if len(pieces) == 1:
        return pieces[0][...].to(device, dtype)
    whole, start = torch.empty(shape, dtype=dtype, device=device), 0
    for piece in pieces:
        rows = piece.get_shape()[0]
        whole[start : start + rows] = piece[...]
        start += rows
    return whole


def _unread(name: str, config: Config, lm_head: bool) -> bool:
    """Tensors a checkpoint may hold and this network never reads: the vocabulary matrix when only scoring, and
    declared vision layers above the deepest one that is read."""
    layer = re.match(r"model\.vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\.", name)
    if layer:
        return config.vision_depth <= int(layer[1]) < config.vision.num_hidden_layers
    return name == "lm_head.weight" and not lm_head


def base_tensors(model: Molmo2) -> dict[str, Tensor]:
    """The network's own parameters by checkpoint name, without any adapter's."""
    return {name: p.detach() for name, p in model.named_parameters() if ".adapters." not in name}


def save_backbone(
    model: Molmo2, folder: str | Path, companions: str | Path, overwrite: bool = False, also: Sequence[Path] = ()
) -> None:
    """Write a complete checkpoint in the released names; tokenizer and processor files are copied from `companions`,
    and the files in `also`.

    Adapters are not part of it: merge them first, or save them beside it.
    """
    tensors = {name: p.contiguous() for name, p in base_tensors(model).items()}
    table = tensors.pop(WTE + "embedding")
    V = model.config.text.vocab_size
    tensors |= {WTE + "embedding": table[:V].clone(), WTE + "new_embedding": table[V:].clone()}
    with whole_folder(folder, overwrite) as new:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        copy_companions(Path(companions), new)
        write_settings(model.config, model.dtype, new)
        for path in also:
            shutil.copyfile(path, new / path.name)


def copy_companions(source: Path, folder: Path) -> None:
    for name in COMPANIONS.split():
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def fingerprint(model: Molmo2, tokenizer_file: str | Path) -> dict[str, str]:
    """What a reward model remembers of its base: one digest of the weights, one of the tokenizer.

    The weights' digest covers every name, shape and the first 64 values rounded to bfloat16, without `lm_head`: it is
    the same for a base loaded in float32 or bfloat16, with or without its vocabulary matrix.
    """
    digest = hashlib.sha256()
    for name, p in sorted(base_tensors(model).items()):
        if name != "lm_head.weight":
            values = p.flatten()[:64].to(torch.bfloat16).cpu().view(torch.int16).numpy()
            digest.update(f"{name} {list(p.shape)} ".encode() + values.tobytes())
    return {"weights": digest.hexdigest(), "tokenizer": hashlib.sha256(Path(tokenizer_file).read_bytes()).hexdigest()}


# How the names of a part's tensors begin; the first that fits counts.
PARTS = {"model.vision_backbone.image_vit.": "vision tower", "model.vision_backbone.": "connector"}
PARTS |= {WTE: "embedding table", "model.transformer.": "decoder", "lm_head.": "lm_head"}


def part_of(name: str) -> str:
    """The part of the network that a tensor belongs to."""
    return next(part for start, part in PARTS.items() if name.startswith(start))
