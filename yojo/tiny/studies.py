"""Three studies of what the paper claims, on the tiny world, several seeds each: `yojo.claims`.

    answers   trained on 2, on 4, on 2 to 8 answers, tested on 2 to 16: does training on few carry over to many?
    data      fewer groups, and ranks swapped: does comparing help where there is little to learn from?
    grpo      a policy for every kind of judge, which learned from all groups or from few: is any better, or steadier?

The kinds are those of `experiment.py`: joint, isolated, the single-response baseline and one between the last two. All
are trained by the recipe of `train --tiny`, which was tuned for joint and isolated, and for as many steps; nothing was
chosen by what test groups say. A step has 32 groups, so that more answers a group are more answers a step.

See it: `python -m yojo.claims answers`; `pytest tests/test_claims.py`.
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from yojo import metrics
from yojo.cli import in_processes
from yojo.core.data import Record, read_records, with_preference
from yojo.core.grpo import (
    POLICY,
    GrpoConfig,
    RewardFn,
    group_rewards,
    prompt_row,
    reward_fn,
    sample_groups,
    texts_of,
)
from yojo.core.held_out import score_records
from yojo.core.mask import MODES
from yojo.core.reward import RewardModel
from yojo.core.training import Recipe
from yojo.tiny import world
from yojo.tiny.captions import REFERENCE, SceneQuestion, learn, quality, question, with_policy
from yojo.tiny.experiment import KINDS, SCENES, SINGLE, TINY, train_kind, with_features
from yojo.tiny.talks import describe_held_out, look_up, place

MIXED = tuple(range(2, 9))  # answers in training, as of the shipped models
TRAINED_ON = {"2": (2,), "4": (4,), "2 to 8": MIXED}
TESTED_ON = (2, 4, 8, 16)
GROUPS, SWAPPED = (100, 1000, 3000), (0.0, 0.4)
TESTS = 500  # groups
LEARNED_FROM = {  # judges of `grpo`: groups, and share of pairs swapped
    "all groups": (TINY.records * TINY.fit.steps, 0.0),
    "100 groups": (100, 0.0),
    "100 groups, 40% swapped": (100, 0.4),
}
EVERY = 10  # steps between evaluations on held-out prompts
SKILLS = {"look up": look_up, "place": place, "describe held-out pairs": describe_held_out}
ASKED = 128  # questions of each kind
JUDGES = ("joint", "isolated", SINGLE)
BACKBONE = None  # without a policy's adapter


@contextmanager
def groups(name: str, seed: int, count: int, sizes: Sequence[int] = (4,), swap: float = 0.0) -> Iterator[list[Record]]:
    """Groups of the task *absolute*, whose pictures are files for as long as the block lasts."""
    rng = random.Random(f"{seed} study {name}")
    made = world.records(rng, "absolute", count, min(count, SCENES), sizes)
    with tempfile.TemporaryDirectory() as folder:
        records = with_preference(read_records(world.write_records(folder, "groups", made)))
        yield [with_ranks_swapped(record, swap, rng) for record in records]


def with_ranks_swapped(record: Record, share: float, rng: random.Random) -> Record:
    """The ranks of answers 1 and 2 swapped with probability `share`, likewise those of 3 and 4, ... These are the pairs
    that the single-response model learns from, so `share` of them become wrong; fewer of the other pairs do. Of four
    answers a best one is still ranked first with probability 1 - `share`, where chance is one in four."""
    ranks = list(record.rankings)
    for i in range(0, len(ranks) - 1, 2):
        if rng.random() < share:
            ranks[i : i + 2] = reversed(ranks[i : i + 2])
    return replace(record, rankings=ranks)


def accuracy(rm: RewardModel, seed: int, n: int = 4) -> float:
    """Best-of-n accuracy on new groups."""
    with groups(f"test {n}", seed, TESTS, (n,)) as made:
        test = with_features(made, rm)
    return metrics.mean(metrics.accuracies(score_records(rm, test, seed), test))


# ----------------------------------------------------------------------------------------------------- answers, data


def run_answers(kind: str, trained: str, seed: int, recipe: Recipe, device: str | None) -> dict:
    """A model of one kind, trained on so many answers -> its accuracy by the number of answers."""
    with groups(f"train {trained}", seed, recipe.records * recipe.fit.steps, TRAINED_ON[trained]) as made:
        rm, _ = train_kind(kind, recipe, made, seed, device, f"{kind}, {trained} answers, seed {seed}")
    rm.merge()
    figures = {str(n): accuracy(rm, seed, n) for n in TESTED_ON}
    return {"kind": kind, "trained": trained, "seed": seed, **figures}


def run_data(kind: str, count: int, swap: float, seed: int, recipe: Recipe, device: str | None) -> dict:
    """A model of one kind, trained on so many groups -> its accuracy on groups whose ranks are all true."""
    with groups(f"train {count}", seed, count, swap=swap) as made:
        rm, _ = train_kind(kind, recipe, made, seed, device, f"{kind}, {count} groups, {swap:.0%} swapped, seed {seed}")
    rm.merge()
    return {"kind": kind, "groups": count, "swapped": swap, "seed": seed, "accuracy": accuracy(rm, seed)}


def study_answers(seed: int, device: str | None) -> list[dict]:
    jobs = [(kind, trained, seed, TINY, device) for trained, kind in product(TRAINED_ON, MODES)]
    return in_processes(run_answers, jobs)


def study_data(seed: int, device: str | None) -> list[dict]:
    cases = product(SWAPPED, GROUPS, KINDS)
    return in_processes(run_data, [(kind, count, swap, seed, TINY, device) for swap, count, kind in cases])


# --------------------------------------------------------------------------------------------------------------- grpo


def run_grpo(kind: str, learned: str, seed: int, recipe: Recipe, c: GrpoConfig, device: str | None) -> dict:
    """A reward model of one kind, and a policy trained by it -> what became of the policy."""
    count, swap = LEARNED_FROM[learned]
    with groups("rewards", seed, count, MIXED, swap) as made, tempfile.TemporaryDirectory() as folder:
        trained, _ = train_kind(kind, recipe, made, seed, device, f"{kind}, {learned}, seed {seed}")
        trained.save(Path(folder) / "rm")
        rm = with_policy(Path(folder) / "rm", device)
    reward = reward_fn(rm, KINDS[kind])
    rng = random.Random(f"{seed} held-out prompts")
    prompts = [question(rng) for _ in range(2 * c.prompts)]

    def look(entry: dict) -> None:
        if entry["step"] % EVERY == EVERY - 1 or entry["step"] == c.steps - 1:
            entry |= held_out(rm, reward, prompts, c, seed)

    start = held_out(rm, reward, prompts, c, seed)
    examined = {who: skills(rm, seed, who) for who in (BACKBONE, REFERENCE)}
    got = learn(rm, reward, c, seed, look)
    log = [{"step": -1, **start}, *got.pop("log")]
    shares = {key: metrics.mean([entry[key] for entry in log[1:]]) for key in ("even", "identical")}
    return {
        "kind": kind,
        "learned": learned,
        "seed": seed,
        "reward_accuracy": accuracy(rm, seed),
        **{key: metrics.mean(values) for key, values in got.items()},
        **shares,
        "kl": log[-1]["kl"],
        "curve": [{k: entry[k] for k in ("step", *start)} for entry in log if "held_out_reward" in entry],
        "skills": {"backbone": examined[BACKBONE], "before": examined[REFERENCE], "after": skills(rm, seed, POLICY)},
    }


@torch.no_grad()
def held_out(
    rm: RewardModel, reward: RewardFn, prompts: Sequence[SceneQuestion], c: GrpoConfig, seed: int
) -> dict[str, float]:
    """Groups sampled for prompts that the policy does not learn from: their mean reward, and how good they truly are.
    Every evaluation uses the same random numbers. A joint judge's loss ignores a number added to all scores of a group,
    and that number may drift with the answers, so compare mean quality, not mean reward."""
    generator, rows = torch.Generator().manual_seed(seed), [prompt_row(rm, q) for q in prompts]
    answers = sample_groups(rm.backbone, rows, c.group, c.max_new_tokens, c.temperature, generator)
    said = [(q, texts_of(rm, some)) for q, some in zip(prompts, answers, strict=True)]
    rewards = [group_rewards(reward, q, texts).mean().item() for q, texts in said]
    truth = [quality(q, text) for q, texts in said for text in texts]
    return {"held_out_reward": metrics.mean(rewards), "held_out_quality": metrics.mean(truth)}


@torch.no_grad()
def skills(rm: RewardModel, seed: int, adapter: str | None) -> dict[str, float]:
    """Greedy answers to questions that no policy learned from: the share that is right, word for word."""
    figures = {}
    for name, talk in SKILLS.items():
        rng = random.Random(f"{seed} skill {name}")
        scenes = [world.make_scene(rng, held_out=talk is describe_held_out) for _ in range(ASKED)]
        asked, right = zip(*(talk(scene, rng) for scene in scenes), strict=True)
        records = [Record(q, images=[world.render(scene)]) for q, scene in zip(asked, scenes, strict=True)]
        rows = [prompt_row(rm, record) for record in records]
        answers = sample_groups(rm.backbone, rows, 1, 32, 0.0, torch.Generator(), adapter)
        said = [texts_of(rm, some)[0] for some in answers]
        figures[name] = metrics.mean([float(a == b) for a, b in zip(said, right, strict=True)])
    return figures


def study_grpo(seed: int, device: str | None) -> list[dict]:
    cases = product(LEARNED_FROM, JUDGES)
    return in_processes(run_grpo, [(kind, learned, seed, TINY, GrpoConfig(), device) for learned, kind in cases])
