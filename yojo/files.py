"""Files, read strictly and written whole; and the one error a user can mend.

A reader either returns what was asked for or raises `InputError` with the file's name. A writer leaves the complete
new file or folder, or what was there before: it writes beside the target and renames at the end. Links are followed;
devices and pipes are written into, never replaced.
"""

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class InputError(ValueError):
    """Bad input: the message names the value that is wrong and the remedy.

    Commands print it as one line and leave with status 2 (`cli.py`). Whatever else is raised is a bug of ours and
    keeps its traceback.
    """


@contextmanager
def passed_over(bad: list[str] | None) -> Iterator[None]:
    """With a list, an `InputError` of the block is put there and not raised."""
    try:
        yield
    except InputError as error:
        if bad is None:
            raise
        bad.append(str(error))


def read_json(path: str | Path) -> dict:
    """One JSON object."""
    return _object(_read(path), str(path))


def read_lines(path: str | Path, bad: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Every line of a JSONL file that is not blank -> ("file:line", its object); or every item of a file that is one
    JSON array -> ("file, item 3", its object). What holds none raises; with a list `bad` it is passed over and its
    error put there."""
    text = _read(path)
    lines = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]  # U+2028 ends none
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # what is no JSON as a whole is named by its line
            lines = [(f"{path}, item {i}", item) for i, item in enumerate(_items(text), 1)]
    for where, line in lines:
        with passed_over(bad):
            yield where, _object(line, where)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark before the text
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null character in the path
        raise InputError(f"{path} cannot be read: {error}") from None


def _items(text: str) -> list[str]:
    """The items of a JSON array, each as it is written."""
    json.loads(text)  # or it is none
    items, at, end = [], text.index("[") + 1, text.rindex("]")
    while (start := re.compile(r"[\s,]*").match(text, at).end()) < end:
        at = json.JSONDecoder().raw_decode(text, start)[1]
        items.append(text[start:at])
    return items


def _object(text: str, where: str) -> dict:
    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(held := dict(pairs)) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise InputError(f"{where} has the key {twice[:80]!r} twice: keep one")
        return held

    try:
        value = json.loads(text, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number without end
        raise InputError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}, not an object")
    return value


@contextmanager
def open_tensors(path: str | Path):
    """A safetensors file, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): fetch or write it again") from None


def check_tensors(where: str | Path, found: Mapping[str, object], expected: Mapping[str, torch.Size]) -> None:
    """`found`: name -> shape. Any missing, unknown or mis-shaped tensor raises with both names and shapes."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [n for n in expected if n in found and tuple(found[n]) != tuple(expected[n])]
    faults = [
        f"{len(names)} {what}: {names[0]}" for what, names in (("missing", missing), ("unknown", unknown)) if names
    ]
    if wrong:
        n = wrong[0]
        faults.append(f"{len(wrong)} of the wrong shape: {n} is {list(found[n])}, expected {list(expected[n])}")
    if faults:
        raise InputError(f"{where} does not hold this model's tensors; " + "; ".join(faults))


def read_tensors(path: str | Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """All tensors of one safetensors file, which must hold exactly the expected names and shapes."""
    with open_tensors(path) as file:
        check_tensors(path, {name: file.get_slice(name).get_shape() for name in file.keys()}, expected)
        return {name: file.get_tensor(name) for name in expected}


def read_pickle(path: str | Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """All tensors of a `.pt` file, which must hold exactly the expected ones. Nothing in the file is ever executed: a
    pickle that asks for more than tensors is refused."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # torch.load raises many kinds
        why = str(error).strip().splitlines()[0]
        raise InputError(f"{path} cannot be read as plain tensors, and nothing in it was executed: {why}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path} must hold a dictionary of tensors")
    check_tensors(path, {name: tensor.shape for name, tensor in tensors.items()}, expected)
    return tensors


def as_path(value: object, name: str) -> Path:
    """An argument that must be a path; name: its own."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name} must be a path, got {value!r:.99}")
    return Path(value)


def followed(path: str | Path) -> Path:
    """What a path names once its links are followed. Links that the system keeps in /proc stay: /dev/stdout leads to
    one, which stands for a file that is open already."""
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"no path can hold a null character: {str(path)!r:.99}")
    for _ in range(40):  # a ring of links is left to whoever opens it
        if not os.path.islink(path) or Path(os.path.realpath(path.parent)).parts[1:2] == ("proc",):
            break
        path = path.parent / os.readlink(path)
    return path


def is_plain(path: str | Path) -> bool:
    """Is it a file or a folder, or nothing yet? Not so is what can only be written into: devices, pipes, and whatever
    stands for an open file."""
    path = followed(path)
    return not os.path.islink(path) and (not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path))


def check_writable(path: str | Path) -> None:
    """Whether `whole_file` could write there, before work is begun that would end there."""
    path = followed(path)
    with _writing(path):
        _check_file(path)
        _check_parent(path)


def check_place(path: str | Path, folder: bool) -> None:
    """The same of a folder (or a file), as far as its neighbours tell."""
    path = followed(path)
    if folder:
        _check_folder(path)
    with _writing(path):
        _check_parent(path)


def _check_parent(path: Path) -> None:
    """Whether something can be made beside it, or in the nearest folder above it that is there."""
    if is_plain(path):
        parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
        probe = parent / _beside(path).name
        try:
            probe.mkdir(0o700)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            with suppress(OSError):
                probe.rmdir()


def _check_file(path: Path) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not is_plain(path) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it cannot be opened for writing", str(path))


def _check_folder(path: Path) -> None:
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isdir(path)):
        raise InputError(f"{path} is no folder: choose another")
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"{path} is the current folder, or one above it: choose another")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes the place of `path` in one step, or is written into
    what is no plain file."""
    path = followed(path)
    with _writing(path):
        _check_file(path)
        plain = is_plain(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path) if plain else Path(tempfile.gettempdir()) / _beside(path).name
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield temporary
            if plain:
                os.chmod(temporary, 0o666 & ~_umask())
                os.replace(temporary, path)
            else:
                with open(path, "ab") as file:  # /dev/stdout may be a file that holds what was printed
                    file.write(temporary.read_bytes())
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """One JSON value, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_lines(path: str | Path, values: Iterable[object]) -> None:
    """JSONL, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


@contextmanager
def whole_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it becomes `path`.

    An existing `path` raises unless `overwrite`; then it stays whole until the new one is, and is put back should that
    fail. A folder can't be replaced in one step: a kill in the instant between two renames leaves the old one, whole,
    under `.<name>.old`, from where the next write of `path` or `restore` puts it back.
    """
    path = followed(path)
    _check_folder(path)
    path = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
    old = _aside(path)
    restore(path)
    if os.path.exists(path) and not overwrite:
        raise InputError(f"{path} exists already: choose another folder, or say --overwrite")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            temporary.mkdir(0o700)
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if os.path.exists(path):
                os.rename(path, old)
            os.rename(temporary, path)
        finally:
            restore(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def restore(path: str | Path) -> None:
    """Put back the folder that an interrupted `whole_folder` had moved aside, if it had."""
    path = followed(path)
    if os.path.exists(_aside(path)) and not os.path.exists(path):
        os.rename(_aside(path), path)


def _beside(path: Path) -> Path:
    """A name for what will become `path`. It is known before anything is made, so that a signal that arrives in the
    instant of making leaves nothing."""
    path = path.absolute()  # "." has no name
    return path.parent / f".{path.name}.{secrets.token_hex(4)}"


def _aside(path: str | Path) -> Path:
    return Path(path).with_name(f".{Path(path).name}.old")


def add_line(path: str | Path, value: object) -> None:
    """One JSON value at the end of a file of such lines."""
    with _writing(Path(path)), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk, a missing right, a folder where a file should be: `InputError`. Errors of other files stay."""
    try:
        yield
    except OSError as error:
        name, here = Path(error.filename or path).absolute(), path.absolute()
        if name not in here.parents and here.parent not in name.parents:
            raise
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
