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
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from yojo import checks, memory
from yojo.cli import Parser, add_model_options, computed_on, rate, run, whole
from yojo.core import lora
from yojo.core.data import Record, encode, read_records
from yojo.core.grpo import POLICY, GrpoConfig, reward_fn, train_policy
from yojo.core.lora import LoraConfig
from yojo.core.prompt import MAX_RESPONSES, Encoded
from yojo.core.reward import RewardModel
from yojo.files import InputError, whole_folder
from yojo.runs import SavedRun, kept, run_folder, start_over
from yojo.store import digest, save_adapter
from yojo.tiny.captions import CONTROLS, REWARDS, START_STEPS, STARTS_FROM, make_start, run_tiny

FULL_LR, FULL_LORA = 1e-5, LoraConfig(r=64, alpha=64, dropout=0.0)  # without --tiny; chosen, never tried


def run_files(args: argparse.Namespace, c: GrpoConfig) -> dict:
    """The same loop on a checkpoint, a reward model and a file of prompts."""
    if c.group > MAX_RESPONSES:
        raise InputError(f"--group {c.group}: the reward model reads at most {MAX_RESPONSES} answers at once")
    training = run_folder(args.out, args.overwrite, args.resume)
    bad: list[str] | None = [] if args.keep_going else None
    prompts = checks.openable(read_records(args.data, answered=False, bad=bad), bad)
    rm = RewardModel.load(args.reward, args.weights, lm_head=True, **computed_on(args))
    if not rm.backbone.config.eos_ids:
        raise InputError(f"{rm.base}: generation_config.json names no eos_token_id, so no answer would ever end")
    prompts = checks.keeping(prompts, partial(fits, rm=rm, c=c), bad, "measuring")
    checks.report(bad or [])
    announce(prompts, rm, c)
    lora.add(rm.backbone, POLICY, FULL_LORA, torch.Generator().manual_seed(args.seed))
    rm.backbone.checkpointing = True
    start_over(training, args.resume)

    def sample_prompts(step: int) -> list[Record]:
        return random.Random(f"{args.seed} questions {step}").choices(prompts, k=c.prompts)

    bar = tqdm(total=c.steps, desc="grpo")

    def report(entry: dict) -> None:
        bar.update(entry["step"] + 1 - bar.n)
        bar.set_postfix({k: f"{entry[k]:.3f}" for k in ("reward", "kl", "length")})

    about = {"data": hashlib.sha256(args.data.read_bytes()).hexdigest(), "base": rm.fingerprint["weights"]}
    about |= {"mode": rm.mode, "reward": digest(args.reward), "dtype": str(rm.backbone.dtype)}
    about |= checks.identity(prompts, bad, args.data)
    state = SavedRun(training, about)
    with kept(state):
        log = train_policy(rm, reward_fn(rm, rm.mode), sample_prompts, c, args.seed, None, state, report)
        with whole_folder(args.out, args.overwrite) as new:
            save_adapter(rm.backbone, POLICY, new)
            shutil.copyfile(training / "metrics.jsonl", new / "metrics.jsonl")
    shutil.rmtree(training)
    return {"steps": len(log), "reward": log[-1]["reward"]}


def as_policy_reads(record: Record, rm: RewardModel) -> Encoded:
    """As `prompt_row`, of a record whose pictures need not be opened."""
    return encode(record, replace(rm.processor, layout="default"), pixels=False)


def announce(prompts: list[Record], rm: RewardModel, c: GrpoConfig) -> None:
    """What the run will need at most, said before it starts."""
    config, dtype, answers = rm.backbone.config, rm.backbone.dtype, c.prompts * c.group
    held = memory.training(config, dtype, FULL_LORA) + rm.backbone.lm_head.weight.nbytes
    held += sum(p.nbytes for p in lora.parameters(rm.backbone, rm.adapter)) if rm.adapter else 0
    longest = max((as_policy_reads(record, rm) for record in prompts), key=lambda row: len(row.ids))
    group = longest.continued([[0] * c.max_new_tokens] * c.group)
    learns = c.prompts * memory.activations(config, dtype, FULL_LORA, group, "isolated")
    learns += memory.logits(config, answers * c.max_new_tokens)
    speaks = memory.cache(config, dtype, answers, len(longest.ids) + c.max_new_tokens)
    parts = f"{held / 1e9:.1f} GB for weights, adapters, optimiser; while it learns {learns / 1e9:.1f} GB at most for"
    parts += f" activations and logits, while it speaks {speaks / 1e9:.1f} GB for keys and values"
    print(f"memory, computed: {(held + max(learns, speaks)) / 1e9:.1f} GB: {parts}")


def fits(record: Record, rm: RewardModel, c: GrpoConfig) -> Record:
    """A prompt that leaves room for the longest answers there may be: to the policy for one, to the judge for all."""
    asked = as_policy_reads(record, rm)
    most = encode(replace(record, responses=["a"] * c.group), rm.processor, pixels=False)
    needed = max(len(asked.ids) + c.max_new_tokens, len(most.ids) + c.group * (c.max_new_tokens - 1))
    if needed > rm.processor.max_tokens:
        raise InputError(
            f"{record.prefix}{c.group} answers of {c.max_new_tokens} tokens to it may need {needed} tokens, and the "
            f"model reads {rm.processor.max_tokens}: a smaller --group or --max-new-tokens"
        )
    return record


RULES = [
    ("without", "tiny make-start", "weights reward data resume keep-going dtype"),
    ("without", "make-start", "tiny prompts group max-new-tokens lr"),
    ("with", "tiny", "controls seeds"),
    ("with", "out make-start", "overwrite"),
    ("or", "tiny make-start", "reward data out"),
]


def main() -> None:
    parser = Parser(prog="python -m yojo.grpo", description="Train a policy with a one-pass reward.", rules=RULES)
    add, d = parser.add_argument, GrpoConfig()
    add("--tiny", action="store_true", help="the built-in models and world, judged by an oracle")
    add("--controls", action="store_true", help="two more rewards: random numbers, and the oracle itself")
    add("--seeds", type=whole(1), default=1, metavar="K", help="K seeds, from --seed on")
    add("--make-start", action="store_true", help="make the policy that --tiny starts from, in its place or in --out")
    add("--weights", type=Path, metavar="DIR", help="the folder of the backbone, if it has moved")
    add("--reward", type=Path, metavar="DIR", help="a reward model; its backbone is the policy's too")
    add("--data", type=Path, metavar="FILE", help="prompts, JSONL")
    add("--out", type=Path, metavar="DIR", help="folder for the policy's adapter; with --tiny, for every run's log")
    add("--overwrite", action="store_true", help="replace what --out holds")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--keep-going", action="store_true", help="leave bad prompts out, and list them")
    steps = f"training steps (default: {d.steps}, with --make-start {START_STEPS})"
    add("--steps", type=whole(1), metavar="S", help=steps)
    add("--prompts", type=whole(1), default=d.prompts, metavar="P", help="prompts a step")
    add("--group", type=whole(2), default=d.group, metavar="G", help="answers a prompt")
    add("--max-new-tokens", type=whole(1), default=d.max_new_tokens, metavar="T", help="length of an answer, at most")
    add("--lr", type=rate, metavar="X", help=f"learning rate (default: {FULL_LR}; with --tiny {d.lr})")
    add_model_options(parser, fuse=False)
    run(parser, run_command)


def run_command(args: argparse.Namespace) -> dict | list[dict]:
    if args.make_start:
        return make_start(args.out or STARTS_FROM, args.steps or START_STEPS, args.seed, args.overwrite, args.device)
    lr = args.lr if args.lr is not None else GrpoConfig.lr if args.tiny else FULL_LR
    steps, tokens = args.steps or GrpoConfig.steps, args.max_new_tokens
    c = GrpoConfig(steps, args.prompts, args.group, lr=lr, max_new_tokens=tokens)
    if args.tiny:
        names, seeds = REWARDS + (CONTROLS if args.controls else ()), range(args.seed, args.seed + args.seeds)
        return run_tiny(c, names, seeds, args.out, args.overwrite, args.device)
    return run_files(args, c)


if __name__ == "__main__":
    main()
