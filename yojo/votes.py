"""From noisy votes to rankings: a preference graph per item, its cycles removed, its descendants counted.

    python -m yojo.votes                                           a simulated study of every method
    python -m yojo.votes --votes votes.jsonl                       rank the answers of every item
    python -m yojo.votes --votes votes.jsonl --answers answers.jsonl --sample 4 --out bench.jsonl

A vote is one line: {"item": "q7", "a": "m1", "b": "m2", "winner": "m1" | "m2" | "tie", "annotator": "p3"}; annotator
may be left out. W[u, v] counts the votes for u against v; a tie is no vote for either.

    ensemble    w(u, v) = W[u, v] - W[v, u] where that is positive: the annotators' graphs laid over one another
    denoising   the arcs that point backwards in a good order of each strongly connected component are dropped
    ranking     an answer is as good as the number of answers it can reach; equal numbers are ties

The graph is for many votes a pair that are mostly right (nine or more, at most 30% wrong), where it tells a small but
steady lead from luck. Where votes are few or often wrong, counting wins (Borda) mostly comes closer to the truth.

Method: Hu et al., Language Model Preference Evaluation with Multiple Weak Evaluators, arXiv 2410.12869; the order is
Eades, Lin and Smyth, A fast and effective heuristic for the feedback arc set problem, 1993.

See it: `pytest tests/test_votes.py`.
"""

import argparse
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from numpy import ndarray

from yojo import metrics
from yojo.cli import Parser, refuse_existing, run, table, whole
from yojo.core.data import Record, record_of
from yojo.files import InputError, followed, is_plain, read_lines, write_lines
from yojo.media import data_url

TIE = "tie"


@dataclass(frozen=True)
class Vote:
    item: str
    a: str
    b: str
    winner: str  # a's or b's name, or "tie"


def read_votes(path: str | Path, known: Mapping[str, Record] | None = None) -> list[Vote]:
    """All votes of a JSONL file. `known`: as of `read_answers`; a vote for an answer that is not there raises."""
    votes = []
    for where, raw in read_lines(path):
        names = [raw.get(key) for key in ("item", "a", "b", "winner")]
        if not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{where}: item, a, b and winner must be strings, got {names}")
        vote = Vote(*names)
        if TIE in (vote.a, vote.b):
            raise InputError(f"{where}: no answer can be called {TIE!r}: as a winner it stands for even votes")
        if vote.a == vote.b:
            raise InputError(f"{where}: {vote.a!r} stands against itself")
        if vote.winner not in (vote.a, vote.b, TIE):
            raise InputError(f"{where}: the winner {vote.winner!r} is neither {vote.a!r} nor {vote.b!r} nor {TIE!r}")
        answers = {vote.a, vote.b} if known is None else known[vote.item].names if vote.item in known else ()
        if strange := {vote.a, vote.b} - set(answers):
            raise InputError(f"{where}: item {vote.item!r} has no answer {min(strange)!r}")
        votes.append(vote)
    if not votes:
        raise InputError(f"{path} holds no votes")
    return votes


def count(votes: Sequence[Vote], answers: Sequence[str]) -> ndarray:
    """W [n, n] of one item: how often the answer of the row beat that of the column."""
    place, W = {name: i for i, name in enumerate(answers)}, np.zeros((len(answers), len(answers)))
    for vote in votes:
        if vote.winner != TIE:
            loser = vote.b if vote.winner == vote.a else vote.a
            W[place[vote.winner], place[loser]] += 1
    return W


# -------------------------------------------------------------------------------------------------------------- graph


def ensemble(W: ndarray) -> ndarray:
    """Weights of the arcs: the majority's lead, 0 where there is none."""
    return np.maximum(W - W.T, 0)


def reachable(arcs: ndarray) -> ndarray:
    """bool [n, n]: is there a path, of one arc or more, from the row to the column?"""
    reach = arcs > 0
    for k in range(len(arcs)):  # Warshall
        reach = reach | (reach[:, k : k + 1] & reach[k : k + 1])
    return reach


def components(arcs: ndarray) -> list[tuple[int, ...]]:
    """Strongly connected components: vertices that reach each other."""
    reach = reachable(arcs)
    same = (reach & reach.T) | np.eye(len(arcs), dtype=bool)
    return sorted({tuple(row.nonzero()[0].tolist()) for row in same})


def eades(arcs: ndarray) -> list[int]:
    """An order in which little weight points backwards: sinks go last, sources first, else the vertex whose arcs out
    outweigh its arcs in the most."""
    left, right, rest = [], [], list(range(len(arcs)))
    while rest:
        out, into = arcs[rest][:, rest].sum(1), arcs[rest][:, rest].sum(0)
        if (out == 0).any():
            right.append(rest.pop(int((out == 0).argmax())))
        elif (into == 0).any():
            left.append(rest.pop(int((into == 0).argmax())))
        else:
            left.append(rest.pop(int((out - into).argmax())))
    return left + right[::-1]


def optimal(arcs: ndarray) -> float:
    """The most weight that an acyclic part of the graph can keep, exactly, for up to 12 vertices.

    best[S] = the most that an order of the vertices in S keeps = max over the last one, v, of best[S - v] + w(S - v, v)
    """
    n = len(arcs)
    if n > 12:
        raise ValueError(f"{n} vertices: 2^n sets are looked at, so at most 12")
    into = np.zeros((2**n, n))  # weight of the arcs from a set to a vertex
    for S in range(1, 2**n):
        low = S & -S
        into[S] = into[S ^ low] + arcs[low.bit_length() - 1]
    best = np.zeros(2**n)
    for S in range(1, 2**n):
        best[S] = max(best[S ^ (1 << v)] + into[S ^ (1 << v), v] for v in range(n) if S >> v & 1)
    return float(best[-1])


def forwards(arcs: ndarray, order: Sequence[int]) -> ndarray:
    """The graph without the arcs that point backwards in an order."""
    place = np.argsort(order)
    return np.where(place[:, None] < place, arcs, 0)


def kept(arcs: ndarray, order: Sequence[int]) -> float:
    """Weight of the arcs that point forwards in an order."""
    return float(forwards(arcs, order).sum())


def denoise(arcs: ndarray) -> ndarray:
    """The graph without the arcs that point backwards inside a component. A component in which nobody is ahead, all
    arcs in weighing as much as all arcs out, says nothing about its answers: its cycles stay, so they tie."""
    clean = arcs.copy()
    for vertices in components(arcs):
        block = np.ix_(vertices, vertices)
        if borda(arcs[block]).any():
            clean[block] = forwards(arcs[block], eades(arcs[block]))
    return clean


# ------------------------------------------------------------------------------------------------ methods: W -> scores


def descendants(arcs: ndarray) -> ndarray:
    """How many other answers each one reaches."""
    reach = reachable(arcs)
    np.fill_diagonal(reach, False)
    return reach.sum(1)


def borda(arcs: ndarray) -> ndarray:
    """Weighted Borda: what an answer's arcs out outweigh its arcs in."""
    return arcs.sum(1) - arcs.sum(0)


def bradley_terry(W: ndarray, rounds: int = 500, prior: float = 0.01) -> ndarray:
    """log p of P(u beats v) = p_u / (p_u + p_v), by maximum likelihood (Hunter's MM updates, 2004). A hundredth of a
    vote each way for every pair that was compared keeps an answer that never won finite."""
    W = W + prior * ((W + W.T) > 0)
    games, p = W + W.T, np.ones(len(W))
    for _ in range(rounds):
        p = W.sum(1) / np.maximum((games / (p[:, None] + p[None, :])).sum(1), 1e-300)
        p = np.maximum(p, 1e-12)
        p /= np.exp(np.log(p).mean())
    return np.log(p)


METHODS: dict[str, Callable[[ndarray], ndarray]] = {
    "graph, denoised": lambda W: descendants(denoise(ensemble(W))),
    "graph, raw": lambda W: descendants(ensemble(W)),
    "Borda, denoised": lambda W: borda(denoise(ensemble(W))),
    "Borda, raw": lambda W: borda(ensemble(W)),
    "Bradley-Terry": bradley_terry,
}


def ranking(scores: Sequence[float]) -> list[int]:
    """1 = best; equal scores share a rank."""
    return [1 + sum(other > mine for other in scores) for mine in scores]


# -------------------------------------------------------------------------------------------------------------- study


MR2BENCH_VIDEO = (94_000, 497, 19)  # votes, questions, models (second-hand, from a reading of the paper)


def simulate(n: int, votes: int | ndarray, wrong: float, rng: np.random.Generator) -> tuple[ndarray, list[int]]:
    """Votes about n answers of a random true order, each pair compared `votes` times (one number, or a symmetric matrix
    of them) -> W, true ranks."""
    truth = rng.permutation(n)  # truth[i] = place of answer i: index order says nothing
    better = truth[:, None] < truth[None, :]
    right = rng.binomial(votes, 1 - wrong, (n, n))
    return np.where(better, right, 0) + np.where(better.T, votes - right.T, 0), (truth + 1).tolist()


def spread(n: int, votes: int, rng: np.random.Generator) -> ndarray:
    """So many votes, each about a pair that is drawn for it -> how many each pair got, symmetric: some got none."""
    pairs = np.triu_indices(n, 1)
    each = np.zeros((n, n), dtype=int)
    each[pairs] = rng.multinomial(votes, np.full(len(pairs[0]), 1 / len(pairs[0])))
    return each + each.T


def study(items: int, seed: int) -> list[dict]:
    """Kendall's tau-b of every method against the truth: every pair compared as often, and, in the last rows, votes
    spread over pairs as thinly as MR2Bench-Video's."""
    total, questions, models = MR2BENCH_VIDEO
    thin = round(total / questions)
    even = product((8, 19), (1, 3, 9, 31), (False,), (0.2, 0.3, 0.4))
    rows, starred = [], []
    for n, votes, thinly, wrong in (*even, *product((models,), (thin,), (True,), (0.2, 0.3, 0.4))):
        rng = np.random.default_rng([seed, n, votes, round(100 * wrong)])
        taus: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(items):
            W, truth = simulate(n, spread(n, votes, rng) if thinly else votes, wrong, rng)
            for name, method in METHODS.items():
                taus[name].append(metrics.tau_b(method(W).tolist(), truth) or 0.0)  # all tied: no agreement
        means = {name: metrics.mean(values) for name, values in taus.items()}
        a_pair = votes / (n * (n - 1) / 2) if thinly else votes
        rows.append({"n": n, "votes": a_pair, "spread": thinly, "wrong": wrong, **means})
        best = max(means.values())
        starred.append(rows[-1] | {name: f"{tau:.3f}{'*' if tau == best else ' '}" for name, tau in means.items()})
    print("Kendall's tau-b against the truth, mean over simulated items; the best of a row is starred; votes: a pair\n")
    print(table(starred, {"n": "d", "votes": ".3g", "wrong": ".1f", **dict.fromkeys(METHODS, "")}))
    graph = [r for r in rows if r["graph, denoised"] > r["Borda, raw"]]
    ahead = "; ".join(f"n {r['n']}, {r['votes']:.3g} votes, {r['wrong']:.0%} wrong" for r in graph)
    print(f"\nthe graph ensemble ranks better than Borda in {len(graph)} of {len(rows)} rows: {ahead or None}")
    print(f"\nlast rows: {thin} votes an item on pairs drawn at random, as thin as MR2Bench-Video's; a third have none")
    return rows


# ------------------------------------------------------------------------------------------------------- from a file


def rank_items(votes: Sequence[Vote]) -> dict[str, dict[str, int]]:
    """item -> answer -> rank, by the denoised graph of all annotators' votes. Answers without a vote have no rank."""
    ranks, by_item = {}, {}
    for vote in votes:
        by_item.setdefault(vote.item, []).append(vote)
    for item, some in by_item.items():
        answers = sorted({name for vote in some for name in (vote.a, vote.b)})
        random.Random(item.encode("utf-8", "surrogatepass")).shuffle(
            answers
        )  # where a heuristic must break a tie, names must not
        scores = METHODS["graph, denoised"](count(some, answers))
        ranks[item] = dict(sorted(zip(answers, ranking(scores.tolist()), strict=True), key=lambda pair: pair[1]))
    return ranks


@dataclass(frozen=True)
class Answered(Record):
    """A record whose responses have names: who wrote them."""

    names: list[str] = field(default_factory=list)


def read_answers(path: str | Path) -> dict[str, Answered]:
    """item -> its prompt, pictures and answers, from {"item", "prompt", "responses": {answer: text}} and, where there
    are pictures, their paths."""
    items: dict[str, Answered] = {}
    for where, raw in read_lines(path):
        item, texts = raw.get("item"), raw.get("responses")
        if not isinstance(item, str) or not isinstance(texts, dict) or not texts:
            raise InputError(f"{where}: item must be a string, responses an object of answer: text")
        if bad := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
            raise InputError(f"{where}: the answer {bad[0]!r} must be a text that is not empty, got {texts[bad[0]]!r}")
        if item in items:
            raise InputError(f"{where}: item {item!r} stands there a second time")
        record = record_of(
            raw | {"responses": list(texts.values()), "rankings": None}, where, Path(path).parent, ranked=False
        )
        items[item] = Answered(**vars(record), names=list(texts))
    return items


def sample(
    ranks: dict[str, dict[str, int]], size: int, ties: int, rng: random.Random
) -> tuple[dict[str, list[str]], list[str]]:
    """`size` answers of every item, drawn so that as few as can be are of equal rank: one of each rank, then a second,
    ... -> item -> answers, and the items where more than `ties` pairs would be."""
    chosen, left_out = {}, []
    for item, ranked in ranks.items():
        taken: Counter[int] = Counter()
        nth: dict[str, int] = {}
        for name in rng.sample(list(ranked), len(ranked)):
            nth[name] = taken[ranked[name]]  # the k-th of its rank makes k pairs
            taken[ranked[name]] += 1
        names = sorted(nth, key=nth.get)[:size]
        if len(names) == size and sum(nth[name] for name in names) <= ties:
            chosen[item] = rng.sample(names, size)
        else:
            left_out.append(item)
    return chosen, left_out


def line_of(item: str, answered: Answered, names: Sequence[str], ranks: dict[str, int], folder: Path) -> dict:
    """An ordinary preference record of some of an item's answers, picture paths relative to `folder`; who wrote them
    stays readable in "models"."""
    texts = dict(zip(answered.names, answered.responses, strict=True))
    clips = [answered.video] if answered.video else []
    sources = [*answered.images, *(clip.path for clip in clips)]
    paths = [data_url(s) if isinstance(s, bytes) else os.path.relpath(s.resolve(), folder) for s in sources]
    shown = {"images": paths} if paths else {}
    if clips:
        shown = {"video": paths[0], "sampling_interval": clips[0].interval}
    return {
        "item": item,
        "prompt": answered.prompt,
        "responses": [texts[name] for name in names],
        "rankings": ranking([-ranks[name] for name in names]),
        "models": list(names),
    } | shown


# ----------------------------------------------------------------------------------------------------------- command


def from_file(args: argparse.Namespace) -> dict:
    answers = read_answers(args.answers) if args.answers else None
    ranks = rank_items(read_votes(args.votes, answers))
    if not args.out:
        for item, ranked in ranks.items():
            print(item + "  " + "  ".join(f"{rank}. {name}" for name, rank in ranked.items()))
        return ranks
    refuse_existing(args.out, args.overwrite, folder=False)
    chosen, left_out = {item: list(ranked) for item, ranked in ranks.items()}, []
    if args.sample:
        chosen, left_out = sample(ranks, args.sample, args.ties, random.Random(args.seed))
    folder = followed(args.out).parent.resolve() if is_plain(args.out) else Path.cwd()
    lines = [line_of(item, answers[item], names, ranks[item], folder) for item, names in chosen.items()]
    if not lines:
        raise InputError(f"no item has {args.sample} answers with at most {args.ties} ties among them")
    write_lines(args.out, lines)
    print(f"{len(lines)} records written to {args.out}")
    if left_out:
        print(f"left out, for want of {args.sample} answers with at most {args.ties} ties: {len(left_out)}, ", end="")
        print(left_out[:5])
    return {"records": len(lines), "left_out": left_out}


RULES = [
    ("without", "votes", "items"),
    ("with", "votes", "answers out"),
    ("with", "out", "sample overwrite"),
    ("with", "answers", "out"),
    ("with", "sample", "ties"),
]


def main() -> None:
    parser = Parser(prog="python -m yojo.votes", description="Rank answers from noisy pairwise votes.", rules=RULES)
    add = parser.add_argument
    add("--votes", type=Path, metavar="FILE", help="votes, JSONL; without it, a simulated study")
    add("--items", type=whole(1), default=40, metavar="K", help="simulated items for each line of the table")
    add("--answers", type=Path, metavar="FILE", help="prompts and texts of the items, JSONL; other votes are refused")
    add("--sample", type=whole(2), metavar="N", help="write N answers of each item, drawn by --seed, not all")
    add("--ties", type=whole(0), default=0, metavar="K", help="pairs of equal rank allowed in a record")
    add("--out", type=Path, metavar="FILE", help="write preference records")
    add("--overwrite", action="store_true", help="replace --out")
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> dict | list[dict]:
    if args.votes is None:
        return study(args.items, args.seed)
    if args.seed and not args.sample:
        raise InputError("--seed goes with --sample, or without --votes")
    return from_file(args)


if __name__ == "__main__":
    main()
