"""Two processes train the reward model to the adapter that one trains it to, dropout and all.

pytest tests/test_parallel.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_single_pass import noise

from yojo.core import parallel
from yojo.files import InputError, write_lines

# The command itself, with the default recipe made small; float64 where the last argument says so.
# A first exit handler runs last: after it the group's threads must be gone, or leaving can abort.
SCRIPT = """
import atexit, sys
from pathlib import Path
def comm(path):
    try:
        return path.read_text()
    except OSError:  # a thread that has just ended
        return ""
atexit.register(lambda: print("gloo" in "".join(map(comm, Path("/proc/self/task").glob("*/comm")))))
from dataclasses import replace
import torch
from yojo import train
from yojo.core import reward
from yojo.core.training import FitConfig
from yojo.core.lora import LoraConfig
from yojo.core.training import Recipe
fit = FitConfig(steps=0, lr=1e-2, accumulate=4, save_every=2)
small = Recipe(LoraConfig(r=2, dropout=0.2), inner=8, records=1, fit=fit)
train.Recipe = lambda: replace(small)
dtype, new = getattr(torch, sys.argv.pop()), reward.RewardModel.new
train.RewardModel.new = lambda *args, **kwargs: new(*args, **kwargs | {"dtype": dtype})
torch.set_num_threads(1)
train.main()
"""


@pytest.fixture
def run(tiny_folder, tmp_path):
    noise(1).save(tmp_path / "p.png")
    lines = [
        {"prompt": f"{i}?", "responses": ["good", f"bad {i}", "worse"], "rankings": [1, 2, 3], "image": "p.png"}
        for i in range(12)
    ]
    write_lines(tmp_path / "prefs.jsonl", lines)
    (tmp_path / "script.py").write_text(SCRIPT)

    def go(processes, dtype, out, *more):
        words = [
            "--weights",
            tiny_folder,
            "--data",
            tmp_path / "prefs.jsonl",
            "--out",
            tmp_path / out,
            "--mode",
            "joint",
        ]
        words = [tmp_path / "script.py", *words, "--steps", "5", *more, dtype]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    return go, tmp_path


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), pytest.param("float32", 1e-4, marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(run, dtype, tolerance):
    go, folder = run
    for processes, out in ((1, "one"), (2, "two")):
        done = go(processes, dtype, out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("memory, computed") == done.stdout.count("held back") == 1, "process 0 alone prints"
        assert "True" not in done.stdout and done.stdout.count("False") == processes, "threads are left at the exit"
    for file in ("adapter_model.safetensors", "value_head.safetensors"):
        one, two = (load_file(folder / out / file) for out in ("one", "two"))
        assert one.keys() == two.keys() and all(str(t.dtype) == f"torch.{dtype}" for t in one.values())
        assert all((one[name] - two[name]).abs().max() < tolerance for name in one)
    logs = [(folder / out / "metrics.jsonl").read_text().splitlines() for out in ("one", "two")]
    assert [json.loads(line)["step"] for line in logs[1]] == [0, 1, 2, 3, 4]
    assert json.loads(logs[0][-1])["loss"] == pytest.approx(json.loads(logs[1][-1])["loss"], abs=tolerance)


def test_a_step_that_cannot_be_shared_evenly_is_named(monkeypatch):
    assert list(parallel.share(4)) == [0, 1, 2, 3]
    monkeypatch.setattr(parallel, "rank_and_world", lambda: (1, 3))
    with pytest.raises(InputError, match="4 micro-batches a step can't be shared by 3 processes"):
        parallel.share(4)
    assert list(parallel.share(6)) == [1, 4]


def test_one_process_adds_up_nothing():
    assert parallel.add_up([torch.nn.Parameter(torch.zeros(1))], {"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize("asked, rank, why", [("cuda", 2, "and there are 2"), ("cuda:0", 0, "say --device cuda")])
def test_every_process_takes_a_gpu_of_its_own(asked, rank, why, monkeypatch):
    """Before any of them joins a group, in which the others would wait."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=why):
        parallel.join_group(asked)


def test_a_process_that_is_alone_computes_where_it_was_told_and_has_no_group_to_leave(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.join_group("cuda:7") == "cuda:7" and parallel.join_group(None) is None
    parallel.leave_group()
    assert parallel.is_main()
