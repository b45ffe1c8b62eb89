"""What comparison adds, apart from efficiency, on the tiny world: `python -m yojo.evaluate --tiny`.

One set of weights under three masks: joint, isolated, and joint averaged over several orders; for a model trained in
each mode; on `absolute`, where an answer can be judged alone, on the same with noisy pictures, and on `corroborated`,
where it can't. Then accuracy against the number of answers, for models trained on at most eight.
"""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from yojo import metrics
from yojo.cli import shipped, table
from yojo.core.data import Record, read_records, with_preference
from yojo.core.held_out import score_records
from yojo.core.mask import MODES
from yojo.core.reward import RewardModel
from yojo.tiny import world
from yojo.tiny.experiment import CORROBORATED, NAMES, run_tiny, with_features

GROUPS, ORDERS, NOISE = 1000, 4, 0.45
ANSWERS = (2, 4, 8, 16)  # the shipped models were trained on 2 to 8 answers


MASKS = {"joint": ("joint", 1), f"joint, mean of {ORDERS} orders": ("joint", ORDERS), "isolated": ("isolated", 1)}
Models = dict[str, Path]  # by the mode that each was trained in


def records_of(folder: Path, seed: int, task: str, n: int = 4, noisy: float = world.NOISE) -> list[Record]:
    # the string of an older version, so that the records stay the same
    rng = random.Random(f"{seed} ablation World(task={task!r}, n={n}, noisy={noisy})")
    made = world.records(rng, task, GROUPS, GROUPS, (n,))
    return with_preference(read_records(world.write_records(folder, f"{task}-{n}-{noisy}", made, noisy)))


def under(rm: RewardModel, records: Sequence[Record], mode: str, orders: int, seed: int) -> float:
    """Accuracy under a mask, scores averaged over `orders` orders of the responses."""
    rows = [score_records(rm, records, seed + k, mode) for k in range(orders)]
    scores = [np.mean(many, axis=0).tolist() for many in zip(*rows, strict=True)]
    return metrics.mean(metrics.accuracies(scores, records))


def masks(
    models: Models,
    folder: Path,
    seed: int,
    task: str,
    n: int = 4,
    noisy: float = world.NOISE,
    device: str | None = None,
) -> list[dict]:
    """One row a model: the same weights under every mask."""
    records, rows = records_of(folder, seed, task, n, noisy), []
    for trained, path in models.items():
        rm = RewardModel.load(path, dtype=torch.float32, device=device)
        shown = with_features(records, rm)
        figures = {name: under(rm, shown, mode, orders, seed) for name, (mode, orders) in MASKS.items()}
        rows.append({"task": task, "noise": noisy, "trained": trained, **figures})
    return rows


def sizes(models: Models, folder: Path, seed: int, device: str | None = None) -> list[dict]:
    """One row a number of answers."""
    rows: list[dict] = []
    for n in ANSWERS:
        records = records_of(folder, seed, "absolute", n)
        guesses = [metrics.BASELINES["random"](record.responses) for record in records]
        rows.append({"n": n, "random": metrics.mean(metrics.accuracies(guesses, records))})
        for trained, path in models.items():
            rm = RewardModel.load(path, dtype=torch.float32, device=device)
            rows[-1][trained] = under(rm, with_features(records, rm), trained, 1, seed)
    return rows


def tables(seed: int, device: str | None = None) -> list[dict]:
    models = {mode: shipped(f"weights/{NAMES[mode]}") for mode in MODES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("training two models on corroborated, which are not shipped:")
        run_tiny("corroborated", CORROBORATED, [6], MODES, range(seed, seed + 1), folder, True, False, device)
        compared = {mode: folder / NAMES[mode] for mode in MODES}
        rows = masks(models, folder, seed, "absolute", device=device)
        rows += masks(models, folder, seed, "absolute", noisy=NOISE, device=device)
        rows += masks(compared, folder, seed, "corroborated", 6, device=device)
        numbers = sizes(models, folder / "sizes", seed, device)
    print(f"\none set of weights under three masks, accuracy over {GROUPS} groups")
    shown = [row | {"task": row["task"] + (", noisy" if row["noise"] > world.NOISE else "")} for row in rows]
    print(table(shown, {"task": "<", "trained": "<", **dict.fromkeys(MASKS, ".3f")}))
    print(f"\nbest-of-N accuracy on absolute, {GROUPS} groups, trained on 2 to 8 answers")
    print(table(numbers, {"n": "d", **dict.fromkeys((*MODES, "random"), ".3f")}))
    return rows + numbers
