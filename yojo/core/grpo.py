"""GRPO with a one-pass reward: sample a group of answers, judge all of them in ONE pass, learn from the differences.

Two verbs. `rollout`: G answers to every prompt, the prompt read once; their rewards; their advantages.
`update_policy`: a few clipped steps on what was sampled.

    A_i = (r_i - mean r) / (std r + eps)                       inside the group; 0 where all rewards are equal
    L   = - 1/T sum_t [ min(q_t A, clip(q_t, 1 - c, 1 + c) A) - beta KL_t ]      T = all answer tokens of the batch
    q_t = p(token) / p_old(token),   KL_t = p_ref / p - log(p_ref / p) - 1       at every answer token

One backbone plays three parts: adapter "policy" learns, adapter "reward" judges, and the reference is the adapter the
policy started from, or no adapter. The log-probabilities of a whole group come from one isolated row (`mask.py`): the
prompt once, every answer after it at the positions it would have alone.

Departures from DeepSeekMath (Shao et al., arXiv 2402.03300): the mean is over all tokens of the batch and not first
inside each answer, so long answers are not discounted; the standard deviation is the population's; there is one reward
model for the whole run. An answer that is empty is not shown to the reward model and gets one less than the group's
lowest reward.

See it: `pytest tests/test_grpo.py`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from yojo.core import lora
from yojo.core.generate import at_least_float32, generate
from yojo.core.mask import PADDING, PROMPT, AttentionMask
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Encoded, Seen, Tokenizer
from yojo.core.reward import RewardModel
from yojo.core.training import UNSAVED, RunState
from yojo.files import InputError

POLICY = "policy"  # the adapter that learns


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
    eps: float = 1e-6

    def __post_init__(self):
        if self.group < 2:
            raise InputError(f"--group {self.group}: advantages compare the answers of a group, so at least 2")
        counts = (self.steps, self.prompts, self.inner, self.max_new_tokens)
        if min(counts) < 1 or self.temperature <= 0 or not self.lr > 0:
            raise InputError(
                f"steps, prompts, inner updates and new tokens count from 1, temperature and lr are above 0: {self}"
            )


@dataclass(frozen=True)
class Question:
    """A prompt and what stands beside it."""

    prompt: str
    images: list | None = None
    video: Path | None = None


@dataclass(frozen=True)
class Rollout:
    """One prompt and its group: answers' token ids, their end token included, in one isolated row after the prompt."""

    encoded: Encoded
    features: Tensor | None
    answers: list[Tensor]
    texts: list[str]
    rewards: Tensor  # [G]
    advantages: Tensor  # [G]
    old: Tensor  # [tokens of all answers] log-probabilities under the policy that sampled them
    reference: Tensor  # [tokens of all answers]


# ---------------------------------------------------------------------------------------------------- log-probabilities


def lay_out(encoded: Encoded, answers: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A prompt and the answers to it as one isolated row -> ids, response, positions [T], and for every answer token
    the index of the token that predicts it: the last of the prompt for the first of each answer."""
    P = len(encoded.ids)
    ids, response, positions = [encoded.ids], [torch.full((P,), PROMPT)], [torch.arange(P)]
    predicts, start = [], P
    for i, answer in enumerate(answers):
        n = len(answer)
        ids.append(answer)
        response.append(torch.full((n,), i))
        positions.append(torch.arange(P, P + n))
        predicts.append(torch.tensor([P - 1, *range(start, start + n - 1)]))
        start += n
    return torch.cat(ids), torch.cat(response), torch.cat(positions), torch.cat(predicts)


def log_probs(
    model: Molmo2,
    groups: Sequence[tuple[Encoded, Tensor | None, list[Tensor]]],
    adapter: str | None,
    temperature: float,
) -> Tensor:
    """(prompt, picture features, answers) of several groups -> log p of every answer token [all tokens], one pass."""
    rows = [lay_out(encoded, answers) for encoded, _, answers in groups]

    def pad(columns: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value).to(model.device)

    ids, response, positions = (pad([row[i] for row in rows], fill) for i, fill in ((0, 0), (1, PROMPT), (2, 0)))
    record = pad([torch.zeros_like(row[0]) for row in rows], PADDING)
    image = [
        torch.cat([g[0].image, torch.zeros(len(r[0]) - len(g[0].image), dtype=torch.bool)])
        for g, r in zip(groups, rows, strict=True)
    ]
    mask = AttentionMask(record, response, pad(image, False), "isolated")
    read = torch.cat([torch.stack([torch.full_like(row[3], b), row[3]], 1) for b, row in enumerate(rows)]).to(
        model.device
    )
    features = [f for _, f, _ in groups if f is not None]
    hidden = model(ids, torch.cat(features) if features else None, mask, positions, read, adapter=adapter)
    said = torch.cat([token for _, _, answers in groups for token in answers]).to(model.device)
    logits = at_least_float32(model.logits(hidden)) / temperature
    return logits.log_softmax(-1).gather(1, said[:, None]).squeeze(1)


# -------------------------------------------------------------------------------------------------------- the two verbs


def advantages(rewards: Tensor, eps: float) -> Tensor:
    """rewards [G] -> [G], centred and scaled inside the group; 0 for a group of equals, never NaN."""
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)


Judge = Callable[
    [Question, list[str], Seen, Tensor | None], list[float]
]  # answers, pictures, their features -> rewards


def group_rewards(judge: Judge, q: Question, texts: list[str], seen: Seen, features: Tensor | None) -> Tensor:
    """One reward an answer, from one call of the judge; an empty answer gets one less than the lowest of the others."""
    spoken = [text for text in texts if text.strip()]
    given = iter(judge(q, spoken, seen, features) if spoken else [])
    rewards = [next(given) if text.strip() else None for text in texts]
    floor = min((r for r in rewards if r is not None), default=1.0) - 1
    rewards = torch.tensor([floor if r is None else r for r in rewards])
    if not bool(rewards.isfinite().all()):
        raise FloatingPointError(f"rewards are not finite: {rewards.tolist()} for the answers to {q.prompt!r}")
    return rewards


@torch.no_grad()
def rollout(
    rm: RewardModel,
    judge: Judge,
    asked: Sequence[Question],
    c: GrpoConfig,
    reference: str | None,
    generator: torch.Generator,
    clock: dict[str, float] | None = None,
) -> list[Rollout]:
    """Sample G answers to every question, reward and compare them. `clock` collects seconds by part."""
    model, groups, clock = rm.backbone, [], {} if clock is None else clock
    asking = rm.processor.in_layout("default")  # as the policy was trained, however its judge reads
    for q in asked:
        start = time.perf_counter()
        seen = rm.processor.look(q.images, q.video)
        encoded = asking.lay_out(q.prompt, [], seen)
        features = None if seen[1] is None else model.see(seen[1].patches, seen[1].pooling)
        answers = sample_group(model, encoded, features, c, generator)
        texts = [rm.processor.tokenizer.decode(a[a != model.config.eos_id].tolist()) for a in answers]
        sampled = time.perf_counter()
        rewards = group_rewards(judge, q, texts, seen, features)
        groups.append((encoded, features, answers, texts, rewards))
        clock["rollout"] = clock.get("rollout", 0) + sampled - start
        clock["scoring"] = clock.get("scoring", 0) + time.perf_counter() - sampled
    start, told = time.perf_counter(), [g[:3] for g in groups]
    lengths = [sum(map(len, answers)) for _, _, answers in told]
    old, ref = (log_probs(model, told, who, c.temperature).split(lengths) for who in (POLICY, reference))
    clock["rollout"] += time.perf_counter() - start
    return [Rollout(*group, advantages(group[-1], c.eps), o, r) for group, o, r in zip(groups, old, ref, strict=True)]


def sample_group(
    model: Molmo2, encoded: Encoded, features: Tensor | None, c: GrpoConfig, generator: torch.Generator
) -> list[Tensor]:
    """G answers, each up to and with its end token, or cut at the limit."""
    room = model.config.text.max_position_embeddings - len(encoded.ids)
    if c.max_new_tokens > room:
        raise InputError(f"--max-new-tokens {c.max_new_tokens}: the prompt leaves room for {room}")
    ids = encoded.ids[None].to(model.device)
    mask = AttentionMask(
        torch.zeros_like(ids), torch.full_like(ids, PROMPT), encoded.image[None].to(ids.device), "joint"
    )
    out = generate(model, ids, features, mask, c.group, c.max_new_tokens, c.temperature, generator, POLICY).cpu()
    ends = [(row == model.config.eos_id).nonzero().flatten()[:1].tolist() for row in out]
    return [row[: end[0] + 1] if end else row for row, end in zip(out, ends, strict=True)]


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
    """`inner` steps on one rollout."""
    parameters = lora.parameters(model, POLICY)
    tokens = sum(len(r.old) for r in rollouts)
    seen = {"kl": 0.0, "clipped": 0.0}
    for _ in range(c.inner):
        groups = [(r.encoded, r.features, r.answers) for r in rollouts]
        now = log_probs(model, groups, POLICY, c.temperature).split([len(r.old) for r in rollouts])
        parts = [objective(x, r, c) for x, r in zip(now, rollouts, strict=True)]
        (-sum(total for total, _, _ in parts) / tokens).backward()
        norm = nn.utils.clip_grad_norm_(parameters, c.max_norm)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}; the policy is untouched")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen["kl"] = sum(kl.sum().item() for _, kl, _ in parts) / tokens
        seen["clipped"] += sum(held.sum().item() for _, _, held in parts) / tokens / c.inner
    return seen


# ------------------------------------------------------------------------------------------------------------- the loop


def judge_of(rm: RewardModel, mode: str) -> Judge:
    """The reward model: all answers of a group in one pass."""

    def judge(q: Question, texts: list[str], seen: Seen, features: Tensor | None) -> list[float]:
        return rm.score_encoded([rm.processor.lay_out(q.prompt, texts, seen)], mode, features)[0]

    return judge


def train_policy(
    rm: RewardModel,
    judge: Judge,
    draw: Callable[[int], list[Question]],
    c: GrpoConfig,
    seed: int,
    reference: str | None,
    state: RunState = UNSAVED,
    tell: Callable[[dict], None] = lambda entry: None,
    quality: Callable[[Question, str], float] | None = None,
) -> list[dict]:
    """`c.steps` steps on the questions that `draw(step)` gives -> one dict a step. Step and seed alone decide what is
    drawn, so that an interrupted run goes on from `state` as if it had never stopped. `quality` of an answer, where the
    truth is known, is logged and plays no part in learning."""
    parameters = lora.parameters(rm.backbone, POLICY)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, weight_decay=0.0)
    log = state.resume({**asdict(c), "seed": seed}, parameters, optimizer)
    for step in range(len(log), c.steps):
        generator, clock = torch.Generator().manual_seed(1_000_003 * seed + step), {}
        asked = draw(step)
        start = time.perf_counter()
        rollouts = rollout(rm, judge, asked, c, reference, generator, clock)
        sampled = time.perf_counter()
        learned = update_policy(rm.backbone, rollouts, optimizer, c)
        clock["update"] = time.perf_counter() - sampled
        entry = {"step": step, **measure(rollouts, asked, rm.processor.tokenizer, quality), **learned}
        entry |= {f"{part}_share": seconds / (time.perf_counter() - start) for part, seconds in clock.items()}
        log.append(entry)
        tell(entry)
        state.add(entry)
        state.save(log)
    return log


def measure(
    rollouts: Sequence[Rollout],
    asked: Sequence[Question],
    tokenizer: Tokenizer,
    quality: Callable[[Question, str], float] | None,
) -> dict[str, float]:
    """What a step's answers are like: reward, true quality where it is known, length, and how many spell a token of
    the markup, empty ones and groups without any difference."""
    texts = [text for r in rollouts for text in r.texts]
    entry = {"reward": torch.cat([r.rewards for r in rollouts]).mean().item()}
    if quality is not None:
        entry["quality"] = mean([quality(q, t) for q, r in zip(asked, rollouts, strict=True) for t in r.texts])
    entry["length"] = mean([len(answer) for r in rollouts for answer in r.answers])
    entry["special"] = mean([float(tokenizer.spells(text)) for text in texts])
    entry["empty"] = mean([float(not text.strip()) for text in texts])
    entry["even"] = mean([float(not r.advantages.any()) for r in rollouts])
    return entry


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
