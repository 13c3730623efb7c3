"""What the sums and the statistics are to other libraries: metrics, checkpoints, printed trees."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxent import EmpiricalRisk, WeightedSum, softmax_cross_entropy, token_statistics

LOGITS = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
LABELS = np.array([0, 1, 1])


class Loss(nnx.Metric):
    """That of the documentation."""

    def __init__(self):
        self.sums = nnx.metrics.MetricState(EmpiricalRisk())

    def reset(self) -> None:
        self.sums.set_value(EmpiricalRisk())

    def update(self, *, losses: Any, weights: Any = None, **_: Any) -> None:
        self.sums.set_value(self.sums.get_value().update(losses, weights))

    def compute(self) -> jax.Array:
        return self.sums.get_value().mean()


def test_a_metric_of_nnx():
    metrics = nnx.MultiMetric(loss=Loss(), accuracy=nnx.metrics.Accuracy())

    @nnx.jit
    def step(metrics: nnx.MultiMetric, logits: jax.Array, labels: jax.Array) -> None:
        losses = softmax_cross_entropy(logits, labels, reduction="none")
        metrics.update(losses=losses, logits=logits, labels=labels)

    with jax.numpy_dtype_promotion("standard"):  # flax adds floats to integers
        for rows in (slice(0, 2), slice(2, 3)):
            step(metrics, jnp.asarray(LOGITS[rows]), jnp.asarray(LABELS[rows]))
        found = metrics.compute()
        np.testing.assert_allclose(found["loss"], softmax_cross_entropy(LOGITS, LABELS), rtol=1e-6)
        assert float(found["accuracy"]) == pytest.approx(2 / 3)
        metrics.reset()
        assert metrics.compute()["loss"] == 0


def results() -> dict[str, Any]:
    return {
        "risk": EmpiricalRisk().update(np.array([1.0, 3.0], np.float32)),
        "sum": softmax_cross_entropy(LOGITS, LABELS, reduction="sum_and_weight"),
        "statistics": token_statistics(LOGITS, LABELS, top_k=2),
    }


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore")
def test_orbax_saves_and_restores(tmp_path: Path):
    orbax: Any = pytest.importorskip("orbax.checkpoint")
    given = results()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", given)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(results))
    assert isinstance(found["risk"], EmpiricalRisk)
    assert isinstance(found["sum"], WeightedSum)
    jax.tree.map(np.testing.assert_array_equal, found, given)


@pytest.mark.grid
def test_printed_trees_name_every_field():
    treescope: Any = pytest.importorskip("treescope")
    given = results()
    for text in (repr(given), treescope.render_to_text(given)):
        for name in ("EmpiricalRisk(", "WeightedSum(", "total=", "weight=", "TokenStatistics(", "log_prob=", "rank="):
            assert name in text
