"""Learning from preferences: records -> scores of one pass -> loss -> gradient.

    for step:  g = mean over micro-batches of grad loss;  clip |g|;  AdamW with lr(step)

`fit` is the loop. What is learned comes from outside: `loss(step, part)` returns the loss of one micro-batch and what
to log about it. It must be a function of its arguments (and of torch's random state), so that a run can go on from a
saved state as if it had never stopped.

`Task` is the loss of preference records: draw some, shuffle the responses of each, score all of them in one pass,
compare with the best-ranked. Only the LoRA adapter and the value head learn; what the frozen vision tower sees may be
kept.

`evaluate` shows a record its own pictures, blank ones, or another record's. A model that reads the picture must fall to
chance under the last two.

See it: `python -m yojo.train --tiny`; `pytest tests/test_fit.py`.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from yojo.core import loss as losses
from yojo.core import parallel
from yojo.core.data import Record, collate, join
from yojo.core.lora import LoraConfig
from yojo.core.prompt import Encoded, Seen
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.media import open_picture, open_video, picture_size


@dataclass(frozen=True)
class FitConfig:
    """Defaults are the released training script's: AdamW 1e-4, no weight decay, linear decay, no warm-up, clip 1.0."""

    steps: int
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "linear"  # or "cosine"
    clip: float = 1.0
    accumulate: int = 1
    save_every: int = 100


@dataclass(frozen=True)
class Recipe:
    """How a reward model is made and trained. `records`, `loss` and `fit` are read here, the rest by those who make the
    model and check the records. Defaults are the released training script's; `tiny/experiment.py` has others."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    inner: int = 1024  # hidden units of the value head
    records: int = 1  # in a micro-batch
    loss: str = "best-of-n"
    epochs: int = 3  # where `fit.steps` is 0
    max_tokens: int = 24_576  # of a record
    max_picture_tokens: int = 16_384  # among them
    fit: FitConfig = FitConfig(steps=0, accumulate=64)


Log = list[dict[str, float]]  # an entry a step


class NotFinite(FloatingPointError):
    """A loss or a gradient that is not a number, and the step at which it came."""

    def __init__(self, step: int, why: str):
        super().__init__(step, why)
        self.step = step

    def __str__(self) -> str:
        return f"step {self.args[0]}: {self.args[1]}"


class RunState:
    """What is kept of an unfinished run: nothing. `runs.py` keeps it in a folder."""

    def resume(self, settings: dict, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Log:
        """Put back what was saved -> the log so far."""
        return []

    def begin_step(self) -> None:
        """Remember what `save_before` needs."""

    def add(self, entry: dict[str, float]) -> None:
        """A step is done."""

    def save(self, log: Log) -> None:
        """Everything that the run needs to go on."""

    def save_before(self, log: Log, error: NotFinite) -> None:
        """The same, as it was before this step. What keeps it from being saved is added to the error."""


UNSAVED = RunState()

# ------------------------------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, c: FitConfig) -> float:
    """A linear rise over `warmup` steps, then down to zero: along a line or half a cosine."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * ((1 - done) if c.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def fit(
    loss: Callable[[int, int], tuple[Tensor, dict[str, float]]],
    parameters: list[nn.Parameter],
    c: FitConfig,
    state: RunState = UNSAVED,
    title: str | None = None,
) -> Log:
    """Train `parameters` in place -> one dict a step: step, loss, lr, norm of the gradient, seconds, and what `loss`
    logs. The run goes on from what `state` has kept. `title` names a progress bar; None = none.
    """
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)
    optimizer.zero_grad(set_to_none=True)  # a step that was broken off in this process may have left half a gradient
    log = state.resume(asdict(c), parameters, optimizer)
    start = time.monotonic() - (log[-1]["seconds"] if log else 0)
    bar = parallel.progress(range(len(log), c.steps), title, initial=len(log), total=c.steps)
    for step in bar:
        state.begin_step()
        try:
            learned = train_step(loss, step, parameters, optimizer, c)
        except NotFinite as error:
            state.save_before(log, error)
            raise
        entry = {"step": step, **learned, "seconds": round(time.monotonic() - start, 3)}
        log.append(entry)
        bar.set_postfix({k: f"{v:.3f}" for k, v in entry.items() if k in ("loss", "accuracy")}, refresh=False)
        state.add(entry)
        if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
            state.save(log)
    return log


def train_step(loss, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, c: FitConfig) -> dict:
    """One update from `accumulate` micro-batches."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c)
    seen: dict[str, float] = {}
    for part in parallel.share(c.accumulate):
        value, about = loss(step, part)
        (value / c.accumulate).backward()
        for key, number in {"loss": value.item(), **about}.items():
            seen[key] = seen.get(key, 0.0) + number / c.accumulate
    seen = parallel.add_up(parameters, seen)  # and the gradients, in place
    norm = nn.utils.clip_grad_norm_(parameters, c.clip).item()
    if not math.isfinite(seen["loss"]) or not math.isfinite(norm):
        raise NotFinite(step, f"loss {seen['loss']}, gradient norm {norm}; the parameters are untouched")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**seen, "lr": learning_rate(step, c), "norm": norm}


# ------------------------------------------------------------------------------------------------------ records to loss

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
        self.crops: dict[int, int] = {}  # of records that must be cut into fewer; set from outside, where at all
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


def train(data: Dataset, recipe: Recipe, seed: int, title: str | None, state: RunState = UNSAVED) -> Log:
    """Fit the adapter and the head of `data.rm` in place -> one dict a step."""
    torch.manual_seed(seed)
    data.rm.train()
    task = Task(data, recipe, seed)
    try:
        log = fit(task, data.rm.trainable(), recipe.fit, state, title)
    except NotFinite as error:
        raise FloatingPointError(f"{error}; its records: {', '.join(task.where(error.step))}") from None
    data.rm.eval()
    return log


@torch.no_grad()
def evaluate(
    data: Dataset, seed: int, show: str = "own", size: int = 64, title: str | None = None
) -> list[list[float]]:
    """Scores of every record, in the record's own order of responses. `title` names a progress bar.

    They are shown in an order drawn from the seed: fed in file order, a joint model can turn position into accuracy.
    """
    rng, scores = random.Random(f"{seed} evaluate"), []
    for start in parallel.progress(range(0, len(data), size), title):
        chosen = range(start, min(start + size, len(data)))
        orders = [rng.sample(range(n), n) for n in (len(data.records[i].responses) for i in chosen)]
        encoded = [data.encode(i, order, show) for i, order in zip(chosen, orders, strict=True)]
        for order, row in zip(orders, data.scores(encoded), strict=True):
            scores.append([row[order.index(k)].item() for k in range(len(order))])
    return scores
