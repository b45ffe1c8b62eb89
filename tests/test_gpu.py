"""Scoring, sampling and rewards on a GPU that is pretended (`pretend.py`): nothing is on the wrong device, the host
hardly waits, and the numbers are the CPU's. There is no backward pass.

pytest tests/test_gpu.py

The last tests plant faults, which must be found: a guard that cannot fail would be none.
"""

import json
import random
from functools import cache

import pretend
import pytest
import torch
from test_single_pass import noise

from yojo import bench, evaluate, score
from yojo.cli import WEIGHTS
from yojo.core import generate as generation
from yojo.core import grpo, molmo2
from yojo.core.data import Record, encode, read_records
from yojo.core.loss import LOSSES
from yojo.core.mask import MODES
from yojo.core.order import MicroBatches
from yojo.core.reward import RewardModel
from yojo.core.training import PreferenceLoss
from yojo.store import load_adapter
from yojo.tiny import world
from yojo.trainers import GroupReward

MODELS = {"joint": WEIGHTS / "tiny-rm", "isolated": WEIGHTS / "tiny-rm-isolated"}
LONG = [f"{word} " * 100 for word in ("red", "blue", "green", "pink", "small")]
RECORDS = {
    "text": Record("Which?", ["a star", "no", "a large star"]),
    "picture": Record("Describe the star.", ["a small red star", "a large red star"], images=[noise(1)]),
    "long text": Record("Which?", LONG),
    "two pictures": Record("Which?", LONG, images=[noise(2), noise(3)]),
    "video": Record("Which?", LONG, video=[(0.0, noise(4)), (2.5, noise(5))]),
}
WAITS = 5  # of a batch: two in the embedding, two in the pooling, one for the scores


@pytest.fixture
def gpu(monkeypatch):
    with pretend.gpu(monkeypatch):
        yield


def rows(rm, names):
    return [encode(RECORDS[name], rm.processor) for name in names]


def close(ours, theirs, tolerance=1e-5):
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(abs(a - b) / max(1, abs(b)) for a, b in pairs) < tolerance


def scored(rm, names):
    """In one batch; the host waits as often as it may."""
    pretend.waits.clear()
    scores = rm.score_encoded(rows(rm, names))
    assert pretend.waits.total() <= WAITS, pretend.waits
    return scores


BATCHES = [[name] for name in RECORDS] + [["text", "picture"], ["long text", "two pictures"]]


@cache
def judge(mode, device, dtype=torch.float32):
    return RewardModel.load(MODELS[mode], device=device, dtype=dtype)


@pytest.mark.parametrize("names", BATCHES, ids=" and ".join)
@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_the_cpu_and_the_host_waits_five_times_at_most(mode, names, gpu):
    on_cpu = judge(mode, "cpu")
    expected = on_cpu.score_encoded(rows(on_cpu, names))
    close(scored(judge(mode, "cuda"), names), expected)
    close(scored(judge(mode, "cuda", torch.bfloat16), names), expected, 0.5)


def test_where_there_is_a_gpu_it_is_taken_and_computes_in_bfloat16(gpu):
    rm = RewardModel.load(MODELS["joint"])
    assert str(rm.backbone.device) == "cuda:0" and rm.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
def test_many_records_in_sorted_batches_and_a_merged_model(mode, gpu):
    on_cpu, merged = judge(mode, "cpu"), RewardModel.load(MODELS[mode], device="cuda", dtype=torch.float32)
    merged.merge()
    names = ["text", "long text", "picture", "text", "video", "picture"]
    close(list(merged.score_all(rows(merged, names))), list(on_cpu.score_all(rows(on_cpu, names))))


def test_in_half_precision_no_call_on_a_long_row_has_a_mask_and_none_asks_for_cudnn(gpu, monkeypatch):
    """The flash kernel computes all of them; what is left for torch to choose are windows of the pooling."""
    asked, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, mask=None, **how):
        asked.append((q.shape[2], torch._C._get_cudnn_sdp_enabled()))
        return real(q, k, v, mask, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for mode in MODES:
        scored(judge(mode, "cuda", torch.bfloat16), ["two pictures"])
    assert set(asked) == {(1, False)} and not torch.backends.cuda.cudnn_sdp_enabled()


def policy(device):
    rm = RewardModel.load(MODELS["joint"], dtype=torch.float32, device=device, lm_head=True)
    load_adapter(rm.backbone, grpo.POLICY, WEIGHTS / "tiny-policy")
    return rm


PROMPTS = [Record("Describe the star.", images=[noise(1)]), Record("What is in the picture, and where does it stand?")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_words_are_said(temperature, gpu):
    """From the same uniforms; the host waits once a token."""
    said = []
    for device in ("cpu", "cuda"):
        rm, generator = policy(device), torch.Generator().manual_seed(3)
        prompts = [grpo.prompt_row(rm, prompt) for prompt in PROMPTS]
        pretend.waits.clear()
        groups = grpo.sample_groups(rm.backbone, prompts, 4, 12, temperature, generator)
        assert pretend.waits.total() <= 12 + WAITS, pretend.waits
        said.append([[answer.tolist() for answer in group] for group in groups])
    assert said[0] == said[1]


def test_a_rollout(gpu):
    c, found = grpo.GrpoConfig(group=3, max_new_tokens=8), []
    for device in ("cpu", "cuda"):
        rm = policy(device)
        reward, generator = grpo.reward_fn(rm, "joint"), torch.Generator().manual_seed(0)
        found.append(grpo.rollout(rm, reward, PROMPTS, c, None, generator))
    for ours, theirs in zip(*found, strict=True):
        assert ours.texts == theirs.texts
        for name in ("rewards", "advantages", "old", "reference"):
            assert (getattr(ours, name) - getattr(theirs, name).cpu()).abs().max() < 1e-4


def test_a_reward_for_other_trainers(gpu):
    asked = {"prompts": ["Describe the star."] * 3, "completions": ["a red star", "a star", "no"]}
    here, there = GroupReward(MODELS["joint"], device="cpu"), GroupReward(MODELS["joint"])
    assert there(**asked, image=[noise(1)] * 3) == pytest.approx(here(**asked, image=[noise(1)] * 3), abs=0.5)
    assert str(there.rm.backbone.device) == "cuda:0" and there.rm.backbone.dtype == torch.bfloat16


@pytest.fixture
def data(tmp_path):
    made = world.records(random.Random(0), "absolute", 6, 6, (4,))
    return world.write_records(tmp_path, "prefs", made)


def test_commands_choose_it_and_give_the_figures_of_the_cpu(command, data, gpu, tmp_path):
    how = ["--model", MODELS["joint"], "--data", data, "--dtype", "float32", "--json", tmp_path / "found.json"]
    for module, more in ((score, []), (evaluate, ["--permutations", "2"])):
        found = []
        for device in ([], ["--device", "cpu"], ["--device", "cuda:0"]):
            status, _, err = command(module, *how, *more, *device)
            assert status == 0, err
            result = json.loads((tmp_path / "found.json").read_text())
            found.append([row["scores"] for row in result] if module is score else [[result["accuracy"]]])
        close(found[0], found[1])
        assert found[0] == found[2] and (module is evaluate or found[0] != found[1]), "it was not computed there"


@pytest.mark.parametrize("device", [[], ["--device", "cuda"], ["--device", "cuda:0"]])
def test_a_bench_measures_there(command, device, gpu):
    status, out, err = command(bench, "batch", "--n", 4, "--rounds", 1, *device)
    assert status == 0 and "a pretended GPU" in out, err


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_are_those_of_the_cpu(loss, gpu, data):
    """Forward: this device has no backward pass."""
    found = []
    for device in ("cpu", "cuda"):
        rm = judge("isolated", device)
        rows, ranks = MicroBatches(read_records(data), rm.processor, 3, 1, 0)(0, 0)
        value, about = PreferenceLoss(rm, loss)(rows, ranks)
        found.append([value.item(), float(about["accuracy"])])
    close([found[1]], [found[0]])


# ----------------------------------------------------------------------------------------------------- planted faults


@pytest.fixture
def rm(gpu):
    return judge("joint", "cuda")


def test_a_tensor_of_the_host_in_a_block_is_found(rm, monkeypatch):
    real = molmo2.MLP.forward
    monkeypatch.setattr(
        molmo2.MLP, "forward", lambda self, x, adapter: real(self, x, adapter) * torch.ones(x.shape[-1])
    )
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        scored(rm, ["text"])


def test_a_generator_of_the_host_is_found(gpu, monkeypatch):
    def drawn(logits, temperature, uniforms):
        return torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator()).squeeze(1)

    monkeypatch.setattr(generation, "sample", drawn)
    rm = policy("cuda")
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        grpo.sample_groups(rm.backbone, [grpo.prompt_row(rm, PROMPTS[1])], 2, 4, 1.0, torch.Generator())


def test_a_wait_in_the_loop_over_blocks_is_found(rm, monkeypatch):
    real = molmo2.Block.forward
    monkeypatch.setattr(
        molmo2.Block, "forward", lambda self, x, *more: real(self, x * (x.sum().item() == x.sum().item()), *more)
    )
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        scored(rm, ["two pictures"])
