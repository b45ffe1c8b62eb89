"""What is found out about records before a run, rather than after days of it.

See it: `pytest tests/test_checks.py`.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from yojo.core import parallel
from yojo.core.data import Record, Some, with_preference
from yojo.files import InputError, passed_over
from yojo.media import open_picture
from yojo.video import Clip, open_video

Kept = TypeVar("Kept")


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
                faults[shown] = fault(shown, "a picture")
            if faults[shown] is not None:
                raise InputError(f"{record.prefix}{faults[shown]}")
        return record

    return keeping(records, check, bad, "opening pictures")


def fault(shown: object, name: str) -> str | None:
    """What is wrong with a picture or a clip; name: of a picture that has no path."""
    try:
        open_video(shown) if isinstance(shown, Clip) else open_picture(shown, name)
    except InputError as error:
        return str(error)


def preferring(records: Sequence[Some], say: Callable[[str], object] = parallel.say) -> list[Some]:
    """Those `with_preference`; how many were left out is said."""
    kept = with_preference(records)
    if left := len(records) - len(kept):
        say(f"left out, since all their responses are as good or there is only one: {left} of {len(records)} records")
    return kept


def report(bad: Sequence[str], say: Callable[[str], object] = parallel.say) -> None:
    """What was left out, listed."""
    if bad:
        say(f"left out, {len(bad)} rows:\n  " + "\n  ".join(bad))
