"""The training loop: schedules by hand, accumulation is a mean, and a stopped run goes on as if it had not stopped.

pytest tests/test_fit.py
"""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yojo.core.state import NotFinite
from yojo.core.training import FitConfig, fit, learning_rate
from yojo.files import InputError
from yojo.runs import SavedRun


def test_schedules_by_hand():
    linear = FitConfig(steps=4, lr=1.0)
    assert [learning_rate(s, linear) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = FitConfig(steps=6, lr=2.0, warmup=2, schedule="cosine")
    assert [round(learning_rate(s, cosine), 6) for s in range(6)] == [1, 2, 2, 1.707107, 1, 0.292893]


def problem(seed=0):
    """Linear regression with dropout: uses torch's random state, as training does."""
    w = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(seed)))

    def loss(step, micro_batch):
        g = torch.Generator().manual_seed(100 * step + micro_batch)
        x = torch.nn.functional.dropout(torch.randn(8, 5, generator=g), 0.2)
        value = (x @ w - x.sum(1)).square().mean()
        return value, {"accuracy": 1.0}

    return w, loss


def test_it_learns_and_logs():
    w, loss = problem()
    log = fit(loss, [w], FitConfig(steps=200, lr=0.1))
    assert (w - 1).abs().max() < 0.1 and log[-1]["loss"] < log[0]["loss"] / 10
    assert log[3].keys() == {"step", "loss", "accuracy", "lr", "norm", "seconds"}


def test_accumulation_is_the_mean_of_the_parts():
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    asked = []

    def loss(step, micro_batch):
        asked.append((step, micro_batch))
        return (w - 10.0**micro_batch).square().sum(), {}

    log = fit(loss, [w], FitConfig(steps=1, lr=0.0, accumulate=3, clip=1e9))
    assert asked == [(0, 0), (0, 1), (0, 2)]
    assert log[0]["norm"] == pytest.approx(2 * (1 + 10 + 100) / 3)
    assert log[0]["loss"] == pytest.approx((1 + 100 + 10_000) / 3)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    c = FitConfig(steps=30, lr=0.1, save_every=10)
    torch.manual_seed(1)
    whole, loss = problem()
    fit(loss, [whole], c)

    class Stop(Exception):
        pass

    torch.manual_seed(1)
    first, loss = problem()

    def stopping(step, micro_batch):
        if step == 17:  # seven steps after the last save: they are done again
            raise Stop
        return loss(step, micro_batch)

    with pytest.raises(Stop):
        fit(stopping, [first], c, SavedRun(tmp_path))
    torch.manual_seed(999)
    again, loss = problem(seed=5)
    log = fit(loss, [again], c, SavedRun(tmp_path))
    assert torch.equal(again, whole) and len(log) == 30
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))


@given(
    steps=st.integers(1, 12),
    every=st.integers(1, 5),
    stop=st.integers(0, 11),
    accumulate=st.integers(1, 3),
    broken=st.booleans(),
)
def test_property_wherever_it_stops_it_goes_on_bit_for_bit(steps, every, stop, accumulate, broken):
    c = FitConfig(steps=steps, lr=0.1, save_every=every, accumulate=accumulate)
    torch.manual_seed(1)
    whole, loss = problem()
    log = fit(loss, [whole], c)

    def stopping(step, micro_batch):
        if step == stop and micro_batch == accumulate - 1:
            if broken:
                value, about = loss(step, micro_batch)
                return value * float("nan"), about
            raise KeyboardInterrupt
        return loss(step, micro_batch)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        again, loss = problem()
        with contextlib.suppress(KeyboardInterrupt, NotFinite):
            fit(stopping, [again], c, SavedRun(Path(folder)))
        if not (Path(folder) / "state.pt").exists():  # stopped before the first save: begun anew
            torch.manual_seed(1)
            again, loss = problem()
        again_log = fit(loss, [again], c, SavedRun(Path(folder)))
    assert torch.equal(again, whole)
    assert [e["loss"] for e in again_log] == [e["loss"] for e in log]


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights():
    w, _ = problem()
    before = w.detach().clone()
    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        fit(lambda step, micro_batch: (w.sum() * float("nan"), {}), [w], FitConfig(steps=3))
    assert torch.equal(w, before)


def test_a_foreign_state_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    w, loss = problem()
    with pytest.raises(InputError, match="is not the state of a run"):
        fit(loss, [w], FitConfig(steps=1), SavedRun(tmp_path))


def test_another_run_is_not_resumed(tmp_path):
    """The saved state remembers what was trained on what: a joint run can't go on as an isolated one."""
    w, loss = problem()
    c = FitConfig(steps=2, save_every=1)
    joint = SavedRun(tmp_path, {"mode": "joint"})
    fit(loss, [w], c, joint)
    with pytest.raises(InputError, match="its mode is 'joint', not 'isolated'"):
        fit(loss, [w], c, SavedRun(tmp_path, {"mode": "isolated"}))
    with pytest.raises(InputError, match="its steps is 2, not 3"):
        fit(loss, [w], FitConfig(steps=3, save_every=1), joint)


def test_steps_logged_before_the_first_save_are_not_logged_twice(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    w, loss = problem()
    fit(loss, [w], FitConfig(steps=2), SavedRun(tmp_path))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]
