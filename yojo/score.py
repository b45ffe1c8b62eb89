"""Score N responses to one prompt, in one pass.

    python -m yojo.score --tiny
    python -m yojo.score --tiny --image picture.png --prompt "Describe the star." --response "..." --response "..."
    python -m yojo.score --model runs/rm --data records.jsonl --json scores.json

Prints a ranked table per record. `--draw-mask FILE` draws which token may attend to which. `--html FILE` makes a page
of the first record's judgement.
"""

import argparse
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from yojo.cli import Parser, add_model_options, computed_on, run, shipped, table, whole
from yojo.core.ahead import ahead
from yojo.core.data import Record, collate, encode, read_records
from yojo.core.mask import MODES
from yojo.core.prompt import Encoded
from yojo.core.reward import LOOKED_AHEAD, RewardModel
from yojo.drawing import DRAWN_UP_TO, draw_mask, readable
from yojo.files import InputError, whole_file
from yojo.page import judgement
from yojo.tiny import world
from yojo.tiny.experiment import NAMES
from yojo.video import FRAMES, INTERVAL, Clip

MEANS = {
    "joint": "each answer attends to the question, itself and the answers before it",
    "isolated": "each answer attends to the question and itself",
}


RULES = [
    ("without", "tiny", "model base"),
    ("without", "data", "prompt response image video"),
    ("without", "video", "image"),
    ("without", "model data prompt", "seed"),
    ("with", "video", "frames interval"),
    ("or", "tiny", "model"),
    ("or", "tiny data", "prompt response"),
]


def main() -> None:
    parser = Parser(prog="python -m yojo.score", description="Score N responses in one forward pass.", rules=RULES)
    add = parser.add_argument
    add("--tiny", action="store_true", help="use the built-in model, and its world where no --prompt is given")
    add("--model", type=Path, metavar="DIR", help="a reward model's folder")
    add("--base", type=Path, metavar="DIR", help="the folder of its backbone, if it has moved")
    add("--image", action="append", metavar="FILE", help="a picture; repeat for several")
    add("--video", metavar="DIR", help="a folder of frames, or an animated GIF or WebP")
    add("--frames", type=whole(1), default=FRAMES, metavar="K", help="at most so many, evenly spaced")
    add("--interval", type=float, default=INTERVAL, metavar="S", help="seconds between frames without times")
    add("--prompt", metavar="TEXT", help="the question")
    add("--response", action="append", default=[], metavar="TEXT", help="a candidate answer; repeat")
    add("--data", type=Path, metavar="FILE", help="JSONL records to score instead")
    add("--mode", choices=MODES, help="attention, where not the one the model was trained in")
    add("--draw-mask", type=Path, metavar="FILE", help="draw the first record's mask as a PNG")
    add("--html", type=Path, metavar="FILE", help="show the first record's judgement as a web page")
    add_model_options(parser)
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> dict | list[dict]:
    records, facts = prompts(args)
    template = shipped("tutorials/mask.html").read_text(encoding="utf-8") if args.html else ""
    folder = shipped(f"weights/{NAMES[args.mode or 'joint']}") if args.tiny else args.model
    rm = RewardModel.load(folder, args.base, **computed_on(args))
    if args.compile:
        rm.backbone.fuse()
    mode = args.mode or rm.mode
    print(f"mode: {mode}" + ("" if mode == rm.mode else f" (trained in {rm.mode})") + f": {MEANS[mode]}")
    args.found, shown = [], tqdm(records, "scoring", delay=2, leave=False)
    with ahead(lambda r: encode(r, rm.processor), shown, most=LOOKED_AHEAD) as encoded:
        if args.draw_mask or args.html:
            first = next(encoded)
            names = [rm.processor.tokenizer.name(token) for token in first.ids.tolist()]
            encoded = chain([first], encoded)
        if args.draw_mask:
            save_mask(first, mode, names, args.draw_mask, records[0].prefix)
        for record, scores in zip(records, rm.score_all(encoded, mode), strict=True):
            ranking = ranked(record.responses, scores, facts)
            if args.html and not args.found:
                save_page(judgement(template, record, first, names, ranking, mode), args.html)
            args.found.append({"mode": mode, "scores": scores} | ({"true_facts": facts} if facts else {}))
            print(f"\n{record.prompt}\n" + ranked_table(ranking))
    return args.found if args.data else args.found[0]


def prompts(args: argparse.Namespace) -> tuple[list[Record], list[int]]:
    """The records to score, and how many facts are true in each response, which is known of the demonstration only."""
    if args.data:
        return read_records(args.data, ranked=False), []
    if args.prompt is None and args.tiny and not (args.response or args.image or args.video):
        scene, prompt, responses, facts = demonstration(random.Random(args.seed))
        print("a scene of the tiny world: " + "; ".join(world.describe(scene.facts(t)) for t in scene.things))
        return [Record(prompt, responses, images=[world.render(scene)])], facts
    if args.prompt is None or not args.response:
        raise InputError("give --prompt and at least one --response, or --data FILE")
    video = None if args.video is None else Clip(args.video, args.frames, args.interval)
    return [Record(args.prompt, args.response, images=args.image or [], video=video)], []


def demonstration(rng: random.Random) -> tuple[world.Scene, str, list[str], list[int]]:
    """A scene, a question, four answers and how many facts are true in each. All are true in one of them, which not
    every record of the task has, and it is not the first, or a model that keeps the order would look right."""
    scene = world.make_scene(rng)
    while True:
        record = world.absolute(scene, rng)
        facts = [world.oracle(scene, record["prompt"], response) for response in record["responses"]]
        if len(world.SLOTS) in facts[1:]:
            return scene, record["prompt"], record["responses"], facts


def ranked(responses: Sequence[str], scores: Sequence[float], facts: Sequence[int] = ()) -> list[dict]:
    """Best first, numbered as they were given, beside the true facts where they are known."""
    rows = []
    for rank, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1):
        known = f"{facts[i]} of {len(world.SLOTS)}" if facts else None
        rows.append({"rank": rank, "score": scores[i], "#": i + 1, "true_facts": known, "response": responses[i]})
    return rows


def ranked_table(ranking: list[dict]) -> str:
    """A line for each answer."""
    rows = [row | {"response": " ".join(row["response"].split())} for row in ranking]
    columns = {"rank": "d", "score": ".3f", "#": "d", "true_facts": "", "response": "<"}
    known = ranking[0]["true_facts"] is not None
    return table(rows, {name: how for name, how in columns.items() if known or name != "true_facts"})


def save_mask(encoded: Encoded, mode: str, names: list[str], path: Path, prefix: str) -> None:
    if len(encoded.ids) > DRAWN_UP_TO:
        raise InputError(f"{prefix}{len(encoded.ids)} tokens are too many to draw: at most {DRAWN_UP_TO}")
    with whole_file(path) as temporary:
        draw_mask(collate([encoded], mode).mask, labels=readable(names)).save(temporary, "PNG")
    print(f"mask drawn in {path}")


def save_page(page: str, path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"page written to {path}")


if __name__ == "__main__":
    main()
