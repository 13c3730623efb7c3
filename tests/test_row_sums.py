"""Sums along the classes: kept apart from what XLA fuses with them, which jax 0.10.2 computes wrongly on CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import covering

import jaxent
from jaxent import torch_compat

# Enough elements under `vmap` for the CPU back end to fuse the row sums: from 2**15 on.
BATCH, ROWS, CLASSES = 64, 64, 10

LABELS = np.arange(ROWS) % CLASSES
TARGETS = np.full((ROWS, CLASSES), 1 / CLASSES, np.float32)
CLASS_WEIGHTS = np.linspace(0.5, 1.5, CLASSES, dtype=np.float32)
OPTIONS: dict[str, Any] = {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1, "z_loss": 0.01}
Function = Callable[[jax.Array], jax.Array]


def _linear(**options: Any) -> Function:
    def loss(z: jax.Array) -> jax.Array:
        out: Any = jaxent.linear_softmax_cross_entropy(
            z, jnp.eye(CLASSES), LABELS, reduction="sum", chunk_rows=32, **options
        )
        return out

    return loss


def _measure(measure: Callable[..., jax.Array], *args: Any) -> Function:
    """Of rows that need not sum to one: a function whose derivatives are all finite."""
    return lambda z: jnp.sum(measure(jnp.exp(z / 4) / CLASSES, *args))


def _joint(measure: Callable[..., jax.Array]) -> Function:
    return lambda z: measure(jnp.exp(z / 4) / (ROWS * CLASSES))


FUNCTIONS: dict[str, Function] = {
    "labels": lambda z: jaxent.softmax_cross_entropy(z, LABELS, reduction="sum"),
    "labels with options": lambda z: jaxent.softmax_cross_entropy(z, LABELS, reduction="sum", **OPTIONS),
    "probabilities": lambda z: jaxent.softmax_cross_entropy(z, TARGETS, reduction="sum"),
    "probabilities with options": lambda z: jaxent.softmax_cross_entropy(z, TARGETS, reduction="sum", **OPTIONS),
    "nll_loss": lambda z: jaxent.nll_loss(z**3, LABELS, reduction="sum"),
    "gradient": lambda z: jnp.sum(jaxent.softmax_cross_entropy_gradient(z, LABELS, reduction="sum", **OPTIONS) ** 2),
    "log-probability": lambda z: jnp.sum(jnp.asarray(jaxent.token_statistics(z, LABELS).log_prob)),
    "log-normalizer": lambda z: jnp.sum(jaxent.token_statistics(z, LABELS).log_normalizer),
    "entropy of logits": lambda z: jnp.sum(jaxent.token_statistics(z).entropy),
    "logit_hessian_product": lambda z: jnp.sum(jaxent.logit_hessian_product(z, z**2) ** 2),
    "divergence of logits": lambda z: jnp.sum(jaxent.kl_divergence_with_logits(z, z[:, ::-1])),
    "twin": lambda z: torch_compat.cross_entropy(z, LABELS, reduction="sum", label_smoothing=0.1),
    "linear": _linear(),
    "linear with options": _linear(**OPTIONS, soft_cap=5.0, temperature=0.5),
    "entropy": _measure(jaxent.entropy),
    "tsallis_entropy": _measure(jaxent.tsallis_entropy, 2.0),
    "renyi_entropy": _measure(jaxent.renyi_entropy, 2.0),
    "kl_divergence": _measure(jaxent.kl_divergence, TARGETS),
    "renyi_divergence": _measure(jaxent.renyi_divergence, TARGETS, 2.0),
    "jensen_shannon_divergence": _measure(jaxent.jensen_shannon_divergence, TARGETS),
    "conditional_entropy": _joint(jaxent.conditional_entropy),
    "mutual_information": _joint(jaxent.mutual_information),
    "renyi_entropy below 1": _measure(jaxent.renyi_entropy, 0.5),
    "renyi_divergence of order 1": _measure(jaxent.renyi_divergence, TARGETS, 1.0),
    "renyi_divergence, rescaled": _measure(jaxent.renyi_divergence, TARGETS, 20.0),
    "hellinger_distance": _measure(jaxent.hellinger_distance, TARGETS),
    "perplexity": _measure(jaxent.perplexity),
    "brier_score": _measure(jaxent.brier_score, TARGETS),
    "generalized_jensen_shannon_divergence": lambda z: jaxent.generalized_jensen_shannon_divergence(
        jnp.exp(z / 4) / CLASSES
    ),
    "normalized_mutual_information": _joint(jaxent.normalized_mutual_information),
    "variation_of_information": _joint(jaxent.variation_of_information),
    "pointwise_mutual_information": lambda z: jnp.sum(
        jaxent.pointwise_mutual_information(jnp.exp(z / 4) / (ROWS * CLASSES)) ** 2
    ),
    "conditional_mutual_information": lambda z: jaxent.conditional_mutual_information(
        jnp.exp(z / 4).reshape(8, 8, CLASSES) / (ROWS * CLASSES)
    ),
}


def _sub_jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from _sub_jaxprs(value.jaxpr)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _sub_jaxprs(entry)


def fusible_row_sums(jaxpr: Any) -> list[str]:
    """The sums along the last axis that are spread over the classes again without a `reduce_precision` in between."""
    found = []
    used_by: dict[Any, list[Any]] = {}
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            if not hasattr(variable, "val"):  # no literal
                used_by.setdefault(variable, []).append(equation)
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}

    def is_kept_apart(variable: Any) -> bool:
        return all(
            use.primitive.name == "reduce_precision" or (out.aval.size <= variable.aval.size and is_kept_apart(out))
            for use in used_by.get(variable, [])
            for out in use.outvars
        )

    for equation in jaxpr.eqns:
        for sub in _sub_jaxprs(tuple(equation.params.values())):
            found += fusible_row_sums(sub)
        if equation.primitive.name != "reduce_sum":
            continue
        (x,), axes = equation.invars, equation.params["axes"]
        summed = [x.aval.shape[axis] for axis in axes]
        trivial = max(summed, default=1) == 1 or len(axes) == x.aval.ndim or x.aval.ndim - 1 not in axes
        integer = not jnp.issubdtype(x.aval.dtype, jnp.floating)
        if not (trivial or integer or is_kept_apart(equation.outvars[0])):
            found.append(f"{x.aval.shape}, made by {made_by[x].primitive if x in made_by else 'an argument'}")
    return found


@pytest.mark.parametrize(("name", "way"), covering(FUNCTIONS, ["forward", "reverse"]))
def test_no_row_sum_of_a_second_derivative_is_fused_with_its_use(name: str, way: str) -> None:
    f = FUNCTIONS[name]

    def product(z: jax.Array, v: jax.Array) -> Any:
        gradient = jax.grad(f)
        return jax.vjp(gradient, z)[1](v) if way == "reverse" else jax.jvp(gradient, (z,), (v,))

    z = jnp.ones((ROWS, CLASSES))
    assert not fusible_row_sums(jax.make_jaxpr(product)(z, z).jaxpr)


def test_the_fusible_form_is_found() -> None:
    def by_hand(z: jax.Array, v: jax.Array) -> jax.Array:
        return v - jnp.sum(z * v, axis=-1, keepdims=True)

    z = jnp.ones((ROWS, CLASSES))
    assert fusible_row_sums(jax.make_jaxpr(by_hand)(z, z).jaxpr) == ["(64, 10), made by mul"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_hessian_products_equal_those_of_one_step_at_a_time(name: str, rng: np.random.Generator) -> None:
    """Above 2**15 elements, where jax 0.10.2 is wrong in the first digit if a row sum is fused."""
    z = jnp.asarray(rng.normal(size=(ROWS, CLASSES)).astype(np.float32))
    steps = jnp.asarray(rng.normal(size=(BATCH, ROWS, CLASSES)).astype(np.float32))

    def product(v: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(FUNCTIONS[name]), (z,), (v,))[1]

    batched, one_by_one = jax.jit(jax.vmap(product))(steps), jax.jit(lambda v: jax.lax.map(product, v))(steps)
    np.testing.assert_allclose(batched, one_by_one, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(one_by_one))))
