"""Prints and signals end no command before its time, and what was found is kept.

pytest tests/test_terminal.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from yojo import bench, evaluate, runs, score, terminal
from yojo.cli import WEIGHTS, Parser, in_processes, run
from yojo.core.training import FitConfig, fit
from yojo.files import InputError
from yojo.terminal import stopping_by_exception, unbroken

ROOT = Path(__file__).resolve().parent.parent
HERE = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def typed(words: str, folder: Path, **environment) -> tuple[int, str, str]:
    """A command line of the shell, as a user types it -> the status of our part, what is seen, and errors."""
    line = words.replace("yojo.", f"{sys.executable} -m yojo.")
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        env=HERE | environment,
        cwd=folder,
        check=False,
        capture_output=True,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


@pytest.fixture
def folder(tmp_path):
    """Records in Japanese; many; and some of which the third shows a broken picture."""
    lines = [{"prompt": "星は?", "responses": ["赤い星", f"star {i}"], "rankings": [1, 2]} for i in range(200)]
    Image.effect_noise((60, 60), 60).save(tmp_path / "ok.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "ok.jpg").read_bytes()[:700])
    late = [line | {"image": "cut.jpg" if i == 2 else "ok.jpg"} for i, line in enumerate(lines[:4])]
    for name, some in (("few", lines[:2]), ("many", lines), ("late", late)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return tmp_path


def found(folder: Path) -> list | dict:
    return json.loads((folder / "s.json").read_text())


def test_a_terminal_that_lacks_characters_shows_others(folder):
    status, out, err = typed("yojo.score --tiny --data few.jsonl --json s.json", folder, PYTHONIOENCODING="ascii")
    assert status == 0 and err == "" and out.count("???\n") == 4 and len(found(folder)) == 2


def test_a_pipe_that_closes_ends_nothing(folder):
    """Two hundred tables are more than a pipe holds."""
    status, out, err = typed("yojo.score --tiny --data many.jsonl --json s.json | head -1", folder)
    assert (status, err, out.count("\n")) == (0, "", 1) and len(found(folder)) == 200
    assert typed("yojo.score --tiny --data many.jsonl 2>&1 | head -1", folder)[::2] == (0, "")


def test_closed_streams_end_nothing(folder):
    assert typed("yojo.score --tiny --data many.jsonl --json s.json >&- 2>&-", folder)[0] == 0
    assert len(found(folder)) == 200


def test_a_full_disk_behind_a_print_is_an_error_and_loses_no_scores(folder):
    status, _, err = typed("yojo.score --tiny --data many.jsonl --json s.json > /dev/full", folder)
    assert status == 2 and err.endswith("score: cannot print: No space left on device\n") and len(found(folder)) == 200


def test_results_can_go_where_tables_go(folder):
    status, _, _ = typed("yojo.score --tiny --data few.jsonl --json /dev/stdout > both.txt", folder)
    text = (folder / "both.txt").read_text()
    assert status == 0 and text.startswith("mode: joint") and len(json.loads(text[text.index("\n[\n") :])) == 2


def test_a_record_that_fails_loses_no_score_before_it(command, folder):
    status, _, err = command(score, "--tiny", "--data", folder / "late.jsonl", "--json", folder / "s.json")
    assert status == 2 and "late.jsonl:3: " in err
    first, second, error = found(folder)
    assert len(first["scores"]) == len(second["scores"]) == 2 and "late.jsonl:3: " in error["error"]


def test_an_evaluation_that_fails_keeps_its_scores(command, folder):
    words = ["--model", WEIGHTS / "tiny-rm", "--data", folder / "late.jsonl", "--json", folder / "s.json"]
    status, _, err = command(evaluate, *words)
    assert status == 2 and "late.jsonl:3: " in err
    assert len(found(folder)["scores"]) == 2 and "late.jsonl:3: " in found(folder)["error"]


def test_a_bench_that_fails_keeps_its_rows(command, folder, monkeypatch):
    real = bench.score_n

    def failing(s, n, *more):
        if n == 3:
            raise ZeroDivisionError("no room")
        return real(s, n, *more)

    monkeypatch.setattr(bench, "score_n", failing)
    words = "score --size tiny --n 2 3 --rounds 1 --dtypes float32 --prompt-tokens 60 --response-tokens 5 --json"
    with pytest.raises(ZeroDivisionError):  # a bug: the traceback stays
        command(bench, *words.split(), folder / "s.json")
    *rows, error = found(folder)
    assert {row["n"] for row in rows} == {2} and "no room" in error["error"]


@pytest.mark.parametrize("option", ["--json", "--draw-mask", "--html"])
def test_where_results_are_to_go_is_tried_before(command, monkeypatch, tmp_path, option):
    """Not after hours of work."""
    monkeypatch.setattr(score, "prompts", lambda args: pytest.fail("work was begun"))
    for path in (tmp_path, "/proc/none/x.json"):
        status, _, err = command(score, "--tiny", option, path)
        assert status == 2 and "cannot write" in err


@pytest.mark.parametrize("words", ["--json in.jsonl", "--draw-mask in.jsonl", "--json a --html ./a"])
def test_no_option_writes_over_what_another_reads_or_writes(command, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "?", "responses": ["a"]}')
    status, _, err = command(score, "--tiny", "--data", "in.jsonl", *words.split())
    assert status == 2 and "both name" in err and "responses" in (tmp_path / "in.jsonl").read_text()


@pytest.mark.parametrize("words", ["--image p.png --image ./q.png --html q.png", "--video p.png --json p.png"])
def test_no_option_writes_over_a_picture_that_is_shown(command, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for name in ("p.png", "q.png"):
        Image.new("RGB", (9, 9)).save(name)
    status, _, err = command(score, "--tiny", "--prompt", "?", "--response", "a", *words.split())
    assert status == 2 and "both name" in err
    assert all(Image.open(name).size == (9, 9) for name in ("p.png", "q.png"))


def test_what_failed_before_anything_was_found_leaves_what_was_there(command, folder):
    (folder / "s.json").write_text('"older"')
    assert command(score, "--tiny", "--data", folder / "none.jsonl", "--json", folder / "s.json")[0] == 2
    assert found(folder) == "older"


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(autouse=True)
def signals_that_are_heard():
    """A shell's background jobs ignore SIGINT, `nohup` SIGHUP, and so would what these tests start."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in terminal.STOPS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_a_signal_waits_for_what_must_not_be_broken(number, raised):
    done = []
    with stopping_by_exception(), pytest.raises(raised):  # noqa: PT012
        with unbroken():
            with unbroken():
                signal.raise_signal(number)
            done.append(1)
        done.append(2)
    assert done == [1]


def test_a_second_signal_does_not_break_off_what_the_first_one_began(monkeypatch):
    """A closed terminal sends two, and people press Ctrl-C twice. Later ones are heard again."""
    done = []
    with stopping_by_exception():
        try:
            signal.raise_signal(signal.SIGHUP)
        except SystemExit:
            signal.raise_signal(signal.SIGTERM)
            done.append("on the way to the save")
            with unbroken():
                signal.raise_signal(signal.SIGINT)
            done.append("and after it")
        monkeypatch.setattr(terminal, "ONE", 0.0)
        monkeypatch.setitem(terminal._held, "until", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(done) == 2


@pytest.mark.parametrize("place, moment", [(runs, "unbroken"), (torch.optim.AdamW, "step")])
def test_a_signal_at_the_edge_of_an_update_loses_no_step(tmp_path, monkeypatch, place, moment):
    """Just before signals wait, and while they do."""
    w, real, calls = torch.nn.Parameter(torch.zeros(3)), getattr(place, moment), []

    def edge(*self):
        calls.append(1)
        if len(calls) == 12:
            signal.raise_signal(signal.SIGTERM)
        return real(*self)

    monkeypatch.setattr(place, moment, edge)
    with stopping_by_exception(), pytest.raises(SystemExit):
        fit(lambda *_: ((w - 1).square().sum(), {}), [w], FitConfig(steps=99, save_every=99), runs.SavedRun(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().count("\n")
    saved = len(torch.load(tmp_path / "state.pt", weights_only=True)["log"])
    assert 8 < lines <= saved <= lines + 1, "the line of a step may be missing, which a resume writes again"


def test_a_signal_that_a_library_swallows_is_raised_again(monkeypatch):
    """In a destructor, an exception is only printed."""
    monkeypatch.setattr(terminal, "ONE", 0.0)
    with stopping_by_exception(), pytest.raises(SystemExit):
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        with unbroken():
            pass
        pytest.fail("a batch system asks but once")


def test_a_signal_whose_exception_becomes_another_is_still_a_stop(monkeypatch, tmp_path, capsys):
    def work(args):
        args.found = [1]

        class Odd:
            def __set_name__(self, owner, name):
                signal.raise_signal(signal.SIGTERM)

        type("Library", (), {"odd": Odd()})  # Python 3.11 makes a RuntimeError of it

    monkeypatch.setattr("sys.argv", ["made", "--json", str(tmp_path / "s.json")])
    with pytest.raises(SystemExit) as stop:
        run(Parser(prog="made"), work)
    assert stop.value.code == 143 and found(tmp_path) == [1, {"error": "interrupted"}]
    assert "Traceback" not in capsys.readouterr().err


def test_handlers_are_put_back_and_those_who_ignore_go_on_to(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stopping_by_exception():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


STATUSES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]


@pytest.mark.parametrize("number, status", [*STATUSES, (signal.SIGXCPU, 152)])
def test_a_command_that_is_stopped_keeps_what_it_found(monkeypatch, tmp_path, number, status):
    def work(args):
        args.found = [1, 2]
        signal.raise_signal(number)

    monkeypatch.setattr("sys.argv", ["made", "--json", str(tmp_path / "s.json")])
    with pytest.raises(SystemExit) as stop:
        run(Parser(prog="made"), work)
    assert stop.value.code == status and found(tmp_path) == [1, 2, {"error": "interrupted"}]


def wait_for(seconds: float, marks: Path) -> None:
    (marks / str(os.getpid())).touch()
    time.sleep(seconds)


def give_up(why: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_is_stopped_ends_its_workers_at_once(tmp_path, number, status):
    code = "from test_terminal import *; "
    code += f"run(Parser(prog='made'), lambda args: in_processes(wait_for, [(60, Path({str(tmp_path)!r}))] * 3))"
    environment = HERE | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as command:
        while len(list(tmp_path.iterdir())) < min(2, os.cpu_count()) and command.poll() is None:
            time.sleep(0.05)
        start = time.monotonic()
        os.killpg(command.pid, signal.Signals[number])  # as a terminal does
        assert command.wait(30) == status and time.monotonic() - start < 20
        assert command.stderr.read() == "", "quietly"
    for worker in tmp_path.iterdir():
        assert not Path(f"/proc/{worker.name}").exists()


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(InputError, match="the process of give_up was killed: too little memory"):
        in_processes(give_up, [("?",)])
