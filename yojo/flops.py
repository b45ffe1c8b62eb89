"""Count what N passes and one pass cost (the formulas are in `core/flops.py`).

    python -m yojo.flops --size molmo2-4b --image 1024x768 --prompt-tokens 40 --response-tokens 200 --n 1 2 4 8 16
    python -m yojo.flops --frames 16 --response-tokens 50

See it: `pytest tests/test_flops.py`.
"""

import argparse
import re

from yojo.cli import Parser, run, table, whole
from yojo.core.config import ImageConfig, Markup
from yojo.core.flops import attention, images, needed, one_pass, row_of_lengths, separate
from yojo.core.image import Pictures, frames_to_patches, images_to_patches
from yojo.core.mask import MODES
from yojo.core.prompt import frame_tokens, image_tokens
from yojo.files import InputError
from yojo.initial import SIZES, size_config


def count(args: argparse.Namespace) -> list[dict]:
    config = size_config(args.size)
    if args.size != SIZES[0] and (args.image or args.frames):
        option = "--image" if args.image else "--frames"
        raise InputError(f"{option} goes with --size {SIZES[0]} only: its picture settings are known here")
    room = config.text.max_position_embeddings
    if args.frames and args.frames > room:  # before so many are laid out
        raise InputError(f"--frames {args.frames}: the model has {room} positions")
    pictures, tokens = pictures_of(args.image, args.frames)
    views, P, R = len(pictures.patches), tokens + args.prompt_tokens, args.response_tokens + 1
    if P + max(args.n) * R > room:
        raise InputError(f"{max(args.n)} responses of {R} after {P} prompt tokens: the model has {room} positions")
    rows, looking = [], images(config, pictures)
    for n in args.n:
        row = row_of_lengths(P, [R] * n, tokens)
        parts = {mode: one_pass(config, row, mode) for mode in MODES}
        one = {mode: sum(parts[mode].values()) for mode in MODES}
        rows.append({"n": n, "n_passes": separate(config, row), **one, "limit": n * (P + R) / (P + n * R)})
        rows[-1]["ratio"] = rows[-1]["n_passes"] / one["isolated"]
        if views:
            rows[-1]["n_looks"] = (rows[-1]["n_passes"] + n * looking) / (one["joint"] + looking)
        pairs = needed(P, tokens, [R] * n, "isolated")
        rows[-1]["needed"] = one["isolated"] - parts["isolated"]["attention"] + attention(config, *pairs)
    print(f"{args.size}: prompt of {P} tokens, {tokens} of them pictures ({views} views); responses of {R}, separator")
    unit, name = (1e12, "TFLOPs") if rows[-1]["joint"] > 1e11 else (1e9, "GFLOPs")
    print(f"included. {name} of decoder and head; what looking at the pictures costs is counted in n looks only.\n")
    shown = [row | {"N": row["n"], "N_passes": row["n_passes"], "N(P+R)/(P+NR)": row["limit"]} for row in rows]
    tera = dict.fromkeys(("N_passes", *MODES), lambda flops: f"{flops / unit:.3f}")
    columns = {"N": "d", **tera, "ratio": ".2f", "N(P+R)/(P+NR)": ".2f"} | ({"n_looks": ".2f"} if views else {})
    columns |= {"needed": tera["N_passes"]}
    print(table(shown, columns))
    print(f"\nratio: N passes over one pass, isolated. For large N it tends to (P + R) / R = {(P + R) / R:.2f}.")
    print("needed: isolated, with no pair of tokens computed that the mask hides.")
    if views:
        print(f"the pictures themselves: {looking / 1e12:.3f} TFLOPs, once")
        print("n looks: N passes that each encode the pictures, over one joint pass that encodes them once.")
    return rows


def pictures_of(sizes: list[tuple[int, int]] | None, frames: int | None) -> tuple[Pictures, int]:
    """Pictures of these sizes, or so many frames of a video, and their tokens: without the words "Image 1" of several,
    and without the seconds before each frame."""
    if frames:
        pictures = frames_to_patches([(ImageConfig().size,) * 2] * frames, ImageConfig())
        return pictures, sum(len(frame_tokens(grid, Markup())) for grid in pictures.grids)
    pictures = images_to_patches(sizes, ImageConfig()) if sizes else Pictures()
    return pictures, sum(len(image_tokens(grid, Markup())) for grid in pictures.grids)


def size(text: str) -> tuple[int, int]:
    """A kind of option: "1024x768" -> width 1024, height 768."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: give width x height in pixels, such as 1024x768")
    return int(found[1]), int(found[2])


def main() -> None:
    what, rules = "Count what N passes and one pass cost.", [("without", "image", "frames")]
    parser = Parser(prog="python -m yojo.flops", description=what, rules=rules, random=False)
    add = parser.add_argument
    add("--size", "--shape", choices=SIZES, default=SIZES[0], help="whose network")
    add("--image", type=size, metavar="WxH", action="append", help="a picture's size, with --size molmo2-4b; repeat")
    add("--frames", type=whole(1), metavar="K", help="a video of K frames, with --size molmo2-4b")
    add("--prompt-tokens", type=whole(1), default=40, metavar="P", help="tokens of the prompt that are text")
    add("--response-tokens", type=whole(1), default=200, metavar="R", help="tokens of each response")
    add("--n", type=whole(1), nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="numbers of responses")
    run(parser, count)


if __name__ == "__main__":
    main()
