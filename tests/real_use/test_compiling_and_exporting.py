"""What is traced, compiled, exported and imported: traced numbers, sums in scans, programs that are compiled once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from cases import marked
from jax import monitoring
from small_call import DZ, Call, H, W, Y, Z, close, jaxent, nn, user_rows

ROOT = Path(__file__).resolve().parents[2]


# ----------------------------------------------------------------------------------------------------------------------
# Traced numbers of sums, sums that start a scan


def test_traced_base_and_count() -> None:
    risk = jaxent.EmpiricalRisk().update(jnp.array([1.0, 3.0]))
    nats = 2.0
    for transform in (lambda f: f, jax.jit):
        close(transform(lambda b: risk.mean(base=b))(2.0), nats / np.log(2))
        close(transform(lambda b: risk.mean(base=b))(jnp.float32(10)), nats / np.log(10))
        close(transform(lambda n: risk.bits_per(n))(8), 4 / np.log(2) / 8)
        close(transform(lambda n: risk.bits_per(n))(jnp.float32(8)), 4 / np.log(2) / 8)
        close(transform(lambda n: risk.bits_per(n))(jnp.int32(0)), 0)
    for bad in (0.0, 1.0, -2.0):
        assert np.isnan(jax.jit(lambda b: risk.mean(base=b))(bad))
    close(jax.grad(lambda b: risk.mean(base=b))(2.0), -nats / np.log(2) ** 2 / 2)
    close(jax.vmap(lambda b: risk.mean(base=b))(jnp.array([2.0, 4.0])), nats / np.log([2, 4]))
    close(jax.vmap(risk.bits_per)(jnp.array([2, 4])), 4 / np.log(2) / np.array([2, 4]))


@pytest.mark.parametrize("x64", [False, True])
def test_a_weighted_sum_starts_a_scan(x64: bool) -> None:
    with jax.enable_x64(x64):
        zs, ys = jnp.asarray(np.stack([Z, 2 * Z])), jnp.asarray(np.stack([Y, Y]))

        def step(carry: Any, part: Any) -> Any:
            return carry + jaxent.softmax_cross_entropy(*part, reduction="sum_and_weight"), None

        def mean(zs: jax.Array) -> jax.Array:
            return jax.lax.scan(step, jaxent.WeightedSum(), (zs, ys))[0].mean()

        want = ref.nll(np.stack([Z, 2 * Z]), np.stack([Y, Y])).mean()
        close(mean(zs), want)
        close(jax.jit(jax.grad(mean))(zs)[0], DZ / 12)
        empty = jaxent.WeightedSum()
        close((empty.mean(), empty.total, empty.weight), (0, 0, 0))
        close((empty + jaxent.WeightedSum(jnp.float32(3), jnp.float32(2))).mean(), 1.5)
        close(jaxent.EmpiricalRisk().merge(empty).mean(), 0)
        looped = jax.lax.fori_loop(0, 2, lambda i, c: step(c, (zs[i], ys[i]))[0], jaxent.WeightedSum())
        close(looped.mean(), want)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling, exporting, importing


@pytest.fixture
def compiled():
    """How many programs were compiled since it was last asked."""
    count = 0

    def on(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    monitoring.register_event_duration_secs_listener(on)

    def asked() -> int:
        nonlocal count
        last, count = count, 0
        return last

    yield asked
    monitoring.unregister_event_duration_listener(on)


def scaled_rows(z: jax.Array, y: jax.Array, params: Any) -> jax.Array:
    return user_rows(params["scale"] * z, y)


CHUNKS: dict[str, Any] = {"chunk_rows": 2}
EAGER: dict[str, Call] = {
    "linear_loss": lambda a: jaxent.linear_loss(user_rows, a * H, W, Y, **CHUNKS),
    "gradient of linear_loss": lambda a: jax.grad(lambda h: jaxent.linear_loss(user_rows, h, W, Y, **CHUNKS))(a * H),
    "linear_loss with params": lambda a: jaxent.linear_loss(scaled_rows, H, W, Y, params={"scale": a}, **CHUNKS),
    "linear_loss with bias": lambda a: jaxent.linear_loss(user_rows, a * H, W, Y, bias=jnp.zeros(8), **CHUNKS),
    "linear_loss in one chunk": lambda a: jaxent.linear_loss(user_rows, a * H, W, Y),
    "linear_softmax_cross_entropy": lambda a: jaxent.linear_softmax_cross_entropy(a * H, W, Y, **CHUNKS),
    "reduction none": lambda a: jaxent.linear_softmax_cross_entropy(a * H, W, Y, reduction="none", **CHUNKS),
    "linear_kl_divergence": lambda a: jaxent.linear_kl_divergence(a * H, W, H, W, **CHUNKS),
    "linear_token_statistics": lambda a: jaxent.linear_token_statistics(a * H, W, Y, **CHUNKS),
    "softmax_cross_entropy": lambda a: jaxent.softmax_cross_entropy(a * Z, Y, label_smoothing=0.1),
    "linear_gradient_norms": lambda a: jaxent.linear_gradient_norms(a * H, W, Y, **CHUNKS),
    "linear_ggn_vector_product": lambda a: jaxent.linear_ggn_vector_product(a * H, W, (H, None), **CHUNKS),
    "torch_compat.cross_entropy": lambda a: nn.cross_entropy(a * Z, Y),
}


@pytest.mark.parametrize("name", EAGER)
def test_an_eager_call_compiles_once(name: str, compiled: Call) -> None:
    f = EAGER[name]
    f(jnp.float32(1))
    f(jnp.float32(2))
    compiled()
    for scale in (3, 4, 5):
        jax.block_until_ready(f(jnp.float32(scale)))
    assert compiled() == 0


def test_linear_loss_sees_what_its_function_closes_over() -> None:
    """Closed-over values that change are no reason to keep the old ones."""
    for scale in (1.0, jnp.float32(2.0), np.float32(3)):
        got = jaxent.linear_loss(lambda z, y: scale * user_rows(z, y), H, W, Y, **CHUNKS)  # noqa: B023
        close(got, float(scale) * ref.nll(Z, Y).mean())


def test_linear_loss_sees_what_has_changed_in_a_closure() -> None:
    box = {"scale": jnp.float32(1)}
    boxed = lambda z, y: box["scale"] * user_rows(z, y)  # noqa: E731
    close(jaxent.linear_loss(boxed, H, W, Y), ref.nll(Z, Y).mean())
    box["scale"] = jnp.float32(3)
    close(jaxent.linear_loss(boxed, H, W, Y), 3 * ref.nll(Z, Y).mean())


EXPORTED: dict[str, tuple[Call, bool]] = {
    "softmax_cross_entropy": (lambda z, y: jaxent.softmax_cross_entropy(z, y), False),
    "token_statistics": (lambda z, y: jaxent.token_statistics(z, y, top_k=2), False),
    "softmax_cross_entropy_gradient": (lambda z, y: jaxent.softmax_cross_entropy_gradient(z, y), False),
    "sigmoid_cross_entropy": (lambda z, y: jaxent.sigmoid_cross_entropy(z[:, 0], y > 3), False),
    "linear_softmax_cross_entropy": (lambda h, y: jaxent.linear_softmax_cross_entropy(h, W, y), True),
    "smoothed": (lambda h, y: jaxent.linear_softmax_cross_entropy(h, W, y, label_smoothing=0.1), True),
    "reduction none": (lambda h, y: jaxent.linear_softmax_cross_entropy(h, W, y, reduction="none"), True),
    "gradient": (jax.grad(lambda h, y: jaxent.linear_softmax_cross_entropy(h, W, y)), True),
    "linear_token_statistics": (lambda h, y: jaxent.linear_token_statistics(h, W, y), True),
    "linear_kl_divergence": (lambda h, y: jaxent.linear_kl_divergence(h, W, h, 2 * W), True),
    "linear_loss": (lambda h, y: jaxent.linear_loss(user_rows, h, W, y), True),
    "linear_gradient_norms": (lambda h, y: jaxent.linear_gradient_norms(h, W, y), True),
    "torch_compat.cross_entropy": (lambda z, y: nn.cross_entropy(z, y), False),
    "torch_compat.linear_cross_entropy": (lambda h, y: nn.linear_cross_entropy(h, np.ascontiguousarray(W.T), y), True),
}


# The others are exported alone: a number of rows that is no int fails while a function is traced.
CALLED = ("token_statistics", "gradient", "linear_token_statistics", "linear_kl_divergence")


# Part of others: the value of the gradient's, the twin of the loss.
PARTS = ("linear_softmax_cross_entropy", "smoothed", "torch_compat.cross_entropy")


@pytest.mark.parametrize("name", marked(EXPORTED, EXPORTED.keys() - set(PARTS)))
def test_export_with_a_symbolic_number_of_rows(name: str) -> None:
    f, linear = EXPORTED[name]
    (n,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 4 if linear else 8), np.float32), jax.ShapeDtypeStruct((n,), np.int32)
    exported = jax.export.export(jax.jit(f))(*shapes)
    if name not in CALLED:
        return
    x = H if linear else Z
    for rows in (1, 6):
        got, want = exported.call(x[:rows], Y[:rows]), jax.jit(f)(x[:rows], Y[:rows])
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(g, w)


NOT_INSTALLED = """
import importlib.metadata as metadata
real = metadata.Distribution.from_name
def from_name(name):
    if name == "jaxent":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.Distribution.from_name = staticmethod(from_name)
import jaxent, jaxent.torch_compat
print(jaxent.__version__, float(jaxent.entropy(jaxent.empirical_distribution([0, 1], 2), base=2)))
"""


def test_import_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{NOT_INSTALLED}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("1.0\n")
