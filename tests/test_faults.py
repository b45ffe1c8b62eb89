"""What happens in runs of days: kills, a full disk, numbers that are no numbers. Nothing saved is lost.

pytest tests/test_faults.py            three signals for each of two commands (`-m slow`: and for the other two)
python tests/faults.py train 50        fifty kills of one
"""

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from yojo import train
from yojo.core import training as loop
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.core.state import NotFinite
from yojo.core.training import FitConfig, Recipe
from yojo.files import InputError, add_line

FAULTS = Path(__file__).with_name("faults.py")


LONGER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("train", "grpo")]


@pytest.mark.parametrize("kind", ["evaluate", "checkpoint", *LONGER])
def test_stopped_at_a_random_moment_a_run_goes_on_to_the_same_bytes(kind):
    environment = {**os.environ, "PYTHONPATH": str(FAULTS.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, FAULTS, kind, "3", "SIGKILL", "SIGINT", "SIGTERM"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "all went on to the same bytes" in done.stdout


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch):
    """A small training run on a file of nine records, four a step, saved every other step."""
    small = Recipe(LoraConfig(r=2, dropout=0.0), 8, fit=FitConfig(steps=0, accumulate=4, save_every=2))
    monkeypatch.setattr(train, "Recipe", lambda: replace(small))
    Image.effect_noise((84, 84), 60).save(tmp_path / "p.png")
    record = {"responses": ["good", "bad"], "rankings": [1, 2], "image": "p.png"}
    lines = [json.dumps(record | {"prompt": f"{i}?"}) for i in range(9)]
    (tmp_path / "prefs.jsonl").write_text("\n".join(lines))
    words = ["--weights", tiny_folder, "--data", tmp_path / "prefs.jsonl", "--test", tmp_path / "prefs.jsonl"]
    return [*words, "--out", tmp_path / "rm", "--mode", "joint", "--steps", 5], tmp_path / "rm.training"


def spoil(monkeypatch, prompt: str, wrong: float):
    """Scores of the record with this prompt come out as no numbers."""
    real = loop.PreferenceLoss.__call__

    def call(self, rows, ranks):
        value, about = real(self, rows, ranks)
        mine = any(prompt in self.rm.processor.tokenizer.decode(row.ids.tolist()) for row in rows)
        return value * (wrong if mine else 1.0), about

    monkeypatch.setattr(loop.PreferenceLoss, "__call__", call)


def test_a_loss_that_is_not_finite_names_its_records_and_saves_the_weights_before_it(command, run, monkeypatch):
    words, training = run
    spoil(monkeypatch, "3?", float("nan"))
    status, _, err = command(train, *words)
    assert status == 1 and "loss nan" in err and "prefs.jsonl:4" in err
    assert "Traceback" not in err and len(err.split("\n")[-2].split("prefs.jsonl:")) - 1 == 4, "the step's four records"
    state = torch.load(training / "state.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["parameters"])
    steps = (training / "metrics.jsonl").read_text().splitlines()
    assert len(state["log"]) == len(steps), "no step that was made is lost"


def test_a_record_whose_scores_are_not_finite_is_named_alone(command, run, monkeypatch):
    words, _ = run
    real = RewardModel.forward

    def scores(self, batch):  # of one record
        mine = "3?" in self.processor.tokenizer.decode(batch.input_ids[0].tolist())
        return real(self, batch) * (float("inf") if mine else 1)

    monkeypatch.setattr(RewardModel, "forward", scores)
    status, _, err = command(train, *words)
    assert status == 1 and err.rstrip().endswith("prefs.jsonl:4") and err.count("prefs.jsonl:") == 1


def test_a_gradient_that_is_not_finite_stops_too():
    w = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(NotFinite, match="step 0: loss 0.0, gradient norm inf"):
        loop.fit(lambda step, micro_batch: ((w * 3e38 * 10).sum(), {}), [w], FitConfig(steps=2))
    assert w.item() == 0


@contextmanager
def full_disk(room: int):
    """No file may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_keeps_the_state_before_it(command, run, monkeypatch):
    words, training = run
    real, saves = torch.save, []

    def save(state, path):
        saves.append(path)
        with full_disk(10_000) if len(saves) == 2 else nullcontext():
            return real(state, path)

    monkeypatch.setattr(torch, "save", save)
    status, _, err = command(train, *words)
    last = err.split("\n")[-2]
    assert status == 2 and "cannot write" in last and "state.pt: torch could not write it, is the disk full?" in last
    assert "Traceback" not in err
    assert len(torch.load(training / "state.pt", weights_only=True)["log"]) == 2
    assert [path.name for path in training.iterdir() if path.name.startswith(".")] == []
    assert command(train, *words, "--resume")[0] == 0


def test_a_disk_that_is_full_from_the_start_is_found_before_the_first_step(command, run):
    words, training = run
    with full_disk(10_000):
        status, _, err = command(train, *words)
    assert status == 2 and "state.pt: torch could not write it, is the disk full?" in err.split("\n")[-2]
    assert (training / "metrics.jsonl").read_text() == ""


def test_a_killed_command_leaves_no_worker_behind():
    code = (
        "import os; from yojo.cli import in_processes\n"
        "if __name__ == '__main__':\n"
        "    in_processes(os.system, [('echo $PPID; sleep 15',)])\n"
    )
    here = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=here) as command:
        worker = Path("/proc") / command.stdout.readline().strip()
        assert worker.exists()
        command.kill()
    for _ in range(100):
        if not worker.exists() or "Z (zombie)" in (worker / "status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker is still there, ten seconds after its command was killed")


def test_a_full_disk_does_not_hide_which_records_gave_no_number(command, run, monkeypatch):
    words, _ = run
    spoil(monkeypatch, "3?", float("nan"))
    real, saves = torch.save, []

    def save(state, path):
        saves.append(path)
        with full_disk(10_000) if len(saves) > 1 else nullcontext():
            return real(state, path)

    monkeypatch.setattr(torch, "save", save)
    status, _, err = command(train, *words)
    assert status == 1 and "loss nan" in err and "cannot write" in err and "prefs.jsonl:4" in err


def test_a_full_disk_at_the_very_end_leaves_no_half_model(command, run):
    words, training = run
    with full_disk(100_000):
        assert command(train, *words)[0] == 0, "there is room for all of this"
    saved = training.with_name("rm")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    rm = RewardModel.load(saved)
    with full_disk(2000), pytest.raises(InputError, match=f"cannot write {saved}: .*File too large"):
        rm.save(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_file_of_lines_that_cannot_grow_is_named(tmp_path):
    with full_disk(100), pytest.raises(InputError, match="cannot write .*lines.jsonl: File too large"):
        for step in range(100):
            add_line(tmp_path / "lines.jsonl", {"step": step})
