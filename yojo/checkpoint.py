"""Look at a checkpoint, or write a random one.

    python -m yojo.checkpoint show weights/Molmo2-4B       what a checkpoint is, and whether it is complete
    python -m yojo.checkpoint random --size molmo2-4b --out weights/random-4b

See it: `pytest tests/test_checkpoint.py`.
"""

import math
from pathlib import Path

import torch

from yojo import memory
from yojo.cli import DTYPES, Parser, run
from yojo.core.lora import LoraConfig
from yojo.core.prompt import Processor
from yojo.initial import SIZES, size_config, write_random
from yojo.weights import open_weights, part_of, read_config, shards


def show(folder: Path) -> dict:
    """Print what a checkpoint is; what is missing or wrong raises."""
    config = read_config(folder)
    with open_weights(folder, config) as pieces:
        counts: dict[str, int] = {}
        dtypes: dict[str, int] = {}
        for name, parts in pieces.items():
            for piece in parts:
                size, dtype = math.prod(piece.get_shape()), piece.get_dtype()
                counts[part_of(name)] = counts.get(part_of(name), 0) + size
                dtypes[dtype] = dtypes.get(dtype, 0) + size
        tensors = sum(len(parts) for parts in pieces.values())
    Processor.from_folder(folder, config.text.max_position_embeddings)
    files = shards(folder)
    size, total = sum(file.stat().st_size for file in files), sum(counts.values())
    print(f"{folder}: molmo2, complete")
    for part, count in counts.items():
        print(f"  {part:20s}{count:15,d} parameters")
    print(
        f"  {'total':20s}{total:15,d} parameters in {tensors} tensors, {len(files)} file(s), {size:,} bytes, ", end=""
    )
    print(" and ".join(f"{dtype}" for dtype in dtypes))
    print("memory for weights, without pictures and answers:")
    needs = {}
    for what, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        needs[what] = {"score": memory.weights(config, dtype), "train": memory.training(config, dtype, LoraConfig())}
        print(f"  {what:10s} to score {needs[what]['score'] / 1e9:7.3f} GB", end="")
        print(f"   to train (LoRA r {LoraConfig().r}) {needs[what]['train'] / 1e9:7.3f} GB")
    return {"model_type": "molmo2", "parameters": total, "parts": counts, "tensors": tensors, "bytes": size} | {
        "dtypes": sorted(dtypes),
        "memory": needs,
    }


def main() -> None:
    parser = Parser(prog="python -m yojo.checkpoint", description="Look at a checkpoint, or write a random one.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="what a checkpoint is, what it needs, and whether it is complete")
    shown.add_argument("folder", type=Path, metavar="DIR")
    write = commands.add_parser("random", help="write random weights in the released layout")
    write.add_argument("--size", "--shape", choices=SIZES, required=True, help="whose shape")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    write.add_argument("--dtype", choices=DTYPES, default="float32", help="of the files")
    write.add_argument("--shards", type=int, default=4, metavar="K", help="number of weight files")
    write.add_argument("--layers", type=int, metavar="K", help="decoder blocks, where not all")
    write.add_argument("--vision-layers", type=int, metavar="K", help="vision layers, where not all")
    write.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    args = parser.parse_args()
    run(lambda: show(args.folder) if args.command == "show" else random_checkpoint(args), parser, args)


def random_checkpoint(args) -> dict:
    config = size_config(args.size, args.layers, args.vision_layers)
    write_random(args.out, args.size, config, getattr(torch, args.dtype), args.shards, args.seed, args.overwrite)
    return show(args.out)


if __name__ == "__main__":
    main()
