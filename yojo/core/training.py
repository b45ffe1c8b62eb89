"""Learning from preferences: records -> scores of one pass -> loss -> gradient.

    rows, ranks of some records                                                           `MicroBatches`, threads ahead
    batch = collate(rows);  scores = rm(batch);  L = loss(scores, ranks)                               `PreferenceLoss`
    g = mean over micro-batches of grad L;  clip |g|                                                   `gradients`
    AdamW with lr(step)                                                                                `fit`

`fit` is the loop for any `loss`, which takes a micro-batch and returns its loss and what to log. `loss` may depend only
on its arguments and on torch's random state, which is seeded again for each micro-batch. So a run can continue from a
saved state as if it had never stopped, and on any number of devices. Of a reward model only the LoRA adapter and the
value head are trained.

See it: `python -m yojo.train --tiny`; `pytest tests/test_fit.py`.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, product

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from yojo.core import parallel
from yojo.core.ahead import ahead
from yojo.core.data import Record, collate, encode
from yojo.core.lora import LoraConfig
from yojo.core.loss import LOSSES, best
from yojo.core.order import MicroBatches
from yojo.core.prompt import Encoded
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


class PreferenceLoss:
    """Called with rows and their ranks [B, N]: the loss of their scores, from one pass, and their accuracy."""

    def __init__(self, rm: RewardModel, loss: str):
        self.rm, self.loss = rm, LOSSES[loss]

    def __call__(self, rows: list[Encoded], ranks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = collate(rows, self.rm.mode, self.rm.backbone.config.pad_id, self.rm.backbone.device)
        scores = pad_sequence(self.rm(batch).split(batch.counts), batch_first=True)  # [B, N]
        ranks = ranks.to(scores.device)
        return self.loss(scores, ranks), {"accuracy": accuracy(scores, ranks)}


def accuracy(scores: Tensor, ranks: Tensor) -> Tensor:
    """How often the highest of the scores [B, N] is one of the best-ranked; rank 0 = no response here."""
    highest = scores.detach().masked_fill(ranks == 0, -torch.inf).argmax(-1, keepdim=True)
    return best(ranks).gather(1, highest).double().mean()


# --------------------------------------------------------------------------------------------------------- loss to step


def gradients(loss, batches: Iterator, step: int, parameters: list, optimizer, c: FitConfig) -> dict[str, float]:
    """Compute the clipped gradients of one update, from `accumulate` micro-batches, and set the learning rate -> what
    is logged."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c)
    logged: dict = {}
    for seed, batch in islice(batches, len(parallel.share(c.accumulate))):
        torch.manual_seed(seed)
        value, about = loss(*batch)
        (value / c.accumulate).backward()
        for key, number in {"loss": value.detach().double(), **about}.items():
            logged[key] = logged.get(key, 0.0) + number / c.accumulate  # on the device, which then need not wait
    logged = parallel.add_up(parameters, {k: float(v) for k, v in logged.items()})  # and the gradients, in place
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
    loss: Callable[..., tuple[Tensor, dict]],
    parameters: list[nn.Parameter],
    c: FitConfig,
    state: RunState = UNSAVED,
    title: str | None = None,
    seed: int = 0,
    batch: Callable[[int, int], tuple] = lambda step, micro_batch: (step, micro_batch),
) -> Log:
    """Train `parameters` in place -> one dict a step: step, loss, lr, norm of the gradient, seconds, and what `loss`
    logs. `batch(step, micro_batch)`, made ahead, is what `loss` is called with. The run goes on from what `state` has
    kept. `title` names a progress bar; None = none. seed: of torch's random state.
    """
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)
    optimizer.zero_grad(set_to_none=True)  # a step that was broken off in this process may have left half a gradient
    log = state.resume(asdict(c), parameters, optimizer)
    start = time.monotonic() - (log[-1]["seconds"] if log else 0)
    bar = parallel.progress(range(len(log), c.steps), title, initial=len(log), total=c.steps)
    places = product(range(len(log), c.steps), parallel.share(c.accumulate))
    seeded = ahead(lambda place: (random.Random(f"{seed} {place}").getrandbits(63), batch(*place)), places)
    try:
        with seeded as batches:
            for step in bar:
                learned = gradients(loss, batches, step, parameters, optimizer, c)
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
    batches = MicroBatches(records, rm.processor, recipe.records, recipe.fit.accumulate, seed)
    try:
        loss = PreferenceLoss(rm.train(), recipe.loss)
        log = fit(loss, rm.trainable(), recipe.fit, state, title, seed, batches)
    except NotFinite as error:
        some = [record for k in range(recipe.fit.accumulate) for record in batches.records_of(error.step, k)]
        raise FloatingPointError(f"{error}; its records: {culprits(rm, some)}") from None
    rm.eval()
    return log


def culprits(rm: RewardModel, records: Sequence[Record]) -> str:
    """Files and lines of the records; if some have scores that are not finite now, of those only."""
    scores = [rm.raw_scores([encode(record, rm.processor)], rm.mode)[0] for record in records]
    bad = [record for record, row in zip(records, scores, strict=True) if not all(map(math.isfinite, row))]
    return ", ".join(record.where for record in bad or records)
