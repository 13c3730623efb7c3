"""Calls as people write them: right, or an error that names the function, the argument and what to do."""

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference as ref
from cases import covering
from jax import monitoring
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
H, W = RNG.normal(size=(6, 4)).astype(np.float32), RNG.normal(size=(4, 8)).astype(np.float32)
Z, Y = H @ W, np.array([3, 0, 7, 2, 5, 1], np.int32)
PROBABILITIES = ref.softmax(Z).astype(np.float32)


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(ref.wide(got), ref.wide(want), rtol=rtol, atol=atol)


def user_rows(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), y[:, None], axis=-1)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# vmap(axis_name=...) in place of devices

DENSE_PARTS = np.stack(np.split(Z, 2, axis=1))  # (2, N, C / 2)
KERNEL_PARTS = np.stack(np.split(W, 2, axis=1))
DZ = ref.softmax(Z) - ref.onehot(Y, 8)
VMAPPED: dict[str, tuple[Call, np.ndarray, Any]] = {
    "softmax_cross_entropy": (
        lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v"),
        DENSE_PARTS,
        ref.nll(Z, Y).mean(),
    ),
    "none": (
        lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v", reduction="none"),
        DENSE_PARTS,
        ref.nll(Z, Y),
    ),
    "smoothed": (
        lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v", label_smoothing=0.5, z_loss=0.0),
        DENSE_PARTS,
        (0.5 * ref.nll(Z, Y) - 0.5 * ref.log_softmax(Z).mean(-1)).mean(),
    ),
    "token_statistics": (
        lambda z: jaxent.token_statistics(z, Y, vocab_axis="v").log_prob,
        DENSE_PARTS,
        -ref.nll(Z, Y),
    ),
    "entropy": (
        lambda z: jaxent.token_statistics(z, Y, vocab_axis="v").entropy,
        DENSE_PARTS,
        ref.entropy(PROBABILITIES),
    ),
    "linear_softmax_cross_entropy": (
        lambda w: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis="v"),
        KERNEL_PARTS,
        ref.nll(Z, Y).mean(),
    ),
    "linear none": (
        lambda w: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis="v", reduction="none"),
        KERNEL_PARTS,
        ref.nll(Z, Y),
    ),
    "linear_token_statistics": (
        lambda w: jaxent.linear_token_statistics(H, w, Y, vocab_axis="v").entropy,
        KERNEL_PARTS,
        ref.entropy(PROBABILITIES),
    ),
    "linear_kl_divergence": (
        lambda w: jaxent.linear_kl_divergence(H, w, H, 2 * w, vocab_axis="v"),
        KERNEL_PARTS,
        ref.kl(Z, 2 * Z).mean(),
    ),
    "linear_gradient_norms": (
        lambda w: jaxent.linear_gradient_norms(H, w, Y, vocab_axis="v").residual,
        KERNEL_PARTS,
        np.linalg.norm(DZ, axis=-1),
    ),
    "ggn by hidden": (
        lambda w: jaxent.linear_ggn_vector_product(H, w, (H, None), vocab_axis="v", reduction="sum")[0],
        KERNEL_PARTS,
        ref.hessian_product(Z, Z) @ W.T,
    ),
}


def or_error(f: Call) -> Any:
    """What it returns, or None where it says that it cannot."""
    try:
        return f()
    except (TypeError, ValueError, NotImplementedError) as error:
        assert "vocab_axis" in str(error), error  # noqa: PT017
        return None


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_in_place_of_devices(name: str) -> None:
    f, parts, want = VMAPPED[name]
    for run in (lambda g: g, jax.jit):
        got = or_error(lambda: run(jax.vmap(f, axis_name="v"))(parts))  # noqa: B023
        if got is not None:
            close(got, np.stack([want, want]), rtol=2e-5)


@pytest.mark.parametrize("route", ["dense", "linear", "closed form"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_gradients_under_vmap_in_place_of_devices(route: str, where: str) -> None:
    name = "softmax_cross_entropy" if route == "dense" else "linear_softmax_cross_entropy"
    f, parts, _ = VMAPPED[name]
    want = np.stack(np.split(DZ / 6 if route != "linear" else H.T @ DZ / 6, 2, axis=1))
    if route == "closed form":
        options = {"vocab_axis": "v"}
        got = or_error(
            lambda: jax.vmap(lambda z: jaxent.softmax_cross_entropy_gradient(z, Y, **options), axis_name="v")(
                DENSE_PARTS
            )
        )
    elif where == "inside":
        got = or_error(lambda: jax.vmap(jax.grad(f), axis_name="v")(parts))
    else:
        got = or_error(lambda: jax.grad(lambda parts: jax.vmap(f, axis_name="v")(parts)[0])(parts))
    if got is not None:
        close(got, want)


def test_vmap_over_a_batch_inside_shard_map_is_still_right() -> None:
    mesh = jax.make_mesh((4,), ("v",), axis_types=(AxisType.Auto,))
    f = lambda z: jax.vmap(lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v"))(z)  # noqa: E731
    sharded = jax.shard_map(f, mesh=mesh, in_specs=P(None, None, "v"), out_specs=P())
    both = np.stack([Z, 2 * Z])
    close(jax.jit(sharded)(both), ref.nll(both, np.stack([Y, Y])).mean(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries, options of other types


class Foreign:
    """An array of a library whose dtypes NumPy does not know, as PyTorch's."""

    class Dtype:
        def __init__(self, name: str):
            self.name = name

        def __repr__(self) -> str:
            return f"torch.{self.name}"

    def __init__(self, array: np.ndarray):
        self.array, self.dtype, self.shape = array, self.Dtype(array.dtype.name), array.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array.astype(dtype or self.array.dtype)


def torch_tensor(array: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(np.ascontiguousarray(array))


FOREIGN: dict[str, tuple[Call, str, str, Any]] = {
    "labels": (
        lambda as_: jaxent.softmax_cross_entropy(Z, as_(Y.astype(np.int64))),
        "softmax_cross_entropy",
        "targets",
        ref.nll(Z, Y).mean(),
    ),
    "logits": (
        lambda as_: jaxent.softmax_cross_entropy(as_(Z), Y),
        "softmax_cross_entropy",
        "logits",
        ref.nll(Z, Y).mean(),
    ),
    "where": (
        lambda as_: jaxent.softmax_cross_entropy(Z, Y, where=as_(Y > 2)),
        "softmax_cross_entropy",
        "where",
        ref.nll(Z, Y)[Y > 2].mean(),
    ),
    "weights": (
        lambda as_: jaxent.nll_loss(-np.abs(Z), Y, weights=as_(np.ones(6, np.float32))),
        "nll_loss",
        "weights",
        np.abs(Z)[range(6), Y].mean(),
    ),
    "binary targets": (
        lambda as_: jaxent.sigmoid_cross_entropy(Z, as_(PROBABILITIES)),
        "sigmoid_cross_entropy",
        "targets",
        ref.sigmoid_nll(Z, PROBABILITIES).mean(),
    ),
    "hidden": (
        lambda as_: jaxent.linear_softmax_cross_entropy(as_(H), W, Y),
        "linear_softmax_cross_entropy",
        "hidden",
        ref.nll(Z, Y).mean(),
    ),
    "statistics": (
        lambda as_: -jaxent.linear_token_statistics(H, W, as_(Y.astype(np.int64))).log_prob,
        "linear_token_statistics",
        "labels",
        ref.nll(Z, Y),
    ),
    "measure": (lambda as_: jaxent.entropy(as_(PROBABILITIES)), "entropy", "p", ref.entropy(PROBABILITIES)),
    "twin": (lambda as_: nn.cross_entropy(Z, as_(Y.astype(np.int64))), "cross_entropy", "target", ref.nll(Z, Y).mean()),
    "twin input": (lambda as_: nn.cross_entropy(as_(Z), Y), "cross_entropy", "input", ref.nll(Z, Y).mean()),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_arrays_of_another_library(name: str) -> None:
    f, function, argument, want = FOREIGN[name]
    for library in (Foreign, torch_tensor) if importlib.util.find_spec("torch") else (Foreign,):
        try:
            got = f(library)
        except TypeError as error:
            assert re.search(rf"jaxent\.(torch_compat\.)?{function}: `{argument}` must", str(error)), error  # noqa: PT017
            assert "torch" in str(error)  # noqa: PT017
            assert "Cannot interpret" not in str(error)  # noqa: PT017
        else:
            close(got, want)


TWINS: dict[str, Call] = {
    "cross_entropy": lambda **o: nn.cross_entropy(Z, Y, **o),
    "cross_entropy of probabilities": lambda **o: nn.cross_entropy(Z, PROBABILITIES, **o),
    "nll_loss": lambda **o: nn.nll_loss(-np.abs(Z), Y, **o),
    "CrossEntropyLoss": lambda **o: nn.CrossEntropyLoss(**o)(Z, PROBABILITIES),
    "NLLLoss": lambda **o: nn.NLLLoss(**o)(-np.abs(Z), Y),
}


@pytest.mark.parametrize("index", [None, "7", 7.0, True], ids=repr)
@pytest.mark.parametrize("name", TWINS)
def test_an_ignore_index_that_is_not_an_int(name: str, index: Any) -> None:
    """None may mean that no row is ignored, as in the other losses."""
    try:
        got = TWINS[name](ignore_index=index)
    except TypeError as error:
        assert re.search(r"jaxent\.torch_compat\.\w+: `ignore_index` must", str(error)), error  # noqa: PT017
    else:
        assert index is None
        close(got, TWINS[name]())


def test_numpy_integers_are_integers() -> None:
    n = np.int64
    want = ref.nll(Z, Y).mean()
    close(jaxent.linear_softmax_cross_entropy(H, W, Y, chunk_rows=n(2)), want)
    close(jaxent.linear_loss(user_rows, H, W, Y, chunk_rows=n(2), reduction="mean"), want)
    close(jaxent.linear_kl_divergence(H, W, H, 2 * W, chunk_rows=np.int32(2)), ref.kl(Z, 2 * Z).mean())
    stats = jaxent.linear_token_statistics(H, W, Y, chunk_rows=np.uint8(2), top_k=n(2))
    close(stats.top_log_probs, -np.sort(-ref.log_softmax(Z))[:, :2])
    assert jaxent.token_statistics(Z, Y, top_k=n(2)).top_classes.shape == (6, 2)
    close(jaxent.linear_gradient_norms(H, W, Y, chunk_rows=n(2)).residual, np.linalg.norm(DZ, axis=-1))
    close(jaxent.softmax_cross_entropy(Z, Y, ignore_index=n(3), axis=n(-1)), ref.nll(Z, Y)[1:].mean())
    product = jaxent.linear_ggn_vector_product(H, W, (H, None), chunk_rows=n(2))[0]
    close(product, ref.hessian_product(Z, Z) @ W.T / 6)
    assert jaxent.plan(n(32), n(8), n(16), chunk_rows=n(16)).num_chunks == 2
    assert jaxent.plan(32, 8, 16, chunk_rows=np.int32(16)) == jaxent.plan(32, 8, 16, chunk_rows=16)


@pytest.mark.parametrize("rows", [True, 2.0, "2"], ids=repr)
def test_chunk_rows_of_another_type(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"jaxent\.linear_softmax_cross_entropy: `chunk_rows` must"):
        jaxent.linear_softmax_cross_entropy(H, W, Y, chunk_rows=rows)


@pytest.mark.parametrize("dtype", ["bf16", "half precision", 7, None])
def test_invalid_dtypes(dtype: Any) -> None:
    for f, name in (
        (lambda: jaxent.plan(8, 8, 8, dtype=dtype), "plan"),
        (lambda: nn.softmax(Z, 1, dtype=dtype), "torch_compat.softmax"),
        (lambda: nn.log_softmax(Z, 1, dtype=dtype), "torch_compat.log_softmax"),
    ):
        if dtype is None:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"jaxent\.{name}: `dtype` must"):
            f()


# ----------------------------------------------------------------------------------------------------------------------
# Masks, counts, flags

MASK = np.array([1, 0, 1, 1, 0, 1])
ROW_MASKED: dict[str, Call] = {
    "softmax_cross_entropy": lambda m: jaxent.softmax_cross_entropy(Z, Y, where=m),
    "softmax_cross_entropy_gradient": lambda m: jaxent.softmax_cross_entropy_gradient(Z, Y, where=m),
    "nll_loss": lambda m: jaxent.nll_loss(Z, Y, where=m),
    "sigmoid_cross_entropy": lambda m: jaxent.sigmoid_cross_entropy(Z[:, 0], PROBABILITIES[:, 0], where=m),
    "token_statistics": lambda m: jaxent.token_statistics(Z, Y, where=m),
    "linear_softmax_cross_entropy": lambda m: jaxent.linear_softmax_cross_entropy(H, W, Y, where=m),
    "linear_token_statistics": lambda m: jaxent.linear_token_statistics(H, W, Y, where=m),
    "linear_kl_divergence": lambda m: jaxent.linear_kl_divergence(H, W, H, W, where=m),
    "linear_loss": lambda m: jaxent.linear_loss(user_rows, H, W, Y, where=m),
    "linear_gradient_norms": lambda m: jaxent.linear_gradient_norms(H, W, Y, where=m),
    "linear_ggn_vector_product": lambda m: jaxent.linear_ggn_vector_product(H, W, (H, None), where=m),
    "ggn_vector_product": lambda m: jaxent.ggn_vector_product(lambda z: z, Z, Z, where=m),
    "fisher_vector_product": lambda m: jaxent.fisher_vector_product(lambda z: z, Z, Y, Z, where=m),
    "gradient_noise_scale": lambda m: jaxent.gradient_noise_scale(np.ones(6, np.float32), 0.5, where=m),
    "diagnose": lambda m: jaxent.diagnose(Z, Y, where=m),
    "entropy": lambda m: jaxent.entropy(PROBABILITIES[:, :6], where=m),
    "kl_divergence": lambda m: jaxent.kl_divergence(PROBABILITIES[:, :6], PROBABILITIES[:, :6], where=m),
    "entropy_with_logits": lambda m: jaxent.entropy_with_logits(Z[:, :6], where=m),
}


@pytest.mark.parametrize("name", ROW_MASKED)
def test_an_attention_mask_of_integers(name: str) -> None:
    for dtype in (np.int32, np.float32):
        with pytest.raises(TypeError, match=rf"jaxent\.{name}: `where` must .*astype\(bool\)"):
            ROW_MASKED[name](MASK.astype(dtype))


COUNTS = np.array([[3, 5, 2], [1, 0, 4]])
MEASURES: dict[str, Call] = {
    "entropy": jaxent.entropy,
    "perplexity": jaxent.perplexity,
    "renyi_entropy": lambda p: jaxent.renyi_entropy(p, 2),
    "tsallis_entropy": lambda p: jaxent.tsallis_entropy(p, 2),
    "cross_entropy": lambda p: jaxent.cross_entropy(p, p),
    "kl_divergence": lambda p: jaxent.kl_divergence(p, p),
    "jensen_shannon_divergence": lambda p: jaxent.jensen_shannon_divergence(p, p),
    "renyi_divergence": lambda p: jaxent.renyi_divergence(p, p, 2),
    "joint_entropy": jaxent.joint_entropy,
    "conditional_entropy": jaxent.conditional_entropy,
    "mutual_information": jaxent.mutual_information,
    "self_information": jaxent.self_information,
}


@pytest.mark.parametrize("name", MEASURES)
def test_counts_in_place_of_probabilities(name: str) -> None:
    for counts in (COUNTS, jnp.asarray(COUNTS)):
        with pytest.raises(TypeError, match=rf"jaxent\.{name}: `\w+` must .*counts / counts\.sum\(\)"):
            MEASURES[name](counts)


FLAGS = np.array([True, False, True, True, False, True])
WEIGHED: dict[str, Call] = {
    "softmax_cross_entropy": lambda w: jaxent.softmax_cross_entropy(Z, Y, weights=w),
    "of probabilities": lambda w: jaxent.softmax_cross_entropy(Z, PROBABILITIES, weights=w),
    "softmax_cross_entropy_gradient": lambda w: jaxent.softmax_cross_entropy_gradient(Z, Y, weights=w),
    "nll_loss": lambda w: jaxent.nll_loss(-np.abs(Z), Y, weights=w),
    "sigmoid_cross_entropy": lambda w: jaxent.sigmoid_cross_entropy(Z[:, 0], PROBABILITIES[:, 0], weights=w),
    "linear_softmax_cross_entropy": lambda w: jaxent.linear_softmax_cross_entropy(H, W, Y, weights=w),
    "linear_kl_divergence": lambda w: jaxent.linear_kl_divergence(H, W, H, 2 * W, weights=w),
    "linear_loss": lambda w: jaxent.linear_loss(user_rows, H, W, Y, weights=w),
    "linear_gradient_norms": lambda w: jaxent.linear_gradient_norms(H, W, Y, weights=w).kernel,
    "ggn_vector_product": lambda w: jaxent.ggn_vector_product(lambda z: z, Z, Z, weights=w),
    "empirical_distribution": lambda w: jaxent.empirical_distribution(Y, 8, weights=w),
    "EmpiricalRisk": lambda w: jaxent.EmpiricalRisk().update(H[:, 0], w).mean(),
    "class_weights": lambda w: jaxent.softmax_cross_entropy(Z[:, :6], Y % 6, class_weights=w),
    "pos_weight": lambda w: jaxent.sigmoid_cross_entropy(Z[:, :6], PROBABILITIES[:, :6], pos_weight=w),
    "twin weight": lambda w: nn.cross_entropy(Z[:, :6], Y % 6, w),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_bool_weights_count_as_0_and_1(name: str) -> None:
    f = WEIGHED[name]
    want = f(FLAGS.astype(np.float32))
    close(f(FLAGS), want, rtol=1e-6)
    if name in ("softmax_cross_entropy", "linear_softmax_cross_entropy", "EmpiricalRisk"):
        close(jax.jit(f)(jnp.asarray(FLAGS)), want)


def test_labels_of_images_with_classes_last() -> None:
    """In PyTorch's layout the classes lie on axis 1."""
    z, labels = np.zeros((2, 4, 5, 3), np.float32), np.zeros((2, 4, 5), np.int32)
    for f in (nn.cross_entropy, nn.CrossEntropyLoss(), nn.nll_loss, nn.NLLLoss()):
        with pytest.raises(ValueError, match=r"(?s)jaxent\.torch_compat\.\w+: `target` must .*axis 1"):
            f(z, labels)
        f(np.moveaxis(z, -1, 1), labels)
    with pytest.raises(ValueError, match=r"(?s)`target` must .*axis 1"):
        nn.cross_entropy(z, np.zeros((2, 4, 5, 4), np.float32))


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
# Several mesh axes for the vocabulary

SPLIT = P(None, ("a", "b"))
OVER_TWO_AXES: dict[str, tuple[Call, Any]] = {
    "softmax_cross_entropy": (
        lambda z, w, axis: jaxent.softmax_cross_entropy(z, Y, vocab_axis=axis),
        ref.nll(Z, Y).mean(),
    ),
    "token_statistics": (
        lambda z, w, axis: jaxent.token_statistics(z, Y, vocab_axis=axis, top_k=2).top_log_probs.sum(),
        -np.sort(-ref.log_softmax(Z))[:, :2].sum(),
    ),
    "linear_softmax_cross_entropy": (
        lambda z, w, axis: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis=axis, label_smoothing=0.5),
        (0.5 * ref.nll(Z, Y) - 0.5 * ref.log_softmax(Z).mean(-1)).mean(),
    ),
    "linear_token_statistics": (
        lambda z, w, axis: jaxent.linear_token_statistics(H, w, Y, vocab_axis=axis).entropy.sum(),
        ref.entropy(PROBABILITIES).sum(),
    ),
    "linear_kl_divergence": (
        lambda z, w, axis: jaxent.linear_kl_divergence(H, w, H, 2 * w, vocab_axis=axis),
        ref.kl(Z, 2 * Z).mean(),
    ),
    "linear_gradient_norms": (
        lambda z, w, axis: jaxent.linear_gradient_norms(H, w, Y, vocab_axis=axis).residual.sum(),
        np.linalg.norm(DZ, axis=-1).sum(),
    ),
}


@pytest.mark.parametrize("name", OVER_TWO_AXES)
def test_a_vocabulary_over_two_mesh_axes(name: str) -> None:
    f, want = OVER_TWO_AXES[name]
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def sharded(axis: Any, z: Any, w: Any) -> Any:
        g = jax.shard_map(lambda z, w: f(z, w, axis), mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=P())
        return jax.jit(g)(z, w)

    close(sharded(("a", "b"), Z, W), want)
    if name == "softmax_cross_entropy":
        close(jax.grad(lambda z: sharded(("a", "b"), z, W))(jnp.asarray(Z)), DZ / 6)
    if name == "linear_softmax_cross_entropy":
        wanted = H.T @ (ref.softmax(Z) - 0.5 * ref.onehot(Y, 8) - 0.5 / 8) / 6
        close(jax.grad(lambda w: sharded(("a", "b"), Z, w))(jnp.asarray(W)), wanted)


def test_a_tuple_of_one_mesh_axis() -> None:
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    f = lambda w: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis=("a",))  # noqa: E731
    close(jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(None, "a"), out_specs=P()))(W), ref.nll(Z, Y).mean())


@pytest.mark.parametrize("axis", [3, ("v", 3)], ids=str)
def test_a_vocab_axis_of_another_type(axis: Any) -> None:
    with pytest.raises(TypeError, match=r"jaxent\.softmax_cross_entropy: `vocab_axis` must"):
        jaxent.softmax_cross_entropy(Z, Y, vocab_axis=axis)


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


@pytest.mark.parametrize("name", EXPORTED)
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


# ----------------------------------------------------------------------------------------------------------------------
# The recipes of the page on optax, with gradients, at easy and at impossible examples


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
