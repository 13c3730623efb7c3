"""One step over a pod of 1,024 TPU v5p: what its compiler makes each chip send and hold, next to the formulas."""

import json
import sys
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from benchmarks import compilers
from benchmarks.collectives import Collective
from benchmarks.compiled import Reading, compile_for
from jaxent._engine.devices import DEVICES
from jaxent._engine.roofline import chunk_rows_for

MESHES = ((128, 8), (16, 64), (1024, 1))


class Step(NamedTuple):
    """Value and gradient of the mean loss of N rows over `data x vocab` chips; the heads of "How cost grows"."""

    data: int
    vocab: int
    rows: int = 2**22
    features: int = 8192
    classes: int = 262144

    @property
    def chunk_rows(self) -> int:
        """That the library takes on a v5p."""
        return chunk_rows_for(DEVICES["v5p"], self.features, self.classes // self.vocab, jnp.bfloat16)[0]

    def times(self, collective: Collective) -> int:
        """How often it runs, for each time that the text counts."""
        return -(-self.rows // self.data // self.chunk_rows) if collective.looped else 1

    @property
    def numbers_sent(self) -> Counter[str]:
        """Summed over devices, on each chip: three for each row, the gradients of hidden states and of the kernel."""
        own_rows, own_classes = self.rows // self.data, self.classes // self.vocab
        over_vocab = {"rows": 3 * own_rows, "hidden": self.features * own_rows} if self.vocab > 1 else {}
        over_data = {"kernel": self.features * own_classes} if self.data > 1 else {}
        return Counter(over_vocab | over_data)


def compile_step(step: Step) -> Reading:
    grid = topologies.make_mesh(compilers.topology("v5p", pod=True), step[:2], ("data", "vocab")).devices
    mesh = Mesh(grid, ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)

    def like(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    arguments = (
        like((step.rows, step.features), jnp.bfloat16, "data"),
        like((step.features, step.classes), jnp.bfloat16, None, "vocab"),
        like((step.rows,), jnp.int32, "data"),
    )

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        return jaxent.linear_softmax_cross_entropy(hidden, kernel, labels)

    with jax.set_mesh(mesh):
        return compile_for(jax.value_and_grad(loss, argnums=(0, 1)), arguments)


def numbers_sent(found: list[Collective], step: Step) -> Counter[str]:
    """How many numbers the collectives add up, sorted as in the formula; any other collective by its kind.

    A loop over chunks runs as often as the rows that all count fill.
    """
    counts: Counter[str] = Counter()
    for collective in found:
        numbers = collective.numbers * step.times(collective)
        if collective.kind != "all-reduce":
            counts[collective.kind] += numbers
        elif len(collective.extent) == 1:
            counts["rows"] += numbers
        elif collective.extent:
            kernel = step.classes // step.vocab in collective.extent
            counts["kernel" if kernel else "hidden"] += numbers
    return counts


if __name__ == "__main__":  # what `optimized` runs
    jax.config.update("jax_compilation_cache_dir", None)
    compile_step(Step(**json.loads(sys.argv[1])))
