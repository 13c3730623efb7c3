"""Every transformation of JAX, over the losses on logits."""

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import (
    DTYPES,
    OPTIONS,
    draw_labels,
    draw_logits,
    nll_loss,
    run,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_gradient,
    token_statistics,
)
from jax.test_util import check_grads
from oracles import assert_close

import jaxent

ROWS, COUNT = 6, 5


@pytest.fixture
def batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = draw_labels(rng, (ROWS,), COUNT)
    labels[2] = -100
    return draw_logits(rng, (ROWS, COUNT)), labels


def all_losses(z: Any, labels: Any) -> dict[str, Any]:
    """One of each, as a function of a batch or of one row."""
    return {
        "softmax": softmax_cross_entropy(z, labels, label_smoothing=0.25, z_loss=0.5, reduction="none"),
        "gradient": softmax_cross_entropy_gradient(z, labels, reduction="none"),
        "nll": nll_loss(z, labels, reduction="none"),
        "sigmoid": sigmoid_cross_entropy(z, jnp.ones(z.shape, jnp.float32), reduction="none"),
        "statistics": token_statistics(z, labels, top_k=2),
    }


def assert_same(got: Any, want: Any) -> None:
    """Equal but for rounding in another order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), got, want)


@pytest.mark.grid
def test_one_example_under_vmap_and_jit_is_the_batched_call(batch: tuple):
    batched = all_losses(*batch)
    assert_same(jax.vmap(all_losses)(*batch), batched)
    assert_same(jax.jit(jax.vmap(all_losses))(*batch), batched)
    assert_same(jax.jit(all_losses)(*batch), batched)
    loop = [all_losses(z, y) for z, y in zip(*batch, strict=True)]
    assert_same(jax.tree.map(lambda *x: jnp.stack(x), *loop), batched)


def test_without_jit(batch: tuple):
    with jax.disable_jit():
        plain = all_losses(*batch)
    assert_same(plain, all_losses(*batch))


@pytest.mark.parametrize("option", ["everything", "probabilities_everything"])
def test_vmap_of_every_argument(option: str, rng: np.random.Generator):
    z = draw_logits(rng, (3, ROWS, COUNT))
    arguments = [OPTIONS[option](rng, (ROWS, COUNT)) for _ in range(3)]
    mapped = {k: np.stack([a[k] for a in arguments]) for k in ("targets", "where", "weights", "class_weights")}
    shared = {k: arguments[0][k] for k in ("label_smoothing", "z_loss")}

    def loss(z: Any, mapped: Any) -> jax.Array:
        return softmax_cross_entropy(z, **mapped, **shared)

    got = jax.jit(jax.vmap(loss))(z, mapped)
    want = [loss(z[i], {k: v[i] for k, v in mapped.items()}) for i in range(3)]
    assert_close(got, np.stack(want), ulp=4, dtype=np.float32)


def test_vmap_over_other_axes(batch: tuple):
    z, labels = batch
    want = softmax_cross_entropy(z, labels, reduction="none")
    columns = jax.vmap(lambda z, y: softmax_cross_entropy(z, y), in_axes=(1, 0))(np.moveaxis(z, 0, 1), labels)
    assert_same(columns, want)
    # Only the labels are mapped: every label for one row.
    every = jax.vmap(lambda y: softmax_cross_entropy(z[0], y))(np.arange(COUNT))
    assert_same(every, -jax.nn.log_softmax(z[0]))
    # The class axis first, the mapped axis last.
    first = jax.vmap(lambda z, y: softmax_cross_entropy(z, y, axis=0, reduction="none"), in_axes=(2, None), out_axes=1)
    assert_same(first(np.stack([z.T, z.T + 1], axis=2), labels), np.stack([want, want], axis=1))


def test_long_rows_under_vmap(rng: np.random.Generator):
    z, labels = draw_logits(rng, (2, 2, 32769)), draw_labels(rng, (2, 2), 32769)
    want = [[oracles.long_row_nll(z[i, j], labels[i, j])[0] for j in range(2)] for i in range(2)]
    got = jax.jit(jax.vmap(lambda z, y: softmax_cross_entropy(z, y, reduction="none")))(z, labels)
    assert_close(got, want, ulp=12, dtype=np.float32)


def test_jvp_of_grad_and_grad_of_grad_are_the_hessian(batch: tuple, rng: np.random.Generator):
    z, labels = batch
    direction = jnp.asarray(draw_logits(rng, z.shape))
    loss = functools.partial(softmax_cross_entropy, targets=labels, reduction="sum")
    hessian = oracles.softmax_cross_entropy(z, labels).hessian
    want = np.einsum("njk,nk->nj", hessian, np.asarray(direction, np.float64))
    forward = jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (direction,))[1])(z)
    reverse = jax.jit(jax.grad(lambda z: jnp.vdot(jax.grad(loss)(z), direction)))(z)
    backward = jax.jit(jax.grad(lambda z: jax.jvp(loss, (z,), (direction,))[1]))(z)
    for got in (forward, reverse, backward):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("one_hot", [False, True])
def test_third_order(one_hot: bool):
    z = np.array([0.5, -1.0, 0.25])
    target = np.eye(3)[1] if one_hot else np.array(1)

    def loss(z: Any) -> jax.Array:
        return softmax_cross_entropy(z, target)

    def plain(z: Any) -> jax.Array:
        return jnp.log(jnp.sum(jnp.exp(z))) - z[1]

    want = run(jax.jacfwd(jax.hessian(plain)), z)
    for third in (jax.jacfwd(jax.hessian(loss)), jax.jacrev(jax.hessian(loss)), jax.jacrev(jax.jacrev(jax.grad(loss)))):
        np.testing.assert_allclose(run(third, z), want, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_third_order_by_finite_differences():
    z = np.array([0.5, -1.0, 0.25])
    check_grads(
        jax.jit(lambda z: softmax_cross_entropy(z, np.array(1))), (z,), order=3, modes=("fwd", "rev"), rtol=1e-3
    )


def test_scan_and_checkpoint(batch: tuple):
    z, labels = batch

    @jax.checkpoint
    def row(z: Any, y: Any) -> jax.Array:
        return softmax_cross_entropy(z, y, reduction="sum")

    def summed(z: Any) -> jax.Array:
        def step(total: jax.Array, x: tuple) -> tuple[jax.Array, None]:
            return total + row(*x), None

        return jax.lax.scan(step, jnp.float32(0), (z, labels))[0]

    want = oracles.softmax_cross_entropy(z, labels)
    value, gradient = jax.jit(jax.value_and_grad(summed))(z)
    assert_close(value, want.total, ulp=4, dtype=np.float32)
    assert_close(gradient, want.gradient, ulp=6, dtype=np.float32)
    assert_close(jax.jit(jax.jacfwd(summed))(z), want.gradient, ulp=6, dtype=np.float32)


def test_control_flow(batch: tuple):
    z, labels = batch
    want = softmax_cross_entropy(z, labels)
    assert_same(jax.lax.cond(True, lambda: softmax_cross_entropy(z, labels), lambda: jnp.float32(0)), want)
    assert_same(
        jax.lax.map(lambda x: softmax_cross_entropy(*x), (z, labels)), jax.vmap(softmax_cross_entropy)(z, labels)
    )
    total = jax.lax.fori_loop(0, 3, lambda i, t: t + softmax_cross_entropy(z, labels), jnp.float32(0))
    assert_same(total, 3 * want)


def test_donated_logits(batch: tuple):
    z, labels = batch
    want = jax.grad(softmax_cross_entropy)(z, labels)
    step = jax.jit(lambda z, y: z - jax.grad(softmax_cross_entropy)(z, y), donate_argnums=0)
    assert_same(step(jnp.asarray(z), labels), z - want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_has_the_dtype_of_its_input_and_a_loss_at_least_float32(dtype: str):
    kind, result, _, _ = DTYPES[dtype]
    with jax.enable_x64(True):
        z, labels = jnp.zeros((2, 3), kind), np.array([0, 1], np.uint8)
        assert jax.grad(softmax_cross_entropy)(z, labels).dtype == kind
        assert softmax_cross_entropy_gradient(z, labels).dtype == kind
        assert softmax_cross_entropy_gradient(z, labels, weights=np.ones(2), denominator=2.0).dtype == kind
        assert jax.grad(nll_loss)(z, labels).dtype == kind
        assert jax.grad(sigmoid_cross_entropy)(z, jnp.ones((2, 3))).dtype == kind
        weights = {"weights": np.ones(2), "class_weights": np.ones(3)}
        options = {**weights, "label_smoothing": 0.1, "z_loss": np.float64(0.1)}
        for value in (
            softmax_cross_entropy(z, labels),
            softmax_cross_entropy(z, labels, ignore_index=0, where=np.array([True, False])),
            softmax_cross_entropy(z, labels, **options),
            softmax_cross_entropy(z, jnp.ones((2, 3)), **options),
            nll_loss(z, labels),
            nll_loss(z, labels, **weights),
            sigmoid_cross_entropy(z, jnp.ones((2, 3)), weights=np.ones((2, 3)), pos_weight=np.float64(2)),
        ):
            assert value.dtype == result
        statistics = token_statistics(z, labels, top_k=2)
        assert statistics.log_prob.dtype == statistics.entropy.dtype == statistics.log_normalizer.dtype == result
        assert statistics.rank.dtype == statistics.argmax.dtype == statistics.top_classes.dtype == np.int32


@pytest.mark.parametrize("name", ["loss", "gradient", "product", "statistics", "long"])
def test_export_for_every_platform(name: str):
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    z = jax.ShapeDtypeStruct((4, 32769 if name == "long" else 300), jnp.bfloat16)

    def product(z: Any, y: Any) -> Any:
        return jax.jvp(jax.grad(softmax_cross_entropy), (z, y), (z, np.zeros(y.shape, jax.dtypes.float0)))[1]

    function: Any = {
        "loss": softmax_cross_entropy,
        "gradient": softmax_cross_entropy_gradient,
        "product": product,
        "statistics": lambda z, y: tuple(token_statistics(z, y, top_k=3)),
        "long": jax.value_and_grad(softmax_cross_entropy),
    }[name]
    exported = jax.export.export(jax.jit(function), platforms=["cpu", "cuda", "tpu"])(z, labels)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    again = jax.export.deserialize(exported.serialize())
    here = np.linspace(-3, 3, z.size, dtype=np.float32).reshape(z.shape).astype(jnp.bfloat16)
    at = np.array([0, 5, -100, 299], np.int32)
    got, want = again.call(here, at), jax.jit(function)(here, at)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(want))


def test_export_of_any_batch_size():
    (rows,) = jax.export.symbolic_shape("rows")
    z, labels = jax.ShapeDtypeStruct((rows, 5), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    exported = jax.export.export(jax.jit(softmax_cross_entropy))(z, labels)
    got = exported.call(np.zeros((7, 5), np.float32), np.zeros(7, np.int32))
    assert_close(got, np.log(5), ulp=2, dtype=np.float32)


def test_debug_nans_is_quiet_on_finite_and_on_dropped_rows(batch: tuple):
    z, labels = batch
    poisoned, removed = z.copy(), z.copy()
    poisoned[2] = np.nan  # its label is -100
    removed[np.arange(ROWS), (labels + 1) % COUNT] = -np.inf
    functions = [jax.jit(jax.value_and_grad(softmax_cross_entropy)), jax.jit(softmax_cross_entropy_gradient)]
    rows = [jnp.asarray(x) for x in (z, poisoned, removed)]  # converted before the converted nan can be noticed
    with jax.debug_nans(True):
        for row in rows:
            for function in functions:
                function(row, labels)
        softmax_cross_entropy(z, labels, label_smoothing=0.25, z_loss=0.5, class_weights=np.ones(COUNT))
        with pytest.raises(FloatingPointError):
            functions[0](rows[1], np.zeros(ROWS, np.int32))


def test_equal_calls_compile_once(batch: tuple):
    z, labels = batch
    traces = []

    @jax.jit
    def loss(z: Any, labels: Any) -> jax.Array:
        traces.append(None)
        return softmax_cross_entropy(z, labels)

    for shift in (0, 1, 2):
        loss(z + np.float32(shift), labels)
    assert len(traces) == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["softmax", "probabilities", "statistics", "divergence", "entropy"])
def test_a_hessian_product_through_a_scan(name: str, rng: np.random.Generator):
    # jax 0.10 differentiates the body of a custom_jvp function here, and not its rule: a body that is right in value
    # only gave Hessians that were wrong in the first digit.
    def statistics_sum(z: jax.Array, y: jax.Array) -> jax.Array:
        got = token_statistics(z, y)
        return jnp.sum(got.log_prob * got.log_normalizer + got.entropy**2)

    losses: dict[str, Any] = {
        "softmax": lambda z, y: softmax_cross_entropy(z, y, label_smoothing=0.25, z_loss=0.5) ** 2,
        "probabilities": lambda z, y: softmax_cross_entropy(z, jax.nn.softmax(2.0 * z)) ** 2,
        "statistics": statistics_sum,
        "divergence": lambda z, y: jnp.sum(jaxent.kl_divergence_with_logits(z, jnp.sin(z)) ** 2),
        "entropy": lambda z, y: jnp.sum(jaxent.entropy(jax.nn.softmax(z)) ** 2),
    }
    loss = losses[name]
    z, step = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2, 3))
    labels = rng.integers(0, 3, size=(4, 2))

    def scanned(z: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, x: (c + loss(*x), None), jnp.zeros(()), (z, labels))[0]

    def plain(z: jax.Array) -> jax.Array:
        return sum((loss(z[i], labels[i]) for i in range(4)), jnp.zeros(()))

    got, want = (run(lambda z, f=f: jax.jvp(jax.grad(f), (z,), (step,))[1], z) for f in (scanned, plain))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
