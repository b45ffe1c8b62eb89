"""What all commands share: their options and which of these go together, tables, and the rule that bad input is one
clear line and exit status 2. Results go to `--json` whole, and of a command that fails, what it had found.

See it: `pytest tests/test_cli.py`.
"""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from yojo.files import InputError, check_place, check_writable, is_plain, write_json
from yojo.terminal import print_leniently, stopped, stopping_by_exception, unbroken

DTYPES = ("float32", "bfloat16")
FULL = r"out of memory|can't allocate memory|ALLOC_FAILED"  # how torch says it, of a GPU, the host and CUDA's libraries
RESULTS = ("json", "draw_mask", "html")  # options that name a file to write
SHOWN = ("image", "video")  # options that name a file to read, or a URL
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # relative to the package, not to the current folder


def shipped(name: str) -> Path:
    """What stands beside the package in the repository, and is missing where it was installed without it."""
    path = WEIGHTS.parent / name
    if not path.exists():
        raise InputError(
            f"no {path}: the tiny weights and the lessons live in the repository, not in an installed package: clone "
            "it and run `pip install -e .` there, or check them out again"
        )
    return path


def refuse_existing(path: Path | None, overwrite: bool, folder: bool = True) -> None:
    """Before work is begun that would end there: nothing is there that should stay, and there can be something."""
    if path is None:
        return
    if os.path.exists(path) and is_plain(path) and not overwrite:
        raise InputError(f"{path} exists already: choose another --out, or say --overwrite")
    check_place(path, folder)


# -------------------------------------------------------------------------------------------------------------- options


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A default is named where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with the options that commands share; `random`: --seed among them. rules: which options go together, as
    (how, options, others): the others "with" one of the options only, or "without" any; or "or", one of the options or
    else all of the others."""

    def __init__(self, *, rules: Sequence[tuple[str, str, str]] = (), random: bool = True, sub: bool = False, **kwargs):
        instead = [either(first, names) for how, first, names in rules if how == "or"]
        super().__init__(formatter_class=Help, allow_abbrev=False, epilog="; ".join(instead), **kwargs)
        self.rules = rules
        # what is given before a subcommand, and not again after it, is not set a second time
        unset = {"default": argparse.SUPPRESS} if sub else {}
        what = "seed of everything random" + (" (default: 0)" if sub else "")
        if random:
            self.add_argument("--seed", **{"default": 0} | unset, type=whole(0), help=what)
        elif not sub:
            self.set_defaults(seed=0)  # a subcommand may have it
        self.add_argument("--json", **unset, type=Path, metavar="FILE", help="write the results to FILE as JSON")

    def add_subparsers(self, **kwargs) -> argparse._SubParsersAction:
        self.commands = super().add_subparsers(parser_class=partial(Parser, sub=True), **kwargs)
        return self.commands

    def format_help(self) -> str:
        """With what an option goes stands before its own help."""
        for how, first, names in self.rules:
            prefix = f"({how} {listed(first, ' or ')}) "
            for action in self._actions if how != "or" else ():
                if action.dest in names.replace("-", "_").split() and prefix not in action.help:
                    action.help = prefix + action.help
        return super().format_help()

    def check(self, args: argparse.Namespace) -> None:
        """Options that were given and would do nothing, or that are missing, raise InputError."""
        for how, first, names in self.rules:
            given, missing = (self.given(args, names, are) for are in (True, False))
            chosen = self.given(args, first, True)
            if how == "or" and not chosen and missing:
                raise InputError(either(first, names))
            if how == "with" and given and not chosen:
                raise InputError(f"--{given[0]} needs {listed(first, ' or ')}")
            if how == "without" and given and chosen:
                raise InputError(f"--{given[0]} and --{chosen[0]} exclude each other")
        if hasattr(self, "commands"):
            self.commands.choices[args.command].check(args)

    def given(self, args: argparse.Namespace, names: str, are: bool) -> list[str]:
        """Which of these options were given (or were not)."""
        dests = {name: name.replace("-", "_") for name in names.split()}
        defaults = {dest: 0 if dest == "seed" else self.get_default(dest) for dest in dests.values()}
        return [name for name, dest in dests.items() if (getattr(args, dest) != defaults[dest]) == are]


def listed(names: str, between: str = ", ") -> str:
    return between.join(f"--{name}" for name in names.split())


def either(first: str, others: str) -> str:
    return f"give {listed(first, ' or ')}, or {listed(others, ' and ')}"


MOST = 2**32 - 1  # seeds are multiplied by up to a million, and torch takes 64 bits


def whole(least: int) -> Callable[[str], int]:
    """A kind of option: a whole number from `least`."""

    def number(text: str) -> int:
        if not (text.isdecimal() and len(text) < 12 and least <= int(text) <= MOST):
            raise argparse.ArgumentTypeError(f"{text[:99]!r} is no whole number from {least} to {MOST}")
        return int(text)

    return number


def rate(text: str) -> float:
    """A kind of option: a number between 0 and 1."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return float(text)


def device(text: str) -> str:
    """A kind of option: the CPU, or a GPU."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text[:99]!r} is none of cpu, cuda, cuda:0, cuda:1, ...")
    return text


def add_model_options(parser: argparse.ArgumentParser, dtype: bool = True, fuse: bool = True) -> None:
    """How a network is computed, and where."""
    what = "cpu, cuda or cuda:1; if not given, CUDA if there is one, else the CPU"
    parser.add_argument("--device", type=device, metavar="DEVICE", help=what)
    if dtype:
        what = "what to compute in; if not given, float32 on a CPU and bfloat16 on CUDA"
        parser.add_argument("--dtype", choices=DTYPES, help=what)
    what = "fuse norms, rotation and SwiGLU by torch.compile: some 20 s more at first, then faster at the 4B's width"
    if fuse:
        parser.add_argument("--compile", action="store_true", help=what)


def computed_on(args: argparse.Namespace) -> dict:
    """The arguments of `RewardModel.load`: the device and the dtype, if they were given."""
    return {"device": args.device, "dtype": args.dtype and getattr(torch, args.dtype)}


# -------------------------------------------------------------------------------------------------------------- results


def table(rows: Sequence[Mapping], columns: Mapping[str, str | Callable[[object], str]]) -> str:
    """Rows under the names of their columns, each value formatted as its column says; "-" where a row has none. What
    is formatted by "<" stands to the left."""

    def cell(row: Mapping, name: str, how: str | Callable) -> str:
        value = row.get(name)
        return "-" if value is None else how(value) if callable(how) else format(value, how)

    lines = [[name.replace("_", " ") for name in columns]]
    lines += [[cell(row, *column) for column in columns.items()] for row in rows]
    sides = ["<" if how == "<" else ">" for how in columns.values()]
    forms = [f"{side}{max(map(len, column))}" for side, column in zip(sides, zip(*lines, strict=True), strict=True)]
    return "\n".join("  ".join(map(format, line, forms)).rstrip() for line in lines)


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """A figure as tables show it."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(value, *interval)


def run(parser: Parser, command: Callable[[argparse.Namespace], dict | list]) -> None:
    """Run a command on its arguments; its return value is what `--json` writes. One that may fail after hours puts what
    it has found into `args.found` as it goes. Numbers that are not finite end it with status 1."""
    args, streams = parser.parse_args(), (sys.stdout, sys.stderr)
    args.found = None
    out, err = print_leniently()
    try:
        with stopping_by_exception():
            status = finish(parser, args, command)
        out.flush()
        err.flush()
        if out.error and not isinstance(out.error, BrokenPipeError):
            print(f"{parser.prog}: cannot print: {out.error.strerror}", file=sys.stderr)
            status = status or 2
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = streams
    if status:
        sys.exit(status)


def finish(parser: Parser, args: argparse.Namespace, command: Callable) -> int:
    """-> the exit status. What was found is written, however the command ends."""
    why, status = None, 0
    try:
        parser.check(args)
        check_apart(args)
        for name in RESULTS:
            if path := vars(args).get(name):
                check_writable(path)
        args.found = command(args)
    except BaseException as error:
        if number := stopped():
            why, status = "", 128 + number
        elif isinstance(error, KeyboardInterrupt):
            why, status = "", 130
        elif isinstance(error, (InputError, FloatingPointError)):
            why, status = str(error), 2 if isinstance(error, InputError) else 1
        elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(FULL, str(error))):
            asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
            size, status = f" ({asked[0]})" if asked else "", 1
            why = f"out of memory{size}: take fewer or shorter answers, smaller pictures, or a larger device"
        else:
            with unbroken(), suppress(InputError):
                write_found(args, "" if isinstance(error, SystemExit) else repr(error))
            raise
    try:
        with unbroken():
            write_found(args, why)
    except InputError as error:
        why, status = "; ".join(filter(None, (why, str(error)))), status or 2
    if why:
        print(f"{parser.prog}: {' '.join(why.split())}", file=sys.stderr)
    return status


def check_apart(args: argparse.Namespace) -> None:
    """What is written must not be what is read, or written by another option."""
    paths = [(name, path) for name, path in named(args) if is_plain(path)]
    written = [(name, path) for name, path in paths if name in (*RESULTS, "out")]
    for (name, path), (other, target) in product(paths, written):
        if name != other and os.path.realpath(path) == os.path.realpath(target):
            options = " and ".join(f"--{n.replace('_', '-')}" for n in (name, other))
            raise InputError(f"{options} both name {path}: it would be replaced")


def named(args: argparse.Namespace) -> Iterator[tuple[str, str | Path]]:
    """Every path that an option names."""
    for name, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) or (name in SHOWN and isinstance(path, str)):
                yield name, path


def write_found(args: argparse.Namespace, why: str | None) -> None:
    """To `--json`; `why` the command failed, if it did, stands behind what was found before."""
    found = args.found
    if args.json and (why is None or found and (isinstance(found, list) or any(found.values()))):
        if why is not None:
            error = {"error": why or "interrupted"}
            found = [*found, error] if isinstance(found, list) else found | error
        sys.stdout.flush()  # or it would come after, where both go to one file
        write_json(args.json, found)


def in_processes(function: Callable, jobs: Sequence[tuple]) -> list:
    """`function(*job)` of every job, each in a process of its own, two at a time where there are two cores."""
    cores = os.cpu_count() or 1
    workers = min(2, len(jobs), cores)
    start = partial(_start, max(1, cores // workers))
    with ProcessPoolExecutor(workers, get_context("spawn"), start) as processes, ending_workers(function.__name__):
        return list(processes.map(function, *zip(*jobs, strict=True)))


@contextmanager
def ending_workers(name: str) -> Iterator[None]:
    """Where the block is left by an error or a signal, its processes end at once; or they would be waited for."""
    try:
        yield
    except BaseException as error:
        for process in active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise InputError(f"the process of {name} was killed: too little memory?") from None
        raise


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    start_worker()


def start_worker() -> None:
    """Of every worker: the command ends it, and what it prints ends nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which would be left behind
    print_leniently()
    end_with_parent()


def end_with_parent() -> None:
    """Of a worker: it would wait for its next job for ever were its command killed."""
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
