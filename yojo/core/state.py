"""What the loops of `training.py` and `grpo.py` keep of an unfinished run.

`RunState` keeps nothing; the one that keeps a run in a folder, from which it goes on, is in `runs.py`.

See it: `pytest tests/test_fit.py`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

Log = list[dict[str, float]]  # an entry a step


class NotFinite(FloatingPointError):
    """A loss or a gradient that is not a number, and the step at which it came."""

    def __init__(self, step: int, why: str):
        super().__init__(step, why)
        self.step = step

    def __str__(self) -> str:
        return f"step {self.args[0]}: {self.args[1]}"


class RunState:
    """What is kept of an unfinished run: nothing. `runs.py` keeps it in a folder."""

    def resume(self, settings: dict, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Log:
        """Put back what was saved -> the log so far."""
        return []

    def unbroken(self) -> AbstractContextManager:
        """What changes together: signals wait until it is done."""
        return nullcontext()

    def add(self, entry: dict[str, float]) -> None:
        """A step is done."""

    def save(self, log: Log) -> None:
        """Everything that the run needs to go on."""

    def broken_off(self, log: Log) -> None:
        """Save the state after the last whole step, when an error or a signal ends the run."""


UNSAVED = RunState()
