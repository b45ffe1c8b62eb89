"""A terminal decides nothing: what it cannot show, or nobody reads, ends no command, and a signal loses no work.

See it: `pytest tests/test_terminal.py`.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# -------------------------------------------------------------------------------------------------------------- prints


class Printed:
    """A stream that raises nothing. Characters that it lacks become "?". `error` is what kept it from being written;
    from then on what is printed goes nowhere."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None
        with suppress(AttributeError):  # of a stream that is no file
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.forgiving():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.forgiving():
            self.stream.flush()

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def print_leniently() -> list[Printed]:
    """Standard output and error, from now on."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the command began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  open until the end
    sys.stdout, sys.stderr = streams = [Printed(sys.stdout), Printed(sys.stderr)]
    return streams


# ------------------------------------------------------------------------------------------------------------- signals

# That end a process, are sent by people, systems and batch queues, and can be heard.
STOPS = "SIGINT SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split()
STOPS = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
ONE = 5.0  # seconds in which signals are taken for one: a second must not break off what the first one began to save
# How many `unbroken` blocks are open, what came in meanwhile; what has raised, and until when no other is heard.
_held = {"by": 0, "signal": 0, "raised": 0, "until": 0.0}


def _stop(number: int, frame: object = None) -> None:
    if _held["by"]:
        _held["signal"] = number
        return
    if time.monotonic() < _held["until"]:
        return
    _held.update(raised=number, until=time.monotonic() + ONE)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def stopping_by_exception() -> Iterator[None]:
    """Signals that ask to stop raise: KeyboardInterrupt, or SystemExit with the usual status. Those that are ignored
    stay so (`nohup`)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in STOPS if signal.getsignal(number) in usual}
    _held.update(signal=0, raised=0, until=0.0)
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped() -> int:
    """The signal that has asked the command to stop, which is heard now; 0 = none. Its exception may have become
    another: libraries turn what is raised inside of them into errors of their own."""
    number, _held["raised"] = _held["raised"], 0
    return number


@contextmanager
def unbroken() -> Iterator[None]:
    """Such signals wait until the end of the block. One whose exception was swallowed by a library raises again."""
    _held["by"] += 1
    try:
        yield
    finally:
        _held["by"] -= 1
        if not _held["by"] and (number := _held["signal"] or _held["raised"]):
            _held["signal"] = 0
            _stop(number)
