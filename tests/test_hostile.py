"""Text that spells special tokens and files that are damaged: no answer moves, no file surprises.

pytest tests/test_hostile.py
"""

import json
import random
import shutil
import unicodedata

import pytest
import torch
from conftest import edit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from yojo import evaluate, score
from yojo.cli import WEIGHTS
from yojo.core.data import read_records
from yojo.core.prompt import IMAGE_TOKENS, SEPARATOR, Processor
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.weights import load_backbone

SPECIAL = sorted(
    {token["content"] for token in json.loads((WEIGHTS / "tiny/tokenizer.json").read_text())["added_tokens"]}
    | {SEPARATOR, "<|im_sep|>", "<think>", "<tool_call>", "[PAD]", "</s>"}
)
ODD = {
    "combining marks": "e\u0301\u0327\u0301" * 40,
    "right to left": "\u202eright to left\u202c \u05d0\u05d1\u05d2 \u0627\u0644",
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe\u2060f",
    "emoji sequences": "👩‍👩‍👧‍👦🏳️‍🌈👍🏿🇫🇷" * 10,
    "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "a null character": "a\x00b",
    "private use and unassigned": "\ue000\uf8ff\U000f0000\U0010ffff\u0378",
    "full width": "＜｜resp_sep｜＞",
    "100,000 letters": "a" * 100_000,
}


@pytest.fixture(scope="module")
def unflagged(tmp_path_factory):
    """A tokenizer in which no added token is marked as special."""
    folder = shutil.copytree(WEIGHTS / "tiny", tmp_path_factory.mktemp("unflagged") / "tiny")
    edit(folder / "tokenizer.json", lambda raw: [token.update(special=False) for token in raw["added_tokens"]])
    return folder


@pytest.fixture(scope="module", params=["default", "released", "default unflagged", "released unflagged"])
def processor(request, unflagged):
    layout, _, flags = request.param.partition(" ")
    return Processor.from_folder(unflagged if flags else WEIGHTS / "tiny", 500_000, layout)


def check(processor, prompt, responses):
    """Span by span: as many as responses, each its text, no added token's id inside, one separator after each."""
    row = processor.encode(prompt, responses)
    tokenizer, ids = processor.tokenizer, row.ids.tolist()
    added = {tokenizer.id(name) for name in (*IMAGE_TOKENS, "<|im_start|>", "<|im_end|>")} | {tokenizer.separator_id}
    raw = json.loads(tokenizer.full.to_str())["added_tokens"]
    added |= {token["id"] for token in raw if token["special"]}
    assert len(row.spans) == len(row.score_positions) == len(responses)
    for (start, stop), text in zip(row.spans, responses, strict=True):
        assert not added & set(ids[start:stop]), "neither markup nor any special token"
        kept = tokenizer.decode(ids[start:stop])
        if processor.layout == "default":
            assert kept == unicodedata.normalize("NFC", text)
        else:
            assert kept.strip("\n") == unicodedata.normalize("NFC", text).strip("\n")
    closed = len(responses) - (processor.layout == "released")
    assert ids.count(tokenizer.separator_id) == closed, "one a response, wherever the text spells it"
    plain = processor.encode("x", ["y"] * len(responses)).ids.tolist()
    for token in added:
        assert ids.count(token) == plain.count(token), f"{tokenizer.name(token)} came from the text"


@pytest.mark.parametrize("text", SPECIAL)
def test_a_special_token_spelled_anywhere_is_text(processor, text):
    check(processor, text, [text, f"a{text}b", text * 3, "clean"])


def test_any_two_special_tokens_spelled_together_are_text(processor):
    pairs = [a + b for a in SPECIAL for b in SPECIAL]
    for start in range(0, len(pairs), 60):
        check(processor, pairs[start], pairs[start : start + 60])


@pytest.mark.parametrize("name", ODD)
def test_unusual_unicode_is_text(processor, name):
    check(processor, ODD[name], [ODD[name], "plain", ODD[name] + SEPARATOR])


pieces = st.lists(st.sampled_from(SPECIAL + list(ODD.values())[:-1]) | st.text(max_size=8), min_size=1, max_size=6)


@given(st.lists(pieces.map("".join).filter(str.strip), min_size=1, max_size=5), pieces.map("".join))
def test_property_any_mixture_is_text(processor, responses, prompt):
    check(processor, prompt, responses)


def test_added_tokens_that_are_not_special_are_single_tokens_of_a_text(tmp_path):
    """As they are to the released model: Qwen's <think>, <tool_call> and the like."""
    folder = shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny")

    def with_think(raw):
        like = raw["added_tokens"][-1]
        at = max(token["id"] for token in raw["added_tokens"]) + 1
        for i, name in enumerate(["<think>", "</think>"]):
            raw["added_tokens"].append(like | {"content": name, "id": at + i, "special": False})

    edit(folder / "tokenizer.json", with_think)
    for layout in ("default", "released"):
        processor = Processor.from_folder(folder, 4096, layout)
        row = processor.encode("<think>?", ["<think>a star</think>", f"</think>{SEPARATOR}<|im_end|>"])
        think, end = map(processor.tokenizer.id, ("<think>", "</think>"))
        assert row.ids.tolist().count(think) == row.ids.tolist().count(end) == 2
        assert processor.tokenizer.spells(f"{SEPARATOR}") and not processor.tokenizer.spells("<think>")
        check(processor, "<think>?", ["<think>a star</think>", f"</think>{SEPARATOR}<|im_end|>"])


@pytest.mark.parametrize("name", ["<|resp_sep|>", "a\nb", "é" * 60, "-x", "%s{0}$HOME", "\u202ef"])
def test_file_names_and_ids_are_only_names(command, tmp_path, name):
    Image.new("RGB", (30, 30), "red").save(tmp_path / f"{name}.png")
    record = {"id": name, "prompt": name, "responses": [name, "b"], "rankings": [1, 2], "image": f"{name}.png"}
    data = tmp_path / f"{name}.jsonl"
    data.write_text(json.dumps(record), encoding="utf-8")
    status, out, err = command(score, "--tiny", f"--data={data}")
    assert status == 0, err
    status, out, err = command(evaluate, "--model", WEIGHTS / "tiny-rm", f"--data={data}", f"--out={tmp_path / name}.o")
    assert status == 0, err


# -------------------------------------------------------------------------------------------------------------- files


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, or with some bytes changed, or with a piece doubled or left out."""
    at = rng.randrange(len(data) or 1)
    how = rng.randrange(4)
    if how == 0:
        return data[:at]
    if how == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[min(rng.randrange(len(data)), int(rng.expovariate(1 / 200)))] = rng.randrange(256)
        return bytes(changed)
    return data[:at] + data[at : at + 9] * (2 if how == 2 else 0) + data[at + 9 :]


def whole_or_named(read, path):
    """Either it reads, or one line names the file (or its folder)."""
    try:
        read()
    except InputError as error:
        assert path.name in str(error) or path.parent.name in str(error), error


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny")
    shutil.copytree(WEIGHTS / "tiny-rm", tmp_path / "tiny-rm")
    return tmp_path


NAMES = ["tiny/model.safetensors", "tiny/config.json", "tiny/tokenizer.json", "tiny/preprocessor_config.json"]
NAMES += ["tiny/processor_config.json", "tiny-rm/adapter_config.json", "tiny-rm/adapter_model.safetensors"]
NAMES += ["tiny-rm/value_head.safetensors", "tiny-rm/reward_model_config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_of_a_model_reads_or_is_named(copy, name):
    rng, path = random.Random(name), copy / name
    whole = path.read_bytes()
    for _ in range(8 if len(whole) > 1_000_000 else 40):
        path.write_bytes(damaged(whole, rng))
        whole_or_named(lambda: RewardModel.load(copy / "tiny-rm").score("?", ["a", "b"]), path)


def test_damaged_records_read_or_are_named_by_line(tmp_path):
    rng, path = random.Random(0), tmp_path / "prefs.jsonl"
    lines = [{"prompt": f"{i}?", "responses": ["é", "b"], "rankings": [1, 2]} for i in range(6)]
    whole = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    for _ in range(400):
        path.write_bytes(damaged(whole, rng))
        whole_or_named(lambda: read_records(path), path)


def test_a_header_that_claims_more_than_the_file_takes_no_memory(tmp_path, copy):
    """The first eight bytes say how long the header is; a liar must not make anyone allocate it."""
    path = copy / "tiny/model.safetensors"
    body = path.read_bytes()[8:]
    for length in (2**40, 2**63, 2**64 - 1, len(body) + 1, 0):
        path.write_bytes(length.to_bytes(8, "little") + body)
        with pytest.raises(InputError, match="model.safetensors is not a whole safetensors file"):
            load_backbone(copy / "tiny")


def test_a_tensor_that_claims_another_size_is_refused(copy):
    path = copy / "tiny/model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for shape in ([2**40, 2**40], [-1, 128], [129], [128, 2]):
        changed = {
            **header,
            "model.transformer.ln_f.weight": header["model.transformer.ln_f.weight"] | {"shape": shape},
        }
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(InputError, match="model.safetensors"):
            load_backbone(copy / "tiny")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", ""])
def test_an_index_names_no_file_outside_its_folder(copy, outside):
    tensors = load_file(copy / "tiny/model.safetensors")
    shutil.move(copy / "tiny/model.safetensors", copy / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, outside)}
    (copy / "tiny/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        load_backbone(copy / "tiny")


@pytest.mark.parametrize(
    "name, key", [("adapter_config.json", "r"), ("reward_model_config.json", "value_head_hidden_dim")]
)
def test_a_config_that_claims_a_huge_matrix_takes_no_memory(copy, name, key):
    path = copy / "tiny-rm" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**12}))
    with pytest.raises(InputError, match=name):
        RewardModel.load(copy / "tiny-rm")


def test_numbers_without_end_in_a_config_are_refused(copy):
    path = copy / "tiny/config.json"
    whole = path.read_text()
    for number in ("1e999", "NaN", "-1", "0", "9" * 5000, '"4"', "null", "[]", "true"):
        config = json.loads(whole)
        text = json.dumps(config).replace(
            f'"hidden_size": {config["text_config"]["hidden_size"]}', f'"hidden_size": {number}', 1
        )
        path.write_text(text)
        with pytest.raises(InputError, match="tiny"):
            load_backbone(copy / "tiny")


def test_a_deeply_nested_line_is_not_json_to_us(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match="deep.jsonl:1"):
        read_records(path)


def test_weights_that_are_no_numbers_give_scores_that_are_refused(copy, command):
    from safetensors.torch import save_file

    tensors = load_file(copy / "tiny-rm/value_head.safetensors")
    save_file(
        {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}, copy / "tiny-rm/value_head.safetensors"
    )
    (copy / "d.jsonl").write_text(json.dumps({"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2]}))
    status, _, err = command(evaluate, "--model", copy / "tiny-rm", "--data", copy / "d.jsonl")
    assert status == 2 and "d.jsonl:1: scores are not finite" in err
