"""Records that `jax.export` can write: a program that returns one is serialised with its name."""

import contextlib
from typing import TypeVar

from jax import export

Record = TypeVar("Record", bound=type)


def exportable(record: Record) -> Record:
    """A `NamedTuple`, or a dataclass that is a pytree without static fields, under its name in this package."""
    name = f"jaxent.{record.__name__}"
    # A module that is loaded a second time finds the name taken, and the first class keeps it.
    with contextlib.suppress(ValueError):
        if issubclass(record, tuple):
            export.register_namedtuple_serialization(record, serialized_name=name)
        else:
            export.register_pytree_node_serialization(
                record,
                serialized_name=name,
                serialize_auxdata=lambda _: b"",
                deserialize_auxdata=lambda _: (),
                from_children=lambda aux_data, children: record(*children),
            )
    return record
