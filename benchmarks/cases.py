"""What is computed: shapes, data and the work that cannot be avoided."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Mode = Literal["value", "value and gradient"]

DENSE_SHAPES = ((256, 10), (65536, 10), (8192, 1000), (1024, 32768), (512, 65536), (4096, 50257))
DENSE_SHAPES_QUICK = ((256, 10), (1024, 1000), (64, 40000))
LINEAR_SHAPES = ((4096, 512, 32768), (2048, 256, 128256), (512, 128, 1000))
LINEAR_SHAPES_QUICK = ((512, 128, 1000), (512, 64, 8192))


@dataclass(frozen=True)
class Case:
    """The mean loss of `rows` rows and `classes` classes; from hidden states of size `hidden` if that is not 0."""

    suite: Literal["dense", "linear"]
    rows: int
    classes: int
    mode: Mode
    hidden: int = 0
    dtype: str = "float32"

    @property
    def name(self) -> str:
        hidden = f"D={self.hidden} " if self.hidden else ""
        return f"{self.suite} {self.mode}, N={self.rows} {hidden}V={self.classes} {self.dtype}"

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def data(self) -> tuple[np.ndarray, ...]:
        """`(logits, labels)`, or `(hidden, kernel, labels)`; logits have standard deviation 3, as early in training."""
        random = np.random.default_rng(0)
        labels = random.integers(0, self.classes, self.rows, dtype=np.int32)

        def normal(*shape: int, scale: float) -> np.ndarray:
            values = random.standard_normal(shape, dtype=np.float32)
            values *= np.float32(scale)
            return values.astype(jnp.dtype(self.dtype))

        if not self.hidden:
            return normal(self.rows, self.classes, scale=3.0), labels
        kernel = normal(self.hidden, self.classes, scale=3.0 / self.hidden**0.5)
        return normal(self.rows, self.hidden, scale=1.0), kernel, labels

    def bytes_moved(self) -> int:
        """What must cross the memory bus: inputs once, gradients once."""
        inputs = (self.rows + self.classes) * self.hidden if self.hidden else self.rows * self.classes
        times = 1 if self.mode == "value" else 2
        return inputs * times * jnp.dtype(self.dtype).itemsize

    def flops(self) -> int:
        """Of the matrix products that must be: one forward, two more for the gradients."""
        products = 1 if self.mode == "value" else 3
        return 2 * products * self.rows * self.hidden * self.classes

    def tolerance(self) -> dict[str, float]:
        """Relative; the products of a float32 linear loss may run in a narrower format on an accelerator."""
        if self.dtype != "float32":
            return {"value": 1e-3, "gradient": 2e-2}
        return {"value": 1e-5, "gradient": 1e-4} if self.suite == "dense" else {"value": 1e-4, "gradient": 2e-3}


def cases(suite: str, quick: bool) -> list[Case]:
    if suite == "dense":
        modes: tuple[Mode, ...] = ("value", "value and gradient")
        shapes = DENSE_SHAPES_QUICK if quick else DENSE_SHAPES
        return [Case("dense", n, v, mode) for mode in modes for n, v in shapes]
    shapes = LINEAR_SHAPES_QUICK if quick else LINEAR_SHAPES
    return [Case("linear", n, v, "value and gradient", d) for n, d, v in shapes]
