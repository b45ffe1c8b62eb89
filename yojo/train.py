"""Train a reward model on preference records, and say what its accuracy means.

    python -m yojo.train --tiny                          both modes on the tiny world
    python -m yojo.train --tiny --task corroborated      the task that only comparison solves
    python -m yojo.train --tiny --baseline               beside them, a single-response model trained on pairs
    python -m yojo.train --weights weights/Molmo2-4B --data prefs.jsonl --out runs/rm --mode joint

Accuracy is best-of-N on records that were not trained on. Beside it stand the controls (the picture blanked, or swapped
with another record's) and baselines that read no picture.

`--out` becomes a reward model's folder when the run is complete. Until then `<out>.training` holds its state: an
interrupted run goes on from there with `--resume`. Before the first step every picture and frame is opened once; bad
records end the command or, with `--keep-going`, are left out and listed.
"""

import argparse
import hashlib
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from yojo import checks, memory, metrics
from yojo.cli import Parser, add_model_options, computed_on, rate, run, whole, with_interval
from yojo.core import flops, parallel
from yojo.core.data import Record, encode, read_records
from yojo.core.held_out import controls, score_records
from yojo.core.loss import LOSSES
from yojo.core.mask import MODES
from yojo.core.prompt import Processor
from yojo.core.reward import RewardModel
from yojo.core.training import Recipe, train
from yojo.files import InputError
from yojo.runs import SavedRun, kept, run_folder, start_over
from yojo.tiny.experiment import BASELINES, SINGLE, TASKS, run_tiny


def run_files(args: argparse.Namespace) -> dict:
    """Train on a checkpoint and a JSONL file, save, evaluate on records held back."""
    device = parallel.join_group(args.device)
    training = run_folder(args.out, args.overwrite, args.resume)
    bad: list[str] | None = [] if args.keep_going else None
    records, test = split(readable(args.data, bad), args.test and readable(args.test, bad), args.seed)
    recipe = replace(Recipe(), loss=args.loss)
    steps = args.steps or max(1, recipe.epochs * len(records) // (recipe.records * recipe.fit.accumulate))
    recipe = replace(recipe, fit=replace(recipe.fit, steps=steps, lr=args.lr or recipe.fit.lr))
    parallel.share(recipe.fit.accumulate)
    how = computed_on(args) | {"device": device, "seed": args.seed}
    rm = RewardModel.new(args.weights, args.mode, recipe.lora, recipe.inner, **how)
    rm.backbone.checkpointing = True
    if args.compile:
        rm.backbone.fuse()
    records, lengths = fit_pictures(records, rm.processor, recipe, bad)
    test, _ = fit_pictures(test, rm.processor, recipe, bad)
    checks.report(bad or [])
    if parallel.is_main():
        announce(records, lengths, rm, recipe)
        start_over(training, args.resume)
    parallel.wait()
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
    about = {"mode": args.mode, "loss": args.loss, "seed": args.seed, "data": digest}
    about |= {"base": rm.fingerprint["weights"], "dtype": str(rm.backbone.dtype)}
    about |= checks.identity(records, bad, args.data)
    if args.compile:  # sums round otherwise
        about["compile"] = True

    tests = {"own": test, **controls(test)}
    state = SavedRun(training, about)
    with kept(state):
        train(rm, records, recipe, args.seed, state, title="train")
    main = parallel.is_main()
    parallel.leave_group()
    if not main:
        raise SystemExit(0)  # the rest is for one
    with kept(state):
        rm.save(args.out, args.overwrite, also=[training / "metrics.jsonl"])
    shutil.rmtree(training)
    # one record a batch: those of files are long
    args.found = {"mode": args.mode, "steps": steps, "left_out": bad or []}
    print(f"\nbest-of-N accuracy of the {args.mode} model on {len(test)} records it was not trained on, 95% intervals")
    for name in (*tests, *BASELINES):
        if name in tests:
            scores = score_records(rm, tests[name], args.seed, tokens=1, title=name)
        else:
            scores = [metrics.BASELINES[name](r.responses) for r in test]
        values = metrics.accuracies(scores, test)
        args.found[name] = metrics.mean(values)
        print(f"{name:10s} {with_interval(args.found[name], metrics.interval(values))}")
    return args.found


def readable(path: Path, bad: list[str] | None) -> list[Record]:
    """The records of a file that say what is better, and whose pictures can all be opened."""
    return checks.openable(checks.preferring(read_records(path, bad=bad)), bad)


Lengths = tuple[int, int]  # of a record: its tokens, and those of them that are pictures


def fit_pictures(
    records: list[Record], processor: Processor, recipe: Recipe, bad: list[str] | None = None
) -> tuple[list[Record], list[Lengths]]:
    """The records, and the lengths of each, before a run: one that is too long raises or, with a list `bad`, is left
    out, and pictures that would not fit are cut into fewer crops, which is said."""
    limit, most = min(recipe.max_tokens, processor.max_tokens), processor.images.max_crops
    processor = replace(processor, max_tokens=sys.maxsize)

    def fit(record: Record) -> tuple[Record, Lengths]:
        fewer = range((record.max_crops or most) - 1, 0, -1) if record.images else ()  # a video is not cut
        for fitting in (record, *(replace(record, max_crops=crops) for crops in fewer)):
            row = encode(fitting, processor, pixels=False)
            tokens, pictures = len(row.ids), len(row.pictures.ids)
            if tokens <= limit and pictures <= recipe.max_picture_tokens:
                return fitting, (tokens, pictures)
        found = f"{record.where}: {tokens} tokens, {pictures} of them pictures"
        allowed = f"{limit} and {recipe.max_picture_tokens} are the most"
        raise InputError(f"{found}, where {allowed}: shorten or drop responses")

    fitted, lengths = zip(*checks.keeping(records, fit, bad, "measuring"), strict=True)
    if cut := [record for record in fitted if record.max_crops is not None]:
        parallel.say(
            f"to fit into {limit} tokens, pictures of {len(cut)} record(s) are cut into fewer than {most} crops;"
        )
        parallel.say(f"the first is {cut[0].where}: at most {cut[0].max_crops}")
    return [*fitted], [*lengths]


def announce(records: list[Record], lengths: list[Lengths], rm: RewardModel, recipe: Recipe) -> None:
    """What the run will need, said before it starts."""
    config, dtype, a_step = rm.backbone.config, rm.backbone.dtype, recipe.records * recipe.fit.accumulate
    tokens, pictures = (metrics.mean(column) for column in zip(*lengths, strict=True))
    longest = max(range(len(records)), key=lambda i: lengths[i][0])
    print(f"{len(records)} records of {tokens:,.0f} tokens on average, {pictures:,.0f} of them pictures, and ", end="")
    print(f"{lengths[longest][0]:,} at most; {recipe.fit.steps} steps of {a_step} records")
    held = memory.training(config, dtype, recipe.lora, recipe.inner)
    some = [records[longest], *random.Random(0).sample(records, min(len(records), 100))]
    row, *rows = (encode(record, rm.processor, pixels=False) for record in some)
    more = recipe.records * memory.activations(config, dtype, recipe.lora, row, rm.mode)
    print(
        f"memory, computed: {held / 1e9:.1f} GB for weights, adapter, optimiser, and {more / 1e9:.1f} GB at most for",
        end=" ",
    )
    print(f"the activations of {recipe.records} record(s): {(held + more) / 1e9:.1f} GB")
    cost = metrics.mean([flops.training_step(config, row, rm.mode, recipe.lora.r, recipe.inner) for row in rows])
    print(f"a step, computed: {cost * a_step / 1e12:,.1f} TFLOPs")


def split(records: list[Record], test: list[Record] | None, seed: int) -> tuple[list[Record], list[Record]]:
    """Records to train on and to test on: those given, or one record in twenty held back."""
    if test is not None:
        return records, test
    if len(records) < 2:
        raise InputError("one record can't both be trained on and held back: add records, or give --test FILE")
    held_back = set(random.Random(f"{seed} hold back").sample(range(len(records)), max(1, len(records) // 20)))
    parallel.say(f"held back for the evaluation: {len(held_back)} of {len(records)} records")
    return [r for i, r in enumerate(records) if i not in held_back], [records[i] for i in sorted(held_back)]


RULES = [
    ("with", "tiny", "task baseline paraphrase seeds sizes"),
    ("without", "tiny", "weights data test resume keep-going dtype compile"),
    ("with", "out", "overwrite"),
    ("or", "tiny", "weights data out mode"),
]


def main() -> None:
    parser = Parser(prog="python -m yojo.train", description="Train a reward model: LoRA and a head.", rules=RULES)
    add = parser.add_argument
    add("--tiny", action="store_true", help="the built-in model and world; needs no files")
    add("--task", choices=TASKS, default="absolute", help="absolute: the truest is best; corroborated: the confirmed")
    add("--baseline", action="store_true", help="a third model: single-response, Bradley-Terry on disjoint pairs")
    add("--paraphrase", action="store_true", help="--task corroborated, its copies worded differently")
    add("--seeds", type=whole(1), default=1, metavar="K", help="K seeds, from --seed on; 1 where there is an --out")
    add(
        "--sizes", type=whole(2), nargs="+", metavar="N", help="--task absolute: answers in training, 2 to 16, if not 4"
    )
    add("--weights", type=Path, metavar="DIR", help="checkpoint folder to train on")
    add("--data", type=Path, metavar="FILE", help="preference records, JSONL")
    add("--test", type=Path, metavar="FILE", help="records to evaluate on; else one in twenty is held back")
    add("--mode", choices=MODES, help="attention; --tiny trains each where this is not given")
    add("--out", type=Path, metavar="DIR", help="folder for the reward model; with --tiny, for each")
    add("--overwrite", action="store_true", help="replace what --out holds")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--keep-going", action="store_true", help="leave bad records out, and list them")
    add("--loss", choices=LOSSES, default=Recipe().loss, help="what scores are trained against, but for --baseline")
    d, tiny = Recipe(), {task: recipe.fit for task, (recipe, _) in TASKS.items()}
    steps = f"training steps (default: every record {d.epochs} times; with --tiny "
    steps += " or ".join(f"{fit.steps} for {task}" for task, fit in tiny.items()) + ")"
    add("--steps", type=whole(1), metavar="S", help=steps)
    add("--lr", type=rate, metavar="X", help=f"learning rate (default: {d.fit.lr}; with --tiny {tiny['absolute'].lr})")
    add_model_options(parser)
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> dict:
    if not args.tiny:
        return run_files(args)
    if args.paraphrase and args.task != "corroborated":
        raise InputError("--paraphrase goes with --task corroborated only")
    if args.seeds > 1 and args.out:
        raise InputError(f"--seeds {args.seeds}: --out holds one seed's models")
    if args.sizes and (args.task != "absolute" or max(args.sizes) > 16):
        raise InputError(f"--sizes {args.sizes}: 2 to 16 responses, with --task absolute only")
    recipe, n = TASKS[args.task]
    fit = replace(recipe.fit, steps=args.steps or recipe.fit.steps, lr=args.lr or recipe.fit.lr)
    recipe, kinds = replace(recipe, loss=args.loss, fit=fit), [args.mode] if args.mode else [*MODES]
    kinds += [SINGLE] if args.baseline else []
    seeds, sizes = range(args.seed, args.seed + args.seeds), args.sizes or [n]
    return run_tiny(args.task, recipe, sizes, kinds, seeds, args.out, args.overwrite, args.paraphrase, args.device)


if __name__ == "__main__":
    main()
