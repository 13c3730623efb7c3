"""Where a run takes place: a mesh of devices, in this process or in several that `jax.distributed` joins."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxent import _command
from jaxent.cli.devices import available
from jaxent.cli.errors import CommandError
from jaxent.cli.train.model import PER_TOKEN

Pytree = Any
T = TypeVar("T")

DATA, VOCAB = "data", "vocab"
# What JAX says when nobody has told it of other processes, and when it is too late to join them.
ALONE = ("coordinator_address should be defined", "must be called before")


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, if the arguments name them or JAX detects their cluster."""
    given = [argument is not None for argument in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise CommandError("--coordinator, --num-processes and --process-id belong together")
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
        if _command.is_installed():
            _command.install()  # JAX has taken SIGTERM for a notice of its own, which nobody here reads
    except (ValueError, RuntimeError) as error:
        if any(given) or not any(words in str(error) for words in ALONE):
            raise CommandError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """A mesh with the axes `data` (the rows of a batch) and `vocab` (the tokens of the embedding and the head).

    The sharding is automatic: XLA splits a computation as its inputs are split.
    """

    mesh: Mesh

    @classmethod
    def of(cls, data: int = 1, vocab: int = 1) -> "DeviceMesh":
        devices, count = available(), data * vocab
        if count > len(devices) or (jax.process_count() > 1 and count < len(devices)):
            hint = "; JAX_NUM_CPU_DEVICES=N splits a CPU" if devices[0].platform == "cpu" else ""
            raise CommandError(f"--mesh {DATA}={data},{VOCAB}={vocab} takes {count} devices, got {len(devices)}{hint}")
        kinds = (AxisType.Auto, AxisType.Auto)
        return cls(jax.make_mesh((data, vocab), (DATA, VOCAB), kinds, devices=devices[:count]))

    @property
    def data(self) -> int:
        return self.mesh.shape[DATA]

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return jax.process_index() == 0

    def check(self, batch_rows: int, vocab_size: int | None) -> None:
        """`vocab_size` is None if it is to be found."""
        for option, size, axis in (("--batch-rows", batch_rows, DATA), ("--vocab-size", vocab_size, VOCAB)):
            shards = self.mesh.shape[axis]
            if size is not None and size % shards:
                raise CommandError(f"{option} {size} is not a multiple of the {shards} shards of {axis!r}")

    def split(self, *axes: str | None) -> Sharding:
        if self.mesh.size == 1:
            # XLA's partitioner, though it has nothing to split, keeps two more copies of a kernel.
            return SingleDeviceSharding(self.mesh.devices.item())
        return NamedSharding(self.mesh, P(*axes))

    def rows(self, x: np.ndarray, axis: int = 0) -> jax.Array:
        """The array with its rows split over `data`."""
        return self._place(x, self.split(*[None] * axis, DATA))

    def shardings(self, tree: Pytree) -> Pytree:
        """How parameters, or an optimiser's state that holds arrays under the same names, are split over `vocab`."""

        def of_leaf(path: tuple[Any, ...], _: Any) -> Sharding:
            split = any(getattr(key, "key", None) in PER_TOKEN for key in path)
            return self.split(VOCAB) if split else self.split()

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def parameters(self, tree: Pytree) -> Pytree:
        return jax.tree.map(self._place, tree, self.shardings(tree))

    def _place(self, x: np.ndarray, sharding: Sharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def fetch(self, tree: Pytree) -> Pytree:
        """The arrays in this process's memory, whole."""
        if not jax.tree.all(jax.tree.map(lambda x: x.is_fully_addressable or x.is_fully_replicated, tree)):
            tree = _replicated(self.split())(tree)
        return jax.tree.map(np.asarray, tree)

    def every(self, number: int) -> list[int]:
        """The number that each process brings."""
        if jax.process_count() == 1:
            return [number]
        return np.asarray(process_allgather(np.asarray(number, np.int32))).tolist()

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns, unless it fails in any process: no process waits for one that has given up."""
        try:
            done = work()
        except CommandError:
            self.every(1)
            raise
        failed = self.every(0)
        if any(failed):
            raise CommandError(f"process {failed.index(1)} has stopped; its own message says why")
        return done


@contextlib.contextmanager
def own_configuration() -> Iterator[None]:
    """JAX as the bits of a run need it, whatever JAX_ENABLE_X64, JAX_DISABLE_JIT or JAX_DEBUG_NANS say."""
    with jax.enable_x64(False), jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        yield


@functools.lru_cache
def _replicated(sharding: Sharding) -> Callable[[Pytree], Pytree]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,vocab=2` as a dictionary; an axis that is left out has length 1."""
    mesh = {DATA: 1, VOCAB: 1}
    given = [part.split("=") for part in text.split(",")]
    names = [part[0] for part in given]
    if not all(len(part) == 2 and part[0] in mesh and part[1].isdecimal() and int(part[1]) for part in given):
        raise ValueError
    if len(set(names)) < len(names):
        raise ValueError
    return mesh | {name: int(size) for name, size in given}
