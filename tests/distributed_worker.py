"""One of two processes with two devices each: `python distributed_worker.py PORT PROCESS`, run by test_distributed.py.

Prints the value and the gradients of a sharded loss, as JSON, from process 0.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxent import linear_softmax_cross_entropy

ROWS, FEATURES, CLASSES = 12, 5, 8


def arguments() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    labels[7:] = -100  # one process counts more rows than the other
    hidden, kernel = rng.normal(size=(ROWS, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    return hidden.astype(np.float32), kernel.astype(np.float32), labels


def main(port: str, process: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=axis_types)
    specs = P("data"), P(None, "vocab"), P("data")
    placed = [
        jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index, x=x: x[index])
        for x, spec in zip(arguments(), specs, strict=True)
    ]

    def automatic(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.asarray(linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=4))

    def part(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        options = {"chunk_rows": 2, "vocab_axis": "vocab", "reduction": "sum_and_weight"}
        return jax.lax.psum(linear_softmax_cross_entropy(hidden, kernel, labels, **options), "data").mean()

    manual = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
    results = {}
    for name, loss in {"automatic": automatic, "manual": manual}.items():
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*placed)
        whole = multihost_utils.process_allgather(jax.tree.leaves(found), tiled=True)
        results[name] = [np.asarray(x).tolist() for x in whole]
    if process == 0:
        print(json.dumps(results))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
