"""Prompts and answers as other libraries hand them over -> text and pictures.

A prompt is a string or a list of messages, whose content is a string or a list of blocks. Pictures stand in blocks, in
the forms of transformers' chat templates and of OpenAI, or in columns beside the prompts, as TRL and `datasets` have
them. Whatever shows something and is not understood raises `InputError` with its name: an answer that is judged
without its picture gets a plausible number that is wrong.

See it: `pytest tests/test_messages.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from yojo.files import InputError
from yojo.media import address_of, file_of, open_frames, open_picture, short
from yojo.unread import empty, may_show, refuse_unread
from yojo.video import FRAMES, INTERVAL, Clip, Frames, NoClip, open_video, seconds_of, spread, timed


@dataclass(frozen=True)
class Prompt:
    """text; images: RGB, in order; video: frames with their seconds, or None. `key` tells one prompt from another, by
    the pixels of what it shows."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    video: Frames | None = None

    @property
    def key(self) -> tuple:
        return self.text, [*map(digest, self.images)], self.video and digest_of(self.video)


def digest(image: Image.Image) -> tuple:
    return image.size, sha256(image.tobytes()).digest()


def digest_of(video: Frames) -> list[tuple]:
    return [(seconds, digest(frame)) for seconds, frame in video]


def prompt_of(prompt: str | Sequence, columns: Mapping[str, object]) -> Prompt:
    """A prompt and its row of the columns. Pictures of a column fill the image blocks that hold none."""
    held: dict[str, list] = {"text": [], "image": [], "video": []}
    for message in [] if isinstance(prompt, str) else messages_of(prompt, "the prompt"):
        for kind, value in parts_of(message, calls=True):
            held[kind].append(value)
    texts = [prompt] if isinstance(prompt, str) else held["text"]
    if coded := [found[0] for text in texts if (found := re.search(r"data:(image|video|audio)/[^,\s]*;base64,", text))]:
        raise InputError(f"a text of the prompt holds {coded[0][:60]!r}: put what it shows into a block or a column")
    beside = columns_of(columns, bool(held["video"]))
    images = [opened(value) for value in merged("image", held["image"], beside["image"])]
    apart = seconds_apart(columns)
    videos = [clip_from(value, apart) for value in merged("video", held["video"], beside["video"])]
    if len(videos) > 1 or (videos and images):
        raise InputError(f"a prompt shows {len(images)} images and {len(videos)} videos: images or one video are read")
    if not texts and not images and not videos:
        raise InputError("a prompt holds neither a text nor anything that it shows")
    return Prompt("\n\n".join(texts), images, videos[0] if videos else None)


def answer_of(completion: str | Sequence) -> str:
    """The text that the policy itself wrote: of messages, the assistant's, without its tool calls. What tools returned
    is not its own, pictures or not. A picture of its own raises: only text can be judged."""
    if isinstance(completion, str):
        return completion
    texts, messages = [], messages_of(completion, "the completion")
    own = [message for message in messages if message["role"] == "assistant"]
    if not own:
        raise InputError(f"no message is the assistant's, only of {[message['role'] for message in messages]}")
    for kind, value in (part for message in own for part in parts_of(message, calls=False)):
        if kind != "text":
            raise InputError(f"an answer holds a block of type {kind}: only text can be judged")
        texts.append(value)
    return "\n\n".join(texts)


# ------------------------------------------------------------------------------------------------------------- messages

TEXT = ("text", "input_text", "output_text")
IMAGE = ("image", "image_url", "input_image")
SOURCES = {"text": ["text"], "video": ["video", "path", "url"]}  # where a block has what it holds
SOURCES["image"] = ["image", "image_url", "url", "path", "base64", "bytes", "source"]
# What says how large others see a picture, or how they store a block.
HINTS = "type detail cache_control annotations min_pixels max_pixels resized_height resized_width id uuid format"
HINTS = set(HINTS.split())
CALLS = ("tool_calls", "function_call")
CONTENT = ("parts", "text", "value")  # what others call it
ASIDE = {"tool_use": True, "tool_call": True, "function_call": True}  # blocks that say nothing; True: part of a prompt
ASIDE |= dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), False)


class Hole(NamedTuple):
    """An image or video block that holds nothing: it stands for one of a column, the next one or that of an index."""

    index: int | None


def listed(value: object) -> object:
    """A list, where a tuple or, as pandas has it, an array of objects holds the same."""
    return list(value) if isinstance(value, tuple) or str(getattr(value, "dtype", "")) == "object" else value


def messages_of(value: object, what: str) -> list[Mapping]:
    messages = [value] if isinstance(value, Mapping) else listed(value)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{what} must be a text or a list of messages, got {short(value)}")
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise InputError(f"{what}: a message has no role, but {', '.join(map(str, message))}")
        if "content" not in message and not any(not empty(message.get(key)) for key in (*CALLS, "refusal")):
            raise InputError(f"{what}: a message has no content, but {', '.join(map(str, message))}")
        others = {str(k): v for k, v in message.items() if k not in ("content", *CALLS) and not empty(v)}
        if unread := [key for key, value in others.items() if key in CONTENT or may_show(key, value)]:
            raise InputError(f"{what}: a message holds {unread[0]!r}, which is not read: put it into its content")
    return messages


def parts_of(message: Mapping, calls: bool) -> list[tuple[str, object]]:
    """What a message holds, in order: ("text", str), ("image", picture or `Hole`), ("video", clip or `Hole`). calls:
    its tool calls, too, as JSON."""
    content = listed(message.get("content"))
    blocks = [] if content is None else [content] if isinstance(content, (str, Mapping)) else content
    if not isinstance(blocks, list):
        raise InputError(f"the content of a message must be a text or a list of blocks, got {short(content)}")
    aside = [b for b in blocks if isinstance(b, Mapping) and isinstance(b.get("type"), str) and b["type"] in ASIDE]
    parts = [part_of(block) for block in blocks if not any(block is other for other in aside)]
    if isinstance(message.get("refusal"), str):
        parts.append(("text", message["refusal"]))
    called = [message[key] for key in CALLS if not empty(message.get(key))] + [b for b in aside if ASIDE[b["type"]]]
    return parts + [("text", json.dumps(listed(call), ensure_ascii=False, default=str)) for call in called if calls]


def part_of(block: object) -> tuple[str, object]:
    """One block."""
    if isinstance(block, str):
        return "text", block
    if not isinstance(block, Mapping):
        raise InputError(f"a block of a message must be an object with a type, got {short(block)}")
    held = {str(key): value for key, value in block.items() if key not in {*HINTS, "index"} and not empty(value)}
    kind = next(iter(held), "that is not named") if block.get("type") is None else block["type"]
    if not isinstance(kind, str):
        raise InputError(f"a block of type {short(kind)} is not understood: text, image, and video as frames are")
    part = "text" if kind in TEXT else "image" if kind in IMAGE else kind
    if part not in ("text", "image", "video"):
        raise InputError(f"a block of type {short(kind)} is not understood: text, image, and video as frames are")
    if unread := sorted(held.keys() - set(SOURCES[part])):
        raise InputError(f"a block of type {kind} holds {unread[0]!r}, which is not read")
    if len(held) > 1:
        raise InputError(f"a block of type {kind} holds {' and '.join(held)}: keep one")
    if not held and part != "text":
        if kind != part or not isinstance(block.get("index"), (int, type(None))):
            raise InputError(f"a block of type {kind} holds nothing")
        return part, Hole(block.get("index"))
    key, value = next(iter(held.items()), ("text", ""))
    if part == "text" and not isinstance(value, str):
        raise InputError(f"a block of text holds {short(value)}")
    return part, unwrapped(key, value)


def unwrapped(key: str, value: object) -> object:
    """The picture inside OpenAI's `{"url"}`, Anthropic's `{"type": "base64", "data"}` and transformers' base64. What
    `datasets` hands over is left as it is."""
    if key in ("image_url", "source") and isinstance(value, Mapping):
        inner = {str(name): v for name, v in value.items() if name not in {*HINTS, "media_type"} and not empty(v)}
        if inner and inner.keys() <= {"bytes", "path"}:
            return value
        if len(inner) != 1 or not inner.keys() <= {"url", "data"}:
            raise InputError(f"an image block's {key} holds {', '.join(inner) or 'nothing'}: read is a url or data")
        key, value = ("base64", inner["data"]) if "data" in inner else (key, inner["url"])
    if key == "base64" and not isinstance(value, str):
        raise InputError(f"an image block's base64 is {short(value)}, no text")
    return f"data:image/any;base64,{value}" if key == "base64" and value[:5].lower() != "data:" else value


# -------------------------------------------------------------------------------------------------------------- columns

COLUMNS = {"image": "image", "images": "image", "video": "video", "videos": "video"}  # that are read
APART = "sampling_interval"  # seconds between frames without times


def columns_of(row: Mapping[str, object], video: bool) -> dict[str, list]:
    """The pictures and videos of a row. A column that may show something and is not read raises; or that may say when
    the frames of a video were taken."""
    read = (*COLUMNS, APART)
    video = video or not (empty(row.get("video")) and empty(row.get("videos")))
    refuse_unread(
        row, read, "the column", f"read are {', '.join(read)}; rename it, or say GroupReward(..., ignore=[...])", video
    )
    found: dict[str, list] = {"image": [], "video": []}
    for name, kind in COLUMNS.items():
        value = listed(row.get(name))
        values = value if isinstance(value, list) and name != "video" else [value]
        values = [v for v in values if not empty(v)]
        if values and found[kind]:
            raise InputError(f"two columns hold {kind}s: keep {name!r} or the other")
        found[kind] += values
    return found


def seconds_apart(row: Mapping[str, object]) -> float:
    apart = row.get(APART)
    if not empty(apart) and not seconds_of(apart):
        raise InputError(f"{APART} is the seconds between frames, got {apart!r:.99}")
    return INTERVAL if empty(apart) else seconds_of(apart)


def merged(kind: str, blocks: list, beside: list) -> list:
    """What the blocks hold; those that hold nothing are filled by a column."""
    if not blocks:
        return beside
    holes = [block for block in blocks if isinstance(block, Hole)]
    if not holes and beside:  # TRL fills holes and hands over the column, too

        def see(value: object) -> object:
            return digest(opened(value)) if kind == "image" else digest_of(clip_from(value))

        held = iter([*map(see, blocks)])
        if not all(picture in held for picture in map(see, beside)):  # in order, perhaps beside others
            raise InputError(f"the {kind}s in the messages are not those in the column beside them: keep one")
        return blocks
    if len(holes) != len(beside):
        raise InputError(f"{len(holes)} {kind} blocks of the messages are empty, a column holds {len(beside)} {kind}s")
    order = [i if hole.index is None else hole.index for i, hole in enumerate(holes)]
    if sorted(order) != [*range(len(beside))]:
        raise InputError(f"the empty {kind} blocks of the messages name numbers {order} of {len(beside)} in a column")
    filling = iter(order)
    return [beside[next(filling)] if isinstance(block, Hole) else block for block in blocks]


# -------------------------------------------------------------------------------------------------- pictures and videos


def opened(value: object) -> Image.Image:
    what = "a picture of the prompt"
    return open_picture(value, what)


def clip_from(value: object, apart: float = INTERVAL) -> Frames:
    """A folder of frames or an animation by path; or frames, as in `video.timed`, of which as many are taken as of a
    path."""
    what = "a video of the prompt"
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        value = value["path"]
    value = listed(value)
    if isinstance(value, str) and address_of(value) == "file":
        value = file_of(value)
    if isinstance(value, Path) or (isinstance(value, str) and not address_of(value)):
        return open_video(Clip(Path(value), interval=apart))
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], tuple):
        with suppress(NoClip):  # a list of one video; or else it is one of one frame
            return clip_from(value[0], apart)
    frames = timed(value, apart, what)
    chosen = spread(len(frames), FRAMES)
    names = [f"frame {i + 1} of {what}" for i in chosen]
    shown = open_frames([frames[i][1] for i in chosen], names)
    return [(frames[i][0], frame) for i, frame in zip(chosen, shown, strict=True)]
