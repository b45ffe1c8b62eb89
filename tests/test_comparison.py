"""The tables of `evaluate --tiny`, on a few groups: what they say is what the models score. (Whole: test_tiny.py.)

pytest tests/test_comparison.py
"""

import pytest

from yojo import metrics
from yojo.cli import WEIGHTS
from yojo.core.reward import RewardModel
from yojo.tiny import comparison
from yojo.tiny.comparison import masks, records_of, sizes, under
from yojo.tiny.experiment import with_features

MODELS = {"joint": WEIGHTS / "tiny-rm", "isolated": WEIGHTS / "tiny-rm-isolated"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(comparison, "GROUPS", 24)


def test_a_figure_is_the_accuracy_of_the_models_own_scores(tmp_path):
    """Isolated scores know no order, so they can be recomputed with `RewardModel.score`."""
    rm = RewardModel.load(MODELS["isolated"])
    records = records_of(tmp_path, 0, "absolute")
    figure = under(rm, with_features(records, rm), "isolated", 1, 0)
    scores = [rm.score(r.prompt, r.responses, image=r.images) for r in records]
    assert figure == metrics.mean([metrics.best_of_n(s, r.rankings) for s, r in zip(scores, records, strict=True)])
    assert under(rm, records, "joint", 2, 0) <= 1 and rm.mode == "isolated"


def test_one_row_a_model_and_one_figure_a_mask(tmp_path):
    rows = masks(MODELS, tmp_path, 0, "absolute", noisy=comparison.NOISE)
    assert [row["trained"] for row in rows] == list(MODELS)
    assert all(0 <= row[mask] <= 1 for row in rows for mask in comparison.MASKS)


def test_accuracy_against_n_goes_beyond_what_was_trained_on(tmp_path):
    rows = sizes(MODELS, tmp_path, 0)
    assert [row["n"] for row in rows] == [2, 4, 8, 16]
    assert all(row[name] > row["random"] for row in rows for name in MODELS)
    assert rows[0]["random"] > rows[-1]["random"]


def test_the_tables_are_printed_one_after_the_other(monkeypatch, capsys):
    """Whole, but for the training of the two models on corroborated: shipped ones stand in."""
    import shutil

    def shipped(task, recipe, n, modes, seeds, out, *more):
        for path in MODELS.values():
            shutil.copytree(path, out / path.name)
            base = out / path.name / "reward_model_config.json"
            base.write_text(base.read_text().replace("../tiny", str(WEIGHTS / "tiny")))

    monkeypatch.setattr(comparison, "run_tiny", shipped)
    rows = comparison.tables(0)
    assert [row.get("task", row.get("n")) for row in rows] == ["absolute"] * 4 + ["corroborated"] * 2 + [2, 4, 8, 16]
    out = capsys.readouterr().out
    assert out.count("absolute, noisy") == 2 and out.index("three masks") < out.index("trained on 2 to 8 answers")


def test_noise_makes_pictures_differ_and_nothing_else(tmp_path):
    clear, noisy = (records_of(tmp_path / str(n), 0, "absolute", noisy=n) for n in (0.06, 0.45))
    assert clear[0].images[0].read_bytes() != noisy[0].images[0].read_bytes()
