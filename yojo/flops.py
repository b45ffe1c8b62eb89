"""Count what N passes and one pass cost (the formulas are in `core/flops.py`).

    python -m yojo.flops --size molmo2-4b --image 1024x768 --prompt-tokens 40 --response-tokens 200 --n 1 2 4 8 16

See it: `pytest tests/test_flops.py`.
"""

import re

from yojo.cli import Parser, run
from yojo.core.config import ImageConfig, Markup
from yojo.core.flops import attention, images, needed, one_pass, row_of_lengths, separate
from yojo.core.image import Pictures, images_to_patches
from yojo.core.mask import MODES
from yojo.core.prompt import image_tokens
from yojo.files import InputError
from yojo.initial import SIZES, size_config


def main() -> None:
    parser = Parser(prog="python -m yojo.flops", description="Count what N passes and one pass cost.")
    parser.add_argument("--size", "--shape", choices=SIZES, default=SIZES[0], help="whose network")
    parser.add_argument("--image", metavar="WxH", action="append", default=[], help="a picture's size; repeat")
    parser.add_argument("--prompt-tokens", type=int, default=40, metavar="P", help="tokens of the prompt that are text")
    parser.add_argument("--response-tokens", type=int, default=200, metavar="R", help="tokens of each response")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="numbers of responses")
    args = parser.parse_args()
    run(lambda: table(args), parser, args)


def table(args) -> list[dict]:
    config = size_config(args.size)
    if args.size != SIZES[0] and args.image:
        raise InputError(f"--image goes with --size {SIZES[0]} only: its picture settings are known here")
    if args.prompt_tokens < 1 or args.response_tokens < 1 or min(args.n) < 1:
        raise InputError("--prompt-tokens, --response-tokens and --n count from 1")
    pictures = images_to_patches([_size(text) for text in args.image], ImageConfig()) if args.image else Pictures()
    tokens = sum(len(image_tokens(grid, Markup())) for grid in pictures.grids)  # without the words "Image 1" of several
    views, P, R = len(pictures.patches), tokens + args.prompt_tokens, args.response_tokens + 1
    room = config.text.max_position_embeddings
    if P + max(args.n) * R > room:
        raise InputError(f"{max(args.n)} responses of {R} after {P} prompt tokens: the model has {room} positions")
    print(f"{args.size}: prompt of {P} tokens, {tokens} of them pictures ({views} views); responses of {R}, separator")
    print("included. TFLOPs of decoder and head; the pictures are looked at once by either side.\n")
    print("  N   N passes      joint   isolated   ratio  N(P+R)/(P+NR)     needed")
    rows = []
    for n in args.n:
        counted = row_of_lengths(P, [R] * n, tokens)
        one = {mode: sum(one_pass(config, counted, mode).values()) for mode in MODES}
        row = {"n": n, "n_passes": separate(config, counted), **one}
        row |= {"ratio": row["n_passes"] / row["isolated"], "limit": n * (P + R) / (P + n * R)}
        parts = one_pass(config, counted, "isolated")
        parts["attention"] = attention(config, *needed(P, tokens, [R] * n, "isolated"))
        row["needed"] = sum(parts.values())
        rows.append(row)
        print(
            f"{n:3d} {row['n_passes'] / 1e12:10.3f} {row['joint'] / 1e12:10.3f} {row['isolated'] / 1e12:10.3f} "
            f"{row['ratio']:7.2f} {row['limit']:14.2f} {row['needed'] / 1e12:10.3f}"
        )
    print(f"\nratio: N passes over one pass, isolated. For large N it tends to (P + R) / R = {(P + R) / R:.2f}.")
    print("needed: isolated, with no pair of tokens computed that the mask hides.")
    if views:
        print(f"the pictures themselves: {images(config, pictures) / 1e12:.3f} TFLOPs, once")
    return rows


def _size(text: str) -> tuple[int, int]:
    """ "1024x768" -> width 1024, height 768."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not found:
        raise InputError(f"--image {text}: give width x height in pixels, such as 1024x768")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
