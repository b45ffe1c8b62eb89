"""Reward hacking through the separator: what happens when a policy spells `<|resp_sep|>` in its answers.

    python -m yojo.hacking

The released code builds one text of all answers and then SEARCHES the ids for separators: the i-th answer gets the
score that is read before the i-th one found. An answer that spells a separator adds one, and every answer behind it
gets another's score. This project lays answers out as text, so that nothing an answer says changes where scores are
read.

The command samples groups of answers, lets one answer in twenty go on after a separator, spelled out, and shows what
rewards the answers get in both ways of reading. (A policy that says so by itself could not be trained: LOG.md.)

See it: `pytest tests/test_hacking.py`.
"""

import argparse
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from yojo import metrics
from yojo.cli import Parser, run, shipped
from yojo.core.data import Batch
from yojo.core.grpo import POLICY, GrpoConfig, Judge, Question, advantages, group_rewards, judge_of, sample_group
from yojo.core.mask import PROMPT, AttentionMask
from yojo.core.prompt import SEPARATOR, Encoded, Seen
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.store import load_adapter
from yojo.tiny.captions import STARTS_FROM, noisy_caption, quality, question
from yojo.tiny.experiment import NAMES

SPELLED = 0.05  # share of the answers that go on after a separator


def cheat(q: Question, said: str, rng: random.Random) -> str:
    """One answer in twenty goes on with a separator, spelled out, and a second caption."""
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


def load() -> RewardModel:
    """The joint reward model, with the policy of `grpo --tiny`."""
    rm = RewardModel.load(shipped(f"weights/{NAMES['joint']}"), lm_head=True)
    load_adapter(rm.backbone, POLICY, STARTS_FROM)
    return rm


PLACES = ("cheats", "before", "behind")


@torch.no_grad()
def hack(groups: int, seed: int) -> list[dict]:
    """Of groups with a cheat in them, by way of reading: the mean advantage of cheats, of the answers before the first
    and of those behind it, and Kendall's tau of reward and truth; that of the other groups beside it."""
    rm, c = load(), GrpoConfig()
    rng, generator = random.Random(f"{seed} hacking"), torch.Generator().manual_seed(seed)
    judges = {reading: make(rm) for reading, make in READINGS.items()}
    found = {reading: {name: [] for name in (*PLACES, "tau", "tau_others")} for reading in READINGS}
    for _ in range(groups):
        q = question(rng)
        seen = rm.processor.look(q.images)
        encoded = rm.processor.lay_out(q.prompt, [], seen)
        features = rm.backbone.see(seen[1].patches, seen[1].pooling)
        answers = sample_group(rm.backbone, encoded, features, c, generator)
        said = [rm.processor.tokenizer.decode(a[a != rm.backbone.config.eos_id].tolist()) for a in answers]
        texts = [cheat(q, text, rng) for text in said]
        cheats = [SEPARATOR in text for text in texts]
        wrong = [1.0 - quality(q, text) for text in texts]
        ranks = [1 + sum(other < mine for other in wrong) for mine in wrong]
        for reading, judge in judges.items():
            rewards, mine = group_rewards(judge, q, texts, seen, features), found[reading]
            mine["tau" if any(cheats) else "tau_others"].append(metrics.tau_b(rewards.tolist(), ranks))
            for i, advantage in enumerate(advantages(rewards, c.eps).tolist() if any(cheats) else []):
                mine["cheats" if cheats[i] else "behind" if any(cheats[:i]) else "before"].append(advantage)
    rows = []
    print(f"{groups} groups of {c.group} answers, {len(found['searched']['cheats'])} of which spell {SEPARATOR}")
    print(f"{'scores are':14s}{'it':>8s}{'before it':>12s}{'behind it':>12s}{'tau':>8s}{'tau, others':>14s}")
    for reading, mine in found.items():
        known = {name: [v for v in values if v is not None] for name, values in mine.items()}
        row = {name: metrics.mean(values) if values else None for name, values in known.items()}
        rows.append({"reading": reading, **row})
        cells = [f"{value:.2f}" if value is not None else "-" for value in row.values()]
        print(f"{reading:14s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, (8, 12, 12, 8, 14), strict=True)))
    return rows


def main() -> None:
    parser = Parser(prog="python -m yojo.hacking", description="Answers that spell separators, and their rewards.")
    parser.add_argument("--groups", type=int, default=400, help="groups of answers")
    args = parser.parse_args()
    run(lambda: begin(args), parser, args)


def begin(args: argparse.Namespace) -> list[dict]:
    if args.groups < 1:
        raise InputError(f"--groups {args.groups}: at least 1")
    print("mean advantages in groups with an answer that spells a separator, and Kendall's tau of reward and truth")
    return hack(args.groups, args.seed)


if __name__ == "__main__":
    main()
