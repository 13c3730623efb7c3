"""The arguments of the linear losses: the linear layer, and what is done to its logits before their softmax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxent import _arrays, _targets
from jaxent._layout import Layout, layout_for
from jaxent._options import Precision
from jaxent._sharding import Batch, automatic_devices, check_linear_layer, local_shape
from jaxent._streaming import Head, Products
from jaxent._targets import SoftmaxArguments


class Shaping(NamedTuple):
    """What is done to the logits of a linear layer before their softmax; None is nothing."""

    soft_cap: jax.Array | None
    temperature: jax.Array | None

    def __call__(self, z: jax.Array) -> jax.Array:
        if self.soft_cap is not None:
            cap = self.soft_cap.astype(z.dtype)
            z = cap * jnp.tanh(z / cap)
        return z if self.temperature is None else z / self.temperature.astype(z.dtype)


def check_head(
    function: str, hidden: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, suffix: str = ""
) -> tuple[Head, Batch]:
    """The head with its rows in one dimension, operands in one dtype, and the batch."""
    h = _arrays.floating(function, f"hidden{suffix}", hidden)
    w = _arrays.floating(function, f"kernel{suffix}", kernel)
    if h.ndim == 0:
        raise _arrays.shape_error(function, f"hidden{suffix}", "have shape (*batch, features)", h)
    if w.ndim != 2 or w.shape[0] != h.shape[-1]:
        expected = (
            f"have shape (features, classes) with {h.shape[-1]} features, as `hidden{suffix}` has; "
            "a (classes, features) embedding goes in as `embedding.T`"
        )
        raise _arrays.shape_error(function, f"kernel{suffix}", expected, w)
    _targets.check_classes(function, f"kernel{suffix}", w.shape, -1)
    if bias is not None:
        bias = _arrays.floating(function, f"bias{suffix}", bias)
        _arrays.check_shape(function, f"bias{suffix}", bias, (w.shape[1],), "one for each class")
    if h.dtype != w.dtype:
        h, w = _arrays.accumulated(h, w)
    check_linear_layer(function, h, w, suffix)
    batch = Batch.of(h, h.ndim - 1)
    return Head(batch.flatten(h), w, bias), batch


def check_shaping(function: str, soft_cap: ArrayLike | None, temperature: ArrayLike) -> Shaping:
    if soft_cap is not None:
        soft_cap = _arrays.scalar(function, "soft_cap", soft_cap, low=0.0, open_low=True)
    return Shaping(soft_cap, _arrays.scalar(function, "temperature", temperature, low=0.0, open_low=True, neutral=1.0))


def check_row_argument(function: str, x: ArrayLike, batch: Batch) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape[: len(batch)] != batch:
        raise _arrays.shape_error(
            function, "row_args", f"have shapes that start with {batch}, the batch of `hidden`", x
        )
    return batch.flatten(x)


def flat_rows(arguments: SoftmaxArguments, batch: Batch) -> SoftmaxArguments:
    """The arguments with their batch axes as one."""
    flat: dict[str, Any] = {
        name: batch.flatten(x)
        for name, x in arguments._asdict().items()
        if name in ("targets", "where", "weights") and x is not None
    }
    return arguments._replace(**flat)


def layout(function: str, chunk_rows: int | None, *heads: Head) -> Layout:
    """How the rows of a device are cut; the logits of all heads are held at a time."""
    rows, _ = local_shape(heads[0].hidden)
    classes = max(1, sum(local_shape(head.kernel)[1] for head in heads))
    devices = max(automatic_devices(x) for head in heads for x in (head.hidden, head.kernel))
    features = max(local_shape(head.hidden)[1] for head in heads)
    return layout_for(function, rows, features, classes, chunk_rows, devices)


def logits_like(*heads: Head) -> jax.ShapeDtypeStruct:
    """What the logits would be; with several heads, in a dtype that holds those of each."""
    shape = (heads[0].hidden.shape[0], heads[0].kernel.shape[1])
    return jax.ShapeDtypeStruct(shape, _arrays.accumulation_dtype(*(head.kernel for head in heads)))


def products(precision: Precision, head: Head) -> Products:
    """float32 inputs keep float32 accuracy unless the caller, or `jax.default_matmul_precision`, says otherwise."""
    config: Any = jax.config  # its options are not typed
    if precision is None and head.kernel.dtype == np.float32 and config.jax_default_matmul_precision is None:
        precision = jax.lax.Precision.HIGHEST
    return Products(precision)
