"""The small files that README and USAGE use, made from the tiny world.

python -m tutorials.examples.make          writes all of them again

scene.png                      the picture of lesson 00
records.jsonl, records/        forty preference records about eight pictures
votes.jsonl, answers.jsonl     three people's votes on the answers of eight questions, and the answers
"""

import itertools
import json
import random
import shutil
from pathlib import Path

from yojo.tiny import world

HERE = Path(__file__).parent
RECORDS, SCENES = 40, 8
VOTERS, WRONG = 3, 0.2  # every voter compares every pair of answers; the share of votes for the worse one


def write(folder: Path) -> None:
    shutil.rmtree(folder / "records", ignore_errors=True)
    world.render(world.make_scene(random.Random(0))).save(folder / "scene.png")
    path = world.write_records(folder, "records", world.records(random.Random(1), "absolute", RECORDS, SCENES))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng, votes, answers = random.Random(2), [], []
    for number, record in enumerate(records[:SCENES]):
        item, ranks = f"q{number}", dict(zip("abcd", record["rankings"], strict=True))
        texts = dict(zip(ranks, record["responses"], strict=True))
        answers.append({"item": item, "prompt": record["prompt"], "responses": texts, "image": record["image"]})
        votes += [
            {"item": item, "a": a, "b": b, "winner": vote(ranks, a, b, rng), "annotator": f"p{voter}"}
            for voter in range(VOTERS)
            for a, b in itertools.combinations(ranks, 2)
        ]
    for name, rows in (("votes", votes), ("answers", answers)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def vote(ranks: dict[str, int], a: str, b: str, rng: random.Random) -> str:
    if ranks[a] == ranks[b]:
        return "tie"
    better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
    return worse if rng.random() < WRONG else better


if __name__ == "__main__":
    write(HERE)
