"""What the losses from hidden states cost: multiply-adds counted in the jaxpr, bytes and copies read from the compiler.

Nothing here is timed. And the precision that the costs are not paid for with: errors of bf16 heads over many chunks,
alongside those of dense code in the same dtype.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracles_linear
import pytest
from cases import covering

import jaxent

# Untyped: what is returned depends on `reduction`.
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
linear_kl_divergence: Any = jaxent.linear_kl_divergence

BF16 = ml_dtypes.bfloat16
pytestmark = pytest.mark.compiled


def like(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def hlo(f: Any, *arguments: Any) -> str:
    """The program that runs."""
    text: Any = jax.jit(f).lower(*arguments).compile().as_text()
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Multiply-adds


def subprograms(value: Any) -> Iterator[Any]:
    """The jaxprs inside a parameter of an equation."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from subprograms(value.jaxpr)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from subprograms(item)


def multiply_adds(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            a = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(np.prod([a[i] for i in contracted]))
            continue
        if equation.primitive.name == "custom_linear_solve":
            # A product of narrow operands: only the solution is computed, and of its two products one is used.
            total += sum(multiply_adds(sub) for sub in subprograms(equation.params["jaxprs"].solve)) // 2
            continue
        inner = [multiply_adds(sub) for value in equation.params.values() for sub in subprograms(value)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += equation.params.get("length", 1) * sum(inner)
    return total


def counted(f: Any, *arguments: Any) -> int:
    return multiply_adds(jax.make_jaxpr(f)(*arguments).jaxpr)


def loss_of(targets: Any, **options: Any) -> Any:
    return lambda hidden, kernel: jnp.sum(linear_softmax_cross_entropy(hidden, kernel, targets, **options))


# What is computed, of a loss of (hidden, kernel) -> the matrix products it may spend, and a tenth for the rest.
PRODUCTS = {
    "value": (lambda f: f, 1),
    "value and gradient": (lambda f: jax.value_and_grad(f, argnums=(0, 1)), 3),
    "gradient": (lambda f: jax.grad(f, argnums=(0, 1)), 3),
    "gradient with respect to hidden": (lambda f: jax.grad(f, argnums=0), 2),
    "gradient with respect to kernel": (lambda f: jax.grad(f, argnums=1), 2),
    "tangent": (lambda f: lambda h, w: jax.jvp(f, (h, w), (h, w)), 3),
    "value under checkpoint": (lambda f: jax.checkpoint(f), 1),
}


@pytest.mark.parametrize(("what", "rows"), covering(PRODUCTS, [131, 256, 13]))
def test_matrix_products(what: str, rows: int):
    transform, products = PRODUCTS[what]
    features, classes = 16, 257
    unit = rows * features * classes
    f = transform(loss_of(np.zeros(rows, np.int32), chunk_rows=32, label_smoothing=0.1, z_loss=0.1))
    spent = counted(f, like(rows, features), like(features, classes)) / unit
    padded = -(-rows // 32) * -(-rows // -(-rows // 32)) / rows
    assert padded < 1.1
    assert products <= spent <= (products + (0.05 if products == 1 else 0.1)) * padded


@pytest.mark.usefixtures("one_device")
def test_a_gradient_of_rows_that_all_count_has_no_choice_in_its_loop():
    """NVIDIA's compiler copies the carry, as large as the kernel, at a choice."""
    f = loss_of(np.zeros(64, np.int32), chunk_rows=16, ignore_index=None)
    program = str(jax.make_jaxpr(jax.value_and_grad(f, argnums=(0, 1)))(like(64, 8), like(8, 32)))
    assert "scan[" in program
    assert program.count("cond[") == program.count("platform_index[")  # the row loss chooses by platform


@pytest.mark.parametrize("rows", [256, 131])
def test_row_losses_take_four_products(rows: int):
    f = loss_of(np.zeros(rows, np.int32), chunk_rows=32, reduction="none")
    spent = counted(jax.grad(f, argnums=(0, 1)), like(rows, 16), like(16, 257)) / (rows * 16 * 257)
    assert 4 <= spent <= 4.1 * 1.05


def test_a_hessian_product_does_not_depend_on_the_dense_logits():
    def product(hidden: jax.Array, kernel: jax.Array) -> Any:
        gradient = jax.grad(loss_of(np.zeros(256, np.int32), chunk_rows=32), argnums=(0, 1))
        return jax.jvp(gradient, (hidden, kernel), (hidden, kernel))[1]

    # The three products of the gradient, and the derivative of each, which has two terms.
    assert counted(product, like(256, 16), like(16, 257)) / (256 * 16 * 257) <= 9.1


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_a_frozen_teacher_costs_one_product(divergence: str):
    rows, teacher, student, classes = 256, 24, 16, 257

    def loss(h_q: jax.Array, w_q: jax.Array, h_p: jax.Array, w_p: jax.Array) -> jax.Array:
        return linear_kl_divergence(h_p, w_p, h_q, w_q, divergence=divergence, chunk_rows=32)

    spent = counted(
        jax.value_and_grad(loss, argnums=(0, 1)),
        like(rows, student),
        like(student, classes),
        like(rows, teacher),
        like(teacher, classes),
    )
    least = rows * classes * (teacher + 3 * student)
    assert least <= spent <= 1.03 * least


# ----------------------------------------------------------------------------------------------------------------------
# Bytes

FEATURES, CLASSES, CHUNK = 128, 16384, 512
CHUNK_LOGITS, KERNEL = 4 * CHUNK * CLASSES, 4 * FEATURES * CLASSES


def compiled(f: Any, rows: int) -> Any:
    """`f(loss)` of hidden, kernel and labels, where `loss(hidden, kernel, labels, **options)` is a scalar."""

    def program(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        def loss(hidden: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
            return jnp.sum(linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=CHUNK, **options))

        return f(loss, hidden, kernel)

    arguments = like(rows, FEATURES), like(FEATURES, CLASSES), like(rows, dtype=np.int32)
    return jax.jit(program).lower(*arguments).compile()


def temporary_bytes(f: Any, rows: int) -> int:
    return compiled(f, rows).memory_analysis().temp_size_in_bytes


def value_and_gradient(loss: Any, hidden: Any, kernel: Any) -> Any:
    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)


@pytest.mark.parametrize("rows", [2048, 8192])
def test_temporaries_of_value_and_gradient(rows: int):
    assert temporary_bytes(value_and_gradient, rows) <= 2 * CHUNK_LOGITS + KERNEL


def hessian_product(loss: Any, hidden: Any, kernel: Any) -> Any:
    return jax.jvp(jax.grad(loss, argnums=(0, 1)), (hidden, kernel), (hidden, kernel))


def gradient_of_row_losses(loss: Any, hidden: Any, kernel: Any) -> Any:
    return jax.grad(lambda h, w: loss(h, w, reduction="none"), argnums=(0, 1))(hidden, kernel)


@pytest.mark.grid
@pytest.mark.parametrize(("f", "chunks"), [(hessian_product, 4.5), (gradient_of_row_losses, 2)])
@pytest.mark.usefixtures("one_device")
def test_temporaries_do_not_grow_with_the_rows(f: Any, chunks: float):
    few, many = temporary_bytes(f, 2048), temporary_bytes(f, 8192)
    assert many < few + 3 * 4 * FEATURES * (8192 - 2048)  # hidden states, and not logits
    assert many < chunks * CHUNK_LOGITS


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("what", "most"), [("none", 14), ("log_prob", 14), ("entropy", 18)])
def test_a_frozen_bf16_kernel_gets_no_float32_copy(what: str, most: int):
    """It would take 16 MiB, one in bf16 takes 8, and a chunk of logits 2; an entropy's derivative needs more chunks."""

    def rows(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        if what == "none":
            return linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none", chunk_rows=64)
        return getattr(jaxent.linear_token_statistics(hidden, kernel, labels, chunk_rows=64), what)

    arguments = like(256, 512, dtype=BF16), like(512, 8192, dtype=BF16), like(256, dtype=np.int32)
    gradient = jax.grad(lambda *a: jnp.sum(rows(*a)))
    value, by_hidden = (jax.jit(f).lower(*arguments).compile().memory_analysis() for f in (rows, gradient))
    assert value is not None
    assert by_hidden is not None
    assert value.temp_size_in_bytes <= 6 * 2**20
    assert by_hidden.temp_size_in_bytes <= most * 2**20


# ----------------------------------------------------------------------------------------------------------------------
# Copies

MOVES = re.compile(r"= f32\[(\d+),(\d+)\]\S* (copy|transpose|pad|concatenate)\(")


def moves(text: str, features: int, classes: int) -> list[str]:
    """Where a program moves a whole kernel, padded or not: `computation: instruction`.

    A copy or transposition inside a fusion is only an order of reading; at its root it is written out, and so is every
    pad and concatenation.
    """
    found, computation = [], ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")):
            computation = line.split()[0]
        move = MOVES.search(line)
        if not move:
            continue
        short, long = sorted(map(int, move.groups()[:2]))
        read = "fused_computation" in computation and move[3] in ("copy", "transpose") and "ROOT" not in line
        if short == features and long >= classes and not read:
            found.append(f"{computation}: {line.strip()}")
    return found


def test_moves_are_found():
    def text(f: Any) -> str:
        return hlo(f, like(96, 1000))

    assert moves(text(lambda w: jnp.sum(jnp.sin(w))), 96, 1000) == []
    assert len(moves(text(lambda w: jnp.pad(w, ((0, 0), (0, 24)))), 96, 1000)) == 1
    assert len(moves(text(lambda w: w.T), 96, 1000)) == 1


@pytest.mark.parametrize(("wanted", "classes", "rows"), covering([(0, 1), (0,)], [1511, 1500], [1021, 1024]))
def test_the_kernel_is_never_copied(wanted: tuple[int, ...], classes: int, rows: int):
    def program(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
            return linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=256)

        return jax.value_and_grad(loss, argnums=wanted)(hidden, kernel)

    text = hlo(program, like(rows, 96), like(96, classes), like(rows, dtype=np.int32))
    assert moves(text, 96, classes) == []


def test_no_logits_are_copied_where_several_are_worked_on_in_blocks():
    rows, features, classes = 64, 16, 8192
    head = like(rows, features), like(features, classes)

    def both(h: Any, w: Any, dh: Any, dw: Any) -> Any:
        gradients = jax.grad(linear_kl_divergence, (0, 1, 2, 3))(h, w, dh, dw)
        return gradients, jaxent.linear_ggn_vector_product(h, w, (dh, dw))

    found = moves(hlo(both, *head, *head), rows, classes)
    assert [
        move for move in found if not move.startswith("ENTRY")
    ] == []  # the logits that both work on are copied once


@pytest.mark.parametrize("wanted", [(0,), (0, 1)])
def test_an_embedding_is_not_copied_in_every_chunk(wanted: tuple[int, ...]):
    def program(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> Any:
        def loss(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            return linear_softmax_cross_entropy(hidden, embedding.T, labels, chunk_rows=256)

        return jax.value_and_grad(loss, argnums=wanted)(hidden, embedding)

    text = hlo(program, like(1024, 96), like(1511, 96), like(1024, dtype=np.int32))
    # The CPU back end turns the embedding before the loop, and its gradient after it; jax 0.12 in two steps each.
    found = moves(text, 96, 1511)
    assert len(found) <= 2 * len(wanted)
    entry = text[text.index("ENTRY") :]
    for move in found:
        call = re.escape(f"calls={move.split(':')[0]}") + r"(?![\w.])"
        assert len(re.findall(call, entry)) == len(re.findall(call, text)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Precision


def relative_error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.grid
@pytest.mark.parametrize("chunk_rows", [16, pytest.param(4, marks=pytest.mark.slow)])
def test_bf16_over_many_chunks_is_no_worse_than_dense(chunk_rows: int, rng: np.random.Generator):
    rows, features, classes = 1024, 64, 500
    hidden = rng.normal(size=(rows, features)).astype(BF16)
    kernel = (rng.normal(size=(features, classes)) / 4).astype(BF16)
    targets = rng.integers(0, classes, size=rows)
    want = oracles_linear.softmax_cross_entropy(hidden, kernel, targets)
    losses: dict[str, Any] = {
        "linear": lambda h, w: linear_softmax_cross_entropy(h, w, targets, chunk_rows=chunk_rows),
        "dense": lambda h, w: jaxent.softmax_cross_entropy((h @ w).astype(np.float32), targets),
        "optax": lambda h, w: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(h @ w, targets), dtype=np.float32
        ),
    }
    errors = {}
    for name, loss in losses.items():
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, kernel)
        expected = (np.asarray(want.value), want.gradients["hidden"], want.gradients["kernel"])
        errors[name] = [relative_error(a, b) for a, b in zip((value, *gradients), expected, strict=True)]
    # A float32 sum of 1024 losses, and the rounding of the results to bf16, of which no code is free.
    tolerances = (1e-6, 2e-4, 2e-4)
    for peer in ("dense", "optax"):
        for mine, theirs, tolerance in zip(errors["linear"], errors[peer], tolerances, strict=True):
            assert mine <= theirs + tolerance, errors


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_carry_of_bf16_would_stop_growing(reduction: str):
    # 512 chunks of one row, each of which adds +-1/1024; in bf16 the sum stays at 1/4.
    hidden, kernel, bias = np.ones((512, 1), BF16), np.zeros((1, 2), BF16), np.zeros(2, BF16)

    def loss(kernel: jax.Array, bias: jax.Array, temperature: jax.Array) -> jax.Array:
        losses = linear_softmax_cross_entropy(
            hidden,
            kernel,
            np.zeros(512, np.int32),
            bias=bias,
            temperature=temperature,
            weights=np.full(512, 1 / 512, np.float32),
            reduction=reduction,
            chunk_rows=1,
        )
        return jnp.sum(losses)

    by_kernel, by_bias, _ = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(kernel, bias, np.ones((), BF16))
    np.testing.assert_array_equal(np.asarray(by_kernel, np.float32), [[-0.5, 0.5]])
    np.testing.assert_array_equal(np.asarray(by_bias, np.float32), [-0.5, 0.5])

    # The derivative with respect to a temperature is -sum_n p_1 z_1 / T^2 for logits (0, z_1): here 512 terms of
    # 1/1024.
    by_temperature = jax.jit(jax.grad(loss, argnums=2))(kernel, np.array([0, 1], BF16), np.ones((), BF16))
    np.testing.assert_allclose(np.float32(by_temperature), -1 / (1 + np.exp(-1)), rtol=4e-3)

    # The second derivatives, 512 terms as small, by reverse mode.
    def first(argument: int) -> Any:
        return jax.grad(lambda *a: jnp.ravel(jax.grad(loss, argnums=argument)(*a))[-1], argnums=argument)

    by_bias = jax.jit(first(1))(kernel, bias, np.ones((), BF16))
    np.testing.assert_array_equal(np.asarray(by_bias, np.float32), [-0.25, 0.25])
    by_temperature = jax.jit(first(2))(kernel, np.array([0, 1], BF16), np.ones((), BF16))
    p = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(np.float32(by_temperature), p * (1 - p) + 2 * p, rtol=8e-3)


def test_float32_keeps_float32_accuracy(rng: np.random.Generator):
    hidden = rng.normal(size=(1024, 64)).astype(np.float32)
    kernel = (rng.normal(size=(64, 500)) / 4).astype(np.float32)
    targets = rng.integers(0, 500, size=1024)
    want = oracles_linear.softmax_cross_entropy(hidden, kernel, targets)
    f = jax.value_and_grad(lambda h, w: linear_softmax_cross_entropy(h, w, targets, chunk_rows=16), argnums=(0, 1))
    value, (by_hidden, by_kernel) = jax.jit(f)(hidden, kernel)
    assert relative_error(value, np.asarray(want.value)) < 5e-7
    assert relative_error(by_hidden, want.gradients["hidden"]) < 1e-6
    assert relative_error(by_kernel, want.gradients["kernel"]) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (np.float32, None, {"HIGHEST"}),
        (np.float32, "default", {"DEFAULT"}),
        (BF16, None, {"None", "DEFAULT"}),
    ],
)
def test_the_precision_of_the_products(dtype: Any, precision: Any, expected: set[str]):
    def precisions(jaxpr: Any) -> Iterator[str]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                given = equation.params["precision"]
                yield from (p.name if p is not None else "None" for p in (given if given else (None,)))
            for value in equation.params.values():
                for sub in subprograms(value):
                    yield from precisions(sub)

    f = jax.grad(loss_of(np.zeros(8, np.int32), chunk_rows=2, precision=precision), argnums=(0, 1))
    found = list(precisions(jax.make_jaxpr(f)(like(8, 4, dtype=dtype), like(4, 5, dtype=dtype)).jaxpr))
    assert len(found) >= 3
    assert set(found) <= expected
