"""What has to hold of the installed wheel. Run by the Python that has it, from outside of the repository."""

import importlib.metadata
import math
import subprocess
import sys
import sysconfig
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxent
import jaxent.torch_compat

installed = Path(sysconfig.get_path("purelib"))
assert Path(jaxent.__file__).is_relative_to(installed), jaxent.__file__
assert jaxent.__version__ == importlib.metadata.version("jaxent")
assert resources.files("jaxent").joinpath("py.typed").is_file()

value, gradient = jax.value_and_grad(jaxent.softmax_cross_entropy)(jnp.zeros(4), jnp.array(1))
assert math.isclose(value, math.log(4), rel_tol=1e-6)
assert jnp.allclose(gradient, jnp.array([0.25, -0.75, 0.25, 0.25]))
assert math.isclose(jaxent.torch_compat.CrossEntropyLoss()(jnp.zeros((1, 4)), jnp.array([1])), value, rel_tol=1e-6)

help_text = subprocess.run(
    [Path(sys.executable).with_name("jaxent"), "--help"], check=True, capture_output=True, text=True
)
assert "train" in help_text.stdout
print(f"jaxent {jaxent.__version__} runs from {installed}")
