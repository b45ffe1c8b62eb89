"""Text, pictures and responses -> token ids. The only file that knows the chat format and the separator.

    <|im_end|> PICTURES <|im_start|>user\\n PROMPT <|im_end|>\\n <|im_start|>assistant\\n
                                     RESPONSE 1 <|resp_sep|> RESPONSE 2 <|resp_sep|> ... RESPONSE N <|resp_sep|>
                                              ^ read here             ^                          ^

The ids are built piece by piece, so every position is known because it was put there: nothing is ever searched for in
the finished ids. Each response is tokenized alone, hence encoded the same wherever it stands, and its score is read at
its last token, just before the separator that closes it.

Markup (turns, picture tokens, the separator) enters as ids, looked up by name. Text goes through a copy of the
tokenizer that knows no added token, so a prompt or response that spells `<|resp_sep|>` or `<im_patch>` is encoded as
the ordinary characters it is: no answer can add a separator, end a turn or fake a picture.

In `isolated` mode the positions of every response start right after the prompt, as they would if it stood alone.

Layout "released" is for the released reward model, which was trained on other rows (facts: its training code,
yinuoyang01/multi-response-rm). Every oddity is meant:

    <|im_end|> PICTURES <|im_start|>user\\n PROMPT <|im_end|>\\n␣<|im_start|>assistant
           \\n RESPONSE 1 \\n\\n <|resp_sep|> \\n\\n RESPONSE 2 \\n\\n <|resp_sep|> ... <|resp_sep|> \\n\\n RESPONSE N
                           ^ read here                   ^                                                  ^
the blank before the assistant's turn; BOS only with pictures; blank lines round separators, so that a response is
encoded differently first, in the middle and last; no separator after the last one, which is read at its last token.
The prompt ends after the word "assistant": its line break can melt into the first response's own.

See it: `pytest tests/test_prompt.py`, `tutorials/04_separators_and_masks.md`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer as BPE
from torch import Tensor

from yojo.core.config import ImageConfig, Markup, read_image_config, read_markup
from yojo.core.image import Pictures, frames_to_patches, images_to_patches, measure
from yojo.core.mask import MODES, PROMPT, AttentionMask
from yojo.files import InputError, read_json
from yojo.media import open_picture, open_video

SEPARATOR = "<|resp_sep|>"
BOS = TURN_END = "<|im_end|>"
TURN_START = "<|im_start|>"
PATCH = "<im_patch>"
# All image tokens of a record see each other; these are image tokens.
IMAGE_TOKENS = (PATCH, *"<im_col> <im_start> <low_res_im_start> <frame_start> <im_end> <frame_end> <im_low>".split())
MAX_RESPONSES = 64
LAYOUTS = ("default", "released")


class Tokenizer:
    """A `tokenizer.json` in two halves: text, which can spell nothing but text, and added tokens by name."""

    def __init__(self, path: str | Path):
        raw = read_json(path)
        try:
            self.full = BPE.from_str(json.dumps(raw))
            self.text = BPE.from_str(json.dumps(raw | {"added_tokens": [], "post_processor": None}))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise InputError(f"{path} is not a tokenizer: {error}") from None
        self.path = Path(path)
        self.text.no_truncation()
        self.text.no_padding()

    def __len__(self) -> int:
        return self.full.get_vocab_size(with_added_tokens=True)

    def __getstate__(self):
        return self.path

    def __setstate__(self, path):
        self.__init__(path)

    def encode(self, text: str, what: str = "text") -> list[int]:
        """Text -> ids, never an added token's. A lone surrogate, which no file can hold, raises."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{what} holds a lone surrogate at character {error.start}: it is not valid Unicode"
            ) from None
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, added tokens by their names."""
        return self.full.decode(list(ids), skip_special_tokens=False)

    def name(self, token: int) -> str:
        """How one id reads: an added token's name, or the text it stands for."""
        return SEPARATOR if token == self.separator_id else self.decode([token])

    def labels(self, tokens: Sequence[int]) -> list[str]:
        r"""Names to print beside a row: a line break as \n, and no blank before a word."""
        names = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in self.name(token)) for token in tokens)
        return [name.strip() or "space" for name in names]

    def spells(self, text: str) -> bool:
        """Does a text spell the name of an added token, which `encode` takes for the text it is?"""
        return any(name in text for name in self.added)

    @cached_property
    def added(self) -> set[str]:
        return {SEPARATOR, *(token.content for token in self.full.get_added_tokens_decoder().values())}

    def id(self, name: str) -> int:
        token = self.full.token_to_id(name)
        if token is None:
            raise InputError(f"{self.path} lacks the token {name}, which this model's prompt needs")
        return token

    @cached_property
    def separator_id(self) -> int:
        """The separator's own id, or the first free one: the released training code adds it at `len(tokenizer)`."""
        token = self.full.token_to_id(SEPARATOR)
        return len(self) if token is None else token


@dataclass(frozen=True)
class Encoded:
    """One record as the model reads it. All spans are known by construction.

    ids int [T]; response int [T], -1 = prompt; image bool [T]; spans [(start, stop)] of each response without its
    separator (in layout "released" with its blank lines); read = the index each score is read at, spans[i][1] - 1;
    pictures: what the <im_patch> tokens show.
    """

    ids: Tensor
    response: Tensor
    image: Tensor
    spans: list[tuple[int, int]]
    pictures: Pictures | None

    @property
    def read(self) -> list[int]:
        return [stop - 1 for _, stop in self.spans]

    @property
    def prompt_length(self) -> int:
        return int((self.response == PROMPT).sum())

    def positions(self, mode: str) -> Tensor:
        """int [T]: 0, 1, 2, ... (joint), or starting again after the prompt for each response (isolated)."""
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is none of {MODES}")
        positions = torch.arange(len(self.ids))
        if mode == "isolated":
            for start, stop in self.spans:
                positions[start : stop + 1] += self.prompt_length - start
        return positions


@dataclass(frozen=True)
class Ask:
    """One record in numbers: prompt tokens, picture tokens among them, tokens of each response with its separator,
    views, <im_patch> tokens, and patches in the window of each."""

    prompt: int
    pictures: int
    responses: tuple[int, ...]
    views: int = 0
    pooled: int = 0
    window: int = 4

    def mask(self, mode: str) -> AttentionMask:
        """Its mask, the pictures standing after BOS."""
        response = torch.tensor([[PROMPT] * self.prompt + [i for i, R in enumerate(self.responses) for _ in range(R)]])
        place = torch.arange(response.shape[1])[None]
        return AttentionMask(torch.zeros_like(response), response, (place >= 1) & (place <= self.pictures), mode)

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)

    @property
    def read(self) -> list[tuple[int, int]]:
        """(row, index) of the token each score is read at: the one before each closing separator."""
        return [(0, self.prompt + end - 2) for end in accumulate(self.responses)]


Seen = tuple[list[int], Pictures | None]  # the token ids of a record's pictures, and the pictures


class Processor:
    """The files of a checkpoint folder that say how text and pictures become tokens."""

    def __init__(
        self, tokenizer: Tokenizer, images: ImageConfig, markup: Markup, max_tokens: int, layout: str = "default"
    ):
        self.tokenizer, self.images, self.markup, self.max_tokens = tokenizer, images, markup, max_tokens
        if layout not in LAYOUTS:
            raise InputError(f"layout {layout!r} is none of {LAYOUTS}")
        self.layout = layout
        self.image_ids = torch.tensor([tokenizer.id(name) for name in IMAGE_TOKENS])

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens: int, layout: str = "default") -> "Processor":
        tokenizer = Tokenizer(Path(folder) / "tokenizer.json")
        return cls(tokenizer, read_image_config(folder), read_markup(folder), max_tokens, layout)

    def in_layout(self, layout: str) -> "Processor":
        return Processor(self.tokenizer, self.images, self.markup, self.max_tokens, layout)

    def encode(
        self,
        prompt: str,
        responses: Sequence[str],
        image: "str | Path | Image.Image | Sequence | None" = None,
        video: "str | Path | Sequence[tuple[float, Image.Image]] | None" = None,
    ) -> Encoded:
        """One record -> `Encoded`. No responses = the prompt alone, ready for the first one to be written.

        image: a path, a Pillow picture, or a list of them; video: a path as in `media.open_video`, or a list of
        (seconds, frame). More than 64 responses, an empty one, or more tokens than the model has positions for raise
        `InputError`: nothing is ever cut.
        """
        return self.lay_out(prompt, responses, self.look(image, video))

    def lay_out(self, prompt: str, responses: Sequence[str], seen: Seen) -> Encoded:
        """`encode` for pictures that have been looked at already."""
        marks, pictures = seen
        ids, owner, spans = self._pieces(prompt, responses, marks)
        if len(ids) > self.max_tokens:
            over = len(ids) - self.max_tokens
            raise InputError(
                f"{len(ids)} tokens ({owner.count(PROMPT)} of the prompt, {len(marks)} of them pictures) "
                f"are {over} more than the model's limit of {self.max_tokens}: shorten or drop responses"
            )
        ids = torch.tensor(ids)
        return Encoded(ids, torch.tensor(owner), torch.isin(ids, self.image_ids), spans, pictures)

    def _pieces(
        self, prompt: str, responses: Sequence[str], marks: list[int]
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """ids, which response each belongs to, and the responses' spans."""
        if isinstance(responses, str) or not all(isinstance(text, str) for text in [prompt, *responses]):
            raise InputError("prompt must be a string and responses a list of strings")
        if len(responses) > MAX_RESPONSES:
            over = len(responses) - MAX_RESPONSES
            raise InputError(f"{len(responses)} responses are {over} more than the limit of {MAX_RESPONSES}")
        if empty := [i for i, text in enumerate(responses, 1) if not text.strip()]:
            raise InputError(f"response {empty[0]} is empty: there is nothing to score")
        encode, separator = self.tokenizer.encode, self.tokenizer.separator_id
        start, end = self.tokenizer.id(TURN_START), self.tokenizer.id(TURN_END)
        user = [start, *encode("user\n" + prompt, "the prompt"), end]
        if self.layout == "released":
            ids = [*([self.tokenizer.id(BOS)] if marks else []), *marks, *user, *encode("\n "), start]
            ids += encode("assistant")
            before, after = ["\n"] + ["\n\n"] * len(responses), "\n\n"
        else:
            ids = [self.tokenizer.id(BOS), *marks, *user, *encode("\n"), start, *encode("assistant\n")]
            before, after = [""] * len(responses), ""
        owner, spans = [PROMPT] * len(ids), []
        for i, text in enumerate(responses):
            closed = self.layout == "default" or i + 1 < len(responses)
            piece = encode(before[i] + text + (after if closed else ""), f"response {i + 1}")
            spans.append((len(ids), len(ids) + len(piece)))
            ids += piece + [separator] * closed
            owner += [i] * (len(piece) + closed)
        return ids, owner, spans

    def measure(
        self,
        prompt: str,
        responses: Sequence[str],
        sizes: Sequence[tuple[int, int]] = (),
        seconds: Sequence[float] = (),
        max_crops: int | None = None,
    ) -> Ask:
        """A record's size, from nothing but the (width, height) of its pictures or the seconds of its frames."""
        cuts = [measure(h, w, self._cut_into(max_crops)) for w, h in sizes]
        marks = self._images_ids([grid for _, grid in cuts]) if sizes else []
        if seconds:
            grid = tuple(-(-self.images.side // window) for window in self.images.video_pooling)
            marks = self._video_ids(seconds, [grid] * len(seconds))
        ids, owner, spans = self._pieces(prompt, responses, marks)
        return Ask(
            prompt=owner.count(PROMPT),
            pictures=len(marks),
            responses=tuple(owner.count(i) for i in range(len(spans))),
            views=sum(views for views, _ in cuts) + len(seconds),
            pooled=marks.count(self.tokenizer.id(PATCH)),
            window=math.prod(self.images.video_pooling if seconds else self.images.pooling),
        )

    def _cut_into(self, max_crops: int | None) -> ImageConfig:
        return self.images if max_crops is None else replace(self.images, max_crops=max_crops)

    def look(self, image, video=None, max_crops: int | None = None) -> Seen:
        """Open and cut pictures: their token ids, and what the vision tower reads. max_crops None = the
        checkpoint's."""
        if image is not None and video is not None:
            raise InputError("a record shows images or a video, not both")
        if isinstance(video, (str, Path)):
            video = open_video(video)
        if video is not None:
            if not video:
                raise InputError("the video has no frames")
            seen = frames_to_patches([open_picture(frame) for _, frame in video], self.images)
            return self._video_ids([seconds for seconds, _ in video], seen.grids), seen
        if image is None:
            return [], None
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise InputError("the list of images is empty: leave it out where there is no picture")
        seen = images_to_patches([open_picture(i) for i in images], self._cut_into(max_crops))
        return self._images_ids(seen.grids), seen

    def _images_ids(self, grids: list[tuple[int, ...]]) -> list[int]:
        """Each image: the global view, then the high-resolution grid; several are numbered."""
        m, ids = self.markup, []
        low = "<low_res_im_start>" if m.use_single_crop_start_token else "<im_start>"
        low_columns = m.image_use_col_tokens and m.use_single_crop_col_tokens
        for i, (low_rows, low_cols, rows, cols) in enumerate(grids, 1):
            if len(grids) > 1:
                ids += self.tokenizer.encode(f"Image {i}")
            ids += self._grid_ids(low, "<im_end>", low_rows, low_cols, low_columns)
            ids += self._grid_ids("<im_start>", "<im_end>", rows, cols, m.image_use_col_tokens)
        return ids

    def _video_ids(self, times: list[float], grids: list[tuple[int, ...]]) -> list[int]:
        """Each frame: its second with one decimal, then its grid."""
        m, ids = self.markup, []
        start, end = ("<frame_start>", "<frame_end>") if m.use_frame_special_tokens else ("<im_start>", "<im_end>")
        for i, (seconds, grid) in enumerate(zip(times, grids, strict=True)):
            ids += self.tokenizer.encode(f"{' ' if i else ''}{seconds:.1f} ")
            ids += self._grid_ids(start, end, *grid, m.video_use_col_tokens)
        return ids

    def _grid_ids(self, start: str, end: str, rows: int, columns: int, column_tokens: bool) -> list[int]:
        row = [PATCH] * columns + ["<im_col>"] * column_tokens
        return [self.tokenizer.id(name) for name in (start, *(row * rows), end)]
