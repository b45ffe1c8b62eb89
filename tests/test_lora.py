"""LoRA by hand: unchanged at the start, one adapter at a time, the right gradient under checkpointing, PEFT's files.

pytest tests/test_lora.py
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, random_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from yojo.core import lora
from yojo.core.generate import generate
from yojo.core.lora import LoraConfig
from yojo.core.molmo2 import Molmo2
from yojo.files import InputError
from yojo.store import load_adapter, save_adapter

CONFIG = LoraConfig(r=3, alpha=6, dropout=0.0)
IDS = torch.arange(10, 22).view(2, 6)


def with_adapters(*names, dtype=torch.float64, config=CONFIG):
    """A random network with adapters that do something, each something else."""
    model = random_model(dtype=dtype)
    for i, name in enumerate(names):
        with torch.no_grad():
            for p in lora.add(model, name, config, torch.Generator().manual_seed(i)):
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(i + p.numel()))
    return model


def run(model, name):
    with lora.use(model, name):
        return model(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(dtype):
    """y = W x + (alpha / r) B A x, and B = 0."""
    model = random_model(dtype=dtype)
    before = model(IDS)
    lora.add(model, "new", CONFIG)
    assert torch.equal(run(model, "new"), before)


def test_the_formula():
    linear = lora.Linear(5, 4)
    model = torch.nn.ModuleDict({"att_proj": linear})
    lora.add(model, "a", LoraConfig(r=2, alpha=6, dropout=0.0, targets=("att_proj",)))
    a = linear.adapters["a"]
    with torch.no_grad():
        a.lora_B.normal_()
    x = torch.randn(3, 5)
    expected = x @ (linear.weight + 3 * a.lora_B @ a.lora_A).T
    assert torch.allclose(linear(x, "a"), expected, atol=1e-6)
    assert torch.allclose(linear(x[0], "a"), expected[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_gradient_the_sum_is_written_over_and_is_the_same(dtype):
    model = with_adapters("a", dtype=dtype)
    kept = run(model, "a")
    with torch.no_grad():
        assert torch.equal(run(model, "a"), kept)


def test_in_bf16_an_adapter_costs_no_precision_that_the_base_has_not_lost():
    """All numbers are bf16 numbers. How far is the bf16 network from the float32 one, without and with the adapter?"""
    exact, rough = random_model(dtype=torch.float32), random_model(dtype=torch.bfloat16)
    for p in lora.add(exact, "a", CONFIG):
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    lora.add(rough, "a", CONFIG)
    rough.load_state_dict(exact.state_dict())
    with torch.no_grad():
        base, beside = ((run(rough, name) - run(exact, name)).abs().mean() for name in (None, "a"))
    assert beside < 1.5 * base < 0.03


def test_use_switches_nests_and_restores():
    model = with_adapters("policy", "reward")
    base, policy, reward = run(model, None), run(model, "policy"), run(model, "reward")
    assert (base - policy).abs().max() > 1e-3 and (policy - reward).abs().max() > 1e-3
    with lora.use(model, "policy"):
        with lora.use(model, None):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), policy)
        with pytest.raises(RuntimeError), lora.use(model, "reward"):
            raise RuntimeError
        assert torch.equal(model(IDS), policy)
    assert torch.equal(model(IDS), base)


def test_an_adapter_can_be_named_for_one_pass():
    """The name given to a pass beats `use`; None is the base; a name that is not there is refused, also inside."""
    model = with_adapters("policy", "reward")
    base, policy, reward = run(model, None), run(model, "policy"), run(model, "reward")
    assert torch.equal(model(IDS, adapter="policy"), policy) and torch.equal(model(IDS), base)
    with lora.use(model, "policy"):
        assert torch.equal(model(IDS, adapter="reward"), reward) and torch.equal(model(IDS, adapter=None), base)
    with pytest.raises(InputError, match="no adapter 'judge': the model has .'policy', 'reward'."):
        model(IDS, adapter="judge")
    with lora.use(model, "policy"):
        lora.remove(model, "policy")
        with pytest.raises(InputError, match="no adapter 'policy'"):
            model(IDS)
    assert torch.equal(model(IDS), base)


@torch.no_grad()
def test_generation_speaks_under_the_adapter_that_it_is_given():
    model = with_adapters("policy")
    said = {name: generate(model, IDS[:1], max_new_tokens=8, temperature=0, adapter=name) for name in ("policy", None)}
    with lora.use(model, "policy"):
        assert torch.equal(generate(model, IDS[:1], max_new_tokens=8, temperature=0), said["policy"])
    assert torch.equal(generate(model, IDS[:1], max_new_tokens=8, temperature=0), said[None])
    assert said["policy"].tolist() != said[None].tolist()
    words, count = IDS[:1], said["policy"].shape[1]  # it may end early
    assert count > 1
    for _ in range(count):  # each word from a reading of all before it
        words = torch.cat([words, model.logits(model(words, adapter="policy"))[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(words[:, IDS.shape[1] :], said["policy"])


def test_use_of_a_wrapper_is_refused_since_the_model_inside_would_not_hear_of_it():
    wrapper = torch.compile(with_adapters("policy"))
    with pytest.raises(InputError, match="no adapter 'policy': the model has none"), lora.use(wrapper, "policy"):
        pass


def test_what_one_model_uses_is_no_matter_of_another():
    a, b = with_adapters("policy"), with_adapters("policy")
    with lora.use(a, "policy"):
        assert lora.active(a) == "policy" and lora.active(b) is None
        with lora.use(b, "policy"), lora.use(a, None):
            assert lora.active(a) is None and lora.active(b) == "policy"
    assert lora.active(a) is None and lora.active(b) is None


def test_use_is_a_choice_of_the_calling_thread_alone(monkeypatch):
    """Four threads, 400 passes, each with the adapter that its thread chose, or named, or with the base."""
    model = with_adapters("policy", "reward")
    expected, embed = {name: run(model, name) for name in ("policy", "reward", None)}, model.embed
    monkeypatch.setattr(model, "embed", lambda *xs: (time.sleep(0.0005), embed(*xs))[1])  # the threads take turns here

    def passes(thread):
        name = ("policy", "reward", None, "policy")[thread]
        right = 0
        for i in range(100):
            if i % 3 == 0:
                right += torch.equal(model(IDS, adapter=name), expected[name])
            else:
                with lora.use(model, name):
                    right += torch.equal(model(IDS), expected[name])
        return right, lora.active(model)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(passes, range(4))) == [(100, None)] * 4
    assert lora.active(model) is None and torch.equal(model(IDS), expected[None])


def test_merge_folds_the_adapter_into_the_base():
    model = with_adapters("policy", "reward")
    policy = run(model, "policy")
    lora.merge(model, "policy")
    assert (model(IDS) - policy).abs().max() < 1e-10
    assert list(lora.adapters(model)) == ["reward"]


@given(
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    seed=st.integers(0, 999),
    names=st.sets(st.sampled_from(lora.TARGETS), min_size=1),
)
def test_property_merged_is_what_it_was_beside(r, alpha, seed, names):
    model = random_model()
    for p in lora.add(model, "a", LoraConfig(r, alpha, 0.0, tuple(sorted(names))), torch.Generator().manual_seed(seed)):
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    beside = run(model, "a")
    lora.merge(model, "a")
    assert (model(IDS) - beside).abs().max() < 1e-10 * max(1, beside.abs().max().item())


def test_adapters_stay_float32_beside_a_bf16_base():
    model = with_adapters("a", dtype=torch.bfloat16)
    assert {p.dtype for p in lora.parameters(model, "a")} == {torch.float32}
    assert run(model, "a").dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    model = with_adapters("a", config=LoraConfig(r=3, alpha=6, dropout=0.5))
    assert torch.equal(run(model, "a"), run(model, "a")), "an adapter added to a network in eval mode is in eval mode"
    model.train()
    assert not torch.equal(run(model, "a"), run(model, "a"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_has_the_same_gradient_while_another_adapter_is_active_at_backward_time(dropout):
    """The trap: recomputation happens in `backward`, outside every `with`. A layer that looked up the active adapter
    there would recompute another function and return its gradient without a word."""
    grads = []
    for checkpointing in (False, True):
        model = with_adapters("policy", "reward", config=LoraConfig(r=3, alpha=6, dropout=dropout)).train()
        model.checkpointing = checkpointing
        parameters = lora.parameters(model, "policy")
        for p in parameters:
            p.requires_grad_(True)
        torch.manual_seed(0)
        with lora.use(model, "policy"):
            out = model(IDS).square().sum()
        with lora.use(model, "reward"):
            out.backward()
        grads.append([p.grad for p in parameters])
        assert all(p.grad is None for p in lora.parameters(model, "reward"))
    assert all((a - b).abs().max() <= 1e-12 * a.abs().max() for a, b in zip(*grads, strict=True))
    assert all(g.abs().max() > 0 for g in grads[0])


# ---------------------------------------------------------------------------------------------------- PEFT, both ways


def test_an_adapter_trained_in_peft_loads_here(tmp_path):
    """Our own network wrapped in peft, its file read back by ours."""
    config = PeftConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=list(lora.TARGETS))
    theirs = get_peft_model(random_model(dtype=torch.float32), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = random_model(dtype=torch.float32)
    load_adapter(ours, "a", tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(IDS)
    assert (run(ours, "a") - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (run(ours, "a") - run(ours, None)).abs().max() > 1e-2


def test_an_adapter_saved_here_loads_in_peft(tmp_path):
    ours = with_adapters("a", dtype=torch.float32)
    save_adapter(ours, "a", tmp_path)
    theirs = PeftModel.from_pretrained(random_model(dtype=torch.float32), tmp_path)
    expected = run(ours, "a")
    with torch.no_grad():
        assert (theirs(IDS) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_saving_and_loading_changes_no_bit(tmp_path):
    model = with_adapters("a", dtype=torch.float32)
    save_adapter(model, "a", tmp_path)
    again = random_model(dtype=torch.float32)
    load_adapter(again, "b", tmp_path)
    assert torch.equal(run(model, "a"), run(again, "b"))
    assert lora.adapters(again)["b"] == lora.LoraConfig(3, 6, 0.0, tuple(sorted(lora.TARGETS)))


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("r", "4"),
        ("r", 0),
        ("target_modules", None),
    ],
)
def test_what_peft_can_do_and_this_cannot_is_refused(tmp_path, key, value):
    save_adapter(with_adapters("a"), "a", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"{key} = {value!r} is not supported|{key} must be"):
        load_adapter(random_model(), "a", tmp_path)


def test_files_are_read_strictly(tmp_path):
    save_adapter(with_adapters("a", dtype=torch.float32), "a", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    for change, message in [
        ({k: v for k, v in tensors.items() if k != name}, "1 missing: " + name),
        (tensors | {"stranger": torch.zeros(1)}, "1 unknown: stranger"),
        (tensors | {name: torch.zeros(7, 7)}, "1 of the wrong shape"),
    ]:
        save_file(change, path)
        model = random_model(dtype=torch.float32)
        with pytest.raises(InputError, match=message):
            load_adapter(model, "a", tmp_path)
        assert lora.adapters(model) == {}


def test_names_are_checked():
    model = with_adapters("a")
    with pytest.raises(InputError, match="has an adapter 'a' already"):
        lora.add(model, "a", CONFIG)
    with pytest.raises(InputError, match="no adapter 'b': the model has .'a'."), lora.use(model, "b"):
        pass
    with pytest.raises(InputError, match="can hold no dot: 'lora.use'"):  # which is what `use` goes by
        lora.add(model, lora.IN_USE, CONFIG)
    with pytest.raises(InputError, match="q_proj"):
        lora.add(model, "c", LoraConfig(targets=("att_proj", "q_proj")))
    assert not any("c" in linear.adapters for _, linear in lora.targets(model, lora.TARGETS)), "half an adapter is left"


def test_only_decoder_matrices_are_adapted_and_counted():
    """Rank r adds r (in + out) numbers a matrix: 4 matrices a block at 4B."""
    with torch.device("meta"):
        model = Molmo2(TINY, lm_head=False)
    with torch.no_grad():
        names = [name for name, _ in lora.targets(model, lora.TARGETS)]
    assert len(names) == 4 * TINY.text.num_hidden_layers
    assert all(name.startswith("model.transformer.blocks.") for name in names)
    model = random_model()
    sizes = [(32, 64), (32, 32), (32, 96), (48, 32)]
    assert sum(p.numel() for p in lora.add(model, "a", CONFIG)) == 2 * sum(3 * (i + o) for i, o in sizes)
