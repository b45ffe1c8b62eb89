"""The reward model: a backbone with an adapter, and a small head that reads one number per response.

    hidden = backbone(prompt + responses)             encode: one pass over all N responses
    h_i    = hidden at the last token of response i   gather: positions known from the prompt, never searched
    s_i    = (w2 silu(W1 h_i + b1) + b2) / sqrt(D)    score: in at least float32

No logits are ever computed. A saved reward model is a folder: the adapter in PEFT's files, `value_head.safetensors`,
and `reward_model_config.json`, which names the base (relative to the folder), its fingerprint, the separator's id, the
layout and the mode; a base that is not the one it was trained on is refused.

`RewardModel.load` also reads what the released training code writes (yinuoy/MR2-Molmo2-4B-RM): the merged folder, a
checkpoint with `value_head.pt` beside it, and an unmerged run, a PEFT adapter with `value_head.pt`. Both are read in
layout "released" (`prompt.py`), joint.

    rm = RewardModel.load("weights/tiny-rm")
    rm.score("Describe the star.", ["a small red star, ...", "..."], image="picture.png")

See it: `tests/test_single_pass.py` proves that one pass equals N passes; `python -m yojo.score --tiny`.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from yojo.core import lora, ops
from yojo.core.data import Batch, collate
from yojo.core.mask import MODES
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import SEPARATOR, Encoded, Processor
from yojo.files import InputError, read_json, read_pickle, read_tensors, whole_folder, write_json
from yojo.weights import fingerprint, load_backbone

ADAPTER = "reward"
MOST_INNER = 65_536  # hidden units of a head: beyond this a file is not believed, since it would cost memory
WINDOW, WINDOW_TOKENS = 256, 32_768  # among so many records, or so many tokens of them, those of like length are found
BATCH_TOKENS = 4096
CONFIG, HEAD, RELEASED_HEAD = "reward_model_config.json", "value_head.safetensors", "value_head.pt"
# What the released config may say of its head, with the only value this one computes.
RELEASED = {"value_head_type": "mlp", "value_head_activation": "silu", "resp_repr_mode": "last"}


class ValueHead(nn.Sequential):
    """hidden [..., D] -> score [...]; an MLP with SiLU over sqrt(D)."""

    def __init__(self, width: int, inner: int, generator: torch.Generator | None = None):
        super().__init__(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, 1))
        for layer in (self[0], self[2]):
            nn.init.normal_(layer.weight, std=0.01, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        # s = (w2 silu(W1 h + b1) + b2) / sqrt(D)
        return super().forward(hidden.to(self[0].weight.dtype)).squeeze(-1) / math.sqrt(hidden.shape[-1])


class RewardModel(nn.Module):
    """`mode` is the attention it was trained with; `base` the folder its backbone came from, `fingerprint` that
    backbone's. A backbone that carries no adapter "reward" judges as it is: a merged model."""

    def __init__(
        self,
        backbone: Molmo2,
        processor: Processor,
        head: ValueHead,
        mode: str,
        base: Path,
        fingerprint: dict[str, str],
    ):
        super().__init__()
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is none of {MODES}")
        self.backbone, self.processor, self.head = backbone, processor, head
        self.mode, self.base, self.fingerprint = mode, base, fingerprint
        self.adapter = ADAPTER if ADAPTER in lora.adapters(backbone) else None

    @classmethod
    def new(
        cls,
        base: str | Path,
        mode: str,
        config: lora.LoraConfig,
        inner: int = 1024,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> "RewardModel":
        """An untrained one on the checkpoint in `base`: fresh adapter, fresh head of `inner` hidden units."""
        generator = torch.Generator().manual_seed(seed)
        backbone, processor, digest = open_base(base, dtype, device)
        lora.add(backbone, ADAPTER, config, generator)
        head = ValueHead(backbone.config.text.hidden_size, inner, generator)
        head.to(backbone.device, torch.promote_types(backbone.dtype, torch.float32))
        return cls(backbone, processor, head, mode, Path(base), digest)

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters and the head's; everything else is frozen."""
        return [*lora.parameters(self.backbone, ADAPTER), *self.head.parameters()]

    def merge(self) -> None:
        """Fold the adapter into the backbone: scores the same but for rounding, faster, and learns no more."""
        lora.merge(self.backbone, ADAPTER)
        self.adapter = None

    def forward(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Scores [R] in at least float32, one a response, in the order of the batch's records.

        features [M, D]: what `see` made of the batch's pictures; None = look at them now.
        """
        if features is None and batch.pictures is not None:
            features = self.backbone.see(batch.pictures.patches, batch.pictures.pooling)
        ids, mask, positions, read = batch.input_ids, batch.mask, batch.positions, batch.read
        return self.head(self.backbone(ids, features, mask, positions, read, adapter=self.adapter))

    @torch.no_grad()
    def score(
        self,
        prompt: str,
        responses: Sequence[str],
        image: "str | Path | Image.Image | Sequence | None" = None,
        video: "str | Path | Sequence[tuple[float, Image.Image]] | None" = None,
        mode: str | None = None,
    ) -> list[float]:
        """One score per response, in input order, from one forward pass.

        image: a path, a Pillow picture or a list of them; video: a folder of frames, an animation, or a list of
        (seconds, frame). mode None = the one the model was trained in. Scores of one call compare with each other;
        joint scores of different calls do not.
        """
        if not responses:
            raise InputError("there are no responses: at least one is needed")
        return self.score_encoded([self.processor.encode(prompt, responses, image, video)], mode)[0]

    @torch.no_grad()
    def score_encoded(
        self, records: Sequence[Encoded], mode: str | None = None, features: Tensor | None = None
    ) -> list[list[float]]:
        """Scores of several encoded records, read in one batch. Long ones, which are computed run by run anyway,
        stand in one row, which needs no padding."""
        rows = [records] if ops.by_runs(max(len(e.ids) for e in records)) else records
        batch = collate(rows, mode or self.mode, self.backbone.config.pad_id).to(self.backbone.device)
        return [s.tolist() for s in self(batch, features).split(batch.counts)]

    def score_all(
        self, records: Iterable[Encoded], mode: str | None = None, tokens: int = BATCH_TOKENS
    ) -> Iterator[list[float]]:
        """Scores of any number of records, in their order: records of like length share a batch of at most `tokens`
        tokens, padding counted. At most WINDOW records are held at a time, and fewer of many tokens; where the next
        one can't be had, those before it are scored first."""
        records, error = iter(records), None
        while error is None:
            window: list[Encoded] = []
            held = 0
            try:
                while len(window) < WINDOW and held < WINDOW_TOKENS:
                    window.append(next(records))
                    held += len(window[-1].ids)
            except (StopIteration, InputError) as end:
                error = end
            yield from self._score_window(window, mode, tokens)
        if isinstance(error, InputError):
            raise error

    def _score_window(self, window: list[Encoded], mode: str | None, tokens: int) -> list[list[float]]:
        scores: list[list[float]] = [[]] * len(window)
        for batch in batches([len(e.ids) for e in window], tokens):
            for i, row in zip(batch, self.score_encoded([window[i] for i in batch], mode), strict=True):
                scores[i] = row
        return scores

    # -------------------------------------------------------------------------------------------------------- files

    def save(self, folder: str | Path, overwrite: bool = False, also: Sequence[Path] = ()) -> None:
        """Write the folder, whole or not at all, with copies of the files in `also`. The base is not copied: its
        relative path and fingerprint are kept."""
        folder = Path(folder)
        config = {
            "format": "yojo",
            "base": os.path.relpath(self.base.resolve(), folder.resolve()),
            "fingerprint": self.fingerprint,
            "separator": SEPARATOR,
            "separator_id": self.processor.tokenizer.separator_id,
            "layout": self.processor.layout,
            "mode": self.mode,
            "value_head_hidden_dim": self.head[0].out_features,
        }
        with whole_folder(folder, overwrite) as new:
            lora.save(self.backbone, ADAPTER, new)
            save_file({k: v.detach().contiguous() for k, v in self.head.state_dict().items()}, new / HEAD)
            write_json(new / CONFIG, config)
            for path in also:
                shutil.copy(path, new)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        lm_head: bool = False,
    ) -> "RewardModel":
        """A saved reward model, in eval mode: ours, a released merged one, or a PEFT run of the released code.

        base None = where the folder says it is; dtype, device and lm_head, which only a policy on the same backbone
        needs, as in `load_backbone`. Anything that does not fit what was saved raises `InputError`.
        """
        folder = Path(folder)
        config = read_json(folder / CONFIG)
        if "value_head_type" in config:
            return cls._load_released(folder, config, base, dtype, device, lm_head)
        _check_ours(folder / CONFIG, config)
        base = folder / config["base"] if base is None else Path(base)
        if not base.is_dir():
            raise InputError(f"{folder} was trained on a base at {base}, and there is none: pass its folder as `base`")
        backbone, processor, digest = open_base(base, dtype, device, config["layout"], lm_head)
        for part in ("weights", "tokenizer"):
            if digest[part] != config["fingerprint"].get(part):
                raise InputError(
                    f"{folder} was trained on another base: the {part} in {base} are not the ones it remembers"
                )
        if processor.tokenizer.separator_id != config["separator_id"]:
            raise InputError(
                f"{folder} uses separator id {config['separator_id']}, the tokenizer in {base} gives "
                f"{processor.tokenizer.separator_id}"
            )
        lora.load(backbone, ADAPTER, folder)
        head = _empty_head(backbone, config["value_head_hidden_dim"])
        head.load_state_dict(read_tensors(folder / HEAD, {k: v.shape for k, v in head.state_dict().items()}))
        return cls(backbone, processor, head, config["mode"], base, digest).requires_grad_(False).eval()

    @classmethod
    def _load_released(
        cls, folder: Path, config: dict, base: str | Path | None, dtype: torch.dtype | None, device, lm_head: bool
    ) -> "RewardModel":
        for key, only in RELEASED.items():
            if config.get(key) != only:
                raise InputError(f"{folder / CONFIG}: {key} = {config.get(key)!r} is not supported, only {only!r}")
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
        backbone, processor, digest = open_base(base, dtype, device, "released", lm_head)
        if unmerged:
            lora.load(backbone, ADAPTER, folder)
        head = _empty_head(backbone, inner)
        head.load_state_dict(read_pickle(folder / RELEASED_HEAD, {k: v.shape for k, v in head.state_dict().items()}))
        return cls(backbone, processor, head, "joint", Path(base), digest).requires_grad_(False).eval()


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of rows by length, longest first, cut into batches whose padded size is at most `tokens`; a longer row
    stands alone."""
    order, out = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    while order:
        rows = max(1, tokens // lengths[order[0]])
        out.append(order[:rows])
        order = order[rows:]
    return out


def digest(folder: str | Path) -> str:
    """One digest of a saved reward model's adapter, head and config."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in (CONFIG, HEAD, RELEASED_HEAD, "adapter_config.json", "adapter_model.safetensors"):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def _empty_head(backbone: Molmo2, inner: int) -> ValueHead:
    if inner > MOST_INNER:
        raise InputError(f"value_head_hidden_dim {inner} in {CONFIG}: at most {MOST_INNER}")
    head = ValueHead(backbone.config.text.hidden_size, inner)
    return head.to(backbone.device, torch.promote_types(backbone.dtype, torch.float32))


def _check_ours(path: Path, config: dict) -> None:
    kinds = {"base": str, "fingerprint": dict, "separator_id": int, "mode": str, "value_head_hidden_dim": int}
    kinds |= {"layout": str}
    wrong = [key for key, kind in kinds.items() if type(config.get(key)) is not kind]
    wrong += [key for key in ("separator_id", "value_head_hidden_dim") if key not in wrong and config[key] < 1]
    if config.get("format") != "yojo" or wrong:
        raise InputError(f"{path} is no reward model of this project: {', '.join(wrong) or 'format'} missing or wrong")


def open_base(
    base: str | Path,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    layout: str = "default",
    lm_head: bool = False,
) -> tuple[Molmo2, Processor, dict[str, str]]:
    """Backbone with a row for the separator, processor, fingerprint."""
    backbone = load_backbone(base, dtype, device or "cpu", lm_head)
    processor = Processor.from_folder(base, backbone.config.text.max_position_embeddings, layout)
    views, tower = processor.images, backbone.config.vision
    if (views.patch, views.side**2) != (tower.patch_size, tower.num_position_embeddings):
        raise InputError(
            f"{base}: preprocessor_config.json cuts views into {views.side**2} patches of {views.patch} pixels, the "
            f"vision tower reads {tower.num_position_embeddings} of {tower.patch_size}"
        )
    digest = fingerprint(backbone, processor.tokenizer.path)
    place_separator(backbone, processor.tokenizer.separator_id)
    return backbone, processor, digest


def place_separator(backbone: Molmo2, separator_id: int) -> None:
    """Make sure the table has the separator's row. One that is there is used as it is, as in the release; one that is
    just missing is appended as zeros; it is frozen either way."""
    wte, c = backbone.model.transformer.wte, backbone.config
    height = len(wte.embedding)
    if separator_id > height:
        raise InputError(
            f"the separator's id {separator_id} lies {separator_id - height} beyond the {height} embedding rows"
        )
    if separator_id == height:
        grown = torch.cat([wte.embedding.detach(), torch.zeros_like(wte.embedding[:1])])
        wte.embedding = nn.Parameter(grown, requires_grad=False)
        text = replace(c.text, additional_vocab_size=c.text.additional_vocab_size + 1)
        backbone.config = replace(c, text=text)
