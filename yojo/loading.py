"""What loading a checkpoint costs, and the first passes after it: `yojo.bench load`. Every way to
load runs in a process of its own, which finds no page of the files in memory.

See it: `pytest tests/test_bench.py`.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from yojo.cli import ending_workers, start_worker
from yojo.core.data import Batch, collate
from yojo.core.mask import MODES
from yojo.core.prompt import Encoded, Processor
from yojo.initial import size_config, write_random
from yojo.instruments import clock, hardware, print_rows, ratio, watched
from yojo.weights import load_backbone, shards

QUESTION = "Which of these answers describes the picture best?"


@contextmanager
def checkpoint(args: argparse.Namespace) -> Iterator[Path]:
    """--weights, or a random checkpoint for as long as it is needed."""
    if args.weights:
        yield args.weights
        return
    config = size_config(args.size, args.layers, args.vision_layers)
    with tempfile.TemporaryDirectory(prefix="yojo-bench-") as folder:
        write_random(Path(folder) / "weights", args.size, config, torch.float32, args.seed)
        yield Path(folder) / "weights"


def question(folder: Path, room: int, n: int) -> tuple[Processor, Encoded]:
    """One picture of noise, n answers of about a hundred words."""
    rng, processor = random.Random(0), Processor.from_folder(folder, room)
    (width, height), count = ((84, 84), 10) if processor.images.size < 300 else ((1024, 768), 100)
    picture = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    words = "small large red blue green star circle cross square left right centre".split()
    answers = [" ".join(rng.choices(words, k=count)) for _ in range(n)]
    return processor, processor.encode(QUESTION, answers, picture)


def load_peer(folder: Path, args: argparse.Namespace, dtype: torch.dtype):
    if not args.peer:
        return None
    from transformers import Molmo2ForConditionalGeneration

    return Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(args.device).eval()


def compare_load(args: argparse.Namespace) -> list[dict]:
    """Each way in a process of its own, the order turned round every round."""
    ways = [clone_all, load_ours, *([load_theirs] if args.peer else [])]
    found: dict[Callable, list[dict]] = {way: [] for way in ways}
    with checkpoint(args) as folder:
        print(hardware(torch.device(args.device)) + f"; {args.dtype}; {args.n} answers; page cache emptied each turn\n")
        for i in range(args.rounds):
            for way in ways if i % 2 == 0 else ways[::-1]:
                found[way].append(alone(way, folder, args))
    rows = []
    for way, many in found.items():
        numbers = {key: median(row[key] for row in many) for key in many[0] if key != "hidden"}
        rows.append({"way": way.__doc__, **numbers})

    def times(key: str, of: Callable, to: Callable) -> float:
        return ratio(*([row[key] for row in found[way]] for way in (of, to)))

    if args.peer:
        ours, theirs = (found[way][0]["hidden"] for way in (load_ours, load_theirs))
        rows[1]["difference"] = float(abs(ours - theirs).max() / abs(theirs).max())
        rows[1]["memory_ratio"] = times("score_anon", load_ours, load_theirs)
        rows[2]["times_ours"] = times("joint_s", load_theirs, load_ours)
    phases = ("load_s", "load_anon", "load_file", "weights", "joint_s", "isolated_s", "score_anon")
    print_rows(rows, *phases, "times_ours", "memory_ratio", "difference")
    slower = times("load_s", load_ours, clone_all)
    print(f"\nloading took {slower:.2f} times as long as opening and cloning the files")
    return rows


def alone(way: Callable, folder: Path, args: argparse.Namespace) -> dict:
    """Run one way in a fresh process, which finds no page of the files in memory."""
    for shard in shards(folder):
        with open(shard, "rb") as file:
            os.fsync(file.fileno())  # pages that are not yet on the disk would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ProcessPoolExecutor(1, get_context("spawn"), start_worker) as process, ending_workers(way.__name__):
        return process.submit(way, folder, args).result()


def phase(name: str, do: Callable[[], object], device: torch.device) -> tuple[object, dict[str, float]]:
    """-> what `do` returns; its seconds and the host's memory."""
    with watched(torch.device("cpu")) as held:
        got, seconds = clock(do, device)
    return got, {f"{name}_s": seconds, f"{name}_anon": held["above"], f"{name}_file": held["file"]}


def first_passes(passes: dict[str, Callable[[], Tensor]], device: torch.device) -> dict:
    """Seconds of a process's first pass of each kind; on CUDA of its second, for the first one also fetches kernels."""

    def each() -> dict[str, tuple]:
        return {name: clock(one_pass, device) for name, one_pass in passes.items()}

    if device.type == "cuda":
        each()
    got, held = phase("score", each, device)
    del held["score_s"]
    hidden = got["joint"][0].float().cpu().numpy()
    return {f"{name}_s": seconds for name, (_, seconds) in got.items()} | held | {"hidden": hidden}


def clone_all(folder: Path, args: argparse.Namespace) -> dict:
    """safetensors alone: open, clone every tensor"""

    def clone() -> None:
        for shard in shards(folder):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():
                    file.get_tensor(name).clone()

    return phase("load", clone, torch.device("cpu"))[1]


@torch.no_grad()
def load_ours(folder: Path, args: argparse.Namespace) -> dict:
    """yojo"""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model, found = phase("load", lambda: load_backbone(folder, dtype, device, lm_head=False), device)
    if args.compile:  # on five tokens, of which two are read: what compiling takes is not counted
        model.fuse()
        model(torch.zeros(1, 5, dtype=torch.long, device=device), keep=torch.tensor([[0, 1], [0, 3]]))
    _, row = question(folder, model.config.text.max_position_embeddings, args.n)

    def one_pass(batch: Batch) -> Tensor:
        inputs = batch.input_ids, model.encode_images(batch.pictures), batch.mask, batch.positions
        return model(*inputs, keep=batch.score_positions)

    passes = {mode: partial(one_pass, collate([row], mode, device=device)) for mode in MODES}
    return found | {"weights": sum(p.nbytes for p in model.parameters())} | first_passes(passes, device)


@torch.no_grad()
def load_theirs(folder: Path, args: argparse.Namespace) -> dict:
    """transformers, all hidden states and logits kept"""
    import transformers  # noqa: F401  seconds that are no part of loading

    device = torch.device(args.device)
    model, found = phase("load", lambda: load_peer(folder, args, getattr(torch, args.dtype)), device)
    _, row = question(folder, model.config.text_config.max_position_embeddings, args.n)
    batch = collate([row], "joint", device=device)
    inputs = dict(input_ids=batch.input_ids, mm_token_type_ids=batch.mask.image.long().to(device))
    inputs["pixel_values"] = batch.pictures.patches.to(device)
    inputs["image_token_pooling"] = batch.pictures.pooling.to(device)
    inputs["image_grids"] = torch.tensor(batch.pictures.grids, device=device)

    def one_pass() -> Tensor:
        out = model(**inputs, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0, row.score_positions]

    found["weights"] = sum(p.nbytes for p in model.parameters())
    return found | first_passes({"joint": one_pass}, device)
