"""Gradient norms of whole sequences, against `vmap(grad)` of their losses; and what survives the head."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import COMBINED, OPTIONS, covering, draw_labels, precision, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from test_linear_costs import like

import jaxent

# Untyped: tables of arguments are dictionaries.
linear_gradient_norms: Any = jaxent.linear_gradient_norms
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy

COUNT = 4


def by_vmap(hidden: Any, kernel: Any, bias: Any, per_row: dict[str, Any], **shared: Any) -> list[np.ndarray]:
    """The norms of each sequence's gradients, which `vmap(grad)` holds: hidden states, kernel, bias."""

    def loss(hidden: Any, kernel: Any, bias: Any, per_row: Any) -> Any:
        return linear_softmax_cross_entropy(hidden, kernel, bias=bias, **per_row, **shared, reduction="sum")

    gradient = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, None, 0))
    gradients = run(gradient, hidden, kernel, bias, per_row)
    return [np.linalg.norm(np.reshape(g, (len(hidden), -1)), axis=-1) for g in gradients]


def projected(d: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The norms of the rows' parts in the row space of the kernel, by its singular vectors."""
    _, s, basis = np.linalg.svd(kernel, full_matrices=False)
    return np.linalg.norm(d @ basis[s > 1e-9 * s.max(initial=0)].T, axis=-1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("option", "sizes"), covering(COMBINED, [(5, 3), (2, 6)]))
def test_norms_are_those_of_vmap_grad(option: str, sizes: tuple[int, int], rng: np.random.Generator):
    tokens, features = sizes
    shape = 3, tokens, COUNT
    hidden, kernel, bias = (rng.normal(size=s) for s in ((3, tokens, features), (features, COUNT), (COUNT,)))
    arguments = OPTIONS[option](rng, shape)
    arguments.pop("denominator", None)
    head = {"soft_cap": 2.0, "temperature": 0.75}
    per_row = {k: jnp.asarray(v) for k, v in arguments.items() if k in ("targets", "where", "weights")}
    shared = {k: v for k, v in arguments.items() if k not in per_row}
    options = {**arguments, **head, "bias": bias, "chunk_rows": tokens}
    got = linear_gradient_norms(hidden, kernel, **options, per="sequence")
    for a, b in zip(got[1:4], by_vmap(hidden, kernel, bias, per_row, **shared, **head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-16)
    rows = linear_gradient_norms(hidden, kernel, **options)
    for name in ("residual", "hidden", "survived"):
        want = np.linalg.norm(getattr(rows, name), axis=-1)
        np.testing.assert_allclose(getattr(got, name), want, rtol=1e-13)


@pytest.mark.parametrize("features", [1, 6])
def test_sums_that_nearly_cancel_keep_their_digits(features: int):
    """Opposite hidden states but for 2^-10: inner products would leave one digit of the sum's square, 2^-20."""
    x = np.arange(1, features + 1, dtype=np.float32)
    hidden = np.stack([x, -x * (1 - 2.0**-10)]).astype(np.float32)
    kernel, labels = np.zeros((features, COUNT), np.float32), np.ones(2, np.int32)
    got = linear_gradient_norms(hidden, kernel, labels, per="sequence")
    want = np.sqrt(0.75) * np.linalg.norm(hidden.astype(np.float64).sum(0))
    np.testing.assert_allclose(got.kernel, want, rtol=5e-4)
    np.testing.assert_allclose(got.bias, 2 * np.sqrt(0.75), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_large_gradients_meet_small_hidden_states(size: float):
    """The first token has nearly no gradient, the second nearly no hidden state: the norm is that of both."""
    bias = np.array([0.0, -46.0], np.float32)
    hidden, labels = np.array([[size], [-size * np.exp(-46.0)]], np.float32), np.array([0, 1])
    got = linear_gradient_norms(hidden, np.zeros((1, 2), np.float32), labels, bias=bias, per="sequence")
    np.testing.assert_allclose(got.bias, np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(got.kernel, 2 * np.sqrt(2) * np.exp(-46.0) * size, rtol=1e-6)
    other = linear_gradient_norms(-hidden[:1], np.zeros((1, 2), np.float32), labels[:1], bias=bias, per="sequence")
    np.testing.assert_allclose(other.kernel, np.sqrt(2) * np.exp(-46.0) * size, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    covering([(2, 3), (0, 3), (2, 1, 0), (3,), (1, 1)], [ml_dtypes.bfloat16, np.float16, np.float64]),
)
def test_dtypes_and_batches(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator):
    with precision(dtype):
        hidden, kernel = ((rng.integers(-8, 9, s) / 8).astype(dtype) for s in ((*shape, 5), (5, COUNT)))
        labels = draw_labels(rng, shape, COUNT)
        got = linear_gradient_norms(hidden, kernel, labels, per="sequence")
        h, w = hidden.astype(np.float64), kernel.astype(np.float64)
        e = np.exp(h @ w)
        d = e / e.sum(-1, keepdims=True) - (labels[..., None] == np.arange(COUNT))
        norm = np.linalg.norm
        want = [norm(x, axis=(-2, -1)) for x in (d, d @ w.T, np.swapaxes(h, -1, -2) @ d)]
        want += [norm(d.sum(-2), axis=-1), np.sqrt(np.sum(projected(d, w) ** 2, axis=-1))]
        rtol = max(1e-6, 8 * float(ml_dtypes.finfo(dtype).eps))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == (np.float64 if dtype == np.float64 else np.float32)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_dropped_rows_and_sequences(rng: np.random.Generator):
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((4, 3, 5), (5, COUNT)))
    labels = np.array([[0, -100, 1], [-100, -100, -100], [2, COUNT, 0], [1, 2, 3]])
    where = np.array([[True, True, False], [True] * 3, [True] * 3, [True] * 3])
    hidden[0, 1:], hidden[1] = np.nan, np.nan

    @jax.jit
    def norms(hidden: Any) -> Any:
        return linear_gradient_norms(hidden, kernel, labels, where=where, per="sequence", chunk_rows=3)

    rows = linear_gradient_norms(hidden[0, 0], kernel, labels[0, 0])
    for got, alone in zip(norms(hidden), rows, strict=True):
        np.testing.assert_array_equal(np.isnan(got), [False, False, True, False])
        np.testing.assert_allclose(got[0], alone, rtol=2e-6)
        assert got[1] == 0
    slopes = np.asarray(jax.grad(lambda h: jnp.sum(sum(x[jnp.array([0, 1, 3])] for x in norms(h))))(hidden))
    np.testing.assert_array_equal(slopes[[0, 0, 1, 1, 1], [1, 2, 0, 1, 2]], 0)
    assert np.isfinite(slopes[[0, 3, 3, 3], [0, 0, 1, 2]]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives(rng: np.random.Generator):
    """Those of the sum itself, not of the triangular factor, which has none where hidden states are alike."""
    hidden, kernel = rng.normal(size=(2, 2, 3)), rng.normal(size=(3, COUNT))
    labels = np.array([[0, 3], [1, 1]])

    def norms(hidden: Any, kernel: Any) -> Any:
        return linear_gradient_norms(hidden, kernel, labels, per="sequence", chunk_rows=2)

    check_grads(jax.jit(norms), (hidden, kernel), order=1, modes=("fwd", "rev"))

    def held(hidden: Any) -> Any:
        def norm(hidden: Any, labels: Any) -> Any:
            gradient = jax.grad(lambda w: linear_softmax_cross_entropy(hidden, w, labels, reduction="sum"))(kernel)
            return jnp.linalg.norm(gradient)

        return jnp.sum(jax.vmap(norm)(hidden, labels))

    streamed, wanted = (jax.grad(f) for f in (lambda h: jnp.sum(norms(h, kernel).kernel), held))
    step = rng.normal(size=hidden.shape)
    products = [jax.jit(lambda h, f=f: jax.jvp(f, (h,), (step,)))(hidden) for f in (streamed, wanted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), *products)
    hidden[1, 1] = hidden[1, 0]
    np.testing.assert_allclose(streamed(hidden), wanted(hidden), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["manual", "explicit", "automatic"])
def test_meshes(kind: str, rng: np.random.Generator):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(axis_type, axis_type))
    hidden, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((4, 2, 3), (3, 12), (12,)))
    arguments = hidden, kernel, bias, draw_labels(rng, (4, 2), 12)
    specs = P("data"), P(None, "vocab"), P("vocab"), P("data")

    def norms(hidden: Any, kernel: Any, bias: Any, labels: Any, **options: Any) -> Any:
        return linear_gradient_norms(hidden, kernel, labels, bias=bias, chunk_rows=2, per="sequence", **options)

    want = norms(*arguments)
    if kind == "manual":
        split = jax.shard_map(lambda *a: norms(*a, vocab_axis="vocab"), mesh=mesh, in_specs=specs, out_specs=P("data"))
        got = run(split, *arguments)
    else:
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs, strict=True)]
            got = run(norms, *placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_a_sequence_split_over_devices_is_refused(rng: np.random.Generator):
    mesh = jax.make_mesh((2, 4), ("data", "tokens"), axis_types=(AxisType.Explicit,) * 2)
    hidden = jax.device_put(np.ones((2, 4, 3), np.float32), NamedSharding(mesh, P("data", "tokens")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"whole sequences on each device.*tokens"):
        linear_gradient_norms(hidden, np.ones((3, 4), np.float32), np.zeros((2, 4), np.int32), per="sequence")


def test_memory_and_products():
    features, classes, tokens = 32, 4096, 8

    def compiled(sequences: int) -> Any:
        arguments = like(sequences, tokens, features), like(features, classes), like(sequences, tokens, dtype=np.int32)
        program = jax.jit(lambda *a: linear_gradient_norms(*a, chunk_rows=2 * tokens, per="sequence"))
        return program.lower(*arguments).compile()

    few, many = (compiled(n).memory_analysis().temp_size_in_bytes for n in (8, 64))
    assert many - few <= 4 * 2 * (features + 8) * tokens * (64 - 8)
    # Less than one kernel gradient for each of the chunk's two sequences, and the logits.
    assert few < 4 * 2 * features * classes + 4 * 4 * 2 * tokens * classes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (((2, 3), "token"), ["`per`", "'row' or 'sequence'", "'token'"]),
        (((3,), "sequence"), ["`hidden`", "(*batch, tokens, features)", "float32[3]"]),
    ],
)
def test_bad_input(arguments: Any, parts: list[str]):
    shape, per = arguments
    hidden, labels = np.ones(shape, np.float32), np.zeros(shape[:-1], np.int32)
    with pytest.raises(ValueError, match=r"^jaxent.linear_gradient_norms: ") as caught:
        linear_gradient_norms(hidden, np.ones((3, 4)), labels, per=per)
    for part in parts:
        assert part in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# What survives the head

KERNELS = {
    "fewer features than classes": lambda rng: rng.normal(size=(3, 7)),
    "more": lambda rng: rng.normal(size=(9, 4)),
    "one twice": lambda rng: np.repeat(rng.normal(size=(2, 7)), 2, axis=0),
    "one far smaller": lambda rng: rng.normal(size=(3, 7)) * np.array([[1e-12], [1], [1e6]]),
    "nothing": lambda rng: np.zeros((3, 7)),
    "low rank": lambda rng: rng.normal(size=(64, 3)) @ rng.normal(size=(3, 80)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_survives_is_the_part_in_the_row_space(name: str, rng: np.random.Generator):
    kernel = KERNELS[name](rng).astype(np.float32)
    features, classes = kernel.shape
    hidden = (rng.normal(size=(5, features)) / np.abs(kernel).sum(-1).clip(1)).astype(np.float32)
    labels = draw_labels(rng, (5,), classes)
    got = linear_gradient_norms(hidden, kernel, labels)
    z = hidden.astype(np.float64) @ kernel.astype(np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    d = e / e.sum(-1, keepdims=True) - (labels[:, None] == np.arange(classes))
    scaled = kernel / np.linalg.norm(kernel.astype(np.float64), axis=-1, keepdims=True).clip(1e-300)
    if name == "low rank":  # up to its rounding
        scaled = np.linalg.svd(scaled)[2][:3]
    np.testing.assert_allclose(got.survived, projected(d, scaled), rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(got.survived) <= np.asarray(got.bias) * (1 + 1e-6))


def test_unused_results_are_not_computed():
    def lapack_calls(fields: slice) -> int:
        arguments = like(32, 16), like(16, 64), like(32, dtype=np.int32)
        program = jax.jit(lambda *a: linear_gradient_norms(*a, chunk_rows=8)[fields])
        text: Any = program.lower(*arguments).compile().as_text()
        return text.count("custom-call")

    assert lapack_calls(slice(0, 4)) == 0
    assert lapack_calls(slice(4, 5)) > 0
