"""Rows of public benchmarks -> records of ours.

A benchmark's row differs from a line of `core/data.py` in its fields' names and in how it says which answer is better.
So the fields are renamed, a converter of a few lines makes a line of ours of it, and the reader of all our files checks
that. To read another benchmark, add its fields and a converter.

See it: `pytest tests/test_evaluate.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yojo.core.data import KEYS, Record, record_of
from yojo.files import InputError, passed_over, read_lines
from yojo.unread import refuse_unread


@dataclass(frozen=True)
class Item(Record):
    """One comparison. group: what ACC+ counts as one."""

    category: str = "all"
    group: str = ""


def records(row: dict, fields: dict[str, str]) -> dict:
    return {"category": "all"} | row


PREFIXES = {
    "hallucination": ("rlaif", "rlhf", "povid", "hallucination"),
    "reasoning": ("mathverse", "mmmu", "reasoning"),
}


def vl_rewardbench(row: dict, fields: dict[str, str]) -> dict:
    """Ranks count from 0. No field names the category; where an id comes from says it, and every other source is
    general, as in the benchmark's own script."""
    ranks, name = row["rankings"], str(row["group"])
    whole, n = all(type(rank) is int for rank in ranks), len(row["responses"])
    if whole and len(ranks) == n and min(ranks, default=0) > 0:
        raise InputError(f"{fields['rankings']} must count from 0, got {ranks!r:.99}")
    if whole and len(ranks) == n and set(ranks) <= set(range(n)):  # others are refused as they stand there
        row = row | {"rankings": [rank + 1 for rank in ranks]}
    found = [category for category, starts in PREFIXES.items() if name.lower().startswith(starts)]
    return {"category": found[0] if found else "general"} | row


HALVES = {"safety": ("pairs", "bias", "toxicity"), "reasoning": ("math", "math", "coding")}  # by how an id starts


def multimodal_rewardbench(row: dict, fields: dict[str, str]) -> dict:
    """The better answer is named by its field. Two categories are reported in halves, which the ids tell apart."""
    category = str(row["category"]).lower()
    if category in HALVES:
        start, this, other = HALVES[category]
        if "group" not in row:
            raise InputError(f"{category} is reported as {this} and {other}, and no id tells which; --map group=FIELD")
        half = this if str(row["group"]).lower().startswith(start) else other
        row = row | {"category": f"{category}/{half}"}
    names = [fields["first"], fields["second"]]
    if row["better"] not in names:
        raise InputError(f"{fields['better']} must be one of {', '.join(names)}, got {row['better']!r}")
    ranks = [1, 2] if row["better"] == names[0] else [2, 1]
    return row | {"responses": [row["first"], row["second"]], "rankings": ranks}


def pair(row: dict, fields: dict[str, str]) -> dict:
    return row | {"responses": [row["chosen"], row["rejected"]], "rankings": [1, 2]}


# Of each format its converter, and of each of our names the field it is read from; `--map name=field` names another.
# Those of MR2Bench (records) and VideoRewardBench could not be confirmed against the published files.
SHOWN = {name: name for name in ("image", "images", "video")}  # checked with our own files, like the seconds below
SAME = SHOWN | {"prompt": "prompt", "sampling_interval": "sampling_interval"}
CHOICE = SAME | {"chosen": "chosen", "rejected": "rejected"}
BETTER = {"first": "Output1", "second": "Output2", "better": "Better", "category": "Category"}
BETTER |= {"image": "Image", "group": "ID", "prompt": "Text"}
OURS = {name: name for name in ("question", "responses", "rankings", "category", "fps")}
FORMATS: dict[str, tuple[Callable[[dict, dict], dict], dict[str, str]]] = {
    "records": (records, SAME | OURS),
    "vl-rewardbench": (
        vl_rewardbench,
        SAME | {"prompt": "query", "responses": "response", "rankings": "human_ranking", "group": "id"},
    ),
    "multimodal-rewardbench": (multimodal_rewardbench, SAME | BETTER),
    "mm-rlhf": (pair, CHOICE | {"group": "id"}),
    "videorewardbench": (pair, CHOICE | {"category": "category"}),
}
SECONDS = {"sampling_interval", "fps"}
FREE = {"records": {"question", "category"}, "multimodal-rewardbench": {"group"}}  # what may be left out, too
KINDS = {"responses": list, "rankings": list, "group": (str, int), "category": (str, int)}  # all others are texts


def read_items(path: str | Path, form: str, mapping: Sequence[str] = (), bad: list[str] | None = None) -> list[Item]:
    """The items of a file; mapping: words "name=field". A bad row raises or, with a list `bad`, is left out and its
    error put there."""
    convert, fields = FORMATS[form]
    for word in mapping:
        name, _, field = word.partition("=")
        if not field or name not in {*fields, "category"}:
            raise InputError(f"--map {word}: NAME=FIELD, NAME one of {', '.join({**fields, 'category': ''})}")
        fields = {n: f for n, f in fields.items() if n != "question" or name != "prompt"} | {name: field}
    contents = [field for name, field in fields.items() if name not in ("category", "group")]
    if twice := [field for field in contents if contents.count(field) > 1]:
        raise InputError(f"--map: {twice[0]} is read as two things")
    items = []
    for where, raw in read_lines(path, bad):
        with passed_over(bad):
            items.append(item_of(raw, form, convert, fields, where, Path(path).parent))
    if not items:
        raise InputError(f"{path} holds no items that can be read as {form}")
    return items


def item_of(raw: dict, form: str, convert: Callable, fields: dict[str, str], where: str, folder: Path) -> Item:
    remedy = "--map image=FIELD, images=FIELD, video=FIELD or sampling_interval=FIELD reads it"
    ours = form == "records" and bool(raw.get(fields["video"]))  # other times are of a video that was made into frames
    refuse_unread(raw, fields.values(), f"{where}:", remedy, video=ours)
    row = {name: raw[field] for name, field in fields.items() if raw.get(field) is not None}
    free = SHOWN.keys() | SECONDS | FREE.get(form, set()) | ({"prompt"} if "question" in row else set())
    for name in [name for name in fields if name in row or name not in free]:
        kind = object if name in {*SHOWN, *SECONDS} else KINDS.get(name, str)
        if not isinstance(row.get(name), kind):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise InputError(f"{where}: {fields[name]} must be a {kinds}, got {row.get(name)!r}; --map {name}=FIELD")
    try:
        row = convert(row, fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    record = record_of({key: row[key] for key in KEYS if key in row}, where, folder)
    if form != "records" and (len(record.responses) != 2 or len(set(record.rankings)) < 2):
        raise InputError(f"{where}: a pair with one better answer is needed, got ranks {record.rankings}")
    shown = [i for i in record.images if isinstance(i, Path)] + ([record.video.path] if record.video else [])
    # what MM-RLHF says of a category; a picture in a data URL stands in no folder
    beside = (shown[0].parent.name or "all") if shown else "all" if record.images else "text"
    return Item(**vars(record), category=str(row.get("category", beside)), group=str(row.get("group", where)))
