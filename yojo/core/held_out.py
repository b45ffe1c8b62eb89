"""Scores of records that were held out of training, and two controls: `Blanked` records show grey pictures, `swapped`
ones the pictures of another record. A model that relies on the picture must fall to chance on both.

See it: `pytest tests/test_pictures.py`.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint

from PIL import Image

from yojo.core import parallel
from yojo.core.ahead import ahead
from yojo.core.data import Record, encode, in_order, random_order
from yojo.core.reward import BATCH_TOKENS, LOOKED_AHEAD, RewardModel
from yojo.files import InputError
from yojo.media import picture_size
from yojo.video import open_video


def score_orders(
    rm: RewardModel,
    ordered: Iterable[tuple[Record, Sequence[int]]],
    mode: str | None = None,
    tokens: int = BATCH_TOKENS,
) -> Iterator[list[float]]:
    """Records, each with an order to show its responses in -> scores of each, in the record's own order. mode and
    tokens: as in `RewardModel.score_all`; with 1 token every record is a batch of its own."""
    orders = deque()

    def shown() -> Iterator[Record]:
        for record, order in ordered:
            orders.append(order)
            yield in_order(record, order)

    with ahead(lambda record: encode(record, rm.processor), shown(), most=LOOKED_AHEAD) as rows:
        for scores in rm.score_all(rows, mode, tokens):
            order = orders.popleft()
            yield [scores[order.index(i)] for i in range(len(order))]


def score_records(
    rm: RewardModel,
    records: Iterable[Record],
    seed: int,
    mode: str | None = None,
    tokens: int = BATCH_TOKENS,
    title: str | None = None,
) -> list[list[float]]:
    """Scores of every record, its responses shown in an order drawn from the seed: fed in file order, a joint model can
    turn position into accuracy. `title` names a progress bar."""
    rng = random.Random(f"{seed} evaluate")
    ordered = ((record, random_order(record, rng)) for record in records)
    return list(parallel.progress(score_orders(rm, ordered, mode, tokens), title, total=length_hint(records) or None))


@dataclass(frozen=True)
class Blanked(Sequence[Record]):
    """The same records with every picture and frame grey; made on access, or they would fill the memory."""

    records: Sequence[Record]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        record = self.records[i]
        with record.named():
            if record.pictures is not None and record.pictures.ids and not (record.images or record.video):
                raise InputError("its pictures are open already: what is to be blanked must bring its files")
            video = [] if record.video is None else open_video(record.video)
            frames = [(seconds, grey(frame.size)) for seconds, frame in video] or None
            images = [grey(picture_size(image)) for image in record.images]
            return replace(record, images=images, video=frames, pictures=None)


def grey(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))


def shown(record: Record) -> tuple:
    """What distinguishes its pictures from those of another record: its files, or what is open."""
    files = record.images, record.video
    return files if any(files) else (record.pictures,)


def swapped(records: Sequence[Record]) -> list[Record]:
    """The same records, each with the pictures of the next one that shows others."""
    swaps = []
    for i, record in enumerate(records):
        others = (records[(i + k) % len(records)] for k in range(1, len(records)))
        other = next((o for o in others if shown(o) != shown(record)), None)
        if other is None:
            raise InputError("no other record has other pictures: there is nothing to swap")
        theirs = {name: getattr(other, name) for name in ("images", "video", "max_crops", "pictures")}
        swaps.append(replace(record, **theirs))
    return swaps


def controls(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """The controls that differ from the records themselves; none if there are no pictures."""
    made: dict[str, Sequence[Record]] = {}
    if any(record.images or record.video for record in records):
        made["blank"] = Blanked(records)
    if any(shown(record) != shown(records[0]) for record in records):
        made["swapped"] = swapped(records)
    return made
