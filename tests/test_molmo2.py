"""The hand-written network computes what transformers' Molmo2 computes.

    pytest tests/test_molmo2.py

Random tiny networks are written by one side and read by the other, then compared: hidden states after the final norm
and logits to 2e-5 of their largest value in float32, greedy samples id by id. (transformers computes norms and rotary
angles in float32 whatever the dtype, so a tighter bound in float64 would measure transformers.)
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

from yojo.cli import WEIGHTS
from yojo.core.config import ConnectorConfig, ImageConfig, TextConfig, VisionConfig
from yojo.core.generate import Cache, generate
from yojo.core.image import frames_to_patches, images_to_patches
from yojo.core.mask import AttentionMask
from yojo.settings import read_config
from yojo.weights import load_backbone, save_backbone

PATCH, START, END, COL, LOW = 407, 401, 402, 403, 404
PICTURES = ImageConfig(size=84, margins=(1, 1), max_crops=4)
# Decoder and vision tower, as differences from `their_config`'s defaults.
SIZES = {
    "gqa": {},
    "mha": {"text": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}},
    "one-kv": {"text": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "rope_theta": 5e6}},
    "deep-vision": {"vision": {"num_hidden_layers": 5, "hidden_size": 32, "head_dim": 16}, "vit_layers": (4, 1)},
    "one-layer-read": {"vision": {"num_attention_heads": 3, "head_dim": 8}, "vit_layers": (2,)},
}


def their_config(text=None, vision=None, vit_layers=(2, 0)):
    base = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    base |= dict(intermediate_size=48, vocab_size=400, additional_vocab_size=24, max_position_embeddings=4096)
    v = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=12)
    v |= dict(intermediate_size=40, patch_size=14, image_size=[84, 84], num_position_embeddings=36) | (vision or {})
    v["num_key_value_heads"] = v["num_attention_heads"]
    a = dict(
        hidden_size=v["hidden_size"], num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=24
    )
    a |= dict(text_hidden_size=32, vision_feature_layer=list(vit_layers))
    text = base | (text or {})
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 10000.0)}
    ids = dict(image_patch_id=PATCH, image_start_token_id=START, image_end_token_id=END)
    ids |= dict(low_res_image_start_token_id=LOW, frame_start_token_id=405, frame_end_token_id=406)
    return Molmo2Config(text_config=text, vision_config=v, adapter_config=a, **ids, bos_token_id=1, eos_token_id=399)


@pytest.fixture
def theirs(tmp_path):
    def make(seed=0, **kwargs):
        torch.manual_seed(seed)
        model = Molmo2ForConditionalGeneration(their_config(**kwargs)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
        model.save_pretrained(tmp_path / "theirs")
        return model

    return make


def image_ids(grids, rng):
    """Token ids of images or frames as the processor lays them out, with some text round them."""
    ids = []
    for grid in grids:
        views = [(LOW, *grid[:2], False), (START, *grid[2:], True)] if len(grid) == 4 else [(START, *grid, False)]
        for start, rows, columns, col in views:
            ids += [start, *(rows * ([PATCH] * columns + [COL] * col)), END]
        ids += torch.randint(0, 399, (2,), generator=rng).tolist()
    return ids + torch.randint(0, 399, (9,), generator=rng).tolist()


def scene(kind, seed=0):
    """(ids [1, T], Pictures or None)"""
    rng = torch.Generator().manual_seed(seed)

    def noise(w, h):
        pixels = torch.randint(0, 256, (h, w, 3), generator=rng, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    if kind == "text":
        return torch.randint(0, 399, (1, 17), generator=rng), None
    if kind == "video":
        seen = frames_to_patches([noise(50, 40) for _ in range(3)], PICTURES)
    else:
        seen = images_to_patches([noise(130, 70), noise(60, 90)][: 2 if kind == "images" else 1], PICTURES)
    return torch.tensor([image_ids(seen.grids, rng)]), seen


def flags(ids):
    return (ids >= 401) & (ids <= 407)


def ask_theirs(model, ids, seen, **more):
    inputs = dict(input_ids=ids, mm_token_type_ids=flags(ids).long())
    if seen is not None:
        if len(seen.grids[0]) == 4:
            inputs |= dict(
                pixel_values=seen.patches, image_token_pooling=seen.pooling, image_grids=torch.tensor(seen.grids)
            )
        else:
            grid = torch.tensor([[len(seen.grids), *seen.grids[0]]])
            inputs |= dict(pixel_values_videos=seen.patches, video_token_pooling=seen.pooling, video_grids=grid)
    return inputs | more


def our_mask(ids):
    return AttentionMask(torch.zeros_like(ids), torch.full_like(ids, -1), flags(ids), "joint")


def assert_close(ours, reference, relative=2e-5):
    assert (ours - reference).abs().max() <= relative * reference.abs().max()


@pytest.mark.parametrize(
    "shape, kind, dialect",
    [
        ("gqa", "image", "new"),
        ("gqa", "images", "released"),
        ("mha", "video", "new"),
        ("mha", "text", "released"),
        ("one-kv", "images", "new"),
        ("one-kv", "image", "released"),
        ("deep-vision", "video", "released"),
        ("one-layer-read", "images", "new"),
    ],
)
@torch.no_grad()
def test_hidden_states_logits_and_greedy_samples(theirs, tmp_path, shape, kind, dialect):
    model = theirs(seed=len(kind), **SIZES[shape])
    if dialect == "released":
        to_released_dialect(tmp_path / "theirs/config.json")
    ours = load_backbone(tmp_path / "theirs")
    ids, seen = scene(kind)
    out = model(**ask_theirs(model, ids, seen), output_hidden_states=True)
    features = None if seen is None else ours.encode_images(seen)
    hidden = ours(ids, features, our_mask(ids))
    assert_close(hidden, out.hidden_states[-1])
    assert_close(ours.logits(hidden), out.logits)
    if seen is None:  # a mask without pictures is the causal default
        assert_close(ours(ids), hidden, 1e-6)
    spoken = model.generate(**ask_theirs(model, ids, seen), max_new_tokens=12, do_sample=False, pad_token_id=0)
    greedy = generate(ours, ids, features, our_mask(ids), max_new_tokens=12, temperature=0)
    assert greedy.tolist() == spoken[:, ids.shape[1] :].tolist()


@torch.no_grad()
def test_padded_rows_of_unequal_lengths(theirs, tmp_path):
    model, ours = theirs(), load_backbone(tmp_path / "theirs")
    rows = [torch.randint(0, 399, (n,)) for n in (5, 11, 8)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(11) < torch.tensor([[5], [11], [8]])
    expected = model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True).hidden_states[-1]
    mask = AttentionMask(real.long() - 1, torch.full_like(ids, -1), torch.zeros_like(real), "joint")
    assert_close(ours(ids, mask=mask)[real], expected[real])


def to_released_dialect(path):
    """Rewrite a config of transformers 5 in the words of the released files, which declare two vision layers more than
    are stored and count those that are read from the end."""
    raw = json.loads(path.read_text())
    text, vision, adapter = raw["text_config"], raw.pop("vision_config"), raw["adapter_config"]
    text["layer_norm_eps"], text["rope_theta"] = text.pop("rms_norm_eps"), text.pop("rope_parameters")["rope_theta"]
    vision["image_default_input_size"], vision["image_patch_size"] = vision.pop("image_size"), vision.pop("patch_size")
    vision["image_num_pos"] = vision.pop("num_position_embeddings")
    vision["num_hidden_layers"] += 2
    read = adapter.pop("vision_feature_layer")
    adapter["vit_layers"] = [layer - vision["num_hidden_layers"] for layer in read]
    path.write_text(json.dumps({**raw, "vit_config": vision}))


def test_both_dialects_of_the_config_mean_the_same(theirs, tmp_path):
    theirs()
    new = read_config(tmp_path / "theirs")
    to_released_dialect(tmp_path / "theirs/config.json")
    old = read_config(tmp_path / "theirs")
    assert old.connector.vit_layers == (-3, -5) and new.connector.vit_layers == (2, 0)
    assert old.vision_layers == new.vision_layers and old.text == new.text
    assert old.vision_depth == new.vision_depth == 3 < old.vision.num_hidden_layers


@pytest.mark.parametrize("declared, vit_layers, depth", [(27, (-3, -9), 25), (25, (24, 18), 25), (6, (1,), 2)])
def test_vision_depth_is_what_is_read(declared, vit_layers, depth):
    config = replace(
        TINY, vision=VisionConfig(num_hidden_layers=declared), connector=ConnectorConfig(vit_layers=vit_layers)
    )
    assert config.vision_depth == depth


@torch.no_grad()
def test_stored_layers_that_nobody_reads_are_left_out(theirs, tmp_path):
    model = theirs(vit_layers=(1, 0))
    ours = load_backbone(tmp_path / "theirs")
    assert len(ours.model.vision_backbone.image_vit.transformer.resblocks) == 2
    ids, seen = scene("image")
    hidden = ours(ids, ours.encode_images(seen), our_mask(ids))
    assert_close(hidden, model(**ask_theirs(model, ids, seen), output_hidden_states=True).hidden_states[-1])


@pytest.mark.parametrize("row", [1, 200, 423])
@torch.no_grad()
def test_the_embedding_may_be_split_at_any_row(theirs, tmp_path, row):
    theirs()
    whole = load_backbone(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    names = ["model.transformer.wte.embedding", "model.transformer.wte.new_embedding"]
    table = torch.cat([tensors[n] for n in names])
    save_file(
        tensors | dict(zip(names, (table[:row].clone(), table[row:].clone()), strict=True)), path, {"format": "pt"}
    )
    assert torch.equal(
        load_backbone(tmp_path / "theirs").model.transformer.wte.embedding, whole.model.transformer.wte.embedding
    )


@torch.no_grad()
def test_what_is_saved_here_loads_there(tmp_path):
    ours = random_model(dtype=torch.float32)
    save_backbone(ours, tmp_path / "ours", companions=WEIGHTS / "tiny")
    model, report = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, seen = scene("images")
    out = model.eval()(**ask_theirs(model, ids, seen), output_hidden_states=True)
    assert_close(ours(ids, ours.encode_images(seen), our_mask(ids)), out.hidden_states[-1])


@torch.no_grad()
def test_only_the_rows_asked_for_are_read():
    model = random_model()
    ids = torch.randint(0, 399, (2, 7))
    hidden = model(ids)
    assert torch.allclose(model(ids, keep=torch.tensor([[1, 3], [0, 6]])), hidden[[1, 0], [3, 6]], atol=1e-12)


def test_norms_and_angles_run_in_at_least_float32():
    model = random_model(dtype=torch.bfloat16)
    norm = model.model.transformer.ln_f
    x = torch.randn(3, 32, dtype=torch.bfloat16) * 100
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), norm.weight * exact.float().to(torch.bfloat16))
    assert norm(x.double()).dtype == torch.float64


def test_features_must_fit_their_tokens():
    model = random_model()
    with pytest.raises(ValueError, match="2 <im_patch> tokens but 0 picture features"):
        model(torch.tensor([[1, PATCH, PATCH]]))
    cache = Cache(TINY, 9)
    model(torch.tensor([[1]]), cache=cache)
    with pytest.raises(ValueError, match="2 <im_patch> tokens but 0 picture features"):
        model(torch.tensor([[PATCH, PATCH]]), cache=cache)


def test_defaults_are_the_released_4b(tmp_path):
    from test_image import DATA

    config = read_config(DATA)
    assert config.text == TextConfig() and config.vision == VisionConfig() and config.connector == ConnectorConfig()
    assert (config.image_patch_id, config.eos_ids, config.pad_id) == (151938, (151645,), 151643)
