"""Train reward models on the tiny world, and say what their accuracy means: `yojo.train --tiny`.

There are three kinds: joint, isolated and, as the baseline of the paper, a single-response one, which learns from
pairs of answers by Bradley-Terry (`--baseline`). It is an isolated one whose records hold two answers: in isolated mode
each is scored as if alone. A fourth kind, only in `studies.py`, learns by Bradley-Terry from all pairs of a group.

Accuracy is best-of-N on records that were not trained on. Beside it stand the controls (the picture blanked, or swapped
with another record's) and baselines that read no picture.

See it: `python -m yojo.train --tiny`; `pytest -m slow tests/test_tiny.py`.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from yojo import metrics
from yojo.cli import in_processes, refuse_existing, shipped, table, with_interval
from yojo.core.data import Record, join, open_pictures, read_records, with_preference
from yojo.core.held_out import controls, score_records
from yojo.core.image import Pictures
from yojo.core.lora import LoraConfig
from yojo.core.mask import MODES
from yojo.core.reward import RewardModel
from yojo.core.state import Log
from yojo.core.training import FitConfig, Recipe, train
from yojo.files import write_lines
from yojo.tiny import world
from yojo.weights import pick_device

FIT = FitConfig(steps=200, lr=2e-3, warmup=10, schedule="cosine")
TINY = Recipe(LoraConfig(r=16, alpha=64, dropout=0.0), inner=128, records=32, fit=FIT)
LONGER = replace(FIT, steps=220, betas=(0.9, 0.95))
CORROBORATED = replace(TINY, lora=LoraConfig(r=32, alpha=64, dropout=0.0), records=64, fit=LONGER)
TASKS = {"absolute": (TINY, 4), "corroborated": (CORROBORATED, 6)}  # recipe, responses to choose among
SCENES, TEST, HELD_OUT = 2400, 2000, 1000
CONTROLLED = 1000  # of the test groups, shown with other pictures
SINGLE, PAIRS = "single", "pairs"
NAMES = {"joint": "tiny-rm", "isolated": "tiny-rm-isolated", SINGLE: "tiny-rm-single"}
KINDS = {"joint": "joint", "isolated": "isolated", PAIRS: "isolated", SINGLE: "isolated"}  # the attention of each
TITLES = {kind: kind for kind in MODES} | {PAIRS: "isolated, Bradley-Terry on all pairs"}
TITLES |= {SINGLE: "single-response, Bradley-Terry"}


def write_world(folder: Path, task: str, recipe: Recipe, sizes: Sequence[int], seed: int, paraphrase: bool) -> None:
    """train, test and heldout records of the tiny world, as JSONL and PNG files; `sizes`: responses in training."""
    n, count = TASKS[task][1], recipe.records * recipe.fit.steps
    for name, total, scenes, many, held_out in (
        ("train", count, min(SCENES, count), tuple(sizes), False),
        ("test", TEST, TEST, (n,), False),
        ("heldout", HELD_OUT, HELD_OUT, (n,), True),
    ):
        rng = random.Random(f"{seed} {task} {name}")
        made = world.records(rng, task, total, scenes, many, held_out, paraphrase)
        world.write_records(folder, name, made)


@torch.no_grad()
def with_features(records: Sequence[Record], rm: RewardModel, size: int = 64) -> list[Record]:
    """The same records, every picture opened once and encoded by the frozen tower, `size` records' in a pass: for
    pictures by the thousand, all in files."""
    if rm.backbone.tower_learns():
        return list(records)
    kept: dict[tuple, Pictures] = {}
    sources = list({(tuple(r.images), r.video, r.max_crops): r for r in records}.items())
    for start in range(0, len(sources), size):
        some = sources[start : start + size]
        pictures = [open_pictures(record, rm.processor) for _, record in some]
        features = rm.backbone.encode_images(join(pictures)).split([len(p.pooling) for p in pictures])
        kept |= {key: p.keeping(f) for (key, _), p, f in zip(some, pictures, features, strict=True)}
    return [replace(r, pictures=kept[tuple(r.images), r.video, r.max_crops]) for r in records]


def disjoint_pairs(record: Record) -> list[Record]:
    """A record of its first two responses, one of the next two, ...: what a single-response model learns from."""
    places = range(0, len(record.responses) - 1, 2)
    pairs = [(record.responses[i : i + 2], [-rank for rank in record.rankings[i : i + 2]]) for i in places]
    return [replace(record, responses=two, rankings=world.rank(quality)) for two, quality in pairs]


def train_kind(
    kind: str, recipe: Recipe, records: Sequence[Record], seed: int, device: str | None, title: str
) -> tuple[RewardModel, Log]:
    """A reward model, and the log of its training. SINGLE learns from disjoint pairs, with as many responses a step
    as the others; tied pairs are left out, like tied groups. PAIRS, between SINGLE and isolated, learns from all
    pairs of a group."""
    rm = RewardModel.new(shipped("weights/tiny"), KINDS[kind], recipe.lora, recipe.inner, torch.float32, device, seed)
    records = with_features(records, rm)
    if kind == SINGLE:
        a_step = recipe.records * metrics.mean([len(record.responses) for record in records])
        records = [pair for record in records for pair in disjoint_pairs(record)]
        recipe = replace(recipe, records=round(a_step / 2))
    if kind in (SINGLE, PAIRS):
        recipe = replace(recipe, loss="bradley-terry")
    return rm, train(rm, records, recipe, seed, title=title)


def run_one(
    recipe: Recipe, kind: str, seed: int, folder: Path, out: Path | None, overwrite: bool, device: str | None
) -> dict:
    """Train one kind on the records in `folder` and measure it. Runs in a process of its own."""
    files = (folder / f"{name}.jsonl" for name in ("train", "test", "heldout"))
    records, *tests = (with_preference(read_records(file)) for file in files)
    rm, log = train_kind(kind, recipe, records, seed, device, f"{kind} seed {seed}")
    if out is not None:
        curve = folder / kind / "metrics.jsonl"
        write_lines(curve, log)
        rm.save(out / NAMES[kind], overwrite, also=[curve])
    rm.merge()  # faster, and nothing more is learned
    test, heldout = (with_features(some, rm) for some in tests)
    shown = {"own": test, **controls(test[:CONTROLLED]), "heldout": heldout}
    scores = {name: score_records(rm, some, seed, title=f"{kind}, {name}") for name, some in shown.items()}
    rng, own = random.Random(f"{seed} noise"), scores["own"]
    scores["vote"] = [metrics.vote(s, r.responses) for s, r in zip(own, test, strict=True)]
    scores["noise"] = [metrics.with_noise(s, rng) for s in own]
    ranked = {"blank": test[:CONTROLLED], "swapped": test[:CONTROLLED], "heldout": heldout}
    named = {name: kind if name == "own" else f"{kind}_{name}" for name in scores}
    figures = {named[name]: metrics.accuracies(some, ranked.get(name, test)) for name, some in scores.items()}
    return {"seed": seed, "figures": figures}


def run_tiny(
    task: str,
    recipe: Recipe,
    sizes: Sequence[int],
    kinds: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    overwrite: bool,
    paraphrase: bool,
    device: str | None = None,
) -> dict:
    """Train and measure every kind and seed, two at a time where there are two cores."""
    start = time.monotonic()
    shipped("weights/tiny")  # or no work is begun
    pick_device(device)
    for kind in kinds if out is not None else ():
        refuse_existing(out / NAMES[kind], overwrite)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {seed: Path(temporary) / str(seed) for seed in seeds}
        for seed, folder in folders.items():
            write_world(folder, task, recipe, sizes, seed, paraphrase)
        jobs = [(recipe, kind, seed, folders[seed], out, overwrite, device) for seed in seeds for kind in kinds]
        runs = in_processes(run_one, jobs)
        made = [record for folder in folders.values() for record in read_records(folder / "test.jsonl")]
    result = summary(task, runs, tests := with_preference(made))
    result["without_preference"] = len(made) - len(tests)
    result["ceilings"] = world.PARAPHRASED if paraphrase else world.CEILINGS
    result["seconds"] = round(time.monotonic() - start, 1)
    print(report(result))
    return result


def summary(task: str, runs: list[dict], test: list[Record]) -> dict:
    """Means over seeds of every figure, and the baselines. The 95% intervals resample test groups: they say nothing of
    how much models differ from seed to seed, for which there is `per_seed`."""
    pooled: dict[str, list[float]] = {}
    per_seed: dict[int, dict] = {}
    for r in runs:
        for name, values in r["figures"].items():
            pooled.setdefault(name, []).extend(values)
            per_seed.setdefault(r["seed"], {"seed": r["seed"]})[name] = metrics.mean(values)
    for name in BASELINES:
        pooled[name] = metrics.accuracies([metrics.BASELINES[name](r.responses) for r in test], test)
    if task == "corroborated":
        pooled["any_true"] = metrics.accuracies([[float(rank <= 3) for rank in r.rankings] for r in test], test)
    result = {"task": task, "n": TASKS[task][1], "groups": len(test), "any_true": None}
    result |= {name: metrics.mean(values) for name, values in pooled.items()}
    intervals = {name: metrics.interval(values) for name, values in pooled.items()}
    return result | {"intervals": intervals, "per_seed": list(per_seed.values())}


ROWS = {
    "": "own picture",
    "_heldout": "own picture, held-out colour-shape pairs",
    "_blank": f"picture blanked ({CONTROLLED:,} groups)",
    "_swapped": f"another record's picture ({CONTROLLED:,} groups)",
}
COMPARED = {"_noise": "scores with noise", "_vote": "scores, then a vote over identical texts"}
BASELINES = ("random", "longest", "first", "medoid")


def report(r: dict) -> str:
    """What `--tiny` prints."""
    compared, seeds = r["task"] == "corroborated", [s["seed"] for s in r["per_seed"]]
    kinds = [kind for kind in KINDS if kind in r]

    def cells(suffix: str) -> dict[str, str]:
        return {TITLES[kind]: with_interval(r[kind + suffix], r["intervals"][kind + suffix]) for kind in kinds}

    rows = [{"": what, **cells(suffix)} for suffix, what in (ROWS | (COMPARED if compared else {})).items()]
    if compared:
        rows.append({"": "exact ceiling", **{TITLES[kind]: f"{r['ceilings'][KINDS[kind]]:.3f}" for kind in kinds}})
    title = f"\nbest-of-{r['n']} accuracy, task {r['task']}, {r['groups']} held-out groups, seeds {seeds}, "
    lines = [title + "95% intervals over groups", table(rows, {"": "<", **{TITLES[kind]: "" for kind in kinds}})]
    if r["without_preference"]:
        lines.append(f"left out, since all answers are equally good: {r['without_preference']} groups")
    lines.append("without a picture: " + ", ".join(f"{name} {r[name]:.3f}" for name in BASELINES))
    for kind in kinds if len(seeds) > 1 else ():
        lines.append(
            f"{TITLES[kind]}, own picture, seed by seed: " + ", ".join(f"{s[kind]:.3f}" for s in r["per_seed"])
        )
    if r["any_true"] is not None:
        lines.append(f"a random true answer: {r['any_true']:.3f}")
    return "\n".join([*lines, f"{r['seconds']} seconds"])
