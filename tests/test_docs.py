"""The documentation is a claim: its code runs, its outputs are what comes out, and it has every public name."""

import doctest
import re
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

import jaxent

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    pytest.param(path, marks=() if path.stem == "index" else pytest.mark.grid, id=path.stem)
    for path in sorted(DOCS.glob("*.md"))
]
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: Path):
    """The blocks of a page share their names, as a reader would type them one after the other."""
    scope: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as readers have it
        for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == "python":
                exec(compile(code, page.name, "exec"), scope)
            else:
                test = doctest.DocTestParser().get_doctest(code, scope, page.name, page.name, 0)
                runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
                assert runner.run(test, clear_globs=False).failed == 0
                scope.update(test.globs)


@pytest.mark.grid
def test_the_notebook_runs_and_prints_what_it_shows():
    notebook = nbformat.read(DOCS / "from_surprise_to_loss.ipynb", as_version=4)
    shown = printed(notebook)
    NotebookClient(notebook, timeout=300).execute()
    assert printed(notebook) == shown


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell prints, its numbers to four digits: processors differ in the last one."""
    texts = [
        "".join(o.get("text", "") for o in cell.get("outputs", []) if o.get("name") == "stdout")
        for cell in notebook.cells
    ]
    return [re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.4g}", text) for text in texts]


def test_the_reference_has_every_public_name():
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("api/*.md"))
    assert sorted(re.findall(r"^::: jaxent(?:\.token_statistics)?\.(\w+)$", pages, flags=re.MULTILINE)) == sorted(
        [*jaxent.__all__, "torch_compat"]
    )


def test_every_page_is_in_the_navigation():
    navigation = DOCS.parent.joinpath("mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(re.findall(r"([\w/]+\.md)$", navigation, flags=re.MULTILINE)) == pages
