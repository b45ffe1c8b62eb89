"""What the paper claims, and what this project finds about each claim.

    python -m yojo.claims table        every claim beside what was found, as in BENCHMARKS; --short: as in README
    python -m yojo.claims answers      does training on few answers carry over to many?
    python -m yojo.claims data         does comparing help where groups are few or ranks are noisy?
    python -m yojo.claims grpo         is a policy trained by a multi-response reward better, or steadier?

`table` reads the files in tutorials/runs, which the studies below it and other commands wrote. The studies
(`tiny/studies.py`) train several models for every seed and take ten to fifty minutes each, on two cores.

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
from yojo.files import InputError
from yojo.instruments import hardware
from yojo.metrics import T_95, interval_over_seeds, mean
from yojo.tiny import studies
from yojo.tiny.experiment import KINDS, PAIRS, SINGLE, TITLES
from yojo.tiny.studies import LEARNED_FROM, SKILLS, TRAINED_ON
from yojo.tiny.studies import TESTED_ON as N
from yojo.tiny.world import NOISE
from yojo.weights import pick_device

# ------------------------------------------------------------------------------------------------------------- studies


def over_seeds(values: Sequence[float]) -> str:
    """The mean, and its 95% interval by how much seeds differ."""
    return with_interval(mean(values), interval_over_seeds(values))


def picked(runs: Iterable[dict], key: str, **wanted) -> list[float]:
    """What the runs of one kind gave, by seed."""
    some = [r for r in runs if all(r[name] == value for name, value in wanted.items())]
    return [r[key] for r in sorted(some, key=lambda r: r["seed"])]


def minus(runs: Sequence[dict], key: str, one: str, other: str, **wanted) -> list[float]:
    """One kind of model less another, seed by seed: both learned from the same groups and were tested on the same."""
    assert picked(runs, "seed", kind=one, **wanted) == picked(runs, "seed", kind=other, **wanted)
    pairs = zip(picked(runs, key, kind=one, **wanted), picked(runs, key, kind=other, **wanted), strict=True)
    return [a - b for a, b in pairs]


def answers_table(runs: list[dict]) -> str:
    columns = [str(n) for n in N]
    rows = [
        {"trained on": trained, "": kind}
        | {n: over_seeds(picked(runs, n, kind=kind, trained=trained)) for n in columns}
        for trained, kind in product(TRAINED_ON, MODES)
    ]
    shown = {"trained on": "<", "": "<", **dict.fromkeys(columns, "")}
    return "best-of-N accuracy, tested on N =\n" + table(rows, shown)


def data_table(runs: list[dict]) -> str:
    rows, differences = [], [("joint", "isolated"), ("isolated", PAIRS), (PAIRS, SINGLE)]
    for swap, count in product(studies.SWAPPED, studies.GROUPS):
        these = {"groups": count, "swapped": swap}
        row = {"groups": count, "pairs swapped": f"{swap:.0%}"}
        row |= {kind: over_seeds(picked(runs, "accuracy", kind=kind, **these)) for kind in KINDS}
        row |= {f"{a} - {b}": over_seeds(minus(runs, "accuracy", a, b, **these)) for a, b in differences}
        rows.append(row)
    columns = {"groups": "d", "pairs swapped": "", **dict.fromkeys(KINDS, "")}
    return table(rows, columns | {f"{a} - {b}": "" for a, b in differences})


POLICY = {"reward_accuracy": "judge", "sampled_after": "sampled after", "greedy_after": "greedy after"}
SHARES = {"even": "no difference", "identical": "one text"}  # of the groups in training
WHO = dict.fromkeys(("judge learned from", ""), "<")  # the first columns


def grpo_table(runs: list[dict]) -> str:
    """Three tables: what became of the policies, their way there, and what they can still do."""
    judges = product(LEARNED_FROM, studies.JUDGES)
    some = {judge: [r for r in runs if (r["learned"], r["kind"]) == judge] for judge in judges}
    sampled, greedy = (mean([r[f"{how}_before"] for r in runs]) for how in ("sampled", "greedy"))
    parts = [
        f"judge: best-of-4 accuracy; sampled, greedy: true quality of the policy's answers, {sampled:.3f} and "
        f"{greedy:.3f} before",
        policies(some),
        "\nheld-out prompts, after so many steps",
        curves(some),
        "\ngreedy answers right word for word, to questions of other kinds and to the trained kind on held-out pairs",
        skills(some),
    ]
    return "\n".join(parts)


Runs = dict[tuple[str, str], list[dict]]  # by what the judge learned from, and its kind


def policies(some: Runs) -> str:
    rows = []
    for judge, these in some.items():
        row = dict(zip(WHO, judge, strict=True))
        row |= {name: over_seeds(picked(these, key)) for key, name in POLICY.items()}
        row |= {name: f"{mean(picked(these, key)):.3f}" for key, name in SHARES.items()}
        rows.append(row | {"lowest": f"{min(picked(these, 'sampled_after')):.3f}"})
    return table(rows, WHO | dict.fromkeys((*POLICY.values(), "lowest", *SHARES.values()), ""))


def curves(some: Runs) -> str:
    rows: list[dict] = []
    for judge, these in some.items():
        for key in ("held_out_reward", "held_out_quality"):
            looks = zip(*picked(these, "curve"), strict=True)
            means = {str(at[0]["step"] + 1): f"{mean([x[key] for x in at]):.2f}" for at in looks}
            rows.append(dict(zip(WHO, judge, strict=True)) | {"mean": key.removeprefix("held_out_")} | means)
    return table(rows, dict.fromkeys(rows[0], "") | WHO | {"mean": "<"})


def skills(some: Runs) -> str:
    def shares(known: list[dict], when: str) -> dict[str, str]:
        return {skill: over_seeds([r["skills"][when][skill] for r in known]) for skill in SKILLS}

    one = next(iter(some.values()))  # before, they are the same for all
    rows = [{"judge learned from": "-", "": "no policy", **shares(one, "backbone")}]
    rows.append({"judge learned from": "-", "": "before", **shares(one, "before")})
    rows += [dict(zip(WHO, judge, strict=True)) | shares(these, "after") for judge, these in some.items()]
    return table(rows, WHO | dict.fromkeys(SKILLS, ""))


class Study(NamedTuple):
    run: Callable[[int, str | None], list[dict]]  # of a seed, on a device
    seeds: int
    table: Callable[[list[dict]], str]
    what: str


STUDIES = {
    "answers": Study(studies.study_answers, 3, answers_table, "whether training on few answers carries over to many"),
    "data": Study(studies.study_data, 3, data_table, "few groups and noisy ranks"),
    "grpo": Study(studies.study_grpo, 3, grpo_table, "policies by every reward"),
}


def study(args: argparse.Namespace) -> dict:
    start, (run_seed, _, tabled, _) = time.monotonic(), STUDIES[args.command]
    about = {"study": args.command, "hardware": hardware(pick_device(args.device)), "date": time.strftime("%Y-%m-%d")}
    for folder in ("weights/tiny", "weights/tiny-policy"):
        shipped(folder)  # or no work is begun
    if args.seeds > len(T_95) + 1:
        raise InputError(f"--seeds {args.seeds}: intervals are known for at most {len(T_95) + 1}")
    runs: list[dict] = []
    for seed in range(args.seed, args.seed + args.seeds):
        runs += run_seed(seed, args.device)
        so_far = {"seeds": [*range(args.seed, seed + 1)], "seconds": round(time.monotonic() - start), "runs": runs}
        args.found = about | so_far
    print(f"\n{tabled(runs)}\n{len(runs)} runs, seeds {so_far['seeds']}, 95% intervals over seeds", end="; ")
    print(f"{so_far['seconds']} seconds")
    return args.found


# --------------------------------------------------------------------------------------------- what was found, by claim


class Files(dict):
    """What committed runs wrote, by the name of the file in tutorials/runs."""

    def __missing__(self, name: str):
        return self.setdefault(name, json.loads(shipped(f"tutorials/runs/{name}.json").read_text(encoding="utf-8")))


def listed(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def by_kind(each: dict[str, Sequence[float]]) -> str:
    return ", ".join(f"{TITLES[kind]} {over_seeds(values)}" for kind, values in each.items())


def cheaper(f: Files) -> str:
    rows = next(rows for name, rows in f["gpu_h200_now"].items() if name.startswith("bench score"))
    measured = [r for r in rows if r["way"] == "N separate passes"]
    return (
        f"At N = 2, 4, 8, 16, counted, each of the N passes encoding the picture: "
        f"{listed(r['n_looks'] for r in f['flops_image'])} (answers of 100 tokens; 16 frames of a video and answers of "
        f"50: {listed((r['n_looks'] for r in f['flops_frames'] if r['n'] > 1), 1)}). On an H200, the picture encoded "
        f"beforehand, answers of 200: measured {listed((r['times_joint'] for r in measured), 1)}, counted "
        f"{listed((r['counted'] for r in measured), 1)}; short passes wait for the CPU to launch them"
    )


def comparison(f: Files) -> str:
    alone, beside = ({kind: [s[kind] for s in f[name]["per_seed"]] for kind in studies.JUDGES} for name in TRAINED)
    vote = over_seeds([s["isolated_vote"] for s in f["train_corroborated"]["per_seed"]])
    return (
        f"Not where an answer can be judged alone: {by_kind(alone)}. Where it cannot: {by_kind(beside)}; but counting "
        f"identical texts after isolated scores gives {vote}, too"
    )


TRAINED = ("train_absolute", "train_corroborated")


def comparison_short(f: Files) -> str:
    joint, isolated = (mean([s[mode] for s in f["train_corroborated"]["per_seed"]]) for mode in MODES)
    return f"only if answers cannot be judged alone: {joint:.2f} joint, {isolated:.2f} isolated"


def losses(f: Files) -> str:
    runs = f["claims_data"]["runs"]

    def at(count: int, swap: float) -> str:
        return by_kind({kind: picked(runs, "accuracy", kind=kind, groups=count, swapped=swap) for kind in KINDS})

    noisy = f"1,000 groups, 40% of pairs swapped, those that single-response learns from: {at(1000, 0.4)}"
    seen = "Not seen; with few groups or noisy ranks, all pairs of a group beat two of its pairs"
    return f"{seen}. 100 groups: {at(100, 0.0)}. {noisy}"


def order(f: Files) -> str:
    gains = {
        r["task"] + (" with noisy pictures" if r["noise"] > NOISE else ""): r["joint, mean of 4 orders"] - r["joint"]
        for r in f["masks"]
        if r.get("trained") == "joint"
    }
    added = ", ".join(f"{gain:+.3f} on {task}" for task, gain in gains.items())
    return f"Isolated scores do not depend on it, joint ones do; averaging over four orders adds {added}"


def answers(f: Files) -> str:
    runs, parts = f["claims_answers"]["runs"], []
    for kind, trained in product(MODES, TRAINED_ON):
        parts.append(
            f"{kind}, trained on {trained}: {listed(mean(picked(runs, str(n), kind=kind, trained=trained)) for n in N)}"
        )
    return f"At N = {', '.join(map(str, N))}: {'; '.join(parts)}"


def answers_short(f: Files) -> str:
    of_16 = (mean(picked(f["claims_answers"]["runs"], "16", kind=mode, trained="4")) for mode in MODES)
    return "yes, after training on four: at sixteen {:.2f} joint, {:.2f} isolated".format(*of_16)


GOOD, BEST = 0.8, 0.98  # accuracy of a judge, quality of a policy's answers


def steadier(f: Files) -> str:
    runs, parts = f["claims_grpo"]["runs"], []
    for learned in LEARNED_FROM:
        each = {kind: picked(runs, "sampled_after", learned=learned, kind=kind) for kind in studies.JUDGES}
        parts.append(f"{learned}: {by_kind(each)}")
    good = [r for r in runs if r["reward_accuracy"] >= GOOD]
    best = [r for r in good if r["sampled_after"] >= BEST]
    others = mean([r["sampled_after"] for r in good if r not in best])
    counts = [[sum(r["kind"] == kind for r in some) for some in (best, good)] for kind in studies.JUDGES]
    of_each = ", ".join(f"{TITLES[kind]} {a} of {b}" for kind, (a, b) in zip(studies.JUDGES, counts, strict=True))
    return (
        f"Only if ranks are noisy, by noise that hits single-response most. Of {len(good)} judges that reach {GOOD}, "
        f"{len(best)} lead to a true quality of {BEST} or more ({of_each}), the others to {others:.2f}. True quality, "
        f"the judge having learned from {'; from '.join(parts)}"
    )


def preserved(f: Files) -> str:
    runs = f["claims_grpo"]["runs"]

    def shares(when: str, some: list[dict]) -> str:
        return ", ".join(f"{skill} {mean([r['skills'][when][skill] for r in some]):.2f}" for skill in SKILLS)

    good, poor = ([r for r in runs if (r["reward_accuracy"] >= GOOD) == are] for are in (True, False))
    return (
        f"With a good judge. Greedy answers that are right, before: {shares('before', runs)}. After, with the "
        f"{len(good)} judges that reach {GOOD}: {shares('after', good)}; with the {len(poor)} others: "
        f"{shares('after', poor)}"
    )


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
    short: str | Callable[[Files], str] = ""  # what is seen, in a few words; none: not in the short table


CLAIMS = [
    Claim(
        "One pass is up to N times cheaper than N passes",
        "up to 3.9 times in time, 4.0 in FLOPs, at N = 4 (second-hand)",
        cheaper,
        "`flops`, `bench score`",
        "09",
        "only while the prompt is much longer than all answers together",
    ),
    Claim(
        "Comparing answers improves accuracy",
        "71.2% on average over six benchmarks; the next open reward model 66.5%",
        comparison,
        "`train --tiny --baseline`",
        "08",
        comparison_short,
    ),
    Claim(
        "A loss over N scores beats a loss over pairs",
        "its baseline learns from pairs",
        losses,
        "`claims data`",
        "08",
        "no: all pairs of a group do as well",
    ),
    Claim(
        "One judge serves any number of answers",
        "-",
        answers,
        "`claims answers`",
        "08",
        answers_short,
    ),
    Claim(
        "Order",
        "its released code shuffles the answers in training",
        order,
        "`evaluate --tiny`",
        "08",
    ),
    Claim(
        "GRPO with it is better and steadier",
        "WildVision 54.6 before, 55.8 with a single-response reward, 60.2 with its own",
        steadier,
        "`claims grpo`",
        "11",
        "no, unless ranks are noisy, by noise that hits its baseline most",
    ),
    Claim(
        "GRPO with it preserves other skills",
        "standard benchmarks preserved",
        preserved,
        "`claims grpo`",
        "11",
    ),
    Claim(
        "Rankings from votes, denoised",
        "MR2Bench's rankings are made this way",
        rankings,
        "`votes`",
        "10",
    ),
    Claim(
        "Benchmarks",
        "six, and two of its own among them",
        "Not reproduced: no weights were at hand. The metrics of VL-RewardBench, Multimodal RewardBench and MM-RLHF "
        "follow the official scripts; the field names of MR2Bench and VideoRewardBench are unconfirmed",
        "`evaluate`",
        "",
    ),
]


def claims_table(args: argparse.Namespace) -> list[dict]:
    files = Files()
    rows = [{name: x(files) if callable(x) else x for name, x in c._asdict().items()} for c in CLAIMS]
    columns = {"claim": "claim", "paper": "the paper", "seen": "seen here", "commands": "command", "lesson": "lesson"}
    if args.short:
        rows, columns = [row for row in rows if row["short"]], {"claim": "claim", "short": "seen here"}
    print("| " + " | ".join(columns.values()) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row[name] for name in columns) + " |")
    return rows


# ------------------------------------------------------------------------------------------------------------ command


def main() -> None:
    what = "What the paper claims, and what is found here."
    parser = Parser(prog="python -m yojo.claims", description=what, random=False)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("table", help="every claim beside what was found", random=False)
    sub.add_argument("--short", action="store_true", help="in a few words, as README has it")
    for name, one in STUDIES.items():
        sub = commands.add_parser(name, help=one.what)
        sub.add_argument("--seeds", type=whole(2), default=one.seeds, metavar="K", help="K seeds, from --seed on")
        add_model_options(sub, dtype=False, fuse=False)
    run(parser, lambda args: (claims_table if args.command == "table" else study)(args))


if __name__ == "__main__":
    main()
