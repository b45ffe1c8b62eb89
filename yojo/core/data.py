"""Preference records and batches.

A record is one line of JSONL, in the schema of the released training code:

    {"prompt": str, "responses": [str, ...], "rankings": [int, ...],
     "image": path | "images": [path, ...] | "video": path}

rankings: 1 = best, ties allowed, one per response; only training and evaluation need them. Paths are relative to the
JSONL file, and a picture may be a data or file URL; a video is a folder of frames or an animation
(`video.open_video`), its frames `sampling_interval` seconds apart, which the released records also call `fps`.
`question` is another name of `prompt`. A bad line raises `InputError` with the file and the line number; nothing is
skipped.

A batch holds several rows. By default a row is one record; records that share a row do not attend to each other.

See it: `pytest tests/test_data.py`.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from yojo.core.image import Pictures
from yojo.core.mask import PADDING, PROMPT, AttentionMask
from yojo.core.prompt import Encoded, Processor
from yojo.files import InputError, passed_over, read_lines
from yojo.unread import refuse_unread
from yojo.video import Video, shown_by

Some = TypeVar("Some", bound="Record")


@dataclass(frozen=True)
class Record:
    """One preference record; without responses, a prompt. `rankings`: None if there are none; `where`: file and line.
    The prompt may come with `images` or a `video`, in any form of `media.picture_from` and `video.open_video`, cut into
    at most `max_crops` (None = the checkpoint's), or with `pictures`, which are open already."""

    prompt: str
    responses: list[str] = field(default_factory=list)
    rankings: list[int] | None = None
    images: list[Path | bytes | Image.Image] = field(default_factory=list)
    where: str = ""
    video: Video = None
    max_crops: int | None = None
    pictures: Pictures | None = None

    def __post_init__(self):
        if (ranks := self.rankings) is None:
            return
        n = len(self.responses) if isinstance(self.responses, (list, tuple)) else 0
        good = isinstance(ranks, list) and len(ranks) == n and all(type(r) is int and 1 <= r <= n for r in ranks)
        if not good or 1 not in ranks:
            ranks = f"{ranks!r:.99}; 1 is the best and must be there, none is above {n}"
            raise InputError(f"{self.prefix}rankings must be {n} whole numbers from 1, got {ranks}")

    @property
    def prefix(self) -> str:
        """How an error about it begins."""
        return f"{self.where}: " if self.where else ""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of the block begin with the file and the line."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.prefix}{error}") from None


def encode(record: Record, processor: Processor, pixels: bool = True) -> Encoded:
    """A record as the model reads it. pixels False: a row of the same length, its pictures not opened."""
    pictures = open_pictures(record, processor, pixels)
    with record.named():
        row = processor.encode(record.prompt, record.responses, pictures=pictures)
        return replace(row, prefix=record.prefix)


def open_pictures(record: Record, processor: Processor, pixels: bool = True) -> Pictures:
    """The pictures of a record: those that are open already, or its files, opened."""
    if record.pictures is not None:
        return record.pictures
    with record.named():
        return processor.open_pictures(record.images or None, record.video, record.max_crops, pixels)


def with_preference(records: Iterable[Some]) -> list[Some]:
    """The records with at least two different ranks. One response, or several of equal rank, teach nothing, and every
    model is right about them. If no record is left, InputError is raised."""
    records = list(records)
    if not (kept := [record for record in records if len(set(record.rankings or [])) > 1]):
        raise InputError(f"none of {len(records)} records says which of its responses is better: at least two ranks")
    return kept


def random_order(record: Record, rng: random.Random) -> list[int]:
    return rng.sample(range(len(record.responses)), len(record.responses))


def in_order(record: Record, order: Sequence[int]) -> Record:
    """The same record, its responses in another order."""
    ranks = record.rankings and [record.rankings[i] for i in order]
    return replace(record, responses=[record.responses[i] for i in order], rankings=ranks)


KEYS = "prompt question responses rankings image images video sampling_interval fps".split()


def read_records(path: str | Path, ranked=True, answered=True, bad: list[str] | None = None) -> list[Record]:
    """All records of a JSONL file; `ranked`, `answered`: as in `record_of`. A bad one raises or, with a list `bad`, is
    left out and its error put there."""
    records = []
    for where, raw in read_lines(path, bad):
        with passed_over(bad):
            records.append(record_of(raw, where, Path(path).parent, ranked, answered))
    if not records:
        raise InputError(f"{path} holds no records" + "".join(f"; the first: {error}" for error in (bad or [])[:1]))
    return records


def record_of(raw: dict, where: str, folder: Path, ranked: bool = True, answered: bool = True) -> Record:
    """One line as a record; paths are relative to `folder`. `ranked`: a record without rankings raises; not `answered`:
    a prompt, whatever responses and rankings the line holds."""
    remedy = f"read are {', '.join(KEYS)}; take it out of the line"
    refuse_unread(raw, KEYS, f"{where}:", remedy, video=bool(raw.get("video")))
    prompts = [raw[key] for key in ("prompt", "question") if raw.get(key) is not None]
    if len(prompts) > 1:
        raise InputError(f"{where} has both prompt and question: keep one")
    prompt, responses, rankings = prompts[0] if prompts else None, raw.get("responses"), raw.get("rankings")
    if not isinstance(prompt, str):
        raise InputError(f"{where}: prompt must be a string, got {prompt!r}")
    images, video = shown_by(raw, where, folder)
    if not answered:
        return Record(prompt, images=images, where=where, video=video)
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise InputError(f"{where}: responses must be a list of at least one string, got {responses!r}")
    if empty := [i for i, r in enumerate(responses, 1) if not r.strip()]:
        raise InputError(f"{where}: response {empty[0]} is empty: there is nothing to score")
    if rankings is None and ranked:
        raise InputError(f"{where} has no rankings")
    return Record(prompt, responses, rankings, images, where, video)


@dataclass(frozen=True)
class Batch:
    """Rows ready for the backbone. input_ids, positions int [B, T], on its device; the rest is needed on the host:
    score_positions int [R, 2], one (row, index) a response, in the order of the records; counts: responses of each
    record; pictures: those of all rows, in order."""

    input_ids: Tensor
    mask: AttentionMask
    positions: Tensor
    score_positions: Tensor
    counts: list[int]
    pictures: Pictures


def collate(
    rows: Sequence[Encoded | Sequence[Encoded]], mode: str, pad_id: int = 0, device: str | torch.device = "cpu"
) -> Batch:
    """Encoded records -> one batch on a device, padded on the right. An entry that is itself a list shares one row."""
    rows = [[row] if isinstance(row, Encoded) else list(row) for row in rows]
    records = [e for row in rows for e in row]

    def pad(columns: Iterable[list[Tensor]], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.cat(c) for c in columns], batch_first=True, padding_value=value)

    pictures = join([e.pictures for e in records])
    ids = pad(([e.ids for e in row] for row in rows), pad_id)
    record = pad(([torch.full_like(e.ids, i) for i, e in enumerate(row)] for row in rows), PADDING)
    response = pad(([e.response for e in row] for row in rows), PROMPT)
    image = pad(([e.image for e in row] for row in rows), False)
    positions = pad(([e.positions(mode) for e in row] for row in rows), 0)
    scores = []
    for b, row in enumerate(rows):
        starts = accumulate((len(e.ids) for e in row), initial=0)
        scores += [(b, start + t) for start, e in zip(starts, row, strict=False) for t in e.score_positions]
    scores = torch.tensor(scores, dtype=torch.long).view(-1, 2)
    mask = AttentionMask(record, response, image, mode)
    ids, positions = (x.to(device, non_blocking=True) for x in (ids, positions))
    return Batch(ids, mask, positions, scores, [len(e.spans) for e in records], pictures)


def join(pictures: Sequence[Pictures]) -> Pictures:
    """The pictures of several records as one: pooling indices move up by the patches before them, narrow windows are
    filled up with -1."""
    pictures, before = [p for p in pictures if len(p.pooling)], 0
    if len(pictures) < 2:
        return pictures[0] if pictures else Pictures()
    pooling, widest = [], max(p.pooling.shape[1] for p in pictures)
    for p in pictures:
        windows = torch.where(p.pooling >= 0, p.pooling + before, -1)
        pooling.append(nn.functional.pad(windows, (0, widest - windows.shape[1]), value=-1))
        before += p.patches.shape[0] * p.patches.shape[1]
    features = [p.features for p in pictures if p.features is not None]
    if len(features) not in (0, len(pictures)):
        raise ValueError("some pictures of a batch have features and others have none: keep those of all, or of none")
    return Pictures(
        torch.cat([p.patches for p in pictures]),
        torch.cat(pooling),
        [grid for p in pictures for grid in p.grids],
        [token for p in pictures for token in p.ids],
        torch.cat(features) if features else None,
    )
