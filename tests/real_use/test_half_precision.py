"""Heads in half precision: small probabilities keep their gradient under a loss scale, and no mesh aborts.

A float16 `dz` divided by the number of rows before it is rounded loses every probability below 6e-8; a loss scale comes
too late. A bfloat16 sum over explicit devices ended the process.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]
ROWS, FEATURES, CLASSES = 64, 16, 4096
SCALE = 2.0**15
RNG = np.random.default_rng(0)
H = RNG.normal(size=(ROWS, FEATURES)).astype(np.float16)
W = (RNG.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float16)
Y = RNG.integers(0, 64, ROWS).astype(np.int32)  # the classes from 64 on are no label
Z = ref.wide(H) @ ref.wide(W)
DZ = ref.softmax(Z) - ref.onehot(Y, CLASSES)


def error(got: Any, want: Any) -> float:
    """Relative, of a whole array: what rounding each entry to half precision leaves is 3e-4."""
    got, want = ref.wide(got), ref.wide(want)
    assert np.all(np.isfinite(got))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(gradients: Any, dz: np.ndarray, h: Any = H, w: Any = W, allowed: float = 3e-3) -> None:
    """The gradients of hidden states and kernel, that of the classes that are no label by itself."""
    gh, gw = gradients
    dw = ref.wide(h).T @ dz
    assert np.count_nonzero(gw[:, 64:]) > 0.9 * gw[:, 64:].size
    assert error(gw[:, 64:], dw[:, 64:]) < allowed
    assert error(gw, dw) < allowed
    assert error(gh, dz @ ref.wide(w).T) < allowed


def user_rows(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), y[:, None], axis=-1)[:, 0]


def linear(h: Any, w: Any, **options: Any) -> Any:
    return jaxent.linear_softmax_cross_entropy(h, w, Y, **options)


SMALL_WEIGHTS = np.full(ROWS, 1 / SCALE, np.float32)
LOSSES: dict[str, Call] = {
    "denominator": lambda h, w: SCALE * linear(h, w, denominator=SCALE),
    "denominator, chunks": lambda h, w: SCALE * linear(h, w, denominator=SCALE, chunk_rows=24),
    "traced denominator": lambda h, w: SCALE * linear(h, w, denominator=jnp.float32(SCALE)),
    "weights": lambda h, w: SCALE * linear(h, w, weights=SMALL_WEIGHTS, reduction="sum"),
    "weights, by hand": lambda h, w: (SCALE * SMALL_WEIGHTS * linear(h, w, reduction="none")).sum(),
    "divided twice": lambda h, w: SCALE * 2**10 * linear(h, w, denominator=SCALE) / 2**10,
    "divided outside": lambda h, w: SCALE * (linear(h, w, reduction="sum") / SCALE),
    "sum_and_weight": lambda h, w: SCALE * (linear(h, w, reduction="sum_and_weight").total / SCALE),
    "bias": lambda h, w: SCALE * linear(h, w, denominator=SCALE, bias=jnp.zeros(CLASSES, h.dtype)),
    "linear_loss": lambda h, w: SCALE * jaxent.linear_loss(user_rows, h, w, Y, denominator=SCALE),
    "statistics": lambda h, w: -(jaxent.linear_token_statistics(h, w, Y).log_prob / SCALE).sum() * SCALE,
    "float32 kernel": lambda h, w: SCALE * linear(h, w.astype(jnp.float32), denominator=SCALE),
    "float32 hidden": lambda h, w: SCALE * linear(h.astype(jnp.float32), w, denominator=SCALE),
    "dense": lambda h, w: SCALE * jaxent.softmax_cross_entropy((h @ w).astype(jnp.float32), Y, denominator=SCALE),
}


# One for each way in which the scale comes back to `dz`, and for each rule; the others take one of them.
RULES = ("denominator", "denominator, chunks", "weights", "weights, by hand", "divided outside", "bias", "linear_loss")
USUAL = (*RULES, "statistics", "float32 kernel")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # bfloat16 has float32's range: what is tested is that its gradients are rounded once.
        pytest.param(
            name, dtype, marks=() if name in (USUAL if dtype == jnp.float16 else USUAL[:1]) else pytest.mark.slow
        )
        for dtype in (jnp.float16, jnp.bfloat16)
        for name in LOSSES
    ],
)
def test_small_probabilities_under_a_loss_scale(name: str, dtype: Any) -> None:
    h, w = jnp.asarray(H, dtype), jnp.asarray(W, dtype)
    dz = ref.softmax(ref.wide(h) @ ref.wide(w)) - ref.onehot(Y, CLASSES)
    gradients = jax.jit(jax.grad(LOSSES[name], (0, 1)))(h, w)
    check(gradients, dz, h, w, 3e-3 if dtype == jnp.float16 else 2e-2)


def test_the_head_of_the_issue_is_no_worse_than_dense_code() -> None:
    """Uniform logits: each class that is no label has the same small gradient."""
    h, w = jnp.asarray(H), jnp.zeros((FEATURES, CLASSES), jnp.float16)
    f = lambda h, w: SCALE * linear(h, w, denominator=32768.0)  # noqa: E731
    gw = jax.grad(f, 1)(h, w)
    want = ref.wide(H).sum(0)[:, None] / CLASSES
    assert error(gw[:, 64:], np.broadcast_to(want, (FEATURES, CLASSES - 64))) < 3e-3


@pytest.mark.parametrize("mode", ["cotangent", "jvp", "vmap", "checkpoint", "scan", "hidden alone", "kernel alone"])
def test_small_probabilities_in_every_mode(mode: str) -> None:
    f = LOSSES["denominator"]
    unscaled = lambda h, w: linear(h, w, denominator=SCALE)  # noqa: E731
    h, w = jnp.asarray(H), jnp.asarray(W)
    if mode == "cotangent":
        check(jax.vjp(unscaled, h, w)[1](jnp.float32(SCALE)), DZ)
    elif mode == "jvp":
        step = jnp.zeros_like(w).at[:, 64:].set(1)
        got = jax.jvp(lambda w: unscaled(h, w), (w,), (step,))[1]
        want = (DZ * (ref.wide(h) @ ref.wide(step))).sum() / SCALE
        np.testing.assert_allclose(got, want, rtol=3e-3)
    elif mode == "vmap":
        stacked = jax.vmap(jax.grad(f, (0, 1)))(jnp.stack([h, h]), jnp.stack([w, w]))
        check(jax.tree.map(lambda x: x[1], stacked), DZ)
    elif mode == "checkpoint":
        check(jax.jit(jax.grad(jax.checkpoint(f), (0, 1)))(h, w), DZ)
    elif mode == "scan":
        scanned = lambda h, w: jax.lax.scan(lambda c, _: (c + f(h, w), None), 0.0, None, length=1)[0]  # noqa: E731
        check(jax.grad(scanned, (0, 1))(h, w), DZ)
    elif mode == "hidden alone":
        assert error(jax.grad(f)(h, w), DZ @ ref.wide(W).T) < 3e-3
    else:
        assert error(jax.grad(f, 1)(h, w), ref.wide(H).T @ DZ) < 3e-3


def test_hessian_products_under_a_loss_scale() -> None:
    h, w = jnp.asarray(H), jnp.asarray(W)
    step = jnp.ones_like(w) * jnp.linspace(-1, 1, CLASSES, dtype=jnp.float16)[None]
    got = jax.jvp(lambda w: jax.grad(LOSSES["denominator"], 1)(h, w), (w,), (step,))[1]
    want = ref.wide(H).T @ ref.hessian_product(Z, ref.wide(H) @ ref.wide(step))
    assert error(got, want) < 1e-2


@pytest.mark.parametrize("rows", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_a_mean_over_many_rows(rows: int) -> None:
    """Dense code is 2e-4 off."""
    rng = np.random.default_rng(1)
    h = rng.normal(size=(rows, 8)).astype(np.float16)
    w = (rng.normal(size=(8, 512)) / 4).astype(np.float16)
    y = rng.integers(0, 64, rows).astype(np.int32)
    dz = ref.softmax(ref.wide(h) @ ref.wide(w)) - ref.onehot(y, 512)
    scale = 64.0
    f = lambda h, w: scale * jaxent.linear_softmax_cross_entropy(h, w, y)  # noqa: E731
    gw = jax.jit(jax.grad(f, 1))(h, w)
    assert error(gw, ref.wide(h).T @ dz * (scale / rows)) < 1e-3
    assert error(gw[:, 64:], (ref.wide(h).T @ dz)[:, 64:] * (scale / rows)) < 2e-3


def test_distillation_and_the_twin_under_a_loss_scale() -> None:
    h, w = jnp.asarray(H), jnp.asarray(W)
    teacher = jnp.asarray(W[:, ::-1].copy())
    f = lambda h, w: SCALE * jaxent.linear_kl_divergence(h, teacher, h, w, denominator=SCALE)  # noqa: E731
    dz = ref.softmax(Z) - ref.softmax(ref.wide(H) @ ref.wide(teacher))
    assert error(jax.grad(f, 1)(h, w), ref.wide(H).T @ dz) < 3e-3
    twin = lambda w: nn.linear_cross_entropy(h, w, Y, reduction="sum")  # noqa: E731
    assert error(jax.grad(twin)(w.T), (ref.wide(H).T @ DZ).T) < 3e-3
    mean = lambda w: 64 * nn.linear_cross_entropy(h, w, Y)  # noqa: E731
    assert error(jax.grad(mean)(w.T), (ref.wide(H).T @ DZ).T) < 3e-3


def test_small_probabilities_over_devices() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)

    def f(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        part = jaxent.linear_softmax_cross_entropy(h, w, y, denominator=SCALE, vocab_axis="vocab")
        return SCALE * jax.lax.psum(part, "data")

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("data"), P(None, "vocab"), P("data")), out_specs=P())
    check(jax.jit(jax.grad(sharded, (0, 1)))(H, W, Y), DZ)


# ----------------------------------------------------------------------------------------------------------------------
# Meshes: in a process of their own, since what fails ends the process

ON_A_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxent

rng = np.random.default_rng(0)
hidden, kernel, y = rng.normal(size=(16, 8)), rng.normal(size=(8, 32)), rng.integers(0, 32, 16).astype(np.int32)
specs = P("data"), P(None, "vocab"), P("data")

def check(dtype, kind, name):
    h, w = hidden.astype(dtype), kernel.astype(dtype)
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(axis_type,) * 2)
    axis = {"vocab_axis": "vocab"} if kind == "manual" else {}

    def f(h, w, y):
        if name == "none":
            total = jaxent.linear_softmax_cross_entropy(h, w, y, reduction="none", **axis).sum()
        elif name == "statistics":
            total = -jaxent.linear_token_statistics(h, w, y, **axis).log_prob.sum()
        else:
            total = jaxent.linear_softmax_cross_entropy(h, w, y, reduction="sum", **axis)
        return jax.lax.psum(total, "data") if kind == "manual" else total

    def plain(h, w):
        log_q = jax.nn.log_softmax(h @ w)
        return -jnp.take_along_axis(log_q, y[:, None], axis=1).sum()

    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((h, w, y), specs)]
        g = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()) if kind == "manual" else f
        got = jax.jit(jax.value_and_grad(g, (0, 1)))(*args)
    want = jax.jit(jax.value_and_grad(plain, (0, 1)))(h.astype(np.float32), w.astype(np.float32))
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        g, x = np.asarray(g).astype(np.float64), np.asarray(x, np.float64)
        error = np.linalg.norm(g - x) / np.linalg.norm(x)
        assert error < 0.03, error

for case in sys.argv[1:]:
    print(case, end=" ", flush=True)
    check(*case.split(","))
    print("right", flush=True)
"""
MESHES = [
    *("bfloat16,explicit,none", "bfloat16,explicit,statistics", "bfloat16,explicit,sum"),
    *("float16,explicit,none", "bfloat16,automatic,none", "bfloat16,manual,none"),
]


def test_half_precision_on_a_mesh() -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_A_MESH, *MESHES]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, f"exit code {run.returncode} after {run.stdout}: {run.stderr[-600:]}"
    assert run.stdout.split("\n")[:-1] == [f"{case} right" for case in MESHES]
