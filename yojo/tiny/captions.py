"""GRPO on the tiny world, where every answer's true quality is known: `yojo.grpo --tiny`.

A policy that starts from noisy captions is trained by the scores of a reward model, joint or isolated, or, as controls,
by chance or by the truth itself. What counts is the true quality of its answers to new questions.

See it: `python -m yojo.grpo --tiny`; `pytest tests/test_grpo.py`.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yojo import metrics
from yojo.cli import WEIGHTS, in_processes, refuse_existing, shipped, table, with_interval
from yojo.core import grpo, lora
from yojo.core.data import Record
from yojo.core.grpo import POLICY, GrpoConfig, RewardFn, prompt_row, reward_fn
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.core.training import FitConfig, fit
from yojo.files import InputError, whole_folder, write_lines
from yojo.runs import start_over
from yojo.store import load_adapter, save_adapter
from yojo.tiny import world
from yojo.tiny.experiment import NAMES
from yojo.weights import pick_device

REFERENCE = "reference"  # the adapter that the policy started from
START_STEPS = 120  # of --make-start
EXAMINED = 100  # questions that a policy is examined in
STARTS_FROM = WEIGHTS / "tiny-policy"


@dataclass(frozen=True)
class SceneQuestion(Record):
    """A question about a scene, whose truth is known."""

    scene: world.Scene | None = None


def quality(q: SceneQuestion, text: str) -> float:
    """Share of the five facts that the question did not give away which are stated and true."""
    word, found = asked_about(q), world.DESCRIPTION.fullmatch(text)
    facts = q.scene.facts(q.scene.find(word))
    open_slots = [slot for slot in facts if facts[slot] != word]
    return sum(found[slot] == facts[slot] for slot in open_slots) / len(open_slots) if found else 0.0


def asked_about(q: SceneQuestion) -> str:
    """The colour or the shape that the question names."""
    return q.prompt.removeprefix("Describe the ").removesuffix(".").removesuffix(" thing")


def question(rng: random.Random) -> SceneQuestion:
    scene = world.make_scene(rng)
    prompt = world.ask(rng.choice(scene.things), rng.choice(("colour", "shape")))
    return SceneQuestion(prompt, images=[world.render(scene)], scene=scene)


WRONG = {slot: 0.6 if slot == "size" else 0.3 for slot in world.SLOTS}  # greedy answers lie about the size


def noisy_caption(q: SceneQuestion, rng: random.Random, wrong: dict[str, float] = WRONG) -> str:
    """A description in which each fact is wrong with some probability, but never the one that the question names."""
    word = asked_about(q)
    facts = dict(q.scene.facts(q.scene.find(word)))
    for slot, values in world.SLOTS.items():
        if facts[slot] != word and rng.random() < wrong[slot]:
            facts[slot] = rng.choice([v for v in values if v != facts[slot]])
    return world.describe(facts)


class CaptionLoss:
    """`loss(step, micro_batch)` for `fit`: minus the log-probability of noisy captions, four to a picture."""

    def __init__(self, rm: RewardModel, seed: int, pictures: int = 12):
        self.rm, self.seed, self.pictures = rm, seed, pictures

    def __call__(self, step: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        rng, groups = random.Random(f"{self.seed} captions {step} {micro_batch}"), []
        tokenizer, end = self.rm.processor.tokenizer, self.rm.backbone.config.eos_ids[0]
        for _ in range(self.pictures):
            q = question(rng)
            captions = [torch.tensor([*tokenizer.encode(noisy_caption(q, rng)), end]) for _ in range(4)]
            groups.append((prompt_row(self.rm, q), captions))
        return -grpo.log_probs(self.rm.backbone, groups, POLICY, 1.0).mean(), {}


def make_start(out: Path, steps: int, seed: int, overwrite: bool, device: str | None = None) -> dict:
    """Fine-tune an adapter on noisy captions: a policy with room to learn."""
    rm = RewardModel.load(shipped(f"weights/{NAMES['joint']}"), dtype=torch.float32, device=device, lm_head=True)
    generator = torch.Generator().manual_seed(seed)
    parameters = lora.add(rm.backbone, POLICY, LoraConfig(r=8, alpha=16, dropout=0.0), generator)
    with whole_folder(out, overwrite) as new:
        log = fit(CaptionLoss(rm, seed), parameters, FitConfig(steps=steps, lr=3e-3, warmup=10), title="captions")
        save_adapter(rm.backbone, POLICY, new)
    return {"loss": log[-1]["loss"]}


@torch.no_grad()
def evaluate_policy(rm: RewardModel, adapter: str, c: GrpoConfig, seed: int, temperature: float) -> list[float]:
    """True quality of answers to new questions: greedy ones, or four sampled ones each."""
    rng, generator, values = random.Random(f"{seed} examine"), torch.Generator().manual_seed(seed), []
    questions, n = [question(rng) for _ in range(EXAMINED)], 1 if temperature == 0 else 4
    for start in range(0, EXAMINED, c.prompts):
        some = questions[start : start + c.prompts]
        rows = [prompt_row(rm, q) for q in some]
        groups = grpo.sample_groups(rm.backbone, rows, n, c.max_new_tokens, temperature, generator, adapter)
        texts = [grpo.texts_of(rm, answers) for answers in groups]
        values += [metrics.mean([quality(q, text) for text in said]) for q, said in zip(some, texts, strict=True)]
    return values


def learn(rm: RewardModel, reward: RewardFn, c: GrpoConfig, seed: int, report: Callable[[dict], None]) -> dict:
    """Train the policy of `with_policy` -> the log, and true quality of single answers to new questions, before and
    after."""

    def sample_prompts(step: int) -> list[SceneQuestion]:
        drawn = random.Random(f"{seed} questions {step}")
        return [question(drawn) for _ in range(c.prompts)]

    def measured(when: str, adapter: str) -> dict[str, list[float]]:
        temperatures = {"sampled": c.temperature, "greedy": 0.0}
        return {f"{kind}_{when}": evaluate_policy(rm, adapter, c, seed, t) for kind, t in temperatures.items()}

    before = measured("before", REFERENCE)
    log = grpo.train_policy(rm, reward, sample_prompts, c, seed, REFERENCE, report=report, quality=quality)
    return {"log": log, **before, **measured("after", POLICY)}


REWARDS = ("joint", "isolated")
CONTROLS = ("random", "oracle")


def with_policy(judge: Path, device: str | None) -> RewardModel:
    """A reward model whose backbone carries the policy that starts, and what it started from."""
    rm = RewardModel.load(judge, dtype=torch.float32, device=device, lm_head=True)
    for adapter in (REFERENCE, POLICY):
        load_adapter(rm.backbone, adapter, STARTS_FROM)
        for p in lora.parameters(rm.backbone, adapter):
            p.requires_grad_(False)
    return rm


def run_one(name: str, seed: int, c: GrpoConfig, folder: Path | None, device: str | None) -> dict:
    """One policy trained with one reward, in a process of its own."""
    rm = with_policy(shipped(f"weights/{NAMES['isolated' if name == 'isolated' else 'joint']}"), device)
    rng = random.Random(f"{seed} {name}")
    control_rewards: dict[str, RewardFn] = {
        "random": lambda q, texts: [rng.gauss(0, 1) for _ in texts],
        "oracle": lambda q, texts: [quality(q, text) for text in texts],
    }
    reward = control_rewards.get(name) or reward_fn(rm, name)

    def report(entry: dict) -> None:
        parts = [f"{entry[f'{part}_share']:.0%} {part}" for part in ("rollout", "scoring", "update")]
        said = f"{name:9s}{entry['step']:4d}  reward {entry['reward']:7.3f}  quality {entry['quality']:.3f}  "
        said += f"kl {entry['kl']:.4f}  length {entry['length']:4.1f}  {', '.join(parts)}"
        print(said, flush=True)

    result = {"name": name, "seed": seed, **learn(rm, reward, c, seed, report)}
    if name == "joint":
        result["cooler"] = evaluate_policy(rm, REFERENCE, c, seed, 0.5)
    if folder is not None:
        write_lines(folder / f"{name}-{seed}.jsonl", result["log"])
    return result


def run_tiny(
    c: GrpoConfig,
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    overwrite: bool,
    device: str | None = None,
) -> list[dict]:
    """A policy for every reward and seed -> a row a reward, and one for sampling the start at a lower temperature."""
    start = time.monotonic()
    shipped(f"weights/{NAMES['joint']}")  # or no work is begun
    pick_device(device)
    if not (STARTS_FROM / "adapter_config.json").exists():
        raise InputError(f"{STARTS_FROM} is missing: make it with `python -m yojo.grpo --make-start`")
    refuse_existing(out, overwrite)
    if out is not None:
        start_over(out, resume=True)
    runs = in_processes(run_one, [(name, seed, c, out, device) for seed in seeds for name in names])
    rows, shown = [], []
    for name in names:
        row: dict = {"reward": name}
        for key in ("sampled_before", "sampled_after", "greedy_before", "greedy_after"):
            values = [v for r in runs if r["name"] == name for v in r[key]]
            row[key], row[f"{key}_interval"] = metrics.mean(values), metrics.interval(values)
        rows.append(row)
        after = {k: with_interval(row[k], row[f"{k}_interval"]) for k in ("sampled_after", "greedy_after")}
        shown.append(row | after | {k: f"{row[k]:.3f}" for k in ("sampled_before", "greedy_before")})
    if cooler := [v for r in runs for v in r.get("cooler", [])]:
        rows.append({"reward": "none", "temperature": 0.5, "sampled_after": metrics.mean(cooler)})
        shown.append({"reward": "none, temperature 0.5", "sampled_after": f"{metrics.mean(cooler):.3f}"})
    print(f"\ntrue quality of answers to new questions, seeds {list(seeds)}, 95% intervals over questions")
    keys = ("sampled_before", "sampled_after", "greedy_before", "greedy_after")
    print(table(shown, {"reward": "<", **dict.fromkeys(keys, "")}))
    print(f"{time.monotonic() - start:.1f} seconds")
    return rows
