"""What the paper claims, and what this project finds about each claim.

    python -m yojo.claims answers      how many answers must a judge have seen in training?
    python -m yojo.claims data         does comparing help where groups are few or ranks are noisy?
    python -m yojo.claims grpo         is a policy trained by a multi-response reward better, or steadier?

The studies (`tiny/studies.py`) train several models each and take 15 to 45 minutes on two cores.

See it: `pytest tests/test_claims.py`.
"""

import argparse
import time
from collections.abc import Callable

from yojo.cli import Parser, add_model_options, run, shipped, whole
from yojo.instruments import hardware
from yojo.tiny import studies
from yojo.weights import pick_device

STUDIES: dict[str, tuple[Callable, int, str]] = {  # and on how many seeds
    "answers": (studies.study_answers, 3, "how many answers a judge must have seen"),
    "data": (studies.study_data, 3, "few groups and noisy ranks"),
    "grpo": (studies.study_grpo, 4, "policies by every reward"),
}


def study(args: argparse.Namespace) -> dict:
    start, device = time.monotonic(), pick_device(args.device)
    shipped("weights/tiny")  # or no work is begun
    seeds = [*range(args.seed, args.seed + args.seeds)]
    runs = STUDIES[args.command][0](seeds, args.device)
    about = {"study": args.command, "seeds": seeds, "hardware": hardware(device), "date": time.strftime("%Y-%m-%d")}
    return about | {"seconds": round(time.monotonic() - start), "runs": runs}


def main() -> None:
    parser = Parser(prog="python -m yojo.claims", description="What the paper claims, and what is found here.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, count, what) in STUDIES.items():
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--seeds", type=whole(2), default=count, metavar="K", help="K seeds, from --seed on")
        add_model_options(sub, dtype=False, fuse=False)
    run(parser, study)


if __name__ == "__main__":
    main()
