"""The README is a claim: its code runs, its commands come first, and its table of transformations is what runs."""

import re
from pathlib import Path

import pytest

from benchmarks import transformations

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY.joinpath("README.md").read_text(encoding="utf-8")
HIDDEN_STATES = REPOSITORY.joinpath("docs", "hidden_states.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.rows
@pytest.mark.parametrize("block", BLOCKS)
def test_a_script_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


# Ours are tested one by one elsewhere, and what peers do is the news.
OURS = ("jaxent dense", "jaxent fused")


@pytest.mark.grid
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in OURS else []) for n in transformations.COLUMNS]
)
def test_the_table_of_transformations_is_what_runs(name: str) -> None:
    package, _ = transformations.COLUMNS[name]
    version = transformations.installed(package) or pytest.skip(f"{package} is not installed")
    lines = HIDDEN_STATES.split("<!-- transformations -->\n")[1].split("<!-- transformations ends -->")[0].splitlines()
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


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
