"""Settings files of others: a key that is known is computed, checked or refused; one that is not must say nothing.

pytest tests/test_settings.py
"""

import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import edit
from hypothesis import given
from hypothesis import strategies as st

from yojo.checkpoint import show
from yojo.cli import WEIGHTS
from yojo.core.config import Config, ImageConfig, Markup
from yojo.core.lora import LoraConfig
from yojo.core.reward import RewardModel
from yojo.files import InputError, write_json
from yojo.settings import read_adapter_config, read_config, read_image_config, read_markup
from yojo.weights import load_backbone, save_backbone

DATA = Path(__file__).parent / "data"
PEFT = json.loads((WEIGHTS / "tiny-rm/adapter_config.json").read_text())
CONFIG = json.loads((WEIGHTS / "tiny/config.json").read_text())
PREPROCESSOR = json.loads((WEIGHTS / "tiny/preprocessor_config.json").read_text())


def adapter(folder, **change):
    write_json(folder / "adapter_config.json", PEFT | change)
    return read_adapter_config(folder)


def config(folder, part=None, **change):
    raw = json.loads(json.dumps(CONFIG))
    (raw if part is None else raw[part]).update(change)
    write_json(folder / "config.json", raw)
    return read_config(folder)


# --------------------------------------------------------------------------------------------------- what others write


def test_what_peft_saves_by_default_loads(tmp_path):
    peft = pytest.importorskip("peft")
    for start in (True, False, "gaussian"):
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["ff_out"], init_lora_weights=start).save_pretrained(tmp_path)
        assert read_adapter_config(tmp_path) == LoraConfig(3, 6.0, 0.0, ("ff_out",))


def test_what_transformers_saves_by_default_loads(tmp_path):
    from transformers import Molmo2Config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Molmo2Config(eos_token_id=[7, 8], pad_token_id=9)
        theirs.to_json_file(tmp_path / "config.json", use_diff=False)
    whole = read_config(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == whole and whole.text.hidden_size == theirs.text_config.hidden_size
    assert whole.eos_ids == (7, 8) and whole.pad_id == 9


def test_the_released_settings_are_the_defaults():
    assert read_config(DATA) == Config() and read_image_config(DATA) == ImageConfig()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": None},
        {"use_dora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["x"]},
        {"rank_pattern": {"ff_out": 8}},
        {"megatron_config": {"x": 1}},
        {"a_method_of_next_year": "on"},
    ],
    ids=str,
)
def test_an_adapter_that_computes_something_else_is_refused_by_name(tmp_path, change):
    (key,) = change
    with pytest.raises(InputError, match=f"adapter_config.json: {key} = .* is not supported"):
        adapter(tmp_path, **change)


@pytest.mark.parametrize(
    "part, change",
    [
        ("text_config", {"sliding_window": 4096}),
        ("text_config", {"use_sliding_window": True}),
        ("text_config", {"partial_rotary_factor": 0.5}),
        ("text_config", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("text_config", {"layer_types": ["sliding_attention"] * 4}),
        ("text_config", {"qkv_bias": True}),
        ("text_config", {"attention_bias": True}),
        ("text_config", {"tie_word_embeddings": True}),
        ("text_config", {"attention_dropout": 0.1}),
        ("text_config", {"num_experts": 8}),
        ("vit_config", {"num_key_value_heads": 2}),
        ("vit_config", {"image_default_input_size": [378, 378]}),
        ("vit_config", {"hidden_act": "relu"}),
        ("adapter_config", {"pooling_attention_mask": False}),
        ("adapter_config", {"mlp_bias": True}),
        (None, {"tie_word_embeddings": True}),
        (None, {"quantization_config": {"bits": 4}}),
    ],
    ids=str,
)
def test_a_network_that_is_not_this_one_is_refused_by_name(tmp_path, part, change):
    (key,) = change
    with pytest.raises(InputError, match=f"{key} = .* is not supported"):
        config(tmp_path, part, **change)


@pytest.mark.parametrize(
    "rope, why",
    [
        ({"rope_theta": 10_000.0, "rope_type": "yarn"}, "rope_type = 'yarn' is not supported"),
        ({"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 is not supported"),
        ({"rope_theta": 10_000.0, "factor": 4.0}, "factor = 4.0 is not supported"),
        ({"rope_theta": 5.0}, "text_config says both 10000.0 and 5.0 for rope_theta"),
        (["yarn"], "rope_parameters must be an object"),
    ],
)
def test_positions_are_turned_in_one_way(tmp_path, rope, why):
    with pytest.raises(InputError, match=why):
        config(tmp_path, "text_config", rope_parameters=rope)


def test_a_config_that_claims_a_huge_network_takes_no_memory(tmp_path):
    assert config(tmp_path, "text_config", num_hidden_layers=10**17).text.num_hidden_layers == 10**17
    assert config(tmp_path, "text_config", layer_types=["full_attention"] * 4) == config(tmp_path)


def test_both_dialects_in_one_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="both vit_config and vision_config"):
        config(tmp_path, vision_config=CONFIG["vit_config"])
    with pytest.raises(InputError, match="says both 14 and 16 for image_patch_size or patch_size"):
        config(tmp_path, "vit_config", patch_size=16)


SILENT = st.sampled_from([None, False, 0, 0.0, "", [], {}])
SPEAKING = st.sampled_from([True, 1, 0.5, "on", [0], {"a": None}, -1, [None]])
KEYS = st.text(st.characters(codec="utf-8"), max_size=12).map("of_others_{}".format)
PARTS = st.sampled_from([None, "text_config", "vit_config", "adapter_config"])


@given(st.dictionaries(KEYS, SILENT, max_size=4), PARTS)
def test_property_unknown_keys_that_say_nothing_change_nothing(tmp_path_factory, change, part):
    folder = tmp_path_factory.mktemp("silent", numbered=True)
    shutil.copyfile(WEIGHTS / "tiny/generation_config.json", folder / "generation_config.json")
    assert config(folder, part, **change) == read_config(WEIGHTS / "tiny")
    assert adapter(folder, **change) == read_adapter_config(WEIGHTS / "tiny-rm")


@given(KEYS, SPEAKING, PARTS)
def test_property_unknown_keys_that_say_something_are_refused(tmp_path_factory, key, value, part):
    folder = tmp_path_factory.mktemp("speaking", numbered=True)
    for read in (lambda: config(folder, part, **{key: value}), lambda: adapter(folder, **{key: value})):
        with pytest.raises(InputError, match="is not supported: nothing here computes it"):
            read()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_property_a_known_key_of_any_value_is_read_or_refused(tmp_path_factory, data):
    """No value of any key ends in anything but a config or one line."""
    folder = tmp_path_factory.mktemp("known", numbered=True)
    part = data.draw(PARTS)
    key = data.draw(st.sampled_from(sorted(CONFIG if part is None else CONFIG[part])))
    for read in (
        lambda: config(folder, part, **{key: data.draw(JSON)}),
        lambda: adapter(folder, **{data.draw(st.sampled_from(sorted(PEFT))): data.draw(JSON)}),
        lambda: preprocessor(folder, **{data.draw(st.sampled_from(sorted(PREPROCESSOR))): data.draw(JSON)}),
    ):
        try:
            read()
        except InputError as error:
            assert str(folder) in str(error)


def test_a_reward_model_that_reads_otherwise_is_refused_by_name(tmp_path):
    folder = shutil.copytree(WEIGHTS / "tiny-rm", tmp_path / "rm")
    edit(folder / "reward_model_config.json", lambda raw: raw.update(scale=2.0))
    with pytest.raises(InputError, match="reward_model_config.json: scale = 2.0 is not supported"):
        RewardModel.load(folder, WEIGHTS / "tiny")
    released = {"value_head_type": "mlp", "value_head_activation": "silu", "resp_repr_mode": "last"}
    write_json(folder / "reward_model_config.json", released | {"value_head_hidden_dim": 8, "value_head_layers": 3})
    with pytest.raises(InputError, match="value_head_layers = 3 is not supported"):
        RewardModel.load(folder, WEIGHTS / "tiny")


# ---------------------------------------------------------------------------------------------------------- end tokens


def test_a_checkpoint_with_two_end_tokens_scores_and_keeps_them(tmp_path):
    folder = shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny")
    edit(folder / "generation_config.json", lambda raw: raw.update(eos_token_id=[raw["eos_token_id"], 3]))
    first = read_config(WEIGHTS / "tiny").eos_ids[0]
    model = load_backbone(folder)
    assert model.config.eos_ids == (first, 3)
    save_backbone(model, tmp_path / "again", companions=folder)
    assert read_config(tmp_path / "again").eos_ids == (first, 3)
    edit(folder / "generation_config.json", lambda raw: [raw.pop(key) for key in list(raw)])
    edit(folder / "config.json", lambda raw: raw["text_config"].update(eos_token_id=3))
    assert read_config(folder).eos_ids == (3,), "where the file beside the config says nothing"
    ours, asked = RewardModel.load(WEIGHTS / "tiny-rm", folder), ("Describe the star.", ["a star", "a red star"])
    assert ours.score(*asked) == RewardModel.load(WEIGHTS / "tiny-rm").score(*asked)


# ----------------------------------------------------------------------------------------------------------- processor


def preprocessor(folder, **change):
    write_json(folder / "preprocessor_config.json", PREPROCESSOR | change)
    return read_image_config(folder)


def test_transformers_5_keeps_the_processors_in_one_file(tmp_path):
    video = {"pooling_size": [2, 2], "num_frames": 8, "size": PREPROCESSOR["size"], "video_processor_type": "x"}
    whole = asdict(Markup()) | {"image_processor": PREPROCESSOR | {"do_normalize": True}, "video_processor": video}
    write_json(tmp_path / "processor_config.json", whole | {"processor_class": "Molmo2Processor"})
    c = read_image_config(tmp_path)
    assert (c.size, c.margins, c.video_pooling) == (84, (1, 1), (2, 2)) and read_markup(tmp_path) == Markup()
    assert preprocessor(tmp_path) == c, "twice the same, with other words that change nothing"
    with pytest.raises(InputError, match="preprocessor_config.json and .*: image_processor differ: keep one"):
        preprocessor(tmp_path, max_crops=3)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"do_normalize": False}, "do_normalize = False is not supported, only True"),
        ({"do_rescale": False}, "do_rescale = False is not supported"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1.0 is not supported"),
        ({"resample": 3}, "resample = 3 is not supported, only 2"),
        ({"crop_size": 70}, "crop_size = 70 is not supported"),
        ({"size": {"height": 84, "width": 70}}, "views must be square"),
        ({"size": {"shortest_edge": 84}}, "views must be square"),
        ({"image_std": [0.5, 0.0, 0.5]}, "cannot be cut so"),
        ({"overlap_margins": [3, 3]}, "cannot be cut so"),
        ({"pooling_size": [2]}, "cannot be cut so"),
        ({"patch_size": 13}, "cannot be cut so"),
        ({"image_mean": [0.5, "x", 0.5]}, "image_mean must be like"),
    ],
    ids=str,
)
def test_pictures_that_are_prepared_otherwise_are_refused(tmp_path, change, why):
    with pytest.raises(InputError, match=why):
        preprocessor(tmp_path, **change)


def test_frames_that_are_prepared_otherwise_than_images_are_refused(tmp_path):
    write_json(tmp_path / "video_preprocessor_config.json", {"pooling_size": [3, 3], "image_mean": [0.4, 0.4, 0.4]})
    with pytest.raises(InputError, match="video_preprocessor_config.json: image_mean = .* only"):
        preprocessor(tmp_path)


def test_flags_are_true_or_false(tmp_path):
    """transformers writes null for "as in the crops", which is not the default of the release."""
    for theirs in (True, False):
        write_json(
            tmp_path / "processor_config.json",
            {"image_use_col_tokens": theirs, "use_single_crop_col_tokens": None},
        )
        assert read_markup(tmp_path).use_single_crop_col_tokens is theirs
    write_json(tmp_path / "processor_config.json", {"video_use_col_tokens": "yes"})
    with pytest.raises(InputError, match="video_use_col_tokens must be like True, got 'yes'"):
        read_markup(tmp_path)


def test_picture_tokens_of_the_config_are_the_tokenizers(tmp_path):
    folder = shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny")
    edit(folder / "config.json", lambda raw: raw.update(image_start_token_id=7))
    for read in (lambda: show(folder), lambda: RewardModel.load(WEIGHTS / "tiny-rm", folder)):
        with pytest.raises(InputError, match="image_start_token_id is 7, but the tokenizer's .* say 512"):
            read()
    edit(folder / "config.json", lambda raw: raw.update(image_start_token_id=512, use_frame_special_tokens=True))
    with pytest.raises(InputError, match="use_frame_special_tokens is True, but"):
        show(folder)


def test_transformers_finds_the_picture_tokens_in_our_config():
    from transformers import Molmo2Config

    theirs = Molmo2Config.from_pretrained(WEIGHTS / "tiny")
    names = ("image_start_token_id", "image_end_token_id", "low_res_image_start_token_id", "frame_end_token_id")
    assert {name: getattr(theirs, name) for name in names} == {name: CONFIG[name] for name in names}


def test_what_a_video_is_pooled_by_is_saved_with_the_checkpoint(tmp_path):
    folder = shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny")
    write_json(folder / "video_preprocessor_config.json", {"pooling_size": [2, 2]})
    save_backbone(load_backbone(folder), tmp_path / "again", companions=folder)
    assert read_image_config(tmp_path / "again").video_pooling == (2, 2)
