"""Look at a checkpoint, or write a random one.

    python -m yojo.checkpoint show weights/Molmo2-4B       what a checkpoint is, and whether it is complete
    python -m yojo.checkpoint random --size molmo2-4b --out weights/random-4b

See it: `pytest tests/test_checkpoint.py`.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import torch

from yojo import memory
from yojo.cli import DTYPES, Parser, run, table, whole
from yojo.core.lora import LoraConfig
from yojo.core.prompt import Processor
from yojo.initial import SIZES, size_config, write_random
from yojo.settings import check_tokens, read_config
from yojo.weights import open_weights, part_of, shards


def show(folder: Path) -> dict:
    """Print what a checkpoint is; what is missing or wrong raises."""
    config, parts, dtypes = read_config(folder), Counter(), set()
    with open_weights(folder, config) as pieces:
        for name, some in pieces.items():
            parts[part_of(name)] += sum(math.prod(piece.get_shape()) for piece in some)
            dtypes |= {piece.get_dtype() for piece in some}
        tensors = sum(map(len, pieces.values()))
    check_tokens(folder, Processor.from_folder(folder, config.text.max_position_embeddings))
    files, total = shards(folder), sum(parts.values())
    size = sum(file.stat().st_size for file in files)
    held = f"{tensors} tensors in {len(files)} file(s), {size:,} bytes, {' and '.join(sorted(dtypes))}"
    print(f"{folder}: molmo2, complete; {held}")
    rows = [{"part": name, "parameters": number} for name, number in {**parts, "total": total}.items()]
    print(table(rows, {"part": "<", "parameters": ",d"}))
    needs = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        needs[name] = {"score": memory.weights(config, dtype), "train": memory.training(config, dtype, LoraConfig())}
    print(f"GB of memory for weights, without pictures and answers; to train: LoRA of rank {LoraConfig().r}")
    rows = [{"": name, **{f"to_{use}": needs[name][use] / 1e9 for use in needs[name]}} for name in needs]
    print(table(rows, {"": "<", "to_score": ".3f", "to_train": ".3f"}))
    found = {"model_type": "molmo2", "parameters": total, "parts": parts, "tensors": tensors, "bytes": size}
    return found | {"dtypes": sorted(dtypes), "memory": needs}


def random_checkpoint(args: argparse.Namespace) -> dict:
    config = size_config(args.size, args.layers, args.vision_layers)
    write_random(args.out, args.size, config, getattr(torch, args.dtype), args.seed, args.overwrite)
    return show(args.out)


def main() -> None:
    what = "Look at a checkpoint, or write a random one."
    parser = Parser(prog="python -m yojo.checkpoint", description=what, random=False)
    commands = parser.add_subparsers(dest="command", required=True)
    what = "what a checkpoint is, what it needs, and whether it is complete"
    shown = commands.add_parser("show", help=what, random=False)
    shown.add_argument("folder", type=Path, metavar="DIR", help="its folder")
    add = commands.add_parser("random", help="write random weights in the released layout").add_argument
    add("--size", "--shape", choices=SIZES, required=True, help="whose shape")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--dtype", choices=DTYPES, default="float32", help="of the files")
    add("--layers", type=whole(1), metavar="K", help="decoder blocks, where not all")
    add("--vision-layers", type=whole(1), metavar="K", help="vision layers, where not all")
    add("--overwrite", action="store_true", help="replace what --out holds")
    run(parser, lambda args: show(args.folder) if args.command == "show" else random_checkpoint(args))


if __name__ == "__main__":
    main()
