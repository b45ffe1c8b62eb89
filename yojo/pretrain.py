"""Make `weights/tiny` from nothing: a tokenizer, and a Molmo2 of about 1.4 million parameters that can see shapes.

    python -m yojo.pretrain --out weights/tiny

A row is one picture and several short conversations about it, laid out as responses are (`mask.py`): in one half of
each step isolated, so that the picture is read once and no conversation attends to another, in the other half joint, as
one long conversation. A reward model meets both.

    loss = cross-entropy of the answers' tokens
         + AUXILIARY * what stands in each cell, read off each picture token
         + FACTS * what is true of the thing, read off each token of a description of it that is to be checked
         + VERDICT * which of its words so far are wrong, read off the same tokens

These read-outs are linear and are thrown away afterwards. The first (shape, colour, size, row, column) teaches the
tower directly, where the words' loss reaches it only through the decoder. The others teach the decoder to compare word
by word, where the answer "wrong size, row" says it only once, at the end; for the facts, see LOG.md.
"""

import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE
from torch import Tensor, nn

from yojo.cli import WEIGHTS, Parser, add_model_options, refuse_existing, run, shipped, whole
from yojo.core.config import Config, ConnectorConfig, ImageConfig, Markup, TextConfig, VisionConfig
from yojo.core.data import Batch, collate
from yojo.core.generate import generate
from yojo.core.mask import MODES
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import TURN_END, Encoded, Processor, Tokenizer
from yojo.core.training import FitConfig, fit
from yojo.files import write_json, write_lines
from yojo.initial import init_weights
from yojo.settings import preprocessor_json
from yojo.tiny import world
from yojo.tiny.talks import CHECK, Talk, check, describe, describe_held_out, look_up, place, presence, talks
from yojo.weights import pick_device, save_backbone

TEXT = TextConfig(128, 4, 4, 2, 32, 384, 512, 16, 4096, 10_000.0)
VISION = VisionConfig(96, 3, 4, 24, 256, 14, 36)
CONNECTOR = ConnectorConfig(96, 4, 24, 256, (-1, -3))
IMAGES = ImageConfig(size=world.GRID * world.CELL, margins=(1, 1), max_crops=1)
PICTURES, TALKS = 8, 8  # pictures in a micro-batch, conversations about each
AUXILIARY, FACTS, VERDICT = 0.5, 0.5, 1.0  # weights of the read-outs
FIT = FitConfig(
    steps=4800, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup=100, schedule="cosine", accumulate=len(MODES)
)

# -------------------------------------------------------------------------------------------------------- tokenizer

# Qwen2's pre-tokenizer: contractions, words with one leading character, single digits, punctuation, blank lines.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # below vocab_size: a policy must be able to stop
PICTURE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>")
PICTURE_TOKENS += ("<frame_start>", "<frame_end>", "<|video|>")  # above it, in the release's order


def make_tokenizer(path: Path, texts: list[str]) -> None:
    """Byte-level BPE over all bytes, trained on `texts`, with Molmo2's added tokens at the places they have there."""
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    size = TEXT.vocab_size - len(TEXT_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    if bpe.get_vocab_size() != size:
        raise RuntimeError(f"the texts give {bpe.get_vocab_size()} tokens, the model has room for exactly {size}")
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TEXT_TOKENS + PICTURE_TOKENS])
    bpe.save(str(path))


def corpus() -> list[str]:
    """What the tokenizer is trained on: the world's own sentences, and some English of a fixed wording (`LICENSE`)."""
    rng = random.Random(0)
    sentences = [text for _ in range(4000) for talk in talks(world.make_scene(rng), rng, 4) for text in talk]
    english = shipped("LICENSE").read_text(encoding="utf-8").splitlines()
    return ["user\n" + text for text in sentences] + ["assistant\n"] * 4000 + english


# ------------------------------------------------------------------------------------------------------------ batch


class Rows:
    """Batches of rows: BOS, one picture, and `TALKS` conversations; micro-batch 0 of a step is joint, 1 isolated."""

    def __init__(self, processor: Processor, seed: int, device: str | torch.device = "cpu"):
        self.processor, self.seed, self.device = processor, seed, device
        self.encode = lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, question: str, answer: str) -> tuple[list[int], int, Tensor]:
        """One conversation, where its answer starts, and of each token [T, 1 + slots]: the id that follows, where that
        is part of the answer, and `wrong_so_far`."""
        turn = self.processor.encode(question, []).ids[1:].tolist()  # without BOS
        reply = [*self.processor.tokenizer.encode(answer), self.processor.tokenizer.id(TURN_END)]
        labels = torch.full((len(turn + reply), 1 + len(world.SLOTS)), -1)
        labels[len(turn) - 1 : -1, 0] = torch.tensor(reply)
        role = "user\n"
        for t, (_, end) in enumerate(self.processor.tokenizer.text.encode(role + question).offsets, 1):
            labels[t, 1:] = torch.tensor(wrong_so_far(question, answer, end - len(role)))
        return turn + reply, len(turn), labels

    def start_row(self, scene: world.Scene, start: Sequence[int] = ()) -> Encoded:
        """BOS, the scene's picture, and the start of a conversation."""
        pictures = self.processor.open_pictures(world.render(scene))
        return self.processor.row([self.processor.tokenizer.id(TURN_END), *pictures.ids, *start], pictures)

    def batch(self, step: int, micro_batch: int, size: int = PICTURES) -> tuple[Batch, dict[str, Tensor]]:
        """The rows, and what is to be learned: the tokens after which the next one is `target`; those `judged`, with
        what is `wrong` and `true`; what is in the `cells`."""
        rng = random.Random(f"{self.seed} {step} {micro_batch}")
        scenes = [world.make_scene(rng) for _ in range(size)]
        rows, labels = zip(*(self._row(scene, talks(scene, rng, TALKS)) for scene in scenes), strict=True)
        labels, facts = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1), len(world.SLOTS)
        target, wrong, true = labels.split((1, facts, facts), dim=-1)
        spoken, judged = target[..., 0] >= 0, wrong[..., 0] >= 0
        learned = {"spoken": spoken.nonzero(), "target": target[spoken].flatten(), "judged": judged.nonzero()}
        learned |= {"wrong": wrong[judged].float(), "true": true[judged]}
        cells = [cell for scene in scenes for _ in range(2) for cell in cell_labels(scene)]
        learned |= {"cells": torch.tensor(cells)}
        return collate(rows, MODES[micro_batch], device=self.device), {k: v.to(self.device) for k, v in learned.items()}

    def _row(self, scene: world.Scene, talk: list[Talk]) -> tuple[Encoded, Tensor]:
        """One row, and of each token what `_encode` says of it and what is true of the thing that its conversation asks
        about; -1 where nothing is to be learned."""
        start, pieces = self.start_row(scene), []
        labels = [torch.full((len(start.ids), 1 + 2 * len(world.SLOTS)), -1)]
        for question, answer in talk:
            piece, _, said = self.encode(question, answer)
            pieces.append(piece)
            true = torch.tensor(facts_asked_about(scene, question)).expand(len(piece), -1)
            labels.append(torch.cat([said, true], dim=1))
        return start.continued(pieces), torch.cat(labels)


NOTHING = [-1] * len(world.SLOTS)  # no verdict at this token


def wrong_so_far(question: str, answer: str, end: int) -> list[int]:
    """Of a question that asks to check a description, read up to character `end`: 1 for each fact that has been said
    and that the answer, "wrong size, row", lists. `NOTHING` before the first fact, and for other questions."""
    found = world.DESCRIPTION.search(question) if question.endswith(CHECK) else None
    if found is None or end < found.end(min(world.SLOTS, key=found.end)):
        return NOTHING
    errors = answer.removeprefix("wrong ").split(", ")
    return [int(slot in errors and found.end(slot) <= end) for slot in world.SLOTS]


def facts_asked_about(scene: world.Scene, question: str) -> list[int]:
    """Each slot's true value as a number, of the thing that "Describe the ..." names; -1 for other questions."""
    found = re.match(r"Describe the (\w+)", question)
    facts = scene.facts(scene.find(found[1])) if found else {}
    return [list(values).index(facts[slot]) if found else -1 for slot, values in world.SLOTS.items()]


FACT_SIZES = tuple(len(values) for values in world.SLOTS.values())
AUX_SIZES = (len(world.SHAPES) + 1, len(world.COLOURS) + 1, len(world.SIZES) + 1, 3, 3)


def cell_labels(scene: world.Scene) -> list[tuple[int, ...]]:
    """For each cell, row by row: shape, colour, size (the last class = empty), row, column."""
    things, labels = {(t.row, t.column): t for t in scene.things}, []
    for (r, row), (c, column) in product(enumerate(world.ROWS), enumerate(world.COLUMNS)):
        here = things.get((row, column))
        slots = {slot: [*world.SLOTS[slot], None] for slot in ("shape", "colour", "size")}
        labels.append((*(values.index(getattr(here, slot, None)) for slot, values in slots.items()), r, c))
    return labels


# ------------------------------------------------------------------------------------------------------------- main


class PretrainLoss:
    """`loss(step, micro_batch)` for `fit`."""

    def __init__(self, model: Molmo2, rows: Rows, generator: torch.Generator):
        self.model, self.rows = model, rows
        widths = (sum(AUX_SIZES), sum(FACT_SIZES), len(world.SLOTS))
        self.readouts = self.probe, self.facts, self.verdict = [nn.Linear(TEXT.hidden_size, width) for width in widths]
        for readout in self.readouts:
            nn.init.normal_(readout.weight, std=0.02, generator=generator)
            nn.init.zeros_(readout.bias)
            readout.to(model.device)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *(p for readout in self.readouts for p in readout.parameters())]

    def __call__(self, step: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        batch, learned = self.rows.batch(step, micro_batch)
        features = self.model.encode_images(batch.pictures)
        keep = torch.cat([learned["spoken"], learned["judged"]])
        hidden = self.model(batch.input_ids, features, batch.mask, batch.positions, keep)
        spoken, judged = hidden.split([len(learned["spoken"]), len(learned["judged"])])
        logits = self.model.logits(spoken)
        words = F.cross_entropy(logits, learned["target"])
        cells = classes(self.probe(features), AUX_SIZES, learned["cells"])
        facts = classes(self.facts(judged), FACT_SIZES, learned["true"])
        verdict = F.binary_cross_entropy_with_logits(self.verdict(judged), learned["wrong"])
        right = (logits.argmax(-1) == learned["target"]).float().mean().item()
        logged = {"words": words.item(), "cells": cells.item(), "facts": facts.item(), "verdict": verdict.item()}
        return words + AUXILIARY * cells + FACTS * facts + VERDICT * verdict, logged | {"accuracy": right}


def classes(guesses: Tensor, sizes: tuple[int, ...], labels: Tensor) -> Tensor:
    """Mean cross-entropy of several classifications side by side: guesses [M, sum of sizes], labels [M, len(sizes)]."""
    each = zip(guesses.split(sizes, dim=-1), labels.T, strict=True)
    return torch.stack([F.cross_entropy(guess, label) for guess, label in each]).mean()


KINDS = (describe, describe_held_out, look_up, place, presence, check)


@torch.no_grad()
def answer_to(model: Molmo2, rows: Rows, scene: world.Scene, question: str, answer: str) -> bool:
    """Is the greedy answer right, word for word?"""
    talk, start, _ = rows.encode(question, answer)
    batch = collate([rows.start_row(scene, talk[:start])], "joint", device=model.device)
    inputs = batch.input_ids, model.encode_images(batch.pictures), batch.mask
    return generate(model, *inputs, max_new_tokens=20, temperature=0)[0].tolist() == talk[start:]


def evaluate_answers(model: Molmo2, rows: Rows, seed: int, count: int = 200) -> dict[str, float]:
    """Greedy answers about new pictures, the share that is right word for word, by kind of question."""
    figures = {}
    for kind in KINDS:
        rng, right = random.Random(f"examine {seed} {kind.__name__}"), 0
        for _ in range(count):
            scene = world.make_scene(rng, held_out=kind is describe_held_out)
            right += answer_to(model, rows, scene, *kind(scene, rng))
        figures[kind.__name__] = right / count
    return figures


def write_companions(folder: Path) -> Processor:
    """Tokenizer and processor files of the tiny checkpoint."""
    make_tokenizer(folder / "tokenizer.json", corpus())
    names = {"bos_token": TURN_END, "eos_token": TURN_END, "pad_token": TEXT_TOKENS[0]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    write_json(folder / "preprocessor_config.json", preprocessor_json(IMAGES))
    write_json(folder / "processor_config.json", asdict(Markup()))
    return Processor.from_folder(folder, TEXT.max_position_embeddings)


def new_model(tokenizer: Tokenizer, generator: torch.Generator) -> Molmo2:
    end, pad = tokenizer.id(TURN_END), tokenizer.id(TEXT_TOKENS[0])
    model = Molmo2(Config(TEXT, VISION, CONNECTOR, tokenizer.id("<im_patch>"), (end,), pad))
    init_weights(model, generator, std=0.05)
    nn.init.normal_(model.model.vision_backbone.image_vit.positional_embedding, std=0.3, generator=generator)
    return model


def pretrain(out: Path, steps: int, seed: int, overwrite: bool, device: str | None = None) -> dict[str, float]:
    refuse_existing(out, overwrite)
    where = pick_device(device)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as companions:
        processor = write_companions(Path(companions))
        model = new_model(processor.tokenizer, generator).to(where)
        loss = PretrainLoss(model, Rows(processor, seed, where), generator)
        log = fit(loss, loss.parameters(), replace(FIT, steps=steps), title="pretrain")
        curve = Path(companions) / "metrics.jsonl"
        write_lines(curve, [{k: round(v, 4) for k, v in entry.items()} for entry in log[::20] + log[-1:]])
        save_backbone(model, out, companions, overwrite, also=[curve])
        figures = evaluate_answers(model.eval(), loss.rows, seed)
    for kind, share in figures.items():
        print(f"{kind:20s} {share:.3f}")
    return figures


def main() -> None:
    what = "Train the tiny backbone from nothing (about 20 minutes)."
    parser = Parser(prog="python -m yojo.pretrain", description=what)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "tiny", metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--steps", type=whole(1), default=FIT.steps, metavar="S", help="training steps")
    add_model_options(parser, dtype=False, fuse=False)
    run(parser, lambda args: pretrain(args.out, args.steps, args.seed, args.overwrite, args.device))


if __name__ == "__main__":
    main()
