"""What is found out about records before a run, rather than after days of it.

See it: `pytest tests/test_checks.py`.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from yojo.core import parallel
from yojo.core.data import Record
from yojo.files import InputError, passed_over
from yojo.media import open_picture
from yojo.video import Clip, open_video

Kept = TypeVar("Kept")
Some = TypeVar("Some", bound=Record)


def keeping(
    records: Sequence[Record], check: Callable[[Record], Kept], bad: list[str] | None, title: str
) -> list[Kept]:
    """What `check` makes of every record. Where it raises, so does this or, with a list `bad`, the record is left out
    and the error put there. `title` names the progress bar."""
    kept = []
    for record in tqdm(records, title, delay=2, leave=False, disable=not parallel.is_main()):
        with passed_over(bad):
            kept.append(check(record))
    if not kept:
        raise InputError(f"no record is left: {bad[0]}" if bad else "no record is left")
    return kept


def openable(records: Sequence[Some], bad: list[str] | None) -> list[Some]:
    """Those whose pictures and frames can all be opened: every file is decoded once. bad: as in `keeping`."""
    faults: dict[object, str | None] = {}

    def check(record: Some) -> Some:
        for shown in [*record.images, *([record.video] if record.video else [])]:
            if shown not in faults:
                faults[shown] = fault(shown)
            if faults[shown] is not None:
                raise InputError(f"{record.prefix}{faults[shown]}")
        return record

    return keeping(records, check, bad, "opening pictures")


def fault(shown: object) -> str | None:
    """What is wrong with a picture or a clip."""
    try:
        open_video(shown) if isinstance(shown, Clip) else open_picture(shown)
    except InputError as error:
        return str(error)


def with_preference(records: Sequence[Some]) -> list[Some]:
    """Those that say which response is better. One response, or several that are all as good, teach nothing and make
    every model right."""
    return [record for record in records if len(set(record.rankings or [])) > 1]


def preferring(records: Sequence[Some], say: Callable[[str], object] = parallel.say) -> list[Some]:
    """The same; how many were left out is said, and none at all raises."""
    kept = with_preference(records)
    if not kept:
        raise InputError(f"none of {len(records)} records says which of its responses is better: at least two ranks")
    if left := len(records) - len(kept):
        say(f"left out, since all their responses are as good or there is only one: {left} of {len(records)} records")
    return kept


def report(bad: Sequence[str], say: Callable[[str], object] = parallel.say) -> None:
    """What was left out, listed."""
    if bad:
        say(f"left out, {len(bad)} rows:\n  " + "\n  ".join(bad))
