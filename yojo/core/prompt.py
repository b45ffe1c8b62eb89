"""Text, pictures and responses -> token ids. The only file that knows the chat format and the separator.

    <|im_end|> PICTURES <|im_start|>user\\n PROMPT <|im_end|>\\n <|im_start|>assistant\\n
                                     RESPONSE 1 <|resp_sep|> RESPONSE 2 <|resp_sep|> ... RESPONSE N <|resp_sep|>
                                              ^ read here             ^                          ^

The ids are built piece by piece, so every position is known because it was put there: nothing is ever searched for in
the finished ids. Each response is tokenized alone, so its ids are the same wherever it stands, and its score is read at
its last token, just before the separator that closes it.

Markup (turns, picture tokens, the separator) enters as ids, looked up by name. Text goes through a copy of the
tokenizer in which the names of markup and of all other special tokens are plain characters: no prompt or response can
add a separator, end a turn or fake a picture. Added tokens that are not special, such as `<think>`, stay single tokens
of a text, as in the released model.

In `isolated` mode the positions of every response start right after the prompt, as they would if it stood alone.

Layout "released" is for the released reward model, which was trained on other rows (facts: its training code,
yinuoyang01/multi-response-rm). Every oddity is intended:

    <|im_end|> PICTURES <|im_start|>user\\n PROMPT <|im_end|>\\n␣<|im_start|>assistant
           \\n RESPONSE 1 \\n\\n <|resp_sep|> \\n\\n RESPONSE 2 \\n\\n <|resp_sep|> ... <|resp_sep|> \\n\\n RESPONSE N
                           ^ read here                   ^                                                  ^
the blank before the assistant's turn; BOS only with pictures; blank lines around separators, so that the ids of a
response depend on whether it is first, in the middle or last; no separator after the last one, read at its last token.
The prompt ends after the word "assistant", because its line break and the first response's own can be one token.

See it: `pytest tests/test_prompt.py`, `tutorials/04_separators_and_masks.md`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer as BPE
from torch import Tensor

from yojo.core.config import ImageConfig, Markup
from yojo.core.image import Pictures, frames_to_patches, images_to_patches
from yojo.core.mask import MODES, PROMPT
from yojo.files import InputError, read_json
from yojo.media import open_picture, picture_size, pictures_in
from yojo.video import Video, open_video, video_plan

SEPARATOR = "<|resp_sep|>"
BOS = TURN_END = "<|im_end|>"  # one token, two uses: the release opens rows with it
TURN_START = "<|im_start|>"
PATCH = "<im_patch>"
# All picture tokens of a record attend to each other; these are the picture tokens.
IMAGE_TOKENS = (PATCH, *"<im_col> <im_start> <low_res_im_start> <frame_start> <im_end> <frame_end> <im_low>".split())
MARKUP = {SEPARATOR, TURN_END, TURN_START, *IMAGE_TOKENS}
MAX_RESPONSES = 64


Images = str | Path | Image.Image | Sequence | None  # a picture, in any form of `media.picture_from`, or several


class Layout(NamedTuple):
    """What stands between the texts of a row."""

    always_bos: bool  # or with pictures only
    turn: str  # between the user's turn and the assistant's
    role: str  # the last text of the prompt
    first: str  # before the first response
    later: str  # before each other one
    after: str  # before each separator
    closed: bool  # by a separator after the last response, too


LAYOUTS = {
    "default": Layout(True, "\n", "assistant\n", "", "", "", True),
    "released": Layout(False, "\n ", "assistant", "\n", "\n\n", "\n\n", False),
}


class Tokenizer:
    """A `tokenizer.json` in two halves: text, which can spell no markup, and added tokens by name."""

    def __init__(self, path: str | Path):
        raw = read_json(path)
        try:
            self.full = BPE.from_str(json.dumps(raw))
            added = [t | {"special": t["special"] or t["content"] in MARKUP} for t in raw["added_tokens"]]
            self.text = BPE.from_str(json.dumps(raw | {"added_tokens": added, "post_processor": None}))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise InputError(f"{path} is not a tokenizer: {error}") from None
        self.path = Path(path)
        self.text.encode_special_tokens = True  # as the text they are
        self.text.no_truncation()
        self.text.no_padding()

    def __len__(self) -> int:
        return self.full.get_vocab_size(with_added_tokens=True)

    def __getstate__(self):
        return self.path

    def __setstate__(self, path):
        self.__init__(path)

    def encode(self, text: str, what: str = "text") -> list[int]:
        """Text -> ids, never a special token's. A lone surrogate, which no file can hold, raises."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{what} holds a lone surrogate at character {error.start}: not valid Unicode") from None
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, added tokens by their names."""
        return self.full.decode(list(ids), skip_special_tokens=False)

    def name(self, token: int) -> str:
        """How one id reads: an added token's name, or the text it stands for."""
        return SEPARATOR if token == self.separator_id else self.decode([token])

    def spells(self, text: str) -> bool:
        """Does a text spell the name of a special token? `encode` reads it as plain text."""
        return any(name in text for name in self.added)

    @cached_property
    def added(self) -> set[str]:
        return {SEPARATOR, *(t.content for t in self.text.get_added_tokens_decoder().values() if t.special)}

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
    """One record as the model reads it: a row of tokens. All spans are known by construction.

    ids int [T]; response int [T], -1 = prompt; image bool [T]; spans [(start, stop)] of each response without its
    separator (in layout "released" with its blank lines); pictures: what the <im_patch> tokens show; same: for
    each response, the index of the first one with the same text; prefix: how an error about it begins.
    """

    ids: Tensor
    response: Tensor
    image: Tensor
    spans: list[tuple[int, int]]
    pictures: Pictures
    same: list[int] = field(default_factory=list)
    prefix: str = ""

    @property
    def score_positions(self) -> list[int]:
        """Where each score is read: at the last token of its response."""
        return [stop - 1 for _, stop in self.spans]

    @property
    def prompt_length(self) -> int:
        return int((self.response == PROMPT).sum())

    def positions(self, mode: str) -> Tensor:
        """int [T]: 0, 1, 2, ... (joint), or starting again after the prompt for each response (isolated)."""
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is none of {MODES}")
        positions = torch.arange(len(self.ids))
        if mode == "joint":
            return positions
        part = self.response + 1  # 0 = the prompt
        lengths = torch.bincount(part)  # 5, 3, 2: a prompt of 5 tokens, responses of 3 and 2
        before = (lengths.cumsum(0) - lengths - lengths[0]).clamp_min(0)  # 0, 0, 3: tokens of the responses before each
        return positions - before[part]

    def continued(self, responses: Sequence[list[int]], separator: int | None = None, closed: bool = True) -> "Encoded":
        """A prompt, and after it responses, each followed by the separator, if any; the last one only if `closed`. The
        separator belongs to its response."""
        if self.spans:
            raise ValueError(f"a prompt can be continued, and this row has {len(self.spans)} responses already")
        ids, owner, spans = self.ids.tolist(), self.response.tolist(), []
        for i, response in enumerate(responses):
            end = [separator] if separator is not None and (closed or i + 1 < len(responses)) else []
            spans.append((len(ids), len(ids) + len(response)))
            ids += response + end
            owner += [i] * len(response + end)
        image = F.pad(self.image, (0, len(ids) - len(self.ids)))  # no response can show a picture
        return Encoded(torch.tensor(ids), torch.tensor(owner), image, spans, self.pictures, [*range(len(spans))])

    def distinct(self) -> tuple["Encoded", list[int]]:
        """The row without responses that repeat an earlier one, and for each response the index of its score."""
        first = sorted(set(self.same))
        kept = torch.isin(self.response, torch.tensor([PROMPT, *first]))
        moved = kept.cumsum(0).tolist()  # a token that was the i-th is the moved[i]-th
        spans = [(moved[start] - 1, moved[stop - 1]) for start, stop in (self.spans[i] for i in first)]
        row = replace(self, ids=self.ids[kept], response=self.response[kept], image=self.image[kept], spans=spans)
        return row, [first.index(i) for i in self.same]


@dataclass(eq=False)
class Processor:
    """The files of a checkpoint folder that say how text and pictures become tokens. `dataclasses.replace` makes one
    with another layout or limit."""

    tokenizer: Tokenizer
    images: ImageConfig
    markup: Markup
    max_tokens: int
    layout: str = "default"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise InputError(f"layout {self.layout!r} is none of {tuple(LAYOUTS)}")
        self.image_ids = torch.tensor([self.tokenizer.id(name) for name in IMAGE_TOKENS])

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens: int, layout: str = "default") -> "Processor":
        """That of a checkpoint; rows of at most `max_tokens`."""
        from yojo import settings

        tokenizer = Tokenizer(Path(folder) / "tokenizer.json")
        return cls(tokenizer, settings.read_image_config(folder), settings.read_markup(folder), max_tokens, layout)

    def encode(
        self,
        prompt: str,
        responses: Sequence[str],
        image: Images = None,
        video: Video = None,
        pictures: Pictures | None = None,
    ) -> Encoded:
        """One record -> `Encoded`. No responses = the prompt alone, ready for the first one to be written.

        image: a path, a Pillow picture, or a list of them; video: a path, a list of frames or of (seconds, frame), as
        in `video.open_video`; pictures: in place of both, what `open_pictures` made of them. More than 64 responses, an
        empty one, or more tokens than the model has positions for raise `InputError`: nothing is ever cut.
        """
        if pictures is None:
            pictures = self.open_pictures(image, video)
        elif image is not None or video is not None:
            raise InputError("pictures that are open already stand in place of image and video: give one of them")
        responses = checked(prompt, responses)
        encode, token, layout = self.tokenizer.encode, self.tokenizer.id, LAYOUTS[self.layout]
        bos = [token(BOS)] if layout.always_bos or pictures.ids else []
        user = [token(TURN_START), *encode("user\n" + prompt, "the prompt"), token(TURN_END)]
        ids = [*bos, *pictures.ids, *user, *encode(layout.turn), token(TURN_START), *encode(layout.role)]
        pieces = []
        for i, text in enumerate(responses):
            after = layout.after if layout.closed or i + 1 < len(responses) else ""
            pieces.append(encode((layout.later if i else layout.first) + text + after, f"response {i + 1}"))
        row = self.row(ids, pictures).continued(pieces, self.tokenizer.separator_id, layout.closed)
        if len(row.ids) > self.max_tokens:
            over = len(row.ids) - self.max_tokens
            raise InputError(
                f"{len(row.ids)} tokens ({len(ids)} of the prompt, {len(pictures.ids)} of them pictures) "
                f"are {over} more than the model's limit of {self.max_tokens}: shorten or drop responses"
            )
        texts = [encode(text) for text in responses]  # in layout "released", the pieces of equal texts differ by place
        return replace(row, same=[texts.index(text) for text in texts])

    def row(self, ids: list[int], pictures: Pictures) -> Encoded:
        """The ids of a prompt, those of its pictures among them -> a row that has no response yet."""
        tokens = torch.tensor(ids)
        return Encoded(tokens, torch.full_like(tokens, PROMPT), torch.isin(tokens, self.image_ids), [], pictures)

    def open_pictures(self, image=None, video=None, max_crops: int | None = None, pixels: bool = True) -> Pictures:
        """Open and cut what a record shows. image and video: as in `encode`; max_crops None = the checkpoint's; pixels
        False: from the sizes of the files alone, which is all that a row's length depends on."""
        if image is not None and video is not None:
            raise InputError("a record shows images or a video, not both")
        if video is not None:
            # a frame's own size plays no part
            frames = open_video(video) if pixels else [(t, (self.images.size,) * 2) for t, _ in video_plan(video)]
            shown = frames_to_patches([frame for _, frame in frames], self.images)
            return replace(shown, ids=self._video_ids([seconds for seconds, _ in frames], shown.grids))
        if image is None:
            return Pictures()
        images = pictures_in(image)
        if not images:
            raise InputError("the list of images is empty: leave it out where there is no picture")
        config = replace(self.images, max_crops=self.images.max_crops if max_crops is None else max_crops)
        look = open_picture if pixels else picture_size
        shown = images_to_patches([look(value, f"image {i}") for i, value in enumerate(images, 1)], config)
        return replace(shown, ids=self._images_ids(shown.grids))

    def _images_ids(self, grids: list[tuple[int, ...]]) -> list[int]:
        """Each image: the global view, then the high-resolution grid; several are numbered."""
        ids = []
        for i, grid in enumerate(grids, 1):
            if len(grids) > 1:
                ids += self.tokenizer.encode(f"Image {i}")
            ids += [self.tokenizer.id(name) for name in image_tokens(grid, self.markup)]
        return ids

    def _video_ids(self, times: list[float], grids: list[tuple[int, ...]]) -> list[int]:
        """Each frame: its second with one decimal, then its grid."""
        ids = []
        for i, (seconds, grid) in enumerate(zip(times, grids, strict=True)):
            ids += self.tokenizer.encode(f"{' ' if i else ''}{seconds:.1f} ")
            ids += [self.tokenizer.id(name) for name in frame_tokens(grid, self.markup)]
        return ids


def checked(prompt: str, responses: Iterable[str]) -> list[str]:
    other = isinstance(responses, (str, Mapping, Set)) or getattr(responses, "ndim", 1) != 1  # a table yields its names
    responses = list(responses) if isinstance(responses, Iterable) and not other else None
    if not isinstance(prompt, str) or responses is None or not all(isinstance(text, str) for text in responses):
        raise InputError(f"prompt must be a string and responses a list of strings: {prompt!r:.99}, {responses!r:.99}")
    if (n := len(responses)) > MAX_RESPONSES:
        raise InputError(f"{n} responses are {n - MAX_RESPONSES} more than the limit of {MAX_RESPONSES}")
    if empty := [i for i, text in enumerate(responses, 1) if not text.strip()]:
        raise InputError(f"response {empty[0]} is empty: there is nothing to score")
    return responses


def image_tokens(grid: tuple[int, ...], m: Markup) -> list[str]:
    """The tokens of one image, by name: the global view, then the high-resolution grid."""
    low_rows, low_columns, rows, columns = grid
    low = "<low_res_im_start>" if m.use_single_crop_start_token else "<im_start>"
    low_ends = m.image_use_col_tokens and m.use_single_crop_col_tokens
    view = grid_tokens(low, "<im_end>", low_rows, low_columns, low_ends)
    return view + grid_tokens("<im_start>", "<im_end>", rows, columns, m.image_use_col_tokens)


def frame_tokens(grid: tuple[int, ...], m: Markup) -> list[str]:
    """The tokens of one frame of a video, by name."""
    start, end = ("<frame_start>", "<frame_end>") if m.use_frame_special_tokens else ("<im_start>", "<im_end>")
    return grid_tokens(start, end, *grid, m.video_use_col_tokens)


def grid_tokens(start: str, end: str, rows: int, columns: int, column_tokens: bool) -> list[str]:
    row = [PATCH] * columns + ["<im_col>"] * column_tokens
    return [start, *(row * rows), end]
