"""What the paper claims, and what this project finds about each claim.

    python -m yojo.claims table        every claim beside what was found, from the files in tutorials/runs
    python -m yojo.claims answers      how many answers must a judge have seen in training?
    python -m yojo.claims data         does comparing help where groups are few or ranks are noisy?
    python -m yojo.claims grpo         is a policy trained by a multi-response reward better, or steadier?

The first reads what the others and other commands wrote. The studies (`tiny/studies.py`) train several models for every
seed and take 15 to 45 minutes each, on two cores.

See it: `pytest tests/test_claims.py`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import NamedTuple

from yojo.cli import Parser, add_model_options, run, shipped, table, whole, with_interval
from yojo.core.mask import MODES
from yojo.instruments import hardware
from yojo.metrics import interval_over_seeds, mean
from yojo.tiny import studies
from yojo.tiny.experiment import ARMS, PAIRS, SINGLE, TITLES
from yojo.tiny.studies import LEARNED_FROM, SKILLS, TRAINED_ON
from yojo.tiny.studies import TESTED_ON as N
from yojo.tiny.world import NOISE
from yojo.weights import pick_device

# ------------------------------------------------------------------------------------------------------------- studies


def over_seeds(values: Sequence[float]) -> str:
    """The mean, and its 95% interval by how much seeds differ."""
    return with_interval(mean(values), interval_over_seeds(values))


def picked(runs: Iterable[dict], key: str, **wanted) -> list[float]:
    """What the runs of one kind gave, seed by seed."""
    return [r[key] for r in runs if all(r[name] == value for name, value in wanted.items())]


def minus(runs: Sequence[dict], key: str, one: str, other: str, **wanted) -> list[float]:
    """One arm less another, seed by seed: both learned from the same groups and were tested on the same."""
    pairs = zip(picked(runs, key, arm=one, **wanted), picked(runs, key, arm=other, **wanted), strict=True)
    return [a - b for a, b in pairs]


def answers_table(runs: list[dict]) -> str:
    kinds = list(product(studies.TRAINED_ON, MODES))
    columns = [str(n) for n in studies.TESTED_ON]
    rows = [
        {"trained on": trained, "": arm} | {n: over_seeds(picked(runs, n, arm=arm, trained=trained)) for n in columns}
        for trained, arm in kinds
    ]
    return "best-of-N accuracy, tested on N =\n" + table(
        rows, {"trained on": "<", "": "<", **dict.fromkeys(columns, "")}
    )


def data_table(runs: list[dict]) -> str:
    rows, differences = [], [("joint", "isolated"), ("isolated", PAIRS), (PAIRS, SINGLE)]
    for swap, count in product(studies.SWAPPED, studies.GROUPS):
        these = {"groups": count, "swapped": swap}
        row = {"groups": count, "pairs swapped": f"{swap:.0%}"}
        row |= {arm: over_seeds(picked(runs, "accuracy", arm=arm, **these)) for arm in ARMS}
        row |= {f"{a} - {b}": over_seeds(minus(runs, "accuracy", a, b, **these)) for a, b in differences}
        rows.append(row)
    columns = {"groups": "d", "pairs swapped": "", **dict.fromkeys(ARMS, "")}
    return table(rows, columns | {f"{a} - {b}": "" for a, b in differences})


GRPO_KEYS = {"reward_accuracy": "judge", "sampled_after": "sampled after", "greedy_after": "greedy after"}
SHARES = {"even": "no difference", "identical": "one text"}


def grpo_table(runs: list[dict]) -> str:
    rows, curves, examined = [], [], []
    for learned, arm in product(studies.LEARNED_FROM, studies.JUDGES):
        these = {"learned": learned, "arm": arm}
        start = {"judge learned from": learned, "": arm}
        row = {name: over_seeds(picked(runs, key, **these)) for key, name in GRPO_KEYS.items()}
        row |= {name: f"{mean(picked(runs, key, **these)):.3f}" for key, name in SHARES.items()}
        rows.append(start | {"lowest": f"{min(picked(runs, 'sampled_after', **these)):.3f}"} | row)
        looks = picked(runs, "curve", **these)
        for key in ("held_out_reward", "held_out_quality"):
            steps = {str(at[0]["step"] + 1): f"{mean([x[key] for x in at]):.2f}" for at in zip(*looks, strict=True)}
            curves.append(start | {"held out": key.removeprefix("held_out_")} | steps)
        known = picked(runs, "skills", **these)
        after = {skill: over_seeds([k["after"][skill] for k in known]) for skill in studies.SKILLS}
        examined.append(start | after)
    for who in ("backbone", "before"):
        shares = {skill: f"{mean([r['skills'][who][skill] for r in runs]):.3f}" for skill in studies.SKILLS}
        examined.append({"judge learned from": "-", "": {"backbone": "no policy", "before": "start"}[who], **shares})
    names = dict.fromkeys(("judge learned from", ""), "<")
    before = mean([r["sampled_before"] for r in runs]), mean([r["greedy_before"] for r in runs])
    parts = ["judge: best-of-4 accuracy; sampled, greedy: true quality of the policy's answers to new questions"]
    parts += [f"(before: sampled {before[0]:.3f}, greedy {before[1]:.3f}); shares: of training groups"]
    shown = names | dict.fromkeys([*GRPO_KEYS.values(), "lowest", *SHARES.values()], "")
    parts += [table(rows, shown), "\nheld-out prompts, after so many steps"]
    parts += [table(curves, names | {"held out": "<"} | dict.fromkeys(steps, ""))]
    parts += ["\nskills that were not trained, greedy answers right word for word"]
    return "\n".join([*parts, table(examined, names | dict.fromkeys(studies.SKILLS, ""))])


STUDIES: dict[str, tuple[Callable, int, Callable[[list[dict]], str], str]] = {  # and on how many seeds
    "answers": (studies.study_answers, 3, answers_table, "how many answers a judge must have seen"),
    "data": (studies.study_data, 3, data_table, "few groups and noisy ranks"),
    "grpo": (studies.study_grpo, 3, grpo_table, "policies by every reward"),
}


def study(args: argparse.Namespace) -> dict:
    start, device = time.monotonic(), pick_device(args.device)
    shipped("weights/tiny")  # or no work is begun
    seeds = [*range(args.seed, args.seed + args.seeds)]
    made, _, tabled, _ = STUDIES[args.command]
    runs = made(seeds, args.device)
    about = {"study": args.command, "seeds": seeds, "hardware": hardware(device), "date": time.strftime("%Y-%m-%d")}
    args.found = about | {"seconds": round(time.monotonic() - start), "runs": runs}
    print(
        f"\n{tabled(runs)}\n{len(runs)} runs, seeds {seeds}, 95% intervals over seeds; {args.found['seconds']} seconds"
    )
    return args.found


# --------------------------------------------------------------------------------------------- what was found, by claim


class Files(dict):
    """What committed runs wrote, by the name of the file in tutorials/runs."""

    def __missing__(self, name: str):
        return self.setdefault(name, json.loads(shipped(f"tutorials/runs/{name}.json").read_text(encoding="utf-8")))


def listed(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def by_arm(each: dict[str, Sequence[float]]) -> str:
    return ", ".join(f"{TITLES[arm]} {over_seeds(values)}" for arm, values in each.items())


def cheaper(f: Files) -> str:
    bench = next(rows for name, rows in f["gpu_h200_now"].items() if name.startswith("bench score"))
    measured = [r["times_joint"] for r in bench if r["arm"] == "N separate passes"]
    return (
        f"At N = 2, 4, 8, 16, counted, where each of the N passes looks at its picture: "
        f"{listed(r['n_looks'] for r in f['flops_image'])}; at 16 frames of a video, "
        f"{listed((r['n_looks'] for r in f['flops_frames'] if r['n'] > 1), 1)}. "
        f"Measured on an H200, without pictures: {listed(measured, 1)}"
    )


def comparison(f: Files) -> str:
    alone, beside = ({arm: [s[arm] for s in f[name]["per_seed"]] for arm in studies.JUDGES} for name in TRAINED)
    vote = over_seeds([s["isolated_vote"] for s in f["train_corroborated"]["per_seed"]])
    return (
        f"Not where an answer can be judged alone: {by_arm(alone)}. Where it cannot: {by_arm(beside)}; but counting "
        f"identical texts after isolated scores gives {vote}, too"
    )


TRAINED = ("train_absolute", "train_corroborated")


def losses(f: Files) -> str:
    runs, few = f["claims_data"]["runs"], {"groups": 100, "swapped": 0.4}
    each = {arm: picked(runs, "accuracy", arm=arm, **few) for arm in ARMS}
    most = {arm: picked(runs, "accuracy", arm=arm, groups=3000, swapped=0.0) for arm in ARMS}
    return f"With 100 groups and 40% of pairs swapped: {by_arm(each)}. With 3,000 groups and true ranks: {by_arm(most)}"


def order(f: Files) -> str:
    gains = {
        r["task"] + (" with noisy pictures" if r["noise"] > NOISE else ""): r["joint, mean of 4 orders"] - r["joint"]
        for r in f["masks"]
        if r.get("trained") == "joint"
    }
    added = ", ".join(f"{gain:+.3f} on {task}" for task, gain in gains.items())
    return f"Isolated scores do not depend on it, joint ones do; averaging over four orders adds {added}"


def answers(f: Files) -> str:
    runs = f["claims_answers"]["runs"]
    told = [f"on {kind}: {listed(mean(picked(runs, n, arm='joint', trained=kind)) for n in N)}" for kind in TRAINED_ON]
    return f"Joint accuracy at N = 2, 4, 8, 16, trained {'; '.join(told)}"


def steadier(f: Files) -> str:
    runs, told = f["claims_grpo"]["runs"], []
    for learned in LEARNED_FROM:
        each = {arm: picked(runs, "sampled_after", learned=learned, arm=arm) for arm in studies.JUDGES}
        told.append(f"{learned}: {by_arm(each)}")
    return "True quality of the policy's answers, by what its judge learned from. " + "; ".join(told)


def preserved(f: Files) -> str:
    runs = f["claims_grpo"]["runs"]
    told = [f"{who}: {listed(mean([r['skills'][who][skill] for r in runs]) for skill in SKILLS)}" for who in LOOKED]
    return f"{', '.join(SKILLS)}; greedy answers that are right. " + "; ".join(told).capitalize()


LOOKED = ("backbone", "before", "after")


def rankings(f: Files) -> str:
    rows = {(r["n"], round(r["votes"], 1), r["wrong"]): r for r in f["votes"]}
    names = {"denoised graph": "graph, denoised", "Borda": "Borda, raw", "Bradley-Terry": "Bradley-Terry"}

    def taus(n: int, votes: float) -> str:
        return ", ".join(f"{name} {rows[n, votes, 0.3][method]:.2f}" for name, method in names.items())

    return (
        f"Kendall's tau-b with the truth, 30% of votes wrong. 31 votes a pair of 8 answers: {taus(8, 31)}. 1.1 votes a "
        f"pair of 19, as MR2Bench-Video has: {taus(19, 1.1)}"
    )


class Claim(NamedTuple):
    claim: str
    paper: str
    seen: str | Callable[[Files], str]
    commands: str
    lesson: str


CLAIMS = [
    Claim(
        "One pass is up to N times cheaper than N passes",
        "up to 3.9 times in time, 4.0 in FLOPs, at N = 4 (second-hand)",
        cheaper,
        "`flops`, `bench score`",
        "07",
    ),
    Claim(
        "Comparing answers improves accuracy",
        "ahead of single-response models on six benchmarks",
        comparison,
        "`train --tiny --baseline`",
        "10",
    ),
    Claim(
        "A loss over N scores beats a loss over pairs", "its baseline learns from pairs", losses, "`claims data`", "06"
    ),
    Claim("One judge serves any number of answers", "-", answers, "`claims answers`", "10"),
    Claim("Order", "scores depend on the order", order, "`evaluate --tiny`", "10"),
    Claim(
        "GRPO with it is better and steadier",
        "WildVision 54.6 before, 55.8 with a single-response reward, 60.2 with its own",
        steadier,
        "`claims grpo`",
        "09",
    ),
    Claim("GRPO with it preserves other skills", "standard benchmarks preserved", preserved, "`claims grpo`", "09"),
    Claim("Rankings from votes, denoised", "MR2Bench's are made so", rankings, "`votes`", "08"),
    Claim(
        "71.2% on average over six benchmarks",
        "Molmo2-4B, multi-response",
        "Not reproduced: no weights were at hand. The metrics of VL-RewardBench, Multimodal RewardBench and MM-RLHF "
        "follow the official scripts; the field names of MR2Bench and VideoRewardBench are unconfirmed",
        "`evaluate`",
        "",
    ),
]


def claims_table(args: argparse.Namespace) -> list[dict]:
    files, rows = Files(), []
    for c in CLAIMS:
        rows.append(c._asdict() | {"seen": c.seen(files) if callable(c.seen) else c.seen})
    print("| claim | the paper | seen here | command | lesson |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    return rows


# ------------------------------------------------------------------------------------------------------------ command


def main() -> None:
    what = "What the paper claims, and what is found here."
    parser = Parser(prog="python -m yojo.claims", description=what, random=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", help="every claim beside what was found", random=False)
    for name, (_, count, _, what) in STUDIES.items():
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--seeds", type=whole(2), default=count, metavar="K", help="K seeds, from --seed on")
        add_model_options(sub, dtype=False, fuse=False)
    run(parser, lambda args: (claims_table if args.command == "table" else study)(args))


if __name__ == "__main__":
    main()
