"""Learning from preferences: records -> scores of one pass -> loss; and the same records scored for evaluation.

One training step: draw records, shuffle the responses of each, score all of them in one pass, compare with the
best-ranked. Only the LoRA adapter and the value head learn; what the frozen vision tower sees may be kept.

Evaluation shows a record its own pictures, blank ones, or another record's. A model that reads the picture must fall to
chance under the last two.

See it: `python -m yojo.train --tiny`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from yojo.core import loss as losses
from yojo.core import parallel
from yojo.core.data import Record, collate, join
from yojo.core.lora import LoraConfig
from yojo.core.prompt import Ask, Encoded, Seen
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.fit import FitConfig
from yojo.media import open_picture, open_video, picture_size, video_plan


@dataclass(frozen=True)
class Recipe:
    """How a reward model is trained. Defaults are the released training script's; presets below name what differs."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    inner: int = 1024  # hidden units of the value head
    records: int = 1  # in a micro-batch
    loss: str = "best-of-n"
    epochs: int = 3  # where `fit.steps` is 0
    max_tokens: int = 24_576  # of a record
    max_picture_tokens: int = 16_384  # among them
    fit: FitConfig = FitConfig(steps=0, accumulate=64)


TINY = Recipe(
    lora=LoraConfig(r=16, alpha=64, dropout=0.0),
    inner=128,
    records=32,
    fit=FitConfig(steps=200, lr=2e-3, warmup=10, schedule="cosine"),
)
CORROBORATED = replace(
    TINY,
    lora=LoraConfig(r=32, alpha=64, dropout=0.0),
    records=64,
    fit=replace(TINY.fit, steps=220, betas=(0.9, 0.95)),
)
WINDOW = 16  # micro-batches among which records are sorted by their number of responses


@dataclass(frozen=True)
class Shown:
    """What stands beside a record: files, or, blank, the sizes of grey pictures; a video's frames are blanked."""

    images: tuple[Path | tuple[int, int], ...] = ()
    video: Path | None = None
    blank: bool = False
    max_crops: int | None = None  # None = the checkpoint's


class Dataset:
    """Records as one reward model reads them.

    keep: look at every picture once, at the start, and keep what the frozen tower sees: for pictures by the thousand.
    """

    def __init__(self, records: Sequence[Record], rm: RewardModel, keep: bool, shows: Sequence[str] = ("own",)):
        self.records, self.rm = records, rm
        self.crops: dict[int, int] = {}  # records whose pictures are cut into fewer crops
        self.kept: dict[Shown, tuple[Seen, Tensor | None]] = {}
        if keep:
            sources = list(dict.fromkeys(self.shown(i, show) for i in range(len(records)) for show in shows))
            for start in range(0, len(sources), 64):
                self._keep(sources[start : start + 64])

    def __len__(self) -> int:
        return len(self.records)

    @torch.no_grad()
    def _keep(self, sources: list[Shown]) -> None:
        """Look at some records' pictures, and let the tower see them in one pass."""
        looked = [self._look(source) for source in sources]
        pictures = [p for _, p in looked if p is not None]
        joined = join(pictures) if pictures else None
        features = self.rm.backbone.see(joined.patches, joined.pooling) if joined else torch.empty(0)
        counts = [0 if p is None else len(p.pooling) for _, p in looked]
        for source, (marks, _), mine in zip(sources, looked, features.split(counts), strict=True):
            self.kept[source] = (marks, None), mine if len(mine) else None

    def _look(self, shown: Shown) -> Seen:
        def grey(size: tuple[int, int]) -> Image.Image:
            return Image.new("RGB", size, (128, 128, 128))

        if shown.video is not None:
            frames = open_video(shown.video)
            return self.rm.processor.look(None, [(t, grey(f.size) if shown.blank else f) for t, f in frames])
        pictures = [open_picture(s) if isinstance(s, Path) else grey(s) for s in shown.images]
        return self.rm.processor.look(pictures or None, max_crops=shown.max_crops)

    def shown(self, i: int, show: str) -> Shown:
        """What stands beside record i: its "own" pictures, "blank" ones of their size, or "swapped", those of the next
        record that has others."""
        own = Shown(tuple(self.records[i].images), self.records[i].video, max_crops=self.crops.get(i))
        if show == "blank":
            return replace(own, images=tuple(map(picture_size, own.images)), blank=True)
        if show == "swapped":
            others = (self.shown((i + k) % len(self), "own") for k in range(1, len(self)))
            own = next((o for o in others if (o.images, o.video) != (own.images, own.video)), None)
            if own is None:
                raise InputError("no other record has other pictures: there is nothing to swap")
        return own

    def measure(self, recipe: Recipe) -> list[Ask]:
        """The size of every record, before a run: one that is too long raises, and pictures that would not fit are cut
        into fewer crops, which is said."""
        asks, limit = [], min(recipe.max_tokens, self.rm.processor.max_tokens)
        most = self.rm.processor.images.max_crops
        for i, record in enumerate(tqdm(self.records, "measuring", delay=2, leave=False)):
            sizes = [picture_size(path) for path in record.images]
            seconds = [t for t, _ in video_plan(record.video)] if record.video else []
            for crops in range(most, 0, -1):
                try:
                    ask = self.rm.processor.measure(record.prompt, record.responses, sizes, seconds, crops)
                except InputError as error:
                    raise InputError(f"{record.where}: {error}") from None
                if ask.tokens <= limit and ask.pictures <= recipe.max_picture_tokens:
                    break
            else:
                raise InputError(
                    f"{record.where}: {ask.tokens} tokens, {ask.pictures} of them pictures, where {limit} and "
                    f"{recipe.max_picture_tokens} are the most: shorten or drop responses"
                )
            if crops < most:
                self.crops[i] = crops
            asks.append(ask)
        if self.crops and parallel.first():
            i = min(self.crops)
            print(
                f"to fit into {limit} tokens, pictures of {len(self.crops)} record(s) are cut into fewer than {most} "
                f"crops; the first is {self.records[i].where}: at most {self.crops[i]}"
            )
        return asks

    def shows(self) -> list[str]:
        """The ways to show these records that differ from each other: no controls where there are no pictures."""
        different = len({(tuple(r.images), r.video) for r in self.records})
        return ["own"] + ["blank"] * any(r.images or r.video for r in self.records) + ["swapped"] * (different > 1)

    def encode(self, i: int, order: Sequence[int], show: str = "own") -> tuple[Encoded, Tensor | None]:
        """Record i with its responses in `order` -> what the model reads, and the picture features where kept."""
        record = self.records[i]
        try:
            sources = self.shown(i, show)
            seen, features = self.kept[sources] if sources in self.kept else (self._look(sources), None)
            return self.rm.processor.lay_out(record.prompt, [record.responses[k] for k in order], seen), features
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None

    def scores(self, encoded: Sequence[tuple[Encoded, Tensor | None]]) -> tuple[Tensor, ...]:
        """One pass over several records -> the scores of each."""
        batch = collate([e for e, _ in encoded], self.rm.mode, self.rm.backbone.config.pad_id)
        kept = [f for _, f in encoded if f is not None]
        return self.rm(batch.to(self.rm.backbone.device), torch.cat(kept) if kept else None).split(batch.counts)


class Task:
    """`loss(step, part)` for `fit`: a function of step and part alone, so that a run can go on where it stopped."""

    def __init__(self, data: Dataset, recipe: Recipe, seed: int):
        self.data, self.recipe, self.seed = data, recipe, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> list[int]:
        """Every record once, in an order drawn anew for each epoch; within each window of micro-batches, records with
        as many responses stand together, which saves padding, and the micro-batches are shuffled again."""
        rng, size = random.Random(f"{self.seed} epoch {number}"), self.recipe.records
        order = rng.sample(range(len(self.data)), len(self.data))
        batches = []
        for start in range(0, len(order), WINDOW * size):
            window = sorted(order[start : start + WINDOW * size], key=lambda i: len(self.data.records[i].responses))
            batches += [window[k : k + size] for k in range(0, len(window), size)]
        return [i for batch in rng.sample(batches, len(batches)) for i in batch]

    def indices(self, step: int, part: int) -> list[int]:
        n, size = len(self.data), self.recipe.records
        start = (step * self.recipe.fit.accumulate + part) * size
        return [self.epoch(k // n)[k % n] for k in range(start, start + size)]

    def where(self, step: int) -> list[str]:
        """The records of a step, by file and line; where some have scores that are not finite now, only those."""
        chosen = [i for part in range(self.recipe.fit.accumulate) for i in self.indices(step, part)]
        with torch.no_grad():
            bad = [i for i in chosen if not self.scores_of(i).isfinite().all()]
        return [self.data.records[i].where for i in bad or chosen]

    def scores_of(self, i: int) -> Tensor:
        (scores,) = self.data.scores([self.data.encode(i, range(len(self.data.records[i].responses)))])
        return scores

    def __call__(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{self.seed} shuffle {step} {part}")
        encoded, ranks = [], []
        for i in self.indices(step, part):
            rankings = self.data.records[i].rankings
            order = rng.sample(range(len(rankings)), len(rankings))
            encoded.append(self.data.encode(i, order))
            ranks.append(torch.tensor([rankings[k] for k in order]))
        scores = nn.utils.rnn.pad_sequence(self.data.scores(encoded), batch_first=True)
        rank = nn.utils.rnn.pad_sequence(ranks, batch_first=True).to(scores.device)
        chosen = scores.detach().masked_fill(rank == 0, -torch.inf).argmax(-1, keepdim=True)
        right = losses.best(rank).gather(1, chosen).float().mean().item()
        return losses.LOSSES[self.recipe.loss](scores, rank), {"accuracy": right}


@torch.no_grad()
def evaluate(
    data: Dataset, seed: int, show: str = "own", size: int = 64, title: str | None = None
) -> list[list[float]]:
    """Scores of every record, in the record's own order of responses. `title` names a progress bar.

    They are shown in an order drawn from the seed: fed in file order, a joint model can turn position into accuracy.
    """
    rng, scores = random.Random(f"{seed} evaluate"), []
    for start in tqdm(range(0, len(data), size), title, disable=title is None, mininterval=1):
        chosen = range(start, min(start + size, len(data)))
        orders = [rng.sample(range(n), n) for n in (len(data.records[i].responses) for i in chosen)]
        encoded = [data.encode(i, order, show) for i, order in zip(chosen, orders, strict=True)]
        for order, row in zip(orders, data.scores(encoded), strict=True):
            scores.append([row[order.index(k)].item() for k in range(len(order))])
    return scores
