"""Learning from preferences: records -> scores of one pass -> loss -> gradient.

    rows = encode(records);  batch = collate(rows);  scores = rm(batch);  L = loss(scores, ranks)      `PreferenceLoss`
    g = mean over micro-batches of grad L;  clip |g|                                                   `gradients`
    AdamW with lr(step)                                                                                `fit`

`fit` is the loop round any `loss(step, micro_batch)`, which returns the loss of one micro-batch and what to log about
it. `loss` must be a function of its arguments (and of torch's random state), so that a run can go on from a saved state
as if it had never stopped. Of a reward model only the LoRA adapter and the value head learn.

See it: `python -m yojo.train --tiny`; `pytest tests/test_fit.py`.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from yojo.core import parallel
from yojo.core.data import Record, collate, encode, in_order, random_order, with_preference
from yojo.core.lora import LoraConfig
from yojo.core.loss import LOSSES, best
from yojo.core.reward import RewardModel
from yojo.core.state import UNSAVED, Log, NotFinite, RunState


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


# ------------------------------------------------------------------------------------------------------ records to loss

SORTED_AMONG = 16  # micro-batches among which records are sorted by their number of responses


class PreferenceLoss:
    """`loss(step, micro_batch)`: records, the responses of each shuffled, scored in one pass; and their accuracy."""

    def __init__(self, rm: RewardModel, records: Sequence[Record], recipe: Recipe, seed: int):
        self.rm, self.records, self.recipe, self.seed = rm, with_preference(records), recipe, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> list[Record]:
        """Every record once, in an order drawn anew for each epoch; within each window of micro-batches, records with
        as many responses stand together, which saves padding, and the micro-batches are shuffled again."""
        rng, size = random.Random(f"{self.seed} epoch {number}"), self.recipe.records
        order = rng.sample(self.records, len(self.records))
        batches = []
        for start in range(0, len(order), SORTED_AMONG * size):
            window = sorted(order[start : start + SORTED_AMONG * size], key=lambda record: len(record.responses))
            batches += [window[k : k + size] for k in range(0, len(window), size)]
        return [record for batch in rng.sample(batches, len(batches)) for record in batch]

    def records_of(self, step: int, micro_batch: int) -> list[Record]:
        n, size = len(self.records), self.recipe.records
        start = (step * self.recipe.fit.accumulate + micro_batch) * size
        return [self.epoch(k // n)[k % n] for k in range(start, start + size)]

    def culprits(self, step: int) -> list[Record]:
        """The records of a step; where some have scores that are not finite now, only those."""
        records = [record for k in range(self.recipe.fit.accumulate) for record in self.records_of(step, k)]
        scores = [self.rm.raw_scores([encode(record, self.rm.processor)], self.rm.mode)[0] for record in records]
        bad = [record for record, row in zip(records, scores, strict=True) if not all(map(math.isfinite, row))]
        return bad or records

    def __call__(self, step: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        rng, rm = random.Random(f"{self.seed} shuffle {step} {micro_batch}"), self.rm
        records = [in_order(record, random_order(record, rng)) for record in self.records_of(step, micro_batch)]
        rows = [encode(record, rm.processor) for record in records]
        batch = collate(rows, rm.mode, rm.backbone.config.pad_id, rm.backbone.device)
        scores = pad_sequence(rm(batch).split(batch.counts), batch_first=True)  # [B, N]
        ranks = pad_sequence([torch.tensor(record.rankings) for record in records], batch_first=True).to(scores.device)
        return LOSSES[self.recipe.loss](scores, ranks), {"accuracy": accuracy(scores, ranks)}


def accuracy(scores: Tensor, ranks: Tensor) -> float:
    """How often the highest of the scores [B, N] is one of the best-ranked; rank 0 = no response here."""
    highest = scores.detach().masked_fill(ranks == 0, -torch.inf).argmax(-1, keepdim=True)
    return best(ranks).gather(1, highest).float().mean().item()


# --------------------------------------------------------------------------------------------------------- loss to step


def gradients(loss, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, c: FitConfig) -> dict:
    """Those of one update, from `accumulate` micro-batches, clipped; the learning rate is set -> what is logged."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c)
    logged: dict[str, float] = {}
    for micro_batch in parallel.share(c.accumulate):
        value, about = loss(step, micro_batch)
        (value / c.accumulate).backward()
        for key, number in {"loss": value.item(), **about}.items():
            logged[key] = logged.get(key, 0.0) + number / c.accumulate
    logged = parallel.add_up(parameters, logged)  # and the gradients, in place
    norm = nn.utils.clip_grad_norm_(parameters, c.clip).item()
    if not math.isfinite(logged["loss"]) or not math.isfinite(norm):
        raise NotFinite(step, f"loss {logged['loss']}, gradient norm {norm}; the parameters are untouched")
    return {**logged, "lr": learning_rate(step, c), "norm": norm}


def learning_rate(step: int, c: FitConfig) -> float:
    """A linear rise over `warmup` steps, then down to zero: along a line or half a cosine."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * ((1 - done) if c.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


# ------------------------------------------------------------------------------------------------------------- the loop


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
    try:
        for step in bar:
            learned = gradients(loss, step, parameters, optimizer, c)
            with state.unbroken():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                log.append({"step": step, **learned, "seconds": round(time.monotonic() - start, 3)})
            state.add(log[-1])
            bar.set_postfix({k: f"{v:.3f}" for k, v in learned.items() if k in ("loss", "accuracy")}, refresh=False)
            if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
                state.save(log)
    except BaseException:  # a signal, too
        state.broken_off(log)
        raise
    return log


def train(
    rm: RewardModel,
    records: Sequence[Record],
    recipe: Recipe,
    seed: int,
    state: RunState = UNSAVED,
    title: str | None = None,
) -> Log:
    """Fit the adapter and the head of `rm` in place -> one dict a step."""
    torch.manual_seed(seed)
    loss = PreferenceLoss(rm.train(), records, recipe, seed)
    try:
        log = fit(loss, rm.trainable(), recipe.fit, state, title)
    except NotFinite as error:
        culprits = ", ".join(record.where for record in loss.culprits(error.step))
        raise FloatingPointError(f"{error}; its records: {culprits}") from None
    rm.eval()
    return log
