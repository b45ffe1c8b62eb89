"""Config and safetensors <-> network.

A checkpoint folder is Molmo2's: `config.json`, `model.safetensors` or shards with `model.safetensors.index.json`,
`generation_config.json`, `tokenizer.json`, `preprocessor_config.json`, `processor_config.json`.

Module attributes carry the tensor names, so loading is one concatenation (the embedding table, cut in two in files) and
one strict check of names and shapes. Two dialects of `config.json` are read, the released one (`vit_config`) and that
of transformers 5 (`vision_config`); the released one is written.

See it: `python -m yojo.checkpoint show weights/tiny`; `pytest tests/test_checkpoint.py`.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from yojo.core.config import Config, ConnectorConfig, TextConfig, VisionConfig
from yojo.core.molmo2 import Molmo2
from yojo.files import InputError, check_tensors, open_tensors, read_json, whole_folder, write_json

WTE = "model.transformer.wte."
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


# --------------------------------------------------------------------------------------------------------------- config

# Our fields carry the names of config.json; where its two dialects differ from ours or from one another:
RELEASED_NAMES = {"rms_norm_eps": "layer_norm_eps", "patch_size": "image_patch_size"}
RELEASED_NAMES["num_position_embeddings"] = "image_num_pos"
OTHER_NAMES = {"vit_layers": "vision_feature_layer"}
KINDS = {"text_config": TextConfig, "vision_config": VisionConfig, "adapter_config": ConnectorConfig}
# Switches of the family that this network does not have, with the only value it computes.
FIXED_TEXT = {"hidden_act": "silu", "qk_norm_type": "qwen3", "use_qk_norm": True, "qkv_bias": False}
FIXED_TEXT |= {"norm_after": False, "attention_bias": False, "rope_scaling": None}
FIXED = {
    "text_config": FIXED_TEXT,
    "vision_config": {"hidden_act": "gelu_pytorch_tanh"},
    "adapter_config": {"hidden_act": "silu", "pooling_attention_mask": True},
}


def read_config(folder: str | Path) -> Config:
    """`config.json`, either dialect, and the end and padding ids of `generation_config.json` where there is one."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "molmo2":
        raise InputError(f"{path}: model_type is {raw.get('model_type')!r}, this network is 'molmo2'")
    parts = raw | {"vision_config": raw.get("vit_config") or raw.get("vision_config")}
    text, vision, connector = (_part(path, name, parts.get(name), kind) for name, kind in KINDS.items())
    patch_id = raw.get("image_patch_id")
    if type(patch_id) is not int:
        raise InputError(f"{path}: image_patch_id must be a token id, got {patch_id!r}")
    if text.num_attention_heads % text.num_key_value_heads:
        raise InputError(f"{path}: key/value heads must divide the query heads, got {text}")
    config = Config(text, vision, connector, patch_id, *_ends(Path(folder) / "generation_config.json"))
    _ = config.vision_layers  # raises where these do not fit the declared depth
    return config


def _ends(path: Path) -> tuple[int | None, int]:
    """The id that ends an answer, None where none does, and the one that fills its row up and is never read."""
    given = read_json(path) if path.exists() else {}
    eos, pad = given.get("eos_token_id"), given.get("pad_token_id")
    if isinstance(eos, list):
        if len(eos) != 1:
            raise InputError(f"{path}: eos_token_id {eos} names {len(eos)} tokens; this network stops at one")
        eos = eos[0]
    return eos, eos or 0 if pad is None else pad


def _part(path: Path, name: str, part: object, kind: type):
    """One of the three configs in the file; a value must be of the kind that the field's default is."""
    if not isinstance(part, dict):
        raise InputError(f"{path} has no {name}")
    for key, value in FIXED[name].items():
        if part.get(key, value) != value:
            raise InputError(f"{path}: {name}.{key} = {part[key]!r}; this network computes {value!r} only")
    picked: dict = {}
    rope = part.get("rope_parameters") or {} if kind is TextConfig else {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{path}: rope_type {rope['rope_type']!r} is not supported, only 'default'")
    part = part | {key: value for key, value in rope.items() if key == "rope_theta"}
    for field in fields(kind):
        theirs = dict.fromkeys((RELEASED_NAMES.get(field.name, field.name), OTHER_NAMES.get(field.name, field.name)))
        values, like = [part[key] for key in theirs if part.get(key) is not None], field.default
        if not values:
            raise InputError(f"{path} lacks {' or '.join(theirs)}")
        if isinstance(like, tuple):
            good = isinstance(values[0], list) and values[0] and all(type(v) is int for v in values[0])
        else:
            good = type(values[0]) in ((int,) if isinstance(like, int) else (int, float)) and values[0] > 0
        if not good and not (field.name == "additional_vocab_size" and values[0] == 0):
            raise InputError(f"{path}: {next(iter(theirs))} must be like {like}, got {values[0]!r}")
        picked[field.name] = tuple(values[0]) if isinstance(like, tuple) else values[0]
    return kind(**picked)


def config_json(c: Config, dtype: torch.dtype) -> dict:
    """The released dialect of `config.json`; `read_config` reads it back to `c`."""

    def part(values: object, name: str, **more) -> dict:
        return {RELEASED_NAMES.get(key, key): value for key, value in asdict(values).items()} | FIXED[name] | more

    side = int(c.vision.num_position_embeddings**0.5) * c.vision.patch_size
    text = part(c.text, "text_config", model_type="molmo2_text")
    del text["attention_bias"]  # transformers' word for qkv_bias
    vision = {"image_default_input_size": [side, side], "num_key_value_heads": c.vision.num_attention_heads}
    connector = {"text_hidden_size": c.text.hidden_size, "num_key_value_heads": c.connector.num_attention_heads}
    whole = {"architectures": ["Molmo2ForConditionalGeneration"], "model_type": "molmo2", "tie_word_embeddings": False}
    whole |= {"dtype": str(dtype).removeprefix("torch."), "image_patch_id": c.image_patch_id, "text_config": text}
    whole["vit_config"] = part(c.vision, "vision_config", model_type="molmo2", **vision)
    return whole | {"adapter_config": part(c.connector, "adapter_config", model_type="molmo2", **connector)}


# -------------------------------------------------------------------------------------------------------------- weights


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


def load_backbone(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None, lm_head: bool = True
) -> Molmo2:
    """A checkpoint folder -> the network in eval mode, its weights frozen.

    dtype None = float32 on CPU, bfloat16 on CUDA. Files are memory-mapped and cast tensor by tensor: at no time is
    there a second copy of the model, on the host or on the device. A tensor that needs no cast on the CPU stays the
    mapped file. Without `lm_head` the vocabulary matrix is not read: scoring never needs it. What does not fit raises
    `InputError` with its name.
    """
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
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
        write_settings(model.config, model.dtype, new)
        for name in COMPANIONS:
            if (Path(companions) / name).exists():
                shutil.copyfile(Path(companions) / name, new / name)
        for path in also:
            shutil.copyfile(path, new / path.name)


def write_settings(config: Config, dtype: torch.dtype, folder: Path) -> None:
    """`config.json` and `generation_config.json`."""
    write_json(folder / "config.json", config_json(config, dtype))
    ids = {"bos_token_id": config.eos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    write_json(folder / "generation_config.json", ids)


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
