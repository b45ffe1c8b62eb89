"""Train a reward model on preference records, and say what its accuracy means.

    python -m yojo.train --tiny                          both modes on the tiny world
    python -m yojo.train --tiny --task corroborated      the task that only comparison solves
    python -m yojo.train --weights weights/Molmo2-4B --data prefs.jsonl --out runs/rm --mode joint

Accuracy is best-of-N on records that were not trained on. Beside it stand the controls (the picture blanked, or swapped
with another record's) and baselines that read no picture.

`--out` becomes a reward model's folder when the run is complete. Until then `<out>.training` holds its state: an
interrupted run goes on from there with `--resume`.
"""

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from yojo import flops, memory, metrics
from yojo.cli import COMPILE, WEIGHTS, Parser, pool, run
from yojo.core import parallel
from yojo.core.data import Record, read_records
from yojo.core.loss import LOSSES
from yojo.core.mask import MODES
from yojo.core.prompt import Ask
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.fit import NotFinite, fit
from yojo.preference import CORROBORATED, TINY, Dataset, Recipe, Task, evaluate
from yojo.tiny import world

TASKS = {
    # task: recipe, responses to choose among
    "absolute": (TINY, 4),
    "corroborated": (CORROBORATED, 6),
}
SCENES, TEST, HELD_OUT = 2400, 2000, 1000
CONTROLS = 1000  # of the test groups, shown with other pictures
NAMES = {"joint": "tiny-rm", "isolated": "tiny-rm-isolated"}


def train(
    data: Dataset,
    recipe: Recipe,
    seed: int,
    title: str | None,
    folder: Path | None = None,
    run: dict | None = None,
) -> list[dict[str, float]]:
    """Fit the adapter and the head of `data.rm` in place -> one dict a step."""
    torch.manual_seed(seed)
    data.rm.train()
    task = Task(data, recipe, seed)
    try:
        log = fit(task, data.rm.trainable(), recipe.fit, folder, title, run)
    except NotFinite as error:
        raise FloatingPointError(f"{error}; its records: {', '.join(task.where(error.step))}") from None
    data.rm.eval()
    return log


def accuracies(scores: Sequence[Sequence[float]], records: Sequence[Record]) -> list[float]:
    return [metrics.best_of_n(s, r.rankings) for s, r in zip(scores, records, strict=True)]


# ---------------------------------------------------------------------------------------------------- the tiny world


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


def tiny_run(
    recipe: Recipe, mode: str, seed: int, folder: Path, out: Path | None, overwrite: bool, threads: int
) -> dict:
    """Train one mode on the records in `folder` and measure it. Runs in a process of its own."""
    torch.set_num_threads(threads)
    rm = RewardModel.new(WEIGHTS / "tiny", mode, recipe.lora, recipe.inner, seed=seed)
    data = Dataset(read_records(folder / "train.jsonl"), rm, keep=True)
    log = train(data, recipe, seed, f"{mode} seed {seed}")
    if out is not None:
        (folder / mode).mkdir()
        curve = folder / mode / "metrics.jsonl"
        curve.write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
        rm.save(out / NAMES[mode], overwrite, also=[curve])
    rm.merge()  # faster, and nothing more is learned
    test, heldout = read_records(folder / "test.jsonl"), read_records(folder / "heldout.jsonl")
    data = Dataset(test, rm, keep=True, shows=("own", "blank"))
    own, controls = evaluate(data, seed), Dataset(test[:CONTROLS], rm, keep=False)
    controls.kept = data.kept
    rng = random.Random(f"{seed} noise")
    figures = {
        mode: accuracies(own, test),
        f"{mode}_blank": accuracies(evaluate(controls, seed, "blank"), controls.records),
        f"{mode}_swapped": accuracies(evaluate(controls, seed, "swapped"), controls.records),
        f"{mode}_heldout": accuracies(evaluate(Dataset(heldout, rm, keep=True), seed), heldout),
        f"{mode}_vote": accuracies([metrics.vote(s, r.responses) for s, r in zip(own, test, strict=True)], test),
        f"{mode}_noise": accuracies([metrics.with_noise(s, rng) for s in own], test),
    }
    return {"seed": seed, "mode": mode, "figures": figures}


def tiny(
    task: str,
    recipe: Recipe,
    sizes: Sequence[int],
    modes: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    overwrite: bool,
    paraphrase: bool,
) -> dict:
    """Train and measure every mode and seed, two at a time where there are two cores."""
    start = time.monotonic()
    for mode in modes if out is not None else ():
        if (out / NAMES[mode]).exists() and not overwrite:
            raise InputError(f"{out / NAMES[mode]} exists already: choose another --out, or say --overwrite")
    processes, threads = pool(len(modes) * len(seeds))
    with tempfile.TemporaryDirectory() as temporary, processes:
        jobs, tests = [], []
        for seed in seeds:
            folder = Path(temporary) / str(seed)
            write_world(folder, task, recipe, sizes, seed, paraphrase)
            jobs += [processes.submit(tiny_run, recipe, m, seed, folder, out, overwrite, threads) for m in modes]
            tests.append(read_records(folder / "test.jsonl"))
        runs = [job.result() for job in jobs]
    result = summary(task, runs, [record for test in tests for record in test])
    result["ceilings"] = world.PARAPHRASED if paraphrase else world.CEILINGS
    result["seconds"] = round(time.monotonic() - start, 1)
    print(table(result))
    return result


def summary(task: str, runs: list[dict], test: list[Record]) -> dict:
    """Means over seeds of every figure, and the baselines. The 95% intervals resample test groups: they say nothing of
    how much models differ from seed to seed, for which there is `per_seed`."""
    pooled: dict[str, list[float]] = {}
    for r in runs:
        for name, values in r["figures"].items():
            pooled.setdefault(name, []).extend(values)
    for name, baseline in metrics.BASELINES.items():
        pooled[name] = accuracies([baseline(r.responses) for r in test], test)
    if task == "corroborated":
        pooled["any_true"] = accuracies([[float(rank <= 3) for rank in r.rankings] for r in test], test)
    seeds = sorted({r["seed"] for r in runs})
    per_seed = [
        {"seed": s, **{k: metrics.mean(v) for r in runs if r["seed"] == s for k, v in r["figures"].items()}}
        for s in seeds
    ]
    return {
        "task": task,
        "n": TASKS[task][1],
        "groups": len(test),
        "any_true": None,
        **{name: metrics.mean(values) for name, values in pooled.items()},
        "intervals": {name: metrics.interval(values) for name, values in pooled.items()},
        "per_seed": per_seed,
    }


ROWS = {
    "": "own picture",
    "_heldout": "own picture, held-out colour-shape pairs",
    "_blank": "picture blanked (1,000 groups)",
    "_swapped": "another record's picture (1,000 groups)",
}


def table(r: dict) -> str:
    """What `--tiny` prints."""

    def cell(name: str) -> str:
        low, high = r["intervals"].get(name, (0, 0))
        return f"{r[name]:.3f} [{low:.3f}, {high:.3f}]".rjust(24) if name in r else "-".rjust(24)

    seeds = [s["seed"] for s in r["per_seed"]]
    lines = [
        f"\nbest-of-{r['n']} accuracy, task {r['task']}, {r['groups']} held-out groups, seeds {seeds}, "
        "95% intervals over groups"
    ]
    lines.append(f"{'':42s}{'joint':>24s}{'isolated':>24s}")
    for suffix, what in ROWS.items():
        lines.append(f"{what:42s}{cell('joint' + suffix)}{cell('isolated' + suffix)}")
    if r["task"] == "corroborated":
        lines.append(f"{'scores with noise':42s}{cell('joint_noise')}{cell('isolated_noise')}")
        lines.append(f"{'scores, then a vote over identical texts':42s}{cell('joint_vote')}{cell('isolated_vote')}")
        ceilings = "".join(f"{r['ceilings'][k]:24.3f}" for k in ("joint", "isolated"))
        lines.append(f"{'exact ceiling':42s}{ceilings}")
    lines.append("without a picture: " + ", ".join(f"{name} {r[name]:.3f}" for name in metrics.BASELINES))
    for mode in [m for m in MODES if m in r] if len(seeds) > 1 else ():
        lines.append(f"{mode}, own picture, seed by seed: " + ", ".join(f"{s[mode]:.3f}" for s in r["per_seed"]))
    if r["any_true"] is not None:
        lines.append(f"a random true answer: {r['any_true']:.3f}")
    lines.append(f"{r['seconds']} seconds")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- real checkpoints


def full(args: argparse.Namespace) -> dict:
    """Train on a checkpoint and a JSONL file, save, evaluate on records held back."""
    device = parallel.start()
    training = place(args.out, args.overwrite, args.resume)
    records, test = split(read_records(args.data), args.test, args.seed)
    recipe = replace(Recipe(), loss=args.loss)
    steps = args.steps or max(1, recipe.epochs * len(records) // (recipe.records * recipe.fit.accumulate))
    recipe = replace(recipe, fit=replace(recipe.fit, steps=steps, lr=args.lr or recipe.fit.lr))
    parallel.share(recipe.fit.accumulate)
    rm = RewardModel.new(args.weights, args.mode, recipe.lora, recipe.inner, device=device, seed=args.seed)
    rm.backbone.checkpointing = True
    if args.compile:
        rm.backbone.fuse()
    data, testing = Dataset(records, rm, keep=False), Dataset(test, rm, keep=False)
    asks = data.measure(recipe)
    testing.measure(recipe)
    if parallel.first():
        announce(asks, rm, recipe)
        start_over(training, args.resume)
    parallel.wait()
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
    about = {"mode": args.mode, "loss": args.loss, "seed": args.seed, "data": digest, "records": len(records)}
    about["base"] = rm.fingerprint["weights"]
    if args.compile:  # sums round otherwise
        about["compile"] = True
    train(data, recipe, args.seed, "train", training, run=about)
    if not parallel.first():
        raise SystemExit(0)  # the rest is for one
    rm.save(args.out, args.overwrite, also=[training / "metrics.jsonl"])
    shutil.rmtree(training)
    shows = {show: evaluate(testing, args.seed, show, size=1, title=show) for show in testing.shows()}
    figures = {show: accuracies(scores, test) for show, scores in shows.items()}
    figures |= {name: accuracies([b(r.responses) for r in test], test) for name, b in metrics.BASELINES.items()}
    print(f"\nbest-of-N accuracy of the {args.mode} model on {len(test)} records it was not trained on, 95% intervals")
    for name, values in figures.items():
        print("{:10s} {:.3f} [{:.3f}, {:.3f}]".format(name, metrics.mean(values), *metrics.interval(values)))
    return {"mode": args.mode, "steps": steps, **{name: metrics.mean(values) for name, values in figures.items()}}


def announce(asks: Sequence[Ask], rm: RewardModel, recipe: Recipe) -> None:
    """What the run will need, said before it starts."""
    config, dtype, steps = rm.backbone.config, rm.backbone.dtype, recipe.fit.steps
    longest = max(asks, key=lambda ask: ask.tokens)
    tokens = metrics.mean([ask.tokens for ask in asks])
    pictures = metrics.mean([ask.pictures for ask in asks])
    print(
        f"{len(asks)} records of {tokens:,.0f} tokens on average, {pictures:,.0f} of them pictures, "
        f"and {longest.tokens:,} at most; {steps} steps of {recipe.records * recipe.fit.accumulate} records"
    )
    held = memory.training(config, dtype, recipe.lora, recipe.inner)
    mask = longest.mask(rm.mode)
    pairs, _ = flops.executed(mask, longest.read)
    more = recipe.records * memory.activations(config, dtype, recipe.lora, mask, pairs)
    print(
        f"memory, computed: {held / 1e9:.1f} GB for weights, adapter and optimiser, and {more / 1e9:.1f} GB at most for"
    )
    print(f"the activations of {recipe.records} record(s): {(held + more) / 1e9:.1f} GB")
    some = random.Random(0).sample(asks, min(len(asks), 100))
    cost = metrics.mean([flops.training_step(config, ask, rm.mode, recipe.lora.r, recipe.inner) for ask in some])
    print(f"a step, computed: {cost * recipe.records * recipe.fit.accumulate / 1e12:,.1f} TFLOPs")


def place(out: Path, overwrite: bool, resume: bool) -> Path:
    """The folder of a run's state; refuses what it was not told to replace."""
    out = out.absolute()
    training = out.with_name(out.name + ".training")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already: choose another --out, or say --overwrite")
    if resume and not training.exists():
        raise InputError(f"there is no unfinished run at {training} to resume")
    if training.exists() and not resume and not overwrite:
        raise InputError(f"{training} holds an unfinished run: say --resume to go on, --overwrite to start over")
    return training


def start_over(training: Path, resume: bool) -> None:
    """An empty folder for the run's state, or, resuming, the one that is there. Called once all input is known good."""
    try:
        if training.exists() and not resume:
            shutil.rmtree(training)
        training.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {training}: {error.strerror}") from None


def split(records: list[Record], test: Path | None, seed: int) -> tuple[list[Record], list[Record]]:
    """Records to train on and to test on: the file `test`, or one record in twenty held back."""
    if test is not None:
        return records, read_records(test)
    if len(records) < 2:
        raise InputError("one record can't both be trained on and held back: add records, or give --test FILE")
    held_back = set(random.Random(f"{seed} hold back").sample(range(len(records)), max(1, len(records) // 20)))
    if parallel.first():
        print(f"held back for the evaluation: {len(held_back)} of {len(records)} records")
    return [r for i, r in enumerate(records) if i not in held_back], [records[i] for i in sorted(held_back)]


def main() -> None:
    parser = Parser(prog="python -m yojo.train", description="Train a reward model: LoRA and a value head.")
    parser.add_argument("--tiny", action="store_true", help="the built-in model and world; needs no files")
    parser.add_argument("--task", choices=TASKS, help="with --tiny: what the best answer is (default: absolute)")
    parser.add_argument(
        "--paraphrase", action="store_true", help="with --task corroborated: word the copies differently"
    )
    parser.add_argument("--seeds", type=int, metavar="K", help="with --tiny: K seeds from --seed on (default: 1)")
    sizes = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--sizes", **sizes, help="with --tiny: numbers of responses to train on (default: the task's)")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="checkpoint folder to train on")
    parser.add_argument("--data", type=Path, metavar="FILE", help="preference records, JSONL")
    parser.add_argument(
        "--test", type=Path, metavar="FILE", help="records to evaluate on; else one in twenty is held back"
    )
    parser.add_argument("--mode", choices=MODES, help="attention; --tiny trains both where this is not given")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the reward model; with --tiny, for both")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--compile", **COMPILE)
    parser.add_argument("--loss", choices=LOSSES, default=Recipe().loss, help="what scores are trained against")
    parser.add_argument("--steps", type=int, help="training steps, where not the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate, where not the recipe's")
    args = parser.parse_args()
    run(lambda: start(args), parser, args)


def start(args: argparse.Namespace) -> dict:
    ours, theirs = ("task", "paraphrase", "seeds", "sizes"), ("weights", "data", "test", "resume", "compile")
    given = [name for name in (theirs if args.tiny else ours) if getattr(args, name) not in (None, False)]
    if given:
        where = "without" if args.tiny else "with"
        raise InputError(f"--{given[0]} goes {where} --tiny only")
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps {args.steps}: at least 1")
    if args.lr is not None and not 0 < args.lr < 1:
        raise InputError(f"--lr {args.lr}: between 0 and 1")
    if args.tiny:
        task, seeds = args.task or "absolute", 1 if args.seeds is None else args.seeds
        if args.paraphrase and task != "corroborated":
            raise InputError("--paraphrase goes with --task corroborated only")
        if seeds < 1 or (seeds > 1 and args.out):
            raise InputError(
                f"--seeds {seeds}: give at least 1, and no more than 1 with --out, which holds one seed's models"
            )
        if args.sizes and (task != "absolute" or not all(2 <= n <= 16 for n in args.sizes)):
            raise InputError(f"--sizes {args.sizes}: 2 to 16 responses, with --task absolute only")
        recipe, n = TASKS[task]
        steps, lr = args.steps or recipe.fit.steps, args.lr or recipe.fit.lr
        recipe = replace(recipe, loss=args.loss, fit=replace(recipe.fit, steps=steps, lr=lr))
        modes = [args.mode] if args.mode else MODES
        seeds = range(args.seed, args.seed + seeds)
        return tiny(task, recipe, args.sizes or [n], modes, seeds, args.out, args.overwrite, args.paraphrase)
    if not (args.weights and args.data and args.out and args.mode):
        raise InputError("give --tiny, or all of --weights, --data, --out and --mode")
    return full(args)


if __name__ == "__main__":
    main()
