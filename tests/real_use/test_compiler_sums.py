"""Second-order results of more than 2^15 elements: XLA's CPU back end of jax 0.10.2 adds a wrong operand there.

A fused row sum of a batched product takes the operand without the batch axis where it should take the batched one, from
2^15 elements on, so that every test of a Hessian with small shapes passes. Here each loss, measure, option and route
goes through a Hessian product for many directions at once, and is compared with the same product for one direction and,
where there is a formula, with float64 NumPy.
"""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from cases import covering, marked
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.compiled
ROWS, CLASSES, FEATURES, DIRECTIONS = 100, 10, 4, 40  # 40,000 elements
assert DIRECTIONS * ROWS * CLASSES > 2**15
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


Z, Z2, V = normal(ROWS, CLASSES), normal(ROWS, CLASSES), normal(DIRECTIONS, ROWS, CLASSES)
H, W, B = normal(ROWS, FEATURES), normal(FEATURES, CLASSES), normal(CLASSES)
VH, VW = normal(DIRECTIONS, ROWS, FEATURES), normal(DIRECTIONS, FEATURES, CLASSES)
Y = (np.arange(ROWS) % CLASSES).astype(np.int32)
T = ref.softmax(Z2).astype(np.float32)
W_ROWS, W_CLASSES = RNG.random(ROWS).astype(np.float32), RNG.random(CLASSES).astype(np.float32)
KEPT = RNG.random(ROWS) < 0.7
PRODUCTS = ref.hessian_product(Z, V)


def close(got: Any, want: Any, rtol: float = 2e-4) -> None:
    """Relative to the largest entry: a wrong operand is wrong in the first digit."""
    got, want = ref.wide(got), ref.wide(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def products(f: Call, x: Any, v: Any) -> tuple[jax.Array, jax.Array]:
    """Hessian products of a scalar function for all directions at once, and for the last one.

    The fault spares the first 2^15 elements.
    """

    def product(v: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(f), (x,), (v,))[1]

    return jax.jit(lambda v: (jax.vmap(product)(v), product(v[-1])))(v)


# ----------------------------------------------------------------------------------------------------------------------
# The compiler itself


SPECIFIED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
REMEDY = "--xla_cpu_experimental_ynn_fusion_type="
FAULTY = (
    jax.__version__ == "0.10.2" and jax.default_backend() == "cpu" and REMEDY not in os.environ.get("XLA_FLAGS", "")
)
only_faulty = pytest.mark.skipif(not FAULTY, reason="this compiler adds rightly")

SUMS: dict[str, Call] = {
    "fragile": lambda z, v: (z[None] * v).sum(-1),
    "other order": lambda z, v: (v * z[None]).sum(-1),
    "einsum": lambda z, v: jnp.einsum("nc,knc->kn", z, v),
}
WITHOUT_SUMS = V - (ref.wide(Z) * V).sum(-1, keepdims=True)


def without_sums(form: str) -> float:
    """The error of `v - sum(z * v)`."""
    got = jax.jit(lambda z, v: v - SUMS[form](z, v)[..., None])(Z, V)
    return float(np.abs(got - WITHOUT_SUMS).max())


def test_the_fragile_form_is_wrong_on_one_version_alone() -> None:
    """A canary: without the fault nothing below can fail, and on another version the requirements would be wrong."""
    assert (without_sums("fragile") > 0.1) == FAULTY


@pytest.mark.parametrize("form", ["other order", "einsum"])
def test_the_other_forms_are_right(form: str) -> None:
    assert without_sums(form) < 1e-5


def test_the_faulty_version_is_left_out() -> None:
    assert any(re.match(r"jax\b(?!lib).*!=\s*0\.10\.2", requirement) for requirement in SPECIFIED)
    assert "0.10.2" in (ROOT / "README.md").read_text()


@only_faulty
def test_the_check_names_the_remedy() -> None:
    run = subprocess.run([sys.executable, "-m", "jaxent.cli", "check", "entropy"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "XLA_FLAGS" in run.stdout + run.stderr
    assert REMEDY in run.stdout + run.stderr


def test_the_hessian_of_the_issue() -> None:
    z = jax.random.normal(jax.random.key(0), (100, 10))
    hessian = jax.jit(jax.hessian(jaxent.softmax_cross_entropy))(z, jnp.arange(100) % 10).reshape(1000, 1000)
    p = ref.softmax(z)
    want = np.zeros((100, 10, 100, 10))
    want[np.arange(100), :, np.arange(100)] = (p[:, :, None] * np.eye(10) - p[:, :, None] * p[:, None]) / 100
    close(hessian, want.reshape(1000, 1000))
    close(np.trace(hessian), 0.8104, rtol=1e-3)
    close(hessian, hessian.T)


# ----------------------------------------------------------------------------------------------------------------------
# Losses on logits, against float64


def rows_of(weights: Any) -> np.ndarray:
    return np.broadcast_to(ref.wide(weights), (ROWS,))[None, :, None]


def z_loss_products(zeta: float) -> np.ndarray:
    """Of zeta lse^2: 2 zeta (p <p, v> + lse H v)."""
    p, lse = ref.softmax(Z), np.log(np.exp(ref.wide(Z)).sum(-1, keepdims=True))
    return 2 * zeta * (p * (p * V).sum(-1, keepdims=True) + lse * PRODUCTS)


ce = jaxent.softmax_cross_entropy
SUM: dict[str, Any] = {"reduction": "sum"}
NLL = -ref.log_softmax(Z)
WITH_FORMULA: dict[str, tuple[Call, np.ndarray]] = {
    "labels": (lambda z: ce(z, Y), PRODUCTS / ROWS),
    "probabilities": (lambda z: ce(z, T, **SUM), PRODUCTS),
    "label_smoothing": (lambda z: ce(z, Y, label_smoothing=0.25, **SUM), PRODUCTS),
    "z_loss": (lambda z: ce(z, Y, z_loss=0.25, **SUM), PRODUCTS + z_loss_products(0.25)),
    "weights": (lambda z: ce(z, Y, weights=W_ROWS, **SUM), rows_of(W_ROWS) * PRODUCTS),
    "class_weights": (lambda z: ce(z, Y, class_weights=W_CLASSES, **SUM), rows_of(W_CLASSES[Y]) * PRODUCTS),
    "weighted probabilities": (
        lambda z: ce(z, T, class_weights=W_CLASSES, **SUM),
        rows_of((W_CLASSES * ref.wide(T)).sum(-1)) * PRODUCTS,
    ),
    "where": (lambda z: ce(z, Y, where=KEPT, **SUM), rows_of(KEPT) * PRODUCTS),
    "ignore_index": (lambda z: ce(z, Y, ignore_index=3, **SUM), rows_of(Y != 3) * PRODUCTS),
    "denominator": (lambda z: ce(z, Y, denominator=7.0), PRODUCTS / 7),
    "none": (lambda z: (W_ROWS * ce(z, Y, reduction="none")).sum(), rows_of(W_ROWS) * PRODUCTS),
    "sum_and_weight": (lambda z: ce(z, Y, reduction="sum_and_weight").mean(), PRODUCTS / ROWS),
    "axis 0": (lambda z: ce(z.T, Y, axis=0, **SUM), PRODUCTS),
    "nll_loss": (lambda z: jaxent.nll_loss(jax.nn.log_softmax(z), Y, **SUM), PRODUCTS),
    "EmpiricalRisk": (lambda z: jaxent.EmpiricalRisk().update(ce(z, Y, reduction="none")).mean(), PRODUCTS / ROWS),
    "log_prob": (lambda z: -jaxent.token_statistics(z, Y).log_prob.sum(), PRODUCTS),
    "log_normalizer": (lambda z: jaxent.token_statistics(z).log_normalizer.sum(), PRODUCTS),
    "cross_entropy_with_logits": (lambda z: jaxent.cross_entropy_with_logits(Z2, z).sum(), PRODUCTS),
    "kl_divergence_with_logits": (lambda z: jaxent.kl_divergence_with_logits(Z2, z).sum(), PRODUCTS),
    "self_information_with_logits": (
        lambda z: jaxent.self_information_with_logits(z).sum(),
        CLASSES * PRODUCTS,
    ),
    "sigmoid_cross_entropy": (
        lambda z: jaxent.sigmoid_cross_entropy(z, T, **SUM),
        V / (1 + np.exp(ref.wide(Z))) / (1 + np.exp(-ref.wide(Z))),
    ),
    "torch_compat.cross_entropy": (lambda z: nn.cross_entropy(z, Y, label_smoothing=0.1), PRODUCTS / ROWS),
    "torch_compat.nll_loss": (lambda z: nn.nll_loss(nn.log_softmax(z, 1), Y), PRODUCTS / ROWS),
    "torch_compat.kl_div": (lambda z: nn.kl_div(nn.log_softmax(z, 1), T, reduction="sum"), PRODUCTS),
    "linear in logits": (
        lambda z: jaxent.linear_softmax_cross_entropy(z, np.eye(CLASSES, dtype=np.float32), Y, **SUM),
        PRODUCTS,
    ),
}


# No compiler that the requirements allow has the fault, and which row sum has which form is seen in the program, for
# every function, in `test_row_sums.py`: outside `slow` runs what keeps these tests able to see it.
RUN = ("labels", "sigmoid_cross_entropy")
MODES = ["jacfwd", "jacrev", "reverse over reverse", "vmap of hessian", "eager"]


@pytest.mark.parametrize("name", marked(WITH_FORMULA, RUN))
def test_products_of_losses_on_logits(name: str) -> None:
    f, want = WITH_FORMULA[name]
    many, one = products(f, Z, V)
    close(one, want[-1])
    close(many, want)


@pytest.mark.parametrize("mode", marked(MODES, ["reverse over reverse"]))
def test_products_in_every_mode(mode: str) -> None:
    f = lambda z: ce(z, Y, **SUM)  # noqa: E731
    blocks = ref.softmax(Z)[:, :, None] * (np.eye(CLASSES) - ref.softmax(Z)[:, None])
    if mode == "jacfwd":
        got = np.einsum("nimj->nmij", jax.jacfwd(jax.grad(f))(Z))[np.arange(ROWS), np.arange(ROWS)]
        close(got, blocks)
    elif mode == "jacrev":
        got = np.einsum("nimj->nmij", jax.jacrev(jax.grad(f))(Z))[np.arange(ROWS), np.arange(ROWS)]
        close(got, blocks)
    elif mode == "reverse over reverse":
        got = jax.jit(jax.vmap(lambda v: jax.grad(lambda z: (jax.grad(f)(z) * v).sum())(Z)))(V)
        close(got, PRODUCTS)
    elif mode == "vmap of hessian":
        many = np.tile(Z, (8, 1))
        labels = np.tile(Y, 8)
        got = jax.jit(jax.vmap(jax.hessian(lambda z, y: ce(z, y))))(many, labels)
        close(got, np.tile(blocks, (8, 1, 1)))
    else:
        close(jax.vmap(lambda v: jax.jvp(jax.grad(f), (jnp.asarray(Z),), (v,))[1])(V), PRODUCTS)


@pytest.mark.parametrize("dtype", marked(["bfloat16", "float16", "float64"], ["bfloat16"]))
def test_products_in_other_dtypes(dtype: Any) -> None:
    with jax.enable_x64(dtype == "float64"):
        z, v = jnp.asarray(Z, dtype), jnp.asarray(V, dtype)
        many, _ = products(lambda z: ce(z, Y, **SUM), z, v)
        close(many, ref.hessian_product(z, v), rtol=1e-12 if dtype == "float64" else 2e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.slow
def test_closed_gradients_and_hessians() -> None:
    gradient = lambda z: jaxent.softmax_cross_entropy_gradient(z, Y, **SUM)  # noqa: E731
    close(jax.jit(jax.vmap(lambda v: jax.jvp(gradient, (Z,), (v,))[1]))(V), PRODUCTS)
    close(jax.jit(jax.vmap(lambda v: jax.vjp(gradient, jnp.asarray(Z))[1](v)[0]))(V), PRODUCTS)
    close(jax.jit(jax.vmap(lambda v: jaxent.logit_hessian_product(Z, v)))(V), PRODUCTS)
    stacked = jaxent.logit_hessian_product(np.tile(Z, (DIRECTIONS, 1)), V.reshape(-1, CLASSES))
    close(stacked, PRODUCTS.reshape(-1, CLASSES))
    many = np.tile(Z, (8, 1))
    p = ref.softmax(many)
    close(jaxent.logit_hessian(many), p[:, :, None] * (np.eye(CLASSES) - p[:, None]))
    fixed = jax.jit(jax.vmap(lambda z: jaxent.logit_hessian_product(z, Z2)))(V)
    close(fixed, ref.hessian_product(V, np.broadcast_to(Z2, V.shape)))


def test_gauss_newton_and_fisher_products() -> None:
    g = ref.softmax(Z) - ref.onehot(Y, CLASSES)
    ggn = jax.jit(jax.vmap(lambda v: jaxent.ggn_vector_product(lambda z: z, Z, v, **SUM)))(V)
    close(ggn, PRODUCTS)
    fisher = jax.jit(jax.vmap(lambda v: jaxent.fisher_vector_product(lambda z: z, Z, Y, v, **SUM)))(V)
    close(fisher, g * (g * V).sum(-1, keepdims=True))
    by_hidden = jax.jit(jax.vmap(lambda v: jaxent.linear_ggn_vector_product(H, W, (v, None), chunk_rows=32, **SUM)[0]))
    z = ref.wide(H) @ W
    close(by_hidden(VH), ref.hessian_product(z, VH @ W) @ ref.wide(W).T)
    g = ref.softmax(z) - ref.onehot(Y, CLASSES)
    by_hidden = jax.jit(jax.vmap(lambda v: jaxent.linear_fisher_vector_product(H, W, Y, (v, None), **SUM)[0]))
    close(by_hidden(VH), (g * (g * (VH @ W)).sum(-1, keepdims=True)) @ ref.wide(W).T)


# ----------------------------------------------------------------------------------------------------------------------
# Linear losses, against float64

LOGITS = ref.wide(H) @ W + B
BY_HIDDEN = ref.hessian_product(LOGITS, VH @ W) @ ref.wide(W).T
BY_KERNEL = np.einsum("nd,knc->kdc", H, ref.hessian_product(LOGITS, H @ VW))
L = jaxent.linear_softmax_cross_entropy


def user_rows(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=-1)[:, 0]


BIAS: dict[str, Any] = {"bias": B}
LINEAR: dict[str, tuple[Call, float | np.ndarray]] = {
    "labels": (lambda h, w: L(h, w, Y, **BIAS, **SUM), 1.0),
    "mean": (lambda h, w: L(h, w, Y, **BIAS), 1 / ROWS),
    "chunks": (lambda h, w: L(h, w, Y, chunk_rows=32, **BIAS, **SUM), 1.0),
    "probabilities": (lambda h, w: L(h, w, T, **BIAS, **SUM), 1.0),
    "smoothed": (lambda h, w: L(h, w, Y, label_smoothing=0.25, **BIAS, **SUM), 1.0),
    "none": (lambda h, w: L(h, w, Y, reduction="none", **BIAS).sum(), 1.0),
    "statistics": (lambda h, w: -jaxent.linear_token_statistics(h, w, Y, **BIAS).log_prob.sum(), 1.0),
    "log_normalizer": (lambda h, w: jaxent.linear_token_statistics(h, w, **BIAS).log_normalizer.sum(), 1.0),
    "torch_compat": (lambda h, w: nn.linear_cross_entropy(h, w.T, Y, linear_bias=B, reduction="sum"), 1.0),
    "linear_loss": (lambda h, w: ROWS * jaxent.linear_loss(user_rows, h, w, Y, **BIAS), 1.0),
    "divergence": (lambda h, w: jaxent.linear_kl_divergence(H, W, h, w, bias_p=B, bias_q=B, **SUM), 1.0),
}


@pytest.mark.parametrize("name", marked(LINEAR, ["chunks"]))
def test_products_of_linear_losses(name: str) -> None:
    f, scale = LINEAR[name]
    many, one = products(lambda h: f(h, W), H, VH)
    close(one, scale * BY_HIDDEN[-1])
    close(many, scale * BY_HIDDEN)
    many, one = products(lambda w: f(H, w), W, VW)
    close(one, scale * BY_KERNEL[-1])
    close(many, scale * BY_KERNEL)


# ----------------------------------------------------------------------------------------------------------------------
# What has no short formula: many directions at once against one at a time

POSITIVE = (ref.softmax(Z) + 0.01).astype(np.float32)
OTHERS: dict[str, tuple[Call, np.ndarray]] = {
    "entropy_with_logits": (lambda z: jaxent.entropy_with_logits(z).sum(), Z),
    "statistics entropy": (lambda z: jaxent.token_statistics(z).entropy.sum(), Z),
    "cross_entropy_with_logits of p": (lambda z: jaxent.cross_entropy_with_logits(z, Z2).sum(), Z),
    "kl_divergence_with_logits of p": (lambda z: jaxent.kl_divergence_with_logits(z, Z2).sum(), Z),
    "kl of a removed class": (
        lambda z: jaxent.kl_divergence_with_logits(
            z.at[:, 0].set(-jnp.inf), jnp.asarray(Z2).at[:, 0].set(-jnp.inf)
        ).sum(),
        Z,
    ),
    "squared norms": (lambda z: (jaxent.softmax_cross_entropy_gradient(z, Y) ** 2).sum(), Z),
    "pos_weight": (lambda z: jaxent.sigmoid_cross_entropy(z, T, pos_weight=W_CLASSES), Z),
    "torch_compat.softmax": (lambda z: (nn.softmax(z, 1) ** 2).sum(), Z),
    "torch_compat.binary": (lambda z: nn.binary_cross_entropy_with_logits(z, T), Z),
    "entropy": (lambda p: jaxent.entropy(p).sum(), POSITIVE),
    "cross_entropy": (lambda p: jaxent.cross_entropy(p, p * T).sum(), POSITIVE),
    "kl_divergence": (lambda p: jaxent.kl_divergence(p, T).sum() + jaxent.kl_divergence(T, p).sum(), POSITIVE),
    "jensen_shannon_divergence": (lambda p: jaxent.jensen_shannon_divergence(p, T).sum(), POSITIVE),
    "perplexity": (lambda p: jaxent.perplexity(p).sum(), POSITIVE),
    "renyi_entropy 0.5": (lambda p: jaxent.renyi_entropy(p, 0.5).sum(), POSITIVE),
    "renyi_entropy 2": (lambda p: jaxent.renyi_entropy(p, 2).sum(), POSITIVE),
    "renyi_divergence 0.5": (lambda p: jaxent.renyi_divergence(p, T, 0.5).sum(), POSITIVE),
    "renyi_divergence 3": (lambda p: jaxent.renyi_divergence(T, p, 3).sum(), POSITIVE),
    "tsallis_entropy": (lambda p: jaxent.tsallis_entropy(p, 1.5).sum(), POSITIVE),
    "joint_entropy": (lambda p: jaxent.joint_entropy(p.reshape(ROWS, 2, 5)).sum(), POSITIVE),
    "conditional_entropy": (lambda p: jaxent.conditional_entropy(p.reshape(ROWS, 2, 5)).sum(), POSITIVE),
    "mutual_information": (lambda p: jaxent.mutual_information(p.reshape(ROWS, 2, 5)).sum(), POSITIVE),
    "soft cap": (lambda h: L(h, W, Y, soft_cap=2.0, temperature=0.5), H),
    "linear z_loss": (lambda h: L(h, W, Y, z_loss=0.25, class_weights=W_CLASSES, weights=W_ROWS), H),
    "linear entropy": (lambda h: jaxent.linear_token_statistics(h, W).entropy.sum(), H),
    "reverse divergence": (lambda h: jaxent.linear_kl_divergence(H, 2 * W, h, W, divergence="reverse"), H),
    "js divergence": (lambda h: jaxent.linear_kl_divergence(H, 2 * W, h, W, divergence="jensen_shannon"), H),
    "teacher": (lambda h: jaxent.linear_kl_divergence(h, 2 * W, H, W), H),
    "norms": (lambda h: (jaxent.linear_gradient_norms(h, W, Y).residual ** 2).sum(), H),
}


@pytest.mark.parametrize("name", marked(OTHERS, ["jensen_shannon_divergence"]))
def test_many_directions_are_as_right_as_one(name: str) -> None:
    f, x = OTHERS[name]
    v = VH if x is H else V
    many, one = products(f, x, v)
    close(many[-1], one)
    gram = np.einsum("knc,lnc->kl", ref.wide(v), ref.wide(many))  # the Hessian is symmetric
    close(gram, gram.T)


# ----------------------------------------------------------------------------------------------------------------------
# Routes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "loss"), covering(["automatic", "explicit", "manual"], ["dense", "linear"]))
def test_products_on_a_mesh(loss: str, kind: str) -> None:
    rows, classes, directions = 104, 12, 256
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    z, h, w = (rng.normal(size=s).astype(np.float32) for s in ((rows, classes), (rows, 4), (4, classes)))
    y = (np.arange(rows) % classes).astype(np.int32)
    x, v = (
        (z, rng.normal(size=(directions, rows, classes)))
        if loss == "dense"
        else (h, rng.normal(size=(directions, rows, 4)))
    )
    v = v.astype(np.float32)
    x_spec = P("data", "vocab") if loss == "dense" else P("data")
    axis = {"vocab_axis": "vocab"} if kind == "manual" else {}

    def f(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        total = ce(x, y, **SUM, **axis) if loss == "dense" else L(x, w, y, **SUM, **axis)
        return jax.lax.psum(total, "data") if kind == "manual" else total

    specs = x_spec, P(None, "vocab"), P("data")
    with jax.set_mesh(mesh):
        g = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()) if kind == "manual" else f
        x, w_, y_, v_ = (
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip((x, w, y, v), (*specs, P(None, *x_spec)), strict=True)
        )
        product = lambda v: jax.jvp(jax.grad(lambda x: g(x, w_, y_)), (x,), (v,))[1]  # noqa: E731
        got = jax.jit(jax.vmap(product))(v_)
    if loss == "dense":
        close(got, ref.hessian_product(z, v))
    else:
        close(got, ref.hessian_product(ref.wide(h) @ w, v @ w) @ ref.wide(w).T)
