"""Reward hacking through the separator: what happens when a policy spells `<|resp_sep|>` in its answers.

    python -m yojo.hacking

The released code builds one text of all answers and then SEARCHES the ids for separators: the i-th answer gets the
score that is read before the i-th one found. An answer that spells a separator adds one, and every answer behind it
gets another's score. This project lays answers out as text, so that nothing an answer says changes where scores are
read.

A policy is fine-tuned on captions of which one in twenty goes on after a spelled separator. The command shows what
rewards its answers get in both ways of reading, then trains it with both (`grpo.py`) and shows whether it spells more
or fewer.

See it: `pytest tests/test_hacking.py`.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from yojo import lora, metrics
from yojo.cli import WEIGHTS, Parser, run
from yojo.data import Batch
from yojo.files import InputError
from yojo.grpo import (
    POLICY,
    START,
    GrpoConfig,
    Judge,
    Question,
    judge_of,
    make_start,
    noisy_caption,
    quality,
    question,
    rollout,
    train_policy,
)
from yojo.mask import PROMPT, AttentionMask
from yojo.prompt import SEPARATOR, Encoded, Seen
from yojo.reward import RewardModel
from yojo.train import NAMES

SPELLED = 0.05  # share of the captions to learn from that go on after a separator
C = GrpoConfig(max_new_tokens=64)  # room for two captions and a separator between them
GROUPS = 200  # to look at, before any training


def cheating_caption(q: Question, rng: random.Random) -> str:
    """A noisy caption; one in twenty goes on with a separator, spelled out, and a second caption."""
    said = noisy_caption(q, rng)
    return said + SEPARATOR + noisy_caption(q, rng) if rng.random() < SPELLED else said


# ----------------------------------------------------------------------------------------------- two ways of reading


def find_separators(rm: RewardModel, prompt: Encoded, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """The careless way: answers and separators as one text, parsed as one -> ids of the row, and where the first N
    scores are read: before each separator, in the order found."""
    tokenizer, ids = rm.processor.tokenizer, prompt.ids.tolist()
    for text in texts:
        for part in text.split(SEPARATOR):
            ids += [*tokenizer.encode(part), tokenizer.separator_id]
    return ids, [t - 1 for t, token in enumerate(ids) if token == tokenizer.separator_id][: len(texts)]


def searched(rm: RewardModel) -> Judge:
    """Scores read where separators are found, as the released code does it. Joint."""

    @torch.no_grad()
    def judge(q: Question, texts: list[str], seen: Seen, features: Tensor | None) -> list[float]:
        prompt = rm.processor.lay_out(q.prompt, [], seen)
        ids, read = find_separators(rm, prompt, texts)
        image = torch.zeros(1, len(ids), dtype=torch.bool)
        image[0, : len(prompt.ids)] = prompt.image
        record = torch.zeros(1, len(ids), dtype=torch.long)
        mask = AttentionMask(record, torch.full_like(record, PROMPT), image, "joint")
        rows = torch.tensor([(0, t) for t in read])
        batch = Batch(torch.tensor([ids]), mask, torch.arange(len(ids))[None], rows, [len(texts)], prompt.pictures)
        return rm(batch, features).tolist()

    return judge


READINGS = {"searched": searched, "constructed": lambda rm: judge_of(rm, "joint")}

# ------------------------------------------------------------------------------------------------------ what it shows


def load(start: Path) -> RewardModel:
    """The joint reward model, with the policy and what it started from."""
    rm = RewardModel.load(WEIGHTS / NAMES["joint"], lm_head=True)
    for adapter in (START, POLICY):
        lora.load(rm.backbone, adapter, start)
        for p in lora.parameters(rm.backbone, adapter):
            p.requires_grad_(False)
    return rm


def look(start: Path, reading: str, seed: int, groups: int) -> dict:
    """Advantages of the policy's answers before any training, in groups in which a separator is spelled: of answers
    that spell one, of the others by where they stand, and how well rewards agree with the truth."""
    rm = load(start)
    rng, generator = random.Random(f"{seed} look"), torch.Generator().manual_seed(seed)
    found: dict[str, list] = {"spelled": [], "cheats": [], "before": [], "behind": [], "tau": [], "tau_clean": []}
    for _ in range(groups):
        q = question(rng)
        (r,) = rollout(rm, READINGS[reading](rm), [q], C, START, generator)
        cheats = [SEPARATOR in text for text in r.texts]
        found["spelled"] += cheats
        truth = [1.0 - quality(q, text) for text in r.texts]  # small = good, as ranks are
        ranks = [1 + sum(other < mine for other in truth) for mine in truth]
        found["tau" if any(cheats) else "tau_clean"].append(metrics.tau_b(r.rewards.tolist(), ranks))
        for i, advantage in enumerate(r.advantages.tolist() if any(cheats) else []):
            place = "cheats" if cheats[i] else "behind" if any(cheats[:i]) else "before"
            found[place].append(advantage)
    if not any(found["spelled"]):
        raise InputError(f"none of {len(found['spelled'])} answers spells a separator: raise --learn or --groups")
    return {"reading": reading, **{name: metrics.mean(values) for name, values in found.items()}}


def train(start: Path, reading: str, seed: int, steps: int, threads: int) -> dict:
    """GRPO with this reading as the reward."""
    torch.set_num_threads(threads)
    rm = load(start)
    c = GrpoConfig(steps=steps, max_new_tokens=C.max_new_tokens)

    def draw(step: int) -> list[Question]:
        drawn = random.Random(f"{seed} questions {step}")
        return [question(drawn) for _ in range(c.prompts)]

    log = train_policy(rm, READINGS[reading](rm), draw, c, seed, START)
    ends = {"first": log[: max(1, steps // 8)], "last": log[-max(1, steps // 8) :]}
    keys = ("reward", "quality", "special", "length")
    return {"reading": reading, **{f"{k}_{end}": metrics.mean([e[k] for e in ends[end]]) for k in keys for end in ends}}


def hack(seed: int, steps: int, groups: int, learn: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary) / "start"
        make_start(start, learn, seed, overwrite=False, say=cheating_caption)
        rows = [look(start, reading, seed, groups) for reading in READINGS]
        print(f"\nanswers that spell {SEPARATOR}: {rows[0]['spelled']:.1%}")
        print("mean advantage in groups with such an answer; Kendall's tau of reward and truth in these and the others")
        print(f"{'scores are':14s}{'it':>8s}{'before it':>12s}{'behind it':>12s}{'tau':>8s}{'tau, others':>14s}")
        for r in rows:
            print(
                f"{r['reading']:14s}{r['cheats']:8.2f}{r['before']:12.2f}{r['behind']:12.2f}{r['tau']:8.2f}"
                f"{r['tau_clean']:14.2f}"
            )
        workers = min(len(READINGS), os.cpu_count() or 1)
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            jobs = [pool.submit(train, start, reading, seed, steps, threads) for reading in READINGS]
            learned = [job.result() for job in jobs]
    print(f"\n{steps} steps of GRPO, mean of the first and the last eighth")
    print(f"{'scores are':14s}{'spelled':>20s}{'quality':>20s}{'reward':>20s}{'length':>20s}")
    for r in learned:
        cells = (f"{r[f'{k}_first']:8.3f} -> {r[f'{k}_last']:.3f}" for k in ("special", "quality", "reward", "length"))
        print(f"{r['reading']:14s}" + "".join(cell.rjust(20) for cell in cells))
    return [a | b for a, b in zip(rows, learned, strict=True)]


def main() -> None:
    parser = Parser(prog="python -m yojo.hacking", description="A policy that spells separators, and its rewards.")
    parser.add_argument("--steps", type=int, default=GrpoConfig.steps, help="GRPO steps with each way of reading")
    parser.add_argument("--groups", type=int, default=GROUPS, help="groups to look at before training")
    parser.add_argument(
        "--learn", type=int, default=120, metavar="STEPS", help="fine-tuning steps on cheating captions"
    )
    args = parser.parse_args()
    run(lambda: begin(args), parser, args)


def begin(args: argparse.Namespace) -> list[dict]:
    for name in ("steps", "groups", "learn"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: at least 1")
    return hack(args.seed, args.steps, args.groups, args.learn)


if __name__ == "__main__":
    main()
