"""The recipes of the page on optax, with gradients, at easy and at impossible examples."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference as ref
from cases import covering
from small_call import Call, close, jaxent

ROOT = Path(__file__).resolve().parents[2]


def recipe(call: str) -> str:
    """The right column of the table of optax's losses."""
    for line in (ROOT / "docs" / "optax_flax.md").read_text().splitlines():
        if line.startswith("|") and f"`{call}(" in line.split("|")[1]:
            return line.replace(r"\|", "\0").split("|")[2].replace("\0", "|").split("`")[1]
    raise LookupError(call)


def evaluate(call: str, **names: Any) -> jax.Array:
    return eval(recipe(call), {**vars(jaxent), "jnp": jnp, "jax": jax, **names})


@pytest.mark.parametrize(("gamma", "kind"), covering([0.0, 0.5, 1.5, 2.0], [float, jnp.float32]))
def test_focal_recipe(gamma: float, kind: Call) -> None:
    z = jnp.array([-100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1000.0, -1000.0])

    @jax.jit
    def loss_and_gradient(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        f = lambda z: evaluate("sigmoid_focal_loss", z=z, t=t, g=kind(gamma))  # noqa: E731
        return f(z), jax.grad(lambda z: f(z).sum())(z)

    for label in (0.0, 1.0):
        t = jnp.full(z.shape, label)
        ce = ref.sigmoid_nll(z, t)
        miss = -np.expm1(-ce)  # 1 - p of the label
        loss, gradient = loss_and_gradient(t)
        close(loss, ce * miss**gamma, rtol=1e-5, atol=1e-30)
        slope = (1 - 2 * label) * (miss + gamma * (1 - miss) * ce) * miss**gamma
        close(gradient, slope, rtol=1e-4, atol=1e-30)
        middle = np.abs(z) < 50
        close(loss[middle], optax.losses.sigmoid_focal_loss(z[middle], t[middle], gamma=gamma), rtol=1e-4)


@pytest.mark.parametrize("call", ["kl_divergence", "kl_divergence_with_log_targets"])
def test_divergence_recipes(call: str) -> None:
    p, log_q = jnp.array([0.0, 0.25, 0.75]), jax.nn.log_softmax(jnp.array([1.0, -2.0, 0.5]))
    names = {"log_q": log_q} | ({"p": p} if call == "kl_divergence" else {"log_p": jnp.log(p)})
    want = (ref.wide(p[1:]) * (np.log(ref.wide(p[1:])) - ref.wide(log_q[1:]))).sum()
    close(evaluate(call, **names), want)
    gradient = jax.grad(lambda x: evaluate(call, **{**names, "log_q": x}).sum())(log_q)
    step = jnp.array([1.0, -1.0, 0.5])
    step -= (jnp.exp(log_q) * step).sum()  # keeps sum(q) at one
    close((gradient * step).sum(), -(p * step).sum())
    assert np.all(np.isfinite(gradient))
    if call == "kl_divergence":
        by_p = jax.grad(lambda p: evaluate(call, **{**names, "p": p}).sum())(p)
        assert np.all(np.isfinite(by_p)), by_p
        slope = np.log(ref.wide(p[1:])) - ref.wide(log_q[1:])
        close(by_p[1] - by_p[2], slope[0] - slope[1])


def test_poly_recipe() -> None:
    names = {"y": jnp.array(0), "e": 2.0}
    loss_and_gradient = jax.jit(jax.value_and_grad(lambda z: evaluate("poly_loss_cross_entropy", z=z, **names)))
    for z in ([0.0, 0.0], [100.0, -100.0], [-100.0, 100.0], [1000.0, 0.0], [3.0, -np.inf]):
        ce = ref.nll(z, 0)
        loss, gradient = loss_and_gradient(jnp.array(z))
        close(loss, ce - 2 * np.expm1(-ce), rtol=1e-5)
        close(gradient, (1 + 2 * np.exp(-ce)) * (ref.softmax(z) - [1, 0]), rtol=1e-5)


def test_other_recipes_have_finite_gradients() -> None:
    z, y, t = jnp.array([[100.0, -100.0], [-100.0, 100.0]]), jnp.array([0, 0]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    for call, names in {
        "softmax_cross_entropy": {"p": t},
        "softmax_cross_entropy_with_integer_labels": {"y": y},
        "sigmoid_binary_cross_entropy": {"t": t},
    }.items():
        assert np.all(np.isfinite(jax.grad(lambda z: evaluate(call, z=z, **names).sum())(z)))  # noqa: B023
