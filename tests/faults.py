"""Stop a run by a signal at a random moment, let it go on, and compare what it leaves with an uninterrupted run's.

python tests/faults.py train 50 SIGINT SIGTERM   (in turns; or evaluate, grpo, checkpoint; `test_faults.py` does some)

SIGKILL is seen by nobody: a run loses what it did since its last save. After the others nothing is lost but the step in
flight, although training saves nothing before its end here.

Every run is a fork of this process, which has imported everything and computed nothing, so that a kill costs little.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from yojo import checkpoint, evaluate, grpo, train, weights
from yojo.cli import WEIGHTS
from yojo.core.lora import LoraConfig
from yojo.core.training import FitConfig, Recipe

torch.set_num_threads(1)
SAVED = {"SIGKILL": 2, "SIGINT": 100, "SIGTERM": 100}  # steps between saves of the training run, which has 9
STATUS = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}  # of a run that was stopped


@dataclass(frozen=True)
class Kind:
    """A command, its arguments, how it goes on, and the files that must come out the same."""

    module: object
    words: Callable[[Path, Path], list]
    goes_on: list[str]
    files: list[str]


def ends(kind: Kind, folder: Path, out: Path) -> dict[str, bytes]:
    return {name: (folder / name.format(out=out.name)).read_bytes() for name in kind.files}


def prepare(folder: Path) -> dict[str, Kind]:
    """Twelve records, and each command made small."""
    Image.effect_noise((84, 84), 60).save(folder / "p.png")
    record = {"prompt": "Describe the star.", "responses": ["a red star", "a star", "no"], "rankings": [1, 2, 3]}
    lines = [json.dumps(record | {"prompt": f"{i}?", "image": "p.png"}) for i in range(12)]
    (folder / "prefs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tiny, data = WEIGHTS / "tiny", folder / "prefs.jsonl"
    model = ["adapter_model.safetensors", "value_head.safetensors"]
    return {
        "train": Kind(
            train,
            lambda folder, out: ["--weights", tiny, "--data", data, "--mode", "joint", "--steps", 9, "--out", out],
            ["--resume"],
            [f"{{out}}/{name}" for name in model],
        ),
        "grpo": Kind(
            grpo,
            lambda folder, out: (
                ["--reward", WEIGHTS / "tiny-rm", "--data", data, "--steps", 6, "--prompts", 2]
                + ["--group", 2, "--max-new-tokens", 6, "--lr", 0.01, "--out", out]
            ),
            ["--resume"],
            ["{out}/adapter_model.safetensors"],
        ),
        "evaluate": Kind(
            evaluate,
            lambda folder, out: (
                ["--model", WEIGHTS / "tiny-rm", "--data", data, "--permutations", 4, "--out", out]
                + ["--json", f"{out}.json"]
            ),
            [],
            ["{out}", "{out}.json"],
        ),
        "checkpoint": Kind(
            checkpoint,
            lambda folder, out: ["random", "--size", "tiny", "--out", out],
            [],
            [f"{{out}}/model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
            + ["{out}/config.json", "{out}/model.safetensors.index.json"],
        ),
    }


def save_every(steps: int) -> None:
    """Of training, which is small."""
    fit = FitConfig(steps=0, accumulate=2, save_every=steps)
    train.Recipe = lambda: Recipe(LoraConfig(r=2), 8, records=1, fit=fit)


def start(kind: Kind, words: list, quiet: Path) -> int:
    """Fork, and run the command in the child -> its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    tqdm.set_lock(threading.RLock())  # its own lock is shared by forks, and one that is killed may hold it
    try:
        with open(quiet, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["command", *map(str, words)]
        kind.module.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def check_left(name: str, folder: Path, out: Path, stop: str) -> None:
    """What a signal may leave: a whole result, or none, and of a run no more lost than the steps since its last save,
    or nothing but the step in flight."""
    training = out.with_name(out.name + ".training")
    if name in ("train", "grpo") and (training / "state.pt").exists():
        saved = len(torch.load(training / "state.pt", weights_only=True)["log"])
        logged = (training / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
        lost = {"SIGKILL": {"train": SAVED[stop], "grpo": 1}[name]}.get(stop, 0)
        assert logged - saved <= lost, f"{logged} steps were made and {saved} saved"
    if stop != "SIGKILL":
        assert not [path for path in folder.glob(f".*{out.name}*") if path.is_dir()], "nothing half written is left"
    if name == "checkpoint" and out.exists():
        weights.load_backbone(out)


def stop_many(name: str, times: int, stops: list[str], seed: int = 0) -> int:
    """-> how many of the signals came before the end of the run."""
    rng, hits = random.Random(f"{seed} {name} {stops}"), 0
    save_every(100)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kind, log = prepare(folder)[name], folder / "log.txt"
        for out in (folder / "cold", folder / "whole"):  # the first run also warms the machine up
            began = time.monotonic()
            assert finish(start(kind, kind.words(folder, out), log)) == 0, log.read_text(encoding="utf-8")
        seconds, expected = time.monotonic() - began, ends(kind, folder, out)
        for i in range(times):
            out, stop = folder / f"out{i}", stops[i % len(stops)]
            save_every(SAVED[stop])
            process = start(kind, kind.words(folder, out), log)
            time.sleep(rng.uniform(0, seconds))
            os.kill(process, signal.Signals[stop])
            status, said = finish(process), log.read_text(encoding="utf-8")
            hits += status == STATUS[stop]
            if "Traceback" in said:  # before the command began, or after it
                assert "in finish" not in said, said
            else:  # or it ended by the signal itself, which Python did not see
                assert status in (0, STATUS[stop], -signal.Signals[stop]), said
            check_left(name, folder, out, stop)
            begun = out.with_name(out.name + ".training").exists()
            done = out.exists() and name != "evaluate"  # an evaluation is asked for again in the same words
            if not done:
                again = kind.words(folder, out) + (kind.goes_on if begun else [])
                assert finish(start(kind, again, log)) == 0, log.read_text(encoding="utf-8")
            assert ends(kind, folder, out) == expected
            for path in folder.glob(f"*out{i}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert hits or times < 10, "no signal hit a run"
    return hits


if __name__ == "__main__":
    name, times, *stops = sys.argv[1:]
    hits = stop_many(name, int(times), stops or ["SIGKILL"])
    print(f"{hits} of {times} signals hit a run; all went on to the same bytes")
