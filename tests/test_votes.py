"""Votes become rankings: literal examples first, then how good the heuristic is, then the commands.

pytest tests/test_votes.py
"""

import itertools
import json
import random

import numpy as np
import pytest

from yojo import metrics, votes
from yojo.core.data import read_records
from yojo.files import InputError, write_lines
from yojo.votes import METHODS, Vote, count, denoise, eades, ensemble, kept, optimal, rank_items, simulate


def ask(text):
    """ "a>b b>c c=d" -> votes of one item."""
    pairs = [(word[0], word[1], word[2]) for word in text.split()]
    return [Vote("q", a, b, "tie" if sign == "=" else a) for a, sign, b in pairs]


@pytest.mark.parametrize(
    "text, ranks",
    [
        ("a>b", {"a": 1, "b": 2}),
        ("a>b b>c a>c", {"a": 1, "b": 2, "c": 3}),
        ("a>b b>a", {"a": 1, "b": 1}),  # even votes: no arc
        ("a=b", {"a": 1, "b": 1}),
        ("a>b a>b b>a", {"a": 1, "b": 2}),
        ("a>b b>c c>a", {"a": 1, "b": 1, "c": 1}),  # a cycle of equal arcs: three-way tie
        ("x>a a>b b>c c>a c>y", {"x": 1, "a": 2, "b": 2, "c": 2, "y": 5}),
        ("a>b c>d", {"a": 1, "c": 1, "b": 3, "d": 3}),  # two graphs that know nothing of each other
        ("a>b b>c c>d d>a a>b b>c c>d", {"a": 1, "b": 2, "c": 3, "d": 4}),  # the weakest arc of the cycle goes
    ],
)
def test_literal_examples(text, ranks):
    assert rank_items(ask(text)) == {"q": ranks}


def test_all_methods_call_a_cycle_of_equal_arcs_a_tie():
    W = count(ask("a>b b>c c>a"), "abc")
    assert all(len(set(method(W).round(9).tolist())) == 1 for method in METHODS.values())


def test_one_answer_and_none():
    assert METHODS["graph, denoised"](np.zeros((1, 1))).tolist() == [0]
    assert METHODS["Bradley-Terry"](np.zeros((3, 3))).round(9).tolist() == [0, 0, 0]


def test_bradley_terry_by_hand():
    """Of two answers, one wins 3 of 4: p_a / (p_a + p_b) = 3 / 4, so the difference of the logs is log 3."""
    a, b = votes.bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=0.0)
    assert a - b == pytest.approx(np.log(3), rel=1e-6)


def random_arcs(rng, n, wrong=0.3, each=5):
    return ensemble(simulate(n, each, wrong, rng)[0])


def test_the_denoised_graph_has_no_cycle_and_loses_arcs_inside_components_only():
    rng = np.random.default_rng(0)
    for n in (2, 5, 9, 19):
        arcs = random_arcs(rng, n)
        clean = denoise(arcs)
        assert not votes.reachable(clean).diagonal().any()  # of these none is a component without a leader
        part = {v: i for i, vertices in enumerate(votes.components(arcs)) for v in vertices}
        for u, v in zip(*(arcs != clean).nonzero(), strict=True):
            assert clean[u, v] == 0 and part[u] == part[v]


def test_the_exact_optimum_is_the_best_of_all_orders():
    rng = np.random.default_rng(1)
    for _ in range(5):
        arcs = random_arcs(rng, 6)
        assert optimal(arcs) == max(kept(arcs, order) for order in itertools.permutations(range(6)))
    with pytest.raises(ValueError, match="at most 12"):
        optimal(np.zeros((13, 13)))


def test_eades_is_within_three_percent_of_the_optimum():
    rng, lost = np.random.default_rng(2), []
    for _ in range(10):
        arcs = random_arcs(rng, 12, each=9)
        best = optimal(arcs)
        assert kept(arcs, eades(arcs)) <= best + 1e-9
        lost.append(1 - kept(arcs, eades(arcs)) / best)
    assert np.mean(lost) < 0.03


def test_denoising_is_what_makes_descendants_a_ranking():
    """19 answers, 30% wrong votes, 9 a pair: raw, almost all answers reach each other."""
    rng, tau = np.random.default_rng(3), {"graph, raw": [], "graph, denoised": []}
    for _ in range(20):
        W, truth = simulate(19, 9, 0.3, rng)
        for name in tau:
            tau[name].append(metrics.tau_b(METHODS[name](W).tolist(), truth) or 0.0)
    assert np.mean(tau["graph, denoised"]) > 0.8 and np.mean(tau["graph, raw"]) < 0.2


def test_a_simulated_vote_is_wrong_as_often_as_asked():
    W, truth = simulate(40, 25, 0.3, np.random.default_rng(0))
    better = np.array(truth)[:, None] < np.array(truth)[None, :]
    assert W[better].sum() / W.sum() == pytest.approx(0.7, abs=0.01)
    assert (W + W.T)[~np.eye(40, dtype=bool)].min() == 25 == (W + W.T).max()


def test_94_000_votes_over_19_models():
    rng = np.random.default_rng(0)
    some = []
    for item in range(550):
        truth = rng.permutation(19)
        for i, j in itertools.combinations(range(19), 2):
            better, worse = (i, j) if (truth[i] < truth[j]) == (rng.random() > 0.3) else (j, i)
            some.append(Vote(f"q{item}", f"m{i}", f"m{j}", f"m{better}"))
            assert worse != better
    assert len(rank_items(some)) == 550 and len(some) == 94_050


# ------------------------------------------------------------------------------------------------------------- samples


def test_samples_keep_within_the_ties_and_items_are_left_out_only_where_none_would():
    rng = np.random.default_rng(0)
    ranks = {}
    for item in range(60):
        levels = np.sort(rng.integers(1, 7, 8))
        ranks[f"q{item}"] = {f"m{m}": int(levels[i]) for i, m in enumerate(rng.permutation(8))}
    for ties in (0, 1, 6):
        chosen, left_out = votes.sample(ranks, 4, ties, random.Random(0))
        assert chosen.keys() | set(left_out) == ranks.keys() and not chosen.keys() & set(left_out)
        for item, names in chosen.items():
            of = [ranks[item][name] for name in names]
            assert len(set(names)) == 4 and sum(a == b for a, b in itertools.combinations(of, 2)) <= ties
        for item in left_out:
            sets = itertools.combinations(ranks[item].values(), 4)
            assert all(sum(a == b for a, b in itertools.combinations(s, 2)) > ties for s in sets)
    assert votes.sample({"q": {"a": 1}}, 2, 9, random.Random(0)) == ({}, ["q"])


@pytest.fixture
def files(tmp_path):
    lines = [{"item": "q1", "a": a, "b": b, "winner": a} for a, b in itertools.combinations("vwxyz", 2)]
    lines += [{"item": "q2", "a": "v", "b": "w", "winner": "tie", "annotator": "p"}]
    write_lines(tmp_path / "votes.jsonl", lines)
    answers = [
        {"item": item, "prompt": "?", "responses": {name: f"text {name}" for name in "vwxyz"}} for item in ("q1", "q2")
    ]
    write_lines(tmp_path / "answers.jsonl", answers)
    return tmp_path


def test_the_command_ranks_and_writes_records(command, files):
    status, out, _ = command(votes, "--votes", files / "votes.jsonl")
    assert status == 0 and "q1  1. v  2. w  3. x  4. y  5. z" in out
    words = (
        "--votes",
        files / "votes.jsonl",
        "--answers",
        files / "answers.jsonl",
        "--sample",
        "4",
        "--out",
        files / "b.jsonl",
    )
    status, out, err = command(votes, *words)
    assert status == 0 and "1 records written" in out and "left out" in out, err
    (record,) = read_records(files / "b.jsonl")
    models = json.loads((files / "b.jsonl").read_text())["models"]
    assert sorted(record.rankings) == [1, 2, 3, 4]
    assert [m for _, m in sorted(zip(record.rankings, models, strict=True))] == sorted(models)
    assert record.responses == [f"text {m}" for m in models]
    assert command(votes, *words)[0] == 2


def test_picture_paths_follow_a_link_too(command, files):
    path = files / "answers.jsonl"
    lines = [json.loads(line) | {"image": "p.png"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)))
    (files / "p.png").write_bytes(b"")
    (files / "far/away").mkdir(parents=True)
    (files / "link").symlink_to("far/away/b.jsonl")
    assert command(votes, "--votes", files / "votes.jsonl", "--answers", path, "--out", files / "link")[0] == 0
    assert read_records(files / "far/away/b.jsonl")[0].images[0].samefile(files / "p.png")


def test_names_in_no_alphabet_are_only_names(command, tmp_path):
    (tmp_path / "v.jsonl").write_text(r'{"item": "\ud800", "a": "a", "b": "\udfff", "winner": "a"}')
    assert command(votes, "--votes", tmp_path / "v.jsonl")[0] == 0


def test_an_answer_whose_pictures_are_no_list_is_named(files):
    path = files / "answers.jsonl"
    path.write_text(json.dumps({"item": "q1", "prompt": "?", "responses": {"a": "x"}, "images": "ok.png"}))
    with pytest.raises(InputError, match="answers.jsonl:1: image and video must be a path, images a list of paths"):
        votes.read_answers(path)


def test_picture_paths_follow_the_records(command, files):
    path = files / "answers.jsonl"
    path.write_text(
        "\n".join(json.dumps(json.loads(line) | {"image": "p.png"}) for line in path.read_text().splitlines())
    )
    (files / "p.png").write_bytes(b"")
    (files / "elsewhere").mkdir()
    words = ("--votes", files / "votes.jsonl", "--answers", path, "--out", files / "elsewhere/b.jsonl")
    assert command(votes, *words)[0] == 0
    assert read_records(files / "elsewhere/b.jsonl")[0].images[0].samefile(files / "p.png")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"a": "b"}, "'b' stands against itself"),
        ({"winner": "c"}, "the winner 'c' is neither 'a' nor 'b' nor 'tie'"),
        ({"item": 3}, "must be strings"),
        ({"a": "tie"}, "no answer can be called 'tie'"),
        ({"a": "stranger", "winner": "b"}, "item 'q' has no answer 'stranger'"),
    ],
)
def test_bad_votes_are_named(tmp_path, change, why):
    path = tmp_path / "v.jsonl"
    good = {"item": "q", "a": "a", "b": "b", "winner": "a"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change))
    with pytest.raises(InputError, match="v.jsonl:2: ") as error:
        votes.read_votes(path, known={"q": votes.Answered("?", names=["a", "b", "c"])})
    assert why in str(error.value)


def test_an_item_that_stands_twice_is_named(files):
    path = files / "answers.jsonl"
    path.write_text(path.read_text().replace("q2", "q1"))
    with pytest.raises(InputError, match="answers.jsonl:2: item 'q1' stands there a second time"):
        votes.read_answers(path)


def test_the_study_prints_every_method(command):
    status, out, _ = command(votes, "--items", "2")
    assert status == 0 and all(name in out for name in METHODS)
    assert len([line for line in out.splitlines() if line[:2].strip().isdigit()]) == 27


def test_the_graph_is_for_many_votes_a_pair():
    """Spread as thinly as MR2Bench-Video's, 189 over 171 pairs, votes are ranked better by counting them."""
    rows = {(r["n"], round(r["votes"], 1), r["wrong"]): r for r in votes.study(20, seed=1)}
    for wrong in (0.2, 0.3, 0.4):
        thin = rows[19, 1.1, wrong]
        assert thin["spread"] and thin["graph, denoised"] < min(thin["Borda, raw"], thin["Bradley-Terry"])
    for n, many, wrong in itertools.product((8, 19), (9, 31), (0.2, 0.3)):
        row = rows[n, many, wrong]
        assert not row["spread"] and row["graph, denoised"] > max(row["Borda, raw"], row["Bradley-Terry"])


def test_votes_that_are_spread_leave_pairs_out():
    each = votes.spread(19, 189, np.random.default_rng(0))
    pairs = each[np.triu_indices(19, 1)]
    assert (each == each.T).all() and not each.diagonal().any() and pairs.sum() == 189
    assert 0.2 < (pairs == 0).mean() < 0.45  # (1 - 1/171)^189 = 0.33
    W, truth = simulate(19, each, 0.3, np.random.default_rng(0))
    assert (W + W.T == each).all()
