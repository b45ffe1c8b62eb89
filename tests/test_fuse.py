"""Fused by `torch.compile`, the network computes what it computes without: hidden states and gradients.

    pytest tests/test_fuse.py -m "slow or not slow"

The comparison needs a C++ compiler, as `fuse` does, and takes half a minute where nothing is compiled yet.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import random_model

from yojo.cli import WEIGHTS
from yojo.core import lora
from yojo.core.mask import AttentionMask


def rows(lengths, seed=0):
    """Random rows of two answers each, every answer of `lengths` tokens after a prompt of 5: ids and mask."""
    B, T = len(lengths), 5 + 2 * max(lengths)
    record, response = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -1)
    for b, length in enumerate(lengths):
        record[b, 5 + 2 * length :] = -1
        response[b, 5 : 5 + 2 * length] = torch.arange(2).repeat_interleave(length)
    ids = torch.randint(0, 399, (B, T), generator=torch.Generator().manual_seed(seed))
    return ids, AttentionMask(record, response, torch.zeros(B, T, dtype=torch.bool), "isolated")


def step(model, ids, mask):
    """Hidden states at two tokens of every row, and the adapter's gradient of a sum over them."""
    B = len(ids)
    read = torch.stack([torch.arange(B).repeat_interleave(2), torch.tensor([6, 8]).repeat(B)], dim=1)
    with lora.use(model, "a"):
        with torch.no_grad():
            whole = model(ids, mask=mask)
        hidden = model(ids, mask=mask, keep=read)
        slope = torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).sin()
        gradients = torch.autograd.grad((slope * hidden).sum(), lora.parameters(model, "a"))
    return [whole, hidden.detach(), *gradients]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
def test_fused_equals_plain():
    model = random_model()
    lora.add(model, "a", lora.LoraConfig(r=2, dropout=0), torch.Generator().manual_seed(0))
    for i, p in enumerate(lora.parameters(model, "a")):
        p.data.normal_(generator=torch.Generator().manual_seed(i))  # else what ran before it would decide the rounding
    batches = [rows(lengths) for lengths in ([4], [7, 3], [5, 6, 2], [9])]
    plain = [step(model, *batch) for batch in batches]
    model.fuse()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for model.checkpointing in (False, True):
        for batch, expected in zip(batches, plain, strict=True):
            for ours, theirs in zip(step(model, *batch), expected, strict=True):
                assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before  # it was compiled, not left as it was


IN_A_WORKER = pytest.param(["bench", "load", "--weights", WEIGHTS / "tiny"], marks=pytest.mark.slow)


@pytest.mark.parametrize("words", [["score", "--tiny"], IN_A_WORKER])
def test_without_a_compiler_a_command_says_so(tmp_path, words):
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", f"yojo.{words[0]}", *words[1:], "--compile"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "No working C++ compiler" in done.stderr and len(done.stderr.splitlines()) == 1
