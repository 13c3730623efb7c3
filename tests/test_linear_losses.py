"""Token statistics, divergences between two heads, the user's own row loss and plans, from hidden states."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles_linear
import pytest
from cases import covering, draw_labels, run, token_statistics
from oracles import assert_close

import jaxent
from jaxent import WeightedSum

# Untyped: tables of arguments are dictionaries, and what is returned depends on `reduction`.
linear_token_statistics: Any = jaxent.linear_token_statistics
linear_kl_divergence: Any = jaxent.linear_kl_divergence
linear_loss: Any = functools.partial(jaxent.linear_loss, reduction="sum")


def draw_grid(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.integers(-8, 9, size=shape) / 8).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Token statistics


@pytest.mark.parametrize(
    ("field", "chunk_rows"),
    [("log_prob", 4), ("log_normalizer", None), ("entropy", 4), ("entropy", 1), ("log_prob", 20)],
)
def test_token_statistics_and_their_gradients(field: str, chunk_rows: int | None, rng: np.random.Generator):
    hidden, kernel, bias, labels = (
        draw_grid(rng, 13, 3),
        draw_grid(rng, 3, 7),
        draw_grid(rng, 7),
        rng.integers(7, size=13),
    )
    cotangent = np.arange(1, 14, dtype=np.float32) / 8
    head = oracles_linear.Head(hidden, kernel, bias, 2.0, 0.75)
    values, slopes = oracles_linear.token_statistics(head.logits, labels)
    dz = cotangent[:, None] * slopes[field]
    want, sizes = head.gradients(dz, np.abs(dz) + np.abs(cotangent[:, None]))

    @jax.jit
    def program(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, cap: jax.Array, t: jax.Array) -> Any:
        def loss(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, cap: jax.Array, t: jax.Array) -> Any:
            got = linear_token_statistics(
                hidden, kernel, labels, bias=bias, soft_cap=cap, temperature=t, chunk_rows=chunk_rows
            )
            return jnp.sum(cotangent * getattr(got, field)), got

        return jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(hidden, kernel, bias, cap, t)

    gradients, got = program(hidden, kernel, bias, np.float32(2), np.float32(0.75))
    for name, value in values.items():
        exact = name in ("rank", "argmax")
        assert_close(getattr(got, name), value, ulp=0 if exact else 4, dtype=np.float32, size=0 if exact else 1)
    for name, gradient in zip(("hidden", "kernel", "bias", "soft_cap", "temperature"), gradients, strict=True):
        assert_close(gradient, want[name], ulp=8, dtype=np.float32, size=sizes[name])


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_token_statistics_equal_those_of_the_logits(batch: tuple[int, ...], rng: np.random.Generator):
    hidden, kernel, labels = draw_grid(rng, *batch, 3), draw_grid(rng, 3, 7), rng.integers(7, size=batch)
    got = linear_token_statistics(hidden, kernel, labels, top_k=3, chunk_rows=2)
    want = token_statistics(hidden @ kernel, labels, top_k=3)
    assert got.top_log_probs.shape == (*batch, 3)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    bare = linear_token_statistics(hidden, kernel, chunk_rows=2)
    assert bare.log_prob is None
    assert bare.rank is None
    np.testing.assert_array_equal(bare.argmax, want.argmax)


def test_token_statistics_of_wrong_labels_are_nan(rng: np.random.Generator):
    hidden, kernel, labels = draw_grid(rng, 3, 3), draw_grid(rng, 3, 7), np.array([0, 7, -1])
    got = linear_token_statistics(hidden, kernel, labels, chunk_rows=2)
    np.testing.assert_array_equal(np.isnan(got.log_prob), [False, True, True])
    assert np.all(np.isfinite(got.entropy))


# ----------------------------------------------------------------------------------------------------------------------
# Divergences

DIVERGENCES = ("forward", "reverse", "jensen_shannon")
SIDES = ("hidden_p", "kernel_p", "hidden_q", "kernel_q", "bias_p", "bias_q")


def draw_heads(rng: np.random.Generator, rows: int = 13, count: int = 5) -> dict[str, np.ndarray]:
    """A teacher with 3 features and a student with 4."""
    shapes = ((rows, 3), (3, count), (rows, 4), (4, count), (count,), (count,))
    return dict(zip(SIDES, (draw_grid(rng, *shape) for shape in shapes), strict=True))


@functools.partial(jax.jit, static_argnames=("divergence", "mixture", "reduction", "chunk_rows"))
def divergence_and_gradients(
    heads: dict[str, Any], *, temperature: float = 1.0, **options: Any
) -> tuple[Any, dict[str, Any]]:
    def loss(heads: Any) -> Any:
        first = [heads[side] for side in SIDES[:4]]
        rest = {side: heads[side] for side in SIDES[4:]}
        value = linear_kl_divergence(*first, **rest, temperature=temperature, **options)
        return jnp.sum(value.total if isinstance(value, WeightedSum) else value), value

    (_, value), gradients = jax.value_and_grad(loss, has_aux=True)(heads)
    return value, gradients


# The sums differ in what they are divided by, once for all kinds.
@pytest.mark.parametrize(
    ("kind", "mixture", "reduction"),
    [
        *(("forward", 0.5, reduction) for reduction in ("mean", "none")),
        *(("reverse", 0.5, "none"), ("jensen_shannon", 0.5, "mean")),
        *(("jensen_shannon", 0.125, reduction) for reduction in ("none", "sum_and_weight")),
    ],
)
def test_divergences_and_their_gradients(kind: str, mixture: float, reduction: str, rng: np.random.Generator):
    heads = draw_heads(rng)
    where, weights = rng.random(13) < 0.7, (rng.integers(0, 9, 13) / 4).astype(np.float32)
    p, q = (
        oracles_linear.Head(heads[f"hidden_{s}"], heads[f"kernel_{s}"], heads[f"bias_{s}"], None, 0.75) for s in "pq"
    )
    losses, by_p, by_q = oracles_linear.divergence(p.logits, q.logits, kind, mixture)
    row = np.where(where, weights, 0)
    divisor = row.sum() if reduction == "mean" else 1.0
    want: Any = row * losses if reduction == "none" else np.sum(row * losses) / divisor
    value, gradients = divergence_and_gradients(
        heads,
        divergence=kind,
        mixture=mixture,
        temperature=0.75,
        where=where,
        weights=weights,
        reduction=reduction,
        chunk_rows=4,
    )
    if isinstance(value, WeightedSum):
        assert_close(value.weight, row.sum(), ulp=2, dtype=np.float32)
        value = value.total
    assert_close(value, want, ulp=8, dtype=np.float32, size=row if reduction == "none" else row.sum() / divisor)
    for side, head, slope in (("p", p, by_p), ("q", q, by_q)):
        dz = row[:, None] * slope / divisor
        expected, sizes = head.gradients(dz, np.abs(dz) + row[:, None] / divisor)
        for name in ("hidden", "kernel", "bias"):
            assert_close(gradients[f"{name}_{side}"], expected[name], ulp=8, dtype=np.float32, size=sizes[name])


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_divergence_equals_that_of_the_logits(kind: str, rng: np.random.Generator):
    heads = draw_heads(rng)
    z_p, z_q = (heads[f"hidden_{s}"] @ heads[f"kernel_{s}"] for s in "pq")
    got = linear_kl_divergence(*[heads[s] for s in SIDES[:4]], divergence=kind, reduction="none", chunk_rows=3)
    want = jaxent.kl_divergence_with_logits(*((z_p, z_q) if kind == "forward" else (z_q, z_p)))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_divergence_of_a_head_from_itself(kind: str, rng: np.random.Generator):
    heads = draw_heads(rng)
    for name in ("hidden", "kernel", "bias"):
        heads[f"{name}_q"] = heads[f"{name}_p"]
    value, gradients = divergence_and_gradients(heads, divergence=kind, chunk_rows=4)
    # The mixture of two equal distributions differs from them by a rounding, whose square is left.
    allowed = 1e-13 if kind == "jensen_shannon" else 0.0
    for got in jax.tree.leaves((value, gradients)):
        assert np.all(np.abs(got) <= allowed)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_small_divergence_keeps_its_digits(kind: str, rng: np.random.Generator):
    # The truth is about 1e-11, of which `sum p (log p - log q)` in float32 has no digit.
    hidden, kernel = draw_grid(rng, 13, 3), draw_grid(rng, 3, 1000)
    moved = kernel + np.float32(2.0**-17) * draw_grid(rng, 3, 1000)
    p, q = (oracles_linear.Head(hidden, k).logits for k in (kernel, moved))
    want = oracles_linear.divergence(p, q, kind)[0]
    got = linear_kl_divergence(hidden, kernel, hidden, moved, divergence=kind, reduction="none", chunk_rows=4)
    np.testing.assert_allclose(got, want, rtol=3e-2)
    assert np.all(got >= 0)


@pytest.mark.grid
@pytest.mark.parametrize(("kind", "how", "side"), covering(DIVERGENCES, ["where", "weights"], ["p", "q"]))
def test_dropped_rows_of_a_divergence_may_hold_nan(kind: str, how: str, side: str, rng: np.random.Generator):
    heads = draw_heads(rng)
    dropped = np.arange(13) % 3 == 0
    heads[f"hidden_{side}"][dropped, 1] = np.nan
    options = {"where": ~dropped} if how == "where" else {"weights": (~dropped).astype(np.float32)}
    value, gradients = divergence_and_gradients(heads, divergence=kind, chunk_rows=4, **options)
    kept = {k: v[~dropped] if k.startswith("hidden") else v for k, v in heads.items()}
    expected, by_kept = divergence_and_gradients(kept, divergence=kind)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, got in gradients.items():
        if name.startswith("hidden"):
            np.testing.assert_array_equal(got[dropped], 0)
            got = got[~dropped]
        np.testing.assert_allclose(got, by_kept[name], rtol=1e-4, atol=1e-6)


@pytest.mark.grid
def test_a_frozen_teacher(rng: np.random.Generator):
    heads = draw_heads(rng)

    def loss(student: Any, teacher: Any) -> jax.Array:
        return linear_kl_divergence(*teacher, *student, chunk_rows=4)

    teacher, student = [heads[s] for s in SIDES[:2]], [heads[s] for s in SIDES[2:4]]
    alone = jax.jit(jax.grad(loss))(student, teacher)
    both, _ = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, teacher)
    for a, b in zip(alone, both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_q": np.ones((12, 4), np.float32)}, ValueError, "`hidden_q`.*batch shape"),
        ({"kernel_q": np.ones((4, 6), np.float32), "bias_q": None}, ValueError, "`kernel_q`.*5 classes"),
        ({"bias_q": np.ones(4, np.float32)}, ValueError, "`bias_q`"),
        ({"hidden_p": np.ones((13, 3), int)}, TypeError, "`hidden_p`"),
        ({"divergence": "js"}, ValueError, "`divergence`.*'js'"),
        ({"mixture": 1.5}, ValueError, "`mixture`"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        ({"weights": np.ones(12, np.float32)}, ValueError, "`weights`"),
    ],
)
def test_wrong_arguments_of_a_divergence(
    changed: dict[str, Any], error: type[Exception], message: str, rng: np.random.Generator
):
    with pytest.raises(error, match=f"jaxent.linear_kl_divergence: {message}"):
        linear_kl_divergence(**{**draw_heads(rng), **changed})


# ----------------------------------------------------------------------------------------------------------------------
# The user's own row loss


def focal(logits: jax.Array, labels: jax.Array, gamma: Any) -> jax.Array:
    """Lin et al. (2017), equation 4."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** gamma) * log_p


def pick(logits: jax.Array, labels: jax.Array, shift: Any) -> jax.Array:
    """The squared logit `shift` classes after the label."""
    return jnp.take_along_axis(logits, ((labels + shift) % logits.shape[1])[:, None], axis=-1)[:, 0] ** 2


# How the extra argument reaches the row loss.
PASSED = {
    "params": lambda f, h, w, y, extra: linear_loss(f, h, w, y, params=extra, chunk_rows=4),
    "closure": lambda f, h, w, y, extra: linear_loss(lambda z, y: f(z, y, extra), h, w, y, chunk_rows=4),
    "closure, one chunk": lambda f, h, w, y, extra: linear_loss(lambda z, y: f(z, y, extra), h, w, y),
    "row argument": lambda f, h, w, y, extra: linear_loss(f, h, w, y, jnp.broadcast_to(extra, len(h)), chunk_rows=4),
}


@pytest.mark.grid
@pytest.mark.parametrize(("how", "loss"), covering(PASSED, [focal, pick]))
def test_a_row_loss_with_a_traced_argument(how: str, loss: Any, rng: np.random.Generator):
    hidden, kernel = draw_grid(rng, 13, 3), draw_grid(rng, 3, 5)
    labels, extra = draw_labels(rng, (13,), 5), np.float32(2.0) if loss is focal else np.int32(2)

    def fused(hidden: Any, kernel: Any, extra: Any) -> jax.Array:
        return PASSED[how](loss, hidden, kernel, labels, extra)

    def dense(hidden: Any, kernel: Any, extra: Any) -> jax.Array:
        return jnp.sum(loss(hidden @ kernel, labels, extra))

    argnums = (0, 1, 2) if loss is focal else (0, 1)
    several = jnp.stack([extra, extra + 1])
    ways = {
        "grad of jit": lambda f: jax.grad(jax.jit(f), argnums)(hidden, kernel, extra),
        "vmap": lambda f: run(jax.vmap(f, in_axes=(None, None, 0)), hidden, kernel, several),
        "vmap of grad": lambda f: run(jax.vmap(jax.grad(f, argnums), (None, None, 0)), hidden, kernel, several),
        "eager": lambda f: f(hidden, kernel, extra),
        "hvp": lambda f: run(lambda h: jax.jvp(lambda h: jax.grad(f)(h, kernel, extra), (h,), (h,))[1], hidden),
    }
    for name, way in ways.items():
        for got, want in zip(jax.tree.leaves(way(fused)), jax.tree.leaves(way(dense)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)


def test_row_arguments_and_params_are_pytrees(rng: np.random.Generator):
    hidden, kernel = draw_grid(rng, 2, 3, 4), draw_grid(rng, 4, 5)
    pair = {"chosen": draw_labels(rng, (2, 3), 5), "rejected": draw_labels(rng, (2, 3), 5)}
    reference, params = draw_grid(rng, 2, 3, 2), {"beta": np.float32(0.5), "classes": np.int32(5)}

    def preference(logits: Any, pair: Any, reference: Any, params: Any) -> jax.Array:
        """DPO on single tokens (Rafailov et al., 2023, equation 7)."""
        log_p = jax.nn.log_softmax(logits)
        taken = [jnp.take_along_axis(log_p, y[..., None], axis=-1)[..., 0] for y in (pair["chosen"], pair["rejected"])]
        margin = (taken[0] - reference[..., 0]) - (taken[1] - reference[..., 1])
        return -jax.nn.log_sigmoid(params["beta"] * margin) * params["classes"].astype(margin.dtype)

    def fused(hidden: Any, kernel: Any, reference: Any, params: Any) -> jax.Array:
        return linear_loss(preference, hidden, kernel, pair, reference, params=params, chunk_rows=4)

    def dense(hidden: Any, kernel: Any, reference: Any, params: Any) -> jax.Array:
        return jnp.sum(preference(hidden @ kernel, pair, reference, params))

    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), allow_int=True))(hidden, kernel, reference, params)
        for f in (fused, dense)
    )
    assert got[1][3]["classes"].dtype == jax.dtypes.float0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("takes", [True, False])
def test_params_of_none(takes: bool, rng: np.random.Generator):
    hidden, kernel = draw_grid(rng, 5, 3), draw_grid(rng, 3, 4)

    def with_params(logits: jax.Array, params: None) -> jax.Array:
        assert params is None
        return jax.nn.logsumexp(logits, axis=-1)

    def without(logits: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(logits, axis=-1)

    got = linear_loss(with_params if takes else without, hidden, kernel, chunk_rows=2)
    np.testing.assert_allclose(got, jnp.sum(jax.nn.logsumexp(hidden @ kernel, axis=-1)), rtol=1e-6)


def test_a_row_loss_of_bf16_heads_sees_float32(rng: np.random.Generator):
    hidden, kernel = (x.astype(ml_dtypes.bfloat16) for x in (draw_grid(rng, 5, 3), draw_grid(rng, 3, 4)))
    seen = []

    def row_loss(logits: jax.Array) -> jax.Array:
        seen.append(logits.dtype)
        return jnp.sum(jnp.square(logits), axis=-1)

    value, gradient = jax.value_and_grad(lambda h: linear_loss(row_loss, h, kernel, chunk_rows=2))(hidden)
    assert set(seen) == {np.dtype(np.float32)}
    assert value.dtype == np.float32
    assert gradient.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("row_loss", "error", "message"),
    [
        (lambda z: jnp.sum(z), ValueError, r"`row_loss`.*shape \(4, \.\.\.\).*float32\[\]"),
        (lambda z: z, ValueError, r"`row_loss`.*shape \(4,\).*float32\[4,5\]"),
        (lambda z: z[:, :1], ValueError, r"`row_loss`.*float32\[4,1\]"),
        (lambda z: (z[:, 0],), ValueError, "`row_loss`.*tuple"),
        (lambda z: jnp.argmax(z, axis=-1), TypeError, "`row_loss`.*int32"),
    ],
)
def test_what_a_row_loss_may_return(row_loss: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"jaxent.linear_loss: {message}"):
        linear_loss(row_loss, np.ones((8, 3), np.float32), np.ones((3, 5), np.float32), chunk_rows=4)


def test_row_arguments_must_have_the_rows():
    with pytest.raises(ValueError, match=r"jaxent.linear_loss: `row_args`.*\(8,\)"):
        linear_loss(focal, np.ones((8, 3), np.float32), np.ones((3, 5), np.float32), np.zeros(7, int), params=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Plans


def test_a_plan_of_a_small_loss_is_one_chunk():
    plan = jaxent.plan(512, 128, 1000)
    assert (plan.num_chunks, plan.chunk_rows) == (1, 512)
    assert jaxent.plan(0, 128, 1000).multiply_adds == 0
    assert str(plan).startswith("1 chunk of 512 rows")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1, 2, 3), {}, ValueError, "`num_rows`"),
        ((1, 0, 3), {}, ValueError, "`features`"),
        ((1, 2, 0), {}, ValueError, "`num_classes`"),
        ((1.5, 2, 3), {}, TypeError, "`num_rows`"),
        ((1, True, 3), {}, TypeError, "`features`"),
        ((1, 2, 3), {"dtype": np.int32}, TypeError, "`dtype`"),
        ((1, 2, 3), {"chunk_rows": 0}, ValueError, "`chunk_rows`"),
        ((1, 2, 3), {"chunk_rows": 1.0}, TypeError, "`chunk_rows`"),
        ((1, 2, 3), {"reduction": "average"}, ValueError, "`reduction`"),
    ],
)
def test_wrong_arguments_of_a_plan(arguments: Any, options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"jaxent.plan: {message}"):
        jaxent.plan(*arguments, **options)
