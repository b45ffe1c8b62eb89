"""The reward model: a backbone with an adapter, and a small head that reads one number per response.

    hidden = backbone(prompt + responses)             encode: one pass over all N responses
    h_i    = hidden at the last token of response i   gather: positions are constructed, never searched
    s_i    = (w2 silu(W1 h_i + b1) + b2) / sqrt(D)    score: in at least float32

The gather happens inside the last block (`keep` in `molmo2.py`), since nothing else is needed beyond it. No logits are
ever computed. `collate` in `data.py` makes the batch and says where scores are read. `new`, `load` and
`save` ask `store.py`, which knows the files.

    rm = RewardModel.load("weights/tiny-rm")
    rm.score("Describe the star.", ["a small red star, ...", "..."], image="picture.png")

See it: `tests/test_single_pass.py` proves that one pass equals N passes; `python -m yojo.score --tiny`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from yojo.core import lora, ops
from yojo.core.data import Batch, collate
from yojo.core.mask import MODES
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Encoded, Images, Processor
from yojo.files import InputError
from yojo.video import Video

ADAPTER = "reward"
WINDOW, WINDOW_TOKENS = 256, 32_768  # rows, or their tokens, that are read ahead and sorted by length
LOOKED_AHEAD = 16  # rows that are made while a window is scored
BATCH_TOKENS = 4096


class ValueHead(nn.Sequential):
    """hidden [..., D] -> score [...]; an MLP with SiLU, its output divided by sqrt(D)."""

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
    backbone's. A backbone without an adapter "reward" is used as it is: a merged model."""

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
        from yojo import store

        generator = torch.Generator().manual_seed(seed)
        backbone, processor, digest = store.open_base(base, dtype=dtype, device=device, lm_head=False)
        lora.add(backbone, ADAPTER, config, generator)
        head = ValueHead(backbone.config.text.hidden_size, inner, generator)
        head.to(backbone.device, torch.promote_types(backbone.dtype, torch.float32))
        return cls(backbone, processor, head, mode, Path(base), digest)

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters and the head's; everything else was frozen when it was loaded."""
        return [*lora.parameters(self.backbone, ADAPTER), *self.head.parameters()]

    def merge(self) -> None:
        """Merge the adapter into the backbone: the same scores but for rounding, faster; no more training."""
        lora.merge(self.backbone, ADAPTER)
        self.adapter = None

    def forward(self, batch: Batch) -> Tensor:
        """Scores [R] in at least float32, one a response, in the order of the batch's records. Computed in the model's
        own dtype: an `autocast` outside would round scores to those that bfloat16 has."""
        with torch.autocast(self.backbone.device.type, enabled=False):
            inputs = batch.input_ids, self.backbone.encode_images(batch.pictures), batch.mask, batch.positions
            return self.head(self.backbone(*inputs, keep=batch.score_positions, adapter=self.adapter))

    def score(
        self, prompt: str, responses: Iterable[str], image: Images = None, video: Video = None, mode: str | None = None
    ) -> list[float]:
        """One score per response, in input order, from one forward pass.

        image: a path, a Pillow picture, an array of uint8 or a list of them; video: a folder of frames, an animation,
        or a list of frames or of (seconds, frame). mode None = the one the model was trained in. Scores of one call
        compare with each other; joint scores of different calls do not.
        """
        row = self.processor.encode(prompt, responses, image, video)
        if not row.spans:
            raise InputError("there are no responses: at least one is needed")
        return self.score_encoded([row], mode)[0]

    def score_encoded(self, rows: Sequence[Encoded], mode: str | None = None) -> list[list[float]]:
        """Scores of several records' rows, in one batch. Scores that are not finite raise `InputError`."""
        return [finite(row, some) for row, some in zip(rows, self.raw_scores(rows, mode), strict=True)]

    @torch.no_grad()
    def raw_scores(self, rows: Sequence[Encoded], mode: str | None) -> list[list[float]]:
        """Scores, finite or not. In isolated mode equal texts of a record are read once and share their score: read
        twice they would differ by rounding. Long records, computed run by run anyway, are packed into one
        row, which needs no padding."""
        mode = self.mode if mode is None else mode
        rows, places = zip(*(row.distinct() if mode == "isolated" else (row, None) for row in rows), strict=True)
        together = [rows] if ops.by_runs(max(len(row.ids) for row in rows)) else rows
        batch = collate(together, mode, self.backbone.config.pad_id, self.backbone.device)
        scores = [s.tolist() for s in self(batch).cpu().split(batch.counts)]
        return [some if at is None else [some[i] for i in at] for some, at in zip(scores, places, strict=True)]

    def score_all(
        self, rows: Iterable[Encoded], mode: str | None = None, tokens: int = BATCH_TOKENS
    ) -> Iterator[list[float]]:
        """Scores of any number of rows, in their order: rows of like length share a batch of at most `tokens`
        tokens, padding counted. At most WINDOW rows are held at a time, and fewer of many tokens; where the next
        one can't be had, those before it are scored first."""
        rows, error = iter(rows), None
        while error is None:
            window, held = [], 0
            try:
                while len(window) < WINDOW and held < WINDOW_TOKENS:
                    window.append(next(rows))
                    held += len(window[-1].ids)
            except (StopIteration, InputError) as end:
                error = end
            yield from self._score_window(window, mode, tokens)
        if isinstance(error, InputError):
            raise error

    def _score_window(self, window: list[Encoded], mode: str | None, tokens: int) -> Iterator[list[float]]:
        scores, given = {}, 0
        for batch in batches([len(e.ids) for e in window], tokens):
            scores |= zip(batch, self.raw_scores([window[i] for i in batch], mode), strict=True)
            while given in scores:  # each as soon as those before it are there
                yield finite(window[given], scores[given])
                given += 1

    def save(self, folder: str | Path, overwrite: bool = False, also: Sequence[Path] = ()) -> None:
        """Write the folder, whole or not at all, with copies of the files in `also`. The base is not copied: its
        relative path and fingerprint are kept."""
        from yojo import store

        store.save_reward_model(self, folder, overwrite, also)

    @classmethod
    def load(cls, folder: str | Path, base: str | Path | None = None, **how) -> "RewardModel":
        """A saved reward model, in eval mode: ours, a released merged one, or a PEFT run of the released code.

        base None = where the folder says it is; how: dtype, device and lm_head, as in `load_backbone`, but without the
        vocabulary matrix, which only a policy on the same backbone needs. Anything that does not fit what was saved
        raises `InputError`.
        """
        from yojo import store

        return store.load_reward_model(cls, folder, base, **{"lm_head": False} | how)


def finite(row: Encoded, scores: list[float]) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise InputError(f"{row.prefix}scores are not finite: {scores}")
    return scores


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows by length, longest first, cut into batches whose padded size is at most `tokens`; a longer row
    stands alone."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, tokens // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]
