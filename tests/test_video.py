"""Videos: a folder of frames or an animation becomes at most K timed frames, the first and the last among them.

pytest tests/test_video.py
"""

import json

import numpy as np
import pytest
from PIL import Image

from yojo.core.data import encode, open_pictures, read_records
from yojo.core.prompt import Processor
from yojo.files import InputError
from yojo.video import Clip, open_video, spread

GREYS = range(0, 200, 20)  # ten frames, each of its own grey


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i, grey in enumerate(GREYS):
        Image.new("RGB", (30, 20), (grey,) * 3).save(folder / f"{i:03d}.png")
    return folder


def greys_at(video):
    return [frame.getpixel((0, 0))[0] for _, frame in video]


def greys(video):
    return [frame.getpixel((5, 5))[0] for _, frame in video]


def test_frames_are_spread_evenly_with_both_ends():
    assert spread(3, 16) == [0, 1, 2] and spread(10, 4) == [0, 3, 6, 9] and spread(10, 1) == [0]
    for count in range(1, 60):
        chosen = spread(count, 16)
        assert len(chosen) == len(set(chosen)) == min(count, 16) and chosen[0] == 0 and chosen[-1] in (0, count - 1)
    with pytest.raises(InputError, match="0 frames: at least 1"):
        spread(3, 0)


def test_a_folder_is_read_in_the_order_of_names(frames):
    video = open_video(frames, frames=4, interval=0.5)
    assert [t for t, _ in video] == [0.0, 1.5, 3.0, 4.5] and greys(video) == [0, 60, 120, 180]
    assert [t for t, _ in open_video(frames)] == [4.0 * i for i in range(10)]


@pytest.mark.parametrize(
    "name",
    ["frame{}.png", "{}.png", "Frame ({}).png", "shot 2, take 10, {}.png", "{:03d}.png", "f{}s.png", "a1.{:02d}.png"],
)
def test_frames_stand_in_the_order_of_their_numbers(tmp_path, name):
    """However they are padded, and wherever the number stands: 2 before 10."""
    for i in range(13):
        Image.new("RGB", (8, 8), (20 * i,) * 3).save(tmp_path / name.format(i))
    (tmp_path / "timestamps.json").write_text(json.dumps([i / 2 for i in range(13)]))
    video = open_video(tmp_path)
    assert greys(video) == [20 * i for i in range(13)] and [t for t, _ in video] == [i / 2 for i in range(13)]


@pytest.mark.parametrize(
    "names",
    [
        "1.5 1.25",
        "-2 -1 0 1",
        "-3 -2 -1",
        "f-09 f-0a f-10",
        "59s 1m59s 2m",
        "frame1 frame2 cover3",
        "frame1 frame2 last",
        "start middle end",
        "0,5 0,25",
    ],
)
def test_names_that_tell_no_order_are_refused(tmp_path, names):
    """Is 1.5 before 1.25, as seconds, or after it? Is 10 hexadecimal? Where does the cover belong?"""
    for name in names.split():
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    with pytest.raises(InputError, match="tell no order of frames: number them alike"):
        open_video(tmp_path)


def test_names_that_tell_an_order_are_not(tmp_path):
    for i, names in enumerate(["1.25 1.50 10.00", "only", "Frame1 frame2 FRAME10", "shot1_2 shot1_10 shot2_1"]):
        folder = tmp_path / str(i)
        folder.mkdir()
        for k, name in enumerate(names.split()):
            Image.new("RGB", (8, 8), (50 * k,) * 3).save(folder / f"{name}.{'jpg' if k == 1 else 'png'}")
        assert [round(grey / 50) for grey in greys(open_video(folder))] == [*range(len(names.split()))]


def test_what_is_no_frame_is_named_and_what_systems_leave_behind_is_not(frames):
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (frames / name).write_text("x")
    (frames / "@eaDir").mkdir()
    assert len(open_video(frames)) == 10
    for name in ("notes.txt", "audio.wav", "frame.png~"):
        (frames / name).write_text("x")
        with pytest.raises(InputError, match=f"{name} is not a picture that Pillow can read: take it out"):
            open_video(frames)
        (frames / name).unlink()


def test_deep_frames_of_two_kinds_have_two_ranges(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "0.tif")
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "1.tif")
    assert greys_at(open_video(tmp_path)) == [128, 128]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_frames_of_one_clip_are_scaled_alike(tmp_path, kind):
    """A fade to black stays one, though its darkest frames alone would fit into 8 bits, or into 0..1."""
    fade = [60_000, 20_000, 5_000, 1_000, 200, 0] if kind != np.float32 else [200, 50, 10, 1.0, 0.5, 0]
    for i, level in enumerate(fade):
        Image.fromarray(np.full((4, 4), level, kind)).save(tmp_path / f"{i}.tif")
    expected = [level >> 8 for level in fade] if kind != np.float32 else [200, 50, 10, 1, 0, 0]
    assert greys_at(open_video(tmp_path)) == expected


def test_timestamps_beside_the_frames_are_used(frames):
    (frames / "timestamps.json").write_text(json.dumps([i**2 for i in range(10)]))
    assert [t for t, _ in open_video(frames, frames=4)] == [0, 9, 36, 81]
    for wrong in (
        "[1, 2]",
        "[9,8,7,6,5,4,3,2,1,0]",
        "{",
        '["a"]',
        str([0.0] * 9 + [float("inf")]),
        "[NaN" + ",1" * 9 + "]",
        "[" + "0," * 9 + "1" + "0" * 400 + "]",
        "[" * 100_000,
        json.dumps({str(i): i for i in range(10)}),
        '"0123456789"',
        "[" + "false," * 9 + "true]",
    ):
        (frames / "timestamps.json").write_text(wrong)
        with pytest.raises(InputError, match="timestamps.json must be a list of 10 rising seconds"):
            open_video(frames)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_brings_its_own_times(tmp_path, suffix):
    first, *rest = [Image.new("RGB", (30, 20), (grey,) * 3) for grey in GREYS]
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest, duration=[500] * 5 + [1000] * 5)
    video = open_video(tmp_path / f"a.{suffix}", frames=4)
    assert [t for t, _ in video] == [0.0, 1.5, 3.5, 6.5]
    assert all(abs(a - b) < 4 for a, b in zip(greys(video), [0, 60, 120, 180], strict=True))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="no video at"):
        open_video(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no frames"):
        open_video(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="notes.txt is not a picture"):
        open_video(tmp_path / "empty")
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="x.gif is not a picture that Pillow can read"):
        open_video(tmp_path / "x.gif")
    with pytest.raises(InputError, match=r"ffmpeg -i .*clip.mp4 -vf fps=1/4 clip/%05d.png"):
        open_video(tmp_path / "clip.mp4")


def test_a_record_names_its_video(frames, tiny_folder):
    record = {"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2], "video": "clip"}
    path = frames.parent / "d.jsonl"
    path.write_text(json.dumps(record))
    (read,) = read_records(path)
    assert read.video == Clip(frames) and read.images == []
    processor = Processor.from_folder(tiny_folder, 4096)
    text = processor.tokenizer.decode(processor.encode("?", [], video=read.video).ids.tolist())
    assert text.count("<im_start>") == 10 and "36.0 <im_start>" in text
    for change, why in (
        ({"video": "none"}, "no video at"),
        ({"video": 3}, "video must be a path"),
        ({"fps": "2"}, "sampling_interval and fps are the seconds between frames, got .'2'."),
        ({"fps": 2, "sampling_interval": 1.0}, "are the seconds between frames, got .1.0, 2."),
        ({"fps": 0}, "frames 0 seconds apart"),
        ({"timestamps": [0, 1]}, "'timestamps' may say when frames were taken, and it is not read"),
        ({"frameRate": 30}, "'frameRate' may say when frames were taken"),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(InputError, match=why):
            open_pictures(read_records(path)[0], processor)
    for change in ({"sampling_interval": 0.5}, {"fps": 0.5}, {"fps": 0.5, "sampling_interval": 0.5}):
        path.write_text(json.dumps(record | change))
        (read,) = read_records(path)
        assert "4.5 <im_start>" in processor.tokenizer.decode(encode(read, processor).ids.tolist())
    path.write_text(json.dumps(record | {"image": "x.png"}))
    with pytest.raises(InputError, match="both image and video"):
        read_records(path)
