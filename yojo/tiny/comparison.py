"""Comparison told apart from efficiency, on the tiny world: `python -m yojo.evaluate --tiny`.

One set of weights under three masks: joint, isolated, and joint averaged over several orders; for a model trained in
each mode; on `absolute`, where an answer can be judged alone, on the same with noisy pictures, and on `corroborated`,
where it can't. Then accuracy against the number of answers, for models trained on at most eight.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yojo import metrics
from yojo.cli import shipped
from yojo.core.data import Record, read_records
from yojo.core.held_out import score_records
from yojo.core.mask import MODES
from yojo.core.reward import RewardModel
from yojo.tiny import world
from yojo.tiny.experiment import CORROBORATED, NAMES, run_tiny, with_features

GROUPS, ORDERS, NOISE = 1000, 4, 0.45
ANSWERS = (2, 4, 8, 16)  # the shipped models were trained on 2 to 8 answers


@dataclass(frozen=True)
class World:
    """Test records in a folder."""

    task: str
    n: int = 4
    noisy: float = world.NOISE

    def write(self, folder: Path, seed: int) -> list:
        rng = random.Random(f"{seed} ablation {self}")
        made = world.records(rng, self.task, GROUPS, GROUPS, (self.n,))
        return read_records(world.write_records(folder, f"{self.task}-{self.n}-{self.noisy}", made, self.noisy))


def under(rm: RewardModel, records: Sequence[Record], mode: str, orders: int, seed: int) -> float:
    """Accuracy under a mask, scores averaged over `orders` orders of the responses."""
    rows = [score_records(rm, records, seed + k, mode) for k in range(orders)]
    scores = [np.mean(many, axis=0).tolist() for many in zip(*rows, strict=True)]
    return metrics.mean(metrics.accuracies(scores, records))


MASKS = {"joint": ("joint", 1), f"joint, mean of {ORDERS} orders": ("joint", ORDERS), "isolated": ("isolated", 1)}


def masks(models: dict[str, Path], test: World, folder: Path, seed: int) -> list[dict]:
    """One row a model: the same weights under every mask."""
    records, rows = test.write(folder, seed), []
    for trained, path in models.items():
        rm = RewardModel.load(path)
        shown = with_features(records, rm)
        figures = {name: under(rm, shown, mode, orders, seed) for name, (mode, orders) in MASKS.items()}
        rows.append({"task": test.task, "noise": test.noisy, "trained": trained, **figures})
        cells = "".join(f"{value:24.3f}" for value in figures.values())
        print(f"{test.task + (', noisy' if test.noisy > world.NOISE else ''):22s}{trained:10s}{cells}")
    return rows


def sizes(models: dict[str, Path], folder: Path, seed: int) -> list[dict]:
    rows = []
    for n in ANSWERS:
        records = World("absolute", n).write(folder, seed)
        row: dict = {
            "n": n,
            "random": metrics.mean(metrics.accuracies([metrics.chance(r.responses) for r in records], records)),
        }
        for trained, path in models.items():
            rm = RewardModel.load(path)
            row[trained] = under(rm, with_features(records, rm), trained, 1, seed)
        rows.append(row)
        print(f"{n:4d}" + "".join(f"{row[name]:10.3f}" for name in (*models, "random")))
    return rows


def tables(seed: int) -> list[dict]:
    models = {mode: shipped(f"weights/{NAMES[mode]}") for mode in MODES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("training two models on corroborated, which are not shipped:")
        run_tiny("corroborated", CORROBORATED, [6], MODES, range(seed, seed + 1), folder, True, False)
        compared = {mode: folder / NAMES[mode] for mode in MODES}
        print(f"\none set of weights under three masks, accuracy over {GROUPS} groups")
        print(f"{'task':22s}{'trained':10s}" + "".join(f"{name:>24s}" for name in MASKS))
        rows = masks(models, World("absolute"), folder, seed)
        rows += masks(models, World("absolute", noisy=NOISE), folder, seed)
        rows += masks(compared, World("corroborated", 6), folder, seed)
        print(f"\nbest-of-N accuracy on absolute, {GROUPS} groups, trained on 2 to 8 answers")
        print("   N" + "".join(f"{name:>10s}" for name in (*models, "random")))
        rows += sizes(models, folder / "sizes", seed)
    return rows
