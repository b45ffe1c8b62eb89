"""Every closed form is equal, to the last integer, to what torch's own counter counts.

    pytest tests/test_flops.py

The networks stand on the meta device, where nothing is computed and attention falls apart into plain products, which
the counter knows. That is also why the 4B network can be counted in a second.
"""

import json

import pytest
import torch
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

from yojo import flops as flops_command
from yojo.core import flops, lora, ops
from yojo.core.config import Config, ImageConfig, Markup
from yojo.core.image import choose_tiling, images_to_patches, measure
from yojo.core.lora import LoraConfig
from yojo.core.mask import MODES
from yojo.core.molmo2 import Molmo2
from yojo.core.ops import DENSE_UP_TO
from yojo.core.reward import ValueHead

LORA, INNER = LoraConfig(r=8, alpha=8, dropout=0.0), 16
ASKS = {
    "text": flops.Ask(20, 0, (5, 9, 3)),
    "image": flops.Ask(60, 35, (8, 8, 20, 4), views=3, pooled=27),
    "video": flops.Ask(40, 30, (7, 30), views=4, pooled=16),
    "long": flops.Ask(700, 500, (90, 300, 40), views=2, pooled=500),
    **{f"N = {n}": flops.Ask(30, 0, (6,) * n) for n in (1, 2, 8, 16)},
}
assert sum((ASKS["long"].prompt, *ASKS["long"].responses)) > DENSE_UP_TO


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def network(config, with_adapter=False):
    with torch.device("meta"):
        model = Molmo2(config, lm_head=False).requires_grad_(False)
        head = ValueHead(config.text.hidden_size, INNER)
        if with_adapter:
            lora.add(model, "reward", LORA)
    return model, head


def run_pass(model, head, ask, mode):
    mask = ask.mask(mode)
    ids = torch.zeros_like(mask.record, device="meta")
    adapter = next(iter(lora.adapters(model)), None)
    return head(model(ids, None, mask, torch.zeros_like(ids), torch.tensor(ask.read), adapter=adapter))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ASKS)
def test_the_decoder_and_the_head(name, mode):
    model, head = network(TINY)
    expected = sum(flops.one_pass(TINY, ASKS[name], mode, INNER).values())
    assert counted(lambda: run_pass(model, head, ASKS[name], mode)) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["text", "image", "long", "N = 16"])
def test_the_decoder_at_4b(name, mode):
    model, head = network(Config())
    expected = sum(flops.one_pass(Config(), ASKS[name], mode, INNER).values())
    assert counted(lambda: run_pass(model, head, ASKS[name], mode)) == expected


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["image", "long"])
def test_the_ways_of_scoring_cost_the_same(name, mode, monkeypatch):
    """Without gradients tokens go in pieces, and attention by plain products where torch's kernel lags."""
    by_products, plain = [], ops.product_attention
    monkeypatch.setattr(ops, "product_attention", lambda *xs: by_products.append(1) or plain(*xs))
    monkeypatch.setattr(ops, "kernel_lags", lambda dtype, device: True)
    for constant, value in (("SCORES", range(10**9)), ("PIECE", 7), ("NUMBERS", 500)):
        monkeypatch.setattr(ops, constant, value)
    model, head = network(TINY)
    expected = sum(flops.one_pass(TINY, ASKS[name], mode, INNER).values())
    assert counted(lambda: run_pass(model, head, ASKS[name], mode)) == expected
    assert bool(by_products) == (name == "long")  # a short row has one mask of all pairs


@pytest.mark.parametrize("config", [TINY, Config()], ids=["tiny", "4b"])
@pytest.mark.parametrize("views, tokens, window", [(1, 9, 4), (3, 27, 4), (4, 16, 9)])
def test_tower_and_connector(config, views, tokens, window):
    model, _ = network(config)
    c = config.vision
    patches = torch.zeros(views, c.num_position_embeddings, 3 * c.patch_size**2, device="meta")
    seen = torch.zeros(views, c.num_position_embeddings, c.hidden_size * len(config.vision_layers), device="meta")
    vision = model.model.vision_backbone
    assert counted(lambda: vision.image_vit(patches)) == flops.tower(config, views)
    whole = torch.zeros(tokens, window, dtype=torch.long)  # every window full: no token is dropped
    pooled = counted(lambda: vision.image_projector(pool(vision, seen, whole)))
    assert pooled == flops.connector(config, tokens, window)


def pool(vision, seen, whole):
    """`VisionBackbone.pool` where every window is full: on the meta device nothing can be dropped."""
    patches = seen.flatten(0, 1)[whole]
    mask = torch.ones(len(whole), 1, 1, whole.shape[1], dtype=torch.bool, device="meta")
    return vision.image_pooling_2d(patches.mean(1, keepdim=True), patches, mask).squeeze(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config, name", [(TINY, "image"), (TINY, "long"), (TINY, "N = 1"), (Config(), "image")])
def test_a_training_step(config, name, mode, checkpointing):
    ask = ASKS[name]
    model, head = network(config, with_adapter=True)
    model.train().checkpointing = checkpointing
    mask, read = ask.mask(mode), len(ask.responses)
    tokens, pairs = mask.record.shape[1], flops.executed(mask, ask.read)
    expected = sum(flops.one_pass(config, ask, mode, INNER, LORA.r).values())
    expected += flops.backward(config, LORA.r, INNER, tokens, read, pairs)
    if checkpointing:
        expected += flops.recomputation(config, LORA.r, tokens, read, pairs)
        whole = flops.training_step(config, ask, mode, LORA.r, INNER)
        assert whole == expected + flops.tower(config, ask.views) + flops.connector(config, ask.pooled, 4)
    assert counted(lambda: run_pass(model, head, ask, mode).sum().backward()) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ASKS)
def test_needed_pairs_are_the_ones_of_the_mask(name, mode):
    ask = ASKS[name]
    mask = ask.mask(mode)
    pairs, last = flops.needed(ask.prompt, ask.pictures, ask.responses, mode)
    done, done_last = flops.executed(mask, ask.read)
    assert pairs == int(mask.dense.sum()) <= done
    assert last == int(mask.dense[0, [t for _, t in ask.read]].sum()) <= done_last


@pytest.mark.parametrize("size", [(84, 84), (300, 70), (1000, 1300), (2000, 112), (100, 2000)])
def test_a_picture_is_measured_without_being_opened(size):
    from PIL import Image

    for c in (ImageConfig(), ImageConfig(size=56, margins=(1, 1), max_crops=4)):
        pictures = images_to_patches([Image.new("RGB", (size[1], size[0]))], c)
        views, grid = measure(*size, c)
        assert (views, grid) == (len(pictures.patches), pictures.grids[0])
        assert views == 1 + choose_tiling(*size, c)[0] * choose_tiling(*size, c)[1]


def test_tokens_of_a_picture(tiny_folder):
    from PIL import Image

    from yojo.core.prompt import Processor

    processor = Processor.from_folder(tiny_folder, 4096)
    for markup in (Markup(), Markup(use_single_crop_col_tokens=True), Markup(image_use_col_tokens=False)):
        processor.markup = markup
        ids, pictures = processor.look(Image.new("RGB", (84, 130)))
        assert len(ids) == flops.picture_tokens(pictures.grids[0], markup)


def test_the_ratio_is_n_at_first_and_tends_to_the_prompts_share():
    """N passes over one pass, P = 600 and R = 10: 2 for two answers; for many (P + R) / R = 61."""
    ratio, config = {}, Config()
    for n in (1, 2, 64, 2000):
        ask = flops.Ask(600, 0, (10,) * n)
        ratio[n] = flops.separate(config, ask, INNER) / sum(flops.one_pass(config, ask, "isolated", INNER).values())
    assert ratio[1] == pytest.approx(1, rel=0.01) and ratio[2] == pytest.approx(2, rel=0.03)
    assert ratio[2] < ratio[64] < ratio[2000] and ratio[2000] == pytest.approx(61, rel=0.1)


def test_the_command_prints_what_is_counted(command, tmp_path):
    words = ("--image", "1024x768", "--prompt-tokens", 40, "--response-tokens", 200, "--n", 1, 4)
    status, out, err = command(flops_command, *words, "--json", tmp_path / "f.json")
    assert status == 0, err
    one, four = json.loads((tmp_path / "f.json").read_text())
    assert one["n_passes"] == one["joint"] and four["n_passes"] == 4 * one["n_passes"]
    ask = flops.Ask(1022, 982, (201,) * 4)
    assert four["joint"] == sum(flops.one_pass(Config(), ask, "joint").values())
    assert four["needed"] < four["isolated"] < four["joint"] and four["ratio"] == four["n_passes"] / four["isolated"]
    assert f"{four['needed'] / 1e12:.3f}" in out and "4.459 TFLOPs, once" in out


@pytest.mark.parametrize(
    "words, why",
    [
        (("--n", "2", "0"), "count from 1"),
        (("--prompt-tokens", "0"), "count from 1"),
        (("--image", "0x5"), "--image 0x5: give width x height"),
        (("--image", "84x84", "--shape", "tiny"), "--image goes with --shape molmo2-4b only"),
        (("--n", "190"), "190 responses of 201 after 40 prompt tokens: the model has 36864 positions"),
        (("--prompt-tokens", "1000000000"), "the model has 36864 positions"),
    ],
)
def test_bad_input_gets_one_line(command, words, why):
    status, _, err = command(flops_command, *words)
    assert status == 2 and why in err and len(err.splitlines()) == 1
