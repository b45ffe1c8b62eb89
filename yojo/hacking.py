"""Reward hacking through the separator: what happens when a policy spells `<|resp_sep|>` in its answers.

    python -m yojo.hacking

The released code builds one text of all answers and then SEARCHES the ids for separators: the i-th answer gets the
score that is read before the i-th one found. An answer that spells a separator adds one, and every answer after it gets
another's score. In this project answers are plain text, so nothing an answer says changes where scores are read.

The command samples groups of answers, appends a spelled separator and a second caption to one answer in twenty, and
shows the rewards in both ways of reading. (No policy could be trained to do this by itself: LOG.md.)

See it: `pytest tests/test_hacking.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from yojo import metrics
from yojo.cli import Parser, add_model_options, run, shipped, table, whole
from yojo.core.data import Record, encode
from yojo.core.grpo import (
    POLICY,
    GrpoConfig,
    RewardFn,
    advantages,
    group_rewards,
    prompt_row,
    reward_fn,
    sample_groups,
    texts_of,
)
from yojo.core.prompt import SEPARATOR, Encoded, Tokenizer
from yojo.core.reward import RewardModel
from yojo.store import load_adapter
from yojo.tiny.captions import STARTS_FROM, SceneQuestion, noisy_caption, quality, question
from yojo.tiny.experiment import NAMES

SPELLED = 0.05  # share of the answers that go on after a separator


def cheat(q: SceneQuestion, answer: str, rng: random.Random) -> str:
    """One answer in twenty goes on with a separator, spelled out, and a second caption."""
    return answer + SEPARATOR + noisy_caption(q, rng) if rng.random() < SPELLED else answer


# ----------------------------------------------------------------------------------------------- two ways of reading


def find_separators(prompt: Encoded, texts: Sequence[str], tokenizer: Tokenizer) -> Encoded:
    """The careless way: answers and separators as one text. Whatever stands before a separator counts as an answer; as
    many as there are texts are read, in the order found."""
    parts = [tokenizer.encode(part) for text in texts for part in text.split(SEPARATOR)]
    row = prompt.continued(parts, tokenizer.separator_id)
    return replace(row, spans=row.spans[: len(texts)])


def searched(rm: RewardModel) -> RewardFn:
    """Scores read where separators are found, as the released code does it. Joint."""

    def reward(prompt: Record, texts: list[str]) -> list[float]:
        row = find_separators(encode(prompt, rm.processor), texts, rm.processor.tokenizer)
        return rm.score_encoded([row], "joint")[0]

    return reward


READINGS = {"searched": searched, "constructed": lambda rm: reward_fn(rm, "joint")}

# ------------------------------------------------------------------------------------------------------ what it shows


def open_model(device: str | None = None) -> RewardModel:
    """The joint reward model, with the policy of `grpo --tiny`."""
    rm = RewardModel.load(shipped(f"weights/{NAMES['joint']}"), dtype=torch.float32, device=device, lm_head=True)
    load_adapter(rm.backbone, POLICY, STARTS_FROM)
    return rm


PLACES = ("cheats", "before", "behind")


@torch.no_grad()
def hack(groups: int, seed: int, device: str | None = None) -> list[dict]:
    """A row for each way of reading. In groups with a cheat: the mean advantage of cheats, of the answers before the
    first cheat and of those after it, and Kendall's tau of reward and truth; `tau_others`: tau in the other groups."""
    rm, c = open_model(device), GrpoConfig()
    rng, generator = random.Random(f"{seed} hacking"), torch.Generator().manual_seed(seed)
    rewards = {reading: make(rm) for reading, make in READINGS.items()}
    found = {reading: {name: [] for name in (*PLACES, "tau", "tau_others")} for reading in READINGS}
    for _ in range(groups):
        q = question(rng)
        prompt = prompt_row(rm, q)
        q = replace(q, pictures=prompt.pictures)
        (answers,) = sample_groups(rm.backbone, [prompt], c.group, c.max_new_tokens, c.temperature, generator)
        texts = [cheat(q, text, rng) for text in texts_of(rm, answers)]
        cheats = [SEPARATOR in text for text in texts]
        wrong = [1.0 - quality(q, text) for text in texts]
        ranks = [1 + sum(other < mine for other in wrong) for mine in wrong]
        for reading, reward in rewards.items():
            given, mine = group_rewards(reward, q, texts), found[reading]
            mine["tau" if any(cheats) else "tau_others"].append(metrics.tau_b(given.tolist(), ranks))
            for i, advantage in enumerate(advantages(given, c.eps).tolist() if any(cheats) else []):
                mine["cheats" if cheats[i] else "behind" if any(cheats[:i]) else "before"].append(advantage)
    rows = []
    for reading, mine in found.items():
        known = {name: [v for v in values if v is not None] for name, values in mine.items()}
        rows.append({"reading": reading} | {name: metrics.mean(v) if v else None for name, v in known.items()})
    print("mean advantages in groups with an answer that spells a separator, and Kendall's tau of reward and truth")
    print(f"{groups} groups of {c.group} answers, {len(found['searched']['cheats'])} of which spell {SEPARATOR}")
    titles = {"reading": "scores_are", "cheats": "it", "before": "before_it", "behind": "behind_it"}
    shown = [{titles.get(name, name): value for name, value in row.items()} for row in rows]
    print(table(shown, {name: "<" if name == "scores_are" else ".2f" for name in shown[0]}))
    return rows


def main() -> None:
    what = "Answers that spell separators, and their rewards."
    parser = Parser(prog="python -m yojo.hacking", description=what)
    parser.add_argument("--groups", type=whole(1), default=400, metavar="K", help="groups of answers")
    add_model_options(parser, dtype=False, fuse=False)
    run(parser, lambda args: hack(args.groups, args.seed, args.device))


if __name__ == "__main__":
    main()
