"""Losses on meshes: what goes in, how it is split, and the three ways in which JAX splits it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FAST, run
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
def arrays() -> dict[str, tuple[Any, P]]:
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
        "cap": (np.float32(2.0), P()),
        "temperature": (np.float32(1.5), P()),
        "smoothing": (np.float32(0.125), P()),
        "zeta": (np.float32(0.25), P()),
    }


# ----------------------------------------------------------------------------------------------------------------------
# How a call becomes a scalar and its results per row. `data` are the mesh axes of the rows inside `shard_map`.


def summed(x: Any, data: Any) -> Any:
    return x if data is None else jax.tree.map(lambda x: jax.lax.psum(x, data), x)


def mean(call: Callable[..., Any], data: Any) -> tuple[jax.Array, None]:
    """The mean; inside `shard_map` from the devices' weighted sums."""
    return call() if data is None else summed(call(reduction="sum_and_weight"), data).mean(), None


def whole(call: Callable[..., Any], data: Any) -> tuple[jax.Array, None]:
    del data
    return call(), None


def rows(call: Callable[..., Any], data: Any) -> tuple[jax.Array, jax.Array]:
    losses = call(reduction="none")
    return summed(jnp.sum(jnp.square(losses)), data), losses


def statistics(call: Callable[..., Any], data: Any) -> tuple[jax.Array, Any]:
    """A scalar of what is differentiable, and everything."""
    found = call()
    parts = (jnp.square(found.log_prob), found.log_normalizer, found.entropy)
    return summed(sum(jnp.sum(x) for x in parts), data), found


@dataclasses.dataclass(frozen=True)
class Case:
    """`function(*data, **keywords, **constants)`; data and keywords are names in `arrays()`."""

    function: Any
    data: tuple[str, ...]
    wanted: tuple[str, ...]  # what the result is differentiated with respect to
    keywords: dict[str, str] = dataclasses.field(default_factory=dict)
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: Callable[..., tuple[jax.Array, Any]] = mean
    takes_vocab_axis: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that the call takes, those that are differentiated first."""
        return tuple(dict.fromkeys((*self.wanted, *self.data, *self.keywords.values())))

    def __call__(self, data: Any, axis: dict[str, Any], *args: Any) -> tuple[jax.Array, Any]:
        values = dict(zip(self.names, args, strict=True))
        keywords = {keyword: values[name] for keyword, name in self.keywords.items()}
        operands = [values[name] for name in self.data]
        call = functools.partial(self.function, *operands, **keywords, **self.constants, **axis)
        return self.result(call, data)


def squared_normalizer(z: jax.Array, weights: jax.Array, temperature: jax.Array) -> jax.Array:
    """A row loss of the user's own."""
    return weights * jnp.square(jax.nn.logsumexp(temperature * z, axis=-1))


ROW_OPTIONS = {"where": "where", "weights": "weights", "class_weights": "c"}
SMOOTHED = {"label_smoothing": 0.125, "z_loss": 0.25}
LINEAR_OPTIONS = {
    "bias": "b",
    "where": "where",
    "class_weights": "c",
    "soft_cap": "cap",
    "temperature": "temperature",
    "label_smoothing": "smoothing",
    "z_loss": "zeta",
}
CASES = {
    "dense": Case(
        softmax_cross_entropy,
        ("z", "y"),
        ("z", "c", "smoothing", "zeta"),
        {**ROW_OPTIONS, "label_smoothing": "smoothing", "z_loss": "zeta"},
    ),
    "probabilities": Case(
        softmax_cross_entropy, ("z", "t"), ("z", "t"), {"where": "where", "class_weights": "c"}, SMOOTHED
    ),
    "nll": Case(nll_loss, ("z", "y"), ("z",), {"class_weights": "c", "weights": "weights"}, takes_vocab_axis=False),
    "sigmoid": Case(sigmoid_cross_entropy, ("z", "t"), ("z",), {"pos_weight": "c"}, takes_vocab_axis=False),
    "statistics": Case(token_statistics, ("z", "labels"), ("z",), {}, {"top_k": TOP}, statistics),
    "linear": Case(
        linear_softmax_cross_entropy,
        ("h", "w", "y"),
        ("h", "w", "b", "cap", "temperature", "smoothing", "zeta"),
        LINEAR_OPTIONS,
        {"chunk_rows": CHUNK},
    ),
    "linear_rows": Case(
        linear_softmax_cross_entropy,
        ("h", "w", "y"),
        ("h", "w"),
        {"weights": "weights"},
        {"label_smoothing": 0.125, "chunk_rows": CHUNK},
        rows,
    ),
    "linear_statistics": Case(
        linear_token_statistics,
        ("h", "w", "labels"),
        ("h", "w"),
        {},
        {"top_k": TOP, "chunk_rows": CHUNK},
        statistics,
    ),
    "dense_smoothed": Case(softmax_cross_entropy, ("z", "y"), ("z",), {}, {"label_smoothing": 0.125}),
    "linear_smoothed": Case(
        linear_softmax_cross_entropy, ("h", "w", "y"), ("h", "w"), {}, {"label_smoothing": 0.125, "chunk_rows": CHUNK}
    ),
    "divergence": Case(
        linear_kl_divergence,
        ("h2", "w2", "h", "w"),
        ("h", "w"),
        {"where": "where"},
        {"chunk_rows": CHUNK},
    ),
    "own": Case(
        functools.partial(jaxent.linear_loss, squared_normalizer),
        ("h", "w", "weights"),
        ("h", "w", "temperature"),
        {"params": "temperature"},
        {"chunk_rows": CHUNK},
        whole,
        takes_vocab_axis=False,
    ),
}
SHARDABLE = tuple(name for name, case in CASES.items() if case.takes_vocab_axis)


def program(case: str, mesh: jax.sharding.Mesh | None = None, *, manual: bool = False) -> Callable[..., Any]:
    """Value with per-row results, gradient with respect to `wanted`, and the Hessian product along it."""
    call = CASES[case]

    def loss(*args: Any) -> Any:
        if not manual:
            return call(None, {}, *args)
        specs = tuple(arrays()[name][1] for name in call.names)
        part = functools.partial(call, "data", {"vocab_axis": "vocab"})
        out_specs = P(), P() if call.result is mean else ROW
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_specs)(*args)

    return with_derivatives(loss, len(call.wanted))


def with_derivatives(loss: Callable[..., Any], wanted: int) -> Callable[..., Any]:
    """What `loss` returns, the gradient of the first of that by the first `wanted` arguments, and a Hessian product."""

    def everything(*args: Any) -> Any:
        primals, rest = args[:wanted], args[wanted:]

        def gradient(*primals: Any) -> Any:
            every = tuple(range(len(primals)))
            (value, each), by = jax.value_and_grad(lambda *p: loss(*p, *rest), argnums=every, has_aux=True)(*primals)
            return by, (value, each)

        by, product, out = jax.jvp(gradient, primals, primals, has_aux=True)
        return out, by, product

    return everything


def placed(case: str, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in (arrays()[n] for n in CASES[case].names)]


@functools.cache
def unsharded(case: str) -> Any:
    return run(program(case), *(arrays()[name][0] for name in CASES[case].names))


@functools.cache
def compiled(case: str, shape: str, kind: str) -> Any:
    mesh = make_mesh(shape, kind)
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        return jax.jit(program(case, mesh, manual=kind == "manual")).lower(*placed(case, mesh)).compile(FAST)
