"""Every example in a docstring runs, under the strict settings of conftest.py."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

MODULES = ["jaxent", *(m.name for m in pkgutil.walk_packages(jaxent.__path__, "jaxent."))]


@pytest.mark.rows(8)
@pytest.mark.parametrize("name", [n for n in MODULES if not n.endswith("__main__")])
def test_examples(name: str):
    module = importlib.import_module(name)
    scope = {"jax": jax, "jnp": jnp, "np": np, "jaxent": jaxent, **vars(jaxent), **vars(module)}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=scope):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
