"""The lessons as notebooks. They are made from the Markdown, which is what the tests run.

python -m tutorials.notebooks          writes all of them again into tutorials/notebooks/

Prose stays prose, and the examples of a block become cells: one ends where something is printed, and what is printed
stands below it as text. No output is stored, since last digits depend on the processor.
"""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
FOLDER = HERE / "notebooks"
LESSONS = sorted(HERE.glob("[0-9]*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
CONSOLE = re.compile(r"Run\s+the\s+examples\s+from\s+the\s+repository's\s+root,\s+in\s+`python`\.")
START = """import os

if not os.path.isdir("yojo"):
    os.chdir("../..")  # to the repository's root, where the paths below begin"""


def notebook(lesson: Path) -> str:
    """The notebook of a lesson, as its file holds it."""
    title, text = lesson.read_text(encoding="utf-8").split("\n", 1)
    note = f"{title}\n\nMade from [{lesson.name}](../{lesson.name}). Run the cells in order; the first one goes to the "
    note += "repository's root. Below a cell stands what it should print (lines may break elsewhere)."
    cells = [new_markdown_cell(note), new_code_cell(START), *cells_of(CONSOLE.sub("", text))]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"  # or it would be random
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    made = new_notebook(cells=cells, metadata=kernel | {"language_info": {"name": "python"}})
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def cells_of(text: str) -> Iterator[nbformat.NotebookNode]:
    prose, *rest = BLOCK.split(text)  # prose, block, prose, block, ..., prose
    for block, after in zip(rest[::2], rest[1::2], strict=True):
        code = ""
        for example in doctest.DocTestParser().get_examples(block):
            if prose.strip():
                yield prose_cell(prose)
                prose = ""
            code += example.source
            if example.want:
                yield new_code_cell(code.rstrip())
                yield new_markdown_cell(f"*should print*\n\n```text\n{example.want}```")
                code = ""
        if code:
            yield new_code_cell(code.rstrip())
        prose = after
    yield prose_cell(prose)


def prose_cell(prose: str) -> nbformat.NotebookNode:
    return new_markdown_cell(LINK.sub(from_the_folder, prose.strip()))


def from_the_folder(link: re.Match) -> str:
    """A link of a lesson, as it must read one folder below. What leads to a lesson leads to its notebook."""
    target = link[1]
    return f"]({Path(target).stem}.ipynb)" if HERE / target in LESSONS else f"](../{target})"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for lesson in LESSONS:
        path = FOLDER / f"{lesson.stem}.ipynb"
        path.write_text(notebook(lesson), encoding="utf-8", newline="\n")
        print(path)
