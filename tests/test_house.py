"""The house: the method in `core/` uses nothing that serves it but `files.py`, `media.py`, `video.py` and `unread.py`,
nothing imports a command, and the part that is to be read stays short.

    pytest tests/test_house.py
    python tests/test_house.py            # code lines of every file, the reading path apart
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

YOJO = Path(__file__).resolve().parent.parent / "yojo"
FILES = {".".join(path.relative_to(YOJO.parent).with_suffix("").parts): path for path in YOJO.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CORE = sorted(name for name in FILES if name.startswith("yojo.core."))
GUARD = ast.dump(ast.parse('__name__ == "__main__"', mode="eval").body)
COMMANDS = {n for n, t in TREES.items() if any(isinstance(x, ast.If) and ast.dump(x.test) == GUARD for x in t.body)}
SERVES_CORE = {"yojo.files", "yojo.media", "yojo.video", "yojo.unread"}
PACKAGES = {"PIL", "numpy", "tokenizers", "torch", "tqdm"}  # that core may use
EXCEPTION = {("yojo.core.reward", "RewardModel", method, "yojo.store") for method in ("new", "load", "save")}
EXCEPTION |= {("yojo.core.prompt", "Processor", "from_folder", "yojo.settings")}
TYPES = ("yojo.core.molmo2", "if TYPE_CHECKING", "", "yojo.core.generate")  # the network names the cache's types
CONTENTS = re.findall(r"^ {4}([* ]) (\w+)\.py ", ast.get_docstring(TREES["yojo.core.__init__"]), re.MULTILINE)
READING_PATH = [name for star, name in CONTENTS if star == "*"]


def imports(name: str) -> list[tuple[str, str, str, str]]:
    """(importing module, class or other place, method, imported module) of every import in a file; places are "" at the
    module's level."""
    found = []

    def visit(node: ast.AST, scope: tuple[str, ...]) -> None:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            scope = (*scope, node.name)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            scope = (*scope, "if TYPE_CHECKING")
        if isinstance(node, ast.Import):
            found.extend((scope, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend((scope, inside if inside in FILES else node.module) for inside in inner)
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(TREES[name], ())
    return [(name, *(*scope, "", "")[:2], module) for scope, module in found]


@pytest.mark.parametrize("name", CORE)
def test_the_method_imports_nothing_that_serves_it(name):
    ours = {i for i in imports(name) if i[3].split(".")[0] == "yojo"}
    assert {i for i in ours if i[3] not in {*CORE, "yojo.core", *SERVES_CORE}} <= EXCEPTION
    others = {module.split(".")[0] for *_, module in set(imports(name)) - ours}
    assert others <= PACKAGES | sys.stdlib_module_names


def test_the_method_can_be_read_from_top_to_bottom():
    """Its table of contents names every file, and each imports only files above it."""
    names = [f"yojo.core.{name}" for _, name in CONTENTS]
    assert sorted(names) == [name for name in CORE if name != "yojo.core.__init__"]
    made = [i for name in names for i in imports(name) if i[3] in names]
    assert {i for i in made if names.index(i[3]) >= names.index(i[0])} == {TYPES}


def test_what_the_method_uses_does_not_know_the_method():
    ours = {module for name in SERVES_CORE for *_, module in imports(name) if module.split(".")[0] == "yojo"}
    assert ours <= SERVES_CORE


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_imports_a_command(name):
    """Nor the package as a whole, nor by a name that is made while it runs: such an import could be of anything."""
    assert not (COMMANDS | {"yojo"}) & {module for *_, module in imports(name)}
    assert not {"import_module", "__import__"} & words(name)


def test_the_commands_are_known():
    """Or the rule above would hold of nothing."""
    names = "bench checkpoint claims evaluate flops grpo hacking pretrain score train votes".split()
    assert {f"yojo.{name}" for name in names} == COMMANDS


def words(name: str) -> set[str]:
    """All names that a file uses."""
    nodes = list(ast.walk(TREES[name]))
    return {x.id for x in nodes if isinstance(x, ast.Name)} | {x.attr for x in nodes if isinstance(x, ast.Attribute)}


@pytest.mark.parametrize("name", [name for name in CORE if name != "yojo.core.parallel"])
def test_core_files_do_not_ask_which_process_they_are(name):
    """Only `parallel.py` does; the others share, say and show through it, by its own name."""
    assert not {"distributed", "get_rank", "RANK"} & words(name)
    nodes = list(ast.walk(TREES[name]))
    used = {x.attr for x in nodes if isinstance(x, ast.Attribute) and ast.unparse(x.value) == "parallel"}
    assert used <= {"share", "add_up", "say", "progress"}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.module != "yojo.core.parallel"
            assert not [alias for alias in node.names if alias.name == "parallel" and alias.asname]


def test_an_installed_package_has_every_folder():
    project = tomllib.loads((YOJO.parent / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.parent.relative_to(YOJO.parent).parts) for path in YOJO.rglob("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text = path.read_text(encoding="utf-8")
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in silent]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_reading_path_stays_short():
    assert READING_PATH == "image mask prompt lora molmo2 reward loss training".split()
    assert sum(code_lines(YOJO / "core" / f"{name}.py") for name in READING_PATH) <= 1000


if __name__ == "__main__":
    path = {f"yojo.core.{name}" for name in READING_PATH}
    for title, names in (("the reading path", path), ("the rest", FILES.keys() - path)):
        sizes = {name: code_lines(FILES[name]) for name in sorted(names)}
        print(
            title, *(f"{size:5d} {name}" for name, size in sizes.items()), f"{sum(sizes.values()):5d} in all", sep="\n"
        )
