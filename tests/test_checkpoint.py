"""Checkpoints load strictly, whole or not at all, and what is wrong is named.

pytest tests/test_checkpoint.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, edit, random_model
from safetensors.torch import load_file, save_file

from yojo.checkpoint import show
from yojo.cli import WEIGHTS
from yojo.core.lora import LoraConfig
from yojo.core.prompt import Processor, Tokenizer
from yojo.core.reward import RewardModel
from yojo.files import InputError, whole_file, whole_folder
from yojo.initial import size_config, stand_in_tokenizer, stored_shapes, write_random
from yojo.settings import config_json, read_config
from yojo.weights import fingerprint, load_backbone, save_backbone

DATA = Path(__file__).parent / "data"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "checkpoint")


def test_a_round_trip_changes_no_bit(folder, tmp_path):
    model = load_backbone(folder)
    save_backbone(model, tmp_path / "again", companions=folder)
    again = load_backbone(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    names = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
    names |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "again").iterdir()} == names


def test_the_config_is_read_back_as_it_was_written(tmp_path):
    config = replace(TINY, eos_ids=(), pad_id=0)
    processor = Processor.from_folder(WEIGHTS / "tiny", 100)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, torch.float32, processor)))
    assert read_config(tmp_path) == config


def test_shards_with_an_index_are_one_checkpoint(folder):
    whole = load_backbone(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    again = load_backbone(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match="model-2.safetensors does not exist"):
        load_backbone(folder)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="own folder"):
        load_backbone(folder)


def test_dtype_and_lm_head_are_as_asked(folder):
    model = load_backbone(folder, torch.bfloat16, lm_head=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.lm_head is None
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="without its lm_head"):
        model.logits(torch.zeros(1, 32))


def test_the_fingerprint_knows_the_base_whatever_it_was_loaded_as(folder):
    tokenizer = folder / "tokenizer.json"
    base = fingerprint(load_backbone(folder), tokenizer)
    assert fingerprint(load_backbone(folder, torch.bfloat16, lm_head=False), tokenizer) == base
    model = load_backbone(folder)
    model.model.transformer.blocks[1].mlp.ff_out.weight[0, 3] += 1
    assert fingerprint(model, tokenizer)["weights"] != base["weights"]
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert fingerprint(load_backbone(folder), tokenizer)["tokenizer"] != base["tokenizer"]


NORM = "model.transformer.ln_f.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), "1 missing: " + NORM),
        (lambda t: t.update(stranger=torch.zeros(2)), "1 unknown: stranger"),
        (lambda t: t.update({NORM: torch.zeros(7)}), r"ln_f.weight is \[7\], expected \[32\]"),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int64)}), "is I64, weights are one of"),
        (lambda t: t.pop("model.transformer.wte.new_embedding"), r"wte.embedding is \[512, 32\], expected \[528, 32\]"),
        (lambda t: t.clear(), "missing"),
        (lambda t: t.update({"model.transformer.wte.new_embedding": torch.zeros(16, 7)}), "differ in width"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_backbone(folder)


@pytest.mark.parametrize("size", [0, 5, 300, -1000])
def test_a_truncated_file_is_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="model.safetensors is not a whole safetensors file"):
        load_backbone(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama', this network is 'molmo2'"),
        (lambda c: c.pop("model_type"), "model_type is None"),
        (lambda c: c.pop("text_config"), "has no text_config"),
        (lambda c: c["text_config"].pop("head_dim"), "lacks head_dim"),
        (lambda c: c["text_config"].update(head_dim="8"), "head_dim must be like 128, got '8'"),
        (lambda c: c["text_config"].update(num_key_value_heads=3), "must divide the query heads"),
        (lambda c: c["adapter_config"].update(vit_layers=2), "vit_layers must be like"),
        (lambda c: c["adapter_config"].update(vit_layers=[7]), "must lie among the 3 declared vision layers"),
        (lambda c: c.pop("image_patch_id"), "image_patch_id must be a token id"),
        (
            lambda c: c["text_config"].update(qk_norm_type="olmo"),
            "qk_norm_type = 'olmo' is not supported, only 'qwen3'",
        ),
        (
            lambda c: c["text_config"].update(rope_parameters={"rope_type": "yarn"}),
            "rope_type = 'yarn' is not supported",
        ),
    ],
)
def test_wrong_configs_are_named(folder, change, message):
    edit(folder / "config.json", change)
    with pytest.raises(InputError, match=message):
        load_backbone(folder)


def test_a_folder_without_a_checkpoint(tmp_path, folder):
    with pytest.raises(InputError, match="config.json does not exist"):
        load_backbone(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_backbone(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is not JSON"):
        load_backbone(folder)


# ------------------------------------------------------------------------------------------- random checkpoints, show


def test_the_released_config_is_written_as_it_is_released(tmp_path):
    """Every key of ours stands in the released file with the same value, the ids of all picture tokens among them."""
    config = size_config("molmo2-4b")
    (tmp_path / "tokenizer.json").write_text(json.dumps(stand_in_tokenizer(config)))
    shutil.copyfile(DATA / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    released = json.loads((DATA / "config.json").read_text())
    ours = json.loads(json.dumps(config_json(config, torch.float32, Processor.from_folder(tmp_path, 100))))
    assert {key for key in released if "_id" in key or "use_frame" in key} < set(ours)
    assert ours["architectures"] == released["architectures"]
    for part in ("text_config", "vit_config", "adapter_config"):
        assert {k: released[part].get(k) for k in ours[part]} == ours[part]
        del ours[part]
    assert {k: released.get(k) for k in ours} == ours


def test_names_and_shapes_of_the_4b_checkpoint_come_from_the_released_config(tmp_path):
    shutil.copyfile(DATA / "config.json", tmp_path / "config.json")
    shutil.copyfile(DATA / "generation_config.json", tmp_path / "generation_config.json")
    config = read_config(tmp_path)
    assert config == size_config("molmo2-4b")
    sizes = stored_shapes(config)
    assert len(sizes) == 706 and sum(size.numel() for size in sizes.values()) == 4_850_869_200
    assert sizes["model.transformer.wte.embedding"] == (151936, 2560)
    assert sizes["model.transformer.wte.new_embedding"] == (128, 2560)
    assert sizes["model.transformer.blocks.35.self_attn.att_proj.weight"] == (6144, 2560)
    assert "model.vision_backbone.image_vit.transformer.resblocks.24.attention.wq.weight" in sizes
    assert "model.vision_backbone.image_vit.transformer.resblocks.25.attention.wq.weight" not in sizes


def test_a_random_checkpoint_loads_and_scores(tmp_path):
    write_random(tmp_path / "r", "tiny", size_config("tiny", 2, 1), torch.bfloat16, seed=0)
    assert len(list((tmp_path / "r").glob("model-*-of-00007.safetensors"))) == 2 + 5, "two blocks, five other parts"
    model = load_backbone(tmp_path / "r")
    assert model.config.text.num_hidden_layers == 2 and model.config.vision_depth == 1
    proj = model.model.transformer.blocks[0].self_attn.att_proj.weight
    assert proj.dtype == torch.float32 and proj.std().item() == pytest.approx(0.02, rel=0.02)
    rm = RewardModel.new(tmp_path / "r", "joint", LoraConfig(r=2), inner=4)
    assert len(rm.score("?", ["a", "b"])) == 2


def test_the_stand_in_tokenizer_has_the_released_ids(tmp_path):
    config = size_config("molmo2-4b")
    (tmp_path / "tokenizer.json").write_text(json.dumps(stand_in_tokenizer(config)))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<im_start>": 151936}
    ids |= {"<im_patch>": 151938, "<low_res_im_start>": 151940, "<|image|>": 151941, "<|video|>": 151945}
    assert {name: tokenizer.id(name) for name in ids} == ids
    assert tokenizer.separator_id == len(tokenizer) == 151946
    assert tokenizer.decode(tokenizer.encode("a small red star, 猫")) == "a small red star, 猫"


def test_show_says_what_a_checkpoint_is(folder, capsys):
    told = show(folder)
    out = capsys.readouterr().out
    model = load_backbone(folder)
    assert told["parameters"] == sum(told["parts"].values()) == sum(p.numel() for p in model.parameters())
    assert "complete" in out and "F32" in out and told["tensors"] == len(model.state_dict()) + 1
    scoring = load_backbone(folder, torch.bfloat16, lm_head=False)
    assert told["memory"]["bfloat16"]["score"] == sum(p.nbytes for p in scoring.parameters())


@pytest.mark.parametrize(
    "lose, why",
    [
        (lambda f: (f / "model-2.safetensors").unlink(), "model-2.safetensors does not exist"),
        (lambda f: os.truncate(f / "model-2.safetensors", 5000), "model-2.safetensors is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "holds no checkpoint"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json does not exist"),
        (lambda f: edit(f / "tokenizer.json", lambda t: t["added_tokens"].pop(5)), "lacks the token"),
    ],
)
def test_show_tells_a_whole_download_from_a_broken_one(folder, lose, why):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: tensors[n] for n in part}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {n: f"model-{1 + i % 2}.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    show(folder)
    lose(folder)
    with pytest.raises(InputError, match=why):
        show(folder)


def test_a_wrong_shape_is_refused():
    for wrong in (("other", None, None), ("tiny", 0, None), ("tiny", 99, None), ("tiny", None, 9)):
        with pytest.raises(InputError):
            size_config(*wrong)


KILLED_WRITER = """
import os, signal, sys, torch
from yojo import initial
calls, real = [], initial.init_tensor
def init(*args):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
initial.init_tensor = init
initial.write_random(sys.argv[1], "tiny", initial.size_config("tiny"), torch.float32, 0)
"""


@pytest.mark.parametrize("moment", [1, 30, 90])
def test_a_kill_while_a_random_checkpoint_is_written_leaves_nothing_of_its_name(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, tmp_path / "out", str(moment)], check=False)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    for left in tmp_path.iterdir():
        with pytest.raises(InputError):
            show(left)


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_folder_is_replaced_only_when_told(tmp_path):
    model = random_model(dtype=torch.float32)
    save_backbone(model, tmp_path / "out", companions=WEIGHTS / "tiny")
    with pytest.raises(InputError, match="exists already"):
        save_backbone(model, tmp_path / "out", companions=WEIGHTS / "tiny")
    save_backbone(model, tmp_path / "out", companions=WEIGHTS / "tiny", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_write_that_fails_leaves_the_previous_one(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("before")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", overwrite=True) as new:
        (new / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == (tmp_path / "out/file").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), whole_file(tmp_path / "file" / "below"):
        pass


def test_a_folder_is_put_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("before")
    real = os.rename

    def rename(a, b):
        if b == tmp_path / "out" and ".old" not in a.name:
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(InputError, match="No space left"), whole_folder(tmp_path / "out", overwrite=True) as new:
        (new / "file").write_text("after")
    assert (tmp_path / "out/file").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_moved_aside_by_a_kill_is_put_back_by_the_next_write(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old/file").write_text("before")
    with pytest.raises(InputError, match="exists already"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/file").read_text() == "before"


KILLED = """
import os, signal, sys
from pathlib import Path
from yojo.files import whole_file, whole_folder
target, step = Path(sys.argv[1]), sys.argv[2]
if step == "file":
    with whole_file(target / "file") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
with whole_folder(target, overwrite=True) as new:
    (new / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("step", ["file", "folder"])
def test_a_kill_during_a_save_leaves_the_previous_file_whole(tmp_path, step):
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("before")
    done = subprocess.run([sys.executable, "-c", KILLED, target, step], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert (target / "file").read_text() == "before"
