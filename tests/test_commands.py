"""Commands as a user types them: bad input gives one clear line and exit status 2, and loses nothing.

pytest tests/test_commands.py
"""

import argparse
import json
import math
import random
import re
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from yojo import bench, checkpoint, claims, cli, evaluate, flops, grpo, hacking, pretrain, score, train, votes
from yojo.cli import WEIGHTS
from yojo.core import training
from yojo.core.molmo2 import Molmo2
from yojo.core.reward import RewardModel
from yojo.files import write_lines
from yojo.tiny import world


@pytest.fixture
def refused(command):
    def call(why, module, *words):
        status, _, err = command(module, *words)
        lines = [line for line in err.splitlines() if not line.startswith("usage")]
        assert status == 2, err
        assert len(lines) == 1 or "usage" in err, err
        assert why in err and "Traceback" not in err, err

    return call


ONE = ("--prompt", "?", "--response", "x")


@pytest.mark.parametrize(
    "words, why",
    [
        ((), "give --tiny, or --model"),
        (("--tiny", "--model", "x"), "--model and --tiny exclude each other"),
        (("--model", "nowhere", *ONE), "nowhere/reward_model_config.json does not exist"),
        (("--tiny", "--prompt", "?"), "give --prompt and at least one --response"),
        (("--tiny", "--prompt", "?", "--response", ""), "response 1 is empty"),
        (("--tiny", "--prompt", "?", "--response", "x", "--response", " \t"), "response 2 is empty"),
        (("--tiny", "--prompt", "?", *("--response", "x") * 65), "65 responses are 1 more than the limit of 64"),
        (("--tiny", "--prompt", "?", "--response", "x " * 5000), "more than the model's limit of 4096"),
        (("--tiny", "--prompt", "?", "--response", "\ud800"), "lone surrogate"),
        (("--tiny", "--image", "none.png", *ONE), "no picture at none.png"),
        (("--tiny", "--image", __file__, *ONE), "is not a picture"),
        (("--tiny", "--data", "none.jsonl"), "none.jsonl does not exist"),
        (("--tiny", "--prompt", "?", "--response", "x " * 999, "--draw-mask", "m.png"), "too many to draw"),
        (("--tiny", "--data", "x.jsonl", *ONE), "--prompt and --data exclude each other"),
        (("--tiny", "--data", "x.jsonl", "--frames", "2"), "--frames needs --video"),
        (("--tiny", "--mode", "both", *ONE), "invalid choice: 'both'"),
        (("--tiny", "--json", "/proc/none/x.json", *ONE), "cannot write"),
        (("--tiny", "--seed", "-1", *ONE), "'-1' is no whole number from 0"),
        (("--tiny", "--video", ".", "--interval", "nan", *ONE), "frames nan seconds apart"),
    ],
)
def test_score_refuses(refused, words, why):
    refused(why, score, *words)


@pytest.mark.parametrize(
    "words, why",
    [
        ((), "give --tiny, or --weights and --data and --out and --mode"),
        (("--weights", "x"), "give --tiny, or --weights and --data and --out and --mode"),
        (("--tiny", "--weights", "x"), "--weights and --tiny exclude each other"),
        (("--paraphrase", "--weights", "x"), "--paraphrase needs --tiny"),
        (("--tiny", "--paraphrase"), "--paraphrase goes with --task corroborated only"),
        (("--tiny", "--seeds", "0"), "'0' is no whole number from 1"),
        (("--tiny", "--seeds", "3", "--out", "x"), "--out holds one seed's models"),
        (("--tiny", "--steps", "-5"), "'-5' is no whole number from 1"),
        (("--tiny", "--lr", "2"), "'2' is not between 0 and 1"),
        (("--tiny", "--sizes", "1"), "'1' is no whole number from 2"),
        (("--tiny", "--sizes", "17"), "2 to 16 responses"),
        (("--tiny", "--task", "other"), "invalid choice: 'other'"),
    ],
)
def test_train_refuses(refused, words, why):
    refused(why, train, *words)


@pytest.mark.parametrize(
    "module, words, why",
    [
        (score, "--tiny --base x", "--base and --tiny exclude each other"),
        (score, "--tiny --image x --video y", "--image and --video exclude each other"),
        (score, "--tiny --interval 2", "--interval needs --video"),
        (score, "--model x --prompt ? --response y --seed 3", "--seed and --model exclude each other"),
        (score, "--model x", "give --tiny or --data, or --prompt and --response"),
        (train, "--tiny --compile", "--compile and --tiny exclude each other"),
        (train, "--tiny --resume", "--resume and --tiny exclude each other"),
        (train, "--tiny --overwrite", "--overwrite needs --out"),
        (train, "--weights x --data y --out z --mode joint --sizes 3", "--sizes needs --tiny"),
        (evaluate, "--tiny --dtype float32", "--dtype and --tiny exclude each other"),
        (evaluate, "--tiny --keep-going", "--keep-going and --tiny exclude each other"),
        (evaluate, "--model x --data y --overwrite", "--overwrite needs --out"),
        (grpo, "--tiny --weights x", "--weights and --tiny exclude each other"),
        (grpo, "--make-start --lr 0.1", "--lr and --make-start exclude each other"),
        (grpo, "--make-start --tiny", "--tiny and --make-start exclude each other"),
        (grpo, "--reward x --data y --out z --seeds 2", "--seeds needs --tiny"),
        (grpo, "--tiny --overwrite", "--overwrite needs --out or --make-start"),
        (votes, "--votes x --items 3", "--items and --votes exclude each other"),
        (votes, "--answers x", "--answers needs --votes"),
        (votes, "--votes x --out y", "--out needs --answers"),
        (votes, "--votes x --sample 3", "--sample needs --out"),
        (votes, "--votes x --overwrite", "--overwrite needs --out"),
        (votes, "--votes x --answers y --out z --ties 2", "--ties needs --sample"),
        (votes, "--votes x --seed 3", "--seed goes with --sample, or without --votes"),
        (bench, "score --weights x --size tiny", "--size and --weights exclude each other"),
        (bench, "train --weights x --layers 1", "--layers and --weights exclude each other"),
        (bench, "load --weights x --vision-layers 1", "--vision-layers and --weights exclude each other"),
        (bench, "load --weights x --seed 3", "--seed and --weights exclude each other"),
    ],
)
def test_options_that_do_not_go_together_are_refused(refused, module, words, why):
    refused(why, module, *words.split())


@pytest.mark.parametrize(
    "module", [bench, checkpoint, claims, evaluate, flops, grpo, hacking, pretrain, score, train, votes]
)
def test_help_explains_every_option(command, module, monkeypatch):
    status, out, _ = command(module, "--help")
    assert status == 0 and "--json" in out
    parsers, init = [], argparse.ArgumentParser.__init__

    def remember(self, **options):
        init(self, **options)
        parsers.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", remember)
    command(module, "--help")
    assert parsers
    for parser in parsers:
        for action in parser._actions:
            assert action.help or not action.option_strings, f"{parser.prog} {action.option_strings}"


@pytest.mark.parametrize(
    "module, words",
    [
        (score, ["--tiny"]),
        (train, ["--tiny"]),
        (grpo, ["--tiny"]),
        (grpo, ["--make-start"]),
        (evaluate, ["--tiny"]),
        (hacking, []),
        (claims, ["data"]),
        (pretrain, ["--out", "{folder}/a"]),
        (flops, ["--shape", "tiny"]),
        (bench, ["score", "--shape", "tiny"]),
        (checkpoint, ["random", "--shape", "tiny", "--out", "{folder}/b"]),
    ],
)
def test_an_installed_package_says_where_the_weights_are(refused, monkeypatch, tmp_path, module, words):
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path / "site-packages/weights")
    refused("the tiny weights", module, *(word.format(folder=tmp_path) for word in words))
    assert not list(tmp_path.iterdir())


def test_score_tiny_prints_a_ranked_table(command, tmp_path):
    status, out, err = command(score, "--tiny", "--json", tmp_path / "s.json", "--draw-mask", tmp_path / "m.png")
    assert status == 0, err
    assert "mode: joint: each answer attends to the question, itself and the answers before it" in out
    assert "rank   score  #  true facts  response" in out
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["mode"] == "joint" and len(result["scores"]) == len(result["true_facts"]) == 4
    assert Image.open(tmp_path / "m.png").width > 500
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    assert [int(row[3]) for row in rows] == [result["true_facts"][int(row[2]) - 1] for row in rows]


@pytest.mark.parametrize("name", ["tiny-rm", "tiny-rm-isolated"])
def test_the_demonstration_has_one_wholly_true_answer_and_the_shipped_models_find_it(name):
    rm = RewardModel.load(WEIGHTS / name)
    for seed in range(20):
        scene, prompt, responses, facts = score.demonstration(random.Random(seed))
        assert facts.count(6) == 1 == facts.count(max(facts)) and len(facts) == 4 and facts[0] < 6
        assert facts == [world.oracle(scene, prompt, response) for response in responses]
        scores = rm.score(prompt, responses, image=world.render(scene))
        assert facts[scores.index(max(scores))] == 6


def test_score_names_the_mode_that_was_asked_for(command):
    _, out, _ = command(score, "--model", WEIGHTS / "tiny-rm", "--mode", "isolated", *ONE)
    assert "mode: isolated (trained in joint): each answer attends to the question and itself" in out
    assert "true facts" not in out, "nobody knows them here"


def test_score_reads_records(command, tmp_path):
    Image.new("RGB", (40, 90), "red").save(tmp_path / "p.png")
    lines = [{"prompt": "?", "responses": ["a", "b"], "image": "p.png"}, {"prompt": "!", "responses": ["c"]}]
    write_lines(tmp_path / "d.jsonl", lines)
    status, _, err = command(score, "--tiny", "--data", tmp_path / "d.jsonl", "--json", tmp_path / "s.json")
    assert status == 0, err
    results = json.loads((tmp_path / "s.json").read_text())
    assert [len(r["scores"]) for r in results] == [2, 1] and not any("true_facts" in r for r in results)


def test_scores_that_are_not_finite_are_named_not_ranked(command, monkeypatch, tmp_path):
    monkeypatch.setattr(RewardModel, "raw_scores", lambda rm, rows, *_: [[1.0, math.nan, 7.0, math.inf]] * len(rows))
    status, out, err = command(score, "--tiny", "--json", tmp_path / "s.json")
    assert status == 2 and "scores are not finite" in err and "rank" not in out and not (tmp_path / "s.json").exists()
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"prompt": "?", "responses": ["a"]}))
    status, out, err = command(score, "--tiny", "--data", data, "--json", tmp_path / "s.json")
    assert status == 2 and f"{data}:1: scores are not finite" in err and not (tmp_path / "s.json").exists()


def test_the_drawn_mask_has_labels_that_can_be_read(command, monkeypatch, tmp_path):
    drawn, real = [], score.draw_mask
    monkeypatch.setattr(score, "draw_mask", lambda mask, labels: drawn.extend(labels) or real(mask, labels=labels))
    assert command(score, "--tiny", "--draw-mask", tmp_path / "m.png", *ONE)[0] == 0
    assert r"\n" in drawn and "<|resp_sep|>" in drawn and not any(label != label.strip() for label in drawn)


# ---------------------------------------------------------------------------- training on a checkpoint and a file


@pytest.fixture
def run_folder(tiny_folder, tmp_path, monkeypatch):
    """Preference records and the default recipe, shrunk."""
    from yojo.core.lora import LoraConfig
    from yojo.core.training import FitConfig, Recipe

    small = Recipe(LoraConfig(r=2, dropout=0.0), inner=8, records=1, fit=FitConfig(steps=0, accumulate=2, save_every=2))
    monkeypatch.setattr(train, "Recipe", lambda: replace(small))
    Image.effect_noise((84, 84), 60).save(tmp_path / "p.png")
    record = {"prompt": "?", "responses": ["good", "bad", "worse"], "rankings": [1, 2, 3], "image": "p.png"}
    (tmp_path / "prefs.jsonl").write_text("\n".join(json.dumps(record) for _ in range(6)))
    words = ("--weights", tiny_folder, "--data", tmp_path / "prefs.jsonl", "--out", tmp_path / "rm", "--mode", "joint")
    return tmp_path, words


def test_training_writes_a_reward_model(command, run_folder):
    folder, words = run_folder
    status, out, err = command(train, *words, "--json", folder / "r.json")
    assert status == 0, err
    result = json.loads((folder / "r.json").read_text())
    assert result["mode"] == "joint" and 0 <= result["own"] <= 1 and {"blank", "longest"} <= result.keys()
    assert "swapped" not in result, "one record is held back: there is no other picture to swap in"
    assert len((folder / "rm/metrics.jsonl").read_text().splitlines()) == result["steps"] == 3 * 5 // 2
    assert not (folder / "rm.training").exists()
    status, _, err = command(score, "--model", folder / "rm", *ONE)
    assert status == 0, err


@pytest.mark.parametrize("loss, at_equal_scores", [("best-of-n", 3), ("plackett-luce", 3 * 2), ("bradley-terry", 2)])
def test_the_loss_can_be_chosen(command, run_folder, loss, at_equal_scores):
    """Scores start nearly equal: log 3 for one pick of three, log 3 + log 2 for all, log 2 for a pair."""
    folder, words = run_folder
    assert command(train, *words, "--loss", loss)[0] == 0
    first = json.loads((folder / "rm/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(at_equal_scores), abs=0.02)


def test_what_a_run_needs_is_said_before_it_starts(command, run_folder):
    _, words = run_folder
    status, out, _ = command(train, *words)
    assert status == 0
    told = r"5 records of (\d+) tokens on average, 25 of them pictures, and \1 at most; 7 steps of 2 records"
    assert re.search(told, out)
    assert "memory, computed:" in out and "a step, computed:" in out


def test_a_record_that_is_too_long_is_refused_before_the_run(refused, run_folder):
    folder, words = run_folder
    long = {"prompt": "?", "responses": ["x " * 9000, "b"], "rankings": [1, 2]}
    with open(folder / "prefs.jsonl", "a") as file:
        file.write("\n" + json.dumps(long))
    refused("prefs.jsonl:7: 18013 tokens, 0 of them pictures, where 4096", train, *words)
    assert not (folder / "rm.training").exists()


def test_a_test_record_that_is_too_long_is_refused_before_the_run_too(refused, run_folder):
    folder, words = run_folder
    long = {"prompt": "?", "responses": ["x " * 9000, "b"], "rankings": [1, 2]}
    (folder / "test.jsonl").write_text(json.dumps(long))
    refused("test.jsonl:1: 18013 tokens", train, *words, "--test", folder / "test.jsonl")
    assert not (folder / "rm.training").exists()


def test_options_before_and_after_a_subcommand_are_the_same(command, tiny_folder, tmp_path):
    for n, words in enumerate((("--json", tmp_path / "0", "show"), ("show", "--json", tmp_path / "1"))):
        assert command(checkpoint, *words, tiny_folder)[0] == 0
        assert json.loads((tmp_path / str(n)).read_text())["model_type"] == "molmo2"


def test_pictures_that_would_not_fit_are_cut_into_fewer_crops_and_it_is_said(command, run_folder, monkeypatch):
    """300 x 900 pixels: with up to 4 crops too many tokens for the limit, with fewer not."""
    folder, words = run_folder
    base = shutil.copytree(words[1], folder / "base")
    raw = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps(raw | {"max_crops": 4}))
    Image.effect_noise((300, 900), 60).save(folder / "p.png")
    small = train.Recipe()
    monkeypatch.setattr(train, "Recipe", lambda: replace(small, max_tokens=60))
    status, out, err = command(train, "--weights", base, *words[2:])
    assert status == 0, err
    assert "to fit into 60 tokens, pictures of 5 record(s) are cut into fewer than 4 crops" in out
    assert "prefs.jsonl:1: at most 2" in out or "prefs.jsonl:2: at most 2" in out


def test_a_run_is_not_overwritten_and_an_unfinished_one_goes_on(command, refused, run_folder, monkeypatch):
    folder, words = run_folder
    assert command(train, *words)[0] == 0
    before = (folder / "rm/value_head.safetensors").read_bytes()
    refused("rm exists already", train, *words)
    refused("no unfinished run", train, *words, "--overwrite", "--resume")
    (folder / "rm").rename(folder / "old")

    real, calls = training.PreferenceLoss.__call__, []

    def stops(loss, rows, ranks):  # after the save that follows step 5, at the first of two micro-batches
        calls.append(len(calls) // 2)
        if calls[-1] == 6:
            raise KeyboardInterrupt
        return real(loss, rows, ranks)

    monkeypatch.setattr(training.PreferenceLoss, "__call__", stops)
    assert command(train, *words)[0] == 130
    monkeypatch.setattr(training.PreferenceLoss, "__call__", real)
    refused("holds an unfinished run", train, *words)
    refused("nowhere does not exist", train, *words, "--overwrite", "--data", "nowhere")
    assert (folder / "rm.training/state.pt").exists(), "a typing error cost the run"
    refused("its mode is 'joint', not 'isolated'", train, *words, "--resume", "--mode", "isolated")
    monkeypatch.setattr(Molmo2, "fuse", lambda self: None)  # which needs a compiler
    refused("its compile is None, not True", train, *words, "--resume", "--compile")
    assert command(train, *words, "--resume")[0] == 0
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert (folder / "rm/value_head.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"prompt": "?"', "prefs.jsonl:1 is not JSON"),
        ('{"prompt": "?", "responses": ["a", "b"], "rankings": [1]}', "prefs.jsonl:1: rankings must be 2"),
        ('{"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}', "one record can't both"),
        (2 * '{"prompt": "?", "responses": ["a", " "], "rankings": [1, 2]}\n', "response 2 is empty"),
        (2 * '{"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2], "image": "no.png"}\n', "no picture at"),
    ],
)
def test_training_refuses_bad_records(refused, run_folder, text, why):
    folder, words = run_folder
    (folder / "prefs.jsonl").write_text(text)
    refused(why, train, *words)
    assert not (folder / "rm").exists()
