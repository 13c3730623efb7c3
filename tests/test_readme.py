"""The README is a claim: its code runs, and its outputs are what comes out."""

import doctest
import re
from pathlib import Path

import pytest

from benchmarks import transformations

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.startswith(">>>")])
def test_a_script_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_the_dialogues_print_what_the_readme_says() -> None:
    session = "\n".join(block for block in BLOCKS if block.startswith(">>>"))
    test = doctest.DocTestParser().get_doctest(session, {}, "README.md", "README.md", 0)
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


# Ours are tested one by one elsewhere, and what peers do is the news.
OURS = ("jaxent dense", "jaxent fused")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in OURS else []) for n in transformations.COLUMNS]
)
def test_the_table_of_transformations_is_what_runs(name: str) -> None:
    package, _ = transformations.COLUMNS[name]
    version = transformations.installed(package) or pytest.skip(f"{package} is not installed")
    lines = README.split("<!-- transformations -->\n")[1].split("<!-- transformations ends -->")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    if transformations.heading(name) not in rows[0]:
        pytest.skip(f"the table is of another version than {version}")
    at = rows[0].index(transformations.heading(name))
    assert [(row[0], row[at]) for row in rows[2:]] == list(
        zip(transformations.TRANSFORMATIONS, transformations.column(name), strict=True)
    )


def test_the_first_two_blocks_are_the_two_commands() -> None:
    commands = re.findall(r"^```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert commands[0].strip().endswith("jaxent train")
    assert "pytest" in commands[1]


def test_the_example_is_short() -> None:
    assert len(BLOCKS[0].splitlines()) <= 15
