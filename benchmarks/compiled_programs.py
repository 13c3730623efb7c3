"""What the compilers of accelerators are given: functions of published heads, ours and dense code."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from benchmarks import compilers
from benchmarks.cases import HEADS
from jaxent._engine.chunking import chunking_of, default_chunk_rows
from jaxent._engine.devices import DEVICES, Target

Mode = Literal["value", "value and gradient", "Hessian product", "statistics", "divergence"]
MODES: tuple[Mode, ...] = ("value", "value and gradient", "Hessian product", "statistics", "divergence")
Precision = Literal["bfloat16", "mixed", "float32"]
Author = Literal["jaxent", "dense", "dense in float32"]
ROWS = 32768
# Products of N x D x V multiply-adds that must be; of a divergence, with a gradient with respect to Q's head alone.
PRODUCTS: dict[Mode, int] = {
    "value": 1,
    "value and gradient": 3,
    "Hessian product": 7,
    "statistics": 1,
    "divergence": 4,
}

PLANNED: dict[Mode, str] = {
    "value and gradient": "linear_softmax_cross_entropy",
    "statistics": "linear_token_statistics",
    "divergence": "linear_kl_divergence",
}


@dataclass(frozen=True)
class Program:
    """One function of one head, as jaxent or dense code computes it."""

    head: str
    mode: Mode
    precision: Precision = "bfloat16"
    author: Author = "jaxent"
    rows: int = ROWS
    target: str = "h100"
    chunk_rows: int | None = None
    """None for what suits the target."""

    @property
    def features(self) -> int:
        return HEADS[self.head][0]

    @property
    def classes(self) -> int:
        return HEADS[self.head][1]

    @property
    def record(self) -> dict[str, Any]:
        """What a row of the record is about."""
        names = ("target", "head", "mode", "precision", "author", "rows")
        return {name: getattr(self, name) for name in names} | {"chunk_rows": self.block_rows}

    @property
    def block_rows(self) -> int:
        """Rows whose logits exist at once."""
        if self.author != "jaxent":
            return self.rows
        held = self.classes * (2 if self.mode == "divergence" else 1)
        target = Target(False, DEVICES[self.target])
        default = default_chunk_rows(target, self.features, held, _dtypes(self.precision)[0])
        return chunking_of(self.rows, self.chunk_rows, default).chunk_rows

    @property
    def planned_mib(self) -> float | None:
        """What `plan` says of its temporaries; None for what it does not plan."""
        if self.author != "jaxent" or self.mode not in PLANNED:
            return None
        hidden, kernel = _dtypes(self.precision)
        found = jaxent.plan(
            *(self.rows, self.features, self.classes),
            dtype=hidden,
            kernel_dtype=kernel,
            device=self.target,
            function=PLANNED[self.mode],
            chunk_rows=self.chunk_rows,
        )
        return round(found.temp_bytes / 2**20, 1)

    @property
    def num_chunks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def loop_trips(self) -> int:
        """Of the loop over chunks whose length depends on the data; on GPUs a gradient's first stands before it."""
        return self.num_chunks - (self.mode == "value and gradient" and not DEVICES[self.target].is_tpu)

    @property
    def product_flops(self) -> int:
        """Of the products that must be."""
        return 2 * PRODUCTS[self.mode] * self.rows * self.features * self.classes

    def arguments(self, device: Any) -> list[jax.ShapeDtypeStruct]:
        """Shapes on a device that need not be here; a mesh of one tells the engine which it is."""
        hidden, kernel = _dtypes(self.precision)
        like = functools.partial(jax.ShapeDtypeStruct, sharding=on_device(device))
        layer = [like((self.rows, self.features), hidden), like((self.features, self.classes), kernel)]
        labels = [like((self.rows,), jnp.int32)]
        if self.mode == "Hessian product":
            return [*layer, *labels, *layer]
        return [*layer, *layer] if self.mode == "divergence" else [*layer, *labels]

    def function(self) -> Callable[..., Any]:
        return (_ours if self.author == "jaxent" else _dense)(self)


def on_device(device: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,)), P())


def _dtypes(precision: Precision) -> tuple[Any, Any]:
    """Of hidden states and kernel. Mixed: a master kernel in float32, multiplied in bfloat16."""
    return {
        "bfloat16": (jnp.bfloat16, jnp.bfloat16),
        "mixed": (jnp.bfloat16, jnp.float32),
        "float32": (jnp.float32, jnp.float32),
    }[precision]


def _derived(mode: Mode, loss: Callable[..., Any]) -> Callable[..., Any]:
    """What a mode computes of `loss(hidden, kernel, labels)`."""
    gradient = jax.grad(loss, argnums=(0, 1))

    def hessian_product(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, *tangents: jax.Array) -> Any:
        return jax.jvp(lambda *head: gradient(*head, labels), (hidden, kernel), tangents)[1]

    if mode == "Hessian product":
        return hessian_product
    return loss if mode == "value" else jax.value_and_grad(loss, argnums=(0, 1))


def _ours(program: Program) -> Callable[..., Any]:
    options: dict[str, Any] = {"chunk_rows": program.chunk_rows}
    if program.precision == "mixed":
        options["dtype"] = jnp.bfloat16
    if program.mode == "statistics":
        return functools.partial(jaxent.linear_token_statistics, **options)
    if program.mode == "divergence":
        return jax.value_and_grad(functools.partial(jaxent.linear_kl_divergence, **options), argnums=(2, 3))
    return _derived(program.mode, functools.partial(jaxent.linear_softmax_cross_entropy, **options))


def _dense(program: Program) -> Callable[..., Any]:
    """All logits, then the loss of them: by optax or, where it has none, by the definition.

    The product of bf16 operands gives bf16 logits, as `hidden @ kernel` does, or float32 ones; then the products of the
    gradient have float32 operands.
    """

    def logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        if program.precision == "mixed":
            kernel = kernel.astype(jnp.bfloat16)
        precision = "highest" if program.precision == "float32" else None
        wide = jnp.float32 if program.author == "dense in float32" else None
        return jnp.matmul(hidden, kernel, precision=precision, preferred_element_type=wide).astype(jnp.float32)

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(hidden, kernel), labels).mean()

    def statistics(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        z = logits(hidden, kernel)
        log_p = jax.nn.log_softmax(z)
        picked = jnp.take_along_axis(log_p, labels[:, None], axis=-1)
        rank = jnp.sum(log_p > picked, axis=-1)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return picked[:, 0], jax.nn.logsumexp(z, axis=-1), entropy, jnp.argmax(z, axis=-1), rank

    def divergence(hidden_p: jax.Array, kernel_p: jax.Array, hidden_q: jax.Array, kernel_q: jax.Array) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(logits(*head)) for head in ((hidden_p, kernel_p), (hidden_q, kernel_q)))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    if program.mode == "statistics":
        return statistics
    if program.mode == "divergence":
        return jax.value_and_grad(divergence, argnums=(2, 3))
    return _derived(program.mode, loss)


if __name__ == "__main__":  # what `optimized` runs
    jax.config.update("jax_compilation_cache_dir", None)
    program = Program(**json.loads(sys.argv[1]))
    arguments = program.arguments(compilers.topology(program.target).devices[0])
    jax.jit(program.function()).lower(*arguments).compile()
