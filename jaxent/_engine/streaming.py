"""The engine: row losses of `hidden @ kernel + bias`, a chunk of rows at a time, so that the logits are never held.

With `z_i = h_i W + b`, `L = sum_i l(z_i, a_i)` and `dz = dl/dz`, the gradients are `dH = dz W^T`, `dW = H^T dz` and
`db = sum_i dz_i`. The three matrix products are the least that a gradient can cost. They are taken in one loop over
chunks of rows, as soon as a chunk's logits are there, so that nothing is computed twice. Rows that do not count are
left out of the chunks: see `Counted` and `Chunking`.

The rule is a `jax.custom_jvp` on the scalar `L`. The tangent of a scalar is its gradient dotted with the tangent of its
input, so that the rule is plain JAX from end to end, and reverse mode, forward mode, jvp of grad, vmap, third order and
sharding follow from it. `custom_vjp` would give up forward mode.

Outputs for each row cannot be done so: see `row_results`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._engine.chunking import Chunking, merge, partition
from jaxent._engine.products import Operand, dtype_of, gradient_like, operand, product, scaled_operand
from jaxent._engine.row_blocks import by_row_blocks
from jaxent._mesh.apply import shard_map_rows, whole_along_others
from jaxent._mesh.class_axis import VocabAxis, axis_tuple
from jaxent._mesh.types import axis_names, mesh_of, partition_of, pcast_like, sum_to_type

Pytree = Any
SymbolicZero = jax.custom_derivatives.SymbolicZero


class Head(NamedTuple):
    """One linear layer of logits: `hidden (rows, features) @ kernel (features, classes) + bias (classes,)`."""

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None


class Layer(NamedTuple):
    """A head whose kernel is an operand of the products."""

    hidden: jax.Array
    kernel: jax.Array | Operand
    bias: jax.Array | None


class Counted(NamedTuple):
    """Which rows count, `(rows,)` each; None where all do. The values of the others have no influence.

    `weights` multiply the row losses, and are among the row arguments too. A row of weight 0 is left out unless a
    derivative with respect to the weights is asked for, which is its loss.
    """

    kept: jax.Array | None = None
    weights: jax.Array | None = None

    def mask(self, *, by_weight: bool) -> jax.Array | None:
        if self.weights is None or not by_weight:
            return self.kept
        weighted = self.weights != 0
        return weighted if self.kept is None else self.kept & weighted


# `row_fn(logits, row_args, params)`: a tuple with one block of logits for each head, the block's rows of `row_args`,
# and `params`; returns a pytree of arrays with the block's rows first.
Logits = tuple[jax.Array, ...]
RowFunction = Callable[[Logits, Pytree, Pytree], Pytree]


@dataclasses.dataclass(frozen=True)
class MatrixProducts:
    """The three matrix products of a head, each accumulated in at least float32.

    Inside `jax.shard_map`, `vocab_axis` are the mesh axes that split the classes.
    """

    precision: Precision = None
    float32_precision: Precision = None
    """That of float32 operands."""
    dtype: np.dtype | None = None
    """Of the operands; None promotes hidden states and kernel."""
    vocab_axis: VocabAxis = None

    def operand_dtype(self, head: Head) -> np.dtype:
        if self.dtype is not None:
            return self.dtype
        own = head.hidden.dtype, head.kernel.dtype
        return np.dtype(own[0] if own[0] == own[1] else arrays.accumulation_dtype(head.hidden, head.kernel))

    def prepared(self, head: Head) -> Layer:
        """The head with its kernel as an operand, the one cast of a call, and its bias as wide as its cotangents' sum.

        Hidden states are cast a chunk at a time.
        """
        bias = None if head.bias is None else head.bias.astype(arrays.accumulation_dtype(head.bias))
        return Layer(head.hidden, operand(head.kernel, self.operand_dtype(head)), bias)

    def logits(self, layer: Layer) -> jax.Array:
        z = self._product((1, 0), operand(layer.hidden, dtype_of(layer.kernel)), layer.kernel)
        return z if layer.bias is None else z + layer.bias.astype(z.dtype)[None, :]

    def by_logits(self, dz: jax.Array, kernel: jax.Array | Operand) -> jax.Array | Operand:
        """A gradient with respect to the logits as an operand, rounded to bf16 if the kernel is bf16."""
        return scaled_operand(dz, dtype_of(kernel))

    def by_hidden(self, dz: jax.Array | Operand, kernel: jax.Array | Operand) -> jax.Array:
        return self._product((1, 1), dz, kernel)

    def by_kernel(self, hidden: jax.Array, dz: jax.Array | Operand) -> jax.Array:
        return self._product((0, 0), operand(hidden, dtype_of(dz)), dz)

    def _product(self, axes: tuple[int, int], a: jax.Array | Operand, b: jax.Array | Operand) -> jax.Array:
        return product(axes, self.precision_of(dtype_of(a)), a, b)

    def precision_of(self, dtype: np.dtype) -> Precision:
        return self.float32_precision if dtype == np.float32 else self.precision


# ----------------------------------------------------------------------------------------------------------------------
# The sum of row losses: three products


def stream_sum(
    row_loss: RowFunction,
    heads: tuple[Head, ...],
    row_args: Pytree,
    params: Pytree,
    chunking: Chunking,
    products: MatrixProducts,
    counted: Counted,
) -> tuple[jax.Array, Pytree]:
    """`sum_i l_i` and `aux`, for `l, aux = row_loss(logits, row_args, params)` of every chunk.

    `l` is `(chunk_rows,)`, `aux` a pytree of constants with the rows first, and `row_loss` closes over no tracer.
    """
    row_loss, params = with_wide_params(row_loss, params)

    def part(layers: tuple[Layer, ...], rows: Pytree, params: Pytree) -> tuple[jax.Array, Pytree]:
        return _summed(row_loss, chunking, products, layers, rows[0], params, rows[1])

    return on_own_rows(part, tuple(map(products.prepared, heads)), (row_args, counted), params)


@dataclasses.dataclass(frozen=True)
class _OwnDtypes:
    """A row function that gets its parameters, the first leaves of `shared`, in their own dtypes."""

    row_fn: RowFunction
    dtypes: tuple[np.dtype, ...]

    def __call__(self, logits: Logits, rows: Pytree, shared: Pytree) -> Pytree:
        leaves, structure = jax.tree.flatten(shared)
        params = [x.astype(dtype) for x, dtype in zip(leaves, self.dtypes, strict=False)]
        return self.row_fn(logits, rows, jax.tree.unflatten(structure, params + leaves[len(params) :]))


def with_wide_params(row_fn: RowFunction, params: Pytree) -> tuple[RowFunction, Pytree]:
    """The same with floating parameters as wide as the sums of their cotangents.

    A scan adds the chunks' shares of a constant's cotangent in the constant's dtype, and devices theirs: a bf16 sum
    stops growing, as 512 additions of 1/1024 give 0.25.
    """
    leaves = jax.tree.leaves(params)
    dtypes = tuple(x.dtype for x in leaves)
    if not any(map(_is_narrow, leaves)):
        return row_fn, params
    wide = jax.tree.map(lambda x: x.astype(arrays.accumulation_dtype(x)) if _is_narrow(x) else x, params)
    return _OwnDtypes(row_fn, dtypes), wide


def _is_narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != arrays.accumulation_dtype(x)


def on_own_rows(
    f: Callable[..., Pytree], layers: tuple[Any, ...], row_args: Pytree, params: Pytree, sum_specs: Any = None
) -> tuple[Pytree, Pytree]:
    """`f(layers, row_args, params)`, on an explicit mesh for each device's own rows: sums, and results of each row."""
    if mesh_of(*jax.tree.leaves((layers, row_args, params))).empty:
        return f(layers, row_args, params)

    def part(per_row: Pytree, shared: Pytree) -> Pytree:
        hidden, args = per_row
        others, params = shared
        kinds = zip(map(type, layers), hidden, others, strict=True)
        return f(tuple(kind(h, *other) for kind, h, other in kinds), args, params)

    rows = axis_names(partition_of(layers[0].hidden))
    # A split kernel is gathered as an operand: in the narrow dtype, once, before the loop.
    others = [(jax.tree.map(lambda x: whole_along_others(x, 0, rows), layer.kernel), layer.bias) for layer in layers]
    return shard_map_rows(part, ([layer.hidden for layer in layers], row_args), (others, params), sum_specs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _summed(row_loss, chunking, products, layers, row_args, params, counted):
    def step(carry: None, rows: Pytree, valid: jax.Array | None) -> tuple[None, Pytree]:
        hidden, args = rows
        logits = tuple(products.logits(layer._replace(hidden=h)) for layer, h in zip(layers, hidden, strict=True))

        def block(logits: Logits, rows: Pytree) -> tuple[None, None, Pytree]:
            args, valid = rows
            losses, aux = row_loss(logits, args, params)
            return None, None, (_only(valid, losses), aux)

        return None, by_row_blocks(block, logits, (args, valid))[2]

    per_row = ([layer.hidden for layer in layers], row_args)
    _, (losses, aux) = chunking.loop(step, None, per_row, counted.mask(by_weight=True))
    return jnp.sum(losses), aux


def _only(valid: jax.Array | None, losses: jax.Array) -> jax.Array:
    return losses if valid is None else jnp.where(valid, losses, 0)


def _summed_jvp(row_loss, chunking, products, primals, tangents):
    wanted = jax.tree.map(is_differentiated, tangents)
    of_loop = functools.partial(_sum_and_gradients, row_loss, chunking, products, wanted, None)
    of_scan = functools.partial(_sum_and_gradients, row_loss, chunking, products, wanted)
    total, aux, gradients = with_derivative(of_loop, of_scan)(primals)
    steps = [tangent for tangent in jax.tree.leaves(tangents[:3]) if is_differentiated(tangent)]
    terms = [
        sum_to_type(jnp.sum(gradient * step.astype(gradient.dtype)), total).astype(total.dtype)
        for gradient, step in zip(jax.tree.leaves(gradients), steps, strict=True)
    ]
    constant = jax.tree.map(lambda x: jax.custom_derivatives.zero_from_primal(x, symbolic_zeros=True), aux)
    return (total, aux), (sum(terms, jnp.zeros_like(total)), constant)


_summed.defjvp(_summed_jvp, symbolic_zeros=True)


def with_derivative(value: Callable[[Pytree], Pytree], derivative: Callable[[Pytree, Pytree], Pytree]) -> Any:
    """`value(inputs)` with the derivative of `derivative(moving, inputs)`, an equal function.

    `moving` is a pytree like `inputs` that says which leaves a derivative is taken with respect to.

    A loop in a derivative rule is partially evaluated for what does not depend on the loop, and JAX drops the rules of
    the loop's body when it does so: the Hessian of the row loss was then that of its bare formulas, in which a maximum
    is a constant, wrong in the first digit. A function with a rule of its own is left alone.
    """

    @jax.custom_jvp
    def kept(inputs: Pytree) -> Pytree:
        return value(inputs)

    def rule(primals: Pytree, tangents: Pytree) -> Pytree:
        (inputs,), (steps,) = primals, tangents
        moving = jax.tree.map(is_differentiated, steps)
        free, fixed = partition(inputs, moving)
        return jax.jvp(lambda free: derivative(moving, merge(free, fixed)), (free,), (partition(steps, moving)[0],))

    kept.defjvp(rule, symbolic_zeros=True)
    return kept


def is_differentiated(tangent: Any) -> bool:
    """Whether a derivative with respect to this input was asked for: no product is spent on a frozen kernel."""
    return not isinstance(tangent, SymbolicZero)


def _sum_and_gradients(row_loss, chunking, products, wanted, moving, inputs):
    """The sum, what goes with it, and its gradient with respect to every wanted leaf of `inputs`; None at the others.

    `inputs` are `(layers, row_args, params, counted)`. The leaves at `moving` will be differentiated once more; None is
    where nothing will.
    """
    layers, row_args, params, counted = inputs
    want_layers, want_args, want_params, want_counted = wanted
    want_layers = tuple(want._replace(kernel=any(jax.tree.leaves(want.kernel))) for want in want_layers)
    free_params, fixed_params = partition(params, want_params)
    free_params = vary_over_row_axes(free_params, layers, products)
    layers = jax.tree.map(lambda x: pcast_like(x, jax.tree.leaves(layers)), layers)
    free_args, fixed_args = partition(row_args, want_args)

    def step(carry: Pytree, rows: Pytree, valid: jax.Array | None) -> tuple[Pytree, Pytree]:
        hidden, free, fixed = rows
        logits = tuple(products.logits(layer._replace(hidden=h)) for layer, h in zip(layers, hidden, strict=True))

        blocks: Any = functools.partial(by_row_blocks, block, differentiable=moving is not None)
        (d_biases, d_params), d_logits, (losses, aux, d_args) = blocks(logits, (free, fixed, valid))
        d_hidden, d_kernels = [], []
        for layer, h, dz, want in zip(layers, hidden, d_logits, want_layers, strict=True):
            rounded = products.by_logits(dz, layer.kernel)
            d_hidden.append(products.by_hidden(rounded, layer.kernel) if want.hidden else None)
            d_kernels.append(products.by_kernel(h, rounded) if want.kernel else None)
        return jax.tree.map(jnp.add, carry, (d_kernels, d_biases, d_params)), (losses, aux, d_hidden, d_args)

    def block(logits: Logits, rows: Pytree) -> tuple[Pytree, Logits, Pytree]:
        """Of a block of rows: gradients that are sums over them, those with respect to the logits, and the others."""
        free, fixed, valid = rows

        def total(logits: Pytree, free: Pytree, free_params: Pytree) -> tuple[jax.Array, Pytree]:
            losses, aux = row_loss(logits, merge(free, fixed), merge(free_params, fixed_params))
            losses = _only(valid, losses)
            return jnp.sum(losses), (losses, aux)

        block_sum, pull, (losses, aux) = jax.vjp(total, logits, free, free_params, has_aux=True)
        d_logits, d_args, d_params = pull(jnp.ones_like(block_sum))
        d_biases = [
            jnp.sum(dz, axis=0).astype(arrays.accumulation_dtype(layer.bias)) if want.bias else None
            for layer, dz, want in zip(layers, d_logits, want_layers, strict=True)
        ]
        d_params = jax.tree.map(lambda x: x.astype(arrays.accumulation_dtype(x)), d_params)
        return (d_biases, d_params), d_logits, (losses, aux, d_args)

    pairs = list(zip(layers, want_layers, strict=True))
    kernels = [gradient_like(layer.kernel) if want.kernel else None for layer, want in pairs]
    biases = [layer.bias if want.bias else None for layer, want in pairs]
    zeros = jax.tree.map(
        lambda x: pcast_like(jnp.zeros_like(x, dtype=arrays.accumulation_dtype(x)), [x]),
        (kernels, biases, free_params),
    )
    per_row = ([layer.hidden for layer in layers], free_args, fixed_args)
    if moving is None:
        carry, out = chunking.loop(step, zeros, per_row, counted.mask(by_weight=not want_counted.weights))
    else:
        # Not by weight: a later derivative may be with respect to the weights.
        moving_rows = ([layer.hidden for layer in moving[0]], *partition(moving[1], want_args))
        carry, out = chunking.scan(step, zeros, per_row, moving_rows, counted.mask(by_weight=False))
    (d_kernels, d_biases, d_params), (losses, aux, d_hidden, d_args) = carry, out
    # Where XLA splits arrays: cut after the loop, if at all, so that its sum over devices can leave the loop.
    d_kernels = [None if x is None else whole_along_others(x, 0, ()) for x in d_kernels]
    d_layers = list(zip(d_hidden, d_kernels, d_biases, strict=True))
    return jnp.sum(losses), aux, (d_layers, d_args, d_params)


def vary_over_row_axes(params: Pytree, heads: tuple[Head | Layer, ...], products: MatrixProducts) -> Pytree:
    """`params`, typed as differing along the mesh axes that split rows, so that their cotangents are summed over them
    after the scan and not in every step; not along those that split classes, where the losses do not differ.
    """
    rows = [head.hidden for head in heads]
    return jax.tree.map(lambda x: pcast_like(x, rows, except_for=axis_tuple(products.vocab_axis)), params)
