"""Arguments of every kind: what is read, what is refused and in which words, and how long the way to the core is."""

import decimal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxent
import jaxent.torch_compat

# Untyped: arguments are of many kinds, and some are wrong on purpose.
api: Any = jaxent
twin: Any = jaxent.torch_compat
Call = Callable[..., Any]

Z = np.array([[1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 0.0, 2.0]], np.float32)
Y = np.array([2, 0])
H, W = np.array([[1.0, -1.0], [0.5, 2.0]], np.float32), np.array([[1.0, 0, 2, 1], [0, 1, -1, 1]], np.float32)


def log_softmax(z: Any) -> np.ndarray:
    z = np.asarray(z, np.float64)
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


ROWS = -log_softmax(Z)[[0, 1], Y]

# ----------------------------------------------------------------------------------------------------------------------
# The way to the core


def functions_called(f: Call, *args: Any) -> list[str]:
    """The functions of the package that a call runs; comprehensions, which newer Pythons inline, are none."""
    package, called = str(Path(jaxent.__file__).parent), []

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            called.append(code.co_name)

    sys.setprofile(profile)
    try:
        f(*args)
    finally:
        sys.setprofile(None)
    return called


def test_a_cached_dense_call_is_short():
    args = jnp.asarray(Z), jnp.asarray(Y)
    api.softmax_cross_entropy(*args)
    called = functions_called(api.softmax_cross_entropy, *args)
    assert len(called) <= 25, called


def test_a_linear_call_is_short():
    # Shapes of its own, so that this is the first call of its kind, with the core's trace.
    args = jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.zeros(3, jnp.int32)
    first = functions_called(api.linear_softmax_cross_entropy, *args)
    assert len(first) <= FIRST_LINEAR_CALL, first
    cached = functions_called(api.linear_softmax_cross_entropy, *args)
    assert len(cached) <= 39, cached


FIRST_LINEAR_CALL = 125

# ----------------------------------------------------------------------------------------------------------------------
# Numbers from the host

TOO_LARGE = np.array([1e39, 1.0])
RANGE: dict[str, Call] = {
    "weights": lambda: api.softmax_cross_entropy(Z, Y, weights=TOO_LARGE),
    "logits": lambda: api.softmax_cross_entropy(Z.astype(np.float64) * 1e39, Y),
    "class_weights": lambda: api.nll_loss(Z, Y, class_weights=np.array([1, 1, 1, -1e300])),
    "pos_weight": lambda: api.sigmoid_cross_entropy(Z, Z * 0, pos_weight=1e39),
    "denominator": lambda: api.softmax_cross_entropy(Z, Y, denominator=1e39),
    "temperature": lambda: api.linear_softmax_cross_entropy(H, W, Y, temperature=10**39),
    "soft_cap": lambda: api.linear_token_statistics(H, W, soft_cap=1e39),
    "weight": lambda: twin.cross_entropy(Z, Y, np.array([1, 1, 1, 1e39])),
}


@pytest.mark.parametrize("argument", RANGE)
def test_a_number_that_float32_cannot_hold_is_refused(argument: str):
    for run in (lambda f: f(), lambda f: jax.jit(f)()):
        with pytest.raises(ValueError, match=rf"jaxent\.[\w.]+: `{argument}` must hold numbers within the range of"):
            run(RANGE[argument])


def test_64_bit_types_hold_larger_weights(x64: None):
    got = api.softmax_cross_entropy(Z.astype(np.float64), Y, weights=TOO_LARGE)
    np.testing.assert_allclose(got, (ROWS * TOO_LARGE).sum() / TOO_LARGE.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("argument", "f"),
    [
        ("denominator", lambda x: api.softmax_cross_entropy(Z, Y, denominator=x)),
        ("temperature", lambda x: api.linear_softmax_cross_entropy(H, W, Y, temperature=x)),
        ("soft_cap", lambda x: api.linear_softmax_cross_entropy(H, W, Y, soft_cap=x)),
        ("z_loss", lambda x: api.softmax_cross_entropy(Z, Y, z_loss=x)),
    ],
)
def test_a_scalar_that_float32_makes_zero_or_infinite_is_refused(argument: str, f: Call):
    # 1e-50 as a float32 divisor would make the mean 0, as if nothing were counted.
    for wrong in (1e-50, np.float64(1e-40), np.inf):
        for run in (f, lambda x: jax.jit(lambda: f(x))()):
            with pytest.raises(ValueError, match=rf"jaxent\.\w+: `{argument}` must"):
                run(wrong)


@pytest.mark.parametrize("number", [True, np.bool_(True), jnp.array(True)])
def test_a_flag_is_not_a_number(number: Any):
    with pytest.raises(TypeError, match=r"jaxent\.softmax_cross_entropy: `denominator` must have a floating dtype"):
        api.softmax_cross_entropy(Z, Y, denominator=number)
    with pytest.raises(TypeError, match=r"jaxent\.softmax_cross_entropy: `axis` must be an int"):
        api.softmax_cross_entropy(Z, Y, axis=number)
    with pytest.raises(TypeError, match=r"jaxent\.linear_softmax_cross_entropy: `chunk_rows` must be an int or None"):
        api.linear_softmax_cross_entropy(H, W, Y, chunk_rows=number)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint32, np.array, jnp.array])
def test_integers_of_other_kinds(kind: Any):
    np.testing.assert_allclose(api.softmax_cross_entropy(Z.T, Y, axis=kind(0)), ROWS.mean(), rtol=1e-6)
    assert api.token_statistics(Z, Y, top_k=kind(2)).top_classes.shape == (2, 2)
    got = api.linear_softmax_cross_entropy(H, W, Y, chunk_rows=kind(1), ignore_index=kind(2))
    np.testing.assert_allclose(got, -log_softmax(H @ W)[1, 0], rtol=1e-6)
    assert api.plan(kind(8), kind(4), kind(16)).num_chunks == 1


# ----------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries and types


@pytest.mark.parametrize(
    "argument", ["logits", "labels", "probabilities", "weights", "where", "hidden", "half", "brier"]
)
def test_tensors_of_pytorch(argument: str):
    torch = pytest.importorskip("torch")
    t, want = torch.from_numpy, ROWS.mean()
    if argument == "logits":
        got = api.softmax_cross_entropy(t(Z), Y)
    elif argument == "labels":
        got = api.softmax_cross_entropy(Z, t(Y))
    elif argument == "probabilities":
        got = api.softmax_cross_entropy(Z, torch.nn.functional.one_hot(t(Y), 4).float())
    elif argument == "weights":
        got, want = api.softmax_cross_entropy(Z, Y, weights=torch.tensor([1, 3])), (ROWS * [1, 3]).sum() / 4
    elif argument == "where":
        got, want = api.softmax_cross_entropy(Z, Y, where=torch.tensor([False, True])), ROWS[1]
    elif argument == "hidden":
        got = api.linear_softmax_cross_entropy(t(Z), torch.eye(4), t(Y))
    elif argument == "brier":
        got, want = api.brier_score(t(Z) * 0 + 0.25, t(Y)), 0.75
        got = api.softmax_cross_entropy(Z[:, None], t(Y), axis=(1, 2)) - ROWS.mean() + got
    else:  # NumPy knows no bfloat16 of PyTorch's
        got = api.softmax_cross_entropy(t(Z).bfloat16(), Y)
        assert api.softmax_cross_entropy_gradient(t(Z).bfloat16(), Y).dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", [">", np.longdouble])
def test_types_of_numpy_that_jax_does_not_read(kind: Any):
    """Another machine's bytes, and more than 64 bits, in floating arrays, labels, flags and numbers."""
    z, y = (x.astype(x.dtype.newbyteorder(kind) if kind == ">" else kind) for x in (Z, Y))
    if kind != ">":
        y = y.astype(np.uint64)
    got = api.softmax_cross_entropy(z, y, class_weights=z[0] * 0 + 1, where=y >= 0, denominator=z[0, 0] * 0 + 2)
    np.testing.assert_allclose(got, ROWS.mean(), rtol=1e-6)
    np.testing.assert_allclose(api.entropy(z * 0 + 0.25, base=z[0, 0] * 0 + 2), 2, rtol=1e-6)
    np.testing.assert_allclose(api.brier_score(z * 0 + 0.25, y), 0.75)
    with pytest.raises(ValueError, match="`logits` must hold numbers within the range of float"):
        api.softmax_cross_entropy(np.full((2, 4), "1e4000", np.longdouble), Y)


@pytest.mark.parametrize("argument", ["logits", "targets", "weights", "row_args"])
def test_a_masked_array_is_refused(argument: str):
    masked = np.ma.masked_array
    calls = {
        "logits": lambda: api.softmax_cross_entropy(masked(Z), Y),
        "targets": lambda: api.softmax_cross_entropy(Z, masked(Y)),
        "weights": lambda: api.softmax_cross_entropy(Z, Y, weights=masked([1.0, 2.0])),
        "row_args": lambda: api.linear_loss(lambda logits, row: logits[:, 0], H, W, masked(Y)),
    }
    with pytest.raises(TypeError, match=rf"jaxent\.\w+: `{argument}` must be an array without a mask .*`where`"):
        calls[argument]()


def test_integers_of_more_than_64_bits_weigh_what_they_say():
    got = api.softmax_cross_entropy(Z, Y, weights=[2**70, 3 * 2**70], denominator=2**72)
    np.testing.assert_allclose(got, (ROWS * [1, 3]).sum() / 4, rtol=1e-6)
    with pytest.raises(TypeError, match="`weights` must be array-like"):
        api.softmax_cross_entropy(Z, Y, weights=[decimal.Decimal(1), decimal.Decimal(3)])


@pytest.mark.parametrize("name", ["row_args", "params"])
def test_an_integer_for_a_function_of_the_users_is_never_wrapped(name: str):
    large = np.array([2**31, 1])
    options = {"params": large} if name == "params" else {}
    with pytest.raises(
        ValueError, match=rf"jaxent\.linear_loss: `{name}` must hold integers within the range of int32"
    ):
        api.linear_loss(lambda z, *_: z[:, 0], H, W, *[] if options else [large], **options)
    with pytest.raises(
        ValueError, match=r"jaxent\.linear_rows: `row_args` must hold numbers within the range of float32"
    ):
        api.linear_rows(lambda z, a: z[:, 0] + a, H, W, np.array([1e39, 1]))


def test_a_count_is_a_number_from_0_on():
    risk = api.EmpiricalRisk().update(ROWS)
    np.testing.assert_allclose(risk.bits_per(np.float16(2)), ROWS.sum() / np.log(4), rtol=1e-6)
    for count in (-1, np.nan, np.inf, True):
        with pytest.raises((TypeError, ValueError), match=r"jaxent\.EmpiricalRisk\.bits_per: `count` must"):
            risk.bits_per(count)
    assert np.isnan(jax.jit(risk.bits_per)(-1.0))


def test_an_order_of_float16_is_compared_without_a_warning():
    np.testing.assert_allclose(api.renyi_entropy(Z * 0 + 0.25, np.float16(2)), np.log(4), rtol=1e-6)


def test_a_tensor_that_requires_grad_is_refused_in_its_own_words():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"(?s)jaxent\.softmax_cross_entropy: `logits` must be array-like .*detach\(\)"):
        api.softmax_cross_entropy(torch.tensor(Z, requires_grad=True), Y)
    with pytest.raises(TypeError, match=r"(?s)jaxent\.diagnose: `\w+` must be array-like .*detach\(\)"):
        api.diagnose(torch.tensor(Z, requires_grad=True), Y)


def test_a_copy_is_taken_of_what_numpy_cannot_read():
    torch = pytest.importorskip("torch")
    z = torch.tensor([[0.0, 0.0]]).bfloat16()
    statistics = api.token_statistics(z)
    z += 7
    np.testing.assert_allclose(statistics.log_normalizer, np.log(2), rtol=1e-6)


def test_a_list_of_traced_numbers():
    got = jax.jit(lambda a, b: api.softmax_cross_entropy(Z, Y, weights=[a, b]))(1.0, 3.0)
    np.testing.assert_allclose(got, (ROWS * [1, 3]).sum() / 4, rtol=1e-6)


FLOAT8: dict[str, tuple[str, Call]] = {
    "softmax_cross_entropy": ("logits", lambda t: api.softmax_cross_entropy(Z.astype(t), Y)),
    "softmax_cross_entropy of a teacher": ("targets", lambda t: api.softmax_cross_entropy(Z, (Z * 0).astype(t))),
    "softmax_cross_entropy_gradient": ("logits", lambda t: api.softmax_cross_entropy_gradient(Z.astype(t), Y)),
    "nll_loss": ("weights", lambda t: api.nll_loss(Z, Y, weights=np.ones(2).astype(t))),
    "sigmoid_cross_entropy": ("targets", lambda t: api.sigmoid_cross_entropy(Z, (Z * 0).astype(t))),
    "token_statistics": ("logits", lambda t: api.token_statistics(jnp.asarray(Z.astype(t)))),
    "linear_softmax_cross_entropy": ("kernel", lambda t: api.linear_softmax_cross_entropy(H, W.astype(t), Y)),
    "linear_token_statistics": ("hidden", lambda t: api.linear_token_statistics(H.astype(t), W)),
    "linear_kl_divergence": ("hidden_q", lambda t: api.linear_kl_divergence(H, W, H.astype(t), W)),
    "linear_gradient_norms": ("bias", lambda t: api.linear_gradient_norms(H, W, Y, bias=np.zeros(4).astype(t))),
    "linear_loss": ("hidden", lambda t: api.linear_loss(lambda z: z[:, 0], H.astype(t), W)),
    "logit_hessian": ("logits", lambda t: api.logit_hessian(Z.astype(t))),
    "ggn_vector_product": ("params", lambda t: api.ggn_vector_product(lambda z: z, Z.astype(t), Z)),
    "entropy": ("p", lambda t: api.entropy(Z.astype(t))),
    "entropy_with_logits": ("logits", lambda t: api.entropy_with_logits(Z.astype(t))),
    "torch_compat.cross_entropy": ("input", lambda t: twin.cross_entropy(Z.astype(t), Y)),
}


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_refused(name: str, dtype: Any):
    argument, f = FLOAT8[name]
    message = rf"jaxent\.{name.split()[0]}: `{argument}` must .*astype\(jnp\.bfloat16\).*float8_e"
    with pytest.raises(TypeError, match=message):
        f(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Mesh axes that split the classes


@pytest.mark.parametrize("axis", [(), ("a", 0), ["a"], 3])
def test_a_vocabulary_axis_that_is_not_a_name(axis: Any):
    with pytest.raises(TypeError, match=r"jaxent\.softmax_cross_entropy: `vocab_axis` must be the name of a mesh axis"):
        api.softmax_cross_entropy(Z, Y, vocab_axis=axis)


def test_the_axis_of_a_vmap_is_not_a_mesh_axis():
    parts = np.stack(np.split(W, 2, axis=1))
    with pytest.raises(ValueError, match=r"jaxent\.linear_loss: `vocab_axis` must .*axis_name of a jax\.vmap"):
        jax.vmap(lambda w: api.linear_loss(lambda z: z[:, 0], H, w, vocab_axis="v"), axis_name="v")(parts)
    with pytest.raises(ValueError, match=r"jaxent\.ggn_vector_product: `vocab_axis` must .*axis_name of a jax\.vmap"):
        jax.vmap(lambda w: api.ggn_vector_product(lambda w: H @ w, w, w, vocab_axis="v"), axis_name="v")(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Class weights without a target


def test_class_weights_need_targets():
    with pytest.raises(ValueError, match=r"jaxent\.ggn_vector_product: `class_weights` goes with `targets`"):
        api.ggn_vector_product(lambda z: z, Z, Z, class_weights=np.ones(4))
    with pytest.raises(ValueError, match=r"jaxent\.linear_ggn_vector_product: `class_weights` goes with `targets`"):
        api.linear_ggn_vector_product(H, W, (H, None), class_weights=np.ones(4))
