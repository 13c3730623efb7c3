"""Options at the value that switches them off have their true derivative, and a soft cap has it far out."""

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference as ref
from cases import covering
from small_call import Call, jaxent, nn
from small_call import close_leaves as close

from jaxent._math import safe

# ----------------------------------------------------------------------------------------------------------------------
# Options at the value that switches them off

Z2, Y2 = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], np.float32), np.array([2, 0], np.int32)
NLL, LSE = -ref.log_softmax(Z2), np.log(np.exp(ref.wide(Z2)).sum(-1))
SMOOTHED = (NLL.mean(-1) - ref.nll(Z2, Y2)).mean()
EYE3 = np.eye(3, dtype=np.float32)
OFF_ROUTES: dict[str, Call] = {
    "dense": jaxent.softmax_cross_entropy,
    "linear": lambda z, y, **o: jaxent.linear_softmax_cross_entropy(z, EYE3, y, **o),
}


def test_smoothing_of_0_as_in_the_issue() -> None:
    close(SMOOTHED, 1 / 3)
    close(jax.grad(lambda e: jaxent.softmax_cross_entropy(Z2, Y2, label_smoothing=e))(0.0), 1 / 3)


@pytest.mark.parametrize(
    ("mode", "route", "option"),
    covering(["alone", "jit", "jvp", "jacfwd", "beside logits", "vmap"], OFF_ROUTES, ["label_smoothing", "z_loss"]),
)
def test_slope_of_an_option_at_0(route: str, mode: str, option: str) -> None:
    def f(x: Any, z: Any = Z2) -> jax.Array:
        return OFF_ROUTES[route](z, Y2, **{option: x})

    want = SMOOTHED if option == "label_smoothing" else (LSE**2).mean()
    if mode == "jvp":
        close(jax.jvp(f, (0.0,), (1.0,)), (ref.nll(Z2, Y2).mean(), want))
    elif mode == "beside logits":
        slope, by_logits = jax.grad(f, (0, 1))(0.0, Z2)
        close(slope, want)
        close(by_logits, (ref.softmax(Z2) - ref.onehot(Y2, 3)) / 2)
        mixed = jax.jacfwd(jax.grad(f, 1))(0.0, Z2)
        p = ref.softmax(Z2)
        close(mixed, (ref.onehot(Y2, 3) - 1 / 3) / 2 if option == "label_smoothing" else LSE[:, None] * p)
    elif mode == "vmap":
        close(jax.vmap(jax.grad(f))(jnp.zeros(2)), [want, want])
    else:
        derivative = jax.jacfwd if mode == "jacfwd" else jax.grad
        close((jax.jit(derivative(f)) if mode == "jit" else derivative(f))(0.0), want)


@pytest.mark.parametrize("route", OFF_ROUTES)
def test_several_options_at_0(route: str) -> None:
    """Beside weights and class weights of 0, whose slopes are those of a quotient."""
    w, c = np.array([1.0, 0.0], np.float32), np.array([1.0, 1.0, 2.0], np.float32)

    def f(e: Any, zeta: Any, w: Any) -> jax.Array:
        options = {"label_smoothing": e, "z_loss": zeta, "weights": w, "class_weights": c}
        return OFF_ROUTES[route](Z2, Y2, **options)

    by_e, by_z, by_w = jax.grad(f, (0, 1, 2))(0.0, 0.0, w)
    nll = ref.nll(Z2, Y2)
    close(by_e, ((c * NLL[0]).mean() - 2 * nll[0]) / 2)
    close(by_z, LSE[0] ** 2 / 2)
    close(by_w, [0, 1 * nll[1] / 2 - 2 * nll[0] * 1 / 4])
    close(jax.grad(f)(0.0, 0.0, np.ones(2, np.float32)), (((c * NLL).mean(-1) - c[Y2] * nll) / 3).sum())


def test_smoothing_at_1_and_of_probabilities() -> None:
    f = lambda e, t=Y2: jaxent.softmax_cross_entropy(Z2, t, label_smoothing=e)  # noqa: E731
    close(jax.grad(f)(1.0), SMOOTHED)
    close(jax.grad(f)(0.0, ref.onehot(Y2, 3).astype(np.float32)), SMOOTHED)
    close(jax.grad(f)(0.0, EYE3[:2] * 0.5 + 0.25), (NLL * (1 / 3 - (EYE3[:2] * 0.5 + 0.25))).sum(-1).mean())


def test_smoothing_of_0_elsewhere() -> None:
    slope = (ref.onehot(Y2, 3) - 1 / 3) / 2
    close(jax.jacfwd(lambda e: jaxent.softmax_cross_entropy_gradient(Z2, Y2, label_smoothing=e))(0.0), slope)
    close(jax.grad(lambda e: nn.cross_entropy(Z2, Y2, label_smoothing=e))(0.0), SMOOTHED)
    close(jax.grad(lambda e: nn.linear_cross_entropy(Z2, EYE3, Y2, label_smoothing=e))(0.0), SMOOTHED)
    norms = lambda e: jaxent.linear_gradient_norms(Z2, EYE3, Y2, label_smoothing=e).residual.sum()  # noqa: E731
    g = ref.softmax(Z2) - ref.onehot(Y2, 3)
    close(jax.grad(norms)(0.0), ((g * 2 * slope).sum(-1) / np.linalg.norm(g, axis=-1)).sum())
    v = np.arange(6, dtype=np.float32).reshape(2, 3)
    ggn = lambda zeta: jaxent.ggn_vector_product(lambda z: z, Z2, v, targets=Y2, z_loss=zeta)  # noqa: E731
    p = ref.softmax(Z2)
    rank = p * (p * v).sum(-1, keepdims=True)
    close(jax.jacfwd(ggn)(0.0), rank + LSE[:, None] * ref.hessian_product(Z2, v))


@pytest.mark.parametrize("mode", ["alone", "jit", "beside hidden"])
def test_slope_of_temperature_at_1(mode: str) -> None:
    def f(t: Any, z: Any = Z2) -> jax.Array:
        return jaxent.linear_softmax_cross_entropy(z, EYE3, Y2, temperature=t)

    want = -((ref.softmax(Z2) - ref.onehot(Y2, 3)) * Z2).sum() / 2
    got = (
        jax.grad(f, (0, 1))(1.0, Z2)[0]
        if mode == "beside hidden"
        else (jax.jit if mode == "jit" else lambda f: f)(jax.grad(f))(1.0)
    )
    close(got, want)
    statistics = lambda t: jaxent.linear_token_statistics(Z2, EYE3, Y2, temperature=t).log_prob.sum()  # noqa: E731
    close(jax.grad(statistics)(1.0), -2 * want)


def test_weights_at_their_neutral_values() -> None:
    nll = ref.nll(Z2, Y2)
    f = lambda w: jaxent.softmax_cross_entropy(Z2, Y2, weights=w)  # noqa: E731
    close(jax.grad(f)(jnp.ones(2)), (nll - nll.mean()) / 2)
    close(jax.grad(f)(jnp.array([0.0, 2.0])), [(nll[0] - nll[1]) / 2, 0])
    z, t = Z2[0], np.array([0.0, 0.5, 1.0], np.float32)
    for name, module in (("sigmoid_cross_entropy", jaxent), ("binary_cross_entropy_with_logits", nn)):
        f: Any = getattr(module, name)
        close(jax.grad(lambda c: f(z, t, pos_weight=c))(jnp.ones(3)), t * ref.softplus(-z) / 3)  # noqa: B023


# ----------------------------------------------------------------------------------------------------------------------
# A soft cap far out: its slope is 1 / cosh(x / s)^2, which float32 holds until x = 44 s


def sech2(x: float) -> float:
    return float(1 / mpmath.cosh(x) ** 2)


def test_slope_of_a_soft_cap_does_not_saturate() -> None:
    s, w, y = 3.0, jnp.array([[1.0, 0.0]]), jnp.array([1])

    @jax.jit
    def slopes(h: jax.Array) -> Any:
        def f(h: Any, w: Any, b: Any) -> jax.Array:
            return jaxent.linear_softmax_cross_entropy(h, w, y, bias=b, soft_cap=s)

        return (
            jax.grad(f, (0, 1, 2))(h, w, jnp.zeros(2)),
            jax.jvp(lambda h: f(h, w, jnp.zeros(2)), (h,), (jnp.ones((1, 1)),))[1],
            jax.grad(lambda h: jaxent.linear_token_statistics(h, w, y, soft_cap=s).log_prob[0])(h),
            jaxent.linear_gradient_norms(h, w, y, soft_cap=s).hidden[0],
            jax.grad(lambda h: jaxent.linear_kl_divergence(h, 0 * w, h, w, soft_cap_q=s))(h),
        )

    for caps in (-30.0, -8.0, 2.0, 8.0, 12.0, 20.0, 40.0):
        z = np.array([[s * np.tanh(caps), 0.0]])
        want = (ref.softmax(z) - [[0, 1]])[0, 0] * sech2(caps)
        (gh, gw, gb), forward, by_row, norm, teacher = slopes(jnp.array([[caps * s]]))
        close((gh[0, 0], gw[0, 0], gb[0]), (want, want * caps * s, want), rtol=2e-5, atol=0)
        close(forward, want, rtol=2e-5, atol=0)
        close(by_row, [[-want]], rtol=2e-5, atol=0)
        close(norm, abs(want), rtol=2e-5, atol=0)
        close(teacher, [[(ref.softmax(z)[0, 0] - 0.5) * sech2(caps)]], rtol=2e-5, atol=0)


def test_curvature_of_a_soft_cap_does_not_saturate() -> None:
    s, w, y = 2.0, jnp.array([[1.0, 0.0]]), jnp.array([1])

    @jax.jit
    def curvature(h: jax.Array) -> Any:
        f = lambda h, s: jaxent.linear_softmax_cross_entropy(h, w, y, soft_cap=s)  # noqa: E731
        product = jaxent.linear_ggn_vector_product(h, w, (jnp.ones((1, 1)), None), soft_cap=s)[0]
        return jax.hessian(f)(h, s)[0, 0, 0, 0], product, jax.grad(f, 1)(h, s)

    for caps in (8.0, 15.0):
        p = ref.softmax(np.array([s * np.tanh(caps), 0.0]))[0]
        hessian, product, by_cap = curvature(jnp.array([[caps * s]]))
        want = p * (1 - p) * sech2(caps) ** 2 - p * 2 * np.tanh(caps) * sech2(caps) / s
        close(hessian, want, rtol=2e-5, atol=0)
        close(product, [[p * (1 - p) * sech2(caps) ** 2]], rtol=1e-4, atol=0)
        close(by_cap, p * float(mpmath.tanh(caps) - caps * mpmath.sech(caps) ** 2))


def test_the_body_of_a_soft_cap_keeps_its_slope() -> None:
    """It is differentiated by jax 0.10, in place of its rule, in a Hessian product through a scan of the user's own."""
    body: Any = getattr(safe.soft_cap, "__wrapped__")  # noqa: B009
    close(jax.jit(jax.grad(body))(jnp.float32(36), jnp.float32(3)), sech2(12), rtol=2e-5, atol=0)


@pytest.mark.usefixtures("x64")
def test_slope_of_a_soft_cap_in_float64() -> None:
    h, w = jnp.array([[25.0]]), jnp.array([[1.0, 0.0]])
    g = jax.grad(lambda h: jaxent.linear_softmax_cross_entropy(h, w, jnp.array([1]), soft_cap=1.0))(h)
    close(g, [[ref.softmax(np.array([1.0, 0.0]))[0] * sech2(25.0)]], rtol=1e-13, atol=0)
