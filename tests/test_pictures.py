"""What a record shows is one thing, `Pictures`, however much is known of it: sizes, patches, features, or nothing.

    pytest tests/test_pictures.py

A row is as long with pictures that nobody has opened as with opened ones. Features that were kept give the scores that
patches give, and are not used where the tower learns. Controls are records like any other.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_single_pass import make_model, noise

from yojo.core.config import ImageConfig, Markup
from yojo.core.data import Record, collate, encode, open_pictures, read_records
from yojo.core.held_out import Blanked, controls, score_orders, score_records, swapped
from yojo.core.image import Pictures, choose_tiling, images_to_patches
from yojo.core.prompt import image_tokens
from yojo.files import InputError
from yojo.tiny.experiment import with_features

SMALL = ImageConfig(size=56, margins=(1, 1), max_crops=4)


@pytest.fixture(scope="module")
def rm(tiny_folder):
    return make_model(tiny_folder)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four from files: two with pictures of unlike sizes, one with two pictures, one without any; and a video."""
    folder = tmp_path_factory.mktemp("records")
    for i, size in enumerate([(84, 84), (300, 70), (50, 120)]):
        noise(i, *size).save(folder / f"{i}.png")
    (folder / "frames").mkdir()
    for i in range(3):
        noise(9 + i, 40, 60).save(folder / f"frames/{i}.png")
    shown = [{"image": "0.png"}, {"image": "1.png"}, {"images": ["2.png", "0.png"]}, {}, {"video": "frames"}]
    common = {"prompt": "What is it?", "responses": ["a star", "a small star", "nothing"], "rankings": [1, 2, 3]}
    (folder / "r.jsonl").write_text("\n".join(json.dumps(common | more) for more in shown))
    return read_records(folder / "r.jsonl")


def scores(rm, records):
    return [rm.score_encoded([encode(record, rm.processor)])[0] for record in records]


# ---------------------------------------------------------------------------------------------------- sizes and pixels


@pytest.mark.parametrize("size", [(84, 84), (70, 300), (1300, 1000), (112, 2000), (2000, 100)])
@pytest.mark.parametrize("config", [ImageConfig(), SMALL], ids=["release", "small"])
def test_a_size_is_enough_to_know_views_and_windows(size, config):
    opened, measured = (images_to_patches([x], config) for x in (Image.new("RGB", size), size))
    assert measured.patches.is_meta and measured.patches.shape == opened.patches.shape
    assert torch.equal(measured.pooling, opened.pooling) and measured.grids == opened.grids
    rows, columns = choose_tiling(*size[::-1], config)
    assert len(measured.patches) == 1 + rows * columns


@pytest.mark.parametrize("max_crops", [None, 1, 3])
def test_a_record_is_as_long_before_its_pictures_are_opened(rm, records, max_crops, monkeypatch):
    """Nothing is opened for it."""
    records = [replace(record, max_crops=max_crops) for record in records]
    opened = [encode(record, rm.processor) for record in records]
    monkeypatch.setattr("yojo.core.prompt.open_picture", None)
    for record, row in zip(records, opened, strict=True):
        measured = encode(record, rm.processor, pixels=False)
        for name in ("ids", "response", "image"):
            assert torch.equal(getattr(measured, name), getattr(row, name))
        assert measured.spans == row.spans and measured.pictures.ids == row.pictures.ids
        assert measured.pictures.patches.shape == row.pictures.patches.shape


def test_what_stands_upright_is_measured_upright(rm, tmp_path):
    """A photograph lying on its side, with a note that says so."""
    exif = Image.Exif()
    exif[274] = 6
    noise(1, 300, 70).save(tmp_path / "p.jpg", exif=exif)
    for image in (tmp_path / "p.jpg", Image.open(tmp_path / "p.jpg")):
        opened, measured = (rm.processor.open_pictures(image, pixels=pixels) for pixels in (True, False))
        assert opened.grids == measured.grids


def test_no_picture_is_a_record_with_nothing_in_it(rm, records):
    row = encode(records[3], rm.processor)
    nothing = row.pictures
    assert (len(nothing.patches), len(nothing.pooling), nothing.ids, nothing.grids) == (0, 0, [], [])
    assert rm.backbone.encode_images(nothing).shape == (0, rm.backbone.config.text.hidden_size)
    assert len(rm.backbone.keep_features(nothing).features) == 0
    both = collate([row, encode(records[0], rm.processor)], "joint")
    assert len(both.pictures.patches) == 2


MARKUPS = {  # flags: tokens of an overview of 2 x 3 windows and of a grid of 4 x 5
    (): ("low_res_im_start", 2 * 3, 4 * (5 + 1)),
    ("image_use_col_tokens",): ("low_res_im_start", 2 * 3, 4 * 5),
    ("use_single_crop_col_tokens",): ("low_res_im_start", 2 * (3 + 1), 4 * (5 + 1)),
    ("use_single_crop_start_token",): ("im_start", 2 * 3, 4 * (5 + 1)),
    ("image_use_col_tokens", "use_single_crop_col_tokens"): ("low_res_im_start", 2 * 3, 4 * 5),
}


@pytest.mark.parametrize("turned", MARKUPS, ids=" ".join)
def test_the_tokens_of_a_picture_under_every_flag(turned):
    """Each flag turned the other way than in the release."""
    markup = replace(Markup(), **{name: not getattr(Markup(), name) for name in turned})
    start, low, high = MARKUPS[turned]
    names = image_tokens((2, 3, 4, 5), markup)
    assert names[0] == f"<{start}>" and names[low + 1 : low + 3] == ["<im_end>", "<im_start>"]
    assert len(names) == 4 + low + high and names[-1] == "<im_end>"
    assert names.count("<im_patch>") == 2 * 3 + 4 * 5


# ------------------------------------------------------------------------------------------------------------ features


def kept(rm, record):
    return replace(record, pictures=rm.backbone.keep_features(open_pictures(record, rm.processor)))


@pytest.mark.parametrize("keep", [kept, lambda rm, record: with_features([record], rm)[0]], ids=["one", "many"])
def test_kept_features_give_the_same_scores_and_the_tower_does_not_run_again(rm, records, keep, monkeypatch):
    expected, keeping = scores(rm, records), [keep(rm, record) for record in records]
    monkeypatch.setattr(type(rm.backbone.model.vision_backbone), "forward", None)
    for ours, theirs in zip(scores(rm, keeping), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-10)
    assert not any(len(record.pictures.patches) for record in keeping), "patches are let go"


def test_records_that_show_the_same_share_its_features(rm, records):
    twice = with_features([*records, *records], rm, size=2)
    assert all(a.pictures is b.pictures for a, b in zip(twice[:5], twice[5:], strict=True))
    assert scores(rm, twice[:5]) == [pytest.approx(row, abs=1e-10) for row in scores(rm, records)]


def test_where_the_tower_learns_nothing_is_kept(rm, records):
    """Features are of the weights that made them. They are not kept; kept ones are made anew, so that the gradient
    reaches the tower; and where there is nothing to make them from, that is said."""
    before = kept(rm, records[0])
    weight = rm.backbone.model.vision_backbone.image_vit.patch_embedding.weight
    pictures = open_pictures(records[0], rm.processor)
    stale = replace(pictures, features=torch.zeros(len(pictures.pooling), rm.backbone.config.text.hidden_size).double())
    try:
        weight.requires_grad_(True)
        assert rm.backbone.keep_features(pictures) is pictures and with_features(records, rm) == records
        row = encode(replace(records[0], pictures=stale), rm.processor)
        rm(collate([row], "joint")).sum().backward()
        assert weight.grad.any()
        with pytest.raises(ValueError, match="only features were kept, which no longer hold"):
            scores(rm, [before])
    finally:
        weight.requires_grad_(False).grad = None
    assert scores(rm, [before])[0] == pytest.approx(scores(rm, records[:1])[0], abs=1e-10)


def test_a_batch_has_features_of_all_its_pictures_or_of_none(rm, records):
    rows = [encode(record, rm.processor) for record in (records[0], kept(rm, records[1]))]
    with pytest.raises(ValueError, match="some pictures of a batch have features and others have none"):
        collate(rows, "joint")


# ------------------------------------------------------------------------------------------------------------ controls


def test_a_blanked_record_shows_grey_and_is_as_long(rm, records):
    for record, grey in zip(records, Blanked(records), strict=True):
        shown, blank = (encode(r, rm.processor) for r in (record, grey))
        assert torch.equal(shown.ids, blank.ids) and (grey.prompt, grey.responses) == (record.prompt, record.responses)
        assert len(blank.pictures.patches) == len(shown.pictures.patches)
        assert blank.pictures.patches.unique().numel() <= 1
    assert Blanked([kept(rm, records[0])])[0].pictures is None, "what was kept is of the own picture"


def test_a_swapped_record_shows_what_the_next_one_shows_if_that_is_another(records):
    a, b, two, none, video = records
    assert [(r.images, r.video) for r in swapped([a, a, b])] == [(b.images, None), (b.images, None), (a.images, None)]
    assert [r.images for r in swapped([a, two])] == [two.images, a.images]
    assert [(r.images, r.video) for r in swapped([none, video])] == [([], video.video), ([], None)]
    with pytest.raises(InputError, match="no other record has other pictures"):
        swapped([a, a])


def test_records_that_bring_open_pictures_only_are_told_apart_by_them_and_not_blanked(rm, records):
    a, b = (Record("?", ["x"], pictures=kept(rm, record).pictures) for record in records[:2])
    assert swapped([a, b])[0].pictures is b.pictures and list(controls([a, b])) == ["swapped"]
    with pytest.raises(InputError, match="open already"):
        Blanked([a])[0]


def test_blanked_records_can_be_scored_twice(rm, records):
    grey = Blanked(records[:2])
    assert score_records(rm, grey, 0) == score_records(rm, grey, 0) != []


def test_controls_are_those_that_differ_from_the_records(records):
    a, b, _, none, video = records
    assert [list(controls(some)) for some in ([none, none], [a, a], [a, b], [none, video])] == [
        [],
        ["blank"],
        ["blank", "swapped"],
        ["blank", "swapped"],
    ]


def test_a_swap_brings_everything_that_is_known_of_the_pictures(rm, records):
    a, b = kept(rm, records[0]), replace(kept(rm, records[1]), max_crops=2)
    (swap, _) = swapped([a, b])
    assert swap.pictures is b.pictures and swap.max_crops == 2 and swap.where == a.where


def test_scores_come_back_in_the_records_own_order(rm, records):
    """Isolated scores know no order, so whatever order they are shown in they must be the record's own."""
    own = [rm.score(r.prompt, r.responses, r.images or None, r.video, "isolated") for r in records]
    for ours, theirs in zip(score_records(rm, records, 0, "isolated"), own, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-10)
    joint = next(score_orders(rm, [(records[0], (2, 0, 1))], "joint"))
    shown = [records[0].responses[i] for i in (2, 0, 1)]
    theirs = rm.score(records[0].prompt, shown, records[0].images, mode="joint")
    assert [joint[i] for i in (2, 0, 1)] == pytest.approx(theirs, abs=1e-10)


def test_an_error_names_the_record(rm, records):
    for record, why in (
        (replace(records[1], responses=["x"] * 65, rankings=None), "r.jsonl:2: 65 responses"),
        (replace(records[1], images=[Path("none.png")]), "r.jsonl:2: no picture at none.png"),
        (Record("?", [" "]), "^response 1 is empty"),
    ):
        with pytest.raises(InputError, match=why):
            encode(record, rm.processor)
        with pytest.raises(InputError, match=why):
            score_records(rm, [record], 0)
    for record in (replace(records[1], images=[Path("none.png")]), replace(records[4], video=Path("none"))):
        with pytest.raises(InputError, match=r"r.jsonl:\d: .*none"):
            score_records(rm, Blanked([record]), 0)


# ------------------------------------------------------------------------------------------------------------- one row


def test_a_prompt_goes_on_with_responses(rm):
    start = rm.processor.row([5, int(rm.processor.image_ids[0]), 6], Pictures())
    row = start.continued([[7, 8], [9]], separator=1)
    assert row.ids.tolist()[3:] == [7, 8, 1, 9, 1] and row.response.tolist() == [-1, -1, -1, 0, 0, 0, 1, 1]
    assert row.image.tolist() == [False, True] + 6 * [False]
    assert row.spans == [(3, 5), (6, 7)] and row.score_positions == [4, 6]
    assert row.positions("isolated").tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    open_end = start.continued([[7, 8], [9]], separator=1, closed=False)
    assert open_end.ids.tolist() == row.ids.tolist()[:-1] and open_end.spans == row.spans
    with pytest.raises(ValueError, match="has 2 responses already"):
        row.continued([[7]])
    bare = start.continued([[7, 8], [9]])
    assert bare.ids.tolist()[3:] == [7, 8, 9] and bare.spans == [(3, 5), (5, 6)]


@given(st.integers(1, 5), st.lists(st.integers(1, 6), max_size=6), st.booleans(), st.booleans())
def test_property_positions_are_those_that_each_response_would_have_alone(rm, P, lengths, separated, closed):
    start = rm.processor.row([2] * P, Pictures())
    separator = 1 if separated else None
    pieces = [[3] * n for n in lengths]
    row = start.continued(pieces, separator, closed)
    positions = row.positions("isolated")
    assert positions[:P].tolist() == list(range(P)) and row.prompt_length == P
    for i, (piece, (first, stop)) in enumerate(zip(pieces, row.spans, strict=True)):
        alone = start.continued([piece], separator, closed or i + 1 < len(pieces))
        assert positions[row.response == i].tolist() == alone.positions("joint")[P:].tolist()
        assert row.ids[first:stop].tolist() == piece
