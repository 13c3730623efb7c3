"""Checks that check: `check_gradient`, `checked` and `diagnose` on inputs where they were silent or wrong."""

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import covering, marked
from jax.experimental import checkify

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
check_gradient = jaxent.check_gradient
Call = Callable[..., Any]
NAN = float("nan")


def with_gradient(loss: Call, gradient: Call, rule: str = "custom_jvp") -> Call:
    """The loss of one array with another derivative."""
    if rule == "custom_jvp":
        wrong = jax.custom_jvp(loss)
        wrong.defjvp(lambda primals, tangents: (loss(*primals), jnp.sum(gradient(*primals) * tangents[0])))
        return wrong
    wrong = jax.custom_vjp(loss)
    wrong.defvjp(lambda x: (loss(x), x), lambda x, g: (g * gradient(x),))
    return wrong


# ----------------------------------------------------------------------------------------------------------------------
# check_gradient at the edges of a domain

ONEHOT, Q = jnp.array([0.0, 0.0, 1.0]), jnp.array([0.3, 0.3, 0.4])
AT_THE_EDGE: dict[str, tuple[Call, tuple[Any, ...]]] = {
    "cross_entropy": (jaxent.cross_entropy, (ONEHOT, Q)),
    "kl_divergence": (jaxent.kl_divergence, (ONEHOT, Q)),
    "jensen_shannon_divergence": (jaxent.jensen_shannon_divergence, (ONEHOT, Q)),
    "sigmoid targets": (jaxent.sigmoid_cross_entropy, (Q, ONEHOT)),
    "a removed class": (jaxent.softmax_cross_entropy, (jnp.array([1.0, -jnp.inf, 2.0]), jnp.array(0))),
}


@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_what_can_be_compared_at_an_edge_is(name: str) -> None:
    f, args = AT_THE_EDGE[name]
    report = check_gradient(f, *args)
    assert report.ok, str(report)
    assert any(c.way == "central differences" for c in report.comparisons), str(report)
    assert any(c.way == "jax.grad" for c in report.comparisons), str(report)


def test_the_inner_argument_beside_one_at_the_edge() -> None:
    report = check_gradient(jaxent.cross_entropy, ONEHOT, Q)
    compared = {(c.way, c.argument) for c in report.comparisons}
    assert {("jax.grad", "args[1]"), ("jax.jvp", "args[1]"), ("central differences", "args[1]")} <= compared


@pytest.mark.parametrize(
    ("x", "rule"), covering([[0.0, 1.0, 2.0], [1.0, 2.0, 0.0], [0.5, 0.0, 0.0, 0.0]], ["custom_jvp", "custom_vjp"])
)
def test_a_wrong_rule_beside_an_entry_at_the_edge(x: list[float], rule: str) -> None:
    loss = lambda x: jnp.sum(x * jnp.sqrt(x))  # noqa: E731
    # At 0 the usual rule is 0 * inf; the right one is written out.
    right = with_gradient(loss, lambda x: 1.5 * jnp.sqrt(x), rule)
    wrong = with_gradient(loss, lambda x: 1.6 * jnp.sqrt(x), rule)
    assert check_gradient(right, jnp.array(x)).ok
    report = check_gradient(wrong, jnp.array(x))
    assert not report.ok, str(report)
    assert x[report.worst.index[0]] > 0


def test_a_wrong_rule_of_two_arguments_at_the_edge() -> None:
    @jax.custom_jvp
    def wrong(p: jax.Array, q: jax.Array) -> jax.Array:
        return jaxent.cross_entropy(p, q)

    @wrong.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (p, q), (dp, dq) = primals, tangents
        return wrong(p, q), jnp.sum(-jnp.log(q) * dp) + jnp.sum(-2 * p / q * dq)

    report = check_gradient(wrong, ONEHOT, Q)
    assert not report.ok, str(report)
    assert report.worst.argument == "args[1]"


@pytest.mark.parametrize(
    ("x", "gradient"),
    covering(
        [[NAN, 1.0, 2.0], [NAN, NAN], [1.0, NAN, 0.5]], [lambda x: 2.5 * x**2, lambda x: 0 * x, lambda x: -3 * x**2]
    ),
)
def test_a_wrong_rule_beside_nan_is_not_ok(x: list[float], gradient: Call) -> None:
    report = check_gradient(with_gradient(lambda x: jnp.sum(x**3), gradient), jnp.array(x))
    assert not report.ok, str(report)


@pytest.mark.parametrize("f", [lambda x: jnp.sum(x) * jnp.nan, lambda x: jnp.sum(jnp.log(-jnp.abs(x) - 1))])
def test_nothing_compared_is_not_ok_and_says_so(f: Call) -> None:
    report = check_gradient(f, jnp.array([1.0, 2.0]))
    assert not report.ok
    assert "in bounds" not in str(report).splitlines()[-1]
    assert re.search(r"(?i)nothing|no comparison|not compared", str(report)), str(report)


def test_no_entries_at_all() -> None:
    try:
        report = check_gradient(lambda x: jnp.sum(x), jnp.zeros(0))
    except ValueError as error:
        assert "jaxent.check_gradient" in str(error)  # noqa: PT017
    else:
        assert not report.ok
        assert str(report)
        assert report.max_ulp == 0


# ----------------------------------------------------------------------------------------------------------------------
# check_gradient concludes in words


@pytest.mark.parametrize(
    ("gradient", "rule"),
    covering([lambda x: 2.9 * x**2, lambda x: -3 * x**2, lambda x: 0 * x], ["custom_vjp", "custom_jvp"]),
)
def test_a_wrong_derivative_rule_is_reported(rule: str, gradient: Call) -> None:
    report = check_gradient(with_gradient(lambda x: jnp.sum(x**3), gradient, rule), jnp.array([0.5, 1.0, -2.0]))
    assert not report.ok
    assert re.search(r"(?i)derivative rule", str(report)), str(report)


def test_a_right_rule_is_not_called_wrong() -> None:
    for rule in ("custom_vjp", "custom_jvp"):
        report = check_gradient(with_gradient(lambda x: jnp.sum(x**3), lambda x: 3 * x**2, rule), jnp.array([0.5, 2.0]))
        assert report.ok
        assert "rule is wrong" not in str(report)


@pytest.mark.parametrize("draw", marked(["bernoulli", "uniform", "normal", "randint"], ["bernoulli", "normal"]))
def test_random_bits_of_the_default_dtype_get_a_hint(draw: str) -> None:
    key = jax.random.key(0)

    def dropout(x: jax.Array) -> jax.Array:
        if draw == "bernoulli":
            noise = jax.random.bernoulli(key, 0.5, x.shape)
        elif draw == "randint":
            noise = jax.random.randint(key, x.shape, 0, 100) > 50
        else:
            noise = getattr(jax.random, draw)(key, x.shape) > 0.3
        return jnp.sum(jnp.where(noise, x, 0) ** 2)

    report = check_gradient(dropout, jnp.linspace(0.5, 1.5, 16))
    if not report.ok:
        assert re.search(r"(?i)random|default dtype", str(report)), str(report)
        assert not re.search(r"(?i)derivative rule is wrong", str(report))


def test_noise_of_the_arguments_dtype_is_ok() -> None:
    def dropout(x: jax.Array) -> jax.Array:
        keep = jax.random.bits(jax.random.key(0), x.shape, jnp.uint32) % 2 == 0
        return jnp.sum(jnp.where(keep, x, 0) ** 2)

    assert check_gradient(dropout, jnp.linspace(0.5, 1.5, 16)).ok


# ----------------------------------------------------------------------------------------------------------------------
# checked

Z3 = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)  # (N, C, d)
PADDED = np.array([3, 7, 7, 0], np.int32)


@functools.cache
def runner(loss: Call) -> Call:
    return checkify.checkify(jax.jit(jaxent.checked(loss)))


def error(loss: Call, *args: Any) -> str | None:
    """What `checked` says of a call."""
    return runner(loss)(*args)[0].get()


IGNORING: dict[str, Call] = {
    "module": nn.CrossEntropyLoss(ignore_index=7),
    "module with weight": nn.CrossEntropyLoss(np.ones(7, np.float32), ignore_index=7),
    "nll module": nn.NLLLoss(ignore_index=7),
    "partial": functools.partial(jaxent.softmax_cross_entropy, ignore_index=7),
    "partial of the twin": functools.partial(nn.cross_entropy, ignore_index=7),
}


@pytest.mark.parametrize("name", marked(IGNORING, ["module with weight", "nll module", "partial"]))
def test_checked_reads_the_ignore_index_of_a_loss(name: str) -> None:
    z = jax.nn.log_softmax(Z3)
    assert error(IGNORING[name], z, PADDED) is None
    assert "label 11" in str(error(IGNORING[name], z, np.where(PADDED == 3, 11, PADDED)))


def test_checked_without_ignore_index_names_the_label() -> None:
    for loss in (nn.NLLLoss(), jaxent.softmax_cross_entropy):
        assert "label 7" in str(error(loss, jax.nn.log_softmax(Z3), PADDED))


def test_checked_twins_have_classes_on_axis_1() -> None:
    labels = np.array([[4, 0, 1], [3, 2, 4]], np.int32)
    loss = nn.CrossEntropyLoss()
    assert error(loss, IMAGES, labels) is None
    assert "label 5 of classes 0 to 4" in str(error(loss, IMAGES, labels + 1))
    assert error(loss, IMAGES[0, :, 0], np.int32(4)) is None
    assert "nan" in str(error(loss, IMAGES * np.float32(NAN), labels))
    log_p = jax.nn.log_softmax(IMAGES, axis=1)
    assert error(nn.nll_loss, log_p, labels) is None
    assert "label 5 of classes 0 to 4" in str(error(nn.nll_loss, log_p, labels + 1))


def test_checked_twin_with_positional_options() -> None:
    weight = np.array([1, 1, 1, 0, 1, 1, 1], np.float32)
    for c, found in ((None, None), (weight, "class 3")):
        run = checkify.checkify(jax.jit(lambda z, y, c=c: jaxent.checked(nn.cross_entropy)(z, y, c, None, 7)))
        message = run(Z3, PADDED)[0].get()
        assert message is None if found is None else found in str(message)


def test_checked_linear_twin() -> None:
    hidden, weight = np.ones((4, 2), np.float32), np.ones((7, 2), np.float32)
    assert "label 9" in str(error(nn.linear_cross_entropy, hidden, weight, np.array([0, 9, 1, 2])))
    assert error(nn.linear_cross_entropy, hidden, weight, np.array([0, 6, 1, 2])) is None


@pytest.mark.parametrize("name", marked(["nll_loss", "torch nll_loss", "NLLLoss"], ["nll_loss", "NLLLoss"]))
def test_checked_nll_loss_finds_inputs_that_are_not_log_probabilities(name: str) -> None:
    loss: Call = {"nll_loss": jaxent.nll_loss, "torch nll_loss": nn.nll_loss, "NLLLoss": nn.NLLLoss()}[name]
    labels = np.array([0, 1, 2, 3], np.int32)
    assert error(loss, jax.nn.log_softmax(Z3), labels) is None
    assert error(loss, Z3, labels) is not None
    assert error(loss, jax.nn.softmax(Z3), labels) is not None
    assert error(loss, -np.abs(Z3), labels) is not None
    removed = jnp.asarray(Z3).at[:, 6].set(-jnp.inf)
    assert error(loss, jax.nn.log_softmax(removed), labels) is None
    half = jax.nn.log_softmax(jnp.asarray(Z3, jnp.bfloat16))
    assert error(loss, half, labels) is None


def test_checked_values_and_gradients_are_the_losss() -> None:
    labels = np.array([[4, 0, 1], [3, 2, 4]], np.int32)
    run = checkify.checkify(jax.jit(jax.value_and_grad(jaxent.checked(nn.CrossEntropyLoss(label_smoothing=0.1)))))
    _, (value, gradient) = run(IMAGES, labels)
    want, by_hand = jax.jit(jax.value_and_grad(nn.CrossEntropyLoss(label_smoothing=0.1)))(IMAGES, labels)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# diagnose


@pytest.mark.parametrize("z", [[[0.0, -200.0]], [[0.0, -150.0, -300.0]], [[500.0, 0.0]], [[0.0, -1e7]]], ids=str)
def test_a_loss_that_is_0_does_not_round_to_0(z: Any) -> None:
    assert float(jaxent.softmax_cross_entropy(jnp.array(z), jnp.array([0]))) == 0
    assert jaxent.diagnose(jnp.array(z), jnp.array([0])) == []
    assert error(jaxent.softmax_cross_entropy, jnp.array(z), jnp.array([0])) is None


@pytest.mark.parametrize("z", [[[0.0, -80.0]], [[0.0, -20.0]], [[0.0, -200.0, -30.0]]], ids=str)
def test_a_loss_that_rounds_to_0_is_found(z: Any) -> None:
    (finding,) = jaxent.diagnose(jnp.array(z), jnp.array([0]))
    assert finding.kind == "collapsed_loss"


def test_a_loss_of_0_beside_one_that_rounds_to_0() -> None:
    for finding in jaxent.diagnose(jnp.array([[0.0, -200.0], [-20.0, 0.0]]), jnp.array([0, 1])):
        assert "0.0e" not in finding.example


@pytest.mark.usefixtures("x64")
def test_a_float64_loss_of_1e_87_is_not_0() -> None:
    (finding,) = jaxent.diagnose(np.array([[0.0, -200.0]]), np.array([0]))
    assert finding.kind == "collapsed_loss"
    assert "1.4e-87" in finding.example
