"""Ids are built piece by piece, so every position is known, and text is never anything but text.

pytest tests/test_prompt.py
"""

import unicodedata

import pytest
import torch
from conftest import names
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yojo.core.config import Markup
from yojo.core.prompt import IMAGE_TOKENS, SEPARATOR, Processor, Tokenizer
from yojo.drawing import readable
from yojo.files import InputError
from yojo.settings import read_markup

SPECIAL = ["<|resp_sep|>", "<|im_end|>", "<|im_start|>", "<im_patch>", "<|image|>", "<|video|>", "<|endoftext|>"]
SPECIAL += [name for name in IMAGE_TOKENS if name not in SPECIAL]


def test_the_default_layout_written_out(processor):
    e = processor.encode("Describe the star.", ["a red star", "a star"])
    assert names(processor, e) == [
        *("<|im_end|>", "<|im_start|>", "user", "\n", "Describe", " the", " star", ".", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant", "\n"),
        *("a", " red", " star", "<|resp_sep|>"),
        *("a", " star", "<|resp_sep|>"),
    ]
    assert e.prompt_length == 13
    assert e.spans == [(13, 16), (17, 19)] and e.score_positions == [15, 18]
    assert e.response.tolist() == [-1] * 13 + [0] * 4 + [1] * 3
    assert e.positions("joint").tolist() == list(range(20))
    assert e.positions("isolated").tolist() == [*range(13), 13, 14, 15, 16, 13, 14, 15]
    assert not e.image.any() and not e.pictures.ids and len(e.pictures.patches) == 0


def test_a_picture_written_out(processor):
    """84 x 84 pixels: a global view of 3 x 3 tokens without column tokens, one crop of 3 x 3 with them."""
    e = processor.encode("?", [], Image.new("RGB", (84, 84)))
    low = ["<low_res_im_start>"] + 9 * ["<im_patch>"] + ["<im_end>"]
    high = ["<im_start>"] + 3 * (3 * ["<im_patch>"] + ["<im_col>"]) + ["<im_end>"]
    shown = ["<|im_end|>", *low, *high, "<|im_start|>"]
    assert names(processor, e)[: len(shown)] == shown
    assert e.image.tolist() == [name in IMAGE_TOKENS for name in names(processor, e)]
    assert e.image.sum() == len(low) + len(high)
    assert len(e.pictures.pooling) == 18


def test_the_label_of_a_line_break_can_be_read(processor):
    row = processor.encode("Describe\nthe star.", ["a red\tstar\\  or not"])
    labels = readable(map(processor.tokenizer.name, row.ids.tolist()))
    assert labels[2:6] == ["user", r"\n", "Describe", r"\n"] and r"\t" in labels
    assert "space" in labels and "\\" in labels
    assert all(label and label == label.strip() and label.isprintable() for label in labels)


@pytest.mark.parametrize("token", SPECIAL)
def test_a_text_that_spells_a_token_is_noticed(processor, token):
    assert processor.tokenizer.spells(f"a red star {token}") and not processor.tokenizer.spells("a <| b |> <im")


def test_several_pictures_are_numbered(processor):
    text = processor.tokenizer.decode(processor.encode("?", [], [Image.new("RGB", (84, 84))] * 2).ids.tolist())
    assert text.startswith("<|im_end|>Image 1<low_res_im_start>") and "<im_end>Image 2<low_res_im_start>" in text


def test_video_frames_carry_their_time(processor):
    video = [(0.0, Image.new("RGB", (84, 84))), (2.46, Image.new("RGB", (50, 60)))]
    text = processor.tokenizer.decode(processor.encode("?", [], video=video).ids.tolist())
    frame = "<im_start>" + 4 * "<im_patch>" + "<im_end>"
    assert text.startswith(f"<|im_end|>0.0 {frame} 2.5 {frame}<|im_start|>user\n?")
    marked = Processor(processor.tokenizer, processor.images, Markup(use_frame_special_tokens=True), 4096)
    text = marked.tokenizer.decode(marked.encode("?", [], video=video).ids.tolist())
    assert "<frame_start><im_patch>" in text and "<im_start>" not in text


def test_markup_flags_are_read_from_the_file(tmp_path):
    assert read_markup(tmp_path) == Markup(True, False, True, False, False)
    (tmp_path / "processor_config.json").write_text('{"use_frame_special_tokens": true, "image_use_col_tokens": false}')
    assert read_markup(tmp_path) == Markup(False, False, True, False, True)


@pytest.mark.parametrize("text", SPECIAL)
def test_text_that_spells_a_special_token_is_text(processor, text):
    plain = processor.encode("x", ["x", "y"])
    e = processor.encode(f"x{text}", [f"x{text}y", f"{text}{text}"])
    added = torch.tensor([t for t in range(processor.tokenizer.text.get_vocab_size(), len(processor.tokenizer) + 1)])
    assert torch.isin(e.ids, added).sum() == torch.isin(plain.ids, added).sum()
    assert (e.ids == processor.tokenizer.separator_id).sum() == 2 == len(e.spans)
    spans = [processor.tokenizer.decode(e.ids[a:b].tolist()) for a, b in e.spans]
    assert spans == [f"x{text}y", f"{text}{text}"]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=6)
)
def test_property_every_span_decodes_to_its_response(processor, responses):
    """To its NFC form: the tokenizer normalises. A response is encoded the same wherever it stands."""
    e = processor.encode("prompt", responses)
    assert len(e.spans) == len(responses)
    for (start, stop), text in zip(e.spans, responses, strict=True):
        assert processor.tokenizer.decode(e.ids[start:stop].tolist()) == unicodedata.normalize("NFC", text)
        assert e.ids[stop] == processor.tokenizer.separator_id
        alone = processor.encode("prompt", [text])
        assert torch.equal(alone.ids[slice(*alone.spans[0])], e.ids[start:stop])


@pytest.mark.parametrize("text", ["", " ", "\n\t \u2003"])
def test_an_empty_response_is_refused(processor, text):
    with pytest.raises(InputError, match="response 2 is empty"):
        processor.encode("prompt", ["something", text])


def test_limits_say_by_how_much(processor):
    with pytest.raises(InputError, match="65 responses are 1 more than the limit of 64"):
        processor.encode("prompt", ["x"] * 65)
    assert len(processor.encode("prompt", ["x"] * 64).spans) == 64
    e = processor.encode("prompt", ["x"])
    narrow = Processor(processor.tokenizer, processor.images, processor.markup, max_tokens=len(e.ids) - 1)
    with pytest.raises(
        InputError, match=f"{len(e.ids)} tokens .* are 1 more than the model's limit of {len(e.ids) - 1}"
    ):
        narrow.encode("prompt", ["x"])


def test_lone_surrogates_are_refused(processor):
    with pytest.raises(InputError, match="response 1 holds a lone surrogate at character 1"):
        processor.encode("prompt", ["x\ud800"])
    with pytest.raises(InputError, match="the prompt holds a lone surrogate"):
        processor.encode("\udfff", ["x"])


def test_the_separator_takes_the_first_free_id(processor):
    assert processor.tokenizer.full.token_to_id(SEPARATOR) is None
    assert processor.tokenizer.separator_id == len(processor.tokenizer)


def test_a_tokenizer_that_lacks_a_token_is_refused(tiny_folder, tmp_path):
    text = (tiny_folder / "tokenizer.json").read_text().replace("<im_patch>", "<im_batch>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="lacks the token <im_patch>"):
        Processor(Tokenizer(tmp_path / "tokenizer.json"), None, Markup(), 1)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_an_image_and_a_video_exclude_each_other(processor):
    picture = Image.new("RGB", (9, 9))
    with pytest.raises(InputError, match="images or a video, not both"):
        processor.encode("?", ["x"], image=picture, video=[(0.0, picture)])
    with pytest.raises(InputError, match="open already"):
        processor.encode("?", ["x"], image=picture, pictures=processor.open_pictures(picture))
    for nothing in ({"image": []}, {"video": []}):
        with pytest.raises(InputError, match="empty|no frames"):
            processor.encode("?", ["x"], **nothing)
