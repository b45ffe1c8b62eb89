"""Rows of public benchmarks -> records of ours.

A benchmark's row differs from a line of `core/data.py` in its fields' names and in how it says which answer is better.
So the fields are renamed, a converter of a few lines makes a line of ours of it, and the reader of all our files checks
that. To read another benchmark, add its fields and a converter.

See it: `pytest tests/test_evaluate.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yojo.core.data import Record, record_of
from yojo.files import InputError, read_lines


@dataclass(frozen=True)
class Item(Record):
    """One comparison. group: what ACC+ counts as one."""

    category: str = "all"
    group: str = ""


def records(row: dict) -> dict:
    return {"category": "all"} | row


PREFIXES = {
    "general": ("wildvision", "vlfeedback"),
    "hallucination": ("rlaif-v", "rlhf-v", "povid", "hallucination"),
    "reasoning": ("mathverse", "mmmu", "reasoning"),
}


def vl_rewardbench(row: dict) -> dict:
    """Ranks count from 0. No field names the category; where an id comes from says it."""
    ranks, name = row["rankings"], str(row["group"])
    if isinstance(ranks, list):
        row = row | {"rankings": [rank + 1 if type(rank) is int else rank for rank in ranks]}
    found = [category for category, starts in PREFIXES.items() if name.lower().startswith(starts)]
    if "category" not in row and not found:
        raise InputError(f"the id {name!r} starts with none of {PREFIXES}; --map category=FIELD")
    return {"category": found and found[0]} | row


def multimodal_rewardbench(row: dict) -> dict:
    if row["better"] not in ("Output1", "Output2"):
        raise InputError(f"Better must be one of Output1, Output2, got {row['better']!r}")
    ranks = [1, 2] if row["better"] == "Output1" else [2, 1]
    return row | {"responses": [row["first"], row["second"]], "rankings": ranks}


def pair(row: dict) -> dict:
    return row | {"responses": [row["chosen"], row["rejected"]], "rankings": [1, 2]}


# Of each format its converter, and of each of our names the field it is read from; `--map name=field` names another.
# Those of MR2Bench (records) and VideoRewardBench could not be confirmed against the published files.
SAME = {name: name for name in ("image", "images", "video", "prompt")}
CHOICE = SAME | {"chosen": "chosen", "rejected": "rejected"}
BETTER = {"first": "Output1", "second": "Output2", "better": "Better", "category": "Category", "image": "Image"}
FORMATS: dict[str, tuple[Callable[[dict], dict], dict[str, str]]] = {
    "records": (records, SAME | {"responses": "responses", "rankings": "rankings", "category": "category"}),
    "vl-rewardbench": (
        vl_rewardbench,
        SAME | {"prompt": "query", "responses": "response", "rankings": "human_ranking", "group": "id"},
    ),
    "multimodal-rewardbench": (multimodal_rewardbench, SAME | {"prompt": "Text"} | BETTER),
    "mm-rlhf": (pair, CHOICE | {"group": "id"}),
    "videorewardbench": (pair, CHOICE | {"category": "category"}),
}
OPTIONAL = {"image", "images", "video"}


def read_items(path: str | Path, form: str, mapping: Sequence[str] = (), bad: list[str] | None = None) -> list[Item]:
    """The items of a file; mapping: words "name=field". A bad row raises or, with a list `bad`, is left out and its
    error put there."""
    convert, fields = FORMATS[form]
    for word in mapping:
        name, _, field = word.partition("=")
        if not field or name not in {*fields, "category"}:
            raise InputError(f"--map {word}: NAME=FIELD, NAME one of {', '.join(fields)}, category")
        fields = fields | {name: field}
    items = []
    for where, raw in read_lines(path, bad):
        try:
            items.append(item_of(raw, form, convert, fields, where, Path(path).parent))
        except InputError as error:
            if bad is None:
                raise
            bad.append(str(error))
    if not items:
        raise InputError(f"{path} holds no items that can be read as {form}")
    return items


def item_of(raw: dict, form: str, convert: Callable, fields: dict[str, str], where: str, folder: Path) -> Item:
    row = {name: raw[field] for name, field in fields.items() if raw.get(field) is not None}
    needed = fields.keys() - OPTIONAL - ({"category"} if form == "records" else set())
    if missing := [name for name in fields if name in needed and name not in row]:
        raise InputError(f"{where} has no {fields[missing[0]]}; --map {missing[0]}=FIELD")
    try:
        row = convert(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    record = record_of(row, where, folder)
    if len(record.responses) < 2:
        raise InputError(f"{where}: one response is no comparison")
    if form != "records" and (len(record.responses) > 2 or len(set(record.rankings)) < 2):
        raise InputError(f"{where}: a pair with one better answer is needed, got ranks {record.rankings}")
    shown = [*record.images, *([record.video] if record.video else [])]
    folder_of = (shown[0].parent.name or "all") if shown else "text"  # what MM-RLHF says of a category
    named = row.get("category", folder_of), row.get("group", where)
    if not all(isinstance(name, (str, int)) for name in named):
        raise InputError(f"{where}: category and {fields.get('group', 'group')} must be names, got {named}")
    return Item(**vars(record), category=str(named[0]), group=str(named[1]))
