"""`check_gradient` passes what is right, finds what is wrong and where, and says by how much.

Wrong gradients are planted; the exact ones are written down by hand.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from cases import draw_labels, draw_logits, softmax_cross_entropy, softmax_cross_entropy_gradient
from gradient_reports import LATE, cubes, of, with_gradient

from jaxent import check_gradient
from jaxent._check.gradient import DIFFERENCES


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_the_librarys_loss(dtype: Any, rng: np.random.Generator):
    z, labels = draw_logits(rng, (4, 3), dtype), draw_labels(rng, (4,), 3)
    report = check_gradient(softmax_cross_entropy, z, labels, label_smoothing=0.125, z_loss=0.25, tolerance=6)
    assert report.ok, str(report)
    assert [c.way for c in report.comparisons] == ["value", "closed form", "jax.grad", "jax.jvp", DIFFERENCES]
    assert report.notes == ()
    assert 0 < report.max_ulp < 6


def test_the_closed_form_of_a_partial():
    report = check_gradient(functools.partial(softmax_cross_entropy, label_smoothing=0.25), LATE, np.array(1))
    assert report.ok
    assert of(report, "closed form")


def test_a_wrong_gradient_of_every_entry():
    x = np.array([0.5, 1.0, -2.0], np.float32)
    report = check_gradient(with_gradient(cubes, lambda x: 2.99 * x**2), x)
    assert not report.ok
    assert [c.way for c in report.comparisons if not c.ok] == [DIFFERENCES]
    assert "OUT OF BOUNDS: central differences at args[0][" in str(report)
    assert check_gradient(with_gradient(cubes, lambda x: 3 * x**2), x).ok


def test_a_wrong_gradient_far_from_0():
    """The step is that of the differences between the logits, not that of a million."""
    z = np.array([0.5, -1.0, 2.0, 0.0], np.float32) + np.float32(1e6)

    def loss(z: Any) -> jax.Array:
        return softmax_cross_entropy(z, np.array(0))

    def gradient(z: Any) -> jax.Array:
        return softmax_cross_entropy_gradient(z, np.array(0))

    assert check_gradient(with_gradient(loss, gradient), z).ok
    assert not check_gradient(with_gradient(loss, lambda z: 1.1 * gradient(z)), z).ok


def test_a_wrong_entry_is_named():
    x = np.full((2, 3), 1.5, np.float32)
    where = jnp.zeros((2, 3), bool).at[1, 2].set(True)
    report = check_gradient(with_gradient(cubes, lambda x: jnp.where(where, -3.0, 3.0).astype(x.dtype) * x**2), x)
    assert (report.worst.place, report.worst.want) == ("args[0][1, 2]", -6.75)
    assert report.worst.got == pytest.approx(6.75, rel=1e-9)


@pytest.mark.grid
def test_one_entry_in_thousands():
    x = np.linspace(0.5, 1.5, 5000).astype(np.float32)
    for place in range(0, 5000, 1250):
        wrong = jnp.ones(5000).at[place].set(0.5)
        report = check_gradient(with_gradient(cubes, lambda x, w=wrong: w.astype(x.dtype) * 3 * x**2), x)
        assert not report.ok
    assert check_gradient(cubes, x).ok


def test_a_wrong_closed_form():
    z, labels = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([0, 2])
    report = check_gradient(
        softmax_cross_entropy, z, labels, closed_form=lambda z, y: softmax_cross_entropy_gradient(z, y).at[1, 0].set(0)
    )
    assert [(c.way, c.place) for c in report.comparisons if not c.ok] == [("closed form", "args[0][1, 0]")]


@pytest.mark.parametrize("callable_oracle", [True, False])
def test_an_oracle(callable_oracle: bool):
    x, y = np.array([0.1, 0.7], np.float32), np.array([0.3, -2.0], np.float32)
    exact = tuple(a.astype(np.float64) for a in (y, x))

    def given(x: Any, y: Any) -> tuple[Any, Any]:
        assert x.dtype == y.dtype == np.float64
        return y, x

    report = check_gradient(jnp.vdot, x, y, oracle=given if callable_oracle else exact)
    assert report.ok
    assert [c.want for c in of(report, "jax.grad")] == [float(y[0]), float(x[0])]
    wrong = check_gradient(jnp.vdot, x, y, oracle=(exact[0], -exact[1]))
    assert {(c.way, c.argument) for c in wrong.comparisons if not c.ok} == {
        (way, "args[1]") for way in ("jax.grad", "jax.jvp", DIFFERENCES)
    }


def test_pytrees_and_what_is_not_differentiated(rng: np.random.Generator):
    params = {"w": rng.normal(size=(3, 2)).astype(np.float32), "b": np.zeros(2, np.float32), "step": 3}

    def loss(params: Any, x: Any, labels: Any, scale: float) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"][None], labels))

    x, labels = rng.normal(size=(5, 3)).astype(np.float32), draw_labels(rng, (5,), 2)
    report = check_gradient(loss, params, x, labels, 0.5)
    assert report.ok, str(report)
    assert [c.argument for c in of(report, "jax.grad")] == ["args[0]['b']", "args[0]['w']", "args[1]", "args[3]"]
    assert report.max_ulp < 30


def test_a_loss_that_has_collapsed():
    usual = check_gradient(lambda z: -jax.nn.log_softmax(z)[0], LATE)
    assert not usual.ok
    assert usual.worst.got == 0
    assert usual.worst.want == pytest.approx(-2.0750e-9, rel=1e-2)
    assert check_gradient(softmax_cross_entropy, LATE, np.array(0), tolerance=5).ok


@pytest.mark.grid
def test_tolerance(rng: np.random.Generator):
    z = draw_logits(rng, (20, 3))
    labels = np.argmax(z, axis=-1)

    def usual(z: Any) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, labels))

    assert check_gradient(usual, z / 2).ok
    assert not check_gradient(usual, z / 2, tolerance=4).ok


def test_a_loss_that_float64_cannot_call():
    w = jnp.arange(1.0, 4.0)  # strict promotion does not mix it with float64
    x = np.array([1.0, -0.5, 0.3], np.float32)
    report = check_gradient(lambda x: cubes(x * w), x)
    assert report.ok, str(report)
    assert "not callable in float64" in report.notes[0]
    assert not check_gradient(with_gradient(lambda x: cubes(x * w), lambda x: 2.9 * x**2 * w**3), x).ok


@pytest.mark.parametrize("back", [True, False])
def test_a_loss_that_computes_in_float32_whatever_comes(back: bool):
    def inside(x: Any) -> jax.Array:
        y = cubes(x.astype(jnp.float32))
        return y.astype(x.dtype) if back else y

    x = np.array([1.0, -0.5, 0.25], np.float32)
    report = check_gradient(inside, x)
    assert report.ok, str(report)
    assert "noise" in report.notes[0]
    wrong = with_gradient(inside, lambda x: 2.9 * x**2)
    assert not check_gradient(wrong if back else lambda x: wrong(x).astype(jnp.float32), x).ok


def test_a_loss_without_forward_mode():
    loss = jax.custom_vjp(cubes)
    loss.defvjp(lambda x: (cubes(x), x), lambda x, g: (3 * g * x**2,))
    report = check_gradient(loss, np.array([1.0, 0.7], np.float32))
    assert report.ok
    assert report.notes[0].startswith("no jax.jvp: ")


@pytest.mark.parametrize("forward", [True, False])
def test_the_report_names_a_wrong_rule(forward: bool):
    x = np.array([1.0, 0.5], np.float32)
    if forward:
        wrong = with_gradient(cubes, lambda x: 2.9 * x**2)
    else:
        wrong = jax.custom_vjp(cubes)
        wrong.defvjp(lambda x: (cubes(x), x), lambda x, g: (2.9 * g * x**2,))
    text = str(check_gradient(wrong, x))
    assert "The derivative rule is wrong: jax.grad agrees with itself in float64" in text
    assert "moving args[0][0] changes the loss at a rate of 3, not 2.9." in text
    closed = check_gradient(cubes, x, closed_form=lambda x: 2 * x**2)
    assert closed.notes[-1] == "Of all ways only closed form is out of bounds: it is wrong there, or loses digits."


@pytest.mark.grid
@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_random_bits_that_change_with_the_default_dtype(key: Callable[[int], Any]):
    def dropped(loss: Callable[[Any], jax.Array], x: Any) -> jax.Array:
        keep = jax.random.bernoulli(key(0), 0.5, x.shape)
        return loss(jnp.where(keep, 2 * x, 0))

    x = np.arange(1, 7, dtype=np.float32)
    report = check_gradient(functools.partial(dropped, cubes), x)
    assert report.ok, str(report)
    assert "its random numbers are others in float64" in report.notes[0]
    wrong = check_gradient(functools.partial(dropped, with_gradient(cubes, lambda x: 2.9 * x**2)), x)
    assert not wrong.ok
    assert "The derivative rule is wrong, or loses nearly all digits" in str(wrong)

    def fixed(x: Any) -> jax.Array:
        keep = jax.random.bernoulli(key(0), jnp.float32(0.5), x.shape)
        return cubes(jnp.where(keep, 2 * x, 0))

    assert check_gradient(fixed, x).notes == ()


def test_a_wrong_second_derivative():
    """A rule whose own derivative is wrong: the first derivative is right."""

    @jax.custom_jvp
    def slope(x: Any) -> jax.Array:
        return 3 * x**2

    slope.defjvp(lambda primals, tangents: (slope(*primals), 5.9 * primals[0] * tangents[0]))
    loss, x = with_gradient(cubes, slope), np.array([1.0, 0.5], np.float32)
    assert check_gradient(loss, x).ok
    report = check_gradient(loss, x, second_order=True)
    assert not report.ok
    assert report.notes[-1].startswith("The derivative rule is wrong")
    assert check_gradient(cubes, x, second_order=True).ok
    with pytest.raises(ValueError, match="`closed_form` and `oracle` go with second_order=False"):
        check_gradient(cubes, x, second_order=True, oracle=x)


@pytest.mark.grid
def test_smooth_functions_raise_no_false_alarm(rng: np.random.Generator):
    functions: list[Callable[[Any], Any]] = [
        lambda x: jnp.sum(jnp.tanh(x)) ** 2,
        lambda x: jnp.sum(jnp.exp(-(x**2))) - jnp.sum(jnp.sin(3 * x)),
        lambda x: jax.nn.logsumexp(x) - jnp.mean(x),
        lambda x: jnp.sum(x) * 1e-30 + 1e6,
        lambda x: 0 * jnp.sum(x),
        lambda x: jnp.prod(1 + x / 10),
    ]
    for scale in (1e-6, 1.0, 30.0):
        x = (rng.normal(size=7) * scale).astype(np.float32)
        for i, f in enumerate(functions):
            bad = [c for c in check_gradient(f, x).comparisons if c.way in (DIFFERENCES, "value") and not c.ok]
            assert not bad, (scale, i, bad)


@pytest.mark.usefixtures("x64")
def test_float64(rng: np.random.Generator):
    z = draw_logits(rng, (4, 3), np.float64)
    report = check_gradient(softmax_cross_entropy, z, draw_labels(rng, (4,), 3))
    assert report.ok
    assert report.max_ulp < 4


def test_the_table():
    lines = str(check_gradient(softmax_cross_entropy, LATE, np.array(0))).splitlines()
    assert lines[0].split("  ")[0] == "way"
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["value", "closed form", "jax.grad", "jax.jvp", DIFFERENCES]
    assert lines[-1] == "in bounds"
    assert len({line.find("args[0]") for line in lines[2:-1]}) == 1


def test_bad_arguments():
    z = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"jaxent.check_gradient: `args` must hold something floating"):
        check_gradient(jnp.sum, np.arange(3))
    with pytest.raises(TypeError, match=r"check_gradient: `loss_fn` must be a function, got 3 \(int\)"):
        check_gradient(3, np.ones(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`loss_fn` must return a scalar .* got float32\[2\]"):
        check_gradient(softmax_cross_entropy, z, np.array([0, 1]), reduction="none")
    with pytest.raises(TypeError, match="`loss_fn` must return a floating scalar"):
        check_gradient(lambda z: jnp.sum(z > 0), z)
    with pytest.raises(
        ValueError, match=r"`oracle` must give .* shape \(2, 3\) with respect to args\[0\], got float64\[3\]"
    ):
        check_gradient(jnp.sum, z, oracle=np.zeros(3))
