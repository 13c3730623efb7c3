"""Quadratic forms of rows of logits: half of `u^T A u`, whose derivative w.r.t. `u` is the curvature product `A u`.

For logits that depend linearly on a step `v`, `u = J v`, the derivative of the summed forms w.r.t. `v` is `J^T A J v`.
The engine streams such a sum of row losses, and any `logits_fn` can be differentiated through it: both take the
matrix from here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxent._math import softmax
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, softmax_loss_gradient, target_mass
from jaxent._mesh.class_axis import ClassAxis


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """`A` is the Hessian of the loss w.r.t. the logits: `w (S + 2 zeta lse) (diag p - p p^T) + 2 w zeta p p^T`."""

    classes: ClassAxis

    def __call__(self, z: jax.Array, step: jax.Array, rows: RowTargets, options: LossOptions) -> jax.Array:
        rows = ignore_zero_weight_rows(rows, self.classes, z)
        z, step = jnp.where(rows.ignored, 0, z), jnp.where(rows.ignored, 0, step)
        slope = target_mass(z, rows, options, self.classes)
        if options.z_loss is None:
            return _weighted(rows, slope * softmax.half_variance(z, step, self.classes))
        row = softmax.normalizer(z, self.classes)
        slope += 2 * options.z_loss * (row.shift + row.log_total)
        mean = self.classes.sum(softmax.probabilities(z, row, self.classes) * step)
        form = slope * softmax.half_variance(z, step, self.classes) + options.z_loss * jnp.square(mean)
        return _weighted(rows, form)


@dataclasses.dataclass(frozen=True)
class Fisher:
    """`A` is `w d d^T`, where `d` is the derivative w.r.t. the logits of the row's loss without its weight."""

    classes: ClassAxis

    def __call__(self, z: jax.Array, step: jax.Array, rows: RowTargets, options: LossOptions) -> jax.Array:
        rows = ignore_zero_weight_rows(rows, self.classes, z)
        gradient = softmax_loss_gradient(z, rows._replace(weights=None), options, self.classes)
        slope = self.classes.sum(gradient * jnp.where(rows.ignored, 0, step))
        return _weighted(rows, jnp.square(slope) / 2)


QuadraticForm = GaussNewton | Fisher


def _weighted(rows: RowTargets, forms: jax.Array) -> jax.Array:
    forms = jnp.where(rows.ignored, 0, forms)
    return forms if rows.weights is None else jnp.where(rows.ignored, 0, rows.weights) * forms
