"""Each benchmark's official figure, recomputed by hand on a few rows with every trap in them.

    pytest tests/test_evaluate.py

The judge here is a rule that reads the answer's own number ("s=0.7"), so that every score is known: what is tested is
the reading of files and the arithmetic, not a model. One test runs the real one.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from yojo import evaluate
from yojo.benchmarks import Item, read_items
from yojo.cli import WEIGHTS
from yojo.core.reward import RewardModel
from yojo.evaluate import order_sensitivity, orders_of, report, score_item
from yojo.files import InputError
from yojo.video import Clip

CASES = json.loads((Path(__file__).parent / "data/evaluate.json").read_text())
CASES["habit of position"]["rows"] = [
    {"id": str(i), "prompt": f"{i}?", "chosen": "s=0", "rejected": "s=0 b"} for i in range(400)
]


@pytest.fixture
def folder(tmp_path):
    for name in ("mcq", "long"):
        (tmp_path / "files" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "files" / name / "p.png")
    return tmp_path / "files"


def write(folder, rows):
    (folder / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "d.jsonl"


def judged(folder, name):
    """The report, the judge's score being the number after "s=" plus a habit for whatever is shown first."""
    case = CASES[name]
    mapping = [f"{name}={field}" for name, field in case["map"].items()]
    items, scores = read_items(write(folder, case["rows"]), case["format"], mapping), []
    for item in items:
        shown = []
        for order in two_orders(item):
            own = [float(text.split("s=")[1].split()[0]) for text in item.responses]
            shown.append([s + case["habit"] * (order[0] == i) for i, s in enumerate(own)])
        scores.append(shown)
    return report(items, scores, case["format"], "joint", two_orders)


def two_orders(item):
    return orders_of(item, 0, 2)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_report_is_as_it_was(folder, name):
    """Frozen when the figures below had been worked by hand: intervals, baselines and orders, too."""
    assert json.loads(json.dumps(judged(folder, name))) == CASES[name]["report"]


def test_vl_rewardbench_by_hand(folder):
    """Ids repeat, rankings start at 0 and come in both orders; macro = mean of three category means. In the file's
    order: right, wrong; right; a tie, which is wrong; right; right."""
    got = judged(folder, "vl-rewardbench")
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert {k: v["accuracy"] for k, v in got["categories"].items()} == pytest.approx(
        {"general": 2 / 3, "hallucination": 1 / 2, "reasoning": 1}
    )
    assert got["macro"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert got["ties"] == pytest.approx(1 / 6) and got["baselines"]["random"] == 0.5


def test_multimodal_rewardbench_by_hand(folder):
    got = judged(folder, "multimodal-rewardbench")
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert (
        got["categories"]["safety/toxicity"] == {"items": 2, "accuracy": 0.5}
        and got["categories"]["vqa"]["accuracy"] == 0.75
    )


def test_mm_rlhf_by_hand(folder):
    """ACC counts pairs, ACC+ an id only where all its pairs are right; the category is the picture's folder."""
    got = judged(folder, "mm-rlhf")
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["acc_plus"] == pytest.approx(2 / 4) and got["ids"] == 4
    assert {k: v["items"] for k, v in got["categories"].items()} == {"mcq": 2, "long": 2, "text": 1, "files": 1}


def test_videorewardbench_by_hand(folder):
    got = judged(folder, "videorewardbench")
    assert got["accuracy"] == pytest.approx(3 / 6) and got["macro"] == pytest.approx((3 / 4 + 0) / 2)


def test_records_by_hand(folder):
    """Best-of-N counts tied tops by their share; pairs and tau-b leave tied ranks out. In the file's order: 1; a tied
    top, 1/2; 0; 1; a pair's tie, 0; both are best, 1."""
    got = judged(folder, "records")
    assert got["accuracy"] == pytest.approx((1 + 0.5 + 0 + 1 + 0 + 1) / 6)
    assert got["pairwise"] == pytest.approx((1 + 2.5 / 3 + 0 + 1 + 0.5) / 5)
    assert got["tau_b"] == pytest.approx((1 + 2 / (2 * 3) ** 0.5 - 2 / (3 * 2) ** 0.5 + 1) / 4)


def test_fields_are_mapped(folder):
    assert judged(folder, "fields mapped")["categories"] == {"x": {"items": 1, "accuracy": 1.0}}


def test_a_habit_of_position_is_not_accuracy_and_shows(folder):
    """A judge that prefers whatever stands first. Chosen stands first in the file, and still it scores about half."""
    got = judged(folder, "habit of position")
    assert 0.4 < got["accuracy"] < 0.6
    assert got["order"]["changed"] == 1.0 and got["order"]["by_place"] == {"1": 1.0, "2": 0.0}
    assert got["order"]["mean_over_orders"] == 0.0  # averaged, all pairs are ties
    assert 0.4 < got["baselines"]["first"] < 0.6


def test_orders_depend_on_seed_and_content_and_a_pair_has_two():
    pair, many, three = (Item("?", list(names)) for names in ("ab", "abcdef", "abc"))
    assert sorted(orders_of(pair, 0, 9)) == [[0, 1], [1, 0]] and orders_of(pair, 0, 9) == orders_of(pair, 0, 9)
    assert sorted(map(tuple, orders_of(three, 0, 9))) == list(itertools.permutations(range(3))), "none twice"
    assert orders_of(Item("?", ["a"]), 0, 4) == [[0]]
    assert len(orders_of(many, 0, 5)) == 5
    assert orders_of(many, 0, 1) == orders_of(many, 0, 5)[:1] != orders_of(many, 1, 1)


def test_order_sensitivity_by_hand():
    item = Item("?", ["a", "b", "c"], [1, 2, 3])
    got = order_sensitivity([item], [[[3, 2, 1], [1, 2, 3], [3, 1, 1]]], lambda item: orders_of(item, 0, 3))
    assert got["changed"] == 0.5 and got["mean_over_orders"] == 1.0


GOOD = {"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}


@pytest.mark.parametrize(
    "form, row, why",
    [
        ("records", GOOD | {"rankings": [1]}, "rankings must be 2 whole numbers"),
        ("records", GOOD | {"responses": ["a", " "]}, "response 2 is empty"),
        ("records", GOOD | {"image": "none.png"}, "no picture at"),
        (
            "records",
            {"responses": ["a", "b"], "rankings": [1, 2]},
            "prompt must be a str, got None; --map prompt=FIELD",
        ),
        (
            "vl-rewardbench",
            {"id": "povid", "query": "?", "response": ["a", "b"], "human_ranking": [0, 0]},
            "one better answer is needed",
        ),
        (
            "multimodal-rewardbench",
            {"ID": "1", "Text": "?", "Output1": "a", "Output2": "b", "Better": "a", "Category": "x"},
            "Better must be one of Output1, Output2, got 'a'",
        ),
        (
            "mm-rlhf",
            {"id": "1", "prompt": "?", "chosen": "a"},
            "rejected must be a str, got None; --map rejected=FIELD",
        ),
        (
            "mm-rlhf",
            {"prompt": "?", "chosen": "a", "rejected": "b"},
            "id must be a str or int, got None; --map group=FIELD",
        ),
        ("records", GOOD | {"image": ""}, "image and video must be a path"),
        (
            "multimodal-rewardbench",
            {"Text": "?", "Output1": "a", "Output2": "b", "Better": "Output1"},
            "Category must be a str or int, got None; --map category=FIELD",
        ),
    ],
)
def test_bad_rows_are_named_and_with_keep_going_listed(folder, form, row, why):
    good = {
        "records": GOOD,
        "vl-rewardbench": {"id": "povid", "query": "?", "response": ["a", "b"], "human_ranking": [0, 1]},
        "multimodal-rewardbench": {"Text": "?", "Output1": "a", "Output2": "b", "Better": "Output1", "Category": "x"},
        "mm-rlhf": {"id": "1", "prompt": "?", "chosen": "a", "rejected": "b"},
    }[form]
    path = write(folder, [good, row])
    with pytest.raises(InputError, match="d.jsonl:2: ") as error:
        read_items(path, form)
    assert why in str(error.value)
    items = read_items(path, form, bad=(left_out := []))
    assert len(items) == 1 and len(left_out) == 1 and why in left_out[0]


@pytest.mark.parametrize(
    "name, category",
    [
        ("RLAIF-V-1", "hallucination"),
        ("RLHF-V-2", "hallucination"),
        ("hallucination_pair-10", "hallucination"),
        ("povid_3", "hallucination"),
        ("mathverse_1", "reasoning"),
        ("mmmu_pro_test_Art_2", "reasoning"),
        ("wildvision-5", "general"),
        ("jailbreak-Fraud-29", "general"),
        ("LRVInstruction-000000007746", "general"),
        ("svit_1", "general"),
        ("a source of next year", "general"),
        (17, "general"),
    ],
)
def test_where_an_id_of_vl_rewardbench_comes_from_is_its_category(folder, name, category):
    row = {"id": name, "query": "?", "response": ["a", "b"], "human_ranking": [1, 0]}
    (item,) = read_items(write(folder, [row]), "vl-rewardbench")
    assert item.category == category and item.rankings == [2, 1]


@pytest.mark.parametrize(
    "category, name, half",
    [
        ("safety", "pairs_12", "safety/bias"),
        ("safety", "Pairs-3", "safety/bias"),
        ("safety", "toxic_1", "safety/toxicity"),
        ("Reasoning", "math_500_7", "reasoning/math"),
        ("reasoning", "webcode_7", "reasoning/coding"),
        ("vqa", "math_1", "vqa"),
    ],
)
def test_multimodal_rewardbench_reports_two_categories_in_halves(folder, category, name, half):
    row = {"ID": name, "Text": "?", "Output1": "a", "Output2": "b", "Better": "Output1", "Category": category}
    (item,) = read_items(write(folder, [row]), "multimodal-rewardbench")
    assert item.category == half
    if "/" in half:
        with pytest.raises(InputError, match="no id tells which; --map group=FIELD"):
            read_items(write(folder, [{k: v for k, v in row.items() if k != "ID"}]), "multimodal-rewardbench")


def test_a_file_that_is_one_json_list_is_read(folder):
    """As Multimodal RewardBench's all_data.json is; a bad item is named by its number."""
    row = {"ID": "1", "Text": "?", "Output1": "a", "Output2": "b", "Better": "Output1", "Category": "vqa"}
    path = folder / "all_data.json"
    path.write_text(json.dumps([row, row], indent=1))
    assert [item.responses for item in read_items(path, "multimodal-rewardbench")] == [["a", "b"]] * 2
    path.write_text(json.dumps([row, row | {"Better": "c"}, 5]))
    with pytest.raises(InputError, match="all_data.json, item 2: Better must be one of"):
        read_items(path, "multimodal-rewardbench")
    items = read_items(path, "multimodal-rewardbench", bad=(left_out := []))
    assert len(items) == 1 and "item 2" in left_out[0] and "item 3 holds a JSON int" in left_out[1]


def test_released_records_say_question_and_seconds_between_frames(folder):
    (folder / "clip").mkdir()
    row = {"question": "?", "responses": ["a", "b"], "rankings": [1, 2], "video": "clip", "fps": 2.0}
    (item,) = read_items(write(folder, [row]), "records")
    assert item.prompt == "?" and item.video == Clip(folder / "clip", interval=2.0)
    with pytest.raises(InputError, match="'timestamps' may say when .* sampling_interval=FIELD reads it"):
        read_items(write(folder, [row | {"timestamps": [0, 1]}]), "records")
    with pytest.raises(InputError, match="both prompt and question"):
        read_items(write(folder, [row | {"prompt": "!"}]), "records")


def test_a_mapped_prompt_takes_the_place_of_the_question(folder):
    row = {"question": "?", "text": "!", "responses": ["a", "b"], "rankings": [1, 2]}
    for field, prompt in (("question", "?"), ("text", "!")):
        (item,) = read_items(write(folder, [row]), "records", [f"prompt={field}"])
        assert item.prompt == prompt


def test_a_picture_under_another_name_is_no_item_without_a_picture(folder):
    row = {"Text": "?", "Output1": "a", "Output2": "b.png", "Better": "Output1", "Category": "x", "image": "a.png"}
    with pytest.raises(InputError, match="'image' may show something, and it is not read: --map image=FIELD"):
        read_items(write(folder, [row]), "multimodal-rewardbench")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (item,) = read_items(write(folder, [row]), "multimodal-rewardbench", ["image=image"])
    assert item.images == [folder / "a.png"] and item.responses == ["a", "b.png"]


def test_a_field_is_read_as_one_thing(folder):
    row = {"Text": "?", "A": "a", "Better": "A", "Category": "x"}
    with pytest.raises(InputError, match="--map: A is read as two things"):
        read_items(write(folder, [row]), "multimodal-rewardbench", ["first=A", "second=A"])


@pytest.mark.parametrize("mode, right", [("isolated", 0.0), ("joint", None)])
def test_equal_answers_are_a_tie_in_isolated_mode_in_every_dtype(command, folder, mode, right):
    """Read twice they differed by rounding, and half of them, or an eighth, counted as right."""
    text = "a small red star very very very very bright"
    rows = [{"prompt": f"Describe the star number {i}.", "responses": [text] * 2, "rankings": [1, 2]} for i in range(8)]
    for dtype in ("float32", "bfloat16"):
        words = ["--model", WEIGHTS / "tiny-rm", "--data", write(folder, rows), "--mode", mode, "--dtype", dtype]
        status, _, err = command(evaluate, *words, "--json", folder / "out.json")
        assert status == 0, err
        found = json.loads((folder / "out.json").read_text())
        assert (found["accuracy"], found["ties"]) == (right, 1.0) if right is not None else found["ties"] == 0.0


def test_fields_of_other_names_are_what_the_better_one_may_be_called(folder):
    row = {"Text": "?", "A": "a", "B": "b", "Better": "B", "Category": "x"}
    (item,) = read_items(write(folder, [row]), "multimodal-rewardbench", ["first=A", "second=B"])
    assert item.responses == ["a", "b"] and item.rankings == [2, 1]
    with pytest.raises(InputError, match="Better must be one of A, B, got 'Output1'"):
        read_items(write(folder, [row | {"Better": "Output1"}]), "multimodal-rewardbench", ["first=A", "second=B"])


@pytest.mark.parametrize(
    "change, why",
    [
        ({"query": 5}, "query must be a str, got 5; --map prompt=FIELD"),
        ({"human_ranking": [0]}, "rankings must be 2 whole numbers from 1, got [0]"),
        ({"human_ranking": [-1, 1]}, "rankings must be 2 whole numbers from 1, got [-1, 1]"),
        ({"human_ranking": [9, 3]}, "human_ranking must count from 0, got [9, 3]"),
        ({"human_ranking": [1, 2]}, "human_ranking must count from 0, got [1, 2]"),
        ({"human_ranking": [0, 5]}, "rankings must be 2 whole numbers from 1, got [0, 5]"),
        ({"human_ranking": "01"}, "human_ranking must be a list, got '01'; --map rankings=FIELD"),
        ({"id": ["povid"]}, "id must be a str or int, got ['povid']; --map group=FIELD"),
    ],
)
def test_a_bad_value_is_shown_as_it_stands_in_the_file(folder, change, why):
    good = {"id": "povid", "query": "?", "response": ["a", "b"], "human_ranking": [0, 1]}
    with pytest.raises(InputError) as error:
        read_items(write(folder, [good | change]), "vl-rewardbench")
    assert why in str(error.value)


def test_what_is_no_evaluation_is_not_offered_to_be_overwritten_as_one(command, folder, evaluated):
    (folder / "notes.txt").write_text("dear diary\nnothing\n")
    status, _, err = command(evaluate, *words(evaluated, "--out", folder / "notes.txt"))
    assert status == 2 and "holds another evaluation: choose another --out" in err


# ---------------------------------------------------------------------------------------------------- the real model


@pytest.fixture
def evaluated(folder):
    import random

    from yojo.tiny import world

    made = world.records(random.Random(5), "absolute", 12, 12, (2, 4))
    return world.write_records(folder, "bench", made)


def words(path, *more):
    return ["--model", str(WEIGHTS / "tiny-rm"), "--data", str(path), "--permutations", "3", *map(str, more)]


KILLED = """
import os, signal, sys
from yojo import evaluate
real, calls = evaluate.score_item, []
def score(*words):
    calls.append(1)
    if len(calls) == 6:
        with open(sys.argv[-1], "a") as file:
            file.write("[[0.1, 0.")  # half a line, as a kill in the middle of a write leaves it
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words)
evaluate.score_item = score
evaluate.main()
"""


def test_a_killed_evaluation_goes_on_and_ends_with_the_identical_report(command, folder, evaluated, monkeypatch):
    status, _, err = command(evaluate, *words(evaluated, "--json", folder / "a.json", "--out", folder / "a.jsonl"))
    assert status == 0, err
    arguments = words(evaluated, "--json", folder / "b.json", "--out", folder / "b.jsonl")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # other sums round otherwise
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL and len((folder / "b.jsonl").read_text().splitlines()) == 7
    calls = []
    monkeypatch.setattr(evaluate, "score_item", lambda *words: calls.append(1) or score_item(*words))
    assert command(evaluate, *arguments)[0] == 0
    assert len(calls) == 12 - 5, "what was scored before the kill is scored no second time"
    for name in ("json", "jsonl"):
        assert (folder / f"a.{name}").read_bytes() == (folder / f"b.{name}").read_bytes()
    status, _, err = command(evaluate, *arguments, "--seed", "1")
    assert status == 2 and "holds another evaluation" in err


def test_an_evaluation_whose_items_changed_is_another_one(command, folder, evaluated):
    """A picture that was missing and has come back would shift every score by one row."""
    (folder / "bench/2.png").rename(folder / "away.png")
    arguments = words(evaluated, "--out", folder / "c.jsonl", "--keep-going")
    status, out, err = command(evaluate, *arguments)
    assert status == 0 and "left out, 1 rows" in out, err
    (folder / "away.png").rename(folder / "bench/2.png")
    status, _, err = command(evaluate, *arguments)
    assert status == 2 and "holds another evaluation" in err


def test_keep_going_keeps_going(command, folder, evaluated):
    """A line that is no JSON, and a picture that can't be read."""
    (folder / "bench/3.png").write_bytes(b"no picture")
    evaluated.write_text("{\n" + evaluated.read_text())
    status, _, err = command(evaluate, *words(evaluated))
    assert status == 2 and "bench.jsonl:1 is not JSON" in err
    status, out, err = command(evaluate, *words(evaluated, "--keep-going", "--json", folder / "k.json"))
    assert status == 0, err
    result = json.loads((folder / "k.json").read_text())
    assert result["items"] == 11 and len(result["left_out"]) == 2 and "bench.jsonl:5" in result["left_out"][1]


def test_a_damaged_file_of_scores_is_named(command, folder, evaluated):
    arguments = words(evaluated, "--out", folder / "e.jsonl")
    assert command(evaluate, *arguments)[0] == 0
    lines = (folder / "e.jsonl").read_text().splitlines()
    (folder / "e.jsonl").write_text("\n".join([*lines[:3], "garbage", *lines[3:], ""]))
    status, _, err = command(evaluate, *arguments)
    assert status == 2 and "cannot be read as an evaluation" in err
    status, _, err = command(evaluate, *words(evaluated, "--out", folder))
    assert status == 2 and "cannot be read as an evaluation" in err


def test_scores_do_not_depend_on_how_they_are_asked_for(evaluated):
    """The first order's scores are those of `RewardModel.score` on the answers so shown."""
    rm = RewardModel.load(WEIGHTS / "tiny-rm")
    for item in read_items(evaluated, "records")[:4]:
        (order,) = orders = orders_of(item, 0, 1)
        shown = rm.score(item.prompt, [item.responses[i] for i in order], image=item.images)
        assert score_item(rm, item, orders, "joint")[0] == pytest.approx(
            [shown[order.index(i)] for i in range(len(order))], abs=1e-6
        )


def test_a_score_that_is_not_finite_raises(command, evaluated, monkeypatch):
    monkeypatch.setattr(RewardModel, "raw_scores", lambda rm, rows, *_: [[math.nan for _ in row.spans] for row in rows])
    status, _, err = command(evaluate, *words(evaluated))
    assert status == 2 and "bench.jsonl:1: scores are not finite" in err


@pytest.mark.parametrize(
    "arguments, why",
    [
        ((), "give --tiny, or --model and --data"),
        (("--tiny", "--model", "x"), "--model and --tiny exclude each other"),
        (("--model", "x", "--data", "y", "--permutations", "0"), "'0' is no whole number from 1"),
        (("--model", "x", "--data", "y", "--map", "a"), "--map a: NAME=FIELD"),
        (("--model", "x", "--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--model", "x", "--data", "y", "--format", "z"), "invalid choice: 'z'"),
    ],
)
def test_bad_input_gets_one_line(command, arguments, why):
    status, _, err = command(evaluate, *arguments)
    assert status == 2 and why in err and "Traceback" not in err
