"""The README is a claim: its code runs, and its outputs are what comes out."""

import doctest
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.startswith(">>>")])
def test_a_script_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_the_dialogues_print_what_the_readme_says() -> None:
    session = "\n".join(block for block in BLOCKS if block.startswith(">>>"))
    names = {"jax": jax, "jnp": jnp}
    test = doctest.DocTestParser().get_doctest(session, names, "README.md", "README.md", 0)
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


def test_the_first_two_blocks_are_the_two_commands() -> None:
    commands = re.findall(r"^```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert commands[0].strip().endswith("jaxent train")
    assert "pytest" in commands[1]
