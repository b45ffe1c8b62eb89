"""The released reward model's files and rows: what its training code feeds the network is what ours feeds it.

    pytest tests/test_released.py

The independent construction writes the whole row as ONE string and lets `tokenizers` parse it with special tokens
enabled, as the released code does, then looks for the separators in the ids. Ours builds the row piece by piece and
never looks for anything. For texts that spell no added token both must agree on every id and every read position.
"""

import json
import pickle
import shutil
import zipfile

import pytest
import torch
from conftest import edit, names
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_single_pass import SHOWN, make_model, noise
from tokenizers import AddedToken
from tokenizers import Tokenizer as BPE

from yojo.core import lora
from yojo.core.prompt import Processor
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.store import save_adapter
from yojo.weights import load_backbone

ASK = ("Describe the star.", ["a small red star.", "a large red star", "nothing"])


@pytest.fixture(scope="module")
def processor(tiny_folder, tmp_path_factory):
    """The tiny tokenizer, with two tokens that the released one has and that make the layout what it is."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("released") / "base")

    def melt(raw):
        raw["model"]["vocab"] |= {"ĊĊ": 600, ".ĊĊ": 601}  # Ċ is how byte-level BPE writes a line break
        raw["model"]["merges"] += [["Ċ", "Ċ"], [".", "ĊĊ"]]

    edit(folder / "tokenizer.json", melt)
    return Processor.from_folder(folder, 4096, layout="released")


# ---------------------------------------------------------------------------------------------------------- the rows


def test_three_answers_written_out(processor):
    e = processor.encode("Describe the star.", ["a red star", "a star.", "a star"])
    assert names(processor, e) == [
        *("<|im_start|>", "user", "\n", "Describe", " the", " star", ".", "<|im_end|>", "\n", " "),
        *("<|im_start|>", "assistant"),
        *("\n", "a", " red", " star", "\n\n", "<|resp_sep|>"),
        *("\n\n", "a", " star", ".\n\n", "<|resp_sep|>"),
        *("\n\n", "a", " star"),
    ]
    assert e.prompt_length == 12 and e.spans == [(12, 17), (18, 22), (23, 26)] and e.score_positions == [16, 21, 25]
    assert e.response.tolist() == [-1] * 12 + [0] * 6 + [1] * 5 + [2] * 3


def test_one_answer_has_no_separator_and_a_picture_brings_bos(processor):
    assert names(processor, processor.encode("?", ["yes"]))[-3:] == ["assistant", "\n", "yes"]
    assert names(processor, processor.encode("?", ["yes"]))[0] == "<|im_start|>"
    assert names(processor, processor.encode("?", ["yes"], noise(1)))[0] == "<|im_end|>"


def test_a_line_break_of_the_first_answer_melts_into_the_turns_own(processor):
    """ "assistant\\n" + "\\nyes": the reason why the prompt ends before its line break."""
    e = processor.encode("?", ["\nyes", "no"])
    assert names(processor, e)[e.spans[0][0] - 1 : e.spans[0][1] + 1] == [
        "assistant",
        "\n\n",
        "yes",
        "\n\n",
        "<|resp_sep|>",
    ]
    plain = processor.encode("?", ["yes", "no"])
    assert e.prompt_length == plain.prompt_length


GRID = {
    "text": "",
    "image": "<low_res_im_start>"
    + 9 * "<im_patch>"
    + "<im_end><im_start>"
    + 3 * (3 * "<im_patch>" + "<im_col>")
    + "<im_end>",
    "video": " ".join(f"{t} <im_start>" + 4 * "<im_patch>" + "<im_end>" for t in ("0.0", "2.5", "5.0")),
}


def images_string(processor, grids):
    text = ""
    for i, (_, _, rows, columns) in enumerate(grids, 1):
        low = "<low_res_im_start>" + 9 * "<im_patch>" + "<im_end>"
        text += f"Image {i}" + low + "<im_start>" + rows * (columns * "<im_patch>" + "<im_col>") + "<im_end>"
    return text


@pytest.fixture(scope="module")
def whole_string(processor):
    """ids and read positions of a row, the released way."""
    tokenizer = BPE.from_file(str(processor.tokenizer.path))
    tokenizer.add_special_tokens([AddedToken("<|resp_sep|>", special=True, normalized=False)])
    separator = tokenizer.token_to_id("<|resp_sep|>")

    def encode(pictures, prompt, responses):
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n <|im_start|>assistant\n" + "\n\n<|resp_sep|>\n\n".join(
            responses
        )
        ids = tokenizer.encode(("<|im_end|>" if pictures else "") + pictures + text, add_special_tokens=False).ids
        return ids, [i - 1 for i, token in enumerate(ids) if token == separator] + [len(ids) - 1]

    return encode


# "<" is left out: no text can spell an added token
TEXTS = st.text(
    st.one_of(
        st.sampled_from(list("ab .,!?\n\t\r '’1290")), st.characters(exclude_characters="<", exclude_categories=["Cs"])
    ),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize("kind", SHOWN)
@given(prompt=TEXTS, responses=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=6))
def test_ids_and_read_positions_are_those_of_the_whole_string(processor, whole_string, kind, prompt, responses):
    pictures = processor.open_pictures(**SHOWN[kind])
    text = images_string(processor, pictures.grids) if kind == "images" else GRID[kind]
    e = processor.encode(prompt, responses, pictures=pictures)
    assert (e.ids.tolist(), e.score_positions) == whole_string(text, prompt, responses)
    assert e.ids.tolist().count(processor.tokenizer.separator_id) == len(responses) - 1


def test_text_that_spells_the_separator_moves_no_read_position_here_and_does_there(processor, whole_string):
    """The known fault: a literal separator in an answer gives the released way one read position too many."""
    responses = ["good <|resp_sep|> better", "bad"]
    assert len(processor.encode("?", responses).score_positions) == 2
    assert len(whole_string("", "?", responses)[1]) == 3


def test_in_isolated_mode_a_score_depends_on_no_other_answer(tiny_folder):
    """The same ids under the other mask. (Not the score of N = 1: alone, an answer is encoded as the last one.)"""
    rm = make_model(tiny_folder)
    rm.processor.layout = "released"
    before = rm.score("?", ["one", "two", "three"], image=noise(1), mode="isolated")
    for i, other in enumerate(["\n\nsomething longer, in two lines\n", "2", "nothing."]):
        responses = ["one", "two", "three"]
        responses[i] = other
        after = rm.score("?", responses, image=noise(1), mode="isolated")
        for j in range(3):
            moved = abs(after[j] - before[j])
            assert moved > 1e-6 if i == j else moved < 1e-10


# --------------------------------------------------------------------------------------------------------- the files


CONFIG = {
    "value_head_type": "mlp",
    "value_head_hidden_dim": 16,
    "value_head_activation": "silu",
    "value_head_input_dim": 32,
    "resp_repr_mode": "last",
}


@pytest.fixture
def released(tiny_folder, tmp_path):
    """An unmerged run, the same merged, and the scores both must give.

    The merged table ends with the separator's row, and its tokenizer knows the separator, as in the release.
    """
    rm = make_model(tiny_folder, "joint", dtype=torch.float32)
    rm.processor.layout = "released"
    scores = rm.score(*ASK, image=noise(1))
    run, merged = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    save_adapter(rm.backbone, "reward", run)
    adapter = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "allenai/Molmo2-4B"}))
    shutil.copytree(tiny_folder, merged)
    tensors = load_file(tiny_folder / "model.safetensors")
    lora.merge(rm.backbone, "reward")
    tensors |= {k: v for k, v in rm.backbone.state_dict().items() if "blocks" in k}
    separator = rm.processor.tokenizer.separator_id
    tensors["model.transformer.wte.new_embedding"] = tensors["model.transformer.wte.new_embedding"][
        : separator + 1 - 512
    ].clone()
    save_file(tensors, merged / "model.safetensors")
    edit(merged / "config.json", lambda c: c["text_config"].update(additional_vocab_size=separator + 1 - 512))
    token = {"id": separator, "content": "<|resp_sep|>", "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    edit(merged / "tokenizer.json", lambda t: t["added_tokens"].append(token))
    for folder in (run, merged):
        (folder / "reward_model_config.json").write_text(json.dumps(CONFIG))
        torch.save(rm.head.state_dict(), folder / "value_head.pt")
    return run, merged, scores


def test_a_merged_release_and_an_unmerged_run_give_the_same_scores(released, tiny_folder):
    run, merged, scores = released
    for rm in (RewardModel.load(merged), RewardModel.load(run, base=tiny_folder)):
        assert rm.mode == "joint" and rm.processor.layout == "released"
        assert rm.score(*ASK, image=noise(1)) == pytest.approx(scores, rel=2e-5, abs=2e-6)


def test_an_unmerged_run_says_which_base_it_needs(released):
    with pytest.raises(InputError, match="adapter for allenai/Molmo2-4B, which is no folder here: pass its folder"):
        RewardModel.load(released[0])


def test_a_merged_model_takes_no_other_base(released, tiny_folder):
    """Its head on another backbone would give plausible scores."""
    with pytest.raises(InputError, match="is a merged model and its own base: leave .* out"):
        RewardModel.load(released[1], base=tiny_folder)


def test_a_run_saved_by_us_keeps_its_layout(released, tiny_folder, tmp_path):
    rm = RewardModel.load(released[0], base=tiny_folder)
    rm.save(tmp_path / "ours")
    again = RewardModel.load(tmp_path / "ours")
    assert again.processor.layout == "released" and again.score(*ASK) == rm.score(*ASK)


def test_the_separator_row_of_a_merged_release_is_used_as_it_is(released):
    _, merged, _ = released
    rm = RewardModel.load(merged)
    table = rm.backbone.model.transformer.wte.embedding
    assert rm.processor.tokenizer.separator_id == 522 == len(table) - 1
    assert torch.equal(table[-1], load_backbone(merged).model.transformer.wte.embedding[-1]) and table[-1].any()


class Malice:
    def __reduce__(self):
        return (exec, ("open('executed', 'w')",))


def malicious(path):
    """A zip as torch writes it whose pickle runs code."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"0.weight": Malice()}, protocol=2))
        file.writestr("archive/version", "3")


@pytest.mark.parametrize(
    "break_it, message",
    [
        (malicious, "value_head.pt cannot be read as plain tensors, and nothing in it was executed"),
        (lambda p: p.write_bytes(pickle.dumps(Malice())), "value_head.pt cannot be read as plain tensors"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "value_head.pt cannot be read as plain tensors"),
        (lambda p: p.unlink(), "value_head.pt does not exist"),
        (lambda p: torch.save([1, 2], p), "must hold a dictionary of tensors"),
        (lambda p: torch.save({"0.weight": torch.zeros(16, 32)}, p), "3 missing: 0.bias"),
    ],
)
def test_a_bad_head_file_is_named_and_runs_nothing(released, break_it, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    break_it(released[1] / "value_head.pt")
    with pytest.raises(InputError, match=message):
        RewardModel.load(released[1])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resp_repr_mode": "mean"}, "resp_repr_mode = 'mean' is not supported, only 'last'"),
        ({"value_head_activation": "relu"}, "value_head_activation = 'relu' is not supported"),
        ({"value_head_hidden_dim": None}, "value_head_hidden_dim must be a whole number"),
        ({"value_head_hidden_dim": 8}, "wrong shape: 0.weight"),
    ],
)
def test_a_head_of_another_kind_is_refused(released, change, message):
    edit(released[1] / "reward_model_config.json", lambda c: c.update(change))
    with pytest.raises(InputError, match=message):
        RewardModel.load(released[1])
