"""A run finds out what is wrong with its records before its first step, and leaves out what teaches nothing.

pytest tests/test_checks.py
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from yojo import evaluate, grpo, media, train
from yojo.checks import keeping, openable, preferring
from yojo.cli import WEIGHTS
from yojo.core.data import Record, read_records
from yojo.core.lora import LoraConfig
from yojo.core.training import FitConfig, Recipe
from yojo.files import InputError

GOOD = {"prompt": "Describe the star.", "responses": ["a small star", "a star"], "rankings": [1, 2]}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.fixture
def pictures(tmp_path):
    """Two whole ones, one that is cut off, and a folder of frames of which one is cut off."""
    for name in ("a.jpg", "b.jpg", "clip/1.jpg", "clip/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((90, 90), 60).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    shutil.copytree(tmp_path / "clip", tmp_path / "cut")
    shutil.copyfile(tmp_path / "cut.jpg", tmp_path / "cut/2.jpg")
    return tmp_path


def test_what_cannot_be_opened_is_named_or_left_out(pictures):
    shown = [{"image": "a.jpg"}, {"images": ["b.jpg", "cut.jpg"]}, {"video": "cut"}, {"video": "clip"}, {}]
    records = read_records(write(pictures / "d.jsonl", *({**GOOD, **some} for some in shown)))
    with pytest.raises(InputError, match=r"d.jsonl:2: .*cut.jpg cannot be read as a picture"):
        openable(records, None)
    bad = []
    assert openable(records, bad) == [records[0], *records[3:]]
    assert [error.split(": ")[0][-9:] for error in bad] == ["d.jsonl:2", "d.jsonl:3"]
    with pytest.raises(InputError, match=r"no record is left: .*d.jsonl:2"):
        openable(records[1:3], [])


def test_every_file_is_opened_once(pictures, monkeypatch):
    opened, real = [], media.opened
    monkeypatch.setattr(media, "opened", lambda source, name=None: opened.append(source) or real(source, name))
    records = read_records(write(pictures / "d.jsonl", *[{**GOOD, "image": "a.jpg"}] * 50, {**GOOD, "image": "b.jpg"}))
    openable(records, None)
    assert [path.name for path in opened] == ["a.jpg", "b.jpg"]


def test_records_that_prefer_nothing_are_left_out_and_counted(capsys):
    """One answer, or several equally good ones: whatever the scores, they would count as right."""
    ranks = [[1, 2], [1], [1, 1, 1], [2, 1, 2]]
    records = [Record("?", [*"abc"][: len(some)], some) for some in ranks]
    assert preferring(records) == [records[0], records[3]]
    said = "left out, since all their responses are equally good or there is only one: 2 of 4 records\n"
    assert capsys.readouterr().out == said
    assert preferring(records[:1]) == records[:1] and capsys.readouterr().out == ""
    with pytest.raises(InputError, match="none of 2 records says which of its responses is better"):
        preferring(records[1:3])


@pytest.mark.parametrize(
    "ranks", [[9, 3], [0, 1], [2, 2], [2, 3], [1, 3], [1, 10**30], [1.0, 2.0], [1], [1, 2, 2], "12", {1: 2}, [True, 2]]
)
def test_ranks_are_places(ranks):
    """Ratings turn the preference round, and so do places that are counted from the worst; neither has a 1 always."""
    with pytest.raises(InputError, match="^here: rankings must be 2 whole numbers from 1, got .*; 1 is the best"):
        Record("?", ["a", "b"], ranks, where="here")


def test_keeping_goes_on_only_where_it_may():
    def odd(record):
        if int(record.prompt) % 2 == 0:
            raise InputError(f"{record.prompt} is even")
        return int(record.prompt)

    records = [Record(str(i)) for i in range(5)]
    with pytest.raises(InputError, match="0 is even"):
        keeping(records, odd, None, "x")
    assert keeping(records, odd, bad := [], "x") == [1, 3] and bad == ["0 is even", "2 is even", "4 is even"]


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def small(tiny_folder, pictures, monkeypatch):
    """Training in small: a step is a record, and nothing is saved on the way."""
    recipe = Recipe(LoraConfig(r=2, dropout=0.0), 8, fit=FitConfig(steps=0, accumulate=1, save_every=100))
    monkeypatch.setattr(train, "Recipe", lambda: replace(recipe))
    lines = [GOOD | {"prompt": f"{i}?", "image": "a.jpg"} for i in range(30)]
    write(pictures / "test.jsonl", GOOD)

    def words(*more, out="rm"):
        write(pictures / "d.jsonl", *lines)
        files = ["--data", pictures / "d.jsonl", "--test", pictures / "test.jsonl", "--out", pictures / out]
        return ["--weights", tiny_folder, *files, "--mode", "joint", "--steps", 4, *more]

    return words, lines, pictures


def test_training_does_not_begin_on_a_picture_that_is_cut_off(command, small):
    words, lines, folder = small
    lines[29]["image"] = "cut.jpg"
    status, _, err = command(train, *words())
    assert status == 2 and "d.jsonl:30: " in err and not (folder / "rm.training").exists()


@pytest.mark.parametrize("out", ["", ".", "..", "a.jpg", "d.jsonl"])
def test_training_does_not_begin_where_nothing_could_be_saved(command, small, monkeypatch, out):
    words, _, folder = small
    words = words()
    words[words.index("--out") + 1] = out
    monkeypatch.chdir(folder)
    before = sorted(folder.parent.iterdir()), sorted(folder.iterdir())
    monkeypatch.setattr(train, "read_records", lambda *_, **__: pytest.fail("work was begun"))
    status, _, err = command(train, *words, "--overwrite")
    assert status == 2 and any(why in err for why in ("current folder", "no folder", "both name"))
    assert (sorted(folder.parent.iterdir()), sorted(folder.iterdir())) == before


def test_keep_going_lists_what_it_leaves_out(command, small):
    words, lines, folder = small
    lines[3]["image"], lines[7], lines[8]["rankings"] = "cut.jpg", '{"prompt": ', [9, 3]
    lines[9]["responses"] = ["x " * 9000, "y"]
    lines[10]["rankings"] = [1, 1]
    status, out, err = command(train, *words("--keep-going", "--json", folder / "r.json"))
    assert status == 0, err
    left = json.loads((folder / "r.json").read_text())["left_out"]
    assert {error[error.index("d.jsonl:") :].split()[0].rstrip(":") for error in left} == {
        f"d.jsonl:{n}" for n in (4, 8, 9, 10)
    }
    assert "left out, 4 rows" in out and all(error in out for error in left) and "1 of 28 records" in out
    assert "25 records of" in out


@pytest.mark.parametrize("module", [train, grpo])
def test_what_was_left_out_is_part_of_the_run(command, small, module):
    """A picture that is mended between two halves of a run would make it another run."""
    words, lines, folder = small
    lines[3]["image"] = "late.jpg"
    shutil.copyfile(folder / "cut.jpg", folder / "late.jpg")
    words = words("--keep-going")
    if module is grpo:
        words = ["--reward", WEIGHTS / "tiny-rm", "--data", folder / "d.jsonl", "--out", folder / "rm", "--steps", 3]
        words += ["--prompts", 1, "--group", 2, "--max-new-tokens", 4, "--keep-going"]
    real, steps = module.SavedRun.add, []

    def stop(self, entry):
        steps.append(entry)
        real(self, entry)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.SavedRun, "add", stop)
        assert command(module, *words)[0] == 130
    shutil.copyfile(folder / "a.jpg", folder / "late.jpg")
    status, out, err = command(module, *words, "--resume")
    assert status == 2 and "holds another run" in err and "--overwrite" in err
    assert "--resume goes on" not in out, "it would not"
    assert "the same ones readable" in err
    shutil.copyfile(folder / "cut.jpg", folder / "late.jpg")
    status, out, err = command(module, *words, "--resume")
    assert status == 0 and "going on after" in out, err


def test_what_was_left_out_is_known_by_its_line(command, small, monkeypatch):
    """However the file is named; and another picture under the same name makes another run."""
    words, lines, folder = small
    lines[3] = "{"
    asked = words("--keep-going")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (_ for _ in ()).throw(MemoryError))
    for resume in ([], ["--resume"]):
        assert command(train, *asked, *resume)[0] == 1
        monkeypatch.chdir(folder)
        asked = [word.name if word == folder / "d.jsonl" else word for word in asked]
    Image.new("RGB", (90, 90)).save(folder / "a.jpg")
    status, _, err = command(train, *asked, "--resume")
    assert status == 2 and "its pictures is" in err and "resume with the same records" in err


def test_what_stands_beside_the_frames_ends_no_run(command, small):
    """A link that leads nowhere is no frame."""
    words, lines, folder = small
    del lines[0]["image"]
    lines[0]["video"] = "clip"
    (folder / "clip/.old").symlink_to("nowhere")
    status, _, err = command(train, *words())
    assert status == 0, err


def test_more_answers_than_the_judge_reads_are_refused_at_once(command, small):
    words, _, folder = small
    words()
    words = ["--reward", WEIGHTS / "tiny-rm", "--data", folder / "d.jsonl", "--out", folder / "x", "--group", 10**8]
    status, _, err = command(grpo, *words)
    assert status == 2 and "--group 100000000: the reward model reads at most 64" in err


def test_a_run_that_is_broken_off_says_how_to_go_on(command, small, monkeypatch):
    words, _, folder = small
    monkeypatch.setattr(train.RewardModel, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    status, out, _ = command(train, *words())
    assert status == 130 and f"what was done is kept in {folder / 'rm.training'}: --resume goes on" in out


def test_a_resume_says_where_it_goes_on_and_other_records_are_refused(command, small, monkeypatch):
    words, lines, folder = small
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_, **__: pytest.fail("not reached"))
        patch.setattr(train.SavedRun, "__init__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(train, *words())[0] == 130
    assert (folder / "rm.training").exists() and not (folder / "rm.training/state.pt").exists()
    status, out, _ = command(train, *words("--resume"))
    assert status == 0 and "nothing was saved" in out
    shutil.rmtree(folder / "rm")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError):
            command(train, *words())
    assert torch.load(folder / "rm.training/state.pt", weights_only=True)["log"] == [], "what it is about is known"
    lines.append(GOOD)
    status, _, err = command(train, *words("--resume"))
    assert status == 2 and "resume with the same records" in err
    lines.pop()
    status, out, _ = command(train, *words("--resume"))
    assert status == 0 and "going on after 0 of 4 steps" in out


def test_any_error_saves_the_last_whole_step(command, small, monkeypatch):
    """Here of memory, in the third step; without it a hundred steps would be lost."""
    words, _, folder = small
    assert command(train, *words(out="whole"))[0] == 0
    real = train.RewardModel.forward

    def scores(self, batch):
        if (folder / "rm.training/metrics.jsonl").read_text().count("\n") == 2:
            torch.rand(7)  # what a half-made step has drawn must not count
            raise errors[0]
        return real(self, batch)

    tried = "Tried to allocate 2.00 GiB"
    cuda = torch.OutOfMemoryError(f"CUDA out of memory. {tried}. GPU 0 has a total capacity of ...")
    host = RuntimeError(f"[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: {tried}")
    errors = [MemoryError("out of memory"), cuda, host]
    while errors:
        with monkeypatch.context() as patch:
            patch.setattr(train.RewardModel, "forward", scores)
            status, _, err = command(train, *words("--overwrite"))
        assert status == 1 and "Traceback" not in err
        assert f"out of memory{f' ({tried})' if errors.pop(0) in (cuda, host) else ''}: take fewer" in err
    assert len(torch.load(folder / "rm.training/state.pt", weights_only=True)["log"]) == 2
    assert command(train, *words("--resume"))[0] == 0
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (folder / "rm" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_grpo_refuses_before_its_first_step_what_would_not_fit(command, small):
    _, lines, folder = small
    lines[2]["prompt"] = "a" * 3950  # of 4,096 tokens; no pair of these letters is one token
    write(folder / "d.jsonl", *lines)
    words = ["--reward", WEIGHTS / "tiny-rm", "--data", folder / "d.jsonl", "--out", folder / "policy", "--steps", 1]
    status, _, err = command(grpo, *words)
    assert status == 2 and "d.jsonl:3: 8 answers of 32 tokens to it may need" in err and "smaller --group" in err
    assert not (folder / "policy.training").exists()
    status, out, _ = command(grpo, *words, "--keep-going", "--prompts", 1, "--group", 2, "--max-new-tokens", 4)
    assert status == 0, out


def test_an_accuracy_counts_only_records_that_prefer_something(command, small):
    words, lines, folder = small
    write(folder / "test.jsonl", GOOD, GOOD | {"rankings": [1, 1]}, GOOD | {"responses": ["a"], "rankings": [1]})
    status, out, _ = command(train, *words())
    assert status == 0 and "on 1 records it was not trained on" in out and "2 of 3 records" in out
    words = ["--model", WEIGHTS / "tiny-rm", "--data", folder / "test.jsonl", "--json", folder / "e.json"]
    status, out, _ = command(evaluate, *words)
    result = json.loads((folder / "e.json").read_text())
    assert status == 0 and result["items"] == 1 and result["without_preference"] == 2 and "2 of 3 records" in out
