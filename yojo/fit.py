"""The one training loop: accumulation, schedule, clipping, saving, resuming.

    for step:  g = mean over micro-batches of grad loss;  clip |g|;  AdamW with lr(step)

What is learned comes from outside: `loss(step, part)` returns the loss of one micro-batch and what to log about it. It
must be a function of its arguments (and of torch's random state), so that a run can go on from a saved state as if it
had never stopped.

See it: `pytest tests/test_fit.py`.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from yojo.core import parallel
from yojo.files import InputError, add_line, whole_file


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
    folder: Path | None = None,
    title: str | None = None,
    run: dict | None = None,
) -> list[dict[str, float]]:
    """Train `parameters` in place -> one dict a step: step, loss, lr, norm of the gradient, seconds, and what `loss`
    logs.

    With `folder`, `metrics.jsonl` grows there, and every `save_every` steps `state.pt` is written, whole or not at all;
    when it is there already, the run goes on from it, provided `run`, which says what is trained on what, is the same.
    `title` names a progress bar; None = none.
    """
    about = {**asdict(c), **(run or {})}
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)
    optimizer.zero_grad(set_to_none=True)  # a step that was broken off in this process may have left half a gradient
    first, log = resume(folder, about, parameters, optimizer)
    start = time.monotonic() - (log[-1]["seconds"] if log else 0)
    silent = title is None or not parallel.first()
    bar = tqdm(range(first, c.steps), title, initial=first, total=c.steps, disable=silent, mininterval=1)
    for step in bar:
        before = random_states()
        try:
            learned = train_step(loss, step, parameters, optimizer, c)
        except NotFinite as error:
            if folder is not None and parallel.first():  # all as it was before this step
                try:
                    save_state(folder, about, parameters, optimizer, log, before)
                except InputError as fault:
                    raise NotFinite(step, f"{error.args[1]}; {fault}") from None
            raise
        entry = {"step": step, **learned, "seconds": round(time.monotonic() - start, 3)}
        log.append(entry)
        bar.set_postfix({k: f"{v:.3f}" for k, v in entry.items() if k in ("loss", "accuracy")}, refresh=False)
        if folder is not None and parallel.first():
            add_line(folder / "metrics.jsonl", entry)
            if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
                save_state(folder, about, parameters, optimizer, log)
    return log


class NotFinite(FloatingPointError):
    """A loss or a gradient that is not a number, and the step at which it came."""

    def __init__(self, step: int, why: str):
        super().__init__(step, why)
        self.step = step

    def __str__(self) -> str:
        return f"step {self.args[0]}: {self.args[1]}"


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
    seen = parallel.add_up(parameters, seen)
    norm = nn.utils.clip_grad_norm_(parameters, c.clip).item()
    if not math.isfinite(seen["loss"]) or not math.isfinite(norm):
        raise NotFinite(step, f"loss {seen['loss']}, gradient norm {norm}; the parameters are untouched")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**seen, "lr": learning_rate(step, c), "norm": norm}


def random_states() -> dict:
    """Those of torch's generators, which dropout draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random": torch.get_rng_state(), "random_cuda": cuda}


def save_state(
    folder: Path,
    about: dict,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    log: list[dict],
    states: dict | None = None,
) -> None:
    """Everything a run needs to go on as if it had never stopped, in one file. `states`: random ones; None = now's."""
    state = {
        "about": json.dumps(about, sort_keys=True),
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "log": log,
        **(states or random_states()),
    }
    with whole_file(folder / "state.pt") as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"torch could not write it, is the disk full? ({error})") from None


def resume(
    folder: Path | None, about: dict, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """(next step, log so far) from `state.pt`, or (0, []) where there is none. Steps after the save are done again."""
    if folder is None:
        return 0, []
    log: list[dict[str, float]] = []
    if (folder / "state.pt").exists():
        try:
            state = torch.load(folder / "state.pt", weights_only=True)
            theirs, ours = json.loads(state["about"]), json.loads(json.dumps(about))
        except Exception as error:  # torch.load raises many kinds
            raise InputError(f"{folder / 'state.pt'} is not the state of a run ({error}): start over") from None
        if changed := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
            key = changed[0]
            raise InputError(
                f"{folder} holds another run: its {key} is {theirs.get(key)!r}, not {ours.get(key)!r}; resume with "
                "the same arguments, or start over"
            )
        with torch.no_grad():
            for p, saved in zip(parameters, state["parameters"], strict=True):
                p.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        log = state["log"]
    parallel.wait()  # all have read the state before the first writes again
    if parallel.first():
        with whole_file(folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    return len(log), log
