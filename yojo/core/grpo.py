"""GRPO with a one-pass reward: sample a group of answers, judge all of them in ONE pass, learn from the differences.

Two functions. `rollout` samples G answers to every prompt, which is read once, and computes rewards and advantages.
`update_policy` takes a few clipped steps on these samples.

    A_i = (r_i - mean r) / (std r + eps)                       inside the group; 0 where all rewards are equal
    L   = - 1/T sum_t [ min(q_t A, clip(q_t, 1 - c, 1 + c) A) - beta KL_t ]      T = all answer tokens of the batch
    q_t = p(token) / p_old(token),   KL_t = p_ref / p - log(p_ref / p) - 1       at every answer token; p at the
                                                                                 temperature that answers are sampled at

One backbone has three roles: adapter "policy" learns, adapter "reward" scores, and the reference is the adapter that
the policy started from, or no adapter. The log-probabilities of a whole group come from one isolated row (`mask.py`):
the prompt once, every answer after it at the positions it would have alone.

Differences from DeepSeekMath (Shao et al., arXiv 2402.03300): the mean is over all tokens of the batch and not first
inside each answer, so tokens of long answers count as much as others; the standard deviation is the population's; there
is one reward model for the whole run. An empty answer is not scored and gets one less than the group's lowest reward.

See it: `pytest tests/test_grpo.py`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yojo.core import lora
from yojo.core.ahead import ahead
from yojo.core.data import Record, collate, encode, open_pictures
from yojo.core.generate import at_least_float32, generate
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Encoded, Tokenizer
from yojo.core.reward import RewardModel
from yojo.core.state import UNSAVED, RunState
from yojo.files import InputError

POLICY = "policy"  # the adapter that learns
PIECE = 512  # answer tokens whose logits are held at once


@dataclass(frozen=True)
class GrpoConfig:
    steps: int = 80
    prompts: int = 8  # groups a step
    group: int = 8  # answers a group
    inner: int = 2  # updates on one rollout
    clip: float = 0.2
    beta: float = 0.02  # weight of the KL term
    lr: float = 1e-3
    max_norm: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 32
    eps: float = 1e-4  # as in TRL

    def __post_init__(self):
        if self.group < 2:
            raise InputError(f"--group {self.group}: advantages compare the answers of a group, so at least 2")
        counts = (self.steps, self.prompts, self.inner, self.max_new_tokens)
        if min(counts) < 1 or self.temperature <= 0 or not self.lr > 0:
            raise InputError(
                f"steps, prompts, inner updates and new tokens must be at least 1, temperature and lr above 0: {self}"
            )


@dataclass(frozen=True)
class Rollout:
    """One prompt and its group: answers' token ids, their end token included."""

    prompt: Encoded
    answers: list[Tensor]
    texts: list[str]
    rewards: Tensor  # [G]
    advantages: Tensor  # [G]
    old: Tensor  # [tokens of all answers] log-probabilities under the policy that sampled them
    reference: Tensor  # [tokens of all answers]


# ---------------------------------------------------------------------------------------------------- log-probabilities


def group_row(prompt: Encoded, answers: Sequence[Tensor]) -> tuple[Encoded, list[int]]:
    """A prompt and the answers to it in one row, and for every answer token the index of the token that predicts it:
    the last of the prompt for the first of each answer."""
    row, last = prompt.continued([answer.tolist() for answer in answers]), len(prompt.ids) - 1
    return row, [t for start, stop in row.spans for t in (last, *range(start, stop - 1))[: stop - start]]


def log_probs(
    model: Molmo2, groups: Sequence[tuple[Encoded, list[Tensor]]], adapter: str | None, temperature: float
) -> Tensor:
    """(prompt, answers) of several groups -> log p of every answer token [all tokens], one pass. Logits are made for
    PIECE tokens at a time, and again at backward time: all at once they are gigabytes, a row of V for each token."""
    rows, predicts = zip(*(group_row(prompt, answers) for prompt, answers in groups), strict=True)
    batch = collate(rows, "isolated", device=model.device)
    keep = torch.tensor([(b, t) for b, indices in enumerate(predicts) for t in indices])
    inputs = batch.input_ids, model.encode_images(batch.pictures), batch.mask, batch.positions
    hidden = model(*inputs, keep, adapter=adapter)
    tokens = torch.cat([answer for _, answers in groups for answer in answers]).to(model.device)

    def of_piece(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = at_least_float32(model.logits(hidden)).div_(temperature)
        return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)

    pieces = zip(hidden.split(PIECE), tokens.split(PIECE), strict=True)
    return torch.cat([checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces])


# ---------------------------------------------------------------------------------------------------- prompts and texts


def prompt_row(rm: RewardModel, record: Record) -> Encoded:
    """A prompt as the policy reads it, its pictures encoded. Always in layout "default", in which policies are trained,
    whatever the layout of the reward model."""
    row = encode(record, replace(rm.processor, layout="default"))
    return replace(row, pictures=rm.backbone.keep_features(row.pictures))


def texts_of(rm: RewardModel, answers: Sequence[Tensor]) -> list[str]:
    """Sampled ids as text, without the end token."""
    ends = rm.backbone.config.eos_ids
    return [rm.processor.tokenizer.decode([token for token in a.tolist() if token not in ends]) for a in answers]


# ---------------------------------------------------------------------------------------------------- the two functions


def advantages(rewards: Tensor, eps: float) -> Tensor:
    """rewards [G] -> [G], centred and scaled inside the group; 0 for a group of equals, never NaN."""
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)


RewardFn = Callable[[Record, list[str]], list[float]]  # a prompt and answers to it -> rewards


def group_rewards(reward: RewardFn, prompt: Record, texts: list[str]) -> Tensor:
    """One reward an answer, from one call; an empty answer gets one less than the lowest of the others."""
    spoken = [text for text in texts if text.strip()]
    given = iter(reward(prompt, spoken) if spoken else [])
    rewards = [next(given) if text.strip() else None for text in texts]
    floor = min((r for r in rewards if r is not None), default=1.0) - 1
    rewards = torch.tensor([floor if r is None else r for r in rewards])
    if not bool(rewards.isfinite().all()):
        raise FloatingPointError(f"rewards are not finite: {rewards.tolist()} for the answers to {prompt.prompt!r}")
    return rewards


@torch.no_grad()
def rollout(
    rm: RewardModel,
    reward: RewardFn,
    prompts: Sequence[Record],
    c: GrpoConfig,
    reference: str | None,
    generator: torch.Generator,
    clock: dict[str, float] | None = None,
) -> list[Rollout]:
    """Sample G answers to every prompt, reward and compare them. `clock` collects seconds by part."""
    model, clock, start = rm.backbone, {} if clock is None else clock, time.perf_counter()
    rows = [prompt_row(rm, record) for record in prompts]
    answers = sample_groups(model, rows, c.group, c.max_new_tokens, c.temperature, generator)
    groups = list(zip(rows, answers, strict=True))
    lengths = [sum(map(len, some)) for some in answers]
    old, ref = (log_probs(model, groups, who, c.temperature).split(lengths) for who in (POLICY, reference))
    texts, sampled = [texts_of(rm, some) for some in answers], time.perf_counter()
    asked = [replace(record, pictures=row.pictures) for record, row in zip(prompts, rows, strict=True)]
    rewards = [group_rewards(reward, *group) for group in zip(asked, texts, strict=True)]
    for part, seconds in (("rollout", sampled - start), ("scoring", time.perf_counter() - sampled)):
        clock[part] = clock.get(part, 0.0) + seconds
    parts = zip(rows, answers, texts, rewards, (advantages(r, c.eps) for r in rewards), old, ref, strict=True)
    return [Rollout(*part) for part in parts]


def sample_groups(
    model: Molmo2,
    prompts: Sequence[Encoded],
    n: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    adapter: str | None = POLICY,
) -> list[list[Tensor]]:
    """n answers to each prompt, each up to and with its end token, or cut at the limit. All are decoded beside each
    other, and are what they would be if their prompts came one after the other."""
    room = model.config.text.max_position_embeddings - max(len(prompt.ids) for prompt in prompts)
    if max_new_tokens > room:
        raise InputError(f"--max-new-tokens {max_new_tokens}: the prompt leaves room for {room}")
    batch = collate(prompts, "joint", device=model.device)
    inputs = batch.input_ids, model.encode_images(batch.pictures), batch.mask
    out = generate(model, *inputs, n, max_new_tokens, temperature, generator, adapter).cpu()
    ends = torch.isin(out, torch.tensor(model.config.eos_ids)).long()
    answers = [row[: int(end.argmax()) + 1] if end.any() else row for row, end in zip(out, ends, strict=True)]
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def objective(now: Tensor, r: Rollout, c: GrpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of a group's tokens now -> (sum of the clipped objective less its KL, KL of every token, which
    tokens the clip holds back)."""
    advantage = torch.cat([a.expand(len(answer)) for a, answer in zip(r.advantages, r.answers, strict=True)]).to(now)
    q = (now - r.old).exp()
    held = torch.minimum(q * advantage, q.clamp(1 - c.clip, 1 + c.clip) * advantage)
    gap = r.reference - now
    kl = gap.exp() - gap - 1
    return (held - c.beta * kl).sum(), kl.detach(), (held < q * advantage).detach()


def update_policy(
    model: Molmo2, rollouts: Sequence[Rollout], optimizer: torch.optim.Optimizer, c: GrpoConfig
) -> dict[str, float]:
    """`inner` updates on the samples. Logged: the KL at the last one, the share of clipped tokens over all."""
    parameters = lora.parameters(model, POLICY)
    tokens = sum(len(r.old) for r in rollouts)
    logged = {"kl": 0.0, "clipped": 0.0}
    for _ in range(c.inner):
        groups = [(r.prompt, r.answers) for r in rollouts]
        now = log_probs(model, groups, POLICY, c.temperature).split([len(r.old) for r in rollouts])
        parts = [objective(x, r, c) for x, r in zip(now, rollouts, strict=True)]
        (-sum(total for total, _, _ in parts) / tokens).backward()
        norm = nn.utils.clip_grad_norm_(parameters, c.max_norm)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}: this update was not made")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logged["kl"] = sum(kl.sum().item() for _, kl, _ in parts) / tokens
        logged["clipped"] += sum(clipped.sum().item() for _, _, clipped in parts) / tokens / c.inner
    return logged


# ------------------------------------------------------------------------------------------------------------- the loop


def reward_fn(rm: RewardModel, mode: str) -> RewardFn:
    """The reward model's: all answers of a group in one pass."""
    return lambda prompt, texts: rm.score_encoded([encode(replace(prompt, responses=texts), rm.processor)], mode)[0]


def train_policy(
    rm: RewardModel,
    reward: RewardFn,
    sample_prompts: Callable[[int], list[Record]],
    c: GrpoConfig,
    seed: int,
    reference: str | None,
    state: RunState = UNSAVED,
    report: Callable[[dict], None] = lambda entry: None,
    quality: Callable[[Record, str], float] | None = None,
) -> list[dict]:
    """`c.steps` steps on the prompts that `sample_prompts(step)`, asked one step ahead, gives -> one dict a step. Step
    and seed alone decide what is sampled, so that an interrupted run goes on from `state` as if it had never stopped.
    `quality` of an answer, where the truth is known, is logged and plays no part in learning."""
    parameters = lora.parameters(rm.backbone, POLICY)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, weight_decay=0.0)
    optimizer.zero_grad(set_to_none=True)  # an update that was broken off may have left a gradient
    log = state.resume({**asdict(c), "seed": seed}, parameters, optimizer)

    def opened(prompts: list[Record]) -> list[Record]:
        return [replace(prompt, pictures=open_pictures(prompt, rm.processor)) for prompt in prompts]

    steps = range(len(log), c.steps)
    with ahead(opened, map(sample_prompts, steps), most=1) as asked:
        for step, prompts in zip(steps, asked, strict=True):
            generator, clock = torch.Generator().manual_seed(1_000_003 * seed + step), {}
            start = time.perf_counter()
            rollouts = rollout(rm, reward, prompts, c, reference, generator, clock)
            sampled = time.perf_counter()
            learned = update_policy(rm.backbone, rollouts, optimizer, c)
            clock["update"] = time.perf_counter() - sampled
            entry = {"step": step, **statistics(rollouts, prompts, rm.processor.tokenizer, quality), **learned}
            entry |= {f"{part}_share": seconds / (time.perf_counter() - start) for part, seconds in clock.items()}
            report(entry)
            with state.unbroken():
                log.append(entry)
                state.add(entry)
                state.save(log)
    return log


def statistics(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Record],
    tokenizer: Tokenizer,
    quality: Callable[[Record, str], float] | None,
) -> dict[str, float]:
    """Means over a step's answers: reward, true quality if it is known, length, the share that spells a special token
    and the share that is empty; and the shares of groups whose advantages are all 0 and whose answers are one text."""
    texts = [text for r in rollouts for text in r.texts]
    entry = {"reward": torch.cat([r.rewards for r in rollouts]).mean().item()}
    if quality is not None:
        entry["quality"] = mean([quality(p, t) for p, r in zip(prompts, rollouts, strict=True) for t in r.texts])
    entry["length"] = mean([len(answer) for r in rollouts for answer in r.answers])
    entry["special"] = mean([float(tokenizer.spells(text)) for text in texts])
    entry["empty"] = mean([float(not text.strip()) for text in texts])
    entry["even"] = mean([float(not r.advantages.any()) for r in rollouts])
    entry["identical"] = mean([float(len(set(r.texts)) == 1) for r in rollouts])
    return entry


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
