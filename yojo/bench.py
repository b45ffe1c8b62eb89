"""Measure what one pass costs, against everything that could be run instead.

    python -m yojo.bench load --peer                 load a checkpoint and score one picture with four answers
    python -m yojo.bench score --layers 2 --peer     one pass against N passes, a batch, a cached prompt, transformers
    python -m yojo.bench train --layers 2 --peer     one training step, against the same trunk in `peft`
    python -m yojo.bench batch                       many records of unequal length: sorted batches, or one by one

Machines are noisy: the alternatives of one table take turns in the same run, ratios are taken round by round, and
medians are printed. `load` gives every alternative a process of its own and empties the page cache of the files first.
Without --weights a random checkpoint is written to a temporary folder and removed. Memory is printed in GB.

Tokens per second are the answers'. Share of peak: FLOPs per second of the pass, over those of the block's own four
matrices alone, by `F.linear` and at as many tokens. It may exceed 1 where the pass knows a faster way to multiply.

See it: `pytest tests/test_bench.py`.
"""

import argparse
import gc
import importlib.util
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from yojo.cli import DTYPES, Parser, add_model_options, run, shipped, whole
from yojo.core import flops, lora
from yojo.core.data import Batch, collate
from yojo.core.generate import Cache
from yojo.core.lora import LoraConfig
from yojo.core.loss import best_of_n
from yojo.core.mask import MODES
from yojo.core.prompt import Encoded
from yojo.core.reward import ADAPTER, RewardModel, ValueHead
from yojo.files import InputError
from yojo.initial import SIZES
from yojo.instruments import clock, hardware, largest, print_rows, ratio, take_turns
from yojo.loading import checkpoint, compare_load, load_peer, question
from yojo.tiny import world
from yojo.weights import load_backbone, pick_device

SEPARATE, CACHED, JOINT = "N separate passes", "prompt once, batch of N after it", "one pass, joint"
PEERS = {"load": "transformers", "score": "transformers", "train": "peft"}


# -------------------------------------------------------------------------------------------------------------- score


class Setting:
    """A model, and records of random tokens: a prompt of P with a picture in it, N responses of R."""

    def __init__(self, folder: Path, args: argparse.Namespace, dtype: torch.dtype):
        self.seed, self.device = args.seed, torch.device(args.device)
        self.backbone = load_backbone(folder, dtype, self.device)
        if args.compile:
            self.backbone.fuse()
        self.config = self.backbone.config
        self.head = ValueHead(self.config.text.hidden_size, 1024).to(self.device, torch.float32)
        self.processor, self.shown = question(folder, self.config.text.max_position_embeddings, 1)
        self.pictures = self.backbone.keep_features(self.shown.pictures)

    def prompted(self, P: int) -> "Setting":
        """A prompt of P tokens."""
        tokens, room = int(self.shown.image.sum()), self.config.text.max_position_embeddings
        if not tokens + 2 <= P <= room:
            raise InputError(f"--prompt-tokens {P}: at least {tokens + 2}, with the picture's {tokens}, at most {room}")
        self.generator = torch.Generator().manual_seed(self.seed)
        ids = [*self.shown.ids[: tokens + 1].tolist(), *self.random_tokens(P - tokens - 1)]
        self.prompt = self.processor.row(ids, self.pictures)
        return self

    def random_tokens(self, count: int) -> list[int]:
        return torch.randint(300, (count,), generator=self.generator).tolist()

    def row_of(self, responses: list[list[int]]) -> Encoded:
        return self.prompt.continued(responses, self.processor.tokenizer.separator_id)

    def batch(self, rows: list[Encoded], mode: str = "joint") -> Batch:
        return collate(rows, mode, device=self.device)

    def scores(self, batch: Batch, model=None) -> Tensor:
        inputs = batch.input_ids, batch.pictures.features, batch.mask, batch.positions
        return self.head((model or self.backbone)(*inputs, keep=batch.score_positions))

    def products(self, tokens: int) -> tuple[Callable[[], object], int]:
        """The block's four matrices as bare products, and their FLOPs: over its seconds, these are the peak."""
        sizes, like = self.config.text.matrices.values(), {"device": self.device, "dtype": self.backbone.dtype}
        pairs = [(torch.randn(tokens, m, **like), torch.randn(n, m, **like)) for m, n in sizes]
        return lambda: [F.linear(x, w) for x, w in pairs], sum(2 * tokens * m * n for m, n in sizes)


def ways_of(s: Setting, n: int, R: int, peer) -> dict[str, Callable]:
    """What gives N scores, by name. Rows are laid out beforehand; the pictures have been looked at."""
    responses = [s.random_tokens(R) for _ in range(n)]
    alone, row = [s.row_of([response]) for response in responses], s.row_of(responses)
    each, padded, prompt = [s.batch([one]) for one in alone], s.batch(alone), s.batch([s.prompt])
    joint, isolated = s.batch([row]), s.batch([row], "isolated")
    P, tails = len(s.prompt.ids), torch.tensor(responses, device=s.device)
    ends = torch.tensor([[i, R - 1] for i in range(n)])

    def cached() -> Tensor:
        cache = Cache(s.config, P + R)
        inputs = prompt.input_ids, prompt.pictures.features, prompt.mask, prompt.positions
        s.backbone(*inputs, keep=ends[:0], cache=cache)
        cache.expand(n)
        positions = torch.arange(P, P + R, device=s.device).expand(n, R)
        return s.head(s.backbone(tails, positions=positions, keep=ends, cache=cache))

    ways = {SEPARATE: lambda: [s.scores(batch) for batch in each], "one padded batch of N": lambda: s.scores(padded)}
    ways |= {CACHED: cached, "one pass, isolated": lambda: s.scores(isolated), JOINT: lambda: s.scores(joint)}
    if peer is not None:
        inputs = dict(inputs_embeds=s.backbone.embed(joint.input_ids, joint.pictures.features), use_cache=False)
        inputs["mm_token_type_ids"] = joint.mask.image.long().to(s.device)
        ways["transformers, bare trunk"] = lambda: peer.model(**inputs).last_hidden_state
        ways["transformers, released way"] = lambda: peer(**inputs, output_hidden_states=True)
    return ways


@torch.no_grad()
def compare_score(args: argparse.Namespace) -> list[dict]:
    args.found = rows = []
    with checkpoint(args) as folder:
        for name in args.dtypes:
            dtype = getattr(torch, name)
            s, peer = Setting(folder, args, dtype), load_peer(folder, args, dtype)
            s.prompted(min(args.prompt_tokens)).prompted(max(args.prompt_tokens))  # refused before anything is measured
            c, look = s.config.text, partial(s.backbone.encode_images, s.shown.pictures)
            looking = median(clock(look, s.device)[1] for _ in range(3))
            print(f"\n{hardware(s.device)}; {name}; {c.num_hidden_layers} blocks of width {c.hidden_size}, ", end="")
            print(f"R = {args.response_tokens}; medians of {args.rounds} rounds; above: memory above the model's")
            print(f"looking at the picture: {looking:.2f} s")
            for P, n in product(args.prompt_tokens, args.n):
                found = score_n(s.prompted(P), n, args, peer, looking)
                rows += [{"dtype": name, "prompt_tokens": P, "n": n, **row} for row in found]
            del s, peer
            gc.collect()
    return rows


def score_n(s: Setting, n: int, args: argparse.Namespace, peer, looking: float) -> list[dict]:
    R, row = args.response_tokens, s.row_of([[0] * args.response_tokens] * n)
    ways, (bare, bare_flops) = ways_of(s, n, R, peer), s.products(len(row.ids))
    seconds, rows = take_turns(ways | {"bare": bare}, args.rounds, s.device, args.seed)
    one = {f"one pass, {mode}": sum(flops.one_pass(s.config, row, mode).values()) for mode in MODES}
    counted = {SEPARATE: flops.separate(s.config, row), **one}
    rows = [r | {"tokens_per_s": n * R / r["seconds"]} for r in rows if r["way"] != "bare"]
    for r in rows:
        mine = seconds[r["way"]]
        r["times_joint"], r["times_cached"] = (ratio(mine, seconds[to]) for to in (JOINT, CACHED))
        if r["way"] in counted:
            r["counted"] = counted[r["way"]] / counted[JOINT]
        if r["way"] in one:  # the others multiply other numbers of tokens
            r["of_peak"] = counted[r["way"]] / bare_flops * ratio(seconds["bare"], mine)
    picture, joint = flops.images(s.config, s.shown.pictures), [t + looking for t in seconds[JOINT]]
    for looks in sorted({1, n}):  # at the picture, where one pass looks once
        all_of_it = [t + looks * looking for t in seconds[SEPARATE]]
        times = {"times_joint": ratio(all_of_it, joint)}
        times |= {"counted": (counted[SEPARATE] + looks * picture) / (counted[JOINT] + picture)}
        rows.append({"way": f"{SEPARATE}, picture {looks}x", "seconds": median(all_of_it), **times})
    print(f"\nP = {len(s.prompt.ids)}, N = {n}")
    print_rows(rows, "seconds", "tokens_per_s", "above", "times_joint", "times_cached", "counted", "of_peak")
    return rows


# -------------------------------------------------------------------------------------------------------------- train


def compare_train(args: argparse.Namespace) -> list[dict]:
    """One step: forward, backward, with activation checkpointing and LoRA of rank 128 on all decoder matrices."""
    args.found = rows = []
    with checkpoint(args) as folder:
        for name, n in product(args.dtypes, args.n):
            rows += [{"dtype": name, "n": n, **row} for row in train_n(folder, args, name, n)]
            gc.collect()
    return rows


def train_n(folder: Path, args: argparse.Namespace, name: str, n: int) -> list[dict]:
    s, config = Setting(folder, args, getattr(torch, name)).prompted(args.prompt_tokens), LoraConfig(dropout=0.0)
    row = s.row_of([s.random_tokens(args.response_tokens) for _ in range(n)])
    batch, ranks = s.batch([row]), torch.arange(1, n + 1, device=s.device)[None]
    parameters = lora.add(s.backbone, ADAPTER, config)

    def step(model, parameters: list) -> None:
        best_of_n(s.scores(batch, model)[None], ranks).backward()
        for p in parameters:
            p.grad = None

    def ours() -> None:
        with lora.use(s.backbone, ADAPTER):
            step(s.backbone, parameters)

    s.backbone.train().checkpointing = True
    bare, bare_flops = s.products(len(row.ids))
    ways = {"ours": ours} | (peft_way(folder, args, s, config, step) if args.peer else {}) | {"bare": bare}
    seconds, rows = take_turns(ways, args.rounds, s.device, args.seed)
    count, rows = flops.training_step(s.config, row, "joint", config.r, 1024), rows[:-1]
    for r in rows:
        r["times_ours"] = ratio(seconds[r["way"]], seconds["ours"])
        r["of_peak"] = count / bare_flops * ratio(seconds["bare"], seconds[r["way"]])
    tokens = f"one step of {n} answers, {len(row.ids)} tokens; {count / 1e12:.2f} TFLOPs"
    print(f"\n{hardware(s.device)}; {name}; {tokens}")
    print_rows(rows, "seconds", "above", "times_ours", "of_peak")
    return rows


def peft_way(folder: Path, args: argparse.Namespace, s: Setting, config: LoraConfig, step: Callable) -> dict:
    """The same trunk, its adapter by `peft`."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    trunk = load_backbone(folder, s.backbone.dtype, s.device)
    if args.compile:
        trunk.fuse()
    trunk.train().checkpointing = True
    theirs = PeftConfig(r=config.r, lora_alpha=int(config.alpha), target_modules=list(config.targets))
    wrapped = get_peft_model(trunk, theirs)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    return {"our trunk in peft": lambda: step(wrapped, parameters)}


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
    rm, device, scores = RewardModel.load(shipped("weights/tiny-rm"), device=args.device), torch.device(args.device), {}
    encoded = tiny_rows(rm, args.n, args.seed)
    ways = {
        "one by one": lambda: scores.update(one=[rm.score_encoded([row])[0] for row in encoded]),
        "sorted batches": lambda: scores.update(sorted=list(rm.score_all(encoded))),
    }
    seconds, rows = take_turns(ways, args.rounds, device, args.seed)
    apart = largest(abs(a - b) for x, y in zip(*scores.values(), strict=True) for a, b in zip(x, y, strict=True))
    for row in rows:
        row |= {"times_sorted": ratio(seconds[row["way"]], seconds["sorted batches"]), "difference": apart}
    lengths = [len(row.ids) for row in encoded]
    print(f"{hardware(device)}; {args.n} records of {min(lengths)} to {max(lengths)} tokens")
    print_rows(rows, "seconds", "above", "times_sorted", "difference")
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
    for name, (_, what) in COMMANDS.items():
        drawn = "size layers vision-layers" + (" seed" if name == "load" else "")
        sub = commands.add_parser(name, help=what, rules=[] if name == "batch" else [("without", "weights", drawn)])
        add = sub.add_argument
        number, many = {"type": whole(1), "metavar": "N"}, {"nargs": "+"} if name == "score" else {}
        add("--rounds", **number, default=2 if name == "load" else 5, help="turns of each alternative")
        add_model_options(sub, dtype=False, fuse=name != "batch")
        if name == "batch":
            add("--n", **number, default=256, help="records")
            continue
        add("--weights", type=Path, metavar="DIR", help="a checkpoint; else a random one is written")
        add("--size", "--shape", choices=SIZES, default=SIZES[0], help="size of the random checkpoint")
        add("--layers", **number, help="decoder blocks of the random checkpoint, where not all")
        add("--vision-layers", **number, help="vision layers of the random checkpoint, where not all")
        add("--peer", action="store_true", help=f"measure {PEERS[name]} beside it")
        if name == "load":
            add("--dtype", choices=DTYPES, default="bfloat16", help="what to compute in")
            add("--n", **number, default=4, help="answers")
            continue
        add("--dtypes", choices=DTYPES, nargs="+", default=[*DTYPES], help="what to compute in")
        add("--n", **number, nargs="+", default=[2, 4, 8] if many else [4], help="answers")
        tokens = [1040] if many else 1040
        add("--prompt-tokens", **number, **many, default=tokens, help="of the prompt and its picture")
        add("--response-tokens", **number, default=100, help="of each answer")
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> list[dict]:
    device = pick_device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # whose memory is measured
    args.device = str(device)
    package = PEERS.get(args.command)
    if package and args.peer and importlib.util.find_spec(package) is None:
        raise InputError(f"--peer needs the package {package}: pip install -r requirements-dev.txt")
    return COMMANDS[args.command][0](args)


if __name__ == "__main__":
    main()
