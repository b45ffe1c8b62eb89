"""GRPO by hand: advantages, clip, KL, the gradient of one update; and a run that is killed and goes on.

pytest tests/test_grpo.py
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_single_pass import make_model, noise

from yojo import grpo as grpo_command
from yojo.cli import WEIGHTS
from yojo.core import grpo, lora
from yojo.core.data import Record
from yojo.core.generate import Cache
from yojo.core.grpo import (
    GrpoConfig,
    Rollout,
    advantages,
    group_rewards,
    group_row,
    log_probs,
    objective,
    reward_fn,
    rollout,
)
from yojo.core.mask import PROMPT, AttentionMask
from yojo.core.reward import RewardModel
from yojo.files import InputError, write_lines
from yojo.store import place_separator
from yojo.tiny import captions
from yojo.weights import load_backbone

C = GrpoConfig(steps=3, prompts=2, group=3, max_new_tokens=8)


def test_advantages_by_hand():
    """Rewards 1, 2, 3: mean 2, standard deviation sqrt(2/3)."""
    assert advantages(torch.tensor([1.0, 2.0, 3.0]), 0.0).tolist() == pytest.approx(
        [-math.sqrt(1.5), 0, math.sqrt(1.5)]
    )
    for value in (0.1, -3.7, 1e8):
        assert advantages(torch.full((5,), value), 1e-6).tolist() == [0.0] * 5


def made_up(old, reference, advantage, lengths):
    answers = [torch.zeros(n, dtype=torch.long) for n in lengths]
    return Rollout(
        None,
        answers,
        [""] * len(lengths),
        None,
        torch.tensor(advantage),
        torch.tensor(old),
        torch.tensor(reference),
    )


def test_clip_and_kl_by_hand():
    """Answers of one and two tokens, advantages 1 and -2; probabilities now 0.5, 0.5, 0.1, then 0.25, 0.5, 0.2."""
    now = torch.tensor([0.5, 0.5, 0.1]).log()
    r = made_up([math.log(p) for p in (0.25, 0.5, 0.2)], [math.log(p) for p in (0.5, 0.25, 0.1)], [1.0, -2.0], [1, 2])
    total, kl, held = objective(now, r, GrpoConfig(clip=0.2, beta=0.5))
    surrogate = [1.2, -2.0, -1.6]  # q = 2 is held at 1.2; q = 1; q = 0.5 may not fall below 0.8 for a bad answer
    assert kl.tolist() == pytest.approx([0.0, 0.5 - math.log(0.5) - 1, 0.0], abs=1e-6)
    assert total.item() == pytest.approx(sum(surrogate) - 0.5 * kl.sum().item())
    assert held.tolist() == [True, False, True]


@pytest.fixture
def policy(tiny_folder):
    """float64: reward model, its backbone with an lm_head, a policy adapter that has moved away from the base."""
    rm = make_model(tiny_folder)
    backbone = load_backbone(tiny_folder, torch.float64)
    place_separator(backbone, rm.processor.tokenizer.separator_id)
    for name in ("reward", grpo.POLICY):
        for p in lora.add(backbone, name, lora.LoraConfig(r=4, alpha=8, dropout=0.0)):
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return RewardModel(backbone, rm.processor, rm.head, "joint", rm.base, rm.fingerprint).eval()


PROMPTS = [Record("Describe the star.", images=[noise(1)]), Record("What is in the picture?")]


def rolled(rm, c=C, reward=None):
    reward = reward or grpo.reward_fn(rm, "joint")
    return rollout(rm, reward, PROMPTS, c, None, torch.Generator().manual_seed(0))


def alone(model, r, i, adapter):
    """log p of one answer's tokens: prompt and answer in a row of their own, read position by position."""
    ids = torch.cat([r.prompt.ids, r.answers[i]])[None]
    image = torch.cat([r.prompt.image, torch.zeros(len(r.answers[i]), dtype=torch.bool)])[None]
    mask = AttentionMask(torch.zeros_like(ids), torch.full_like(ids, PROMPT), image, "joint")
    with lora.use(model, adapter):
        logits = model.logits(model(ids, r.prompt.pictures.features, mask))[0]
    start = len(r.prompt.ids)
    return torch.stack([logits[t - 1].log_softmax(-1)[ids[0, t]] for t in range(start, ids.shape[1])])


def test_log_probabilities_of_a_group_are_those_of_every_answer_alone(policy):
    """One isolated row for the whole group, against one causal row an answer: with and without a picture."""
    for r in rolled(policy):
        together = log_probs(policy.backbone, [(r.prompt, r.answers)], grpo.POLICY, 1.0)
        each = torch.cat([alone(policy.backbone, r, i, grpo.POLICY) for i in range(3)])
        assert (together - each).abs().max() < 1e-10 and (r.old - each).abs().max() < 1e-10
        assert (r.reference - torch.cat([alone(policy.backbone, r, i, None) for i in range(3)])).abs().max() < 1e-10


def test_sampled_tokens_have_the_probabilities_that_are_recomputed(policy):
    """Read token by token with the cache, as they were sampled."""
    (r, _), model = rolled(policy), policy.backbone
    ids, image = r.prompt.ids[None], r.prompt.image[None]
    mask = AttentionMask(torch.zeros_like(ids), torch.full_like(ids, PROMPT), image, "joint")
    said = []
    with lora.use(model, grpo.POLICY), torch.no_grad():
        for answer in r.answers:
            cache = Cache(model.config, len(r.prompt.ids) + len(answer))
            hidden = model(ids, r.prompt.pictures.features, mask, cache=cache)[:, -1]
            for token in answer:
                said.append(model.logits(hidden).log_softmax(-1)[0, token])
                hidden = model(token[None, None], cache=cache)[:, -1]
    assert (torch.stack(said) - r.old).abs().max() < 1e-5


def test_the_row_of_a_group_written_out(policy):
    r = rolled(policy)[0]
    P = len(r.prompt.ids)
    row, predicts = group_row(r.prompt, [torch.tensor([5, 6]), torch.tensor([7, 8, 9])])
    assert row.ids[P:].tolist() == [5, 6, 7, 8, 9] and row.response[P - 1 :].tolist() == [-1, 0, 0, 1, 1, 1]
    assert row.positions("isolated")[P:].tolist() == [P, P + 1, P, P + 1, P + 2]
    assert predicts == [P - 1, P, P - 1, P + 2, P + 3]
    assert group_row(r.prompt, [torch.tensor([5]), torch.tensor([]).long()])[1] == [P - 1], "no token, no prediction"


def test_the_policy_is_asked_in_its_own_layout_however_its_judge_reads(policy):
    expected = policy.processor.encode(PROMPTS[1].prompt, []).ids
    policy.processor.layout = "released"
    assert torch.equal(rolled(policy)[1].prompt.ids, expected)


def test_activation_checkpointing_is_used_and_changes_no_gradient(policy, monkeypatch):
    from yojo.core import molmo2

    rollouts, calls, real = rolled(policy), [], molmo2.checkpoint
    monkeypatch.setattr(molmo2, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    parameters, grads = lora.parameters(policy.backbone, grpo.POLICY), []
    for policy.backbone.checkpointing in (False, True):
        for p in parameters:
            p.requires_grad_(True).grad = None
        groups = [(r.prompt, r.answers) for r in rollouts]
        log_probs(policy.backbone, groups, grpo.POLICY, 1.0).sum().backward()
        grads.append([p.grad.clone() for p in parameters])
    assert calls and all((a - b).abs().max() < 1e-10 for a, b in zip(*grads, strict=True))


def test_the_gradient_of_an_update_is_that_of_the_formula(policy):
    """Against the formula written once more, answer by answer, from causal rows."""
    model, c = policy.backbone, GrpoConfig(group=3, inner=1, max_norm=1e9, max_new_tokens=8, beta=0.3)
    rollouts = rolled(policy, c)
    parameters = lora.parameters(model, grpo.POLICY)
    with torch.no_grad():
        for p in parameters:  # a policy that has moved since: ratios other than 1, some of them clipped
            p.requires_grad_(True).add_(
                0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
            )
    loss, clipped = 0.0, 0
    for r in rollouts:
        start = 0
        for i, answer in enumerate(r.answers):
            now, a = alone(model, r, i, grpo.POLICY), r.advantages[i]
            old, ref = (x[start : start + len(answer)] for x in (r.old, r.reference))
            q = torch.exp(now - old)
            gain = torch.minimum(q * a, torch.clamp(q, 0.8, 1.2) * a)
            clipped += int((gain < q * a).sum())
            loss = loss - (gain - 0.3 * (torch.exp(ref - now) - (ref - now) - 1)).sum()
            start += len(answer)
    expected = torch.autograd.grad(loss / sum(len(r.old) for r in rollouts), parameters)
    kept = []

    class Keep(torch.optim.SGD):
        def step(self):
            kept.extend(p.grad.clone() for p in parameters)

    grpo.update_policy(model, rollouts, Keep(parameters, lr=0.0), c)
    assert clipped > 0
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(kept, expected, strict=True))


def test_a_group_of_equals_changes_nothing(policy):
    rollouts = rolled(policy, reward=lambda prompt, texts: [0.5] * len(texts))
    assert not any(bool(r.advantages.any()) for r in rollouts)
    before = [p.clone() for p in lora.parameters(policy.backbone, grpo.POLICY)]
    for p in lora.parameters(policy.backbone, grpo.POLICY):
        p.requires_grad_(True)
    c = GrpoConfig(group=3, beta=0.0)
    grpo.update_policy(
        policy.backbone, rollouts, torch.optim.SGD(lora.parameters(policy.backbone, grpo.POLICY), 1.0), c
    )
    assert all(torch.equal(a, b) for a, b in zip(before, lora.parameters(policy.backbone, grpo.POLICY), strict=True))


def test_an_empty_answer_is_not_judged_and_ranks_last():
    judged = []

    def reward(prompt, texts):
        judged.append(texts)
        return [float(len(text)) for text in texts]

    assert group_rewards(reward, Record("?"), ["abc", " ", "a"]).tolist() == [3.0, 0.0, 1.0]
    assert judged == [["abc", "a"]]
    assert group_rewards(reward, Record("?"), ["", " "]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_answers_teach_nothing_in_isolated_mode(dtype):
    """Eight times the same text in one group, and six of them among eight. Scored one by one they differed by rounding,
    which advantages blew up to 1.6 and 2.65."""
    rm, prompt = RewardModel.load(WEIGHTS / "tiny-rm", dtype=dtype), Record("Describe the star.")
    same = ["a small red star very very very very bright"] * 8
    rewards = group_rewards(reward_fn(rm, "isolated"), prompt, same)
    assert advantages(rewards, GrpoConfig.eps).tolist() == [0.0] * 8
    rewards = group_rewards(reward_fn(rm, "isolated"), prompt, [*same[:6], "no", "a star"])
    assert len(set(rewards.tolist())) == 3
    joint = group_rewards(reward_fn(rm, "joint"), prompt, same)
    assert len(set(joint.tolist())) == 8, "a joint score depends on the place, as in the paper"


def test_a_reward_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match="rewards are not finite: .* for the answers to 'why'"):
        group_rewards(lambda *_: [1.0, float("nan")], Record("why"), ["a", "b"])


@pytest.mark.parametrize("wrong", [{"group": 1}, {"steps": 0}, {"inner": 0}, {"temperature": 0.0}])
def test_impossible_settings_are_named(wrong):
    with pytest.raises(InputError, match="--group 1" if "group" in wrong else "must be at least 1"):
        GrpoConfig(**wrong)


def test_a_noisy_caption_is_wrong_as_often_as_asked_and_never_about_what_was_asked():
    rng = random.Random(0)
    found = []
    for _ in range(400):
        q = captions.question(rng)
        text = captions.noisy_caption(q, rng, captions.WRONG)
        found.append(captions.quality(q, text))
        assert captions.noisy_caption(q, rng, dict.fromkeys(captions.WRONG, 0.0)) in [
            captions.world.describe(q.scene.facts(t)) for t in q.scene.things
        ]
    assert sum(found) / 400 == pytest.approx((4 * 0.7 + 0.4) / 5, abs=0.03)
    assert captions.quality(q, "nonsense") == 0.0


def test_quality_by_hand():
    q = captions.question(
        random.Random(0)
    )  # "Describe the cyan thing.": a large cyan cross, bottom centre, one of three
    assert captions.quality(q, "a large cyan cross, bottom centre, one of three") == 1.0
    assert captions.quality(q, "a large red cross, bottom centre, one of three") == 1.0  # the colour was given away
    assert captions.quality(q, "a small cyan cross, top centre, one of three") == pytest.approx(3 / 5)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def files(tiny_folder, tmp_path):
    make_model(tiny_folder, "joint", dtype=torch.float32).save(tmp_path / "rm")
    noise(1).save(tmp_path / "p.png")
    lines = [{"prompt": "Describe the star.", "image": "p.png"}, {"prompt": "What is it?"}]
    write_lines(tmp_path / "prompts.jsonl", lines)
    words = ["--weights", tiny_folder, "--reward", tmp_path / "rm", "--data", tmp_path / "prompts.jsonl", "--steps", 4]
    return tmp_path, [str(w) for w in [*words, "--prompts", 2, "--group", 3, "--max-new-tokens", 6, "--lr", 0.01]]


KILLED = """
import os, signal, sys
from yojo import grpo as command
from yojo.core import grpo
real, calls = grpo.update_policy, []
def update(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
grpo.update_policy = update
command.main()
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_policy_bit_for_bit(command, files):
    folder, words = files
    status, out, err = command(grpo_command, *words, "--out", folder / "a")
    assert status == 0 and "memory, computed" in out, err
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words, "--out", folder / "b"], env=environment, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL and (folder / "b.training/state.pt").exists()
    assert command(grpo_command, *words, "--out", folder / "b")[0] == 2, "an unfinished run is not started over"
    status, _, err = command(grpo_command, *words, "--out", folder / "b", "--resume")
    assert status == 0, err
    assert (folder / "a/adapter_model.safetensors").read_bytes() == (
        folder / "b/adapter_model.safetensors"
    ).read_bytes()
    log = [json.loads(line) for line in (folder / "b/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, 1, 2, 3] and {"reward", "kl", "length", "special", "even"} <= log[
        0
    ].keys()


def test_a_checkpoint_without_an_end_token_is_refused_before_the_run(command, files, monkeypatch):
    folder, words = files
    real = grpo_command.RewardModel.load

    def endless(*args, **kwargs):
        rm = real(*args, **kwargs)
        rm.backbone.config = replace(rm.backbone.config, eos_ids=())
        return rm

    monkeypatch.setattr(grpo_command.RewardModel, "load", endless)
    status, _, err = command(grpo_command, *words, "--out", folder / "e")
    assert status == 2 and "names no eos_token_id, so no answer would ever end" in err
    assert not (folder / "e.training").exists()


def test_a_run_is_not_resumed_in_another_dtype(command, files, monkeypatch):
    """Nor would it be the same run on another device, where another dtype is the default."""
    folder, words = files
    monkeypatch.setattr(grpo, "update_policy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(grpo_command, *words, "--out", folder / "f")[0] == 130
    status, _, err = command(grpo_command, *words, "--out", folder / "f", "--resume", "--dtype", "bfloat16")
    assert status == 2 and "its dtype is 'torch.float32', not 'torch.bfloat16'; resume with the same arguments" in err


def test_a_run_is_not_resumed_with_another_judge(command, files, monkeypatch):
    folder, words = files
    real = grpo.update_policy

    def stops(*args):
        if (folder / "d.training/state.pt").exists():
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(grpo, "update_policy", stops)
    assert command(grpo_command, *words, "--out", folder / "d")[0] == 130
    monkeypatch.setattr(grpo, "update_policy", real)
    rm = RewardModel.load(folder / "rm")
    with torch.no_grad():
        rm.head[2].weight.neg_()
    rm.save(folder / "rm", overwrite=True)
    status, _, err = command(grpo_command, *words, "--out", folder / "d", "--resume")
    assert status == 2 and "holds another run: its reward is" in err


@pytest.mark.parametrize(
    "words, why",
    [
        (("--tiny", "--lr", "-1"), "'-1' is not between 0 and 1"),
        (("--controls",), "--controls needs --tiny"),
        (("--tiny", "--resume"), "--resume and --tiny exclude each other"),
        ((), "give --tiny or --make-start, or --reward and --data and --out"),
        (("--make-start", "--group", "4"), "--group and --make-start exclude each other"),
        (("--tiny", "--group", "1"), "'1' is no whole number from 2"),
        (("--tiny", "--data", "x"), "--data and --tiny exclude each other"),
        (("--tiny", "--seeds", "0"), "'0' is no whole number from 1"),
    ],
)
def test_bad_input_gets_one_line(command, words, why):
    status, _, err = command(grpo_command, *words)
    assert status == 2 and why in err and "Traceback" not in err


def test_bad_prompts_are_named(command, files):
    folder, words = files
    for line, why in (
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": "?", "image": "none.png"}, "no picture at"),
    ):
        (folder / "prompts.jsonl").write_text(json.dumps(line))
        status, _, err = command(grpo_command, *words, "--out", folder / "c")
        assert status == 2 and "prompts.jsonl:1" in err and why in err
