"""What all commands share: bad input is one clear line and exit status 2, results go to `--json` whole."""

import argparse
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

from yojo.files import InputError, write_json

COMPILE = {
    "action": "store_true",
    "help": "fuse norms, rotation and SwiGLU by torch.compile: the first passes take some 20 s longer, and networks of "
    "the 4B one's width less time after that, small ones more",
}
DTYPES = ("float32", "bfloat16")
DTYPE = {"choices": DTYPES, "help": "what to compute in; if not given, float32 on a CPU and bfloat16 on CUDA"}
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # relative to the package, not to the current folder


def shipped(name: str) -> Path:
    """What stands beside the package in the repository, and is missing where it was installed without it."""
    path = WEIGHTS.parent / name
    if not path.exists():
        raise InputError(
            f"no {path}: the tiny weights live in the repository, not in an installed package: clone it and run "
            "`pip install -e .` there, or check them out again"
        )
    return path


class Parser(argparse.ArgumentParser):
    """A parser with the options every command has."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--seed", type=seed, default=0, help="seed of everything random")
        self.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as JSON")

    def add_subparsers(self, **kwargs):
        """Subcommands take the same options; what is not said after the subcommand is not set a second time."""
        return super().add_subparsers(parser_class=_Sub, **kwargs)


class _Sub(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--seed", type=seed, default=argparse.SUPPRESS, help="seed of everything random (default: 0)")
        self.add_argument(
            "--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="write the results to FILE"
        )


def seed(text: str) -> int:
    """A whole number from 0: some random generators take no other."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def pool(jobs: int) -> tuple[ProcessPoolExecutor, int]:
    """Processes for `jobs` of a kind, two at a time where there are two cores, and how many threads each may use."""
    cores = os.cpu_count() or 1
    workers = min(2, jobs, cores)
    return ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent), max(1, cores // workers)


def _end_with_parent() -> None:
    """A worker whose command is killed would wait for its next job for ever."""
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run(main: Callable[[], dict | list], parser: Parser, args: argparse.Namespace) -> None:
    """Run a command; its return value is what `--json` writes. Numbers that are not finite end it with status 1."""
    try:
        result = main()
        if args.json:
            write_json(args.json, result)
    except InputError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
