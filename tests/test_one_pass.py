"""The maximum and the sum of exponentials in one reduction, which only NVIDIA's devices take: here on CPU."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent._math.one_pass import largest_and_others
from jaxent._mesh.class_axis import ClassAxis

CLASSES = 300
ROWS = {
    "plain": lambda r: 3 * r.standard_normal(CLASSES),
    "far apart": lambda r: 40 * r.standard_normal(CLASSES),
    "shifted": lambda r: 1e4 + r.standard_normal(CLASSES),
    "rising": lambda r: np.sort(30 * r.standard_normal(CLASSES)),
    "falling": lambda r: -np.sort(30 * r.standard_normal(CLASSES)),
    "all equal": lambda r: np.full(CLASSES, 7.0),
    "removed classes": lambda r: np.where(np.arange(CLASSES) % 3 == 0, -np.inf, r.standard_normal(CLASSES)),
    "one class left": lambda r: np.where(np.arange(CLASSES) == 5, 2.0, -np.inf),
    "label far above": lambda r: np.where(np.arange(CLASSES) == 4, 100.0, r.standard_normal(CLASSES)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_maximum_and_sum_without_the_label(kind: str, rng: np.random.Generator):
    z = np.stack([ROWS[kind](rng) for _ in range(3)]).astype(np.float32)
    label = np.array([4, 0, CLASSES - 1], np.int32)
    largest, others = jax.jit(lambda z, y: largest_and_others(z, y, ClassAxis()))(z, label)
    np.testing.assert_array_equal(largest, z.max(axis=-1))
    wide = z.astype(np.float64)
    exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
    exponentials[np.arange(3), label] = 0
    # 300 additions, and differences of up to some hundred that are rounded.
    np.testing.assert_allclose(others, exponentials.sum(axis=-1), rtol=3e-5, atol=1e-37)


@pytest.mark.parametrize(
    ("row", "largest", "others"),
    [([-np.inf] * 4, -np.inf, None), ([0, np.nan, 1, 2], np.nan, np.nan), ([0, np.inf, np.inf, 1], np.inf, None)],
)
def test_rows_without_a_softmax(row: list[float], largest: float, others: float | None):
    """The loss takes such a row from its maximum, which is not finite."""
    found = largest_and_others(jnp.array([row], jnp.float32), jnp.array([0]), ClassAxis())
    np.testing.assert_array_equal(found[0], np.array([largest], np.float32))
    if others is not None:
        np.testing.assert_array_equal(found[1], np.array([others], np.float32))


def test_shards_of_the_classes_add_up(rng: np.random.Generator):
    z, label = (10 * rng.standard_normal((6, 304))).astype(np.float32), np.arange(6, dtype=np.int32) * 50
    z[:, :38] = -np.inf  # all that the first device holds
    z[np.arange(6), label] = 3
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Auto,))

    def part(z: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest, others = largest_and_others(z, label, ClassAxis(mesh_axis="vocab"))
        return largest, jax.lax.psum(others, "vocab")

    found = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P(None, "vocab"), P()), out_specs=P()))(z, label)
    whole = largest_and_others(jnp.asarray(z), jnp.asarray(label), ClassAxis())
    np.testing.assert_array_equal(found[0], whole[0])
    np.testing.assert_allclose(found[1], whole[1], rtol=1e-5)


@pytest.fixture
def as_on_nvidia(monkeypatch: pytest.MonkeyPatch, one_device: None) -> Iterator[None]:
    """What `platform_dependent` has for CUDA runs here."""

    def choose(*arguments: Any, default: Any = None, **platforms: Any) -> Any:
        return platforms.get("cuda", default)(*arguments)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    yield
    jax.clear_caches()


@pytest.mark.grid
def test_losses_and_derivatives_are_the_same(as_on_nvidia: None, monkeypatch: pytest.MonkeyPatch, rng: Any):
    hidden, kernel, step = (rng.standard_normal(s).astype(np.float32) for s in ((12, 8), (8, 40), (8, 40)))
    labels = np.array([0, 1, 39, -100, 5, 5, 7, 8, 9, 10, 11, 12], np.int32)

    def loss(kernel: jax.Array) -> Any:
        return jaxent.linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=5, label_smoothing=0.1)

    def everything(kernel: jax.Array, step: jax.Array) -> Any:
        products = jax.jvp(jax.grad(loss), (kernel,), (step,))
        rows = jax.vmap(lambda y: jaxent.softmax_cross_entropy(hidden @ kernel, y, reduction="none"))(
            np.stack([labels, labels[::-1]])
        )
        return loss(kernel), products, rows, jax.hessian(lambda z: jaxent.softmax_cross_entropy(z, 3))(kernel[0])

    found = jax.jit(everything)(kernel, step)
    monkeypatch.undo()
    jax.clear_caches()
    expected = jax.jit(everything)(kernel, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def test_the_loss_of_a_row_without_a_softmax_is_nan(as_on_nvidia: None):
    rows = [[-np.inf] * 4, [0, np.nan, 1, 2], [0, np.inf, np.inf, 1], [np.inf, 0, 1, 2], [0, np.inf, 1, 2]]
    loss = jax.jit(jax.vmap(jax.value_and_grad(lambda z: jaxent.softmax_cross_entropy(z, 0))))
    for result in loss(np.array(rows, np.float32)):
        assert np.isnan(result).all()


def test_the_loss_has_one_reduction_for_both(as_on_nvidia: None):
    z = jnp.zeros((4, 10))
    text = str(jax.make_jaxpr(jax.grad(lambda z: jaxent.softmax_cross_entropy(z, jnp.arange(4))))(z))
    assert "reduce_max" not in text
    assert text.count(" reduce[") == 1
