"""`GroupReward` under TRL's signature, and inside a real `GRPOTrainer`: one scoring pass a group, counted; and no
answer, whatever it is, ends a run.

pytest tests/test_trainers.py
"""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
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


LONG = "a star " * 3000
CALL = [{"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}]
SHOWN = [{"role": "assistant", "content": [{"type": "image", "image": noise(1)}]}]
UNJUDGED = {
    "": "it is empty",
    " \n": "it is empty",
    "\ud800": "not valid Unicode",
    LONG: "tokens of the group are more than the model's 4096",
    7: "must be a text or a list of messages",
    "call": (CALL, "it is empty"),
    "shown": (SHOWN, "only text can be judged"),
}


@pytest.mark.parametrize("case", UNJUDGED, ids=lambda case: str(case)[:8])
def test_an_answer_that_cannot_be_judged_is_below_the_others(reward, rm, case):
    bad, why = UNJUDGED[case] if isinstance(UNJUDGED[case], tuple) else (case, UNJUDGED[case])
    scores = rm.score(ASK, ANSWERS[:2])
    with pytest.warns(UserWarning, match=f"answer 2 to .Describe the star..* cannot be judged: .*{why}"):
        assert reward([ASK] * 3, [ANSWERS[0], bad, ANSWERS[1]]) == [scores[0], min(scores) - 1, scores[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of once, counted always
        assert reward([ASK] * 3, [bad] * 3) == [None] * 3
    assert reward.unjudged == 4


def test_a_score_that_is_not_finite_is_none(reward, rm, monkeypatch):
    def third_is(value):
        monkeypatch.setattr(RewardModel, "raw_scores", lambda *_: [[1.0, 2.0, value]])

    with pytest.warns(UserWarning, match="answer 3 to .* cannot be judged: its score is nan"):
        third_is(math.nan)
        assert reward([ASK] * 3, ANSWERS) == [1.0, 2.0, 0.0]
    third_is(math.inf)
    assert reward([ASK] * 3, ANSWERS) == [1.0, 2.0, 0.0] and reward.unjudged == 2


def test_a_group_that_is_too_long_loses_its_longest_answers(reward, rm):
    """Each alone would fit; two of the three do, together."""
    texts = ["a star " * 1000, "a star " * 500, "a star " * 600]
    with pytest.warns(UserWarning, match="answer 1 to .* tokens of the group are more than"):
        got = reward([ASK] * 3, texts)
    scores = rm.score(ASK, texts[1:])
    assert got == [min(scores) - 1, *scores] and reward.unjudged == 1


def test_equal_answers_that_fit_once_are_judged_in_isolated_mode(reward):
    reward.mode = "isolated"
    scores = reward([ASK] * 9, ["a star " * 300] * 9)
    assert len(set(scores)) == 1 and reward.unjudged == 0


def test_a_prompt_that_is_too_long_judges_nobody(reward):
    with pytest.warns(UserWarning, match="cannot be judged"):
        assert reward([LONG] * 3, ANSWERS) == [None] * 3


def test_a_tools_output_is_no_part_of_the_answer(reward, rm):
    """Nor are the pictures that it returned, which TRL puts into the completion."""
    for output in ("42", [{"type": "image", "image": noise(1)}, {"type": "text", "text": "here"}]):
        tool = {"role": "tool", "content": output}
        talk = [[*CALL, tool, {"role": "assistant", "content": text}] for text in ANSWERS]
        assert reward([ASK] * 3, talk) == rm.score(ASK, ANSWERS)


def test_columns_are_one_row_a_prompt(reward, rm):
    """What is no list is no column: a trainer hands over functions and its state, too."""
    expected = rm.score(ASK, ANSWERS)
    assert (
        reward([ASK] * 3, ANSWERS, log_extra=print, trainer_state=object(), step=torch.tensor(3), name="x") == expected
    )
    assert reward([ASK] * 3, ANSWERS, images=None, audio=[None] * 3) == expected
    for wrong in ([noise(1)], noise(1), "a.png"):
        with pytest.raises(InputError, match="the column 'images' must be a list of 3, one for each prompt"):
            reward([ASK] * 3, ANSWERS, images=wrong)
    with pytest.raises(InputError, match="column 'shot' may show something"):
        reward([ASK] * 3, ANSWERS, shot=[noise(1)] * 3)
    deaf = GroupReward(WEIGHTS / "tiny-rm", ignore=["shot"])
    assert deaf([ASK] * 3, ANSWERS, shot=[noise(1)] * 3) == expected


def test_videos_come_as_columns(reward, rm):
    shown = {"video": [[noise(i) for i in range(3)]] * 3}
    for apart, more in ((4.0, {}), (0.5, {"sampling_interval": [0.5] * 3})):
        frames = [(apart * i, noise(i)) for i in range(3)]
        assert reward([ASK] * 3, ANSWERS, **shown, **more) == rm.score(ASK, ANSWERS, video=frames)
    for name in ("fps", "timestamps", "frame_rate", "videoFps"):
        with pytest.raises(InputError, match=f"'{name}' may say when frames were taken, and it is not read"):
            reward([ASK] * 3, ANSWERS, **shown, **{name: [2.0] * 3})
    assert reward([ASK] * 3, ANSWERS, learning_rate=[0.1] * 3, fps=[2.0] * 3) == rm.score(ASK, ANSWERS), "no video"
    with pytest.raises(InputError, match="'sampling_interval' must be a list of 3"):
        reward([ASK] * 3, ANSWERS, **shown, sampling_interval=2.0)


def test_columns_of_datasets_and_pandas_are_lists(reward, rm):
    datasets, pd = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    expected = rm.score(ASK, ANSWERS, image=noise(1))
    rows = datasets.Dataset.from_list([{"image": noise(1)}] * 3, datasets.Features({"image": datasets.Image()}))
    assert reward([ASK] * 3, ANSWERS, image=rows["image"]) == expected
    frame = pd.DataFrame({"image": [noise(2), *[noise(1)] * 3]})[1:]
    assert reward([ASK] * 3, ANSWERS, image=frame["image"]) == expected
    calls = np.array([{"function": {"name": "look"}}] * 2, dtype=object)
    talk = [np.array([{"role": "assistant", "content": text, "tool_calls": calls}], dtype=object) for text in ANSWERS]
    assert reward([ASK] * 3, talk) == rm.score(ASK, ANSWERS)


def test_it_can_be_pickled_before_and_after_loading(reward):
    before = pickle.loads(pickle.dumps(reward))
    expected = reward([ASK] * 3, ANSWERS)
    after = pickle.loads(pickle.dumps(reward))
    assert before.rm is None and after.rm is None
    assert before([ASK] * 3, ANSWERS) == after([ASK] * 3, ANSWERS) == expected


def test_bad_calls_are_named(reward):
    with pytest.raises(InputError, match="2 prompts, 1 completions"):
        reward(["a", "b"], ["c"])
    for generations in (0, 65):
        with pytest.raises(InputError, match="generations must be at least 1 and at most 64"):
            GroupReward("x", generations=generations)


@pytest.fixture
def trainer(tmp_path):
    """TRL's own, of a tiny text model: 2 prompts x 3 answers a step, two steps."""
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

    def make(reward):
        return trl.GRPOTrainer(
            model=Qwen2ForCausalLM(config),
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": ASK}, {"prompt": "What is in the picture?"}] * 4),
            processing_class=tokenizer,
        )

    return make


def test_trl_trains_with_it_and_scores_one_group_a_pass(trainer):
    reward = GroupReward(WEIGHTS / "tiny-rm", generations=3)
    trainer = trainer(reward)
    trainer.train()
    assert reward.cut == 0 and reward.passes == 2 * 2
    assert any("rewards/group_reward/mean" in entry for entry in trainer.state.log_history)


def test_no_answer_ends_a_run_of_trl(trainer, monkeypatch):
    """Every kind of answer that cannot be judged, one after the other, in the place of what was sampled; and a score
    that is not finite in every group."""

    class Odd(GroupReward):
        def __call__(self, prompts, completions, **columns):
            bad = [case[0] if isinstance(case, tuple) else name for name, case in UNJUDGED.items()]
            completions = [bad[(self.passes + i) % len(bad)] if i % 3 else text for i, text in enumerate(completions)]
            return super().__call__(prompts, completions, **columns)

    real = RewardModel.raw_scores
    monkeypatch.setattr(RewardModel, "raw_scores", lambda *args: [[math.nan, *some[1:]] for some in real(*args)])
    reward = Odd(WEIGHTS / "tiny-rm", generations=3)
    trainer = trainer(reward)
    with pytest.warns(UserWarning, match="cannot be judged"):
        trainer.train()
    assert trainer.state.global_step == 2 and reward.unjudged >= 12
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
