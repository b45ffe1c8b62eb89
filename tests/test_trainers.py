"""`GroupReward` under TRL's signature, and inside a real `GRPOTrainer`: one scoring pass a group, counted.

pytest tests/test_trainers.py
"""

import pickle

import pytest
from test_single_pass import noise

from yojo.cli import WEIGHTS
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.trainers import GroupReward

ASK = "Describe the star."
ANSWERS = ["a small red star", "a large red star", "nothing"]


@pytest.fixture(scope="module")
def rm():
    return RewardModel.load(WEIGHTS / "tiny-rm")


@pytest.fixture
def reward():
    return GroupReward(WEIGHTS / "tiny-rm", generations=3)


def chat(text, image=None):
    blocks = (
        [{"type": "text", "text": text}]
        if image is None
        else [{"type": "image", "image": image}, {"type": "text", "text": text}]
    )
    return [{"role": "user", "content": blocks}]


def test_each_group_is_one_pass_with_the_scores_of_the_reward_model(reward, rm):
    got = reward(prompts=[ASK] * 3 + ["What?"] * 3, completions=ANSWERS * 2, other=[1] * 6)
    assert got == rm.score(ASK, ANSWERS) + rm.score("What?", ANSWERS)
    assert reward.passes == 2 and reward.cut == 0


def test_pictures_come_as_columns_or_in_messages(reward, rm):
    expected = rm.score(ASK, ANSWERS, image=noise(1))
    assert reward([ASK] * 3, ANSWERS, image=[noise(1)] * 3) == expected
    assert reward([ASK] * 3, ANSWERS, images=[[noise(1)]] * 3) == expected
    replies = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    assert reward([chat(ASK, noise(1))] * 3, replies) == expected
    assert reward([chat(ASK)] * 3, replies, image=[noise(1)] * 3) == expected


def test_one_prompt_about_two_pictures_is_two_groups(reward, rm):
    got = reward([ASK] * 6, ANSWERS * 2, image=[noise(1)] * 3 + [noise(2)] * 3)
    assert got == rm.score(ASK, ANSWERS, image=noise(1)) + rm.score(ASK, ANSWERS, image=noise(2))


def test_equal_prompts_side_by_side_are_cut_into_groups(reward, rm):
    assert reward([ASK] * 6, ANSWERS * 2) == rm.score(ASK, ANSWERS) * 2 and reward.passes == 2


def test_a_group_cut_by_the_batch_is_counted_or_refused(reward, rm):
    assert reward([ASK] * 2, ANSWERS[:2]) == rm.score(ASK, ANSWERS[:2]) and reward.cut == 1
    strict = GroupReward(WEIGHTS / "tiny-rm", generations=3, refuse_cut=True)
    with pytest.raises(InputError, match="2 answers to one prompt are no whole groups of 3"):
        strict([ASK] * 2, ANSWERS[:2])


def test_empty_answers(reward, rm):
    got = reward([ASK] * 3, [ANSWERS[0], " ", ANSWERS[1]])
    scores = rm.score(ASK, ANSWERS[:2])
    assert got == [scores[0], min(scores) - 1, scores[1]]
    assert reward([ASK] * 3, ["", " ", "\n"]) == [None] * 3


def test_it_can_be_pickled_before_and_after_loading(reward):
    before = pickle.loads(pickle.dumps(reward))
    expected = reward([ASK] * 3, ANSWERS)
    after = pickle.loads(pickle.dumps(reward))
    assert before.rm is None and after.rm is None
    assert before([ASK] * 3, ANSWERS) == after([ASK] * 3, ANSWERS) == expected


def test_bad_calls_are_named(reward):
    with pytest.raises(InputError, match="2 prompts, 1 completions"):
        reward(["a", "b"], ["c"])
    with pytest.raises(InputError, match="generations must be at least 1"):
        GroupReward("x", generations=0)


def test_trl_trains_with_it_and_scores_one_group_a_pass(tmp_path):
    """Two steps of TRL's own trainer on a tiny text model: 2 prompts x 3 answers a step."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(WEIGHTS / "tiny/tokenizer.json")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    reward = GroupReward(WEIGHTS / "tiny-rm", generations=3)
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=6,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": ASK}, {"prompt": "What is in the picture?"}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert reward.cut == 0 and reward.passes == 2 * 2
    assert any("rewards/group_reward/mean" in entry for entry in trainer.state.log_history)
