"""Losses on meshes: what goes in, how it is split, and the three ways in which JAX splits it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

# Untyped: tables of arguments are dictionaries, and what is returned depends on `reduction`.
softmax_cross_entropy: Any = jaxent.softmax_cross_entropy
nll_loss: Any = jaxent.nll_loss
sigmoid_cross_entropy: Any = jaxent.sigmoid_cross_entropy
token_statistics: Any = jaxent.token_statistics
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
linear_token_statistics: Any = jaxent.linear_token_statistics
linear_kl_divergence: Any = jaxent.linear_kl_divergence
linear_ggn_vector_product: Any = jaxent.linear_ggn_vector_product

# Each is divided by 8, none is a multiple of another or of a chunk, and no two products of their parts agree.
ROWS, FEATURES, CLASSES, TOP, CHUNK = 160, 7, 88, 3, 27
MESHES = {"8 data": (8, 1), "8 vocab": (1, 8), "2x4": (2, 4)}
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}


def make_mesh(shape: str, kind: str) -> jax.sharding.Mesh:
    sizes = MESHES[shape]
    return jax.make_mesh(sizes, ("data", "vocab"), axis_types=(KINDS[kind],) * 2)


ROW, CLASS, LOGITS, KERNEL = P("data"), P("vocab"), P("data", "vocab"), P(None, "vocab")


@functools.cache
def arrays() -> dict[str, tuple[np.ndarray, P]]:
    """Everything that a loss takes, with how it is split."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def fractions(*shape: int) -> np.ndarray:
        return (rng.integers(0, 9, size=shape) / 4).astype(np.float32)

    probabilities = np.exp(normal(ROWS, CLASSES))
    labels = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    # Of the eight runs of 20 rows, 0% to 95% are ignored: a mean of the devices' means is far off.
    ignored = np.arange(ROWS) % 20 < np.repeat(np.linspace(0, 19, 8).round(), 20)
    return {
        "z": (2 * normal(ROWS, CLASSES), LOGITS),
        "h": (normal(ROWS, FEATURES), ROW),
        "w": (normal(FEATURES, CLASSES), KERNEL),
        "b": (normal(CLASSES), CLASS),
        "h2": (normal(ROWS, FEATURES), ROW),
        "w2": (normal(FEATURES, CLASSES), KERNEL),
        "t": (probabilities / probabilities.sum(-1, keepdims=True), LOGITS),
        "c": (fractions(CLASSES), CLASS),
        "labels": (labels, ROW),
        "y": (np.where(ignored, -100, labels).astype(np.int32), ROW),
        "where": (~ignored, ROW),
        "weights": (fractions(ROWS), ROW),
        "s": (np.array([2.0, 1.5, 0.125, 0.25], np.float32), P()),  # soft cap, temperature, smoothing, z-loss
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """`f(by, options, *arrays)`: scalars and per-row results of `options`, `by` that reduces over the data axis."""

    f: Callable[..., Any]
    wanted: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.wanted + self.others


def _summed(x: Any, by: str | None) -> Any:
    return x if by is None else jax.tree.map(lambda x: jax.lax.psum(x, by), x)


def _mean(loss: Any, by: str | None, *args: Any, **options: Any) -> jax.Array:
    """The mean; inside `shard_map` from the devices' weighted sums."""
    if by is None:
        return loss(*args, **options)
    return _summed(loss(*args, reduction="sum_and_weight", **options), by).mean()


def _statistics(stats: Any, by: str | None) -> tuple[jax.Array, Any]:
    """A scalar of what is differentiable, and everything."""
    parts = (jnp.square(stats.log_prob), stats.log_normalizer, stats.entropy)
    return _summed(sum(jnp.sum(x) for x in parts), by), stats


def _cases() -> dict[str, Case]:
    chunk = {"chunk_rows": CHUNK}

    def dense(by: Any, axis: Any, z: Any, c: Any, s: Any, y: Any, where: Any, weights: Any) -> Any:
        options = {"where": where, "weights": weights, "class_weights": c, "label_smoothing": s[2], "z_loss": s[3]}
        return _mean(softmax_cross_entropy, by, z, y, **options, **axis), None

    def probabilities(by: Any, axis: Any, z: Any, t: Any, c: Any, where: Any) -> Any:
        options = {"where": where, "class_weights": c, "label_smoothing": 0.125, "z_loss": 0.25}
        return _mean(softmax_cross_entropy, by, z, t, **options, **axis), None

    def nll(by: Any, axis: Any, z: Any, y: Any, c: Any, weights: Any) -> Any:
        return _mean(nll_loss, by, z, y, class_weights=c, weights=weights), None

    def sigmoid(by: Any, axis: Any, z: Any, t: Any, c: Any) -> Any:
        return _mean(sigmoid_cross_entropy, by, z, t, pos_weight=c), None

    def statistics(by: Any, axis: Any, z: Any, labels: Any) -> Any:
        return _statistics(token_statistics(z, labels, top_k=TOP, **axis), by)

    def linear(by: Any, axis: Any, h: Any, w: Any, b: Any, s: Any, y: Any, c: Any, where: Any) -> Any:
        shaping = {"soft_cap": s[0], "temperature": s[1], "label_smoothing": s[2], "z_loss": s[3]}
        options = {"bias": b, "where": where, "class_weights": c, **shaping, **chunk}
        return _mean(linear_softmax_cross_entropy, by, h, w, y, **options, **axis), None

    def dense_smoothed(by: Any, axis: Any, z: Any, y: Any) -> Any:
        return _mean(softmax_cross_entropy, by, z, y, label_smoothing=0.125, **axis), None

    def linear_smoothed(by: Any, axis: Any, h: Any, w: Any, y: Any) -> Any:
        return _mean(linear_softmax_cross_entropy, by, h, w, y, label_smoothing=0.125, **chunk, **axis), None

    def linear_rows(by: Any, axis: Any, h: Any, w: Any, y: Any, weights: Any) -> Any:
        options = {"weights": weights, "label_smoothing": 0.125, **chunk, **axis}
        losses = linear_softmax_cross_entropy(h, w, y, reduction="none", **options)
        return _summed(jnp.sum(jnp.square(losses)), by), losses

    def linear_statistics(by: Any, axis: Any, h: Any, w: Any, labels: Any) -> Any:
        return _statistics(linear_token_statistics(h, w, labels, top_k=TOP, **chunk, **axis), by)

    def divergence(by: Any, axis: Any, h: Any, w: Any, h2: Any, w2: Any, where: Any) -> Any:
        return _mean(linear_kl_divergence, by, h2, w2, h, w, where=where, **chunk, **axis), None

    def own(by: Any, axis: Any, h: Any, w: Any, s: Any, weights: Any) -> Any:
        def row_loss(z: jax.Array, weights: jax.Array, s: jax.Array) -> jax.Array:
            return weights * jnp.square(jax.nn.logsumexp(s[1] * z, axis=-1))

        return jaxent.linear_loss(row_loss, h, w, weights, params=s, chunk_rows=CHUNK), None

    return {
        "dense": Case(dense, ("z", "c", "s"), ("y", "where", "weights")),
        "probabilities": Case(probabilities, ("z", "t"), ("c", "where")),
        "nll": Case(nll, ("z",), ("y", "c", "weights")),
        "sigmoid": Case(sigmoid, ("z",), ("t", "c")),
        "statistics": Case(statistics, ("z",), ("labels",)),
        "linear": Case(linear, ("h", "w", "b", "s"), ("y", "c", "where")),
        "linear_rows": Case(linear_rows, ("h", "w"), ("y", "weights")),
        "linear_statistics": Case(linear_statistics, ("h", "w"), ("labels",)),
        "dense_smoothed": Case(dense_smoothed, ("z",), ("y",)),
        "linear_smoothed": Case(linear_smoothed, ("h", "w"), ("y",)),
        "divergence": Case(divergence, ("h", "w"), ("h2", "w2", "where")),
        "own": Case(own, ("h", "w", "s"), ("weights",)),
    }


CASES = _cases()
SHARDABLE = tuple(name for name in CASES if name not in ("nll", "sigmoid", "own"))  # those that take `vocab_axis`


def _rows_out(case: str) -> Any:
    """How the per-row results of a case leave `shard_map`."""
    return ROW if case in ("linear_rows", "statistics", "linear_statistics") else P()


def program(case: str, mesh: jax.sharding.Mesh | None = None, *, manual: bool = False) -> Callable[..., Any]:
    """Value with per-row results, gradient by what is wanted, and the Hessian product in the direction of it."""
    f, wanted = CASES[case].f, CASES[case].wanted

    def loss(*args: Any) -> Any:
        if not manual:
            return f(None, {}, *args)
        specs = tuple(arrays()[name][1] for name in CASES[case].names)
        part = functools.partial(f, "data", {"vocab_axis": "vocab"})
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(P(), _rows_out(case)))(*args)

    def everything(*args: Any) -> Any:
        primals, rest = args[: len(wanted)], args[len(wanted) :]

        def gradient(*primals: Any) -> Any:
            every = tuple(range(len(primals)))
            (value, rows), by = jax.value_and_grad(lambda *p: loss(*p, *rest), argnums=every, has_aux=True)(*primals)
            return by, (value, rows)

        by, product, out = jax.jvp(gradient, primals, primals, has_aux=True)
        return out, by, product

    return everything


def placed(case: str, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in (arrays()[n] for n in CASES[case].names)]


# What XLA sends is settled before code is emitted, which takes most of the time.
FAST: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # later there is no such option
    FAST["xla_cpu_use_fusion_emitters"] = False


def run(f: Callable[..., Any], *args: Any) -> Any:
    """`jit(f)(*args)`, compiled in a hurry."""
    return jax.jit(f).lower(*args).compile(FAST)(*args)


@functools.cache
def unsharded(case: str) -> Any:
    return run(program(case), *(arrays()[name][0] for name in CASES[case].names))


@functools.cache
def compiled(case: str, shape: str, kind: str) -> Any:
    mesh = make_mesh(shape, kind)
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        return jax.jit(program(case, mesh, manual=kind == "manual")).lower(*placed(case, mesh)).compile(FAST)
