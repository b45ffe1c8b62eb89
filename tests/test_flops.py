"""Every closed form is equal, to the last integer, to what torch's own counter counts.

    pytest tests/test_flops.py

The networks stand on the meta device, where nothing is computed and attention falls apart into plain products, which
the counter knows. That is also why the 4B network can be counted in a second.
"""

import json

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from yojo import flops as flops_command
from yojo.core import flops, lora, ops
from yojo.core.config import Config
from yojo.core.data import collate
from yojo.core.lora import LoraConfig
from yojo.core.mask import MODES
from yojo.core.molmo2 import Molmo2
from yojo.core.ops import DENSE_UP_TO
from yojo.core.reward import ValueHead

LORA, INNER = LoraConfig(r=8, alpha=8, dropout=0.0), 16
LENGTHS = {  # of the prompt, the responses, the pictures; views, picture tokens
    "text": (20, (5, 9, 3)),
    "image": (60, (8, 8, 20, 4), 35, 3, 27),
    "video": (40, (7, 30), 30, 4, 16),
    "long": (700, (90, 300, 40), 500, 2, 500),
    **{f"N = {n}": (30, (6,) * n) for n in (1, 2, 8, 16)},
}
ROWS = {name: flops.row_of_lengths(*lengths) for name, lengths in LENGTHS.items()}
assert len(ROWS["long"].ids) > DENSE_UP_TO


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


def run_pass(model, head, row, mode):
    batch = collate([row], mode)
    ids = torch.zeros_like(batch.input_ids, device="meta")
    adapter = next(iter(lora.adapters(model)), None)
    return head(model(ids, None, batch.mask, torch.zeros_like(ids), batch.score_positions, adapter=adapter))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ROWS)
def test_the_decoder_and_the_head(name, mode):
    model, head = network(TINY)
    expected = sum(flops.one_pass(TINY, ROWS[name], mode, INNER).values())
    assert counted(lambda: run_pass(model, head, ROWS[name], mode)) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["text", "image", "long", "N = 16"])
def test_the_decoder_at_4b(name, mode):
    model, head = network(Config())
    expected = sum(flops.one_pass(Config(), ROWS[name], mode, INNER).values())
    assert counted(lambda: run_pass(model, head, ROWS[name], mode)) == expected


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
    expected = sum(flops.one_pass(TINY, ROWS[name], mode, INNER).values())
    assert counted(lambda: run_pass(model, head, ROWS[name], mode)) == expected
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
    row, (_, responses, *pictures) = ROWS[name], LENGTHS[name]
    model, head = network(config, with_adapter=True)
    model.train().checkpointing = checkpointing
    tokens, kept, pairs = len(row.ids), len(responses), flops.executed(row, mode)
    expected = sum(flops.one_pass(config, row, mode, INNER, LORA.r).values())
    expected += flops.backward(config, LORA.r, INNER, tokens, kept, pairs)
    if checkpointing:
        expected += flops.recomputation(config, LORA.r, tokens, kept, pairs)
        whole, (views, pooled) = flops.training_step(config, row, mode, LORA.r, INNER), pictures[1:] or (0, 0)
        assert whole == expected + flops.tower(config, views) + flops.connector(config, pooled, 4)
    assert counted(lambda: run_pass(model, head, row, mode).sum().backward()) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ROWS)
def test_needed_pairs_are_the_ones_of_the_mask(name, mode):
    row, (prompt, responses, *pictures) = ROWS[name], LENGTHS[name]
    mask = collate([row], mode).mask
    pairs, last = flops.needed(prompt, pictures[0] if pictures else 0, responses, mode)
    done, done_last = flops.executed(row, mode)
    assert pairs == int(mask.dense.sum()) <= done
    assert last == int(mask.dense[0, row.score_positions].sum()) <= done_last


def test_pictures_whose_features_were_kept_cost_nothing():
    pictures = ROWS["image"].pictures
    assert flops.images(TINY, pictures) > 0 == flops.images(TINY, pictures.keeping(torch.zeros(27, 32)))


def test_the_ratio_is_n_at_first_and_tends_to_the_prompts_share():
    """N passes over one pass, P = 600 and R = 10: 2 for two answers; for many (P + R) / R = 61."""
    ratio, config = {}, Config()
    for n in (1, 2, 64, 2000):
        row = flops.row_of_lengths(600, (10,) * n)
        ratio[n] = flops.separate(config, row, INNER) / sum(flops.one_pass(config, row, "isolated", INNER).values())
    assert ratio[1] == pytest.approx(1, rel=0.01) and ratio[2] == pytest.approx(2, rel=0.03)
    assert ratio[2] < ratio[64] < ratio[2000] and ratio[2000] == pytest.approx(61, rel=0.1)


def test_the_command_prints_what_is_counted(command, tmp_path):
    words = ("--image", "1024x768", "--prompt-tokens", 40, "--response-tokens", 200, "--n", 1, 4)
    status, out, err = command(flops_command, *words, "--json", tmp_path / "f.json")
    assert status == 0, err
    one, four = json.loads((tmp_path / "f.json").read_text())
    assert one["n_passes"] == one["joint"] and four["n_passes"] == 4 * one["n_passes"]
    row = flops.row_of_lengths(1022, (201,) * 4, 982)
    assert four["joint"] == sum(flops.one_pass(Config(), row, "joint").values())
    assert four["needed"] < four["isolated"] < four["joint"] and four["ratio"] == four["n_passes"] / four["isolated"]
    assert f"{four['needed'] / 1e12:.3f}" in out and "4.459 TFLOPs, once" in out


@pytest.mark.parametrize(
    "words, R, tokens, views, pooled",  # R: of a response with its separator; tokens of the pictures; theirs at 4B
    [
        (("--image", "1024x768", "--response-tokens", 100), 101, 982, 7, (955, 4)),
        (("--frames", 16, "--response-tokens", 50), 51, 16 * 83, 16, (1296, 9)),
    ],
)
def test_n_looks_at_the_pictures(command, tmp_path, words, R, tokens, views, pooled):
    """What scoring answer by answer costs, over one pass that looks once: by the counter, at 4B."""
    status, out, err = command(flops_command, *words, "--n", 2, 4, "--json", tmp_path / "f.json")
    assert status == 0 and "n looks" in out, err
    model, head = network(Config())
    vision, patches = model.model.vision_backbone, torch.zeros(views, 729, 588, device="meta")
    seen, whole = torch.zeros(views, 729, 2 * 1152, device="meta"), torch.zeros(pooled, dtype=torch.long)
    look = counted(lambda: (vision.image_vit(patches), vision.image_projector(pool(vision, seen, whole))))

    def passes(n):
        row = flops.row_of_lengths(tokens + 40, (R,) * n, tokens)
        return counted(lambda: run_pass(model, head, row, "joint"))

    head[0], head[2] = nn.Linear(2560, 1024, device="meta"), nn.Linear(1024, 1, device="meta")  # the command's head
    for found in json.loads((tmp_path / "f.json").read_text()):
        assert found["n_looks"] == found["n"] * (passes(1) + look) / (passes(found["n"]) + look)


@pytest.mark.parametrize(
    "words, why",
    [
        (("--n", "2", "0"), "'0' is no whole number from 1"),
        (("--prompt-tokens", "0"), "'0' is no whole number from 1"),
        (("--image", "0x5"), "--image: '0x5': give width x height"),
        (("--image", "84x84", "--size", "tiny"), "--image goes with --size molmo2-4b only"),
        (("--frames", "2", "--size", "tiny"), "--frames goes with --size molmo2-4b only"),
        (("--frames", "2", "--image", "84x84"), "--frames and --image exclude each other"),
        (("--n", "190"), "190 responses of 201 after 40 prompt tokens: the model has 36864 positions"),
        (("--prompt-tokens", "1000000000"), "the model has 36864 positions"),
    ],
)
def test_bad_input_ends_in_one_line(command, words, why):
    status, _, err = command(flops_command, *words)
    assert status == 2 and why in err.splitlines()[-1]
