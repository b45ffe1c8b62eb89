"""Networks that nobody has trained: configs by the name of a size, first weights, whole random checkpoints.

See it: `python -m yojo.checkpoint random --size tiny --out runs/random`; `pytest tests/test_checkpoint.py`.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from yojo.cli import shipped
from yojo.core.config import Config, ImageConfig
from yojo.core.molmo2 import Molmo2
from yojo.files import InputError, read_json, whole_folder, write_json
from yojo.settings import preprocessor_json, read_config, write_settings
from yojo.weights import WTE, copy_companions, part_of

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
    """Fill the parameter `name`: matrices N(0, std), the two that write into the residual stream smaller by
    sqrt(2 * layers), biases zero, norms one."""
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
    out: str | Path, size: str, config: Config, dtype: torch.dtype, seed: int, overwrite: bool = False
) -> None:
    """A checkpoint of random weights in the released layout: config, shards with their index, companions. A shard is a
    block of the decoder, or one of the other parts, and one is made at a time."""
    shapes, shards = stored_shapes(config), {}
    for name in shapes:
        block = re.match(r"model\.transformer\.blocks\.\d+", name)
        shards.setdefault(block[0] if block else part_of(name), []).append(name)
    generator, weight_map = torch.Generator().manual_seed(seed), {}
    with whole_folder(out, overwrite) as new:
        if size == RELEASED:
            write_json(new / "preprocessor_config.json", preprocessor_json(ImageConfig()))
            write_json(new / "tokenizer.json", stand_in_tokenizer(config))
        else:
            copy_companions(shipped("weights/tiny"), new)
        write_settings(config, dtype, new)
        for i, names in enumerate(tqdm(shards.values(), "writing", delay=2, leave=False), 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            drawn = {name: init_tensor(name, torch.empty(shapes[name]), config, generator).to(dtype) for name in names}
            save_file(drawn, new / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        size_in_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size_in_bytes}, "weight_map": weight_map}
        write_json(new / "model.safetensors.index.json", index)


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
