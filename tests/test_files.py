"""Files of others are read for what they say; what is written replaces a file or a folder, and nothing else.

pytest tests/test_files.py
"""

import json
import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from yojo.files import (
    InputError,
    check_place,
    check_writable,
    is_plain,
    read_json,
    read_lines,
    whole_file,
    whole_folder,
    write_json,
)

LINE = '{"prompt": "a star?", "responses": ["yes", "no"]}'


def lines_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(where.removeprefix(str(path)), item) for where, item in read_lines(path)]


def test_a_mark_before_the_text_is_none_of_it(tmp_path):
    """Editors on Windows write one, and so does Excel."""
    expected = [(":1", json.loads(LINE))]
    assert lines_of(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE.encode()) == expected
    assert lines_of(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE.encode() + b"\r\n") == expected
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + LINE.encode())
    assert read_json(tmp_path / "a.json") == expected[0][1]


@pytest.mark.parametrize("key", ["image", "rankings"])
def test_a_key_that_stands_there_twice_is_refused(tmp_path, key):
    """Other readers take the last one and say nothing; which of two pictures was meant, nobody knows."""
    twice = f'{{"prompt": "?", "{key}": "a", "{key}": "b"}}'
    for text, where in ((twice, ":1"), (f'{LINE}\n{{"x": [{twice}]}}', ":2"), (f"[{LINE}, {twice}]", ", item 2")):
        with pytest.raises(InputError, match=f"a.jsonl{where} has the key '{key}' twice"):
            lines_of(tmp_path / "a.jsonl", text)
    bad = []
    (tmp_path / "a.jsonl").write_text(f"[{LINE}, {twice}, {LINE}]")
    assert len(list(read_lines(tmp_path / "a.jsonl", bad))) == 2 and len(bad) == 1


def test_the_items_of_an_array_are_read_as_lines_are(tmp_path):
    item = json.loads(LINE)
    assert lines_of(tmp_path / "a.json", f" [ {LINE} ,\n\n {LINE}\n]\n") == [(", item 1", item), (", item 2", item)]
    assert lines_of(tmp_path / "a.json", "[]") == []
    with pytest.raises(InputError, match=r"a.json, item 2 holds a JSON list"):
        lines_of(tmp_path / "a.json", f'[{LINE}, ["]", "["]]')
    with pytest.raises(InputError, match=r"a.json:1 is not JSON"):
        lines_of(tmp_path / "a.json", f"[{LINE}, ")


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    """Also a link to a link, a relative one, and one to what is not there yet."""
    (tmp_path / "far").mkdir()
    for name, target in (("a", "far/a.json"), ("b", tmp_path / "a"), ("new", "far/new.json")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "far/a.json").write_text("old")
    for name, file in (("a", "a.json"), ("b", "a.json"), ("new", "new.json")):
        write_json(tmp_path / name, [name])
        assert (tmp_path / name).is_symlink() and json.loads((tmp_path / "far" / file).read_text()) == [name]
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["a.json", "new.json"], "nothing beside"


def test_links_in_dev_lead_to_files_as_elsewhere():
    """/dev/shm is a folder of memory, where links are links."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        (folder / "link").symlink_to("a.json")
        for value in ([1], [2]):
            write_json(folder / "link", value)
            assert json.loads((folder / "a.json").read_text()) == value and (folder / "link").is_symlink()


def test_a_ring_of_links_is_an_error_and_stays(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="cannot write"):
        write_json(tmp_path / "a", 1)
    for check in (lambda: check_writable(tmp_path / "a"), lambda: check_place(tmp_path / "a", folder=True)):
        with pytest.raises(InputError, match="cannot write|no folder"):
            check()
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").is_symlink()


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/run")
    for text in ("first", "second"):
        with whole_folder(tmp_path / "link", overwrite=True) as new:
            (new / "x").write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far/run/x").read_text() == text
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["run"]


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is no folder"), whole_folder(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(InputError, match="it is a folder"):
        write_json(tmp_path, 1)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "sub/..", "/", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_replaced_is_known_before(tmp_path, monkeypatch, name):
    """An unset variable behind --out, most of all."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for check in (lambda: check_place(name, folder=True), whole_folder(name, overwrite=True).__enter__):
        with pytest.raises(InputError, match="current folder, or one above it|cannot write|null character"):
            check()
    assert [path.name for path in tmp_path.iterdir()] == ["sub"] and not (tmp_path.parent / "...training").exists()


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join()
    assert json.loads(got[0]) == {"a": 1} and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_device_is_written_into_and_stays_a_device(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "null"):
        check_writable(path)
        write_json(path, [1])
        assert stat.S_ISCHR(os.stat(path).st_mode) and not is_plain(path)
    assert (tmp_path / "null").is_symlink()
    with pytest.raises(InputError, match="cannot write /dev/full: No space left"):
        write_json("/dev/full", [1])
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_what_an_open_file_is_called_is_written_behind_what_it_holds(tmp_path):
    """`--json /dev/stdout > file`: the file that the shell has opened is not replaced under its hands."""
    with open(tmp_path / "out", "w") as file:
        file.write("printed\n")
        file.flush()
        write_json(f"/dev/fd/{file.fileno()}", [1])
        assert os.stat(tmp_path / "out").st_ino == os.fstat(file.fileno()).st_ino
    assert (tmp_path / "out").read_text().split("\n", 1)[0] == "printed"
    assert json.loads((tmp_path / "out").read_text().split("\n", 1)[1]) == [1]


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "deep/new", "/dev/null"):
        check_writable(path)
    assert (tmp_path / "file").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["file"]
    for path in (tmp_path, tmp_path / "file/below", "/proc/none/x.json"):
        with pytest.raises(InputError, match="cannot write"):
            check_writable(path)


@pytest.mark.parametrize(
    "make, call",
    [
        (lambda path: whole_folder(path).__enter__(), "mkdir"),
        (lambda path: whole_file(path).__enter__(), "open"),
        (lambda path: check_place(path, folder=True), "mkdir"),
    ],
)
def test_a_signal_in_the_instant_in_which_something_is_made_leaves_nothing(make, call, tmp_path, monkeypatch):
    """A signal that comes while the system makes a file or a folder is raised as soon as that is done."""
    system = getattr(os, call)

    def interrupted(*args, **more):
        system(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_none_is_refused_like_any_folder(tmp_path, monkeypatch):
    """ "." has no name to write beside."""
    monkeypatch.chdir(tmp_path)
    check_place(".", folder=False)
    with pytest.raises(InputError, match="folder"), whole_file("."):
        pass
    assert not list(tmp_path.iterdir())
