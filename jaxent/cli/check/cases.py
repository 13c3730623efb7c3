"""What `jaxent check` runs: every loss with every option, on small inputs that all dtypes hold exactly."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxent
from jaxent import WeightedSum, torch_compat
from jaxent.cli.check import references
from jaxent.cli.check.case import (
    CLASSES,
    EVERY_DTYPE,
    FEATURES,
    ROWS,
    WIDE_DTYPES,
    Case,
    distributions,
    heads,
    rng_for,
)
from jaxent.cli.check.curvature_cases import curvature_cases, norm_cases
from jaxent.cli.check.references import WIDE, Array, Cap, Exact
from jaxent.cli.check.softmax_options import OPTIONS, Arguments, draw_fractions, draw_logits

# Half precision differs from float32 only in casts: together these cover every option and every path of the engine.
NOT_FLOAT16 = ("float32", "bfloat16", "float64")  # which differs from bfloat16 in the cast alone
IN_HALF = ("plain", "everything", "probabilities_everything", "reduction none", "bias", "soft_cap", "chunk_rows")


def cases() -> Iterator[Case]:
    yield from _softmax_cases()
    yield from _other_dense_cases()
    yield from _linear_cases()
    yield from _measure_cases()
    yield from curvature_cases()
    yield from norm_cases()
    yield from _torch_cases()


def total(result: Any) -> jax.Array:
    """A scalar of whatever a reduction returns."""
    return result.total if isinstance(result, WeightedSum) else jnp.sum(result)


# ----------------------------------------------------------------------------------------------------------------------
# Losses on logits


# The others are combinations of these.
SINGLE = ("plain", "where", "weights", "class_weights", "ignore_-100", "smoothing", "z_loss", "denominator")
TOGETHER = ("everything", "probabilities", "one_hot", "probabilities_everything")


def _options(rows: int = ROWS, classes: int = CLASSES) -> dict[str, Arguments]:
    """The options of a softmax loss of `rows x classes`, each alone and all together."""
    options = {name: OPTIONS[name](rng_for("softmax" + name), (rows, classes)) for name in (*SINGLE, *TOGETHER)}
    weighted = {**options["weights"], **options["ignore_-100"], "reduction": "sum_and_weight"}
    reductions = {f"reduction {r}": {**options["plain"], "reduction": r} for r in ("sum", "none")}
    return options | reductions | {"reduction sum_and_weight": weighted}


def _softmax_oracle(z: Array, options: dict[str, Any], rows: Any = references.cross_entropy_rows) -> Exact:
    """The loss by its definition; the classes lie last."""
    targets, count = options["targets"], z.shape[-1]
    by_label = np.issubdtype(targets.dtype, np.integer)
    c = np.asarray(options.get("class_weights", np.ones(count)), WIDE)
    e, zeta = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    w = np.asarray(options.get("weights", np.ones(len(z))), WIDE) * options.get("where", 1)
    if by_label:
        w = w * (targets != options.get("ignore_index", -100))
        targets = np.where(targets[:, None] == np.arange(count), 1, 0)
    shares = c * ((1 - WIDE(e)) * targets + WIDE(e) / count)
    cancels = bool(e or zeta or np.any(np.sum(shares != 0, axis=-1) > 1))
    exact = rows(z, shares, w, zeta, cancels) if rows is references.cross_entropy_rows else rows(z, shares, w)
    if options.get("reduction", "mean") != "mean":
        return exact
    divisor = options.get("denominator", np.sum(w[:, None] * c * targets) if by_label else np.sum(w))
    return exact * (1 / WIDE(divisor))


def _dtypes(option: str, otherwise: tuple[str, ...] = WIDE_DTYPES) -> tuple[str, ...]:
    if option not in IN_HALF:
        return otherwise
    return EVERY_DTYPE if option in ("plain", "everything") else NOT_FLOAT16


def _softmax(options: dict[str, Any], z: jax.Array) -> jax.Array:
    return total(jaxent.softmax_cross_entropy(z, **options))


def _softmax_case(name: str, options: dict[str, Any], z: Array, **more: Any) -> Case:
    closed = functools.partial(jaxent.softmax_cross_entropy_gradient, **options)
    oracle = functools.partial(_softmax_oracle, options=options)
    return Case("softmax_cross_entropy", name, functools.partial(_softmax, options), (z,), oracle, closed, **more)


def _softmax_cases() -> Iterator[Case]:
    z = draw_logits(rng_for("logits"), (ROWS, CLASSES), WIDE)
    for name, options in _options().items():
        yield _softmax_case(name, options, z, dtypes=_dtypes(name))
    plain = _options()["plain"]
    removed = z.copy()
    removed[np.arange(ROWS), (plain["targets"] + 1) % CLASSES] = -np.inf
    yield _softmax_case("logits of -inf", plain, removed)
    yield _softmax_case("shift of 10000", plain, z + 10000, dtypes=WIDE_DTYPES)
    first = {"targets": np.zeros(1, np.int32)}
    yield _softmax_case("loss of 2e-9", first, np.array([[0.0, -20.0, -25.0, -30.0]]))
    yield _softmax_case("loss of 7e-38", first, np.array([[0.0, -86.0, -86.5, -90.0]]))
    long = {"targets": np.array([7, 299], np.int32)}
    yield _softmax_case("300 classes", long, draw_logits(rng_for("long"), (2, 300), WIDE))
    image = np.moveaxis(z, -1, 0)
    yield dataclasses.replace(
        _softmax_case("axis 0", plain, image),
        function=functools.partial(_softmax, {**plain, "axis": 0}),
        closed_form=functools.partial(jaxent.softmax_cross_entropy_gradient, **plain, axis=0),
        oracle=lambda z: _transposed(_softmax_oracle(z.T, plain)),
    )


def _transposed(exact: Exact) -> Exact:
    gradients, sizes = (tuple(x.T for x in xs) for xs in (exact.gradients, exact.sizes))
    return dataclasses.replace(exact, gradients=gradients, sizes=sizes)


def _other_dense_cases() -> Iterator[Case]:
    z, options = draw_logits(rng_for("logits"), (ROWS, CLASSES), WIDE), _options()
    picked = {k: v for k, v in options["everything"].items() if k not in ("label_smoothing", "z_loss")}
    for name, given in (("plain", options["plain"]), ("everything", picked), ("denominator", options["denominator"])):
        labels = {"labels": given["targets"], **{k: v for k, v in given.items() if k != "targets"}}
        oracle = functools.partial(_softmax_oracle, options=given, rows=references.picked_rows)
        yield Case("nll_loss", name, functools.partial(_nll, labels), (-np.abs(z),), oracle)
    rng = rng_for("sigmoid")
    t, weights = distributions(rng, ROWS, CLASSES).astype(np.float32), draw_fractions(rng, (ROWS, CLASSES))
    where, flags = rng.random((ROWS, CLASSES)) < 0.7, rng.random((ROWS, CLASSES)) < 0.5
    binary: dict[str, dict[str, Any]] = {
        "plain": {"targets": t},
        "flags": {"targets": flags},
        "everything": {"targets": t, "weights": weights, "where": where, "pos_weight": draw_fractions(rng, (CLASSES,))},
    }
    for name, given in binary.items():
        yield Case(
            "sigmoid_cross_entropy",
            name,
            functools.partial(_sigmoid, given),
            (z,),
            functools.partial(_sigmoid_oracle, options=given),
        )
    labels = options["plain"]["targets"]
    statistics: dict[str, Callable[[Array], Exact]] = {
        "log_prob": lambda z: _softmax_oracle(z, {"targets": labels, "reduction": "sum"}) * -1,
        "log_normalizer": references.log_normalizer_rows,
        "entropy": references.entropy_rows,
    }
    for name, oracle in statistics.items():
        yield Case("token_statistics", name, functools.partial(_statistic, labels, name), (z,), oracle)
        linear = functools.partial(_linear_statistic, labels, name)
        through = functools.partial(_through_one, rows=oracle, cap=Cap())
        dtypes = NOT_FLOAT16 if name == "entropy" else ("float32",)
        yield Case("linear_token_statistics", name, linear, heads(1), through, dtypes=dtypes, products=True)


def _nll(options: dict[str, Any], log_p: jax.Array) -> jax.Array:
    return total(jaxent.nll_loss(log_p, **options))


def _sigmoid(options: dict[str, Any], z: jax.Array) -> jax.Array:
    return total(jaxent.sigmoid_cross_entropy(z, **options))


def _sigmoid_oracle(z: Array, options: dict[str, Any]) -> Exact:
    weights = np.ones(z.shape, WIDE) * options.get("weights", 1) * options.get("where", 1)
    exact = references.sigmoid_rows(z, options["targets"].astype(WIDE), weights, options.get("pos_weight", WIDE(1)))
    return exact * (1 / weights.sum())


def _statistic(labels: np.ndarray, name: str, z: jax.Array) -> jax.Array:
    return jnp.sum(getattr(jaxent.token_statistics(z, labels), name))


# ----------------------------------------------------------------------------------------------------------------------
# Losses from hidden states


def _through_one(*head: Array, rows: Callable[..., Exact], cap: Cap) -> Exact:
    return references.through_heads(rows, (head,), cap)


def _through_two(h_p: Array, w_p: Array, h_q: Array, w_q: Array, rows: Callable[..., Exact], cap: Cap) -> Exact:
    return references.through_heads(rows, ((h_p, w_p), (h_q, w_q)), cap)


def _linear_statistic(labels: np.ndarray, name: str, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.sum(getattr(jaxent.linear_token_statistics(hidden, kernel, labels), name))


def _linear(options: dict[str, Any], hidden: jax.Array, kernel: jax.Array, *bias: jax.Array) -> jax.Array:
    return total(jaxent.linear_softmax_cross_entropy(hidden, kernel, **options, bias=bias[0] if bias else None))


def _linear_cases() -> Iterator[Case]:
    options = _options()
    more: dict[str, tuple[dict[str, Any], Cap, dict[str, Any], bool]] = {
        **{name: (options[name], Cap(), {}, False) for name in options},
        "bias": (options["plain"], Cap(), {}, True),
        "soft_cap": (options["plain"], Cap(soft_cap=4.0), {"soft_cap": 4.0}, False),
        "temperature": (options["plain"], Cap(temperature=0.5), {"temperature": 0.5}, False),
        "chunk_rows": (options["everything"], Cap(), {"chunk_rows": 2}, True),
    }
    for name, (given, cap, extra, bias) in more.items():
        loss = functools.partial(_linear, {**given, **extra})
        oracle = functools.partial(_through_one, rows=functools.partial(_softmax_oracle, options=given), cap=cap)
        dtypes = _dtypes(name, otherwise=("float32",))  # the row loss is that of the logits, which float64 has checked
        args = heads(1, bias)
        yield Case("linear_softmax_cross_entropy", name, loss, args, oracle, dtypes=dtypes, products=True)
    divergences: dict[str, Callable[..., Exact]] = {
        "forward": references.divergence_rows,
        "reverse": lambda z_p, z_q: _swapped(references.divergence_rows(z_q, z_p)),
        "jensen_shannon": functools.partial(references.jensen_shannon_rows, mixture=0.25),
    }
    for name, rows in divergences.items():
        oracle = functools.partial(_through_two, rows=rows, cap=Cap(temperature=2.0))
        loss = functools.partial(_divergence, name)
        dtypes = NOT_FLOAT16 if name == "jensen_shannon" else ("float32",)
        yield Case("linear_kl_divergence", name, loss, heads(2), oracle, dtypes=dtypes, products=True)
    labels = options["plain"]["targets"]
    summed = functools.partial(_softmax_oracle, options={"targets": labels, "reduction": "sum"})
    # The row loss is the textbook one, which subtracts two logits where the result is small.
    oracle = _rounded(functools.partial(_through_one, rows=summed, cap=Cap()))
    own = functools.partial(_usual_linear, labels)
    yield Case("linear_loss", "logsumexp(z) - z[y]", own, heads(1), oracle, products=True)


def _usual_linear(labels: np.ndarray, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jaxent.linear_loss(_usual_nll, hidden, kernel, labels, reduction="sum")


def _usual_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


def _rounded(oracle: Callable[..., Exact]) -> Callable[..., Exact]:
    """With room for the rounding of probabilities near 1."""

    def rounded(*args: Array) -> Exact:
        exact = oracle(*args)
        sizes = (ROWS * np.abs(args[1]).max() + 0 * exact.sizes[0], np.abs(args[0]).sum() + 0 * exact.sizes[1])
        return dataclasses.replace(exact, sizes=sizes, value_size=exact.value + ROWS)

    return rounded


def _divergence(name: Any, h_p: jax.Array, w_p: jax.Array, h_q: jax.Array, w_q: jax.Array) -> jax.Array:
    options = {"divergence": name, "mixture": 0.25, "temperature": 2.0, "reduction": "sum"}
    return total(jaxent.linear_kl_divergence(h_p, w_p, h_q, w_q, **options))


def _swapped(exact: Exact) -> Exact:
    return dataclasses.replace(exact, gradients=exact.gradients[::-1], sizes=exact.sizes[::-1])


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def _measure_cases() -> Iterator[Case]:
    rng = rng_for("measures")
    p, q = distributions(rng, ROWS, CLASSES), distributions(rng, ROWS, CLASSES)
    z_p, z_q = draw_logits(rng, (ROWS, CLASSES), WIDE) / 2, draw_logits(rng, (ROWS, CLASSES), WIDE) / 2
    yield from _measures(p, q, z_p, z_q)


def _measures(p: Array, q: Array, z_p: Array, z_q: Array) -> Iterator[Case]:
    table: dict[str, tuple[tuple[Array, ...], Callable[..., Exact]]] = {
        "entropy": ((p,), references.entropy),
        "cross_entropy": ((p, q), references.cross_entropy),
        "kl_divergence": ((p, q), references.kl_divergence),
        "jensen_shannon_divergence": ((p, q), references.jensen_shannon),
        "entropy_with_logits": ((z_p,), references.entropy_rows),
        "cross_entropy_with_logits": ((z_p, z_q), references.cross_entropy_of_logits),
        "kl_divergence_with_logits": ((z_p, z_q), references.divergence_rows),
    }
    for name, (args, oracle) in table.items():
        function = functools.partial(_summed, getattr(jaxent, name))
        yield Case(name, "sum of rows", function, args, oracle, dtypes=NOT_FLOAT16)


def _summed(measure: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    return jnp.sum(measure(*args))


# ----------------------------------------------------------------------------------------------------------------------
# Under PyTorch's names


def _torch_cases() -> Iterator[Case]:
    z, options = draw_logits(rng_for("logits"), (ROWS, CLASSES), WIDE), _options()
    given = options["everything"]
    given = {k: given[k] for k in ("targets", "class_weights", "label_smoothing")}
    picked = {k: given[k] for k in ("targets", "class_weights")}
    p, t = (distributions(rng_for(name), ROWS, CLASSES) for name in ("torch", "binary torch"))
    table: dict[str, tuple[Callable[..., jax.Array], Array, Callable[..., Exact]]] = {
        "cross_entropy": (
            functools.partial(_torch_cross_entropy, given),
            z,
            functools.partial(_softmax_oracle, options=given),
        ),
        "nll_loss": (
            functools.partial(_torch_nll, picked),
            -np.abs(z),
            functools.partial(_softmax_oracle, options=picked, rows=references.picked_rows),
        ),
        "kl_div": (functools.partial(_torch_kl_div, p), -np.abs(z), functools.partial(references.kl_div, p=p)),
        "binary_cross_entropy_with_logits": (
            functools.partial(_torch_binary, t),
            z,
            lambda z: (
                references.sigmoid_rows(z, t.astype(WIDE), np.ones_like(z), np.ones((), WIDE)) * (1 / WIDE(z.size))
            ),
        ),
    }
    for name, (function, args, oracle) in table.items():
        yield Case(f"torch_compat.{name}", "mean", function, (args,), oracle, dtypes=WIDE_DTYPES)


def _torch_cross_entropy(options: dict[str, Any], z: jax.Array) -> jax.Array:
    weight, smoothing = jnp.asarray(options["class_weights"], z.dtype), options["label_smoothing"]
    return torch_compat.cross_entropy(z, options["targets"], weight, label_smoothing=smoothing)


def _torch_nll(options: dict[str, Any], log_p: jax.Array) -> jax.Array:
    return torch_compat.nll_loss(log_p, options["targets"], jnp.asarray(options["class_weights"], log_p.dtype))


def _torch_kl_div(p: Array, log_q: jax.Array) -> jax.Array:
    return torch_compat.kl_div(log_q, jnp.asarray(p, log_q.dtype), reduction="batchmean")


def _torch_binary(t: Array, z: jax.Array) -> jax.Array:
    return torch_compat.binary_cross_entropy_with_logits(z, jnp.asarray(t, z.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Second derivatives


def second_order_cases() -> Iterator[Case]:
    """Losses whose Hessian is multiplied by many tangents at once: what is fused then is larger than elsewhere here."""
    rows, classes = 100, 10
    z, options = draw_logits(rng_for("many"), (rows, classes), WIDE), _options(rows, classes)
    for name in ("plain", "everything", "probabilities"):
        yield _softmax_case(name, options[name], z)
    targets = {"targets": distributions(rng_for("binary"), rows, classes).astype(np.float32)}
    oracle = functools.partial(_sigmoid_oracle, options=targets)
    yield Case("sigmoid_cross_entropy", "plain", functools.partial(_sigmoid, targets), (z,), oracle)
    entropy = functools.partial(_statistic, options["plain"]["targets"], "entropy")
    yield Case("token_statistics", "entropy", entropy, (z,), references.entropy_rows)
    rng, plain = rng_for("many heads"), {"targets": options["plain"]["targets"]}
    head = tuple(rng.integers(-6, 7, shape) / 4 for shape in ((rows, FEATURES), (FEATURES, classes)))
    through = functools.partial(_through_one, rows=functools.partial(_softmax_oracle, options=plain), cap=Cap())
    yield Case("linear_softmax_cross_entropy", "plain", functools.partial(_linear, plain), head, through)
    yield from _second_order_measures(rows, classes)


def _second_order_measures(rows: int, classes: int) -> Iterator[Case]:
    rng = rng_for("many measures")
    p, q = distributions(rng, rows, classes), distributions(rng, rows, classes)
    z_p, z_q = draw_logits(rng, (rows, classes), WIDE) / 2, draw_logits(rng, (rows, classes), WIDE) / 2
    yield from _measures(p, q, z_p, z_q)
