"""Unfinished runs. `--out runs/rm` is written when a run is complete; until then `runs/rm.training` holds its state,
from which `--resume` goes on.

See it: `pytest tests/test_fit.py tests/test_faults.py`.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from yojo.cli import refuse_existing
from yojo.core import parallel
from yojo.core.state import Log, RunState
from yojo.files import InputError, add_line, check_place, followed, whole_file, write_lines
from yojo.terminal import unbroken

RECORDS = {"data", "records", "pictures", "left_out"}  # of what a run is about, what the records decide


class SavedRun(RunState):
    """A run whose state is kept in `folder`: `state.pt`, written whole or not at all, and a line a step in
    `metrics.jsonl`. If a state is there already, the run goes on from it, provided that its settings and `about`, which
    says what is trained on what, are the same. Of several processes the first one writes."""

    def __init__(self, folder: Path, about: dict | None = None):
        self.folder, self.about = folder, about or {}
        self.saved: int | None = None  # steps in the state; None = it is not this run's, or there is none
        self.whole = True  # no update is half done

    def resume(self, settings: dict, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Log:
        """The log so far, [] where nothing is saved. Steps after the save are done again."""
        self.identity, self.parameters, self.optimizer = {**settings, **self.about}, parameters, optimizer
        begun = (self.folder / "state.pt").exists()
        log = self._read() if begun else []
        self.saved = len(log) if begun else None
        parallel.wait()  # all have read the state before the first writes again
        if parallel.is_main():
            write_lines(self.folder / "metrics.jsonl", log)
        if begun:
            parallel.say(f"going on after {len(log)} of {settings.get('steps')} steps, from {self.folder}")
        else:
            self.save(log)  # what is trained on what is known from the start
        return log

    def _read(self) -> Log:
        try:
            state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
            theirs, ours = json.loads(state["about"]), json.loads(json.dumps(self.identity))
        except Exception as error:  # torch.load raises many kinds
            raise InputError(f"{self.folder / 'state.pt'} is not the state of a run ({error}): start over") from None
        if changed := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
            differs = f"its {changed[0]} is {theirs.get(changed[0])!r:.99}, not {ours.get(changed[0])!r:.99}"
            what = "records, the same ones readable," if {*changed} & RECORDS else "arguments"
            remedy = f"resume with the same {what} or start over with --overwrite"
            raise InputError(f"{self.folder} holds another run: {differs}; {remedy}")
        with torch.no_grad():
            for p, saved in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        return state["log"]

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        with unbroken():
            self.whole = False  # there is nothing to save
            yield
            self.whole = True

    def add(self, entry: dict[str, float]) -> None:
        if parallel.is_main():
            add_line(self.folder / "metrics.jsonl", entry)

    def save(self, log: Log) -> None:
        """In one file, everything that the run needs to go on as if it had never stopped."""
        if not parallel.is_main():
            return
        state = {
            "about": json.dumps(self.identity, sort_keys=True),
            "parameters": [p.detach() for p in self.parameters],
        }
        state |= {"optimizer": self.optimizer.state_dict(), "log": log}
        with unbroken(), whole_file(self.folder / "state.pt") as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"torch could not write it, is the disk full? ({error})") from None
        self.saved = len(log)

    def broken_off(self, log: Log) -> None:
        if not self.whole or self.saved == len(log):
            return
        with unbroken():
            try:
                self.save(log)
            except InputError as error:
                print(error, file=sys.stderr)


def run_folder(out: Path, overwrite: bool, resume: bool) -> Path:
    """The folder of a run's state; refuses what it was not told to replace."""
    refuse_existing(out, overwrite)
    training = followed(out.absolute().with_name(out.absolute().name + ".training"))
    check_place(training, folder=True)
    if resume and not training.exists():
        raise InputError(f"there is no unfinished run at {training} to resume")
    if resume and not (training / "state.pt").exists():
        parallel.say(f"nothing was saved in {training}: the run begins at its first step")
    if training.exists() and not resume and not overwrite:
        raise InputError(f"{training} holds an unfinished run: say --resume to go on, --overwrite to start over")
    return training


@contextmanager
def kept(state: SavedRun) -> Iterator[None]:
    """Where an error or a signal ends the block, it is said how to go on."""
    try:
        yield
    except BaseException:
        if state.saved is not None:
            parallel.say(f"what was done is kept in {state.folder}: --resume goes on")
        raise


def start_over(training: Path, resume: bool) -> None:
    """An empty folder for the run's state, or, resuming, the one that is there. Called once all input is known good."""
    try:
        if training.exists() and not resume:
            shutil.rmtree(training)
        training.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {training}: {error.strerror}") from None
