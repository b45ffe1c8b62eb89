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
from numbers import Number
from pathlib import Path

import numpy as np
from PIL import Image

from yojo.files import InputError
from yojo.media import FRAMES, INTERVAL, MOVIES, Clip, Frames, open_picture, open_video, picture_from, spread


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
    """A prompt and its row of the columns. Pictures of a column fill the image blocks that hold none, in order."""
    texts, shown = [], {"image": [], "video": []}
    if isinstance(prompt, str):
        texts.append(prompt)
    else:
        for message in messages_of(prompt, "the prompt"):
            for kind, value in parts_of(message, calls=True):
                texts.append(value) if kind == "text" else shown[kind].append(value)
    beside = columns_of(columns)
    images = [opened(value) for value in merged("image", shown["image"], beside["image"])]
    videos = [clip_from(value) for value in merged("video", shown["video"], beside["video"])]
    if len(videos) > 1 or (videos and images):
        raise InputError(f"a prompt shows {len(images)} images and {len(videos)} videos: images or one video are read")
    return Prompt("\n\n".join(texts), images, videos[0] if videos else None)


def answer_of(completion: str | Sequence) -> str:
    """The text that the policy itself wrote: of messages, the assistant's, without its tool calls. Tools' outputs are
    not its own. An answer with a picture raises: only text can be judged."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in messages_of(completion, "the completion"):
        for kind, value in parts_of(message, calls=False):
            if kind != "text":
                raise InputError(f"a completion holds a block of type {kind}: only text can be judged")
            if message.get("role", "assistant") == "assistant":
                texts.append(value)
    return "\n\n".join(texts)


# ------------------------------------------------------------------------------------------------------------- messages

TEXT = ("text", "input_text", "output_text")
IMAGE = ("image", "image_url", "input_image")
SOURCES = {"text": ["text"], "video": ["video", "path", "url"]}  # where a block has what it holds
SOURCES["image"] = ["image", "image_url", "url", "path", "base64", "bytes", "source"]
# What says how large others see a picture, or how they store a block.
HINTS = set("type detail cache_control annotations min_pixels max_pixels resized_height resized_width".split())


def messages_of(value: object, what: str) -> list[Mapping]:
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{what} must be a text or a list of messages, got {short(value)}")
    for message in messages:
        others = [key for key in message if key not in ("content", "tool_calls", "function_call")]
        if unread := [key for key in others if may_show(str(key), message[key])]:
            raise InputError(f"a message holds {unread[0]!r}, which is not read: put it into a block of the content")
    return list(messages)


def parts_of(message: Mapping, calls: bool) -> list[tuple[str, object]]:
    """What a message holds, in order: ("text", str), ("image", picture or None), ("video", clip or None). calls: its
    tool calls, too, as JSON."""
    content = message.get("content")
    blocks = [] if content is None else [content] if isinstance(content, (str, Mapping)) else content
    if not isinstance(blocks, (list, tuple)):
        raise InputError(f"the content of a message must be a text or a list of blocks, got {short(content)}")
    parts = [part_of(block) for block in blocks]
    if isinstance(message.get("refusal"), str):
        parts.append(("text", message["refusal"]))
    if calls and (called := message.get("tool_calls") or message.get("function_call")):
        parts.append(("text", json.dumps(called, ensure_ascii=False, default=str)))
    return parts


def part_of(block: object) -> tuple[str, object]:
    """One block. A block of type image that holds none stands for one of a column: ("image", None)."""
    if isinstance(block, str):
        return "text", block
    if not isinstance(block, Mapping):
        raise InputError(f"a block of a message must be an object with a type, got {short(block)}")
    held = {str(key): value for key, value in block.items() if key not in HINTS and not empty(value)}
    kind = block.get("type") or next(iter(held), "that is not named")
    part = "text" if kind in TEXT else "image" if kind in IMAGE else kind
    if part not in ("text", "image", "video"):
        raise InputError(f"a block of type {short(kind)} is not understood: text, image, and video as frames are")
    if len(held) > 1 or not held.keys() <= set(SOURCES[part]):
        raise InputError(f"a block of type {kind} holds {', '.join(held)}: read is one of {', '.join(SOURCES[part])}")
    key, value = next(iter(held.items()), (part, "" if part == "text" else None))
    if value is None and kind != part:
        raise InputError(f"a block of type {kind} holds no picture")
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
# Names that speak of something shown, and files that hold it.
SHOWN = re.compile(
    r"(^|[^a-z])(image|img|picture|photo|pixel|video|audio|media|multi_?modal|attachment|"
    r"(file|frame|clip|movie|sound|speech|voice|wav)s?([^a-z]|$))"
)
FILES = (*MOVIES, *".png .jpg .jpeg .gif .webp .bmp .tif .tiff .avif .wav .mp3 .flac .ogg .m4a .npy".split())
BASE64 = ("iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin in it
LIBRARIES = ("torchcodec", "decord", "av", "cv2", "soundfile")  # of open videos and sounds


def columns_of(row: Mapping[str, object]) -> dict[str, list]:
    """The pictures and videos of a row. A column that may show something and is not read raises."""
    found: dict[str, list] = {"image": [], "video": []}
    for name, value in row.items():
        if name in COLUMNS:
            kind = COLUMNS[name]
            several = isinstance(value, (list, tuple)) and name != "video"
            values = [v for v in (value if several else [value]) if not empty(v)]
            if values and found[kind]:
                raise InputError(f"two columns hold {kind}s: keep {name!r} or the other")
            found[kind] += values
        elif may_show(name, value):
            raise InputError(
                f"the column {name!r} may show something, and only {', '.join(COLUMNS)} are read: rename it, or say "
                f"GroupReward(..., ignore=[{name!r}])"
            )
    return found


def merged(kind: str, blocks: list, beside: list) -> list:
    """What the blocks hold; those that hold nothing are filled by a column, in order."""
    holes = sum(block is None for block in blocks)
    if blocks and not holes and beside:  # TRL fills the blocks and hands over the column, too
        see = (lambda value: digest(opened(value))) if kind == "image" else (lambda value: digest_of(clip_from(value)))
        if [*map(see, blocks)] != [*map(see, beside)]:
            raise InputError(f"the {kind}s in the messages are not those in the column beside them: keep one")
        return blocks
    if blocks and holes != len(beside):
        raise InputError(f"{holes} {kind} blocks of the messages are empty, and a column holds {len(beside)} {kind}s")
    filling = iter(beside)
    return [next(filling) if block is None else block for block in blocks] or beside


def may_show(name: str, value: object) -> bool:
    """By what it holds, or by its name, unless it holds numbers only."""
    return shows(value) or (SHOWN.search(name.lower()) is not None and not plain(value))


def shows(value: object) -> bool:
    """Is it a picture, a sound or a video, or the name of a file of one?"""
    if isinstance(value, (list, tuple)):
        return any(map(shows, value))
    if isinstance(value, Mapping):
        held = [value.get(key) for key in ("bytes", "array", "sampling_rate")]
        return not all(map(empty, held)) or any(map(shows, value.values()))
    if isinstance(value, (str, Path)):
        text = str(value).strip()
        file = "\n" not in text and re.split(r"[?#]", text.lower())[0].endswith(FILES)
        return file or text[:10].lower() in ("data:image", "data:video", "data:audio") or text.startswith(BASE64)
    known = isinstance(value, (Image.Image, bytes, bytearray, memoryview))
    return known or getattr(value, "ndim", 0) > 1 or type(value).__module__.partition(".")[0] in LIBRARIES


def plain(value: object) -> bool:
    """A number, a flag, nothing, or a list of such, as of ids and sizes."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(empty(v) or isinstance(v, (Number, np.generic)) for v in values)


def empty(value: object) -> bool:
    """Null, or nothing in it."""
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and not value)


# -------------------------------------------------------------------------------------------------- pictures and videos


class NoClip(InputError):
    """A value that is no video in any form that is read."""


def opened(value: object, what: str = "a picture of the prompt") -> Image.Image:
    return open_picture(picture_from(value, what))


def clip_from(value: object) -> Frames:
    """A folder of frames or an animation by path; or a list of frames, or of (seconds, frame). Frames without times are
    spaced as those of a folder are."""
    what = "a video of the prompt"
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        value = value["path"]
    address = isinstance(value, str) and re.match(r"[a-z][a-z0-9+.-]+://|data:", value, re.IGNORECASE)
    if isinstance(value, (str, Path)) and not address:
        return open_video(Clip(Path(value)))
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], tuple):
        with suppress(NoClip):  # a list of one video; or else it is one of one frame
            return clip_from(value[0])
    if not isinstance(value, (list, tuple)) or not value:
        raise NoClip(f"{what} is {short(value)}: give the path of a folder of frames, or a list of frames")
    timed = [isinstance(frame, tuple) and len(frame) == 2 for frame in value]
    times = [frame[0] for frame in value] if all(timed) else [i * INTERVAL for i in range(len(value))]
    if any(timed) != all(timed) or not all(isinstance(t, (int, float)) and 0 <= t < 1e9 for t in times):
        raise InputError(f"{what} is a list of frames of which some have no seconds")
    frames = [frame[1] for frame in value] if all(timed) else value
    return [(float(times[i]), opened(frames[i], f"frame {i + 1} of {what}")) for i in spread(len(frames), FRAMES)]


def short(value: object) -> str:
    return repr(value[:60]) if isinstance(value, str) else f"a {type(value).__name__}"
