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

import pytest
import torch
from conftest import TINY, random_model
from safetensors.torch import load_file, save_file

from yojo.checkpoint import config_json, fingerprint, load_backbone, read_config, save_backbone
from yojo.files import InputError, whole_file, whole_folder
from yojo.molmo2 import Config, Molmo2


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "checkpoint")


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


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
    config = replace(TINY, eos_id=None, pad_id=0)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, torch.float32)))
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
            "qk_norm_type = 'olmo'; this network computes 'qwen3'",
        ),
        (lambda c: c["text_config"].update(rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn' is not supported"),
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
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_backbone(folder)


def test_molmo2_4b_has_the_released_size():
    """706 tensors, 4,850,869,200 parameters; the table is one tensor here and two in files."""
    with torch.device("meta"):
        model = Molmo2(Config())
    assert len(model.state_dict()) + 1 == 706
    assert sum(p.numel() for p in model.parameters()) == 4_850_869_200


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_folder_is_replaced_only_when_told(tmp_path):
    model = random_model(dtype=torch.float32)
    save_backbone(model, tmp_path / "out", companions=tmp_path)
    with pytest.raises(InputError, match="exists already"):
        save_backbone(model, tmp_path / "out", companions=tmp_path)
    save_backbone(model, tmp_path / "out", companions=tmp_path, overwrite=True)
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
