"""What is found out about records before a run, rather than after days of it.

See it: `pytest tests/test_checks.py`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
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
        for shown in sources_of(record):
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


def preferring(records: Sequence[Some]) -> list[Some]:
    """Those `with_preference`; how many were left out is said."""
    kept, n = with_preference(records), len(records)
    if left := n - len(kept):
        why = "all their responses are equally good or there is only one"
        parallel.say(f"left out, since {why}: {left} of {n} records")
    return kept


def identity(records: Sequence[Record], bad: Sequence[str] | None, path: Path) -> dict:
    """What a run remembers of the records in a file beside the file itself: the names and sizes of their pictures, and
    which lines were left out."""
    shown = [[stat[:2] for source in sources_of(record) for stat in stats_of(source)] for record in records]
    about = {"pictures": hashlib.sha256(json.dumps(shown).encode()).hexdigest(), "records": len(records)}
    places = [re.match(r":\d+|, item \d+", error.removeprefix(str(path))) for error in bad or ()]
    left_out = [place[0] for place in places if place]  # others are of another file
    return about | ({"left_out": left_out} if left_out else {})


def sources_of(record: Record) -> list[Path | bytes | Clip]:
    return [*record.images, *([record.video] if record.video else [])]


def stats_of(source: Path | bytes | Clip) -> list[tuple]:
    """Name, size and time of a picture's file, or of all files of a clip; of a picture without one, a digest."""
    if isinstance(source, bytes):
        return [(hashlib.sha256(source).hexdigest(),)]
    if isinstance(source, Clip) and source.path.is_dir():
        return [stat_of(file) for file in sorted(source.path.iterdir())]
    return [stat_of(source.path if isinstance(source, Clip) else source)]


def stat_of(path: Path) -> tuple:
    """Of what can't be looked at, and will fail if it is opened, the name alone."""
    try:
        return path.name, path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return (path.name,)


def report(bad: Sequence[str]) -> None:
    """What was left out, listed."""
    if bad:
        parallel.say(f"left out, {len(bad)} rows:\n  " + "\n  ".join(bad))
