"""The house: the method in `core/` knows of nothing that serves it, nothing imports a command, and the part that is to
be read stays short.

    pytest tests/test_house.py
    python tests/test_house.py            # code lines of every file, the reading path apart
"""

import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path

import pytest

YOJO = Path(__file__).resolve().parent.parent / "yojo"
FILES = {".".join(("yojo", *path.relative_to(YOJO).with_suffix("").parts)): path for path in YOJO.rglob("*.py")}
COMMANDS = {name for name, path in FILES.items() if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")}
SERVES_CORE = {"yojo.files", "yojo.media"}
EXCEPTION = {("yojo.core.reward", "RewardModel", method, "yojo.store") for method in ("new", "load", "save")}
TABLE = ast.get_docstring(ast.parse(FILES["yojo.core.__init__"].read_text(encoding="utf-8")))
CONTENTS = re.findall(r"^([* ]) (\w+)\.py ", TABLE, re.MULTILINE)  # of core/, and whether it is on the reading path
READING_PATH = [name for star, name in CONTENTS if star == "*"]


def imports(name: str) -> list[tuple[str, str, str, str]]:
    """(importing module, class, method, imported module) of every import of the package, class and method "" where it
    stands at the module's level."""
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), []

    def visit(node: ast.AST, scope: tuple[str, ...]) -> None:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            scope = (*scope, node.name)
        if isinstance(node, ast.Import):
            found.extend((scope, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend((scope, inside if inside in FILES else node.module) for inside in inner)
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(tree, ())
    return [(name, *(*scope, "", "")[:2], module) for scope, module in found if module.split(".")[0] == "yojo"]


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith("yojo.core.") and n != "yojo.core.__init__"))
def test_the_method_imports_nothing_that_serves_it(name):
    others = {i for i in imports(name) if not i[3].startswith("yojo.core.") and i[3] not in SERVES_CORE}
    assert others <= EXCEPTION


def test_the_method_can_be_read_from_top_to_bottom():
    """Its table of contents names every file, and each imports only files above it; for its types alone, `molmo2.py`
    names the cache of the file below it."""
    names = [f"yojo.core.{name}" for _, name in CONTENTS]
    assert sorted(names) == sorted(n for n in FILES if n.startswith("yojo.core.") and n != "yojo.core.__init__")
    backwards = {(n, m) for n in names for *_, m in imports(n) if m in names and names.index(m) >= names.index(n)}
    assert backwards == {("yojo.core.molmo2", "yojo.core.generate")}


def test_what_the_method_uses_does_not_know_the_method():
    assert not [i for name in SERVES_CORE for i in imports(name) if i[3] not in SERVES_CORE]


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_imports_a_command(name):
    assert not COMMANDS & {module for *_, module in imports(name)}


def test_the_commands_are_known():
    """Or the rule above would hold of nothing."""
    names = "bench checkpoint evaluate flops grpo hacking pretrain score train votes".split()
    assert {f"yojo.{name}" for name in names} == COMMANDS


def test_an_installed_package_has_every_folder():
    project = tomllib.loads((YOJO.parent / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.parent.relative_to(YOJO.parent).parts) for path in YOJO.rglob("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_core_files_do_not_ask_which_process_they_are():
    """Only `parallel.py` does; the others say and show through it."""
    asking = [n for n, path in FILES.items() if "parallel.first()" in path.read_text(encoding="utf-8")]
    assert sorted(asking) == ["yojo.runs", "yojo.train"]


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
    assert sum(code_lines(YOJO / "core" / f"{name}.py") for name in READING_PATH) <= 1100


if __name__ == "__main__":
    path = {f"yojo.core.{name}" for name in READING_PATH}
    for title, names in (("the reading path", path), ("the rest", FILES.keys() - path)):
        sizes = {name: code_lines(FILES[name]) for name in sorted(names)}
        print(
            title, *(f"{size:5d} {name}" for name, size in sizes.items()), f"{sum(sizes.values()):5d} in all", sep="\n"
        )
