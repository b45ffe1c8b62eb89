"""Evaluate a reward model on preference records and on five public benchmarks' files.

    python -m yojo.evaluate --model weights/tiny-rm --data test.jsonl --format records
    python -m yojo.evaluate --model runs/rm --data vlrb.jsonl --format vl-rewardbench --permutations 2
    python -m yojo.evaluate --tiny                    what comparison adds, and accuracy against N, on the tiny world

Every file is JSONL, picture paths relative to it. Formats and the figure that is reported for each:

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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from yojo import metrics
from yojo.cli import COMPILE, DTYPE, Parser, run
from yojo.core.data import Record, open_pictures
from yojo.core.held_out import score_orders
from yojo.core.mask import MODES
from yojo.core.reward import RewardModel
from yojo.files import InputError, add_line, read_lines, whole_file
from yojo.store import digest

# -------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Item:
    """One comparison. rankings: 1 = best; group: items that ACC+ counts as one."""

    prompt: str
    responses: list[str]
    rankings: list[int]
    images: list[Path]
    video: Path | None
    category: str
    group: str
    where: str

    def identity(self) -> list:
        """All that its scores depend on, its pictures by their size and time."""
        files = [
            f
            for path in [*self.images, self.video]
            if path
            for f in (sorted(path.iterdir()) if path.is_dir() else [path])
        ]
        return [
            self.prompt,
            self.responses,
            self.rankings,
            [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        ]

    def orders(self, seed: int, count: int) -> list[list[int]]:
        """`count` different orders to show the n candidates in, drawn from seed and content; at most all n!."""
        n, orders = len(self.responses), []
        rng = random.Random(json.dumps([seed, self.prompt, self.responses]))
        while len(orders) < min(count, math.factorial(n)):
            order = rng.sample(range(n), n)
            orders += [order] * (order not in orders)
        return orders


# The fields each format is read from; `--map name=field` names another. Those of MR2Bench and VideoRewardBench could
# not be confirmed against the published files.
FIELDS = {
    "records": {"prompt": "prompt", "responses": "responses", "rankings": "rankings", "category": "category"},
    "vl-rewardbench": {"prompt": "query", "responses": "response", "rankings": "human_ranking", "group": "id"},
    "multimodal-rewardbench": {
        "prompt": "Text",
        "first": "Output1",
        "second": "Output2",
        "better": "Better",
        "category": "Category",
        "image": "Image",
    },
    "mm-rlhf": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "group": "id"},
    "videorewardbench": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "category": "category"},
}
for _fields in FIELDS.values():
    for _name in ("image", "images", "video"):
        _fields.setdefault(_name, _name)
# VL-RewardBench has no category field; where an id comes from says it.
PREFIXES = {
    "general": ("wildvision", "vlfeedback"),
    "hallucination": ("rlaif-v", "rlhf-v", "povid", "hallucination"),
    "reasoning": ("mathverse", "mmmu", "reasoning"),
}


def read_items(path: str | Path, form: str, mapping: dict[str, str], keep_going: bool) -> tuple[list[Item], list[str]]:
    """Items, and what is wrong with the rows that were left out; without `keep_going` the first bad row raises."""
    fields, items, left_out = FIELDS[form] | mapping, [], []
    for where, raw in read_lines(path, left_out if keep_going else None):
        try:
            items.append(_item(raw, form, fields, where, Path(path).parent))
        except InputError as error:
            if not keep_going:
                raise
            left_out.append(str(error))
    if not items:
        raise InputError(f"{path} holds no items that can be read as {form}")
    return items, left_out


def _item(raw: dict, form: str, fields: dict[str, str], where: str, folder: Path) -> Item:
    def get(name: str, kind: type | tuple[type, ...]):
        value = raw.get(fields[name])
        if not isinstance(value, kind):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise InputError(f"{where}: {fields[name]} must be a {kinds}, got {value!r}; --map {name}=FIELD")
        return value

    if form in ("records", "vl-rewardbench"):
        responses, ranks = get("responses", list), get("rankings", list)
        whole = all(type(rank) is int for rank in ranks)
        if not whole or len(ranks) != len(responses):
            raise InputError(f"{where}: {fields['rankings']} must be {len(responses)} whole numbers, got {ranks!r}")
    elif form == "multimodal-rewardbench":
        responses, better = [get("first", str), get("second", str)], get("better", str)
        names = (fields["first"], fields["second"])
        if better not in names:
            raise InputError(f"{where}: {fields['better']} must be one of {names}, got {better!r}")
        ranks = [1, 2] if better == names[0] else [2, 1]
    else:
        responses, ranks = [get("chosen", str), get("rejected", str)], [1, 2]
    if len(responses) < 2 or not all(isinstance(r, str) and r.strip() for r in responses):
        raise InputError(f"{where}: at least two responses, none of them empty")
    if form != "records" and (len(responses) != 2 or ranks[0] == ranks[1]):
        raise InputError(f"{where}: a pair with one better answer is needed, got ranks {ranks}")
    images, video = _pictures(raw, fields, where, folder)
    group = str(get("group", (str, int))) if "group" in fields else where
    category = _category(raw, form, fields, group, images, video, where)
    ranks = [1 + sum(other < rank for other in ranks) for rank in ranks]  # from 0 or from 1, lower is better
    return Item(get("prompt", str), responses, ranks, images, video, category, group, where)


def _pictures(raw: dict, fields: dict[str, str], where: str, folder: Path) -> tuple[list[Path], Path | None]:
    """Pictures or a video folder of a row; a file that is not there raises."""
    one, video = raw.get(fields["image"]), raw.get(fields["video"])
    names = raw.get(fields["images"]) or ([] if one is None else [one])
    given = [*names, *([] if video is None else [video])] if isinstance(names, list) else [None]
    if not all(isinstance(name, str) and name for name in given):
        raise InputError(f"{where}: pictures are paths, got {names!r} and {video!r}")
    paths = [folder / name for name in names]
    for path in [*paths, *([folder / video] if video else [])]:
        if not path.exists():
            raise InputError(f"{where}: no picture or video at {path}")
    return paths, folder / video if video else None


def _category(
    raw: dict, form: str, fields: dict, group: str, images: list[Path], video: Path | None, where: str
) -> str:
    if "category" in fields:
        if form != "records" and not isinstance(raw.get(fields["category"]), str):
            raise InputError(f"{where}: {fields['category']} must be a str; --map category=FIELD")
        return str(raw.get(fields["category"], "all"))
    if form == "mm-rlhf":  # the folder above the picture
        path = video or (images[0] if images else None)
        return path.parent.name or "all" if path else "text"
    for category, prefixes in PREFIXES.items():
        if group.lower().startswith(prefixes):
            return category
    raise InputError(f"{where}: the id {group!r} starts with none of {PREFIXES}; --map category=FIELD")


# ------------------------------------------------------------------------------------------------------------ scoring


@dataclass
class Evaluation:
    """What is scored, how, and where its scores are kept."""

    rm: RewardModel
    items: list[Item]
    mode: str
    seed: int
    permutations: int
    about: dict = field(default_factory=dict)
    keep_going: bool = False
    left_out: list[str] = field(default_factory=list)

    def identity(self) -> str:
        """One line that names everything the scores depend on."""
        items = hashlib.sha256(json.dumps([item.identity() for item in self.items]).encode()).hexdigest()
        about = {"items": items, "mode": self.mode, "seed": self.seed, "permutations": self.permutations}
        return json.dumps(self.about | about)

    def score_item(self, item: Item) -> list[list[float]]:
        """Scores by order shown, each list in the item's own order of responses."""
        rm, record = self.rm, Record(item.prompt, item.responses, None, item.images, item.where, item.video)
        orders = item.orders(self.seed, self.permutations)
        record = replace(record, pictures=rm.backbone.keep_features(open_pictures(record, rm.processor)))
        scores = list(score_orders(rm, [(record, order) for order in orders], self.mode, tokens=1))
        if bad := [row for row in scores if not all(map(math.isfinite, row))]:
            raise InputError(f"{item.where}: scores are not finite: {bad[0]}")
        return scores


@torch.no_grad()
def score_items(r: Evaluation, out: Path | None, overwrite: bool) -> list[list[list[float]]]:
    """Scores of every item; those that `out` holds already are read from it. Items that can't be scored raise, or,
    with `keep_going`, are taken out of the run and listed."""
    done = [] if out is None or overwrite else _resume(r, out)
    if out is not None:
        with whole_file(out) as temporary:
            lines = [r.identity(), *map(json.dumps, done)]
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    for item in tqdm(r.items[len(done) :], "scoring", initial=len(done), total=len(r.items), delay=2):
        try:
            done.append(r.score_item(item))
        except InputError as error:
            if not r.keep_going:
                raise
            done.append(str(error))
        if out is not None:
            add_line(out, done[-1])
    r.left_out += [scores for scores in done if isinstance(scores, str)]
    r.items = [item for item, scores in zip(r.items, done, strict=True) if not isinstance(scores, str)]
    if not r.items:
        raise InputError("no item could be scored; the first: " + r.left_out[0])
    return [scores for scores in done if not isinstance(scores, str)]


def _resume(r: Evaluation, out: Path) -> list[list[list[float]]]:
    """The scores of the items that an earlier run finished: whole lines of the same evaluation."""
    if not out.exists():
        return []
    try:
        identity, *lines = out.read_text(encoding="utf-8").split("\n")
        if identity != r.identity():
            raise InputError(f"{out} holds another evaluation: choose another --out, or say --overwrite")
        return [json.loads(line) for line in lines[:-1]]  # after the last line break stands nothing, or half a line
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{out} cannot be read as an evaluation ({error}): say --overwrite") from None


# ------------------------------------------------------------------------------------------------------------- report


def right(scores: Sequence[float], ranks: Sequence[int]) -> float:
    """Best-of-N, ties by their share; for a pair a tie is wrong."""
    if len(ranks) == 2 and scores[0] == scores[1] and ranks[0] != ranks[1]:
        return 0.0
    return metrics.best_of_n(scores, ranks)


def macro(values: Sequence[float], categories: Sequence[str]) -> float:
    by = {c: [v for v, mine in zip(values, categories, strict=True) if mine == c] for c in categories}
    return float(np.mean([np.mean(v) for v in by.values()]))


def all_right(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    """One value a group: 1 where every value in it is 1."""
    return [
        float(all(v == 1 for v, g in zip(values, groups, strict=True) if g == name)) for name in dict.fromkeys(groups)
    ]


def stratified(
    values: Sequence[float], categories: Sequence[str], seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Bootstrap interval of the macro mean: items drawn again inside their category."""
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    names = list(dict.fromkeys(categories))
    for name in names:
        mine = np.array([v for v, c in zip(values, categories, strict=True) if c == name])
        total += mine[rng.integers(0, len(mine), (draws, len(mine)))].mean(1)
    low, high = np.quantile(total / len(names), [0.025, 0.975])
    return float(low), float(high)


def position(best: str) -> Callable[[Sequence[str]], list[float]]:
    return lambda responses: [(-1.0 if best == "first" else 1.0) * i for i in range(len(responses))]


BASELINES = {
    "random": metrics.chance,
    "longest": metrics.longest,
    "shortest": lambda responses: [-s for s in metrics.longest(responses)],
    "first": position("first"),
    "last": position("last"),
}


def report(r: Evaluation, form: str, scores: list[list[list[float]]]) -> dict:
    items, shown = r.items, [s[0] for s in scores]
    values = [right(s, item.rankings) for s, item in zip(shown, items, strict=True)]
    categories = [item.category for item in items]
    result: dict = {"format": form, "mode": r.mode, "items": len(items)}
    result["without_picture"] = sum(not item.images and item.video is None for item in items)
    result["accuracy"], result["interval"] = metrics.mean(values), metrics.interval(values)
    if form in ("vl-rewardbench", "videorewardbench"):
        result["macro"], result["macro_interval"] = macro(values, categories), stratified(values, categories)
    if form == "mm-rlhf":
        ids = all_right(values, [item.group for item in items])
        result["acc_plus"], result["acc_plus_interval"], result["ids"] = (
            metrics.mean(ids),
            metrics.interval(ids),
            len(ids),
        )
    if form == "records":
        for name, figure in (("pairwise", metrics.pairwise), ("tau_b", metrics.tau_b)):
            defined = [v for s, i in zip(shown, items, strict=True) if (v := figure(s, i.rankings)) is not None]
            result[name] = metrics.mean(defined) if defined else None
    result["ties"] = metrics.mean([float(len(set(s)) < len(s)) for s in shown])
    result["categories"] = {
        name: {"items": n, "accuracy": metrics.mean([v for v, c in zip(values, categories, strict=True) if c == name])}
        for name, n in Counter(categories).items()
    }
    result["baselines"] = {name: metrics.mean(_baseline(rule, items, r.seed)) for name, rule in BASELINES.items()}
    if r.permutations > 1:
        result["order"] = order_sensitivity(r, scores)
    return result


def _baseline(rule: Callable[[Sequence[str]], list[float]], items: list[Item], seed: int) -> list[float]:
    """A rule that reads no picture, shown what the model is shown. Random guesses a pair right half the time."""
    values = []
    for item in items:
        order = item.orders(seed, 1)[0]
        ranks = [item.rankings[i] for i in order]
        guess = rule([item.responses[i] for i in order])
        values.append((metrics.best_of_n if rule is metrics.chance else right)(guess, ranks))
    return values


def order_sensitivity(r: Evaluation, scores: list[list[list[float]]]) -> dict:
    """How often the winner changes with the order, accuracy by the place of the best answer, accuracy of the mean."""
    changed, by_place, averaged = [], {}, []
    for item, rows in zip(r.items, scores, strict=True):
        winners = [int(np.argmax(row)) for row in rows]
        changed += [float(w != winners[0]) for w in winners[1:]]
        averaged.append(right(np.mean(rows, axis=0).tolist(), item.rankings))
        for order, row in zip(item.orders(r.seed, r.permutations), rows, strict=True):
            if item.rankings.count(1) == 1:
                by_place.setdefault(order.index(item.rankings.index(1)), []).append(right(row, item.rankings))
    places = {str(place + 1): metrics.mean(values) for place, values in sorted(by_place.items())}
    return {"changed": metrics.mean(changed), "by_place": places, "mean_over_orders": metrics.mean(averaged)}


def print_report(result: dict, left_out: list[str]) -> None:
    low, high = result["interval"]
    print(
        f"\n{result['format']}, {result['mode']}, {result['items']} items, {result['without_picture']} of them ", end=""
    )
    print(f"without a picture; ties in {result['ties']:.1%}")
    print(f"accuracy   {result['accuracy']:.3f} [{low:.3f}, {high:.3f}]" + "  (micro)" * ("macro" in result))
    for name, title in (("macro", "macro"), ("acc_plus", "ACC+")):
        if name in result:
            low, high = result[f"{name}_interval"]
            print(f"{title:10s} {result[name]:.3f} [{low:.3f}, {high:.3f}]")
    for name in ("pairwise", "tau_b"):
        if result.get(name) is not None:
            print(f"{name:10s} {result[name]:.3f}")
    if len(result["categories"]) > 1:
        for name, row in result["categories"].items():
            print(f"  {name:30s} {row['accuracy']:.3f}  of {row['items']}")
    print("without a picture: " + ", ".join(f"{name} {value:.3f}" for name, value in result["baselines"].items()))
    if "order" in result:
        order = result["order"]
        print(
            f"order: the winner changes in {order['changed']:.1%}; mean over orders {order['mean_over_orders']:.3f}; ",
            end="",
        )
        print(
            "best answer at place " + ", ".join(f"{place}: {value:.3f}" for place, value in order["by_place"].items())
        )
    if left_out:
        print(f"left out, {len(left_out)} rows:\n  " + "\n  ".join(left_out))


# ----------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = Parser(prog="python -m yojo.evaluate", description="Evaluate a reward model on a benchmark's file.")
    parser.add_argument("--tiny", action="store_true", help="the built-in models on the tiny world; needs no files")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a reward model's folder")
    parser.add_argument("--base", type=Path, metavar="DIR", help="its backbone, where that is not where it was")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the benchmark, JSONL")
    parser.add_argument("--format", choices=FIELDS, default="records", help="its schema")
    parser.add_argument("--map", action="append", default=[], metavar="NAME=FIELD", help="read NAME from another field")
    parser.add_argument("--mode", choices=MODES, help="attention, where not the one the model was trained in")
    parser.add_argument("--permutations", type=int, default=1, metavar="K", help="orders to show each item in")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the scores there, and go on from them")
    parser.add_argument("--overwrite", action="store_true", help="start --out over")
    parser.add_argument("--dtype", **DTYPE)
    parser.add_argument("--compile", **COMPILE)
    parser.add_argument("--keep-going", action="store_true", help="leave bad rows out, and list them")
    args = parser.parse_args()
    run(lambda: run_command(args), parser, args)


def run_command(args: argparse.Namespace) -> dict | list[dict]:
    if args.permutations < 1:
        raise InputError(f"--permutations {args.permutations}: at least 1")
    if args.tiny:
        own = (args.model, args.data, args.out, args.mode, args.map, args.dtype, args.compile)
        if any(own) or args.permutations > 1:
            raise InputError("--tiny brings its own models, data and orders: leave the other options out")
        from yojo.tiny.comparison import tables

        return tables(args.seed)
    if not (args.model and args.data):
        raise InputError("give --tiny, or --model DIR and --data FILE")
    mapping = {}
    for word in args.map:
        name, _, named = word.partition("=")
        if not named or name not in {*FIELDS[args.format], "category"}:
            raise InputError(f"--map {word}: NAME=FIELD, NAME one of {', '.join(FIELDS[args.format])}, category")
        mapping[name] = named
    items, left_out = read_items(args.data, args.format, mapping, args.keep_going)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", args.dtype and getattr(torch, args.dtype)
    rm = RewardModel.load(args.model, args.base, dtype, device)
    about = {"model": digest(args.model), "base": rm.fingerprint, "pictures": str(rm.processor.images)}
    about |= {"device": rm.backbone.device.type, "dtype": str(rm.backbone.dtype)}
    if args.compile:
        about["compile"] = True
        rm.backbone.fuse()
    r = Evaluation(rm, items, args.mode or rm.mode, args.seed, args.permutations, about, args.keep_going, left_out)
    if r.mode != rm.mode:
        print(f"mode: {r.mode} (trained in {rm.mode})")
    result = report(r, args.format, score_items(r, args.out, args.overwrite))
    print_report(result, r.left_out)
    return result | {"left_out": r.left_out}


if __name__ == "__main__":
    main()
