"""The programs of `tests/examples`, which assert what they show, as their readers run them: with JAX's own defaults."""

import re
import runpy
from pathlib import Path

import jax
import pytest

EXAMPLES = sorted(Path(__file__).with_name("examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_what_the_example_shows(example: Path):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax and flax need both
        runpy.run_path(str(example), run_name="__main__")


def test_the_readme_lists_every_example():
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert re.findall(r"\(tests/examples/(\w+)\.py\)", readme) == [path.stem for path in EXAMPLES]
