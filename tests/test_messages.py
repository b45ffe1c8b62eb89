"""Prompts and answers as TRL, transformers, OpenAI and `datasets` hand them over: every form of a picture that is known
is read, and whatever else shows something is refused by name. None is passed over, for an answer that is judged without
its picture gets a plausible score.

pytest tests/test_messages.py
"""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_single_pass import noise

from yojo.cli import WEIGHTS
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.messages import answer_of, digest, prompt_of
from yojo.trainers import GroupReward

PICTURE = noise(1).resize((8, 8))
ASK = "Describe the star."


def png(picture=PICTURE) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


TEXT = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{TEXT}"


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"x": 1}}}]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("shown") / "a star.png"
    path.write_bytes(png())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for i in range(12):
        noise(i).save(folder / f"frame{i}.png")
    return folder


def ask(*blocks):
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": ASK}]}]


def seen(*blocks, **row):
    return [digest(image) for image in prompt_of(ask(*blocks), row).images]


def frames(*blocks, **row):
    return [(seconds, digest(frame)) for seconds, frame in prompt_of(ask(*blocks), row).video]


# --------------------------------------------------------------------------------------------------------------- forms

FORMS = {  # of a picture as a value
    "Pillow": lambda file: PICTURE,
    "path": lambda file: file,
    "name": str,
    "file URL": lambda file: file.as_uri(),
    "bytes": lambda file: png(),
    "base64": lambda file: TEXT,
    "data URL": lambda file: DATA_URL,
    "bytes of datasets": lambda file: {"bytes": png(), "path": None},
    "path of datasets": lambda file: {"bytes": None, "path": str(file)},
    "both of datasets": lambda file: {"bytes": png(), "path": "gone.png"},
    "list of one": lambda file: [PICTURE],
    "numpy": lambda file: np.asarray(PICTURE),
    "torch": lambda file: torch.from_numpy(np.asarray(PICTURE).copy()).permute(2, 0, 1),
    "data URL without a type": lambda file: f" data:;base64,{TEXT.rstrip('=')}",
}
BLOCKS = {  # that hold a value
    "TRL, transformers": lambda value: {"type": "image", "image": value},
    "with nulls": lambda value: {"type": "image", "image": value, "text": None, "video": None},
    "url": lambda value: {"type": "image", "url": value},
    "path": lambda value: {"type": "image", "path": value},
    "OpenAI": lambda value: {"type": "image_url", "image_url": {"url": value, "detail": "auto"}},
    "OpenAI, short": lambda value: {"type": "image_url", "image_url": value},
    "OpenAI responses": lambda value: {"type": "input_image", "image_url": value},
    "without a type": lambda value: {"image": value},
    "with limits": lambda value: {"type": "image", "image": value, "min_pixels": 4, "max_pixels": 1024},
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_a_block_is_seen(file, form, block):
    assert seen(BLOCKS[block](FORMS[form](file))) == [digest(PICTURE)]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": TEXT},
        {"type": "image", "base64": DATA_URL},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TEXT}},
        {"type": "image", "source": {"type": "url", "url": DATA_URL}},
    ],
)
def test_base64_under_other_names_is_seen(block):
    assert seen(block) == [digest(PICTURE)]


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_a_column_is_seen(file, form):
    value, expected = FORMS[form](file), [digest(PICTURE)]
    for row in ({"image": value}, {"images": value}, {"images": [value]}, {"image": value, "images": None}):
        assert [digest(image) for image in prompt_of(ASK, row).images] == expected
        assert seen({"type": "image"}, **row) == expected, "in the place that the message leaves for it"
        assert seen({"type": "image", "image": PICTURE}, **row) == expected, "TRL gives it twice"


def test_nothing_in_a_column_is_nothing():
    for row in ({"image": None}, {"images": None}, {"images": []}, {"images": [None]}, {"video": None, "audio": None}):
        assert seen(**row) == []


def test_pictures_keep_their_order(file):
    a, b, c = noise(1), noise(2), noise(3)
    expected = [digest(p) for p in (a, b, c)]
    assert seen(images=[a, b, c]) == expected
    hole = {"type": "image"}
    filled = [{"type": "image", "image": picture} for picture in (a, b, c)]
    assert seen(hole, filled[1], hole, images=[a, c]) == expected
    assert seen(*filled, images=[a, c]) == expected, (
        "as TRL hands it over: the holes are filled, and the column is there"
    )
    with pytest.raises(InputError, match="are not those in the column"):
        seen(*filled, images=[c, a])
    assert seen(hole | {"index": 2}, hole | {"index": 0}, hole | {"index": 1}, images=[b, c, a]) == expected
    turns = [*ask({"type": "image", "image": a}), {"role": "assistant", "content": "a star"}, *ask(hole, hole)]
    prompt = prompt_of(turns, {"images": [b, c]})
    assert prompt.text == f"{ASK}\n\na star\n\n{ASK}" and [digest(p) for p in prompt.images] == expected


def test_frames_are_seen_in_every_form(clip):
    files = sorted(clip.iterdir(), key=lambda path: int(path.stem[5:]))
    expected = [(4.0 * i, digest(noise(i))) for i in range(12)]
    for value in (
        clip,
        str(clip),
        [str(clip)],
        {"path": str(clip), "bytes": None},
        files,
        [noise(i) for i in range(12)],
    ):
        for row in ({"video": value}, {"videos": [value]}):
            assert frames(**row) == frames({"type": "video"}, **row) == expected
        assert frames({"type": "video", "video": value}) == expected
    timed = [(0.5 * i, noise(i)) for i in range(3)]
    assert frames(video=timed) == [(seconds, digest(frame)) for seconds, frame in timed]
    assert len(frames(video=[noise(i) for i in range(40)])) == 16 and frames(video=[noise(0)]) == expected[:1]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "address", ["http://x.org/a.png", "https://x.org/a.png", "s3://x/a.png", "hf://datasets/a.png"]
)
def test_addresses_are_never_fetched(address):
    for block in BLOCKS.values():
        with pytest.raises(InputError, match="is an address, .* download it"):
            seen(block(address))
    with pytest.raises(InputError, match="is an address, .* download it"):
        seen(images=[address])
    with pytest.raises(InputError, match="the path of a folder of frames"):
        frames({"type": "video", "video": address})


@pytest.mark.parametrize(
    "block, why",
    [
        ({"type": "video", "video": "clip.mp4"}, "clip.mp4 must be a folder of frames first: mkdir clip && ffmpeg"),
        ({"type": "video", "path": "clip.webm"}, "clip.webm must be a folder of frames first"),
        ({"type": "video", "video": b"\0\0\0 ftypmp42"}, "a video of the prompt is a bytes"),
        ({"type": "image_url", "image_url": "data:video/mp4;base64,AAAA"}, "data URL, 'data:video/mp4;base64'"),
        ({"type": "image_url", "image_url": "data:image/png,rawbytes"}, "only pictures in base64"),
        ({"type": "image_url", "image_url": {"file_id": "file-1"}}, "image_url holds file_id"),
        ({"type": "image_url"}, "a block of type image_url holds nothing"),
        ({"type": "image", "image": "nowhere.png"}, "no picture at nowhere.png"),
        ({"type": "image", "image": 7}, "is a int that is no picture"),
        ({"type": "image", "image": np.zeros((4, 4, 3))}, "is a ndarray of float64 .4, 4, 3. that is no picture"),
        ({"type": "image", "image": torch.zeros(3, 4, 4)}, "is a Tensor of torch.float32 .3, 4, 4. that is no picture"),
        ({"type": "image", "image": np.zeros((4, 4, 2), np.uint8)}, "that is no picture here: give .height, width, 3."),
        ({"type": "image", "image": ""}, "1 image blocks of the messages are empty"),
        ({"type": "image", "image": b""}, "not a picture that Pillow can read"),
        ({"type": "video", "video": [PICTURE], "fps": 1.0}, "a block of type video holds 'fps', which is not read"),
        ({"type": "video", "video": [(1.0, PICTURE), (0.5, PICTURE)]}, "needs rising seconds"),
        ({"type": "image", "image": [PICTURE, PICTURE]}, "is a list that is no picture"),
        ({"type": "image", "image": b"no picture"}, "not a picture that Pillow can read"),
        ({"type": "image", "base64": "AAAA"}, "not a picture that Pillow can read"),
        ({"type": "image", "image": PICTURE, "audio": "a.wav"}, "holds 'audio', which is not read"),
        ({"type": "image", "image": PICTURE, "url": DATA_URL}, "holds image and url: keep one"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "type 'input_audio' is not understood"),
        ({"type": "audio", "audio": "a.wav"}, "type 'audio' is not understood"),
        ({"type": "file", "file": {"file_id": "1"}}, "type 'file' is not understood"),
        ({"type": ["image"], "image": PICTURE}, "is not understood"),
        ({"pixel_values": torch.zeros(3, 4, 4)}, "'pixel_values' is not understood"),
        ({"type": "text", "text": 5}, "a block of text holds a int"),
        ({}, "is not understood"),
        (7, "must be an object with a type, got a int"),
    ],
    ids=str,
)
def test_a_block_that_is_not_understood_is_refused_by_name(block, why):
    with pytest.raises(InputError, match=why):
        prompt_of(ask(block), {})


@pytest.mark.parametrize(
    "row, why",
    [
        ({"audio": {"array": [0.0], "sampling_rate": 16_000}}, "column 'audio'"),
        ({"audio": [0.1, 0.2]}, "column 'audio'"),
        ({"waveform": np.zeros(100)}, "column 'waveform'"),
        ({"image_url": "https://x.org/a"}, "column 'image_url'"),
        ({"figure": "https://x.org/12"}, "column 'figure'"),
        ({"imagePath": "a"}, "column 'imagePath'"),
        ({"screenshot": TEXT}, "column 'screenshot'"),
        ({"video_folder": "clips/12"}, "column 'video_folder'"),
        ({"frames": "v38"}, "column 'frames'"),
        ({"clip_path": "v38"}, "column 'clip_path'"),
        ({"keyframes": ["a/1"]}, "column 'keyframes'"),
        ({"obs": base64.b64encode(b"BM" + bytes(range(256))).decode()}, "column 'obs'"),
        ({"x": io.BytesIO()}, "column 'x'"),
        ({"x": np.array([PICTURE, None], object)}, "column 'x'"),
        ({"document": "report.pdf"}, "column 'document'"),
        ({"images": b""}, "not a picture that Pillow can read"),
        ({"img": "a"}, "column 'img'"),
        ({"pixel_values": [[0.0, 1.0]]}, "column 'pixel_values'"),
        ({"multi_modal_data": {"image": [PICTURE]}}, "column 'multi_modal_data'"),
        ({"source": "pictures/a.jpg"}, "column 'source'"),
        ({"meta": {"shot": PICTURE}}, "column 'meta'"),
        ({"x": DATA_URL}, "column 'x'"),
        ({"x": TEXT}, "column 'x'"),
        ({"x": png()}, "column 'x'"),
        ({"x": torch.zeros(3, 8, 8)}, "column 'x'"),
        ({"image": PICTURE, "images": [PICTURE]}, "two columns hold images"),
        ({"image": PICTURE, "video": [PICTURE]}, "shows 1 images and 1 videos"),
        ({"videos": [[PICTURE], [PICTURE]]}, "shows 0 images and 2 videos"),
    ],
    ids=str,
)
def test_a_column_that_may_show_something_is_refused_by_name(row, why):
    with pytest.raises(InputError, match=why):
        prompt_of(ASK, row)


def test_columns_that_show_nothing_are_left_alone():
    row = {"id": "a.png", "image_id": "COCO_1", "num_images": torch.tensor(2), "image_caption": "a star", "movie": "Up"}
    assert (
        prompt_of(
            ASK, row | {"media_type": "image", "audio": float("nan"), "note": "What is in images/cat.png? Yes or no."}
        ).images
        == []
    )
    row = {"id": 3, "image_id": 7, "image_size": [640, 480], "solution": "a red star", "level": None, "framework": "x"}
    assert prompt_of(ASK, row | {"image_grid": np.int64(4), "clip_score": 0.5, "environments": object()}).images == []


def test_arrays_and_sizes_are_no_pictures():
    row = {"bbox": np.zeros((2, 4)), "info": {"bytes": 5234}, "learning_rate": 0.1}
    assert prompt_of(ASK, row).images == []


def test_pictures_and_their_places_must_agree():
    hole = {"type": "image"}
    for blocks, row, why in [
        ([hole], {}, "1 image blocks of the messages are empty, a column holds 0 images"),
        ([hole], {"images": [PICTURE, PICTURE]}, "1 image blocks .* a column holds 2"),
        ([hole, hole], {"image": PICTURE}, "2 image blocks .* a column holds 1"),
        ([{"type": "image", "image": noise(1)}], {"image": noise(2)}, "are not those in the column"),
        ([hole | {"index": 1}], {"image": PICTURE}, "name numbers .1. of 1 in a column"),
    ]:
        with pytest.raises(InputError, match=why):
            seen(*blocks, **row)


@pytest.mark.parametrize(
    "prompt, why",
    [
        (None, "the prompt must be a text or a list of messages, got a NoneType"),
        (["a"], "must be a text or a list of messages"),
        ([{"role": "user", "content": 5}], "content of a message must be a text or a list of blocks"),
        ([{"role": "user", "content": "?", "images": [TEXT]}], "a message holds 'images', which is not read"),
        ([{"role": "user", "content": "?", "attach": TEXT}], "a message holds 'attach'"),
        ([{"role": "assistant", "audio": {"id": "a"}}], "a message has no content, but role, audio"),
        ([{"from": "human", "value": "?"}], "a message has no role, but from, value"),
        ([{"role": "user", "content": None, "parts": ["?"]}], "a message holds 'parts', which is not read"),
        ([{"role": "user", "parts": [{"text": "?"}]}], "a message has no content, but role, parts"),
        (
            f"<img src='{DATA_URL}'> what is it?",
            "a text of the prompt holds 'data:image/png;base64,': put what it shows",
        ),
        (
            [*ask(), {**CALL, "tool_calls": [{"arguments": {"image": DATA_URL}}]}],
            "a text of the prompt holds 'data:image",
        ),
        ([{"role": "user", "content": []}], "neither a text nor anything that it shows"),
    ],
    ids=str,
)
def test_a_prompt_that_is_no_conversation_is_refused(prompt, why):
    with pytest.raises(InputError, match=why):
        prompt_of(prompt, {})


# ------------------------------------------------------------------------------------------------------------- answers


def test_only_the_assistants_own_text_is_judged():
    bare = {key: value for key, value in CALL.items() if key != "content"}
    for call in (CALL, bare):
        turns = [call, {"role": "tool", "name": "look", "content": "42"}, {"role": "assistant", "content": "a star"}]
        assert answer_of(turns) == "a star"
    assert answer_of([{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]) == "a"
    assert answer_of([CALL]) == "" and answer_of("a") == answer_of({"role": "assistant", "content": "a"}) == "a"
    shown = {"content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "here"}]}
    assert answer_of([CALL, {"role": "tool", **shown}, {"role": "assistant", "content": "a"}]) == "a"
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "tool_use", "input": {}}]
    said = answer_of([{"role": "assistant", "content": thought}])
    assert said == "a", "what it thought and called is not what it said"
    for other in (
        {"role": "assistant", **shown},
        {"role": "model", "content": "a"},
        {"role": "assistant", "parts": []},
    ):
        with pytest.raises(InputError):
            answer_of([other])


def test_what_was_called_is_part_of_a_prompt():
    text = prompt_of([*ask(), CALL, {"role": "tool", "content": "42"}], {}).text
    assert text.startswith(ASK) and '"name": "look"' in text and text.endswith("42")


# ------------------------------------------------------------------------------------------------------ one group a key


def test_two_pictures_are_the_same_if_their_pixels_are(file):
    """Whatever they are stored as; and not if only the numbers in their palettes are."""
    two = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 2, "P")
    red, blue = two.copy(), two.copy()
    red.putpalette([255, 0, 0, 255, 255, 255])
    blue.putpalette([0, 0, 255, 255, 255, 255])
    keys = [prompt_of(ASK, {"image": image}).key for image in (red, red.convert("RGB"), red.convert("RGBA"), blue)]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert prompt_of(ASK, {"image": PICTURE}).key == prompt_of(ask(), {"image": file}).key


def test_every_form_gets_the_score_of_the_picture(file):
    """The order of these two turns round without it."""
    rm, answers = RewardModel.load(WEIGHTS / "tiny-rm"), ["a small red star", "a large red star"]
    expected, blind = rm.score(ASK, answers, PICTURE), rm.score(ASK, answers)
    assert expected != blind
    for block in BLOCKS.values():
        assert GroupReward(WEIGHTS / "tiny-rm")([ask(block(DATA_URL))] * 2, answers) == expected


# ---------------------------------------------------------------------------------------------------------------- fuzz

VALUES = st.sampled_from(
    [
        None,
        "",
        "words",
        TEXT,
        DATA_URL,
        "https://x.org/a.png",
        "clip.mp4",
        "a.wav",
        b"bytes",
        png(),
        3,
        0.5,
        True,
        [],
        {},
    ]
    + [
        PICTURE,
        [PICTURE],
        [PICTURE, PICTURE],
        [None],
        {"url": DATA_URL},
        {"bytes": png(), "path": None},
        Path("no.png"),
    ]
    + [np.zeros((2, 2, 3), np.uint8), torch.zeros(3, 2, 2), {"array": np.zeros(4), "sampling_rate": 8}, {"url": None}]
)
WORDS = "type text image image_url url path base64 source video audio input_audio detail bytes file x".split()
TYPES = st.sampled_from(
    ["text", "image", "image_url", "input_image", "video", "audio", "input_text", "file", None, 5, []]
)
BLOCK = st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=3).flatmap(
    lambda block: TYPES.map(lambda kind: block | {"type": kind})
)
GOOD = st.sampled_from([PICTURE, DATA_URL, png(), [PICTURE], {"bytes": png(), "path": None}])
READ = st.builds(lambda block, value: block(value), st.sampled_from(list(BLOCKS.values())), GOOD)
CONTENT = VALUES | st.lists(READ | BLOCK | VALUES, max_size=3)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "user", 3])}, optional={"content": CONTENT, "images": VALUES}
)
COLUMN = st.dictionaries(
    st.sampled_from(["image", "images", "video", "videos", "audio", "id", "shot"]), VALUES, max_size=2
)


def pictures_in(value, inside=False) -> int:
    """How many pictures a random input holds, counted without the code under test; what is found inside of something
    that is no block or list of blocks counts, too."""
    if isinstance(value, dict):
        return sum(pictures_in(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(map(pictures_in, value))
    return int(isinstance(value, Image.Image) or value in (TEXT, DATA_URL, png()) if not hasattr(value, "ndim") else 1)


@given(VALUES | st.lists(MESSAGE, max_size=3), COLUMN)
def test_property_no_picture_is_passed_over_and_nothing_ends_in_a_traceback(prompt, row):
    try:
        read = prompt_of(prompt, row)
    except InputError:
        return
    shown_by_messages = 0 if isinstance(prompt, str) else pictures_in(without_text(prompt))
    shown_by_columns = pictures_in(row)
    looked = len(read.images) + len(read.video or [])
    twice = shown_by_messages == shown_by_columns == looked  # in the messages and in a column, seen once
    assert twice or looked == shown_by_messages + shown_by_columns


def without_text(prompt):
    """Base64 that stands where a text belongs is a text."""
    bare = []
    for message in [prompt] if isinstance(prompt, dict) else prompt:
        content = message.get("content")
        blocks = content if isinstance(content, list) else [content]
        blocks = [b for b in blocks if not isinstance(b, str)]
        bare.append(
            [{k: v for k, v in block.items() if k != "text"} if isinstance(block, dict) else block for block in blocks]
        )
    return bare


@given(VALUES | st.lists(MESSAGE, max_size=3))
def test_property_an_answer_is_a_text_or_is_refused(completion):
    try:
        assert isinstance(answer_of(completion), str)
    except InputError:
        return
    if not isinstance(completion, str):
        spoken = [m for m in ([completion] if isinstance(completion, dict) else completion) if m["role"] == "assistant"]
        assert not pictures_in(without_text(spoken))
