"""Every example in a docstring runs, under the strict settings of conftest.py."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent


def _examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = []
    for name in ["jaxent", *(m.name for m in pkgutil.walk_packages(jaxent.__path__, "jaxent."))]:
        if not name.endswith("__main__"):
            module = importlib.import_module(name)
            scope = {"jax": jax, "jnp": jnp, "np": np, "jaxent": jaxent, **vars(jaxent), **vars(module)}
            examples += [t for t in finder.find(module, name, globs=scope) if t.examples]
    return examples


@pytest.mark.parametrize("example", _examples(), ids=lambda e: e.name)
def test_example(example: doctest.DocTest):
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    assert result.failed == 0, "".join(report)
