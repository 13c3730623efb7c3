"""The arguments of one call as rows for the rules, with NumPy on the host or `jax.numpy` in a program."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._arguments import arrays
from jaxent._arguments.class_axes import flatten_softmax_arguments
from jaxent._arguments.targets import (
    SoftmaxArguments,
    check_classes,
    check_ignore_index,
    check_softmax_arguments,
    rows_shape,
)
from jaxent._check.binary_rules import BinaryRows, binary_rule_matches
from jaxent._check.input_rules import Rows, rule_matches
from jaxent._check.loss_calls import LossSignature
from jaxent._check.measure_rules import (
    Distribution,
    infinite_rule_match,
    logit_rule_matches,
    probability_rule_matches,
)
from jaxent._check.rule_match import RuleMatch

# The shape of the batch, and the rules' matches in its rows.
Matches = tuple[tuple[int, ...], Iterator[RuleMatch]]
# The last axes are the classes of a table.
TABLES = {"pxy": 2, "pxyz": 3}


def read_inputs(xp: Any, signature: LossSignature, arguments: dict[str, Any]) -> Iterator[Matches]:
    """`xp` is `numpy` or `jax.numpy`."""
    data = signature.data(arguments)
    if signature.kind == "measure":
        yield from _measure(xp, signature, data, arguments)
    elif list(data.values())[-1] is None and signature.name.endswith("token_statistics"):
        if signature.kind == "logits":
            yield from _measure(xp, signature, data, arguments)
    elif signature.kind == "kl_div":
        yield from _divergence_terms(xp, data, arguments)
    elif signature.kind in ("binary", "binary_probabilities"):
        yield _binary(xp, signature, data, arguments)
    else:
        yield _classes(xp, signature, data, arguments)


def _classes(xp: Any, signature: LossSignature, data: dict[str, Any], arguments: dict[str, Any]) -> Matches:
    names, values = list(data), list(data.values())
    linear = signature.kind == "hidden"
    convert = _operand if signature.kind == "score" else arrays.floating
    inputs = lax.stop_gradient(convert(names[0], values[0]))
    targets = values[2 if linear else 1]
    if inputs.ndim == 0:
        raise arrays.shape_error(names[0], "have a class axis", inputs)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        [forecasts] = _distributions(xp, signature, {names[0]: inputs}, arguments, None)
        return forecasts.batch, probability_rule_matches(forecasts, normalized=True)
    options = (arguments.get(name) for name in ("where", "weights", "class_weights"))
    numbers = (arguments.get(name, 0.0) for name in ("label_smoothing", "z_loss"))
    given = SoftmaxArguments(targets, *options, *numbers)
    if not linear and isinstance(arguments.get("axis"), tuple):
        several = arguments["axis"]
        inputs, given, _ = flatten_softmax_arguments(inputs, given, several, arguments.get("vocab_axis"))
        arguments = arguments | {"axis": -1}
    if not linear:
        axis = signature.class_axis(arguments, inputs.ndim)
        check_classes(names[0], inputs.shape, axis)
        shape = inputs.shape
    elif signature.pytorch:
        # (C, d_1, ..., d_K, D): a linear layer for each place.
        weight = values[1]
        shape, axis = (*inputs.shape[:-1], *weight.shape[:-1]), 1 - weight.ndim
        places = (1,) * (weight.ndim - 2)
        inputs = inputs.reshape(*inputs.shape[:-1], *places, inputs.shape[-1])
        inputs = jnp.broadcast_to(inputs, (*inputs.shape[: inputs.ndim - 1 - len(places)], *weight.shape[1:]))
    else:
        shape, axis = (*inputs.shape[:-1], values[1].shape[1]), -1
    given = check_softmax_arguments(given, shape, axis)
    given = jax.tree.map(lax.stop_gradient, given)
    ignore_index = check_ignore_index(arguments.get("ignore_index", -100))
    if signature.pytorch and linear and ignore_index is None:
        ignore_index = -100
    rows = Rows(xp, inputs, -1 if linear else axis, shape[axis], given, ignore_index)
    matches = rule_matches(rows, signature.kind)
    if signature.kind == "score":
        forecasts = Distribution(xp, names[0], inputs, (axis,), None)
        forecasts.counted = rows.counted
        matches = itertools.chain(probability_rule_matches(forecasts, normalized=True), matches)
    return rows_shape(shape, axis), matches


def _binary(xp: Any, signature: LossSignature, data: dict[str, Any], arguments: dict[str, Any]) -> Matches:
    (name, inputs), (target_name, targets) = list(data.items())[:2]
    inputs = lax.stop_gradient(arrays.floating(name, inputs))
    targets = lax.stop_gradient(arrays.real(target_name, targets))
    arrays.check_shape(target_name, targets, inputs.shape, f"that of `{name}`")
    where, weights = arguments.get("where"), arguments.get("weights")
    if where is not None:
        where = arrays.boolean("where", where)
        arrays.check_broadcast("where", where, inputs.shape, f"`{name}`")
    if weights is not None:
        weights = lax.stop_gradient(arrays.real("weights", weights))
        arrays.check_broadcast("weights", weights, inputs.shape, f"`{name}`")
    rows = BinaryRows(xp, inputs, targets, where, weights)
    return inputs.shape, binary_rule_matches(rows, signature.kind == "binary_probabilities")


def _divergence_terms(xp: Any, data: dict[str, Any], arguments: dict[str, Any]) -> Iterator[Matches]:
    """PyTorch's `kl_div`, which knows no class axis: each entry is looked at alone."""
    (name, log_q), (target_name, p) = list(data.items())[:2]
    log_q = lax.stop_gradient(arrays.floating(name, log_q))
    p = lax.stop_gradient(arrays.floating(target_name, p))
    if arguments.get("log_target"):
        p = jnp.exp(p)
    for argument, x in ((name, jnp.exp(log_q)), (target_name, p)):
        yield x.shape, probability_rule_matches(Distribution(xp, argument, x, (), None), normalized=False)


def _measure(xp: Any, signature: LossSignature, data: dict[str, Any], arguments: dict[str, Any]) -> Iterator[Matches]:
    names = [name for name in data if name in (*TABLES, "p", "q", "distributions", "probabilities")]
    of_logits = [name for name in data if name in ("logits", "p_logits", "q_logits")]
    values = {name: lax.stop_gradient(_operand(name, data[name])) for name in names or of_logits}
    if all(jnp.issubdtype(x.dtype, jnp.floating) for x in values.values()):
        values = dict(zip(values, _broadcast(values), strict=True))
    operands = _distributions(xp, signature, values, arguments, arguments.get("where"))
    for operand in operands:
        matches = logit_rule_matches(operand) if of_logits else probability_rule_matches(operand, bool(operand.axes))
        yield operand.batch, matches
    infinite = signature.name in ("cross_entropy", "kl_divergence")
    if infinite or (signature.name == "renyi_divergence" and arguments["order"] >= 1):
        p, q = operands
        if p.values.shape == q.values.shape:
            yield p.batch, iter([infinite_rule_match(p, q)])


def _broadcast(values: dict[str, jax.Array]) -> list[jax.Array]:
    first, *others = values
    for name in others:
        try:
            jnp.broadcast_shapes(values[first].shape, values[name].shape)
        except ValueError as error:
            expected = f"broadcast against `{first}`, {arrays.describe(values[first])}"
            raise arrays.shape_error(name, expected, values[name]) from error
    return jnp.broadcast_arrays(*values.values())


def _distributions(
    xp: Any, signature: LossSignature, values: dict[str, jax.Array], arguments: dict[str, Any], where: Any
) -> list[Distribution]:
    operands = []
    for name, x in values.items():
        if name in TABLES:
            axes = tuple(range(-TABLES[name], 0))
        elif "axis" not in signature.signature.parameters:
            axes = ()  # of single events
        else:
            axes = arrays.canonical_axes(arguments["axis"], x.ndim)
        if where is not None:
            where = arrays.boolean("where", where)
            arrays.check_broadcast("where", where, x.shape, f"`{name}`")
        operands.append(Distribution(xp, name, x, axes, where))
    return operands


def _operand(name: str, value: Any) -> jax.Array:
    """Integers are wrong, and there is a rule that says so."""
    try:
        return arrays.floating(name, value)
    except TypeError as error:
        try:
            return arrays.integer(name, value)
        except TypeError:
            raise error from None
