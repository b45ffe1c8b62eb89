"""The reward model as a plain callable that other trainers can use: every group of answers judged in one pass.

    from trl import GRPOTrainer
    trainer = GRPOTrainer(..., reward_funcs=GroupReward("runs/rm", generations=8))

The signature is TRL's: `prompts, completions, **columns` -> one float an answer, or None where there is nothing to
judge. Prompts and completions are strings or lists of messages; pictures come in a column `image` or `images`, or as
image blocks inside the messages.

Answers to one prompt must arrive side by side, and whole: joint scores compare inside a group only. TRL keeps groups
whole where (per-device batch size x steps per generation) is divisible by the number of generations. In verl, group by
the sample's `uid` in the batch reward manager before calling this. Scores of different groups must not be compared:
in joint mode every group is its own scale.

See it: `pytest tests/test_trainers.py`.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path

from yojo.core.reward import RewardModel
from yojo.files import InputError


class GroupReward:
    """Loads the model at its first call, in the process that calls it; can be pickled before and after.

    generations: answers a group has. A run of answers to one prompt that is no multiple of it was cut by the batch: it
    is scored as it is and counted in `cut`, or, with `refuse_cut`, raises. None = a group is as long as its run.
    `passes` counts scoring passes.
    """

    def __init__(
        self,
        model_dir: str | Path,
        base: str | Path | None = None,
        mode: str | None = None,
        device: str | None = None,
        generations: int | None = None,
        refuse_cut: bool = False,
    ):
        if generations is not None and generations < 1:
            raise InputError(f"generations must be at least 1, got {generations}")
        self.model_dir, self.base, self.mode, self.device = str(model_dir), base, mode, device
        self.generations, self.refuse_cut = generations, refuse_cut
        self.passes = self.cut = 0
        self.__name__ = "group_reward"  # what TRL calls it in its logs
        self.rm: RewardModel | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rm": None}

    def __call__(self, prompts: Sequence, completions: Sequence, **columns) -> list[float | None]:
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts, {len(completions)} completions: one prompt an answer is needed")
        prompts = [(text_of(p), *images_of(p, columns, i)) for i, p in enumerate(prompts)]
        answers = [text_of(c) for c in completions]
        rewards: list[float | None] = []
        same = [(text, [id_of(image) for image in images]) for text, *images in prompts]
        for _, run in groupby(range(len(same)), key=lambda i: same[i]):
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
                rewards += self.score_group(prompts[group[0]], [answers[i] for i in group])
        return rewards

    def score_group(self, prompt: tuple, answers: list[str]) -> list[float | None]:
        """One group, in one pass. An empty answer gets one less than the lowest of the others; alone, None."""
        if self.rm is None:
            self.rm = RewardModel.load(self.model_dir, self.base, device=self.device)
        text, *images = prompt
        spoken = [text for text in answers if text.strip()]
        if not spoken:
            return [None] * len(answers)
        scores = self.rm.score(text, spoken, images or None, mode=self.mode)
        self.passes += 1
        given = iter(scores)
        return [next(given) if text.strip() else min(scores) - 1 for text in answers]


def text_of(content) -> str:
    """A string, or the text of a list of messages, turn after turn."""
    if isinstance(content, str):
        return content
    parts = []
    for message in content:
        inner = message["content"]
        blocks = [inner] if isinstance(inner, str) else [b["text"] for b in inner if b.get("type") == "text"]
        parts += blocks
    return "\n\n".join(parts)


def images_of(prompt, columns: dict, i: int) -> list:
    """The pictures beside prompt i: image blocks that carry one, else the row's `images` or `image`."""
    if not isinstance(prompt, str):
        blocks = [b for m in prompt if not isinstance(m["content"], str) for b in m["content"]]
        images = [b["image"] for b in blocks if b.get("type") == "image" and b.get("image") is not None]
        if images:
            return images
    for name in ("images", "image"):
        if columns.get(name) is not None and columns[name][i] is not None:
            return list(columns[name][i]) if name == "images" else [columns[name][i]]
    return []


def id_of(image) -> object:
    """What tells one picture from another: its path, or its size and a digest of its pixels."""
    return str(image) if isinstance(image, (str, Path)) else (image.size, sha256(image.tobytes()).digest())
