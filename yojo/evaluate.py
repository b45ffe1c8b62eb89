"""Evaluate a reward model on preference records and on five public benchmarks' files.

    python -m yojo.evaluate --model weights/tiny-rm --data test.jsonl --format records
    python -m yojo.evaluate --model runs/rm --data vlrb.jsonl --format vl-rewardbench --permutations 2
    python -m yojo.evaluate --tiny                    what comparison adds, and accuracy against N, on the tiny world

Every file is JSONL, picture paths relative to it. Formats (`benchmarks.py`) and the figure that is
reported for each:

    records                 best-of-N accuracy, pairwise accuracy, Kendall's tau-b  (the project's own; MR2Bench)
    vl-rewardbench          macro mean over general, hallucination, reasoning
    multimodal-rewardbench  micro mean
    mm-rlhf                 ACC over pairs, ACC+ over ids (all pairs of an id right)
    videorewardbench        macro mean

Candidates are shown in an order drawn from the seed and the item: fed in file order, a joint model turns a habit of
position into accuracy. A tie is wrong for a pair and counts by its share for best-of-N.

The scores go to `--out`, a line an item; a killed run goes on from there and ends with the same file.

See it: `pytest tests/test_evaluate.py`.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from yojo import checks, metrics
from yojo.benchmarks import FORMATS, Item, read_items
from yojo.cli import Parser, add_model_options, computed_on, run, table, whole, with_interval
from yojo.core.ahead import ahead
from yojo.core.data import in_order, open_pictures
from yojo.core.held_out import score_orders
from yojo.core.mask import MODES
from yojo.core.reward import RewardModel
from yojo.files import InputError, add_line, is_plain, whole_file
from yojo.store import digest
from yojo.tiny.comparison import tables

Scores = list[list[float]]  # of one item: a row for each order it was shown in, in the item's own order of responses

# ------------------------------------------------------------------------------------------------------------ scoring


def orders_of(item: Item, seed: int, count: int) -> list[list[int]]:
    """`count` different orders to show the n candidates in, drawn from seed and content; at most all n!."""
    n, orders = len(item.responses), []
    rng = random.Random(json.dumps([seed, item.prompt, item.responses]))
    while len(orders) < min(count, math.factorial(n)):
        order = rng.sample(range(n), n)
        orders += [order] * (order not in orders)
    return orders


@torch.no_grad()
def score_item(rm: RewardModel, item: Item, orders: list[list[int]], mode: str) -> Scores:
    shown = replace(item, pictures=rm.backbone.keep_features(open_pictures(item, rm.processor)))
    return list(score_orders(rm, [(shown, order) for order in orders], mode, tokens=1))


def score_items(
    done: list[Scores | str],
    items: list[Item],
    opened: Callable[[Item], Item],
    score: Callable[[Item], Scores],
    out: Path | None,
    identity: str,
    overwrite: bool,
    going: bool,
) -> None:
    """Scores of every item, its pictures `opened` ahead, are put into `done`; those that `out` holds already are read
    from it, unless `overwrite`. An item that can't be scored raises or, `going` on, has its error in their place."""
    if out is not None and not is_plain(out):
        raise InputError(f"{out} is a device or a pipe: scores are kept in a file, from which an evaluation goes on")
    done += [] if out is None or overwrite else resume(out, identity)
    if out is not None:
        with whole_file(out) as temporary:
            lines = [identity, *map(json.dumps, done)]
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def attempted(item: Item) -> Item | InputError:
        try:
            return opened(item)
        except InputError as error:
            return error

    with ahead(attempted, items[len(done) :]) as left:
        for item in tqdm(left, "scoring", initial=len(done), total=len(items), delay=2):
            try:
                if isinstance(item, InputError):
                    raise item
                done.append(score(item))
            except InputError as error:
                if not going:
                    raise
                done.append(str(error))
            if out is not None:
                add_line(out, done[-1])


def resume(out: Path, identity: str) -> list[Scores | str]:
    """The scores of the items that an earlier run finished: whole lines of the same evaluation."""
    if not out.exists():
        return []
    try:
        theirs, *lines = out.read_text(encoding="utf-8").split("\n")
        if theirs == identity:
            return [json.loads(line) for line in lines[:-1]]  # after the last line break: nothing, or half a line
    except (OSError, ValueError) as error:
        raise InputError(
            f"{out} cannot be read as an evaluation ({error}): choose another, or --overwrite it"
        ) from None
    raise InputError(f"{out} holds another evaluation: choose another --out, or say --overwrite")


def identity_of(items: list[Item], model: dict, protocol: dict) -> str:
    """One line that names everything the scores depend on; of pictures, their names, sizes and times."""
    content = []
    for item in items:
        stats = [stat for source in checks.sources_of(item) for stat in checks.stats_of(source)]
        stats += [item.video.interval] if item.video else []
        content.append((item.prompt, item.responses, item.rankings, stats))
    items_digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**model, "items": items_digest, **protocol})


# ------------------------------------------------------------------------------------------------------------- report

BASELINES = ("random", "longest", "shortest", "first", "last")


def right(scores: Sequence[float], ranks: Sequence[int]) -> float:
    """Best-of-N, ties by their share; for a pair a tie is wrong."""
    if len(ranks) == 2 and scores[0] == scores[1] and ranks[0] != ranks[1]:
        return 0.0
    return metrics.best_of_n(scores, ranks)


Orders = Callable[[Item], list[list[int]]]


def report(items: list[Item], scores: list[Scores], form: str, mode: str, orders: Orders) -> dict:
    """Figures of the order shown first; with several, how much they depend on it."""
    first = [rows[0] for rows in scores]
    values = [right(s, item.rankings) for s, item in zip(first, items, strict=True)]
    categories, baselines = [item.category for item in items], {}
    result: dict = {"format": form, "mode": mode, "items": len(items)}
    result["without_picture"] = sum(not item.images and item.video is None for item in items)
    result["accuracy"], result["interval"] = metrics.mean(values), metrics.interval(values)
    if form in ("vl-rewardbench", "videorewardbench"):
        result["macro"] = metrics.macro(values, categories)
        result["macro_interval"] = metrics.macro_interval(values, categories)
    if form == "mm-rlhf":
        ids = [float(min(some) == 1) for some in metrics.by_category(values, [item.group for item in items]).values()]
        result |= {"acc_plus": metrics.mean(ids), "acc_plus_interval": metrics.interval(ids), "ids": len(ids)}
    if form == "records":
        for name, figure in (("pairwise", metrics.pairwise), ("tau_b", metrics.tau_b)):
            found = [figure(s, item.rankings) for s, item in zip(first, items, strict=True)]
            result[name] = metrics.mean(found) if any(value is not None for value in found) else None
    result["ties"] = metrics.mean([float(len(set(s)) < len(s)) for s in first])
    parts = metrics.by_category(values, categories)
    result["categories"] = {name: {"items": len(v), "accuracy": metrics.mean(v)} for name, v in parts.items()}
    shown = [in_order(item, orders(item)[0]) for item in items]
    for name in BASELINES:  # which read no picture; random guesses a pair right half the time
        figure = metrics.best_of_n if name == "random" else right
        baselines[name] = metrics.mean([figure(metrics.BASELINES[name](i.responses), i.rankings) for i in shown])
    result["baselines"] = baselines
    if any(len(rows) > 1 for rows in scores):
        result["order"] = order_sensitivity(items, scores, orders)
    return result


def order_sensitivity(items: list[Item], scores: list[Scores], orders: Orders) -> dict:
    """How often the winner changes with the order, accuracy by the place of the best answer, accuracy of the mean."""
    changed, by_place, averaged = [], {}, []
    for item, rows in zip(items, scores, strict=True):
        winners, ranks = [int(np.argmax(row)) for row in rows], item.rankings
        changed += [float(w != winners[0]) for w in winners[1:]]
        averaged.append(right(np.mean(rows, axis=0).tolist(), ranks))
        for order, row in zip(orders(item), rows, strict=True):
            if ranks.count(min(ranks)) == 1:
                by_place.setdefault(order.index(ranks.index(min(ranks))), []).append(right(row, ranks))
    places = {str(place + 1): metrics.mean(values) for place, values in sorted(by_place.items())}
    return {"changed": metrics.mean(changed), "by_place": places, "mean_over_orders": metrics.mean(averaged)}


def print_report(result: dict) -> None:
    intervals = {"accuracy": "interval", "macro": "macro_interval", "acc_plus": "acc_plus_interval"}
    titles = {"accuracy": "accuracy (micro)" if "macro" in result else "accuracy", "macro": "macro", "acc_plus": "ACC+"}
    found = {titles[k]: with_interval(result[k], result[i]) for k, i in intervals.items() if k in result}
    rows = [{"figure": title, "value": value} for title, value in found.items()]
    ranks = [name for name in ("pairwise", "tau_b") if result.get(name) is not None]
    rows += [{"figure": name, "value": f"{result[name]:.3f}"} for name in ranks]
    n, blind, ties = result["items"], result["without_picture"], result["ties"]
    print(f"\n{result['format']}, {result['mode']}, {n} items, {blind} of them without a picture; ties in {ties:.1%}")
    print(table(rows, {"figure": "<", "value": "<"}))
    if len(result["categories"]) > 1:
        rows = [{"category": name} | row for name, row in result["categories"].items()]
        print(table(rows, {"category": "<", "accuracy": ".3f", "items": "d"}))
    print("without a picture: " + ", ".join(f"{name} {value:.3f}" for name, value in result["baselines"].items()))
    if order := result.get("order"):
        places = ", ".join(f"{place}: {value:.3f}" for place, value in order["by_place"].items())
        print(f"order: the winner changes in {order['changed']:.1%}; mean over orders {order['mean_over_orders']:.3f};")
        print(f"best answer at place {places}")


# ------------------------------------------------------------------------------------------------------------ command

RULES = [
    ("without", "tiny", "model base data format map mode permutations out dtype compile keep-going"),
    ("with", "out", "overwrite"),
    ("or", "tiny", "model data"),
]


def main() -> None:
    parser = Parser(prog="python -m yojo.evaluate", description="Evaluate a model on a benchmark.", rules=RULES)
    add = parser.add_argument
    add("--tiny", action="store_true", help="the built-in models on the tiny world; needs no files")
    add("--model", type=Path, metavar="DIR", help="a reward model's folder")
    add("--base", type=Path, metavar="DIR", help="the folder of its backbone, if it has moved")
    add("--data", type=Path, metavar="FILE", help="the benchmark, JSONL")
    add("--format", choices=FORMATS, default="records", help="its schema")
    add(
        "--map", action="append", default=[], metavar="NAME=FIELD", help="read NAME, such as prompt, from FIELD; repeat"
    )
    add("--mode", choices=MODES, help="attention, where not the one the model was trained in")
    add("--permutations", type=whole(1), default=1, metavar="K", help="orders to show each item in, of those there are")
    add("--out", type=Path, metavar="FILE", help="keep the scores there, and go on from them")
    add("--overwrite", action="store_true", help="start --out over")
    add("--keep-going", action="store_true", help="leave bad rows out, and list them")
    add_model_options(parser)
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> dict | list[dict]:
    if args.tiny:
        return tables(args.seed, args.device)
    left_out: list[str] = []
    given = read_items(args.data, args.format, args.map, left_out if args.keep_going else None)
    items = checks.preferring(given)
    without_preference = len(given) - len(items)
    rm = RewardModel.load(args.model, args.base, **computed_on(args))
    mode = args.mode or rm.mode
    model = {"model": digest(args.model), "base": rm.fingerprint, "pictures": str(rm.processor.images)}
    model |= {"device": rm.backbone.device.type, "dtype": str(rm.backbone.dtype)}
    if args.compile:
        model["compile"] = True
        rm.backbone.fuse()
    if mode != rm.mode:
        print(f"mode: {mode} (trained in {rm.mode})")
    protocol = {"mode": mode, "seed": args.seed, "permutations": args.permutations}

    def orders(item: Item) -> list[list[int]]:
        return orders_of(item, args.seed, args.permutations)

    def opened(item: Item) -> Item:
        return replace(item, pictures=open_pictures(item, rm.processor))

    def score(item: Item) -> Scores:
        return score_item(rm, item, orders(item), mode)

    done: list[Scores | str] = []
    args.found = {"scores": done}
    identity = identity_of(items, model, protocol)
    score_items(done, items, opened, score, args.out, identity, args.overwrite, args.keep_going)
    left_out += [scores for scores in done if isinstance(scores, str)]
    scored = [(item, scores) for item, scores in zip(items, done, strict=True) if not isinstance(scores, str)]
    if not scored:
        raise InputError("no item could be scored; the first: " + left_out[0])
    items, scores = map(list, zip(*scored, strict=True))
    result = report(items, scores, args.format, mode, orders)
    print_report(result)
    checks.report(left_out)
    return result | {"left_out": left_out, "without_preference": without_preference}


if __name__ == "__main__":
    main()
