"""Measure what one pass costs, against everything that could be run instead.

    python -m yojo.bench load --peer                 load a checkpoint and score one picture with four answers
    python -m yojo.bench score --layers 2 --peer     one pass against N passes, a batch, a cached prompt, transformers
    python -m yojo.bench train --layers 2 --peer     one training step, against the same trunk in `peft`
    python -m yojo.bench batch                       many records of unequal length: sorted batches, or one by one

Machines are noisy: the alternatives of one table take turns in the same run, ratios are taken round by round, and
medians are printed. `load` gives every alternative a process of its own and empties the page cache of the files first.
Without --weights a random checkpoint is written to a temporary folder and removed.

Tokens per second are the answers'. Share of peak: FLOPs per second of the pass, over those of the block's own four
matrices alone, by `F.linear` and at as many tokens. It may exceed 1 where the pass knows a faster way to multiply.

See it: `pytest tests/test_bench.py`.
"""

import argparse
import ctypes
import gc
import importlib.util
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from yojo.cli import DTYPES, Parser, add_model_options, run, shipped, table, whole
from yojo.core import flops, lora
from yojo.core.data import Batch, collate
from yojo.core.generate import Cache
from yojo.core.lora import LoraConfig
from yojo.core.loss import best_of_n
from yojo.core.mask import MODES
from yojo.core.prompt import Encoded, Processor
from yojo.core.reward import ADAPTER, RewardModel, ValueHead
from yojo.files import InputError
from yojo.initial import SIZES, size_config, write_random
from yojo.tiny import world
from yojo.weights import load_backbone, shards

SEPARATE, CACHED, JOINT = "N separate passes", "prompt once, batch of N after it", "one pass, joint"
QUESTION = "Which of these answers describes the picture best?"
PICTURE = (1024, 768)
PEERS = {"load": "transformers", "score": "transformers", "train": "peft"}

# -------------------------------------------------------------------------------------------------------- instruments


def memory() -> dict[str, int]:
    """Bytes of anonymous and of file-backed memory that this process holds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {name: int(fields[f"Rss{name.title()}"].split()[0]) * 1024 for name in ("anon", "file")}


class Peak:
    """The most memory held inside the block, sampled; `above` is what its anonymous part grew by. On CUDA the allocator
    counts `above`."""

    def __init__(self, device: torch.device):
        self.device, self.stop, self.thread = device, threading.Event(), threading.Thread(target=self._sample)

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
        self.start = self.most = memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.002):
            now = memory()
            self.most = {name: max(self.most[name], now[name]) for name in now}

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        self.above = self.most["anon"] - self.start["anon"]
        if self.device.type == "cuda":
            self.above = torch.cuda.max_memory_allocated() - self.allocated


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
    """Median over rounds of (seconds, or bytes, of one arm) / (those of another)."""
    return median(a / max(b, 1e-9) for a, b in zip(seconds[of], seconds[to], strict=True))


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """Bytes of a row, "above" and what ends in _anon or _file, are shown in GB."""
    shown = [{k: v / 1e9 if k == "above" or k.endswith(("_anon", "_file")) else v for k, v in r.items()} for r in rows]
    print(table(shown, {"arm": "<"} | columns))


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@contextmanager
def checkpoint(args: argparse.Namespace) -> Iterator[Path]:
    """--weights, or a random checkpoint for as long as it is needed."""
    if args.weights:
        yield args.weights
        return
    with tempfile.TemporaryDirectory(prefix="yojo-bench-") as folder:
        config = size_config(args.size, args.layers, args.vision_layers)
        write_random(Path(folder) / "weights", args.size, config, torch.float32, args.seed)
        yield Path(folder) / "weights"


def question(processor: Processor, n: int) -> Encoded:
    """One picture of noise, n answers of about a hundred words."""
    rng, small = random.Random(0), processor.images.size < 300
    width, height = (84, 84) if small else PICTURE
    picture = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    words = "small large red blue green star circle cross square left right centre".split()
    return processor.encode(QUESTION, [" ".join(rng.choices(words, k=10 if small else 100)) for _ in range(n)], picture)


def load_peer(folder: Path, args: argparse.Namespace, dtype: torch.dtype):
    if not args.peer:
        return None
    from transformers import Molmo2ForConditionalGeneration

    return Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(args.device).eval()


# --------------------------------------------------------------------------------------------------------------- load


def compare_load(args: argparse.Namespace) -> list[dict]:
    """Each arm in a process of its own, the order turned round every round."""
    arms, device = [clone_all, load_ours] + ([load_theirs] if args.peer else []), torch.device(args.device)
    found: dict[str, list[dict]] = {arm.__name__: [] for arm in arms}
    with checkpoint(args) as folder:
        print(hardware(device) + f"; {args.dtype}; {args.n} answers; page cache of the files emptied before each turn")
        for i in range(args.rounds):
            for arm in arms if i % 2 == 0 else arms[::-1]:
                found[arm.__name__].append(alone(arm, folder, args))
    rows = []
    for arm in arms:
        many = found[arm.__name__]
        numbers = {key: median(row[key] for row in many) for key in many[0] if key != "hidden"}
        rows.append({"arm": arm.__doc__, **numbers})

    def by_arm(key: str) -> dict[str, list[float]]:
        return {name: [row[key] for row in many] for name, many in found.items() if key in many[0]}

    weights, slower = rows[1]["weights"], ratio(by_arm("load_s"), "load_ours", "clone_all")
    if args.peer:
        ours, theirs = found["load_ours"][0]["hidden"], found["load_theirs"][0]["hidden"]
        rows[1]["difference"] = float(abs(ours - theirs).max() / abs(theirs).max())
        rows[2]["times_ours"] = ratio(by_arm("joint_s"), "load_theirs", "load_ours")
        rows[1]["memory_ratio"] = ratio(by_arm("score_anon"), "load_ours", "load_theirs")
    print("\nseconds, and the host's memory in GB")
    timed = dict.fromkeys(("load_s", "load_anon", "load_file", "joint_s", "isolated_s", "score_anon"), ".2f")
    print_table(rows, timed | {"times_ours": ".2f", "memory_ratio": ".2f"})
    print(
        f"\nweights {weights / 1e9:.2f} GB; peak anonymous memory while loading: {rows[1]['load_anon'] / weights:.2f}",
        end="",
    )
    print(f" of it\nloading took {slower:.2f} times as long as opening and cloning")
    if args.peer:
        print(
            f"the hidden states that are read differ from transformers' by {rows[1]['difference']:.1e} of the largest"
        )
    return rows


def alone(arm: Callable, folder: Path, args: argparse.Namespace) -> dict:
    """Run one arm in a fresh process."""
    for shard in shards(folder):
        with open(shard, "rb") as file:
            os.fsync(file.fileno())  # pages that are not yet on the disk would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(arm, folder, args).result()
        except BrokenProcessPool:
            raise InputError(f"the process of {arm.__name__} was killed: too little memory?") from None


def timed(phase: str, do: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds and host memory of one phase."""
    with Peak(torch.device("cpu")) as peak:
        seconds = clock(do, device)
    return {f"{phase}_s": seconds, f"{phase}_anon": peak.above, f"{phase}_file": peak.most["file"]}


def clone_all(folder: Path, args: argparse.Namespace) -> dict:
    """safetensors alone: open, clone every tensor"""

    def clone() -> None:
        for shard in shards(folder):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():
                    file.get_tensor(name).clone()

    return timed("load", clone, torch.device("cpu"))


def score_once(passes: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of a process's first passes; on CUDA of its second ones, for the first also fetch kernels."""
    if device.type == "cuda":
        for one in passes.values():
            one()
    found: dict[str, float] = {}
    whole_phase = timed(
        "score", lambda: found.update({f"{k}_s": clock(one, device) for k, one in passes.items()}), device
    )
    return found | {key: value for key, value in whole_phase.items() if key != "score_s"}


@torch.no_grad()
def load_ours(folder: Path, args: argparse.Namespace) -> dict:
    """yojo"""
    device, kept, hidden = torch.device(args.device), {}, {}

    def load() -> None:
        kept["model"] = load_backbone(folder, getattr(torch, args.dtype), device, lm_head=False)

    result = timed("load", load, device)
    model = kept["model"]
    if args.compile:  # on five tokens, of which two are read: what compiling takes is not counted
        model.fuse()
        model(torch.zeros(1, 5, dtype=torch.long, device=device), keep=torch.tensor([[0, 1], [0, 3]]))
    row = question(Processor.from_folder(folder, model.config.text.max_position_embeddings), args.n)

    def one_pass(batch: Batch, mode: str) -> None:
        inputs = batch.input_ids, model.encode_images(batch.pictures), batch.mask, batch.positions
        hidden[mode] = model(*inputs, keep=batch.score_positions)

    batches = {mode: collate([row], mode, device=device) for mode in MODES}
    passes = {mode: lambda mode=mode: one_pass(batches[mode], mode) for mode in MODES}
    result |= score_once(passes, device) | {"weights": sum(p.nbytes for p in model.parameters())}
    return result | {"hidden": hidden["joint"].float().cpu().numpy()}


@torch.no_grad()
def load_theirs(folder: Path, args: argparse.Namespace) -> dict:
    """transformers, all hidden states and logits kept"""
    device, kept = torch.device(args.device), {}

    def load() -> None:
        kept["model"] = load_peer(folder, args, getattr(torch, args.dtype))

    result = timed("load", load, device)
    model = kept["model"]
    row = question(Processor.from_folder(folder, model.config.text_config.max_position_embeddings), args.n)
    batch = collate([row], "joint", device=device)
    inputs = dict(input_ids=batch.input_ids, mm_token_type_ids=batch.mask.image.long())
    inputs["pixel_values"] = batch.pictures.patches.to(device)
    inputs["image_token_pooling"] = batch.pictures.pooling.to(device)
    inputs["image_grids"] = torch.tensor(batch.pictures.grids, device=device)

    def one_pass() -> None:
        kept["out"] = model(**inputs, output_hidden_states=True, use_cache=False)

    result |= score_once({"joint": one_pass}, device) | {"weights": sum(p.nbytes for p in model.parameters())}
    return result | {"hidden": kept["out"].hidden_states[-1][0, row.score_positions].float().cpu().numpy()}


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
        self.processor = Processor.from_folder(folder, self.config.text.max_position_embeddings)
        self.encoded = question(self.processor, 1)
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
        return self.prompt.continued(responses, self.processor.tokenizer.separator_id)

    def batch(self, rows: list[Encoded], mode: str) -> Batch:
        return collate(rows, mode, device=self.device)

    def run(self, batch: Batch, model=None) -> Tensor:
        inputs = batch.input_ids, batch.pictures.features, batch.mask, batch.positions
        return self.head((model or self.backbone)(*inputs, keep=batch.score_positions))

    def peak_rate(self, tokens: int) -> Callable[[], object]:
        """The block's four matrices as bare products: their FLOPs over the seconds this takes is the peak."""
        sizes, like = self.config.text.matrices.values(), {"device": self.device, "dtype": self.backbone.dtype}
        inputs = {m: torch.randn(tokens, m, **like) for m, _ in sizes}
        matrices = [torch.randn(n, m, **like) for m, n in sizes]
        return lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in matrices]

    def bare(self, tokens: int) -> int:
        """FLOPs of one call of `peak_rate`."""
        return sum(2 * tokens * m * n for m, n in self.config.text.matrices.values())


def arms_of(s: Setting, n: int, R: int, peer) -> dict[str, Callable]:
    """What gives N scores, by name. Rows are laid out beforehand; the pictures have been looked at."""
    responses = [s.random_tokens(R) for _ in range(n)]
    alone = [s.row_of([response]) for response in responses]
    each = [s.batch([row], "joint") for row in alone]
    padded, whole_row = s.batch(alone, "joint"), s.row_of(responses)
    rows = {mode: s.batch([whole_row], mode) for mode in MODES}
    P, prompt = len(s.prompt.ids), s.batch([s.prompt], "joint")
    tails = torch.tensor(responses, device=s.device)
    ends = torch.tensor([[i, R - 1] for i in range(n)], device=s.device)
    nothing = torch.empty(0, 2, dtype=torch.long, device=s.device)

    def cached() -> Tensor:
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


@torch.no_grad()
def compare_score(args: argparse.Namespace) -> list[dict]:
    rows = []
    with checkpoint(args) as folder:
        for name in args.dtypes:
            dtype = getattr(torch, name)
            s, peer = Setting(folder, args, dtype), load_peer(folder, args, dtype)
            s.prompted(min(args.prompt_tokens)).prompted(max(args.prompt_tokens))  # refused before anything is measured
            c, looking = s.config.text, median(clock(s.encode_images, s.device) for _ in range(3))
            print(f"\n{hardware(s.device)}; {name}; {c.num_hidden_layers} blocks of width {c.hidden_size}, ", end="")
            print(f"R = {args.response_tokens}; medians of {args.rounds} rounds; memory above the model in GB")
            print(f"looking at the picture: {looking:.2f} s")
            for P in args.prompt_tokens:
                for n in args.n:
                    found = score_n(s.prompted(P), n, args, peer, looking)
                    rows += [{"dtype": name, "prompt_tokens": P, "n": n, **row} for row in found]
            del s, peer
            gc.collect()
    return rows


def score_n(s: Setting, n: int, args: argparse.Namespace, peer, looking: float) -> list[dict]:
    R, P = args.response_tokens, len(s.prompt.ids)
    row_of_all = s.row_of([[0] * R] * n)
    arms, tokens = arms_of(s, n, R, peer), len(row_of_all.ids)
    seconds, above = take_turns(arms | {"bare": s.peak_rate(tokens)}, args.rounds, s.device, args.seed)
    one = {f"one pass, {mode}": sum(flops.one_pass(s.config, row_of_all, mode).values()) for mode in MODES}
    counted = {SEPARATE: flops.separate(s.config, row_of_all), **one}
    rows = [{"arm": name, "seconds": median(seconds[name]), "above": above[name]} for name in arms]
    for row in rows:
        row["tokens_per_s"] = n * R / row["seconds"]
        row["times_joint"], row["times_cached"] = (ratio(seconds, row["arm"], to) for to in (JOINT, CACHED))
        if row["arm"] in counted:
            row["counted"] = counted[row["arm"]] / counted[JOINT]
        if row["arm"] in one:  # the others multiply other numbers of tokens
            row["of_peak"] = counted[row["arm"]] / s.bare(tokens) * ratio(seconds, "bare", row["arm"])
    images, both = flops.images(s.config, s.encoded.pictures), {"arm": f"{SEPARATE}, and the picture"}
    plus = {name: [t + looking for t in seconds[name]] for name in (SEPARATE, JOINT)}
    both |= {"seconds": median(plus[SEPARATE]), "times_joint": ratio(plus, SEPARATE, JOINT)}
    rows.append(both | {"counted": (counted[SEPARATE] + images) / (counted[JOINT] + images)})
    columns = {"seconds": ".3f", "tokens_per_s": ".0f", "above": ".3f", "times_joint": ".2f", "times_cached": ".2f"}
    print(f"\nP = {P}, N = {n}")
    print_table(rows, columns | {"counted": ".2f", "of_peak": ".2f"})
    return rows


# -------------------------------------------------------------------------------------------------------------- train


def compare_train(args: argparse.Namespace) -> list[dict]:
    """One step: forward, backward, with activation checkpointing and LoRA of rank 128 on all decoder matrices."""
    rows = []
    with checkpoint(args) as folder:
        for name in args.dtypes:
            for n in args.n:
                rows += [{"dtype": name, "n": n, **row} for row in train_n(folder, args, name, n)]
                gc.collect()
    return rows


def train_n(folder: Path, args: argparse.Namespace, name: str, n: int) -> list[dict]:
    s, config = Setting(folder, args, getattr(torch, name)).prompted(args.prompt_tokens), LoraConfig(dropout=0.0)
    row = s.row_of([s.random_tokens(args.response_tokens) for _ in range(n)])
    batch, tokens, ranks = s.batch([row], "joint"), len(row.ids), torch.arange(1, n + 1, device=s.device)[None]
    parameters = lora.add(s.backbone, ADAPTER, config)
    s.backbone.train().checkpointing = True

    def step(model, parameters: list) -> None:
        best_of_n(s.run(batch, model)[None], ranks).backward()
        for p in parameters:
            p.grad = None

    def ours() -> None:
        with lora.use(s.backbone, ADAPTER):
            step(s.backbone, parameters)

    arms: dict[str, Callable] = {"ours": ours}
    if args.peer:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        other = load_backbone(folder, s.backbone.dtype, s.device)
        if args.compile:
            other.fuse()
        other.train().checkpointing = True
        peft = PeftConfig(r=config.r, lora_alpha=int(config.alpha), target_modules=list(config.targets))
        wrapped = get_peft_model(other, peft)
        theirs = [p for p in wrapped.parameters() if p.requires_grad]
        arms["our trunk in peft"] = lambda: step(wrapped, theirs)
    seconds, above = take_turns(arms | {"bare": s.peak_rate(tokens)}, args.rounds, s.device, args.seed)
    count, rows = flops.training_step(s.config, row, "joint", config.r, 1024), []
    print(f"\n{hardware(s.device)}; {name}; one step of {n} answers, {tokens} tokens; {count / 1e12:.2f} TFLOPs; GB")
    for arm in arms:
        rows.append({"arm": arm, "seconds": median(seconds[arm]), "above": above[arm]})
        rows[-1]["times_ours"] = ratio(seconds, arm, "ours")
        rows[-1]["of_peak"] = count / s.bare(tokens) * ratio(seconds, "bare", arm)
    print_table(rows, {"seconds": ".3f", "above": ".3f", "times_ours": ".3f", "of_peak": ".2f"})
    return rows


# -------------------------------------------------------------------------------------------------------------- batch


def tiny_rows(rm: RewardModel, count: int, seed: int) -> list[Encoded]:
    """Records of the tiny world, of 2 to 8 answers, without or with a picture."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        scene = world.make_scene(rng)
        record = world.absolute(scene, rng, rng.randint(2, 8))
        picture = world.render(scene) if rng.random() < 0.5 else None
        rows.append(rm.processor.encode(record["prompt"], record["responses"], picture))
    return rows


@torch.no_grad()
def compare_batch(args: argparse.Namespace) -> list[dict]:
    """Many records of unequal length, scored by the shipped model in two ways."""
    rm, device = RewardModel.load(shipped("weights/tiny-rm"), device=args.device), torch.device(args.device)
    encoded, scores = tiny_rows(rm, args.n, args.seed), {}
    arms = {
        "one by one": lambda: scores.update(one=[rm.score_encoded([row])[0] for row in encoded]),
        "sorted batches": lambda: scores.update(sorted=list(rm.score_all(encoded))),
    }
    seconds, above = take_turns(arms, args.rounds, device, args.seed)
    apart = largest(abs(a - b) for x, y in zip(*scores.values(), strict=True) for a, b in zip(x, y, strict=True))
    lengths = sorted(len(row.ids) for row in encoded)
    rows = [{"arm": name, "seconds": median(seconds[name]), "above": above[name]} for name in arms]
    rows = [row | {"times_sorted": ratio(seconds, row["arm"], "sorted batches"), "difference": apart} for row in rows]
    print(f"{hardware(device)}; {args.n} records of {lengths[0]} to {lengths[-1]} tokens; memory in GB")
    print_table(rows, {"seconds": ".3f", "above": ".3f", "times_sorted": ".2f"})
    print(f"scores differ by at most {apart:.1e}")
    return rows


# ------------------------------------------------------------------------------------------------------------ command

COMMANDS = {
    "load": (compare_load, "load a checkpoint, score a picture"),
    "score": (compare_score, "N scores, every way"),
    "train": (compare_train, "one step"),
    "batch": (compare_batch, "many records of the tiny world"),
}


def main() -> None:
    what = "Measure loading, scoring and training against alternatives."
    parser = Parser(prog="python -m yojo.bench", description=what)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, help_text) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_text)
        sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
        rounds = 2 if name == "load" else 5
        sub.add_argument("--rounds", type=whole(1), default=rounds, metavar="K", help="turns of each alternative")
        if name == "batch":
            sub.add_argument("--n", type=whole(1), default=256, metavar="N", help="records")
            continue
        sub.add_argument("--weights", type=Path, metavar="DIR", help="a checkpoint; else a random one is written")
        sub.add_argument("--size", "--shape", choices=SIZES, default=SIZES[0], help="of the random one")
        sub.add_argument("--layers", type=int, metavar="K", help="its decoder blocks, where not all")
        sub.add_argument("--vision-layers", type=int, metavar="K", help="its vision layers, where not all")
        sub.add_argument("--peer", action="store_true", help=f"measure {PEERS[name]} beside it")
        add_model_options(sub, dtype=False)
        if name == "load":
            sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="what to compute in")
            sub.add_argument("--n", type=whole(1), default=4, metavar="N", help="answers")
            continue
        score = name == "score"
        sub.add_argument("--dtypes", choices=DTYPES, nargs="+", default=[*DTYPES], help="what to compute in")
        sub.add_argument(
            "--n", type=whole(1), nargs="+", default=[2, 4, 8] if score else [4], metavar="N", help="answers"
        )
        tokens = {"nargs": "+", "default": [1040]} if score else {"default": 1040}
        sub.add_argument("--prompt-tokens", type=whole(1), metavar="P", help="with the picture's", **tokens)
        sub.add_argument("--response-tokens", type=whole(1), default=100, metavar="R", help="of each answer")
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> list[dict]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device")
    package = PEERS.get(args.command)
    if package and args.peer and importlib.util.find_spec(package) is None:
        raise InputError(f"--peer needs the package {package}: pip install -r requirements-dev.txt")
    return COMMANDS[args.command][0](args)


if __name__ == "__main__":
    main()
