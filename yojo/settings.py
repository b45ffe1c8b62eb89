"""The JSON files of a checkpoint and of an adapter <-> our configs.

Two dialects of `config.json` are read, the released one (`vit_config`) and that of transformers 5 (`vision_config`);
the released one is written.

See it: `python -m yojo.checkpoint show weights/tiny`; `pytest tests/test_checkpoint.py tests/test_lora.py`.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from yojo.core.config import Config, ConnectorConfig, ImageConfig, Markup, TextConfig, VisionConfig
from yojo.core.lora import TARGETS, LoraConfig
from yojo.files import InputError, read_json, write_json

# ---------------------------------------------------------------------------------------------------------- config.json

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


def write_settings(config: Config, dtype: torch.dtype, folder: Path) -> None:
    """`config.json` and `generation_config.json`."""
    write_json(folder / "config.json", config_json(config, dtype))
    ids = {"bos_token_id": config.eos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    write_json(folder / "generation_config.json", ids)


# ------------------------------------------------------------------------------------------------------------ processor

PREPROCESSOR = {"patch": "patch_size", "margins": "overlap_margins", "max_crops": "max_crops"}
PREPROCESSOR |= {"pooling": "pooling_size", "mean": "image_mean", "std": "image_std"}  # our name: the file's


def read_image_config(folder: str | Path) -> ImageConfig:
    """`preprocessor_config.json`; the video window from `video_preprocessor_config.json` where there is one."""
    path, video = (Path(folder) / name for name in ("preprocessor_config.json", "video_preprocessor_config.json"))
    raw = read_json(path)
    try:
        size, resample = raw["size"], raw.get("resample", 2)
        if size["height"] != size["width"] or resample != 2:
            raise InputError(f"{path}: views must be square and resampled bilinearly (2), got {size} and {resample}")
        given = {ours: raw[theirs] for ours, theirs in PREPROCESSOR.items()} | {"size": size["height"]}
        window = read_json(video).get("pooling_size") if video.exists() else None
        given["video_pooling"] = window or ImageConfig.video_pooling
        pairs = {f.name: tuple(given[f.name]) for f in fields(ImageConfig) if isinstance(f.default, tuple)}
        return ImageConfig(**given | pairs)
    except KeyError as missing:
        raise InputError(f"{path} lacks {missing}") from None
    except TypeError as error:
        raise InputError(f"{path} has a value of the wrong kind: {error}") from None


def preprocessor_json(c: ImageConfig) -> dict:
    """What `read_image_config` reads back to `c`, but for the window of videos, which has a file of its own."""
    ours = {theirs: getattr(c, name) for name, theirs in PREPROCESSOR.items()}
    return {"size": {"height": c.size, "width": c.size}, **ours, "resample": 2}


def read_markup(folder: str | Path) -> Markup:
    """The five flags, each at its default where the file, or the flag in it, is missing."""
    path = Path(folder) / "processor_config.json"
    raw = read_json(path) if path.exists() else {}
    return Markup(**{k: raw[k] for k in Markup.__dataclass_fields__ if raw.get(k) is not None})


# -------------------------------------------------------------------------------------------------------------- adapter

# What PEFT can write and `lora.py` does not compute, with the value under which both mean the same.
OFF = "modules_to_save layers_to_transform layer_replication exclude_modules alora_invocation_tokens".split()
PLAIN = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False}
PLAIN |= {"rank_pattern": {}, "alpha_pattern": {}, **dict.fromkeys(OFF)}


def read_adapter_config(folder: str | Path) -> LoraConfig:
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
