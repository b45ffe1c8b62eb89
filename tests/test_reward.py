"""The reward model's own parts: head, separator row, files. (That one pass equals N passes: test_single_pass.py.)

pytest tests/test_reward.py
"""

import json
import math
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_single_pass import make_model, noise

from yojo.core import lora
from yojo.core.data import collate
from yojo.core.loss import best_of_n
from yojo.core.reward import RewardModel, ValueHead, batches
from yojo.files import InputError
from yojo.store import place_separator
from yojo.weights import load_backbone

ASK = ("Describe the star.", ["a small red star", "a large red star", "nothing"])


def test_the_head_by_hand():
    """s = (w2 silu(W1 h + b1) + b2) / sqrt(D)"""
    head = ValueHead(4, 2)
    with torch.no_grad():
        head[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))
        head[2].weight.copy_(torch.tensor([[2.0, -1.0]]))
        head[2].bias.fill_(0.5)
    silu = [x / (1 + math.exp(-x)) for x in (1.0, -2.0)]
    score = head(torch.tensor([[1.0, -2.0, 9.0, 9.0]]))
    assert score.shape == (1,) and score.item() == pytest.approx((2 * silu[0] - silu[1] + 0.5) / 2)


def test_the_head_starts_small_and_computes_in_at_least_float32():
    head = ValueHead(2560, 1024, torch.Generator().manual_seed(0))
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert head[0].bias.abs().max() == 0 == head[2].bias.abs().max()
    assert head(torch.randn(3, 2560, dtype=torch.bfloat16)).dtype == torch.float32


def test_scoring_has_no_vocabulary_matrix(tiny_folder):
    assert make_model(tiny_folder).backbone.lm_head is None


def test_only_the_adapter_and_the_head_learn(tiny_folder):
    rm = make_model(tiny_folder)
    batch = collate([rm.processor.encode(*ASK)], "joint")
    for p in rm.trainable():
        p.requires_grad_(True)
    best_of_n(rm(batch).view(1, -1), torch.tensor([[1, 2, 3]])).backward()
    touched = {name for name, p in rm.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}
    assert {n for n in touched if ".adapters." not in n and not n.startswith("head.")} == set()
    assert len(touched) == len(rm.trainable()) - 1  # the head's last bias moves all scores alike: its gradient is zero


def test_the_adapter_is_used_for_scoring_and_left_off_afterwards(tiny_folder):
    rm = make_model(tiny_folder)
    with_it = rm.score(*ASK)
    assert lora.active(rm.backbone) is None
    with torch.no_grad():
        for p in lora.parameters(rm.backbone, "reward"):
            p.zero_()
    assert all(abs(a - b) > 1e-6 for a, b in zip(rm.score(*ASK), with_it, strict=True))


def test_four_threads_may_score_with_one_model(tiny_folder, monkeypatch):
    """400 scores between 400 passes of the bare backbone, all right: the adapter is an argument of every pass, not a
    state of the model. Every pass waits a moment at its start, so that the threads take turns inside of it."""
    rm = make_model(tiny_folder)
    alone, ids, embed = rm.score(*ASK), torch.arange(9)[None], rm.backbone.embed
    bare = rm.backbone(ids)
    monkeypatch.setattr(rm.backbone, "embed", lambda *xs: (time.sleep(0.0005), embed(*xs))[1])
    with ThreadPoolExecutor(4) as pool:
        passes = list(pool.map(lambda i: rm.backbone(ids) if i % 2 else rm.score(*ASK), range(800)))
    assert all(scores == pytest.approx(alone, abs=1e-10) for scores in passes[::2])
    assert all(torch.equal(hidden, bare) for hidden in passes[1::2])
    assert lora.active(rm.backbone) is None


def test_a_merged_judge_uses_no_adapter_whatever_its_caller_does(tiny_folder):
    """A policy may live on the same backbone and be in use when the judge is asked."""
    rm = make_model(tiny_folder)
    rm.merge()
    scores = rm.score(*ASK)
    for p in lora.add(rm.backbone, "policy", lora.LoraConfig(r=2, dropout=0.0)):
        p.data.normal_()
    with lora.use(rm.backbone, "policy"):
        assert rm.score(*ASK) == scores


def test_mode_none_is_the_one_it_was_trained_in(tiny_folder):
    for mode, other in (("joint", "isolated"), ("isolated", "joint")):
        rm = make_model(tiny_folder, mode)
        own, others = rm.score(*ASK), rm.score(*ASK, mode=other)
        assert own == rm.score(*ASK, mode=mode)
        assert all(abs(a - b) > 1e-6 for a, b in zip(own[1:], others[1:], strict=True)), "the first sees no other"
    with pytest.raises(InputError, match="mode 'both' is none of"):
        rm.score(*ASK, mode="both")


def test_a_merged_model_scores_the_same_and_carries_no_adapter(tiny_folder):
    rm = make_model(tiny_folder)
    before = rm.score(*ASK)
    rm.merge()
    assert rm.score(*ASK) == pytest.approx(before, abs=1e-10) and rm.adapter is None
    with pytest.raises(InputError, match="no adapter 'reward'"):
        rm.trainable()


def test_no_response_is_refused(tiny_folder):
    with pytest.raises(InputError, match="no responses"):
        make_model(tiny_folder).score("prompt", [])


@pytest.mark.parametrize("additional, row", [(11, "used"), (10, "appended"), (9, "refused")])
def test_the_row_of_the_separator(tiny_folder, additional, row):
    """The tokenizer has 522 entries, so the separator's id is 522; the table has 512 + additional rows."""
    from dataclasses import replace

    config = load_backbone(tiny_folder).config
    model = random_model(
        replace(config, text=replace(config.text, additional_vocab_size=additional)), dtype=torch.float32
    )
    before = model.model.transformer.wte.embedding.clone()
    if row == "refused":
        with pytest.raises(InputError, match="522 lies 1 beyond the 521 embedding rows"):
            place_separator(model, 522)
        return
    place_separator(model, 522)
    table = model.model.transformer.wte.embedding
    assert len(table) == 523 == model.config.text.rows and not table.requires_grad
    assert torch.equal(table[: len(before)], before)
    assert bool(table[522].any()) == (row == "used")


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tiny_folder, tmp_path):
    """A base, and beside it a trained reward model."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    rm = make_model(base, "isolated", dtype=torch.float32)
    rm.save(tmp_path / "rm")
    return rm, tmp_path


def test_saving_and_loading_changes_no_bit(saved):
    rm, folder = saved
    again = RewardModel.load(folder / "rm")
    assert again.mode == "isolated" and again.score(*ASK) == rm.score(*ASK)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


@settings(max_examples=settings.default.max_examples // 4)  # each loads the base twice
@given(
    mode=st.sampled_from(["joint", "isolated"]), r=st.integers(1, 6), inner=st.integers(1, 20), seed=st.integers(0, 999)
)
def test_property_what_was_saved_scores_the_same_to_the_last_bit(tiny_folder, mode, r, inner, seed):
    rm = RewardModel.new(tiny_folder, mode, lora.LoraConfig(r=r, dropout=0.0), inner=inner, seed=seed)
    with torch.no_grad():
        for p in rm.trainable():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        rm.save(Path(folder) / "rm")
        again = RewardModel.load(Path(folder) / "rm")
    assert again.mode == mode and again.score(*ASK) == rm.eval().score(*ASK)


def test_float64_stays_float64(tiny_folder, tmp_path):
    rm = make_model(tiny_folder, dtype=torch.float64)
    rm.save(tmp_path / "rm")
    again = RewardModel.load(tmp_path / "rm", dtype=torch.float64)
    assert again.score(*ASK) == rm.score(*ASK)


def test_responses_are_a_list_of_strings(tiny_folder):
    for wrong in ("good", ["good", 3]):
        with pytest.raises(InputError, match="a list of strings"):
            make_model(tiny_folder).score("prompt", wrong)


def test_pictures_must_be_cut_as_the_tower_reads_them(saved):
    _, folder = saved
    path = folder / "base/preprocessor_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"size": {"height": 56, "width": 56}}))
    with pytest.raises(InputError, match="cuts views into 16 patches of 14 pixels, the vision tower reads 36 of 14"):
        RewardModel.load(folder / "rm")
    path.write_text(json.dumps(raw | {"overlap_margins": 1}))
    with pytest.raises(InputError, match="overlap_margins must be like"):
        RewardModel.load(folder / "rm")


def test_the_base_is_found_relative_to_the_folder(saved, monkeypatch):
    rm, folder = saved
    assert json.loads((folder / "rm/reward_model_config.json").read_text())["base"] == "../base"
    (folder / "moved").mkdir()
    for name in ("base", "rm"):
        shutil.move(folder / name, folder / "moved" / name)
    monkeypatch.chdir("/")
    assert RewardModel.load(folder / "moved/rm").score(*ASK) == rm.score(*ASK)
    shutil.move(folder / "moved/base", folder / "elsewhere")
    with pytest.raises(InputError, match="there is no folder .*: say where it is"):
        RewardModel.load(folder / "moved/rm")
    assert RewardModel.load(folder / "moved/rm", base=folder / "elsewhere").score(*ASK) == rm.score(*ASK)


def test_another_base_is_refused(saved):
    _, folder = saved
    path = folder / "base/model.safetensors"
    tensors = load_file(path)
    tensors["model.transformer.ln_f.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(InputError, match="trained on another base: the weights in"):
        RewardModel.load(folder / "rm")


def test_another_tokenizer_is_refused(saved):
    _, folder = saved
    path = folder / "base/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(InputError, match="trained on another base: the tokenizer in"):
        RewardModel.load(folder / "rm")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("separator_id", 7, "separator id 7, the tokenizer in .* gives 522"),
        ("mode", "both", "mode 'both' is none of"),
        ("layout", "other", "layout 'other' is none of"),
        ("mode", None, "mode missing or wrong"),
        ("format", "x", "is no reward model of this project"),
        ("value_head_hidden_dim", -1, "value_head_hidden_dim missing or wrong"),
        ("value_head_hidden_dim", 5, "value_head.safetensors does not hold this model's tensors"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, key, value, message):
    _, folder = saved
    path = folder / "rm/reward_model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=message):
        RewardModel.load(folder / "rm")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "value_head.safetensors", "adapter_config.json"])
def test_a_missing_or_truncated_file_is_named(saved, name):
    _, folder = saved
    path = folder / "rm" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=name):
        RewardModel.load(folder / "rm")
    path.unlink()
    with pytest.raises(InputError, match=f"{name} does not exist"):
        RewardModel.load(folder / "rm")


def test_an_existing_folder_is_kept_unless_told(saved):
    rm, folder = saved
    with pytest.raises(InputError, match="exists already"):
        rm.save(folder / "rm")
    rm.save(folder / "rm", overwrite=True)
    assert RewardModel.load(folder / "rm").score(*ASK) == rm.score(*ASK)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 2000))
def test_batches_cover_every_row_once_within_the_budget(lengths, tokens):
    made = list(batches(lengths, tokens))
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens, "padding counts"


def test_scores_that_come_before_a_bad_one_are_given_out(tiny_folder, monkeypatch):
    """All records of a window are scored in batches by length; a bad one among them costs none of those before it."""
    rm = RewardModel.new(tiny_folder, "joint", lora.LoraConfig(r=2, dropout=0.0), inner=8)
    rows = [rm.processor.encode("?", ["word " * (1 + 7 * i % 20), "b"]) for i in range(20)]
    whole, real = list(rm.score_all(rows, tokens=60)), RewardModel.raw_scores
    bad = rows[13].ids.tolist()

    def scores(self, some, mode):
        return [
            [math.nan] * len(s) if row.ids.tolist() == bad else s
            for row, s in zip(some, real(self, some, mode), strict=True)
        ]

    monkeypatch.setattr(RewardModel, "raw_scores", scores)
    given = []
    with pytest.raises(InputError, match="not finite"):
        for scores_of_one in rm.score_all(rows, tokens=60):
            given.append(scores_of_one)
    assert given == whole[:13]


@pytest.mark.parametrize("long", [512, 40])  # tokens beyond which a record is a long one
@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_many_records_of_unequal_length_score_as_each_alone_and_in_their_order(tiny_folder, mode, long, monkeypatch):
    """Short ones are padded to one length, long ones stand in one row."""
    shapes = []
    monkeypatch.setattr("yojo.core.reward.WINDOW", 4)
    monkeypatch.setattr("yojo.core.ops.DENSE_UP_TO", long)
    rm = RewardModel.new(tiny_folder, mode, lora.LoraConfig(r=2))
    picture = noise(3)
    records = [
        rm.processor.encode("x " * (1 + 7 * i % 11), ["a " * (1 + i), "b"], picture if i % 3 else None)
        for i in range(11)
    ]
    rm.register_forward_pre_hook(lambda _, args: shapes.append(args[0].input_ids.shape))
    many = list(rm.score_all(iter(records), mode, tokens=150))
    longest = max(len(record.ids) for record in records)
    assert any(B > 1 for B, _ in shapes) and any(B == 1 and T > longest for B, T in shapes) == (long == 40)
    for record, row in zip(records, many, strict=True):
        assert row == pytest.approx(rm.score_encoded([record], mode)[0], abs=1e-5)
