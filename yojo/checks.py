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


def preferring(records: Sequence[Some], say: Callable[[str], object] = parallel.say) -> list[Some]:
    """Those `with_preference`; how many were left out is said."""
    kept = with_preference(records)
    if left := len(records) - len(kept):
        say(f"left out, since all their responses are as good or there is only one: {left} of {len(records)} records")
    return kept


def identity(records: Sequence[Record], bad: Sequence[str] | None, path: Path) -> dict:
    """What a run remembers of the records in a file beside the file itself: the names and sizes of their pictures, and
    which lines were left out."""
    shown = [[size_of(source) for source in sources_of(record)] for record in records]
    about = {"pictures": hashlib.sha256(json.dumps(shown).encode()).hexdigest(), "records": len(records)}
    places = [re.match(r":\d+|, item \d+", error.removeprefix(str(path))) for error in bad or ()]
    left_out = [place[0] for place in places if place]  # others are of another file
    return about | ({"left_out": left_out} if left_out else {})


def sources_of(record: Record) -> list[Path | bytes | Clip]:
    return [*record.images, *([record.video] if record.video else [])]


def size_of(source: Path | bytes | Clip) -> tuple:
    path = source.path if isinstance(source, Clip) else source
    if isinstance(path, bytes):
        return ("", len(path))
    return path.name, [f.stat().st_size for f in (sorted(path.iterdir()) if path.is_dir() else [path])]


def report(bad: Sequence[str], say: Callable[[str], object] = parallel.say) -> None:
    """What was left out, listed."""
    if bad:
        say(f"left out, {len(bad)} rows:\n  " + "\n  ".join(bad))
