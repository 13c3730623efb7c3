"""Arrays of other libraries, options and masks of other types: right, or an error that says what to do."""

import importlib
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from small_call import DZ, PROBABILITIES, Call, H, W, Y, Z, close, jaxent, nn, user_rows

# ----------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries, options of other types


class Foreign:
    """An array of a library whose dtypes NumPy does not know, as PyTorch's."""

    class Dtype:
        def __init__(self, name: str):
            self.name = name

        def __repr__(self) -> str:
            return f"torch.{self.name}"

    def __init__(self, array: np.ndarray):
        self.array, self.dtype, self.shape = array, self.Dtype(array.dtype.name), array.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array.astype(dtype or self.array.dtype)


def torch_tensor(array: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(np.ascontiguousarray(array))


FOREIGN: dict[str, tuple[Call, str, str, Any]] = {
    "labels": (
        lambda as_: jaxent.softmax_cross_entropy(Z, as_(Y.astype(np.int64))),
        "softmax_cross_entropy",
        "targets",
        ref.nll(Z, Y).mean(),
    ),
    "logits": (
        lambda as_: jaxent.softmax_cross_entropy(as_(Z), Y),
        "softmax_cross_entropy",
        "logits",
        ref.nll(Z, Y).mean(),
    ),
    "where": (
        lambda as_: jaxent.softmax_cross_entropy(Z, Y, where=as_(Y > 2)),
        "softmax_cross_entropy",
        "where",
        ref.nll(Z, Y)[Y > 2].mean(),
    ),
    "weights": (
        lambda as_: jaxent.nll_loss(-np.abs(Z), Y, weights=as_(np.ones(6, np.float32))),
        "nll_loss",
        "weights",
        np.abs(Z)[range(6), Y].mean(),
    ),
    "binary targets": (
        lambda as_: jaxent.sigmoid_cross_entropy(Z, as_(PROBABILITIES)),
        "sigmoid_cross_entropy",
        "targets",
        ref.sigmoid_nll(Z, PROBABILITIES).mean(),
    ),
    "hidden": (
        lambda as_: jaxent.linear_softmax_cross_entropy(as_(H), W, Y),
        "linear_softmax_cross_entropy",
        "hidden",
        ref.nll(Z, Y).mean(),
    ),
    "statistics": (
        lambda as_: -jaxent.linear_token_statistics(H, W, as_(Y.astype(np.int64))).log_prob,
        "linear_token_statistics",
        "labels",
        ref.nll(Z, Y),
    ),
    "measure": (lambda as_: jaxent.entropy(as_(PROBABILITIES)), "entropy", "p", ref.entropy(PROBABILITIES)),
    "twin": (lambda as_: nn.cross_entropy(Z, as_(Y.astype(np.int64))), "cross_entropy", "target", ref.nll(Z, Y).mean()),
    "twin input": (lambda as_: nn.cross_entropy(as_(Z), Y), "cross_entropy", "input", ref.nll(Z, Y).mean()),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_arrays_of_another_library(name: str) -> None:
    f, function, argument, want = FOREIGN[name]
    for library in (Foreign, torch_tensor) if importlib.util.find_spec("torch") else (Foreign,):
        try:
            got = f(library)
        except TypeError as error:
            assert re.search(rf"jaxent\.(torch_compat\.)?{function}: `{argument}` must", str(error)), error  # noqa: PT017
            assert "torch" in str(error)  # noqa: PT017
            assert "Cannot interpret" not in str(error)  # noqa: PT017
        else:
            close(got, want)


TWINS: dict[str, Call] = {
    "cross_entropy": lambda **o: nn.cross_entropy(Z, Y, **o),
    "cross_entropy of probabilities": lambda **o: nn.cross_entropy(Z, PROBABILITIES, **o),
    "nll_loss": lambda **o: nn.nll_loss(-np.abs(Z), Y, **o),
    "CrossEntropyLoss": lambda **o: nn.CrossEntropyLoss(**o)(Z, PROBABILITIES),
    "NLLLoss": lambda **o: nn.NLLLoss(**o)(-np.abs(Z), Y),
}


@pytest.mark.parametrize("index", [None, "7", 7.0, True], ids=repr)
@pytest.mark.parametrize("name", TWINS)
def test_an_ignore_index_that_is_not_an_int(name: str, index: Any) -> None:
    """None may mean that no row is ignored, as in the other losses."""
    try:
        got = TWINS[name](ignore_index=index)
    except TypeError as error:
        assert re.search(r"jaxent\.torch_compat\.\w+: `ignore_index` must", str(error)), error  # noqa: PT017
    else:
        assert index is None
        close(got, TWINS[name]())


def test_numpy_integers_are_integers() -> None:
    n = np.int64
    want = ref.nll(Z, Y).mean()
    close(jaxent.linear_softmax_cross_entropy(H, W, Y, chunk_rows=n(2)), want)
    close(jaxent.linear_loss(user_rows, H, W, Y, chunk_rows=n(2), reduction="mean"), want)
    close(jaxent.linear_kl_divergence(H, W, H, 2 * W, chunk_rows=np.int32(2)), ref.kl(Z, 2 * Z).mean())
    stats = jaxent.linear_token_statistics(H, W, Y, chunk_rows=np.uint8(2), top_k=n(2))
    close(stats.top_log_probs, -np.sort(-ref.log_softmax(Z))[:, :2])
    assert jaxent.token_statistics(Z, Y, top_k=n(2)).top_classes.shape == (6, 2)
    close(jaxent.linear_gradient_norms(H, W, Y, chunk_rows=n(2)).residual, np.linalg.norm(DZ, axis=-1))
    close(jaxent.softmax_cross_entropy(Z, Y, ignore_index=n(3), axis=n(-1)), ref.nll(Z, Y)[1:].mean())
    product = jaxent.linear_ggn_vector_product(H, W, (H, None), chunk_rows=n(2))[0]
    close(product, ref.hessian_product(Z, Z) @ W.T / 6)
    assert jaxent.plan(n(32), n(8), n(16), chunk_rows=n(16)).num_chunks == 2
    assert jaxent.plan(32, 8, 16, chunk_rows=np.int32(16)) == jaxent.plan(32, 8, 16, chunk_rows=16)


@pytest.mark.parametrize("rows", [True, 2.0, "2"], ids=repr)
def test_chunk_rows_of_another_type(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"jaxent\.linear_softmax_cross_entropy: `chunk_rows` must"):
        jaxent.linear_softmax_cross_entropy(H, W, Y, chunk_rows=rows)


@pytest.mark.parametrize("dtype", ["bf16", "half precision", 7, None])
def test_invalid_dtypes(dtype: Any) -> None:
    for f, name in (
        (lambda: jaxent.plan(8, 8, 8, dtype=dtype), "plan"),
        (lambda: nn.softmax(Z, 1, dtype=dtype), "torch_compat.softmax"),
        (lambda: nn.log_softmax(Z, 1, dtype=dtype), "torch_compat.log_softmax"),
    ):
        if dtype is None:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"jaxent\.{name}: `dtype` must"):
            f()


# ----------------------------------------------------------------------------------------------------------------------
# Masks, counts, flags

MASK = np.array([1, 0, 1, 1, 0, 1])
ROW_MASKED: dict[str, Call] = {
    "softmax_cross_entropy": lambda m: jaxent.softmax_cross_entropy(Z, Y, where=m),
    "softmax_cross_entropy_gradient": lambda m: jaxent.softmax_cross_entropy_gradient(Z, Y, where=m),
    "nll_loss": lambda m: jaxent.nll_loss(Z, Y, where=m),
    "sigmoid_cross_entropy": lambda m: jaxent.sigmoid_cross_entropy(Z[:, 0], PROBABILITIES[:, 0], where=m),
    "token_statistics": lambda m: jaxent.token_statistics(Z, Y, where=m),
    "linear_softmax_cross_entropy": lambda m: jaxent.linear_softmax_cross_entropy(H, W, Y, where=m),
    "linear_token_statistics": lambda m: jaxent.linear_token_statistics(H, W, Y, where=m),
    "linear_kl_divergence": lambda m: jaxent.linear_kl_divergence(H, W, H, W, where=m),
    "linear_loss": lambda m: jaxent.linear_loss(user_rows, H, W, Y, where=m),
    "linear_gradient_norms": lambda m: jaxent.linear_gradient_norms(H, W, Y, where=m),
    "linear_ggn_vector_product": lambda m: jaxent.linear_ggn_vector_product(H, W, (H, None), where=m),
    "ggn_vector_product": lambda m: jaxent.ggn_vector_product(lambda z: z, Z, Z, where=m),
    "fisher_vector_product": lambda m: jaxent.fisher_vector_product(lambda z: z, Z, Y, Z, where=m),
    "gradient_noise_scale": lambda m: jaxent.gradient_noise_scale(np.ones(6, np.float32), 0.5, where=m),
    "diagnose": lambda m: jaxent.diagnose(Z, Y, where=m),
    "entropy": lambda m: jaxent.entropy(PROBABILITIES[:, :6], where=m),
    "kl_divergence": lambda m: jaxent.kl_divergence(PROBABILITIES[:, :6], PROBABILITIES[:, :6], where=m),
    "entropy_with_logits": lambda m: jaxent.entropy_with_logits(Z[:, :6], where=m),
}


@pytest.mark.parametrize("name", ROW_MASKED)
def test_an_attention_mask_of_integers(name: str) -> None:
    for dtype in (np.int32, np.float32):
        with pytest.raises(TypeError, match=rf"jaxent\.{name}: `where` must .*astype\(bool\)"):
            ROW_MASKED[name](MASK.astype(dtype))


COUNTS = np.array([[3, 5, 2], [1, 0, 4]])
MEASURES: dict[str, Call] = {
    "entropy": jaxent.entropy,
    "perplexity": jaxent.perplexity,
    "renyi_entropy": lambda p: jaxent.renyi_entropy(p, 2),
    "tsallis_entropy": lambda p: jaxent.tsallis_entropy(p, 2),
    "cross_entropy": lambda p: jaxent.cross_entropy(p, p),
    "kl_divergence": lambda p: jaxent.kl_divergence(p, p),
    "jensen_shannon_divergence": lambda p: jaxent.jensen_shannon_divergence(p, p),
    "renyi_divergence": lambda p: jaxent.renyi_divergence(p, p, 2),
    "joint_entropy": jaxent.joint_entropy,
    "conditional_entropy": jaxent.conditional_entropy,
    "mutual_information": jaxent.mutual_information,
    "self_information": jaxent.self_information,
}


@pytest.mark.parametrize("name", MEASURES)
def test_counts_in_place_of_probabilities(name: str) -> None:
    for counts in (COUNTS, jnp.asarray(COUNTS)):
        with pytest.raises(TypeError, match=rf"jaxent\.{name}: `\w+` must .*counts / counts\.sum\(\)"):
            MEASURES[name](counts)


FLAGS = np.array([True, False, True, True, False, True])
WEIGHED: dict[str, Call] = {
    "softmax_cross_entropy": lambda w: jaxent.softmax_cross_entropy(Z, Y, weights=w),
    "of probabilities": lambda w: jaxent.softmax_cross_entropy(Z, PROBABILITIES, weights=w),
    "softmax_cross_entropy_gradient": lambda w: jaxent.softmax_cross_entropy_gradient(Z, Y, weights=w),
    "nll_loss": lambda w: jaxent.nll_loss(-np.abs(Z), Y, weights=w),
    "sigmoid_cross_entropy": lambda w: jaxent.sigmoid_cross_entropy(Z[:, 0], PROBABILITIES[:, 0], weights=w),
    "linear_softmax_cross_entropy": lambda w: jaxent.linear_softmax_cross_entropy(H, W, Y, weights=w),
    "linear_kl_divergence": lambda w: jaxent.linear_kl_divergence(H, W, H, 2 * W, weights=w),
    "linear_loss": lambda w: jaxent.linear_loss(user_rows, H, W, Y, weights=w),
    "linear_gradient_norms": lambda w: jaxent.linear_gradient_norms(H, W, Y, weights=w).kernel,
    "ggn_vector_product": lambda w: jaxent.ggn_vector_product(lambda z: z, Z, Z, weights=w),
    "empirical_distribution": lambda w: jaxent.empirical_distribution(Y, 8, weights=w),
    "EmpiricalRisk": lambda w: jaxent.EmpiricalRisk().update(H[:, 0], w).mean(),
    "class_weights": lambda w: jaxent.softmax_cross_entropy(Z[:, :6], Y % 6, class_weights=w),
    "pos_weight": lambda w: jaxent.sigmoid_cross_entropy(Z[:, :6], PROBABILITIES[:, :6], pos_weight=w),
    "twin weight": lambda w: nn.cross_entropy(Z[:, :6], Y % 6, w),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_bool_weights_count_as_0_and_1(name: str) -> None:
    f = WEIGHED[name]
    want = f(FLAGS.astype(np.float32))
    close(f(FLAGS), want, rtol=1e-6)
    if name in ("softmax_cross_entropy", "linear_softmax_cross_entropy", "EmpiricalRisk"):
        close(jax.jit(f)(jnp.asarray(FLAGS)), want)


def test_labels_of_images_with_classes_last() -> None:
    """In PyTorch's layout the classes lie on axis 1."""
    z, labels = np.zeros((2, 4, 5, 3), np.float32), np.zeros((2, 4, 5), np.int32)
    for f in (nn.cross_entropy, nn.CrossEntropyLoss(), nn.nll_loss, nn.NLLLoss()):
        with pytest.raises(ValueError, match=r"(?s)jaxent\.torch_compat\.\w+: `target` must .*axis 1"):
            f(z, labels)
        f(np.moveaxis(z, -1, 1), labels)
    with pytest.raises(ValueError, match=r"(?s)`target` must .*axis 1"):
        nn.cross_entropy(z, np.zeros((2, 4, 5, 4), np.float32))
