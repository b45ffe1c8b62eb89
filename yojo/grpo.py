"""Train a policy by GRPO with a one-pass reward (the algorithm is in `core/grpo.py`).

    python -m yojo.grpo --tiny                     both rewards on the tiny world, judged by an oracle
    python -m yojo.grpo --tiny --controls --seeds 3
    python -m yojo.grpo --make-start               the noisy policy that --tiny starts from (weights/tiny-policy)
    python -m yojo.grpo --reward runs/rm --data prompts.jsonl --out runs/policy

See it: `pytest tests/test_grpo.py`.
"""

import argparse
import hashlib
import random
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from yojo import memory
from yojo.cli import Parser, run
from yojo.core import lora
from yojo.core.data import Record, pictures_of
from yojo.core.grpo import POLICY, GrpoConfig, reward_fn, train_policy
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.files import InputError, read_lines, whole_folder
from yojo.runs import SavedRun, run_folder, start_over
from yojo.store import digest, save_adapter
from yojo.tiny.captions import CONTROLS, REWARDS, START_STEPS, STARTS_FROM, make_start, run_tiny

FULL_LR, FULL_LORA = 1e-5, LoraConfig(r=64, alpha=64, dropout=0.0)  # without --tiny; chosen, never tried


def read_prompts(path: Path) -> list[Record]:
    """JSONL of {"prompt", "image" | "images" | "video"}, paths relative to the file."""
    prompts = []
    for where, raw in read_lines(path):
        if not isinstance(raw.get("prompt"), str):
            raise InputError(f"{where}: prompt must be a string, got {raw.get('prompt')!r}")
        images, video = pictures_of(raw, where, path.parent)
        prompts.append(Record(raw["prompt"], images=images, video=video, where=where))
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def run_files(args: argparse.Namespace, c: GrpoConfig) -> dict:
    """The same loop on a checkpoint, a reward model and a file of prompts."""
    training = run_folder(args.out, args.overwrite, args.resume)
    prompts = read_prompts(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rm = RewardModel.load(args.reward, args.weights, device=device, lm_head=True)
    generator = torch.Generator().manual_seed(args.seed)
    reward_bytes = sum(p.nbytes for p in lora.parameters(rm.backbone, rm.adapter)) if rm.adapter else 0
    lora.add(rm.backbone, POLICY, FULL_LORA, generator)
    rm.backbone.checkpointing = True
    held = memory.training(rm.backbone.config, rm.backbone.dtype, FULL_LORA)
    held += rm.backbone.lm_head.weight.nbytes + reward_bytes
    print(f"memory, computed, without activations: {held / 1e9:.1f} GB")
    start_over(training, args.resume)

    def sample_prompts(step: int) -> list[Record]:
        return random.Random(f"{args.seed} questions {step}").choices(prompts, k=c.prompts)

    data = hashlib.sha256(args.data.read_bytes()).hexdigest()
    about = {"data": data, "base": rm.fingerprint["weights"], "mode": rm.mode, "reward": digest(args.reward)}
    bar = tqdm(total=c.steps, desc="grpo")

    def report(entry: dict) -> None:
        bar.update(entry["step"] + 1 - bar.n)
        bar.set_postfix({k: f"{entry[k]:.3f}" for k in ("reward", "kl", "length")})

    log = train_policy(
        rm, reward_fn(rm, rm.mode), sample_prompts, c, args.seed, None, SavedRun(training, about), report
    )
    with whole_folder(args.out, args.overwrite) as new:
        save_adapter(rm.backbone, POLICY, new)
        shutil.copyfile(training / "metrics.jsonl", new / "metrics.jsonl")
    shutil.rmtree(training)
    return {"steps": len(log), "reward": log[-1]["reward"]}


def main() -> None:
    d = GrpoConfig()
    parser = Parser(prog="python -m yojo.grpo", description="Train a policy with a one-pass reward.")
    parser.add_argument("--tiny", action="store_true", help="the built-in models and world, judged by an oracle")
    parser.add_argument("--controls", action="store_true", help="with --tiny: a random reward and the oracle beside it")
    parser.add_argument("--seeds", type=int, metavar="K", help="with --tiny: K seeds from --seed on (default: 1)")
    parser.add_argument("--make-start", action="store_true", help="make the policy that --tiny starts from")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="the backbone, where that is not where it was")
    parser.add_argument("--reward", type=Path, metavar="DIR", help="a reward model; its backbone is the policy's too")
    parser.add_argument("--data", type=Path, metavar="FILE", help="prompts, JSONL")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the policy's adapter; with --tiny, for curves"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--steps", type=int, help=f"training steps (default: {d.steps}, with --make-start {START_STEPS})"
    )
    parser.add_argument("--prompts", type=int, default=d.prompts, metavar="P", help="prompts a step")
    parser.add_argument("--group", type=int, default=d.group, metavar="G", help="answers a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, metavar="T", help="length of an answer")
    parser.add_argument("--lr", type=float, help=f"learning rate (default: {d.lr} with --tiny, {FULL_LR} without)")
    args = parser.parse_args()
    run(lambda: run_command(args), parser, args)


def run_command(args: argparse.Namespace) -> dict | list[dict]:
    lr = (GrpoConfig.lr if args.tiny else FULL_LR) if args.lr is None else args.lr
    usual = START_STEPS if args.make_start else GrpoConfig.steps
    steps = usual if args.steps is None else args.steps
    c = GrpoConfig(steps, args.prompts, args.group, lr=lr, max_new_tokens=args.max_new_tokens)
    if not args.tiny and (args.controls or args.seeds is not None):
        raise InputError("--controls and --seeds go with --tiny only")
    if args.make_start:
        return make_start(args.out or STARTS_FROM, steps, args.seed, args.overwrite)
    if args.tiny:
        if args.weights or args.reward or args.data or args.resume:
            raise InputError("--tiny brings its own weights, reward models and prompts, and is not resumed")
        seeds = 1 if args.seeds is None else args.seeds
        if seeds < 1:
            raise InputError(f"--seeds {seeds}: at least 1")
        names = REWARDS + (CONTROLS if args.controls else ())
        return run_tiny(c, names, range(args.seed, args.seed + seeds), args.out, args.overwrite)
    if not (args.reward and args.data and args.out):
        raise InputError("give --tiny, or all of --reward, --data and --out")
    return run_files(args, c)


if __name__ == "__main__":
    main()
