"""The JSON files of a checkpoint and of an adapter <-> our configs.

A key that is known is computed, checked or refused. One that is not known must say nothing: null, false, 0, nothing, or
the value that its library writes by default. Any other might change what the network computes, so it is refused by
name.

Two dialects of `config.json` are read, the released one (`vit_config`) and that of transformers 5 (`vision_config`);
the released one is written.

See it: `python -m yojo.checkpoint show weights/tiny`; `pytest tests/test_checkpoint.py tests/test_settings.py`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from yojo.core.config import Config, ConnectorConfig, ImageConfig, Markup, TextConfig, VisionConfig
from yojo.core.lora import TARGETS, LoraConfig
from yojo.core.prompt import Processor
from yojo.files import InputError, read_json, write_json


def check_keys(raw: Mapping, where: str, read: Iterable[str], only: Mapping[str, object]) -> None:
    """Refuse what nobody reads. `read`: keys that are read, or change nothing; `only`: the one value of others."""
    for key, value in raw.items():
        if key in only:
            if value != only[key] and (value or only[key]):  # null, false and nothing are one
                raise InputError(f"{where}: {key} = {value!r} is not supported, only {only[key]!r}")
        elif value and key not in read:
            raise InputError(f"{where}: {key} = {value!r} is not supported: nothing here computes it")


LARGEST = 1e18  # no number of a settings file is larger


def typed(value: object, like: object, where: str):
    """A value of the kind that `like` is: a flag, a number above 0, or a list of numbers, which becomes a tuple."""
    if isinstance(like, tuple):
        good = isinstance(value, list) and value and all(type(v) in (int, type(like[0])) for v in value)
        good = good and all(-LARGEST < v < LARGEST for v in value)
    elif isinstance(like, bool):
        good = type(value) is bool
    else:
        good = type(value) in (int, type(like)) and 0 < value < LARGEST
    if not good:
        raise InputError(f"{where} must be like {like}, got {value!r}")
    return tuple(value) if isinstance(like, tuple) else value


# ---------------------------------------------------------------------------------------------------------- config.json

# Our fields carry the names of config.json; where its two dialects differ from ours or from one another:
RELEASED_NAMES = {"rms_norm_eps": "layer_norm_eps", "patch_size": "image_patch_size"}
RELEASED_NAMES["num_position_embeddings"] = "image_num_pos"
OTHER_NAMES = {"vit_layers": "vision_feature_layer"}
KINDS = {"text_config": TextConfig, "vision_config": VisionConfig, "adapter_config": ConnectorConfig}
# Switches of the family that this network does not have, with the only value it computes.
FIXED_TEXT = {"hidden_act": "silu", "qk_norm_type": "qwen3", "use_qk_norm": True, "qkv_bias": False}
FIXED_TEXT |= {"norm_after": False, "rope_scaling": None}
FIXED = {
    "text_config": FIXED_TEXT,
    "vision_config": {"hidden_act": "gelu_pytorch_tanh"},
    "adapter_config": {"hidden_act": "silu", "pooling_attention_mask": True},
}
# What transformers says, the release does not, and this network computes in one way.
THEIRS = {"mlp_bias": False, "num_channels": 3, "partial_rotary_factor": 1.0, "is_causal": True}
THEIRS["tie_word_embeddings"] = False
# Where a config comes from, how it is computed and handed back, how training starts, a width that the tensors hold.
FREE = "architectures attn_implementation auto_map dtype float32_attention id2label initializer_range label2id"
FREE += " model_type num_labels output_attentions output_hidden_states problem_type return_dict text_hidden_size"
FREE = {"torch_dtype", *FREE.split(), "_name_or_path", "transformers_version", "use_cache"}
ENDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
TOKEN_IDS = {
    "image_start_token_id": "<im_start>",
    "image_end_token_id": "<im_end>",
    "image_patch_id": "<im_patch>",
    "image_high_res_id": "<im_patch>",
    "image_col_id": "<im_col>",
    "image_low_res_id": "<im_low>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}


def read_config(folder: str | Path) -> Config:
    """`config.json`, either dialect, and the end and padding ids of `generation_config.json` where there is one."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "molmo2":
        raise InputError(f"{path}: model_type is {raw.get('model_type')!r}, this network is 'molmo2'")
    if raw.get("vit_config") and raw.get("vision_config"):
        raise InputError(f"{path} has both vit_config and vision_config: keep one")
    check_keys(raw, str(path), {*KINDS, "vit_config", "use_frame_special_tokens", *TOKEN_IDS, *ENDS, *FREE}, THEIRS)
    parts = raw | {"vision_config": raw.get("vit_config") or raw.get("vision_config")}
    text, vision, connector = (_part(path, name, parts.get(name), kind) for name, kind in KINDS.items())
    patch_id = raw.get("image_patch_id")
    if type(patch_id) is not int:
        raise InputError(f"{path}: image_patch_id must be a token id, got {patch_id!r}")
    if text.num_attention_heads % text.num_key_value_heads:
        raise InputError(f"{path}: key/value heads must divide the query heads, got {text}")
    config = Config(text, vision, connector, patch_id, *_ends(path, raw))
    try:
        _ = config.vision_layers
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for name, more in implied(config).items():
        also = THEIRS | {"attention_bias": name != "text_config", "image_size": more.get(IMAGE_SIZE)}
        if (types := parts[name].get("layer_types")) == ["full_attention"] * min(text.num_hidden_layers, 10_000):
            also["layer_types"] = types
        names = {field.name for field in fields(KINDS[name])}
        names |= {table.get(key, key) for key in names for table in (RELEASED_NAMES, OTHER_NAMES)}
        names |= {"rope_parameters", "rope_scaling_layers", *ENDS} if name == "text_config" else set()
        check_keys(parts[name], f"{path}: {name}", names | FREE, also | FIXED[name] | more)
    return config


def _ends(path: Path, raw: dict) -> tuple[tuple[int, ...], int]:
    """The ids that end an answer, and the one that fills its row up and is never read: of `generation_config.json`, or
    else of the config, or else of its text part."""
    beside = path.with_name("generation_config.json")
    files = [raw["text_config"], raw, read_json(beside) if beside.exists() else {}]
    given = {key: file[key] for file in files for key in ENDS if file.get(key) is not None}
    eos, pad = given.get("eos_token_id"), given.get("pad_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and token >= 0 for token in [*eos, *([] if pad is None else [pad])]):
        raise InputError(f"{path.parent}: eos_token_id and pad_token_id must be token ids, got {eos} and {pad!r}")
    return tuple(eos), (eos[0] if eos else 0) if pad is None else pad


def _part(path: Path, name: str, part: object, kind: type):
    """One of the three configs in the file; a value must be of the kind that the field's default is."""
    if not isinstance(part, dict):
        raise InputError(f"{path} has no {name}")
    rope = part.get("rope_parameters") or {} if kind is TextConfig else {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: {name}.rope_parameters must be an object, got {rope!r}")
    plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
    check_keys(rope, f"{path}: {name}.rope_parameters", {"rope_theta"}, plain)
    picked: dict = {}
    for field in fields(kind):
        names = dict.fromkeys((RELEASED_NAMES.get(field.name, field.name), OTHER_NAMES.get(field.name, field.name)))
        values = [where[key] for where in (part, rope) for key in names if where.get(key) is not None]
        if not values:
            raise InputError(f"{path} lacks {' or '.join(names)}")
        if any(value != values[0] for value in values):
            raise InputError(f"{path}: {name} says both {values[0]!r} and {values[-1]!r} for {' or '.join(names)}")
        zero = field.name == "additional_vocab_size" and values[0] == 0
        picked[field.name] = 0 if zero else typed(values[0], field.default, f"{path}: {next(iter(names))}")
    return kind(**picked)


IMAGE_SIZE = "image_default_input_size"


def implied(c: Config) -> dict[str, dict]:
    """Of each part, what other numbers of the config say already."""
    side = math.isqrt(c.vision.num_position_embeddings) * c.vision.patch_size
    vision = {IMAGE_SIZE: [side, side], "num_key_value_heads": c.vision.num_attention_heads}
    connector = {"num_key_value_heads": c.connector.num_attention_heads}
    return {"text_config": {}, "vision_config": vision, "adapter_config": connector}


def config_json(c: Config, dtype: torch.dtype, processor: Processor) -> dict:
    """The released dialect of `config.json`; `read_config` reads it back to `c`. The processor names the ids of picture
    tokens, which other readers of the file look up there."""

    def part(values: object, name: str, model_type: str = "molmo2") -> dict:
        numbers = {RELEASED_NAMES.get(key, key): value for key, value in asdict(values).items()}
        return numbers | FIXED[name] | {"model_type": model_type} | implied(c)[name]

    whole = {"architectures": ["Molmo2ForConditionalGeneration"], "model_type": "molmo2", "tie_word_embeddings": False}
    whole |= {key: processor.tokenizer.id(name) for key, name in TOKEN_IDS.items()}
    whole |= {"image_patch_id": c.image_patch_id, "dtype": str(dtype).removeprefix("torch.")}
    whole["use_frame_special_tokens"] = processor.markup.use_frame_special_tokens
    whole["text_config"] = part(c.text, "text_config", "molmo2_text")
    whole["vit_config"] = part(c.vision, "vision_config")
    whole["adapter_config"] = part(c.connector, "adapter_config") | {"text_hidden_size": c.text.hidden_size}
    return whole


def write_settings(config: Config, dtype: torch.dtype, folder: Path) -> None:
    """`config.json` and `generation_config.json` of a folder that has its tokenizer and its processor's files."""
    processor = Processor.from_folder(folder, config.text.max_position_embeddings)
    write_json(folder / "config.json", config_json(config, dtype, processor))
    first, *more = config.eos_ids or (None,)
    ids = {"bos_token_id": first, "eos_token_id": [first, *more] if more else first, "pad_token_id": config.pad_id}
    write_json(folder / "generation_config.json", ids)


def check_tokens(folder: str | Path, processor: Processor) -> None:
    """The picture tokens that `config.json` names must be the tokenizer's, and the frames' the processor's."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    found = {key: processor.tokenizer.id(name) for key, name in TOKEN_IDS.items() if raw.get(key) is not None}
    if raw.get("use_frame_special_tokens") is not None:
        found["use_frame_special_tokens"] = processor.markup.use_frame_special_tokens
    for key, value in found.items():
        if raw[key] != value:
            raise InputError(f"{path}: {key} is {raw[key]!r}, but the tokenizer's and processor's files say {value!r}")


# ------------------------------------------------------------------------------------------------------------ processor

PREPROCESSOR = {"patch": "patch_size", "margins": "overlap_margins", "max_crops": "max_crops"}
PREPROCESSOR |= {"pooling": "pooling_size", "mean": "image_mean", "std": "image_std"}  # our name: the file's
STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 2}
# Names and ways of passing tensors; and how others choose frames of a video, which here `video.py` does.
UNUSED = "auto_map data_format default_to_square do_convert_rgb image_processor_type processor_class"
UNUSED = {*UNUSED.split(), "video_processor_type"}
SAMPLING = set("do_sample_frames fps frame_sample_mode max_fps num_frames return_metadata sampling_fps".split())


def read_image_config(folder: str | Path) -> ImageConfig:
    """`preprocessor_config.json` and, for the window of videos, `video_preprocessor_config.json`; or what stands in
    place of either in `processor_config.json`, where transformers 5 writes them."""
    files = _processor_files(folder, "preprocessor_config.json", "image_processor")
    if not files:
        raise InputError(f"{Path(folder) / 'preprocessor_config.json'} does not exist")
    c = _only([(path, _image_config(path, raw)) for path, raw in files])
    files = _processor_files(folder, "video_preprocessor_config.json", "video_processor")
    window = _only([(path, _video_window(path, raw, c)) for path, raw in files])
    return c if window is None else replace(c, video_pooling=window)


def _image_config(path: str, raw: dict) -> ImageConfig:
    if lacking := [key for key in ("size", *PREPROCESSOR.values()) if key not in raw]:
        raise InputError(f"{path} lacks {lacking[0]}")
    check_keys(raw, path, {"size", *PREPROCESSOR.values(), *UNUSED}, STEPS)
    given = {ours: typed(raw[key], getattr(ImageConfig, ours), f"{path}: {key}") for ours, key in PREPROCESSOR.items()}
    c = ImageConfig(size=_side(raw["size"], path), **given)
    if not _fits(c):
        raise InputError(f"{path}: views of {c.size} pixels cannot be cut so: {c}")
    return c


def _video_window(path: str, raw: dict, c: ImageConfig) -> tuple[int, int] | None:
    """How frames are pooled, where it is said. In all else they must be cut as images are."""
    same = {"size": {"height": c.size, "width": c.size}, "patch_size": c.patch}
    same |= {"image_mean": list(c.mean), "image_std": list(c.std)}
    check_keys(raw, path, {"pooling_size", *UNUSED, *SAMPLING}, STEPS | same)
    if raw.get("pooling_size") is None:
        return None
    window = typed(raw["pooling_size"], ImageConfig.video_pooling, f"{path}: pooling_size")
    if len(window) != 2 or min(window) < 1:
        raise InputError(f"{path}: pooling_size must be two numbers from 1, got {window}")
    return window


def _processor_files(folder: str | Path, name: str, key: str) -> list[tuple[str, dict]]:
    """A file, and the same under `key` in `processor_config.json` -> (where it stands, what it holds) of those there
    are."""
    path, whole = Path(folder) / name, Path(folder) / "processor_config.json"
    inside = read_json(whole).get(key) if whole.exists() else None
    if not isinstance(inside, (dict, type(None))):
        raise InputError(f"{whole}: {key} must be an object, got {inside!r}")
    files = [(str(path), read_json(path))] if path.exists() else []
    return files + ([] if inside is None else [(f"{whole}: {key}", inside)])


def _only(read: list[tuple[str, object]]) -> object:
    """What all places say."""
    if len(read) > 1 and read[0][1] != read[1][1]:
        raise InputError(f"{read[0][0]} and {read[1][0]} differ: keep one")
    return read[0][1] if read else None


def _side(size: object, path: str) -> int:
    sides = [size.get(name) for name in ("height", "width")] if isinstance(size, dict) else [None]
    if type(sides[0]) is not int or sides[0] < 1 or sides[0] != sides[-1]:
        raise InputError(f"{path}: views must be square, a height and a width in pixels, got {size!r}")
    return sides[0]


def _fits(c: ImageConfig) -> bool:
    pairs = len(c.margins) == len(c.pooling) == 2 and len(c.mean) == len(c.std) == 3
    return pairs and c.size % c.patch == 0 and min(c.margins) >= 0 and c.window > 0 and min(*c.pooling, *c.std) > 0


def preprocessor_json(c: ImageConfig) -> dict:
    """What `read_image_config` reads back to `c`, but for the window of videos, which has a file of its own."""
    ours = {theirs: getattr(c, name) for name, theirs in PREPROCESSOR.items()}
    return {"size": {"height": c.size, "width": c.size}, **ours, "resample": 2}


def read_markup(folder: str | Path) -> Markup:
    """The five flags, each at its default where the file, or the flag in it, is missing."""
    path, flags = Path(folder) / "processor_config.json", Markup.__dataclass_fields__
    raw = read_json(path) if path.exists() else {}
    check_keys(raw, str(path), {*flags, "image_processor", "video_processor", *UNUSED}, {})
    given = {name: raw[name] for name in flags if name in raw}
    if given.get("use_single_crop_col_tokens", False) is None:  # transformers: as in the crops
        given["use_single_crop_col_tokens"] = given.get("image_use_col_tokens", Markup.image_use_col_tokens)
    return Markup(**{name: typed(value, True, f"{path}: {name}") for name, value in given.items()})


# -------------------------------------------------------------------------------------------------------------- adapter

ADAPTER_READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights"}
ADAPTER_FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
ADAPTER_FREE |= {"megatron_core", "qalora_group_size"}  # which say something only beside keys that are refused
ADAPTER_ONLY = {"peft_type": "LORA", "bias": "none"}
STARTS = (True, False, "gaussian", "orthogonal")  # others, such as PiSSA, change the base


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """PEFT's `adapter_config.json`, of plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    check_keys(raw, str(path), ADAPTER_READ | ADAPTER_FREE, ADAPTER_ONLY)
    if lacking := [key for key in ("r", "lora_alpha", "lora_dropout", "target_modules") if key not in raw]:
        raise InputError(f"{path} has no {lacking[0]!r}: is this a PEFT LoRA adapter?")
    if (start := raw.get("init_lora_weights", True)) not in STARTS:
        raise InputError(f"{path}: init_lora_weights = {start!r} is not supported, only {', '.join(map(str, STARTS))}")
    r, alpha = (typed(raw[key], like, f"{path}: {key}") for key, like in (("r", 1), ("lora_alpha", 1.0)))
    dropout, names = raw["lora_dropout"], raw["target_modules"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout must be in [0, 1), got {dropout!r}")
    if not isinstance(names, list) or not names or set(map(str, names)) - set(TARGETS):
        raise InputError(f"{path}: target_modules must be among {sorted(TARGETS)}, got {names!r}")
    return LoraConfig(r, float(alpha), dropout, tuple(sorted(set(names))))
