"""More than one device: a process for each, every one with its share of a step's micro-batches.

    torchrun --nproc-per-node 8 -m yojo.train --weights ... --data ... --out ... --mode joint

Every process holds the whole model and the same records; of the micro-batches of a step, process r of w takes
r, r + w, r + 2 w, ... Their gradients are added up before the clip, so that a step is the same whatever w is, but for
the order of sums. Process 0 alone prints and writes.

See it: `pytest tests/test_parallel.py`.
"""

import atexit
import os
from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn
from tqdm import tqdm

from yojo.files import InputError


def join_group(asked: str | None) -> str | torch.device | None:
    """Join the processes that `torchrun` started -> the device of this one: a GPU of its own, or the CPU. If `torchrun`
    started none: `asked`, unchanged."""
    if "WORLD_SIZE" not in os.environ:
        return asked
    gpu = torch.cuda.is_available() if asked is None else asked != "cpu"
    device, there = torch.device("cpu"), torch.cuda.device_count()
    if gpu:
        if asked not in (None, "cuda"):
            raise InputError(f"--device {asked}: several processes take a GPU each, so say --device cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= there:
            raise InputError(f"each process takes a GPU of its own, and there are {there}: start no more than those")
        torch.cuda.set_device(device)  # before anything is put on one
    # Optimisers import this module, which keeps the group of that moment as a default argument. Imported while a group
    # exists, it would never free that group, whose threads sometimes abort the process at its exit.
    from torch.distributed.nn import functional  # noqa: F401

    distributed.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    atexit.register(leave_group)
    return device


def leave_group() -> None:
    """Together with all others: a process that ends a group waits for the rest of it. From here on each is alone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes)"""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_main() -> bool:
    return rank_and_world()[0] == 0


def say(text: str) -> None:
    """Print, in the first process alone."""
    if is_main():
        print(text)


def progress(steps: Iterable, title: str | None, **more) -> tqdm:
    """A progress bar, in the first process alone; title None = none."""
    return tqdm(steps, title, disable=title is None or not is_main(), mininterval=1, **more)


def wait() -> None:
    """Until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


def share(parts: int) -> range:
    """The micro-batches of a step that are this process's."""
    rank, world = rank_and_world()
    if parts % world:
        raise InputError(
            f"{parts} micro-batches a step can't be shared by {world} processes: take a divisor of {parts}"
        )
    return range(rank, parts, world)


def add_up(parameters: Sequence[nn.Parameter], logged: dict[str, float]) -> dict[str, float]:
    """Gradients in place and logged numbers, summed over processes."""
    if rank_and_world()[1] == 1:
        return logged
    for p in parameters:
        distributed.all_reduce(p.grad)
    names = sorted(logged)
    numbers = torch.tensor([logged[name] for name in names], dtype=torch.float64, device=parameters[0].device)
    distributed.all_reduce(numbers)
    return dict(zip(names, numbers.tolist(), strict=True))
