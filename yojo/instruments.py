"""What `bench` measures with: seconds of alternatives that take turns, memory sampled meanwhile, the hardware's name.

See it: `pytest tests/test_bench.py`.
"""

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from yojo.cli import table


def memory() -> dict[str, int]:
    """Bytes of anonymous and of file-backed memory that this process holds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {name: int(found[key].split()[0]) * 1024 for name, key in (("anon", "RssAnon"), ("file", "RssFile"))}


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, int]]:
    """-> the most memory held inside the block, sampled, there when it has ended: "file" all that was file-backed,
    "above" what anonymous memory grew by; on CUDA what the allocator gave."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    start, stop, most, found = memory(), threading.Event(), memory(), {}

    def sample() -> None:
        while not stop.wait(0.002):
            most.update({name: max(most[name], held) for name, held in memory().items()})

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start["cuda"] = torch.cuda.memory_allocated()
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    found |= {"file": most["file"], "above": most["anon"] - start["anon"]}
    if device.type == "cuda":
        found["above"] = torch.cuda.max_memory_allocated() - start["cuda"]


def clock(do: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """What `do` returns, and the seconds that it takes, on whatever device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start, got = time.perf_counter(), do()
    wait()
    return got, time.perf_counter() - start


Seconds = dict[str, list[float]]  # by way and round


def take_turns(ways: dict[str, Callable], rounds: int, device: torch.device, seed: int) -> tuple[Seconds, list[dict]]:
    """Every way once to warm up and once with its memory watched, then `rounds` rounds -> seconds, and a row for each.
    Every other round is in an order drawn anew, the next one in its reverse, so that no way always finds the memory
    that the same other one left."""
    above, seconds = {}, {name: [] for name in ways}
    for name, way in ways.items():
        way()
        with watched(device) as held:
            way()
        above[name] = held["above"]
    order, rng = list(ways), random.Random(seed)
    for i in tqdm(range(rounds), "rounds", delay=2, leave=False):
        order = order[::-1] if i % 2 else rng.sample(order, len(order))
        for name in order:
            seconds[name].append(clock(ways[name], device)[1])
    return seconds, [{"way": name, "seconds": median(seconds[name]), "above": above[name]} for name in ways]


def ratio(of: Iterable[float], to: Iterable[float]) -> float:
    """Median over rounds of one way's seconds, or bytes, over another's."""
    return median(a / max(b, 1e-9) for a, b in zip(of, to, strict=True))


def largest(values: Iterable[float]) -> float:
    """NaN where a value is NaN, which Python's `max` may pass over."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def print_rows(rows: list[dict], *names: str) -> None:
    """A table of what the rows have of these; bytes in GB."""
    names = [name for name in names if any(name in row for row in rows)]
    sizes = {name: f"{name}, GB" for name in names if name in ("above", "weights") or name.endswith(("_anon", "_file"))}
    shown = [{sizes.get(k, k): v / 1e9 if k in sizes else v for k, v in row.items()} for row in rows]
    forms = {"way": "<", "seconds": ".3f", "tokens_per_s": ".0f", "difference": ".1e"} | dict.fromkeys(sizes, ".3f")
    print(table(shown, {sizes.get(name, name): forms.get(name, ".2f") for name in ("way", *names)}))


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
