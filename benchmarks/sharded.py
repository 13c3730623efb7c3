"""Losses over a mesh of devices, in the three ways in which JAX shards."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cases import Case
from jaxent import linear_softmax_cross_entropy, softmax_cross_entropy

Kind = Literal["automatic", "explicit", "shard_map"]
FAKE_DEVICES = 8  # what a CPU pretends to be


def mesh_of(case: Case, kind: Kind) -> Mesh:
    assert case.mesh is not None
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh(case.mesh, ("data", "vocab"), axis_types=(axis_type,) * 2)


def _specs(case: Case) -> tuple[P, ...]:
    """Rows over `data`, classes over `vocab`."""
    floats = (P("data"), P(None, "vocab")) if case.hidden else (P("data", "vocab"),)
    return *floats, P("data")


def placed(case: Case, mesh: Mesh, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, _specs(case), strict=True)]


def mean_in_shard_map(case: Case, mesh: Mesh) -> Callable[..., Any]:
    loss: Any = linear_softmax_cross_entropy if case.hidden else softmax_cross_entropy

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=_specs(case), out_specs=P())
    def mean(*data: jax.Array) -> jax.Array:
        return lax.psum(loss(*data, reduction="sum_and_weight", vocab_axis="vocab"), "data").mean()

    return mean
