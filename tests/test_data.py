"""Records are read strictly; batches keep every record to itself.

pytest tests/test_data.py
"""

import base64
import json

import pytest
import torch
from PIL import Image

from yojo.core.data import collate, encode, join, read_records
from yojo.core.image import Pictures
from yojo.files import InputError
from yojo.media import picture_size

GOOD = {"prompt": "?", "responses": ["a", "b"], "rankings": [2, 1]}


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_record_in_each_form(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).touch()
    path = write(
        tmp_path,
        GOOD,
        {**GOOD, "image": "a.png"},
        "",
        {**GOOD, "images": ["a.png", "b/c.png"]},
        {**GOOD, "image": None},
        {**GOOD, "image": float("nan"), "images": None, "video": None},
    )
    records = read_records(path)
    assert [r.images for r in records] == [[], [tmp_path / "a.png"], [tmp_path / "a.png", tmp_path / "b/c.png"], [], []]
    assert [r.where for r in records] == [f"{path}:{n}" for n in (1, 2, 4, 5, 6)]
    assert records[0].responses == ["a", "b"] and records[0].rankings == [2, 1]


def test_a_line_break_inside_a_string_is_no_line_break(tmp_path):
    path = write(tmp_path, json.dumps({**GOOD, "prompt": "a\u2028b"}, ensure_ascii=False), GOOD)
    assert [r.prompt for r in read_records(path)] == ["a\u2028b", "?"]


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list"),
        ("9" * 5000, "is not JSON"),
        ({**GOOD, "responses": ["a", " "]}, "response 2 is empty"),
        ({**GOOD, "image": "none.png"}, "no picture at"),
        ({**GOOD, "prompt": 3}, "prompt must be a string"),
        ({**GOOD, "responses": []}, "at least one string"),
        ({**GOOD, "responses": "ab"}, "at least one string"),
        ({**GOOD, "responses": ["a", 1]}, "at least one string"),
        ({"prompt": "?", "responses": ["a"]}, "has no rankings"),
        ({**GOOD, "rankings": [1]}, "rankings must be 2 whole numbers"),
        ({**GOOD, "rankings": [1, "2"]}, "rankings must be 2 whole numbers"),
        ({**GOOD, "rankings": [1, True]}, "rankings must be 2 whole numbers"),
        ({**GOOD, "rankings": [0, 1]}, "rankings must be 2 whole numbers"),
        ({**GOOD, "rankings": [9, 3]}, "rankings must be 2 whole numbers"),
        ({**GOOD, "rankings": [1, 10**30]}, "none is above 2"),
        ({**GOOD, "rankings": {"a": 1}}, "rankings must be 2 whole numbers"),
        ({**GOOD, "image": 5}, "image and video must be a path"),
        ({**GOOD, "images": "a.png"}, "images a list of paths"),
        ({**GOOD, "image": "a", "images": ["b"]}, "both image and images"),
        ({**GOOD, "images": ["b"], "video": "c"}, "both images and video"),
        ({**GOOD, "image": ""}, "image and video must be a path, images a list of paths, or null, got ''"),
        ({**GOOD, "image": ["a.png"]}, "image and video must be a path, images a list"),
        ({**GOOD, "images": ["a.png", None]}, "image and video must be a path, images a list"),
        ({**GOOD, "images": {"a": "a.png"}}, "image and video must be a path, images a list"),
        ({**GOOD, "image": "https://example.org/a.png"}, "image is an address"),
        ({**GOOD, "image": "data:image/png;base64,***"}, "image is not base64"),
        ({**GOOD, "image": "data:text/plain,hello"}, "only pictures in base64"),
        ({**GOOD, "image": "file:///none/a.png"}, "no picture at /none/a.png"),
        ({**GOOD, "image": "file://a.png"}, "'file://a.png' names no absolute path"),
        ({**GOOD, "video": "file://clip"}, "'file://clip' names no absolute path"),
        ({**GOOD, "image": "images/" + 16 * "0a1b"}, "no picture at"),
        ({**GOOD, "image": "a\0b"}, "no picture at"),
        ({**GOOD, "video": "data:image/gif;base64,R0lGODlhAQABAAAAACw="}, "video must be a path"),
        ({**GOOD, "video": ["v"]}, "image and video must be a path"),
        (json.dumps(GOOD)[:-1] + ', "prompt": "!"}', "has the key 'prompt' twice"),
        ({**GOOD, "videos": ["clip"]}, "'videos' may show something, and it is not read: read are prompt, question"),
        ({**GOOD, "image_path": "a"}, "'image_path' may show something"),
        ({**GOOD, "Image": "a"}, "'Image' may show something"),
        ({**GOOD, "picture": {"url": "x"}}, "'picture' may show something"),
        ({**GOOD, "source": "coco/1.jpg"}, "'source' may show something"),
        ({**GOOD, "messages": [{"content": [{"image": "data:image/png;base64,AAAA"}]}]}, "'messages' may show"),
        ({**GOOD, "question": "?"}, "both prompt and question"),
        ({**GOOD, "video": "v"}, "no video at"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, why):
    path = write(tmp_path, GOOD, line)
    with pytest.raises(InputError) as error:
        read_records(path)
    assert f"{path}:2" in str(error.value) and why in str(error.value)


def test_a_picture_may_be_a_data_url_or_a_file_url(tmp_path, processor):
    """`datasets` and web services write such; a path with the same letters as base64 stays a path."""
    Image.effect_noise((60, 60), 60).save(tmp_path / "a.png")
    (tmp_path / ("x" * 90)).write_bytes((tmp_path / "a.png").read_bytes())
    coded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    forms = ["a.png", f"data:image/png;base64,{coded}", coded, (tmp_path / "a.png").as_uri(), "x" * 90]
    shown = [{"image": form} for form in forms] + [{"images": [form]} for form in forms]
    records = read_records(write(tmp_path, *({**GOOD, **some} for some in shown)))
    rows = [encode(record, processor) for record in records]
    assert all(torch.equal(row.pictures.patches, rows[0].pictures.patches) for row in rows)
    assert all(picture_size(record.images[0]) == (60, 60) for record in records)


@pytest.mark.parametrize("seconds", [0, -1, 1e10, 10**30, "1", True, [1], float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["fps", "sampling_interval"])
def test_seconds_between_frames_are_seconds(tmp_path, key, seconds):
    (tmp_path / "v").mkdir()
    with pytest.raises(InputError, match=r"data.jsonl:1: .*(seconds between frames|seconds apart)"):
        read_records(write(tmp_path, {**GOOD, "video": "v", key: seconds}))


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="none.jsonl does not exist"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no records"):
        read_records(write(tmp_path, "", ""))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "bytes.jsonl")


def test_rankings_are_optional_where_only_scores_are_asked_for(tmp_path):
    assert read_records(write(tmp_path, {"prompt": "?", "responses": ["a"]}), ranked=False)[0].rankings is None


def test_joining_moves_pooling_indices_up():
    a = Pictures(torch.zeros(2, 4, 3), torch.tensor([[0, 7], [1, -1]]), [(1, 1, 1, 1)])
    b = Pictures(torch.ones(1, 4, 3), torch.tensor([[3, 2, -1]]), [(1, 1)])
    both = join([a, b])
    assert both.pooling.tolist() == [[0, 7, -1], [1, -1, -1], [11, 10, -1]]
    assert both.patches.shape == (3, 4, 3) and both.grids == [(1, 1, 1, 1), (1, 1)]


def test_a_padded_batch_written_out(processor):
    a, b = processor.encode("x", ["y", "z"]), processor.encode("x", ["y"])
    batch = collate([a, b], "isolated", pad_id=9)
    (T, short), P = (len(a.ids), len(b.ids)), a.prompt_length
    assert batch.input_ids.tolist() == [a.ids.tolist(), b.ids.tolist() + [9] * (T - short)]
    assert batch.mask.record.tolist() == [[0] * T, [0] * short + [-1] * (T - short)]
    assert batch.mask.response.tolist()[0] == [-1] * P + [0, 0, 1, 1]
    assert batch.positions.tolist()[0] == [*range(P), P, P + 1, P, P + 1]
    assert batch.score_positions.tolist() == [[0, P], [0, P + 2], [1, P]]
    assert batch.counts == [2, 1] and len(batch.pictures.pooling) == len(batch.pictures.patches) == 0


def test_records_that_share_a_row_start_again(processor):
    picture = Image.new("RGB", (84, 84))
    a, b = processor.encode("x", ["y", "z"], picture), processor.encode("x", ["y"], picture)
    batch = collate([[a, b]], "joint")
    n = len(a.ids)
    assert batch.input_ids.shape == (1, n + len(b.ids))
    assert batch.mask.record[0].tolist() == [0] * n + [1] * len(b.ids)
    assert batch.positions[0, n:].tolist() == list(range(len(b.ids)))
    assert batch.score_positions.tolist() == [[0, t] for t in [*a.score_positions, *(n + t for t in b.score_positions)]]
    assert len(batch.pictures.patches) == 4
