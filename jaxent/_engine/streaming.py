"""The engine: row losses of `hidden @ kernel + bias`, a chunk of rows at a time, so that the logits are never held.

With `z_i = h_i W + b`, `L = sum_i l(z_i, a_i)` and `dz = dl/dz`, the gradients are `dH = dz W^T`, `dW = H^T dz` and
`db = sum_i dz_i`. The three matrix products are the least that a gradient can cost. They are taken in one scan over
chunks of rows, as soon as a chunk's logits are there, so that nothing is computed twice.

The rule is a `jax.custom_jvp` on the scalar `L`. The tangent of a scalar is its gradient dotted with the tangent of its
input, so that the rule is plain JAX from end to end, and reverse mode, forward mode, jvp of grad, vmap, third order and
sharding follow from it. `custom_vjp` would give up forward mode.

Outputs for each row cannot be done so: their cotangent is not known while the logits are there. `stream_rows` computes
a chunk's logits again on the way back, four products in all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._engine.chunking import Chunking
from jaxent._mesh.apply import shard_map_rows
from jaxent._mesh.types import pcast_like, sum_to_type, varying

Pytree = Any
SymbolicZero = jax.custom_derivatives.SymbolicZero


class Head(NamedTuple):
    """One linear layer of logits: `hidden (rows, features) @ kernel (features, classes) + bias (classes,)`."""

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None


# `row_fn(logits, row_args, params)`: a tuple with one block of logits for each head, the block's rows of `row_args`,
# and `params`; returns a pytree of arrays with the block's rows first.
Logits = tuple[jax.Array, ...]
RowFunction = Callable[[Logits, Pytree, Pytree], Pytree]


@dataclasses.dataclass(frozen=True)
class MatrixProducts:
    """The three matrix products of a head, each accumulated in at least float32.

    Operands keep the dtype of the inputs: the gradient by the logits is rounded to bf16 for the backward products of a
    bf16 head.
    """

    precision: Precision = None

    def logits(self, head: Head) -> jax.Array:
        z = self._dot(head.hidden, head.kernel, 1, 0)
        return z if head.bias is None else z + head.bias.astype(z.dtype)[None, :]

    def by_hidden(self, dz: jax.Array, kernel: jax.Array) -> jax.Array:
        return self._dot(dz, kernel, 1, 1)

    def by_kernel(self, hidden: jax.Array, dz: jax.Array) -> jax.Array:
        return self._dot(hidden, dz, 0, 0)

    def _dot(self, a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
        return lax.dot_general(
            a,
            b,
            (((axis_a,), (axis_b,)), ((), ())),
            precision=self.precision,
            preferred_element_type=arrays.accumulation_dtype(a, b),
        )


# ----------------------------------------------------------------------------------------------------------------------
# The sum of row losses: three products


def stream_sum(
    row_loss: RowFunction,
    heads: tuple[Head, ...],
    row_args: Pytree,
    params: Pytree,
    chunking: Chunking,
    products: MatrixProducts,
) -> jax.Array:
    """`sum_i row_loss(logits_i, row_args_i, params)`; `row_loss` returns `(chunk_rows,)` and closes over no tracer."""

    def part(heads: tuple[Head, ...], row_args: Pytree, params: Pytree) -> jax.Array:
        return _summed(row_loss, chunking, products, heads, row_args, params)

    return _shard_map_rows(part, heads, row_args, params, summed=True)


def _shard_map_rows(
    f: Callable[..., Pytree], heads: tuple[Head, ...], row_args: Pytree, params: Pytree, *, summed: bool
) -> Pytree:
    """`f(heads, row_args, params)`, on an explicit mesh for each device's own rows."""

    def part(per_row: Pytree, shared: Pytree) -> Pytree:
        hidden, args = per_row
        layers, params = shared
        return f(tuple(Head(h, *layer) for h, layer in zip(hidden, layers, strict=True)), args, params)

    layers = [(head.kernel, head.bias) for head in heads]
    return shard_map_rows(part, ([head.hidden for head in heads], row_args), (layers, params), summed=summed)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _summed(row_loss, chunking, products, heads, row_args, params):
    per_row = ([head.hidden for head in heads], row_args)

    def step(carry: None, chunk: jax.Array, rows: Pytree) -> tuple[None, jax.Array]:
        hidden, args = rows
        logits = tuple(products.logits(head._replace(hidden=h)) for head, h in zip(heads, hidden, strict=True))
        return None, _block_sum(row_loss, chunking, chunk, logits, args, params)

    _, sums = chunking.scan(step, None, per_row)
    return jnp.sum(sums)


def _block_sum(row_loss, chunking, chunk, logits, row_args, params) -> jax.Array:
    losses = row_loss(logits, row_args, params)
    counted = chunking.valid_rows(chunk)
    return jnp.sum(losses if counted is None else jnp.where(counted, losses, 0))


def _summed_jvp(row_loss, chunking, products, primals, tangents):
    wanted = jax.tree.map(is_differentiated, tangents)
    total, gradients = preserve_custom_rules(_sum_and_gradients, row_loss, chunking, products, wanted)(primals)
    steps = [tangent for tangent in jax.tree.leaves(tangents) if is_differentiated(tangent)]
    terms = [
        sum_to_type(jnp.sum(gradient * step.astype(gradient.dtype)), total).astype(total.dtype)
        for gradient, step in zip(jax.tree.leaves(gradients), steps, strict=True)
    ]
    return total, sum(terms, jnp.zeros_like(total))


_summed.defjvp(_summed_jvp, symbolic_zeros=True)


def preserve_custom_rules(f: Callable[..., Pytree], *static: Any) -> Callable[[Pytree], Pytree]:
    """`f(*static, inputs)`, whose scan keeps the derivative rules inside it however often it is differentiated.

    A scan in a derivative rule is partially evaluated for what does not depend on the loop, and JAX drops the rules of
    the loop's body when it does so: the Hessian of the row loss was then that of its bare formulas, in which a maximum
    is a constant, wrong in the first digit. A function with a rule of its own is left alone.
    """

    @jax.custom_jvp
    def kept(inputs: Pytree) -> Pytree:
        return f(*static, inputs)

    def rule(primals: Pytree, tangents: Pytree) -> Pytree:
        moving, fixed = _partition(primals, jax.tree.map(is_differentiated, tangents))
        steps, _ = _partition(tangents, jax.tree.map(is_differentiated, tangents))
        return jax.jvp(lambda moving: f(*static, *_merge(moving, fixed)), (moving,), (steps,))

    kept.defjvp(rule, symbolic_zeros=True)
    return kept


def is_differentiated(tangent: Any) -> bool:
    """Whether a derivative by this input was asked for: no product is spent on a frozen kernel."""
    return not isinstance(tangent, SymbolicZero)


def _sum_and_gradients(row_loss, chunking, products, wanted, inputs):
    """The sum and its gradient by every wanted leaf of `inputs = (heads, row_args, params)`; None at the others."""
    heads, row_args, params = inputs
    free_params, fixed_params = _partition(params, wanted[2])
    free_params = vary_over_row_axes(free_params, heads)
    heads = jax.tree.map(lambda x: pcast_like(x, jax.tree.leaves(heads)), heads)
    want_heads, want_args, _ = wanted
    needs_logits = [any(jax.tree.leaves(want)) for want in want_heads]
    free_args, fixed_args = _partition(row_args, want_args)

    def step(carry: Pytree, chunk: jax.Array, rows: Pytree) -> tuple[Pytree, Pytree]:
        hidden, free, fixed = rows
        logits = tuple(products.logits(head._replace(hidden=h)) for head, h in zip(heads, hidden, strict=True))

        def block(logits: Pytree, free: Pytree, free_params: Pytree) -> jax.Array:
            args, shared = _merge(free, fixed), _merge(free_params, fixed_params)
            return _block_sum(row_loss, chunking, chunk, logits, args, shared)

        block_sum, pull = jax.vjp(block, logits, free, free_params)
        d_logits, d_args, d_params = pull(jnp.ones_like(block_sum))
        d_hidden, d_kernels, d_biases = [], [], []
        for head, h, dz, want, needed in zip(heads, hidden, d_logits, want_heads, needs_logits, strict=True):
            operand = dz.astype(head.kernel.dtype) if needed else dz
            d_hidden.append(products.by_hidden(operand, head.kernel) if want.hidden else None)
            d_kernels.append(products.by_kernel(h, operand) if want.kernel else None)
            d_biases.append(jnp.sum(dz, axis=0).astype(arrays.accumulation_dtype(head.bias)) if want.bias else None)
        shared = (d_kernels, d_biases, jax.tree.map(lambda x: x.astype(arrays.accumulation_dtype(x)), d_params))
        return jax.tree.map(jnp.add, carry, shared), (block_sum, d_hidden, d_args)

    kernels = [head.kernel if want.kernel else None for head, want in zip(heads, want_heads, strict=True)]
    biases = [head.bias if want.bias else None for head, want in zip(heads, want_heads, strict=True)]
    zeros = jax.tree.map(
        lambda x: pcast_like(jnp.zeros_like(x, dtype=arrays.accumulation_dtype(x)), [x]),
        (kernels, biases, free_params),
    )
    per_row = ([head.hidden for head in heads], free_args, fixed_args)
    (d_kernels, d_biases, d_params), (sums, d_hidden, d_args) = chunking.scan(step, zeros, per_row)
    d_hidden, d_args = jax.tree.map(chunking.join, (d_hidden, d_args))
    d_heads = tuple(Head(*parts) for parts in zip(d_hidden, d_kernels, d_biases, strict=True))
    return jnp.sum(sums), (d_heads, d_args, d_params)


def vary_over_row_axes(params: Pytree, heads: tuple[Head, ...]) -> Pytree:
    """`params`, typed as differing along the mesh axes that split rows, so that their cotangents are summed over them
    after the scan and not in every step; not along those that split classes, where the losses do not differ.
    """
    rows = [head.hidden for head in heads]
    split = frozenset[str]().union(*(varying(head.kernel) for head in heads))
    return jax.tree.map(lambda x: pcast_like(x, rows, except_for=split), params)


def _partition(tree: Pytree, mask: Pytree) -> tuple[Pytree, Pytree]:
    """The leaves where the mask holds, and the others, each with None in the other's places."""
    chosen = jax.tree.map(lambda x, keep: x if keep else None, tree, mask)
    return chosen, jax.tree.map(lambda x, keep: None if keep else x, tree, mask)


def _merge(a: Pytree, b: Pytree) -> Pytree:
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


# ----------------------------------------------------------------------------------------------------------------------
# Outputs for each row: four products


def stream_rows(
    row_fn: RowFunction,
    heads: tuple[Head, ...],
    row_args: Pytree,
    params: Pytree,
    chunking: Chunking,
    products: MatrixProducts,
) -> Pytree:
    """`row_fn(logits, row_args, params)` of all rows; `row_fn` returns a pytree of `(chunk_rows, ...)` arrays.

    What all chunks share enters the scan in the accumulation dtype, in which the scan then adds its cotangents: see
    `_logits` for the kernel. `params` are floating.
    """

    def part(heads: tuple[Head, ...], row_args: Pytree, params: Pytree) -> Pytree:
        return _each_row(row_fn, chunking, products, heads, row_args, params)

    return _shard_map_rows(part, heads, row_args, params, summed=False)


def _each_row(row_fn, chunking, products, heads, row_args, params) -> Pytree:
    params = vary_over_row_axes(params, heads)
    heads = jax.tree.map(lambda x: pcast_like(x, jax.tree.leaves(heads)), heads)
    biases, params, wide = jax.tree.map(
        lambda x: x.astype(arrays.accumulation_dtype(x)),
        ([head.bias for head in heads], params, [head.kernel for head in heads]),
    )
    heads = tuple(head._replace(bias=bias) for head, bias in zip(heads, biases, strict=True))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: None, chunk: jax.Array, rows: Pytree) -> tuple[None, Pytree]:
        hidden, args = rows
        logits = tuple(
            _logits(products, head._replace(hidden=h), w) for head, h, w in zip(heads, hidden, wide, strict=True)
        )
        return None, row_fn(logits, args, params)

    _, out = chunking.scan(step, None, ([head.hidden for head in heads], row_args))
    return jax.tree.map(chunking.join, out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _logits(products: MatrixProducts, head: Head, wide: jax.Array) -> jax.Array:
    """A head's logits; `wide` is its kernel in the accumulation dtype, of which only the tangent is used.

    The scan adds the chunks' shares of a constant's cotangent in the constant's dtype, and a bf16 sum stops growing:
    512 additions of 1/1024 give 0.25. The cotangent of `wide` is that of the kernel, added in float32.
    """
    del wide
    return products.logits(head)


@_logits.defjvp
def _logits_jvp(products, primals, tangents):
    (head, wide), (step, d_wide) = primals, tangents
    # Each product is rounded to the operands' dtype, so that its transpose multiplies operands of that dtype.
    dtype = head.kernel.dtype
    by_hidden = lax.dot(step.hidden, head.kernel, precision=products.precision, preferred_element_type=dtype)
    by_kernel = lax.dot(head.hidden, d_wide.astype(dtype), precision=products.precision, preferred_element_type=dtype)
    z = _logits(products, head, wide)
    dz = by_hidden.astype(z.dtype) + by_kernel.astype(z.dtype)
    return z, dz if step.bias is None else dz + step.bias.astype(z.dtype)[None, :]
