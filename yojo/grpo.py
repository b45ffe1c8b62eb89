"""GRPO with a one-pass reward: sample a group of answers, judge all of them in ONE pass, learn from the differences.

    python -m yojo.grpo --tiny                     both rewards on the tiny world, judged by an oracle
    python -m yojo.grpo --tiny --controls --seeds 3
    python -m yojo.grpo --make-start               the noisy policy that --tiny starts from (weights/tiny-policy)

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

import argparse
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from yojo import memory, metrics
from yojo.cli import WEIGHTS, Parser, pool, run
from yojo.core import lora
from yojo.core.data import pictures_of
from yojo.core.lora import LoraConfig
from yojo.core.mask import PADDING, PROMPT, AttentionMask
from yojo.core.molmo2 import Molmo2, at_least_float32
from yojo.core.prompt import Encoded, Seen, Tokenizer
from yojo.core.reward import RewardModel
from yojo.files import InputError, add_line, read_lines, whole_folder
from yojo.fit import FitConfig, fit, resume, save_state
from yojo.store import digest, load_adapter, save_adapter
from yojo.tiny import world
from yojo.train import NAMES, place, start_over

POLICY, START = "policy", "start"
START_STEPS = 120  # of --make-start
FULL_LR, FULL_LORA = 1e-5, LoraConfig(r=64, alpha=64, dropout=0.0)  # without --tiny; chosen, never tried
STARTS_FROM = WEIGHTS / "tiny-policy"


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
    """A prompt and what stands beside it; `scene`, where the truth is known."""

    prompt: str
    images: list | None = None
    video: Path | None = None
    scene: world.Scene | None = None


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


# --------------------------------------------------------------------------------------------------- log-probabilities


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


# ------------------------------------------------------------------------------------------------------- the two verbs


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
    out = model.generate(ids, features, mask, c.group, c.max_new_tokens, c.temperature, generator, POLICY).cpu()
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


# --------------------------------------------------------------------------------------------------------- the loop


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
    folder: Path | None = None,
    about: dict | None = None,
    tell: Callable[[dict], None] = lambda entry: None,
) -> list[dict]:
    """`c.steps` steps on the questions that `draw(step)` gives -> one dict a step. Step and seed alone decide what is
    drawn, so that with `folder` an interrupted run goes on from `state.pt` as if it had never stopped."""
    parameters = lora.parameters(rm.backbone, POLICY)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, weight_decay=0.0)
    identity = {**asdict(c), "seed": seed, **(about or {})}
    first, log = resume(folder, identity, parameters, optimizer)
    for step in range(first, c.steps):
        generator, clock = torch.Generator().manual_seed(1_000_003 * seed + step), {}
        asked = draw(step)
        start = time.perf_counter()
        rollouts = rollout(rm, judge, asked, c, reference, generator, clock)
        sampled = time.perf_counter()
        learned = update_policy(rm.backbone, rollouts, optimizer, c)
        clock["update"] = time.perf_counter() - sampled
        entry = {"step": step, **measure(rollouts, asked, rm.processor.tokenizer), **learned}
        entry |= {f"{part}_share": seconds / (time.perf_counter() - start) for part, seconds in clock.items()}
        log.append(entry)
        tell(entry)
        if folder is not None:
            add_line(folder / "metrics.jsonl", entry)
            save_state(folder, identity, parameters, optimizer, log)
    return log


def measure(rollouts: Sequence[Rollout], asked: Sequence[Question], tokenizer: Tokenizer) -> dict[str, float]:
    """What a step's answers are like: reward, true quality where it is known, length, and how many spell a token of
    the markup, empty ones and groups without any difference."""
    texts = [text for r in rollouts for text in r.texts]
    entry = {"reward": torch.cat([r.rewards for r in rollouts]).mean().item()}
    if all(q.scene is not None for q in asked):
        entry["quality"] = metrics.mean([quality(q, t) for q, r in zip(asked, rollouts, strict=True) for t in r.texts])
    entry["length"] = metrics.mean([len(answer) for r in rollouts for answer in r.answers])
    entry["special"] = metrics.mean([float(tokenizer.spells(text)) for text in texts])
    entry["empty"] = metrics.mean([float(not text.strip()) for text in texts])
    entry["even"] = metrics.mean([float(not r.advantages.any()) for r in rollouts])
    return entry


# ---------------------------------------------------------------------------------------------------- the tiny world


def quality(q: Question, text: str) -> float:
    """Share of the five facts that the question did not give away which are stated and true."""
    word, found = asked_about(q), world.DESCRIPTION.fullmatch(text)
    facts = q.scene.facts(q.scene.find(word))
    asked = [slot for slot in facts if facts[slot] != word]
    return sum(found[slot] == facts[slot] for slot in asked) / len(asked) if found else 0.0


def asked_about(q: Question) -> str:
    """The colour or the shape that the question names."""
    return q.prompt.removeprefix("Describe the ").removesuffix(".").removesuffix(" thing")


def question(rng: random.Random) -> Question:
    scene = world.make_scene(rng)
    prompt = world.ask(rng.choice(scene.things), rng.choice(("colour", "shape")))
    return Question(prompt, [world.render(scene)], None, scene)


WRONG = {slot: 0.6 if slot == "size" else 0.3 for slot in world.SLOTS}  # greedy answers lie about the size


def noisy_caption(q: Question, rng: random.Random, wrong: dict[str, float] = WRONG) -> str:
    """A description in which each fact is wrong with some probability, but never the one that the question names."""
    word = asked_about(q)
    facts = dict(q.scene.facts(q.scene.find(word)))
    for slot, values in world.SLOTS.items():
        if facts[slot] != word and rng.random() < wrong[slot]:
            facts[slot] = rng.choice([v for v in values if v != facts[slot]])
    return world.describe(facts)


class Captions:
    """`loss(step, part)` for `fit`: minus the log-probability of noisy captions, four to a picture."""

    def __init__(self, rm: RewardModel, seed: int, pictures: int = 12):
        self.rm, self.seed, self.pictures = rm, seed, pictures

    def __call__(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        rng, groups = random.Random(f"{self.seed} captions {step} {part}"), []
        tokenizer, end = self.rm.processor.tokenizer, self.rm.backbone.config.eos_id
        for _ in range(self.pictures):
            q = question(rng)
            encoded = self.rm.processor.encode(q.prompt, [], q.images)
            with torch.no_grad():
                features = self.rm.backbone.see(encoded.pictures.patches, encoded.pictures.pooling)
            said = [torch.tensor([*tokenizer.encode(noisy_caption(q, rng)), end]) for _ in range(4)]
            groups.append((encoded, features, said))
        return -log_probs(self.rm.backbone, groups, POLICY, 1.0).mean(), {}


def make_start(out: Path, steps: int, seed: int, overwrite: bool) -> dict:
    """Fine-tune an adapter on noisy captions: a policy with room to learn."""
    rm = RewardModel.load(WEIGHTS / NAMES["joint"], lm_head=True)
    generator = torch.Generator().manual_seed(seed)
    parameters = lora.add(rm.backbone, POLICY, LoraConfig(r=8, alpha=16, dropout=0.0), generator)
    with whole_folder(out, overwrite) as new:
        log = fit(Captions(rm, seed), parameters, FitConfig(steps=steps, lr=3e-3, warmup=10), title="captions")
        save_adapter(rm.backbone, POLICY, new)
    return {"loss": log[-1]["loss"]}


@torch.no_grad()
def examine(
    rm: RewardModel, adapter: str, c: GrpoConfig, seed: int, temperature: float, count: int = 100
) -> list[float]:
    """True quality of answers to new questions: greedy ones, or four sampled ones each."""
    rng, generator, values = random.Random(f"{seed} examine"), torch.Generator().manual_seed(seed), []
    n = 1 if temperature == 0 else 4
    for _ in range(count):
        q = question(rng)
        encoded = rm.processor.encode(q.prompt, [], q.images)
        features = rm.backbone.see(encoded.pictures.patches, encoded.pictures.pooling)
        image = encoded.image[None]
        mask = AttentionMask(torch.zeros_like(image, dtype=torch.long), encoded.response[None], image, "joint")
        said = rm.backbone.generate(
            encoded.ids[None], features, mask, n, c.max_new_tokens, temperature, generator, adapter
        )
        end = rm.backbone.config.eos_id
        texts = [
            rm.processor.tokenizer.decode([t for t in row if t != end and t != rm.backbone.config.pad_id])
            for row in said.tolist()
        ]
        values.append(metrics.mean([quality(q, text) for text in texts]))
    return values


REWARDS = ("joint", "isolated")
CONTROLS = ("random", "oracle")


def tiny_run(name: str, seed: int, c: GrpoConfig, threads: int, folder: Path | None) -> dict:
    """One policy trained with one reward, in a process of its own."""
    torch.set_num_threads(threads)
    rm = RewardModel.load(WEIGHTS / NAMES["isolated" if name == "isolated" else "joint"], lm_head=True)
    for adapter in (START, POLICY):
        load_adapter(rm.backbone, adapter, STARTS_FROM)
        for p in lora.parameters(rm.backbone, adapter):
            p.requires_grad_(False)
    rng = random.Random(f"{seed} {name}")
    judges: dict[str, Judge] = {
        "random": lambda q, texts, seen, features: [rng.gauss(0, 1) for _ in texts],
        "oracle": lambda q, texts, seen, features: [quality(q, text) for text in texts],
    }
    judge = judges.get(name) or judge_of(rm, name)

    def draw(step: int) -> list[Question]:
        drawn = random.Random(f"{seed} questions {step}")
        return [question(drawn) for _ in range(c.prompts)]

    def tell(entry: dict) -> None:
        parts = [f"{entry[f'{part}_share']:.0%} {part}" for part in ("rollout", "scoring", "update")]
        print(
            f"{name:9s}{entry['step']:4d}  reward {entry['reward']:7.3f}  quality {entry['quality']:.3f}  "
            f"kl {entry['kl']:.4f}  length {entry['length']:4.1f}  {', '.join(parts)}",
            flush=True,
        )

    result = {"name": name, "seed": seed}
    for when, adapter in (("before", START), ("after", POLICY)):
        if when == "after":
            result["log"] = train_policy(rm, judge, draw, c, seed, START, tell=tell)
        for kind, temperature in (("sampled", c.temperature), ("greedy", 0.0)):
            result[f"{kind}_{when}"] = examine(rm, adapter, c, seed, temperature)
    if name == "joint":
        result["cooler"] = examine(rm, START, c, seed, 0.5)
    if folder is not None:
        lines = (json.dumps(entry) for entry in result["log"])
        (folder / f"{name}-{seed}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return result


def tiny(c: GrpoConfig, names: Sequence[str], seeds: Sequence[int], out: Path | None, overwrite: bool) -> list[dict]:
    start = time.monotonic()
    if not (STARTS_FROM / "adapter_config.json").exists():
        raise InputError(f"{STARTS_FROM} is missing: make it with `python -m yojo.grpo --make-start`")
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"{out} exists already: choose another --out, or say --overwrite")
    if out is not None:
        start_over(out, resume=True)
    jobs = [(name, seed) for seed in seeds for name in names]
    processes, threads = pool(len(jobs))
    with processes:
        started = [processes.submit(tiny_run, name, seed, c, threads, out) for name, seed in jobs]
        runs = [job.result() for job in started]
    rows = []
    print(f"\ntrue quality of answers to new questions, seeds {list(seeds)}, 95% intervals over questions")
    print(f"{'reward':22s}{'sampled before':>16s}{'sampled after':>24s}{'greedy before':>16s}{'greedy after':>24s}")
    for name in names:
        mine = [r for r in runs if r["name"] == name]
        row: dict = {"reward": name}
        for key in ("sampled_before", "sampled_after", "greedy_before", "greedy_after"):
            values = [v for r in mine for v in r[key]]
            row[key], row[f"{key}_interval"] = metrics.mean(values), metrics.interval(values)
        rows.append(row)
        cells = [f"{row['sampled_before']:16.3f}", with_interval(row, "sampled_after"), f"{row['greedy_before']:16.3f}"]
        print(f"{name:22s}" + "".join(cells) + with_interval(row, "greedy_after"))
    cooler = [v for r in runs if "cooler" in r for v in r["cooler"]]
    if cooler:
        rows.append({"reward": "none", "temperature": 0.5, "sampled_after": metrics.mean(cooler)})
        print(f"{'none, temperature 0.5':22s}{'':16s}{metrics.mean(cooler):24.3f}")
    print(f"{time.monotonic() - start:.1f} seconds")
    return rows


def with_interval(row: dict, key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]".rjust(24)


# --------------------------------------------------------------------------------------------------- real checkpoints


def read_questions(path: Path) -> list[Question]:
    """JSONL of {"prompt", "image" | "images" | "video"}, paths relative to the file."""
    questions = []
    for where, raw in read_lines(path):
        if not isinstance(raw.get("prompt"), str):
            raise InputError(f"{where}: prompt must be a string, got {raw.get('prompt')!r}")
        images, video = pictures_of(raw, where, path.parent)
        questions.append(Question(raw["prompt"], images or None, video))
    if not questions:
        raise InputError(f"{path} holds no prompts")
    return questions


def full(args: argparse.Namespace, c: GrpoConfig) -> dict:
    """The same loop on a checkpoint, a reward model and a file of prompts."""
    training = place(args.out, args.overwrite, args.resume)
    questions = read_questions(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rm = RewardModel.load(args.reward, args.weights, device=device, lm_head=True)
    generator = torch.Generator().manual_seed(args.seed)
    judge = sum(p.nbytes for p in lora.parameters(rm.backbone, rm.adapter)) if rm.adapter else 0
    lora.add(rm.backbone, POLICY, FULL_LORA, generator)
    rm.backbone.checkpointing = True
    held = memory.training(rm.backbone.config, rm.backbone.dtype, FULL_LORA)
    held += rm.backbone.lm_head.weight.nbytes + judge
    print(f"memory, computed, without activations: {held / 1e9:.1f} GB")
    start_over(training, args.resume)

    def draw(step: int) -> list[Question]:
        return random.Random(f"{args.seed} questions {step}").choices(questions, k=c.prompts)

    data = hashlib.sha256(args.data.read_bytes()).hexdigest()
    about = {"data": data, "base": rm.fingerprint["weights"], "mode": rm.mode, "reward": digest(args.reward)}
    bar = tqdm(total=c.steps, desc="grpo")

    def tell(entry: dict) -> None:
        bar.update(entry["step"] + 1 - bar.n)
        bar.set_postfix({k: f"{entry[k]:.3f}" for k in ("reward", "kl", "length")})

    log = train_policy(rm, judge_of(rm, rm.mode), draw, c, args.seed, None, training, about, tell)
    with whole_folder(args.out, args.overwrite) as new:
        save_adapter(rm.backbone, POLICY, new)
        shutil.copyfile(training / "metrics.jsonl", new / "metrics.jsonl")
    shutil.rmtree(training)
    return {"steps": len(log), "reward": log[-1]["reward"]}


def main() -> None:
    d = GrpoConfig()
    parser = Parser(prog="python -m yojo.grpo", description="Train a policy with a one-pass reward.")
    parser.add_argument("--tiny", action="store_true", help="the built-in models and world, judged by an oracle")
    parser.add_argument("--controls", action="store_true", help="with --tiny: a random reward and the oracle beside it")
    parser.add_argument("--seeds", type=int, metavar="K", help="with --tiny: K seeds from --seed on (default: 1)")
    parser.add_argument("--make-start", action="store_true", help="make the policy that --tiny starts from")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="the backbone, where that is not where it was")
    parser.add_argument("--reward", type=Path, metavar="DIR", help="a reward model; its backbone is the policy's too")
    parser.add_argument("--data", type=Path, metavar="FILE", help="prompts, JSONL")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the policy's adapter; with --tiny, for curves"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--steps", type=int, help=f"training steps (default: {d.steps}, with --make-start {START_STEPS})"
    )
    parser.add_argument("--prompts", type=int, default=d.prompts, metavar="P", help="prompts a step")
    parser.add_argument("--group", type=int, default=d.group, metavar="G", help="answers a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, metavar="T", help="length of an answer")
    parser.add_argument("--lr", type=float, help=f"learning rate (default: {d.lr} with --tiny, {FULL_LR} without)")
    args = parser.parse_args()
    run(lambda: begin(args), parser, args)


def begin(args: argparse.Namespace) -> dict | list[dict]:
    lr = (GrpoConfig.lr if args.tiny else FULL_LR) if args.lr is None else args.lr
    usual = START_STEPS if args.make_start else GrpoConfig.steps
    steps = usual if args.steps is None else args.steps
    c = GrpoConfig(steps, args.prompts, args.group, lr=lr, max_new_tokens=args.max_new_tokens)
    if not args.tiny and (args.controls or args.seeds is not None):
        raise InputError("--controls and --seeds go with --tiny only")
    if args.make_start:
        return make_start(args.out or STARTS_FROM, steps, args.seed, args.overwrite)
    if args.tiny:
        if args.weights or args.reward or args.data or args.resume:
            raise InputError("--tiny brings its own weights, reward models and prompts, and is not resumed")
        seeds = 1 if args.seeds is None else args.seeds
        if seeds < 1:
            raise InputError(f"--seeds {seeds}: at least 1")
        names = REWARDS + (CONTROLS if args.controls else ())
        return tiny(c, names, range(args.seed, args.seed + seeds), args.out, args.overwrite)
    if not (args.reward and args.data and args.out):
        raise InputError("give --tiny, or all of --reward, --data and --out")
    return full(args, c)


if __name__ == "__main__":
    main()
