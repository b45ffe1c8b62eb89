"""Measure what one pass costs, against everything that could be run instead.

    python -m yojo.bench load --peer                 load a checkpoint and score one picture with four answers
    python -m yojo.bench score --layers 2 --peer     one pass against N passes, a batch, a cached prompt, transformers
    python -m yojo.bench train --layers 2 --peer     one training step, against the same trunk in `peft`
    python -m yojo.bench batch                       many records of unequal length: sorted batches, or one by one
    python -m yojo.bench drift                       what bfloat16 changes in scores and in rankings

Machines are noisy: the alternatives of one table take turns in the same run, ratios are taken round by round, and
medians are printed. `load` gives every alternative a process of its own and empties the page cache of the files first.
Without --weights a random checkpoint is written to a temporary folder and removed.

Tokens per second are the answers'. Share of peak: FLOPs per second of the pass, over those of the block's own four
matrices alone, by `F.linear` and at as many tokens. It may exceed 1 where the pass knows a faster way to multiply.
"""

import argparse
import ctypes
import gc
import importlib.util
import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from yojo.cli import COMPILE, DTYPES, Parser, run, shipped
from yojo.core import flops, lora
from yojo.core.data import Batch, collate
from yojo.core.generate import Cache
from yojo.core.lora import LoraConfig
from yojo.core.loss import best_of_n
from yojo.core.mask import MODES
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Encoded, Processor
from yojo.core.reward import ADAPTER, RewardModel, ValueHead
from yojo.files import InputError
from yojo.initial import SIZES, size_config, write_random
from yojo.tiny import world
from yojo.weights import load_backbone, read_config, shards

SEPARATE, CACHED, JOINT = "N separate passes", "prompt once, batch of N after it", "one pass, joint"
QUESTION = "Which of these answers describes the picture best?"
PICTURE = (1024, 768)
PEERS = {"load": ("transformers",), "score": ("transformers",), "train": ("transformers", "peft")}

# -------------------------------------------------------------------------------------------------------- instruments


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """Bytes of anonymous and of file-backed memory that a process holds now; none once it is ending."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        status = ""
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
    return {name: int(fields.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class Peak:
    """The most memory held inside the block, sampled; `above` is what it grew by. On CUDA the allocator counts."""

    def __init__(self, device: torch.device):
        self.device, self.stop = device, threading.Event()

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
            self.start = self.peak = memory_of()["RssAnon"]
            self.thread = threading.Thread(target=self._sample)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, memory_of()["RssAnon"])

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()
        self.above = self.peak - self.start


def clock(do: Callable[[], object], device: torch.device) -> float:
    """Seconds that `do` takes, on whatever device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    arms: dict[str, Callable], rounds: int, device: torch.device, seed: int
) -> tuple[dict[str, list[float]], dict]:
    """Every arm once to warm up and once with its memory watched, then `rounds` rounds -> seconds by arm and round,
    bytes by arm. Every other round is in an order drawn anew, the next one in its reverse, so that no arm always finds
    the memory that the same other one left."""
    above = {}
    for name, arm in arms.items():
        arm()
        with Peak(device) as peak:
            arm()
        above[name] = peak.above
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order, rng = list(arms), random.Random(seed)
    for i in tqdm(range(rounds), "rounds", delay=2, leave=False):
        order = order[::-1] if i % 2 else rng.sample(order, len(order))
        for name in order:
            seconds[name].append(clock(arms[name], device))
    return seconds, above


def largest(values: Iterable[float]) -> float:
    """NaN where a value is NaN, which Python's `max` may pass over."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of (seconds of one arm) / (seconds of another)."""
    return median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peer_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise InputError(f"--peer needs the package {name}: pip install -r requirements-dev.txt")


@contextmanager
def checkpoint(args: argparse.Namespace) -> Iterator[Path]:
    """--weights, or a random checkpoint for as long as it is needed."""
    if args.weights:
        yield args.weights
        return
    folder = Path(tempfile.mkdtemp(prefix="yojo-bench-"))
    try:
        config = size_config(args.size, args.layers, args.vision_layers)
        write_random(folder / "weights", args.size, config, torch.float32, 4, args.seed)
        yield folder / "weights"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- load


def compare_load(args: argparse.Namespace) -> list[dict]:
    """Each arm in a process of its own, the order turned round every round."""
    arms = [clone_all, load_ours] + ([load_theirs] if args.peer else [])
    rows: dict[str, list[dict]] = {arm.__name__: [] for arm in arms}
    device = torch.device(args.device)
    with checkpoint(args) as folder:
        print(hardware(device) + f"; {args.dtype}; {args.n} answers; page cache of the files emptied before each turn")
        for i in range(args.rounds):
            for arm in arms if i % 2 == 0 else arms[::-1]:
                rows[arm.__name__].append(alone(arm, folder, args))
    table = []
    for arm in arms:
        many = rows[arm.__name__]
        table.append(
            {"arm": arm.__doc__, **{key: median(row[key] for row in many) for key in many[0] if key != "hidden"}}
        )
    print_load(table)
    if device.type == "cuda":
        print("GB are the host's memory")
    weights, slower = table[1]["weights"], ratios(rows, "load_ours", "clone_all", "load_s")
    print(f"\nweights {weights / 1e9:.2f} GB; peak anonymous memory while loading:", end=" ")
    print(f"{table[1]['load_anon'] / weights:.2f} of it")
    print(f"loading took {slower:.2f} times as long as opening and cloning")
    if args.peer:
        ours, theirs = rows["load_ours"][0]["hidden"], rows["load_theirs"][0]["hidden"]
        table[1]["difference"] = float(abs(ours - theirs).max() / abs(theirs).max())
        table[2]["times_ours"] = ratios(rows, "load_theirs", "load_ours", "joint_s")
        table[1]["memory_ratio"] = ratios(rows, "load_ours", "load_theirs", "score_anon")
        print(f"transformers' way took {table[2]['times_ours']:.2f} times as long to score; ours took")
        print(
            f"{table[1]['memory_ratio']:.2f} of its memory above the weights; the hidden states that are read differ by"
        )
        print(f"{table[1]['difference']:.1e} of their largest value")
    return table


def print_load(table: list[dict]) -> None:
    columns = {"load_s": "load s", "load_anon": "anon GB", "load_file": "file GB", "joint_s": "joint s"}
    columns |= {"isolated_s": "isolated s", "score_anon": "scoring GB"}
    print(f"\n{'':46s}" + "".join(f"{title:>11s}" for title in columns.values()))
    for row in table:
        scaled = {key: row[key] / (1 if key.endswith("_s") else 1e9) for key in columns if key in row}
        cells = [f"{scaled[key]:.2f}" if key in scaled else "-" for key in columns]
        print(f"{row['arm']:46s}" + "".join(f"{cell:>11s}" for cell in cells))


def ratios(rows: dict[str, list[dict]], of: str, to: str, key: str) -> float:
    return median(a[key] / max(b[key], 1e-9) for a, b in zip(rows[of], rows[to], strict=True))


def alone(arm: Callable, folder: Path, args: argparse.Namespace) -> dict:
    """Run one arm in a fresh process, its memory sampled from outside."""
    for shard in shards(folder):
        with open(shard, "rb") as file:
            os.fsync(file.fileno())  # pages that are not yet on the disk would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_call, args=(arm, folder, args, theirs))
    process.start()
    theirs.close()
    result, peak = {}, {"RssAnon": 0, "RssFile": 0}
    start = None
    while True:
        if ours.poll(0.01):
            try:
                message = ours.recv()
            except EOFError:
                break
            if "error" in message:
                raise InputError(message["error"])
            if "begin" in message:
                start, peak = memory_of(process.pid), {"RssAnon": 0, "RssFile": 0}
            else:
                phase = message.pop("phase")
                result |= message | {
                    f"{phase}_anon": max(0, peak["RssAnon"] - start["RssAnon"]),
                    f"{phase}_file": peak["RssFile"],
                }
        elif process.is_alive():
            now = memory_of(process.pid)
            peak = {name: max(peak[name], now[name]) for name in peak}
    process.join()
    if process.exitcode:
        raise InputError(f"{arm.__name__} ended with status {process.exitcode}: too little memory?")
    return result


def _call(arm: Callable, folder: Path, args: argparse.Namespace, pipe) -> None:
    try:
        arm(folder, args, pipe)
    except InputError as error:
        pipe.send({"error": str(error)})
    pipe.close()


def clone_all(folder: Path, args: argparse.Namespace, pipe) -> None:
    """safetensors alone: open, clone every tensor"""
    pipe.send({"begin": 1})
    start = time.perf_counter()
    for shard in shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                file.get_tensor(name).clone()
    pipe.send({"phase": "load", "load_s": time.perf_counter() - start})


def question(folder: Path, n: int) -> tuple[Processor, Encoded]:
    """One picture of noise, n answers of about a hundred words."""
    rng, config = random.Random(0), read_config(folder)
    processor = Processor.from_folder(folder, config.text.max_position_embeddings)
    small = processor.images.size < 300
    width, height = (84, 84) if small else PICTURE
    picture = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    words = "small large red blue green star circle cross square left right centre".split()
    answers = [" ".join(rng.choices(words, k=10 if small else 100)) for _ in range(n)]
    return processor, processor.encode(QUESTION, answers, picture)


def first_pass(score: Callable[[], object], device: torch.device) -> float:
    """Seconds of a process's first pass; on CUDA of its second, for the first one also fetches kernels."""
    if device.type == "cuda":
        score()
    return clock(score, device)


def load_ours(folder: Path, args: argparse.Namespace, pipe) -> None:
    """yojo"""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    processor, encoded = question(folder, args.n)
    pipe.send({"begin": 1})
    start = time.perf_counter()
    backbone = load_backbone(folder, dtype, device, lm_head=False)
    pipe.send(
        {
            "phase": "load",
            "load_s": time.perf_counter() - start,
            "weights": sum(p.nbytes for p in backbone.parameters()),
        }
    )
    with torch.no_grad():
        hidden, seconds = {}, {}
        if args.compile:  # on five tokens, of which two are read: what compiling takes is not counted
            backbone.fuse()
            backbone(torch.zeros(1, 5, dtype=torch.long, device=device), keep=torch.tensor([[0, 1], [0, 3]]))
        pipe.send({"begin": 1})
        for mode in MODES:
            batch = collate([encoded], mode, device=device)

            def one_pass(batch=batch, mode=mode):
                inputs = batch.input_ids, backbone.encode_images(batch.pictures), batch.mask, batch.positions
                hidden[mode] = backbone(*inputs, keep=batch.score_positions)

            seconds[f"{mode}_s"] = first_pass(one_pass, device)
    pipe.send({"phase": "score", **seconds, "hidden": hidden["joint"].float().cpu().numpy()})


def load_theirs(folder: Path, args: argparse.Namespace, pipe) -> None:
    """transformers, all hidden states and logits kept"""
    from transformers import Molmo2ForConditionalGeneration

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    processor, encoded = question(folder, args.n)
    pipe.send({"begin": 1})
    start = time.perf_counter()
    model = Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    pipe.send(
        {"phase": "load", "load_s": time.perf_counter() - start, "weights": sum(p.nbytes for p in model.parameters())}
    )
    batch = collate([encoded], "joint", device=device)
    inputs = dict(
        input_ids=batch.input_ids,
        mm_token_type_ids=batch.mask.image.long(),
        pixel_values=batch.pictures.patches.to(device),
        image_token_pooling=batch.pictures.pooling.to(device),
        image_grids=torch.tensor(batch.pictures.grids, device=device),
    )
    kept = {}

    def one_pass():
        kept["out"] = model(**inputs, output_hidden_states=True, use_cache=False)

    with torch.no_grad():
        pipe.send({"begin": 1})
        seconds = first_pass(one_pass, device)
    hidden = kept["out"].hidden_states[-1][0, encoded.score_positions]
    pipe.send({"phase": "score", "joint_s": seconds, "hidden": hidden.float().cpu().numpy()})


# -------------------------------------------------------------------------------------------------------------- score


class Setting:
    """A model, and one record of random tokens: a prompt of P with a picture in it, N responses of R."""

    def __init__(self, folder: Path, args: argparse.Namespace, dtype: torch.dtype):
        self.seed, self.device = args.seed, torch.device(args.device)
        self.backbone = load_backbone(folder, dtype, self.device)
        if args.compile:
            self.backbone.fuse()
        self.config = self.backbone.config
        self.head = ValueHead(self.config.text.hidden_size, 1024).to(self.device, torch.float32)
        self.processor, self.encoded = question(folder, 1)
        self.separator = self.processor.tokenizer.separator_id
        self.pictures = self.backbone.keep_features(self.encoded.pictures)

    def prompted(self, P: int) -> "Setting":
        """A prompt of P tokens."""
        tokens, room = int(self.encoded.image.sum()), self.config.text.max_position_embeddings
        if not tokens + 2 <= P <= room:
            raise InputError(f"--prompt-tokens {P}: at least {tokens + 2}, with the picture's {tokens}, at most {room}")
        self.generator = torch.Generator().manual_seed(self.seed)
        ids = [*self.encoded.ids[: tokens + 1].tolist(), *self.random_tokens(P - tokens - 1)]
        self.prompt = self.processor.row(ids, self.pictures)
        return self

    def random_tokens(self, count: int) -> list[int]:
        return torch.randint(300, (count,), generator=self.generator).tolist()

    @torch.no_grad()
    def encode_images(self) -> Tensor:
        return self.backbone.encode_images(self.encoded.pictures)

    def row_of(self, responses: list[list[int]]) -> Encoded:
        return self.prompt.continued(responses, self.separator)

    def batch(self, records: list[Encoded], mode: str) -> Batch:
        return collate(records, mode, device=self.device)

    def run(self, batch: Batch) -> Tensor:
        inputs = batch.input_ids, batch.pictures.features, batch.mask, batch.positions
        return self.head(self.backbone(*inputs, keep=batch.score_positions))


def arms_of(s: Setting, n: int, R: int, peer) -> dict[str, Callable]:
    """What gives N scores, by name. Rows are laid out beforehand; the pictures have been looked at."""
    responses = [s.random_tokens(R) for _ in range(n)]
    alone = [s.row_of([r]) for r in responses]
    each = [s.batch([record], "joint") for record in alone]
    padded = s.batch(alone, "joint")
    whole = s.row_of(responses)
    rows = {mode: s.batch([whole], mode) for mode in MODES}
    P = len(s.prompt.ids)
    prompt = s.batch([s.prompt], "joint")
    tails = torch.tensor(responses, device=s.device)
    ends = torch.tensor([[i, R - 1] for i in range(n)], device=s.device)
    nothing = torch.empty(0, 2, dtype=torch.long, device=s.device)

    def cached():
        cache = Cache(s.config)
        inputs = prompt.input_ids, prompt.pictures.features, prompt.mask, prompt.positions
        s.backbone(*inputs, keep=nothing, cache=cache)
        cache.expand(n)
        positions = torch.arange(P, P + R, device=s.device).expand(n, R)
        return s.head(s.backbone(tails, positions=positions, keep=ends, cache=cache))

    arms = {
        SEPARATE: lambda: [s.run(batch) for batch in each],
        "one padded batch of N": lambda: s.run(padded),
        CACHED: cached,
        "one pass, isolated": lambda: s.run(rows["isolated"]),
        JOINT: lambda: s.run(rows["joint"]),
    }
    if peer is not None:
        batch = rows["joint"]
        inputs = dict(inputs_embeds=s.backbone.embed(batch.input_ids, batch.pictures.features), use_cache=False)
        inputs["mm_token_type_ids"] = batch.mask.image.long()
        arms["transformers, bare trunk"] = lambda: peer.model(**inputs).last_hidden_state
        arms["transformers, released way"] = lambda: peer(**inputs, output_hidden_states=True)
    return arms


def peak_rate(s: Setting, tokens: int) -> Callable[[], object]:
    """The block's four matrices as bare products: their FLOPs over the seconds this takes is the peak."""
    sizes = s.config.text.matrices.values()
    inputs = {m: torch.randn(tokens, m, device=s.device).to(s.backbone.dtype) for m, _ in sizes}
    matrices = [torch.randn(n, m, device=s.device).to(s.backbone.dtype) for m, n in sizes]
    return lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in matrices]


def compare_score(args: argparse.Namespace) -> list[dict]:
    table = []
    with checkpoint(args) as folder, torch.no_grad():
        for name in args.dtypes:
            dtype = getattr(torch, name)
            s, peer = Setting(folder, args, dtype), load_peer(folder, args, dtype)
            s.prompted(min(args.prompt_tokens)).prompted(max(args.prompt_tokens))  # refused before anything is measured
            c, looking = s.config.text, median(clock(s.encode_images, s.device) for _ in range(3))
            print(f"\n{hardware(s.device)}; {name}; {c.num_hidden_layers} blocks of width {c.hidden_size}, ", end="")
            print(f"R = {args.response_tokens}; medians of {args.rounds} rounds")
            print(f"looking at the picture: {looking:.2f} s")
            for P in args.prompt_tokens:
                for n in args.n:
                    table += score_n(s.prompted(P), n, args, peer, name, looking)
            del s, peer
            gc.collect()
    return table


def load_peer(folder: Path, args: argparse.Namespace, dtype: torch.dtype):
    if not args.peer:
        return None
    from transformers import Molmo2ForConditionalGeneration

    return Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(args.device).eval()


def score_n(s: Setting, n: int, args: argparse.Namespace, peer, dtype: str, looking: float) -> list[dict]:
    R, P = args.response_tokens, len(s.prompt.ids)
    whole = s.row_of([[0] * R] * n)
    arms = arms_of(s, n, R, peer)
    seconds, above = take_turns(arms | {"bare": peak_rate(s, len(whole.ids))}, args.rounds, s.device, args.seed)
    bare = sum(2 * len(whole.ids) * a * b for a, b in s.config.text.matrices.values())
    one = {f"one pass, {mode}": sum(flops.one_pass(s.config, whole, mode).values()) for mode in MODES}
    counted = {SEPARATE: flops.separate(s.config, whole), **one}
    rows = [{"arm": name, "seconds": median(seconds[name]), "above": above[name]} for name in arms]
    for row in rows:
        row["tokens_per_s"] = n * R / row["seconds"]
        row["times_joint"], row["times_cached"] = (ratio(seconds, row["arm"], to) for to in (JOINT, CACHED))
        if row["arm"] in counted:
            row["counted"] = counted[row["arm"]] / counted[JOINT]
        if row["arm"] in one:  # the others multiply other numbers of tokens
            row["of_peak"] = counted[row["arm"]] / bare * ratio(seconds, "bare", row["arm"])
    images, both = flops.images(s.config, s.encoded.pictures), {"arm": f"{SEPARATE}, and the picture"}
    plus = {name: [t + looking for t in seconds[name]] for name in (SEPARATE, JOINT)}
    both |= {"seconds": median(plus[SEPARATE]), "times_joint": ratio(plus, SEPARATE, JOINT)}
    both["counted"] = (counted[SEPARATE] + images) / (counted[JOINT] + images)
    rows.append(both)
    print_score(f"P = {P}, N = {n}", rows)
    return [{"dtype": dtype, "prompt_tokens": P, "n": n, **row} for row in rows]


def print_score(title: str, rows: list[dict]) -> None:
    columns = {"seconds": ".3f", "tokens_per_s": ".0f", "above": ".3f", "times_joint": ".2f", "times_cached": ".2f"}
    columns |= {"counted": ".2f", "of_peak": ".2f"}
    titles = ["above, GB" if key == "above" else key.replace("_", " ") for key in columns]
    print(f"\n{title:34s}" + "".join(f"{title:>13s}" for title in titles))
    for row in rows:
        scaled = row | ({"above": row["above"] / 1e9} if "above" in row else {})
        cells = [format(scaled[key], form) if key in scaled else "-" for key, form in columns.items()]
        print(f"{row['arm']:34s}" + "".join(f"{cell:>13s}" for cell in cells))


# -------------------------------------------------------------------------------------------------------------- train


def compare_train(args: argparse.Namespace) -> list[dict]:
    """One step: forward, backward, with activation checkpointing and LoRA of rank 128 on all decoder matrices."""
    table = []
    with checkpoint(args) as folder:
        for name in args.dtypes:
            for n in args.n:
                table += train_n(folder, args, name, n)
                gc.collect()
    return table


def train_n(folder: Path, args: argparse.Namespace, name: str, n: int) -> list[dict]:
    config = LoraConfig(dropout=0.0)
    s = Setting(folder, args, getattr(torch, name)).prompted(args.prompt_tokens)
    R = args.response_tokens
    row = s.row_of([s.random_tokens(R) for _ in range(n)])
    batch, tokens = s.batch([row], "joint"), len(row.ids)
    ranks = torch.arange(1, n + 1, device=s.device)[None]
    lora.add(s.backbone, ADAPTER, config)
    s.backbone.train().checkpointing = True

    def step(model: Molmo2, parameters: list) -> None:
        inputs = batch.input_ids, batch.pictures.features, batch.mask, batch.positions
        hidden = model(*inputs, keep=batch.score_positions)
        best_of_n(s.head(hidden)[None], ranks).backward()
        for p in parameters:
            p.grad = None

    def ours():
        with lora.use(s.backbone, ADAPTER):
            step(s.backbone, lora.parameters(s.backbone, ADAPTER))

    arms = {"ours": ours}
    if args.peer:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        other = load_backbone(folder, s.backbone.dtype, s.device)
        if args.compile:
            other.fuse()
        other.train().checkpointing = True
        targets = list(config.targets)
        wrapped = get_peft_model(other, PeftConfig(r=config.r, lora_alpha=int(config.alpha), target_modules=targets))
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        arms["our trunk in peft"] = lambda: step(wrapped, parameters)
        arms["their trunk in peft"] = their_step(s, load_peer(folder, args, s.backbone.dtype), batch, ranks, config)
    arms["bare products"] = peak_rate(s, tokens)
    seconds, above = take_turns(arms, args.rounds, s.device, args.seed)
    count = flops.training_step(s.config, row, "joint", config.r, 1024)
    bare = sum(2 * tokens * a * b for a, b in s.config.text.matrices.values())
    print(f"\n{hardware(s.device)}; {name}; one step of {n} answers, {tokens} tokens; {count / 1e12:.2f} TFLOPs")
    rows = []
    for arm in arms:
        if arm != "bare products":
            row = {"dtype": name, "n": n, "arm": arm, "seconds": median(seconds[arm]), "above": above[arm]}
            row["times_ours"] = ratio(seconds, arm, "ours")
            if arm != "their trunk in peft":  # another adapter, another count
                row["of_peak"] = count / bare * ratio(seconds, "bare products", arm)
            rows.append(row)
            print(
                f"{arm:24s}{row['seconds']:8.3f} s{row['above'] / 1e9:9.3f} GB above{row['times_ours']:8.3f} x ours",
                end="",
            )
            print(f"{row['of_peak']:8.2f} of peak" if "of_peak" in row else "")
    return rows


# -------------------------------------------------------------------------------------------------------------- batch


def tiny_rows(rm: RewardModel, count: int, seed: int) -> list[Encoded]:
    """Records of the tiny world, of 2 to 8 answers, without or with a picture."""
    rng, records = random.Random(seed), []
    for _ in range(count):
        scene = world.make_scene(rng)
        record = world.absolute(scene, rng, rng.randint(2, 8))
        picture = world.render(scene) if rng.random() < 0.5 else None
        records.append(rm.processor.encode(record["prompt"], record["responses"], picture))
    return records


@torch.no_grad()
def compare_batch(args: argparse.Namespace) -> list[dict]:
    """Many records of unequal length, scored by the shipped model in two ways."""
    rm = RewardModel.load(shipped("weights/tiny-rm"), device=args.device)
    records = tiny_rows(rm, args.n, args.seed)
    scores = {}

    def single():
        scores["single"] = [rm.score_encoded([record])[0] for record in records]

    def sorted_():
        scores["sorted"] = list(rm.score_all(records))

    arms = {"one by one": single, "sorted batches": sorted_}
    seconds, above = take_turns(arms, args.rounds, torch.device(args.device), args.seed)
    apart = largest(abs(a - b) for x, y in zip(*scores.values(), strict=True) for a, b in zip(x, y, strict=True))
    lengths = sorted(len(record.ids) for record in records)
    print(f"{hardware(torch.device(args.device))}; {args.n} records of {lengths[0]} to {lengths[-1]} tokens")
    rows = []
    for arm in arms:
        row = {"arm": arm, "seconds": median(seconds[arm]), "above": above[arm]}
        rows.append(row | {"times_sorted": ratio(seconds, arm, "sorted batches"), "difference": apart})
        print(
            f"{arm:16s}{row['seconds']:8.3f} s{row['above'] / 1e9:9.3f} GB above"
            f"{rows[-1]['times_sorted']:8.2f} x sorted"
        )
    print(f"scores differ by at most {apart:.1e}")
    return rows


def compare_drift(args: argparse.Namespace) -> list[dict]:
    """The same records by the same shipped models in float32 and in bfloat16."""
    rows = []
    for name in ("tiny-rm", "tiny-rm-isolated"):
        scores = []
        for dtype in (torch.float32, torch.bfloat16):
            rm = RewardModel.load(shipped(f"weights/{name}"), dtype=dtype, device=args.device)
            scores.append(list(rm.score_all(tiny_rows(rm, args.n, args.seed))))
            if not all(math.isfinite(score) for group in scores[-1] for score in group):
                raise FloatingPointError(f"{name} in {dtype}: scores are not finite")
        pairs = list(zip(*scores, strict=True))
        apart = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)]
        spread = median(max(x) - min(x) for x, _ in pairs)
        winners = sum(x.index(max(x)) != y.index(max(y)) for x, y in pairs)
        flips = [
            (x[i] - x[j]) * (y[i] - y[j]) < 0 for x, y in pairs for i in range(len(x)) for j in range(i) if x[i] != x[j]
        ]
        most, typical = max(apart), median(apart)
        row = {"model": name, "groups": len(pairs), "largest": most, "median": typical, "spread": spread}
        rows.append(row | {"winners_changed": winners, "pairs": len(flips), "pairs_flipped": sum(flips)})
        print(f"{name}: {len(pairs)} groups; a score moves by {typical:.3f} (median), {most:.3f} at most,")
        print(f"where best and worst of a group are {spread:.1f} apart (median); {winners} winners change, and")
        print(f"{sum(flips)} of {len(flips)} pairs of answers change places")
    return rows


def their_step(s: Setting, peer, batch: Batch, ranks: Tensor, config: LoraConfig) -> Callable[[], None]:
    """The same step on `transformers`' trunk. There queries, keys, values, gate and up are matrices of their own, so
    this is seven pairs a block where ours are four: another adapter, with more numbers."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trunk = peer.model.requires_grad_(False)
    trunk.language_model = get_peft_model(
        trunk.language_model, PeftConfig(r=config.r, lora_alpha=int(config.alpha), target_modules=targets)
    ).base_model.model
    trunk.train().activation_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    inputs = dict(inputs_embeds=s.backbone.embed(batch.input_ids, batch.pictures.features).detach(), use_cache=False)
    inputs["mm_token_type_ids"] = batch.mask.image.long()

    def step():
        hidden = trunk(**inputs).last_hidden_state[tuple(batch.score_positions.T)]
        best_of_n(s.head(hidden)[None], ranks).backward()
        for p in parameters:
            p.grad = None

    return step


def check(args: argparse.Namespace) -> None:
    sizes = args.n if isinstance(args.n, list) else [args.n]
    sizes = sizes + [getattr(args, name, 1) for name in ("rounds", "response_tokens")]
    if min(sizes) < 1:
        raise InputError("--n, --response-tokens and --rounds count from 1")


# ------------------------------------------------------------------------------------------------------------ command


def main() -> None:
    parser = Parser(
        prog="python -m yojo.bench", description="Measure loading, scoring and training against alternatives."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("load", "load a checkpoint, score a picture"),
        ("score", "N scores, every way"),
        ("train", "one step"),
        ("batch", "many records of the tiny world"),
        ("drift", "what bfloat16 changes"),
    ):
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
        if name != "drift":
            sub.add_argument("--rounds", type=int, default=2 if name == "load" else 5, help="turns of each alternative")
        if name in ("batch", "drift"):
            sub.add_argument("--n", type=int, default=256 if name == "batch" else 500, metavar="N", help="records")
            continue
        sub.add_argument("--weights", type=Path, metavar="DIR", help="a checkpoint; else a random one is written")
        sub.add_argument("--size", "--shape", choices=SIZES, default=SIZES[0], help="of the random one")
        sub.add_argument("--layers", type=int, metavar="K", help="its decoder blocks, where not all")
        sub.add_argument("--vision-layers", type=int, metavar="K", help="its vision layers, where not all")
        sub.add_argument("--peer", action="store_true", help="measure transformers or peft beside it")
        sub.add_argument("--compile", **COMPILE)
        if name == "load":
            sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="what to compute in")
            sub.add_argument("--n", type=int, default=4, metavar="N", help="answers")
            continue
        many = {"nargs": "+"} if name == "score" else {}
        sub.add_argument("--dtypes", choices=DTYPES, nargs="+", default=[*DTYPES], help="what to compute in")
        counts, tokens = ([2, 4, 8], [1040]) if name == "score" else ([4], 1040)
        sub.add_argument("--n", type=int, nargs="+", default=counts, metavar="N", help="answers")
        sub.add_argument("--prompt-tokens", type=int, default=tokens, metavar="P", help="with the picture's", **many)
        sub.add_argument("--response-tokens", type=int, default=100, metavar="R", help="of each answer")
    args = parser.parse_args()
    run(lambda: run_command(args), parser, args)


def run_command(args: argparse.Namespace) -> list[dict]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device")
    check(args)
    for package in PEERS[args.command] if getattr(args, "peer", False) else ():
        peer_package(package)
    commands = {
        "load": compare_load,
        "score": compare_score,
        "train": compare_train,
        "batch": compare_batch,
        "drift": compare_drift,
    }
    return commands[args.command](args)


if __name__ == "__main__":
    main()
