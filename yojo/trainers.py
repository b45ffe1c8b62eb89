"""The reward model as a plain callable that other trainers can use: every group of answers judged in one pass.

    from trl import GRPOTrainer
    trainer = GRPOTrainer(..., reward_funcs=GroupReward("runs/rm", generations=8))

The signature is TRL's: `prompts, completions, **columns` -> one float an answer, or None where there is nothing to
judge. Prompts and completions are strings or lists of messages; pictures stand in image blocks, or in a column `image`,
`images`, `video` or `videos` (`messages.py` lists the forms).

Answers to one prompt must arrive side by side, and whole: joint scores compare inside a group only. TRL keeps groups
whole where (per-device batch size x steps per generation) is divisible by the number of generations. In verl, group by
the sample's `uid` in the batch reward manager before calling this. Scores of different groups must not be compared:
in joint mode every group is its own scale.

See it: `pytest tests/test_trainers.py`.
"""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from yojo.core.prompt import MAX_RESPONSES
from yojo.core.reward import RewardModel
from yojo.files import InputError, as_path
from yojo.messages import APART, COLUMNS, Prompt, answer_of, prompt_of
from yojo.unread import shows


class GroupReward:
    """Loads the model at its first call, in the process that calls it; can be pickled before and after.

    generations: answers a group has. A run of answers to one prompt that is no multiple of it was cut by the batch: it
    is scored as it is and counted in `cut`, or, with `refuse_cut`, raises. None = a group is as long as its run.
    device: None = CUDA if there is one. ignore: columns that show something and are not to be looked at. `passes`
    counts scoring passes.

    An answer that cannot be judged ends no run: it is empty, no text of the assistant's, no valid Unicode, its score is
    not finite, or, of answers that are too long for one row together, it is among the longest. It gets one less than
    the lowest score of its group, or None where none of the group can be judged; it is counted in `unjudged`, and the
    first one is warned of.
    """

    def __init__(
        self,
        model_dir: str | Path,
        base: str | Path | None = None,
        mode: str | None = None,
        device: str | None = None,
        generations: int | None = None,
        refuse_cut: bool = False,
        ignore: Sequence[str] = (),
    ):
        if generations is not None and not (type(generations) is int and 1 <= generations <= MAX_RESPONSES):
            raise InputError(f"generations must be at least 1 and at most {MAX_RESPONSES}, got {generations}")
        self.model_dir, self.base, self.mode, self.device = str(as_path(model_dir, "model_dir")), base, mode, device
        self.generations, self.refuse_cut, self.ignore = generations, refuse_cut, tuple(ignore)
        self.passes = self.cut = self.unjudged = 0
        self.__name__ = "group_reward"  # what TRL calls it in its logs
        self.rm: RewardModel | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rm": None}

    def __call__(self, prompts: Sequence, completions: Sequence, **columns) -> list[float | None]:
        for name, values in (("prompts", prompts), ("completions", completions)):
            if isinstance(values, (str, Mapping, Set)) or not isinstance(values, Iterable):
                raise InputError(f"{name} must be a list, got {values!r:.99}")
        prompts, completions = list(prompts), list(completions)
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts, {len(completions)} completions: one prompt an answer is needed")
        rows = rows_of(columns, len(prompts), self.ignore)
        asked = [prompt_of(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        keys = [prompt.key for prompt in asked]
        rewards: list[float | None] = []
        for _, run in groupby(range(len(keys)), key=lambda i: keys[i]):
            run = list(run)
            size = self.generations or len(run)
            if len(run) % size:
                if self.refuse_cut:
                    raise InputError(
                        f"{len(run)} answers to one prompt are no whole groups of {size}: make (batch size x steps per "
                        f"generation) divisible by {size}"
                    )
                self.cut += 1
            for start in range(0, len(run), size):
                group = run[start : start + size]
                rewards += self.score_group(asked[group[0]], [completions[i] for i in group])
        return rewards

    def score_group(self, prompt: Prompt, completions: Sequence) -> list[float | None]:
        """One group, in one pass."""
        if self.rm is None:
            self.rm = RewardModel.load(self.model_dir, self.base, device=self.device)
        answers, why = texts_of(completions)
        scores = judged(self.rm, prompt, answers, self.mode or self.rm.mode, why)
        self.passes += bool(scores)
        if why:
            if not self.unjudged:
                i, reason = next(iter(why.items()))
                asked = f"answer {i + 1} to {prompt.text[:60]!r} cannot be judged: {reason}"
                warnings.warn(f"{asked}; `unjudged` counts such answers", stacklevel=3)
            self.unjudged += len(why)
        floor = min(scores.values()) - 1 if scores else None
        return [scores.get(i, floor) for i in range(len(completions))]


def rows_of(columns: dict, n: int, ignore: Sequence[str]) -> list[dict]:
    """Columns -> the row of each prompt. What is no list, such as a trainer's state, is no column."""
    held = {}
    for name, column in columns.items():
        if name in ignore or column is None:
            continue
        text = isinstance(column, (str, bytes))
        listed = not text and (isinstance(column, Sequence) or getattr(column, "ndim", 0) > 0)
        if listed and len(column) == n:
            held[name] = list(column)
        elif name in (*COLUMNS, APART) or shows(column):
            raise InputError(f"the column {name!r} must be a list of {n}, one for each prompt")
    return [{name: column[i] for name, column in held.items()} for i in range(n)]


def texts_of(completions: Sequence) -> tuple[dict[int, str], dict[int, str]]:
    """Completions -> by number, the texts to be judged, and why others cannot be."""
    texts, why = {}, {}
    for i, completion in enumerate(completions):
        try:
            text = answer_of(completion)
            text.encode("utf-8")
            if not text.strip():
                raise InputError("it is empty")
            texts[i] = text
        except UnicodeEncodeError as error:
            why[i] = f"it is not valid Unicode: {error}"
        except InputError as error:
            why[i] = str(error)
    return texts, why


def judged(rm: RewardModel, prompt: Prompt, answers: dict[int, str], mode: str, why: dict[int, str]) -> dict:
    """Scores of answers, by number, from one pass. Where the row is too long, the longest answers are left out; those,
    and answers whose score is not finite, are put into `why`."""
    shown = rm.processor.open_pictures(prompt.images or None, prompt.video)
    endless, kept = replace(rm.processor, max_tokens=sys.maxsize), dict(answers)
    while kept:
        row = endless.encode(prompt.text, list(kept.values()), pictures=shown)
        needed = len((row.distinct()[0] if mode == "isolated" else row).ids)
        if needed <= rm.processor.max_tokens:
            break
        lengths = [stop - start for start, stop in row.spans]
        longest = list(kept)[lengths.index(max(lengths))]
        del kept[longest]
        why[longest] = f"{needed} tokens of the group are more than the model's {rm.processor.max_tokens}"
    scores = dict(zip(kept, rm.raw_scores([row], mode)[0], strict=True)) if kept else {}
    why |= {i: f"its score is {score}" for i, score in scores.items() if not math.isfinite(score)}
    return {i: score for i, score in scores.items() if math.isfinite(score)}
