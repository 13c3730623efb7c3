"""Every public family of functions under every setting of JAX that people switch on, and exported for every platform.

The suite itself runs with strict promotion of dtypes, and with rank promotion and every warning, deprecations among
them, as errors (conftest.py, pyproject.toml). `jax_debug_nans` under `jax.disable_jit` is not tried: it trips on the
constants that stand for an answer of nan.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST

import jaxent
from jaxent import torch_compat

ROWS, FEATURES, CLASSES = 5, 2, 3
LABELS = np.array([0, 2, -100, 1, 0], np.int32)
COUNTED = LABELS >= 0
Program = Callable[[Any, Any, Any, Any], Any]


def arrays(dtype: Any = np.float32) -> list[np.ndarray]:
    """Logits, probabilities, hidden states and a kernel: a class removed, a tiny loss, an ignored row of nan."""
    rng = np.random.default_rng(0)
    z, h, w = rng.normal(size=(ROWS, CLASSES)), rng.normal(size=(ROWS, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    p = rng.dirichlet(np.ones(CLASSES), ROWS)
    z[0] = [40, 0, -np.inf]
    z[2], h[2] = np.nan, np.nan
    h[4] = 40 * w[:, 0]
    return [x.astype(dtype) for x in (z, p, h, w)]


def total(*parts: Any) -> jax.Array:
    """One number that depends on every floating result, for a gradient of them all."""
    leaves = [jnp.sum(x) for x in jax.tree.leaves(parts) if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.add, leaves)


def derived(f: Callable[..., jax.Array]) -> Program:
    return jax.value_and_grad(f, argnums=(0, 1, 2, 3))


def product(f: Callable[..., jax.Array]) -> Program:
    def along(z: Any, p: Any, h: Any, w: Any) -> Any:
        return jax.jvp(jax.grad(lambda p, w: f(z, p, h, w), argnums=(0, 1)), (p, w), (p + 1, w + 1))

    return along


def dense(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    options: dict[str, Any] = {"label_smoothing": 0.25, "z_loss": 0.5, "class_weights": p[0]}
    by_labels = jaxent.softmax_cross_entropy(z, LABELS, class_weights=p[0])
    smoothed = jaxent.softmax_cross_entropy(jnp.log(p), LABELS, **options)
    return total(by_labels, smoothed, jaxent.softmax_cross_entropy(jnp.log(p), p[::-1], weights=p[:, 0]))


def closed_form(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    return jaxent.softmax_cross_entropy_gradient(z, LABELS)


def nll(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    return total(jaxent.nll_loss(jnp.log(p), LABELS, class_weights=p[0]))


def sigmoid(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    where = np.isfinite(arrays()[0])
    return total(jaxent.sigmoid_cross_entropy(z, p, where=where, pos_weight=p[0]))


def statistics(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    return total(jaxent.token_statistics(jnp.log(p), np.abs(LABELS) % CLASSES, top_k=2))


def linear(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    return total(jaxent.linear_softmax_cross_entropy(h, w, LABELS, bias=p[0], soft_cap=50.0, chunk_rows=2))


def linear_rows(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    rows = jaxent.linear_softmax_cross_entropy(h, w, LABELS, chunk_rows=2, reduction="none")
    rows = p @ w.T, w, p[:, 0]
    own = jaxent.linear_loss(lambda z, c: c * jax.nn.logsumexp(z, axis=-1), *rows, reduction="sum", chunk_rows=2)
    return total(rows, own)


def linear_statistics(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    return total(jaxent.linear_token_statistics(p @ w.T, w, np.abs(LABELS) % CLASSES, top_k=2, chunk_rows=2))


def linear_kl(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    kinds: Any = ("forward", "jensen_shannon")
    each = [jaxent.linear_kl_divergence(h, w, h, 2 * w, divergence=k, where=COUNTED, chunk_rows=2) for k in kinds]
    return total(each)


def measures(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    q, joint = p[::-1], p / ROWS
    two = (jaxent.cross_entropy, jaxent.kl_divergence, jaxent.jensen_shannon_divergence)
    one = (jaxent.self_information, jaxent.entropy, jaxent.perplexity)
    pair = (jaxent.joint_entropy, jaxent.conditional_entropy, jaxent.mutual_information)
    orders = (jaxent.renyi_entropy(p, 2), jaxent.renyi_divergence(p, q, 0.5), jaxent.tsallis_entropy(p, 3))
    return total([f(p, q) for f in two], [f(p) for f in one], [f(joint) for f in pair], orders)


def measures_of_logits(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    z, q = z[:2], jnp.log(p[:2])
    # The self-information of a class that is removed is infinite.
    return total(
        jaxent.self_information_with_logits(q),
        jaxent.entropy_with_logits(z),
        jaxent.cross_entropy_with_logits(z, q),
        jaxent.kl_divergence_with_logits(z, q),
    )


def curvature(z: Any, p: Any, h: Any, w: Any) -> Any:
    kept = h[COUNTED]
    of = (lambda w: kept @ w, w)
    return (
        jaxent.logit_hessian(z[0]),
        jaxent.logit_hessian_product(z[0], p[0]),
        jaxent.ggn_vector_product(*of, w + 1),
        jaxent.fisher_vector_product(*of, LABELS[COUNTED], w + 1),
        jaxent.linear_ggn_vector_product(h, w, (None, w + 1), targets=LABELS, chunk_rows=2),
        jaxent.linear_fisher_vector_product(h, w, LABELS, (None, w + 1), chunk_rows=2),
    )


def norms(z: Any, p: Any, h: Any, w: Any) -> Any:
    found = jaxent.linear_gradient_norms(h, w, LABELS, chunk_rows=2)
    return found, jaxent.gradient_noise_scale(found.kernel, found.kernel[1] / 2, where=COUNTED)


def sums(z: Any, p: Any, h: Any, w: Any) -> Any:
    """What is returned as it is: records of several arrays."""
    part = jaxent.softmax_cross_entropy(z, LABELS, reduction="sum_and_weight")
    return part, jaxent.EmpiricalRisk().update(p), jaxent.token_statistics(jnp.log(p), top_k=2)


def risk(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    parts = jaxent.EmpiricalRisk().update(p).merge(jaxent.EmpiricalRisk().update(w, jnp.abs(w)))
    return total(parts.mean(2), parts.perplexity(), parts.bits_per(3))


def twin(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    log_p = torch_compat.log_softmax(p, 1)
    return total(
        torch_compat.CrossEntropyLoss(weight=p[0])(z, LABELS),
        torch_compat.nll_loss(log_p, LABELS),
        torch_compat.kl_div(log_p, p[::-1], reduction="batchmean"),
        torch_compat.binary_cross_entropy(p, p[::-1]),
        torch_compat.binary_cross_entropy_with_logits(p, torch_compat.softmax(p, 1)),
    )


def linear_twin(z: Any, p: Any, h: Any, w: Any) -> jax.Array:
    chunks = torch_compat.LinearCrossEntropyOptions(batch_chunk_size=2)
    return torch_compat.linear_cross_entropy(h, w.T, LABELS, label_smoothing=0.25, options=chunks)


PROGRAMS: dict[str, Program] = {
    "dense": derived(dense),
    "closed form": closed_form,
    "nll": derived(nll),
    "sigmoid": derived(sigmoid),
    "token statistics": derived(statistics),
    "linear": derived(linear),
    "linear, Hessian product": product(linear),
    "linear rows": derived(linear_rows),
    "linear statistics": derived(linear_statistics),
    "linear KL": derived(linear_kl),
    "measures": derived(measures),
    "measures of logits": derived(measures_of_logits),
    "curvature": curvature,
    "norms": norms,
    "risk": derived(risk),
    "sums": sums,
    "twin": derived(twin),
    "linear twin": derived(linear_twin),
}
# One for each family.
EXPORTED = ("dense", "linear", "linear rows", "linear statistics", "measures", "curvature", "twin")


def some_programs(*names: str) -> pytest.MarkDecorator:
    """These, and in the long sweep all."""
    marked = [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in PROGRAMS]
    return pytest.mark.parametrize("name", marked)


@functools.cache
def jitted(name: str) -> Any:
    """Traced once for what follows."""
    return jax.jit(PROGRAMS[name])


@functools.cache
def result(name: str) -> Any:
    """Every program is finite at these inputs, and JAX looks at what it returns."""
    given = [jnp.asarray(x) for x in arrays()]
    with jax.debug_nans(True), jax.debug_infs(True):
        return jitted(name).lower(*given).compile(FAST)(*given)


def assert_same(got: Any, want: Any) -> None:
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@some_programs(*EXPORTED, "sigmoid", "linear KL", "measures of logits", "norms", "risk")
def test_debug_nans_and_debug_infs_are_quiet(name: str):
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(result(name)))


def test_debug_nans_sees_a_label_out_of_range():
    _, _, h, w = map(jnp.asarray, arrays())
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jaxent.linear_softmax_cross_entropy(h[:2], w, jnp.array([0, CLASSES]))


@some_programs(*EXPORTED, "sigmoid", "linear KL", "measures of logits", "norms", "risk")
def test_float64_goes_through_without_a_float32(name: str):
    with jax.enable_x64(True):
        program = str(jax.make_jaxpr(PROGRAMS[name])(*arrays(np.float64)))
        assert re.search(r"\bf64\[", program)
        # EmpiricalRisk adds in pairs of float32.
        assert name in ("risk", "sums") or not re.search(r"\b(f16|bf16|f32)\[", program)


@some_programs(*EXPORTED)
def test_export_for_every_platform(name: str):
    exported = jax.export.export(jitted(name), platforms=["cpu", "cuda", "tpu"])(*arrays())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    again = jax.jit(jax.export.deserialize(exported.serialize()).call).lower(*arrays()).compile(FAST)(*arrays())
    assert jax.tree.structure(again) == jax.tree.structure(result(name))
    assert_same(again, result(name))


@some_programs("dense", "linear")
def test_no_tracer_leaks(name: str):
    with jax.checking_leaks():
        jax.jit(PROGRAMS[name]).trace(*arrays())


@some_programs("linear")
def test_without_jit(name: str):
    with jax.disable_jit():
        got = PROGRAMS[name](*(jnp.asarray(x) for x in arrays()))
    assert_same(got, result(name))
