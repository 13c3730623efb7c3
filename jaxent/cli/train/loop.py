"""The training loop: a few optimiser steps at a time, nothing lost between them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxent.cli.errors import Stopped
from jaxent.cli.train import model
from jaxent.cli.train.mesh import DeviceMesh
from jaxent.cli.train.model import Batch, Params
from jaxent.cli.train.ngrams import Rows
from jaxent.cli.train.signals import deferred_signals

MAX_BLOCK = 5  # optimiser steps in one call; heuristic: about two seconds, the longest wait after Ctrl-C
SAMPLES = 12

OptimizerState = Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the optimiser does, and on which rows."""

    steps: int
    batch_rows: int
    learning_rate: float
    seed: int

    @property
    def block(self) -> int:
        """Steps in one call: a divisor of `steps`, so that one compiled program serves them all."""
        return max(n for n in range(1, MAX_BLOCK + 1) if self.steps % n == 0)

    @property
    def sample_every(self) -> int:
        """Steps between two looks at the held-out sample: whole blocks, about `SAMPLES` in all.

        It does not depend on when checkpoints are written, nor on where a run was ended.
        """
        return max(1, self.steps // (SAMPLES * self.block)) * self.block

    def optimizer(self) -> optax.GradientTransformation:
        warm = max(1, self.steps // 10)
        rate = optax.schedules.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm, max(warm + 1, self.steps), 0.03 * self.learning_rate
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))

    def rows_of(self, step: int, count: int) -> np.ndarray:
        """The rows of a step: every row once, in random order, then all of them again in another."""
        position, end, index = step * self.batch_rows, (step + 1) * self.batch_rows, []
        while position < end:
            round_, first = divmod(position, count)
            index.append(_shuffled(self.seed, round_, count)[first : first + end - position])
            position += len(index[-1])
        return np.concatenate(index)


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, round_: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, round_]).permutation(count)


@dataclasses.dataclass
class State:
    """Where a run is; `history` holds lists of what was measured on the way, in bits."""

    step: int
    params: Params
    optimizer: OptimizerState
    history: dict[str, list[float]]


@functools.partial(jax.jit, static_argnames=("schedule", "devices"), donate_argnames=("params", "optimizer"))
def _train_block(
    params: Params, optimizer: OptimizerState, batches: Batch, schedule: Schedule, devices: DeviceMesh
) -> tuple[Params, OptimizerState, jax.Array]:
    transformation = schedule.optimizer()

    def step(carry: tuple[Params, OptimizerState], batch: Batch) -> tuple[tuple[Params, OptimizerState], jax.Array]:
        params, optimizer = carry
        value, gradient = jax.value_and_grad(model.loss)(params, batch, devices.data)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, optimizer = transformation.update(gradient, optimizer, params)
        carry = jax.tree.map(jnp.add, params, updates), optimizer
        return jax.lax.with_sharding_constraint(carry, devices.shardings(carry)), value

    (params, optimizer), losses = jax.lax.scan(step, (params, optimizer), batches)
    return params, optimizer, losses


class NotFinite(Exception):
    """After this step the run has no numbers to go on with."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def train(
    state: State,
    schedule: Schedule,
    rows: Rows,
    lengths: np.ndarray,
    devices: DeviceMesh,
    *,
    every: int,
    at_interval: Callable[[State], None],
    at_sample: Callable[[State], None],
    show: Callable[[int, float, float], None],
) -> None:
    """Trains `state` to the end of the schedule, in place; `NotFinite` if its loss or its parameters no longer are.

    `at_interval` is called with the state at least every `every` steps, at the end, and before a signal stops the run;
    `at_sample` every `schedule.sample_every` steps; `show` after every block, with its tokens, bits
    per token and bits per byte.
    """
    saved = state.step
    with deferred_signals() as received:
        while state.step < schedule.steps:
            index = np.stack([schedule.rows_of(state.step + i, len(rows)) for i in range(schedule.block)])
            batches = Batch.of(rows.take(index), lambda x: devices.rows(x, axis=1))
            state.params, state.optimizer, losses = _train_block(
                state.params, state.optimizer, batches, schedule, devices
            )
            bits = float(np.mean(devices.fetch(losses), dtype=np.float64) / np.log(2))
            tokens_per_byte = index.size / int(np.sum(lengths[rows.targets[index]], dtype=np.int64))
            state.step += schedule.block
            for name, value in (("step", state.step), ("token", bits), ("byte", bits * tokens_per_byte)):
                state.history.setdefault(name, []).append(value)
            if not (np.isfinite(bits) and devices.fetch(_all_finite((state.params, state.optimizer)))):
                raise NotFinite(state.step)
            show(index.size, bits, bits * tokens_per_byte)
            if state.step % schedule.sample_every == 0 or state.step == schedule.steps:
                at_sample(state)
            signum = max(devices.every(received.signum))
            if signum or state.step - saved >= every or state.step == schedule.steps:
                at_interval(state)
                saved = state.step
            if signum:
                raise Stopped(signum, f"stopped at step {state.step} of {schedule.steps}")
