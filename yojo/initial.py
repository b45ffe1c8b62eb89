"""Networks that nobody has trained: configs by the name of a size, first weights, whole random checkpoints.

See it: `python -m yojo.checkpoint random --size tiny --out runs/random`; `pytest tests/test_checkpoint.py`.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from yojo.cli import shipped
from yojo.core.config import Config, ImageConfig, preprocessor_json
from yojo.core.molmo2 import Molmo2
from yojo.files import InputError, read_json, whole_folder, write_json
from yojo.weights import COMPANIONS, WTE, read_config, write_settings

RELEASED = "molmo2-4b"
SIZES = (RELEASED, "tiny")


def size_config(size: str, layers: int | None = None, vision_layers: int | None = None) -> Config:
    """The config of a named size, with fewer decoder blocks or vision layers where asked. A shortened tower reads its
    last layer and, as in the release, the one six below, or its first."""
    if size not in SIZES:
        raise InputError(f"size {size!r} is none of {SIZES}")
    c = Config() if size == RELEASED else read_config(shipped("weights/tiny"))
    for option, number, most in (
        ("--layers", layers, c.text.num_hidden_layers),
        ("--vision-layers", vision_layers, c.vision_depth),
    ):
        if number is not None and not 1 <= number <= most:
            raise InputError(f"{option} {number}: {size} has 1 to {most}")
    if layers is not None:
        c = replace(c, text=replace(c.text, num_hidden_layers=layers))
    if vision_layers is not None:
        connector = replace(c.connector, vit_layers=(-1, max(-7, -vision_layers)))
        c = replace(c, vision=replace(c.vision, num_hidden_layers=vision_layers), connector=connector)
    return c


def init_weights(model: Molmo2, generator: torch.Generator, std: float = 0.02) -> None:
    """Fresh weights in place."""
    for name, p in model.named_parameters():
        init_tensor(name, p.data, model.config, generator, std)


def init_tensor(name: str, x: Tensor, config: Config, generator: torch.Generator, std: float = 0.02) -> Tensor:
    """Fill the parameter `name`, or some rows of it: matrices N(0, std), the two that write into the residual stream
    smaller by sqrt(2 * layers), biases zero, norms one."""
    if x.ndim == 1:
        return x.fill_(float(name.endswith("weight") and ("norm" in name or "ln_f" in name)))
    into_stream = "attn_out" in name or "ff_out" in name
    return x.normal_(0, std / math.sqrt(2 * config.text.num_hidden_layers) if into_stream else std, generator=generator)


def stored_shapes(config: Config) -> dict[str, torch.Size]:
    """Every tensor of a checkpoint in the released layout: the network's own, the embedding table in two parts."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Molmo2(config).state_dict().items()}
    rows, width = shapes.pop(WTE + "embedding")
    V = config.text.vocab_size
    return shapes | {WTE + "embedding": torch.Size((V, width)), WTE + "new_embedding": torch.Size((rows - V, width))}


def write_random(
    out: str | Path, size: str, config: Config, dtype: torch.dtype, parts: int, seed: int, overwrite: bool = False
) -> None:
    """A checkpoint of random weights in the released layout: config, shards with their index, companions.

    Tensors are drawn and written a few rows at a time, so the memory needed does not depend on the model's size.
    """
    if parts < 1:
        raise InputError(f"--shards {parts}: at least 1")
    shapes = stored_shapes(config)
    share, total = sum(shape.numel() for shape in shapes.values()) / parts, 0
    names: list[list[str]] = [[] for _ in range(parts)]
    for name, shape in shapes.items():  # a tensor goes where its middle falls
        names[int((total + shape.numel() / 2) / share)].append(name)
        total += shape.numel()
    generator = torch.Generator().manual_seed(seed)
    with whole_folder(out, overwrite) as new:
        write_settings(config, dtype, new)
        if size == RELEASED:
            write_json(new / "preprocessor_config.json", preprocessor_json(ImageConfig()))
            write_json(new / "tokenizer.json", stand_in_tokenizer(config))
        else:
            for name in COMPANIONS:
                shutil.copyfile(shipped("weights/tiny") / name, new / name)
        files = [f"model-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)]
        with tqdm(total=total * dtype.itemsize, desc="writing", unit="B", unit_scale=True, mininterval=1) as bar:
            for file, some in zip(files, names, strict=True):
                _write_shard(new / file, {name: shapes[name] for name in some}, config, dtype, generator, bar)
        weight_map = {name: file for file, some in zip(files, names, strict=True) for name in some}
        index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
        write_json(new / "model.safetensors.index.json", index)


def _write_shard(path: Path, shapes: dict[str, torch.Size], config: Config, dtype: torch.dtype, generator, bar) -> None:
    """A safetensors file by hand: the header's length in 8 bytes, the header, the tensors."""
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                for rows in torch.empty(shape, device="meta").split(max(1, 2**24 // max(1, shape[1:].numel()))):
                    x = init_tensor(name, torch.empty(rows.shape), config, generator).to(dtype)
                    file.write(x.view(torch.uint8).numpy())
                    bar.update(x.nbytes)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def stand_in_tokenizer(config: Config) -> dict:
    """`tokenizer.json` of `weights/tiny`, filled up so that every added token has the id it has in the release. It
    makes a random checkpoint usable; its token counts are not the release's."""
    raw = read_json(shipped("weights/tiny") / "tokenizer.json")
    vocabulary, added = raw["model"]["vocab"], {token["content"]: token for token in raw["added_tokens"]}
    vocabulary |= {f"|<FILLER_{i}>|": i for i in range(len(vocabulary), config.pad_id)}  # no text produces them
    below = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = below + [f"|<EXTRA_TOKENS_{i}>|" for i in range(config.text.vocab_size - config.pad_id - len(below))]
    names += [name for name in added if name not in below]
    like = added[below[0]]
    raw["added_tokens"] = [like | {"content": name, "id": config.pad_id + i} for i, name in enumerate(names)]
    return raw
