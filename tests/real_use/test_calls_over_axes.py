"""Classes split over `vmap(axis_name=...)` or several mesh axes: right, or an error that names `vocab_axis`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_call import DZ, PROBABILITIES, Call, H, W, Y, Z, close, jaxent

# ----------------------------------------------------------------------------------------------------------------------
# vmap(axis_name=...) in place of devices

DENSE_PARTS = np.stack(np.split(Z, 2, axis=1))  # (2, N, C / 2)
KERNEL_PARTS = np.stack(np.split(W, 2, axis=1))
VMAPPED: dict[str, tuple[Call, np.ndarray, Any]] = {
    "softmax_cross_entropy": (
        lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v"),
        DENSE_PARTS,
        ref.nll(Z, Y).mean(),
    ),
    "none": (
        lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v", reduction="none"),
        DENSE_PARTS,
        ref.nll(Z, Y),
    ),
    "smoothed": (
        lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v", label_smoothing=0.5, z_loss=0.0),
        DENSE_PARTS,
        (0.5 * ref.nll(Z, Y) - 0.5 * ref.log_softmax(Z).mean(-1)).mean(),
    ),
    "token_statistics": (
        lambda z: jaxent.token_statistics(z, Y, vocab_axis="v").log_prob,
        DENSE_PARTS,
        -ref.nll(Z, Y),
    ),
    "entropy": (
        lambda z: jaxent.token_statistics(z, Y, vocab_axis="v").entropy,
        DENSE_PARTS,
        ref.entropy(PROBABILITIES),
    ),
    "linear_softmax_cross_entropy": (
        lambda w: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis="v"),
        KERNEL_PARTS,
        ref.nll(Z, Y).mean(),
    ),
    "linear none": (
        lambda w: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis="v", reduction="none"),
        KERNEL_PARTS,
        ref.nll(Z, Y),
    ),
    "linear_token_statistics": (
        lambda w: jaxent.linear_token_statistics(H, w, Y, vocab_axis="v").entropy,
        KERNEL_PARTS,
        ref.entropy(PROBABILITIES),
    ),
    "linear_kl_divergence": (
        lambda w: jaxent.linear_kl_divergence(H, w, H, 2 * w, vocab_axis="v"),
        KERNEL_PARTS,
        ref.kl(Z, 2 * Z).mean(),
    ),
    "linear_gradient_norms": (
        lambda w: jaxent.linear_gradient_norms(H, w, Y, vocab_axis="v").residual,
        KERNEL_PARTS,
        np.linalg.norm(DZ, axis=-1),
    ),
    "ggn by hidden": (
        lambda w: jaxent.linear_ggn_vector_product(H, w, (H, None), vocab_axis="v", reduction="sum")[0],
        KERNEL_PARTS,
        ref.hessian_product(Z, Z) @ W.T,
    ),
}


def or_error(f: Call) -> Any:
    """What it returns, or None where it says that it cannot."""
    try:
        return f()
    except (TypeError, ValueError, NotImplementedError) as error:
        assert "vocab_axis" in str(error), error  # noqa: PT017
        return None


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_in_place_of_devices(name: str) -> None:
    f, parts, want = VMAPPED[name]
    for run in (lambda g: g, jax.jit):
        got = or_error(lambda: run(jax.vmap(f, axis_name="v"))(parts))  # noqa: B023
        if got is not None:
            close(got, np.stack([want, want]), rtol=2e-5)


@pytest.mark.parametrize("route", ["dense", "linear", "closed form"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_gradients_under_vmap_in_place_of_devices(route: str, where: str) -> None:
    name = "softmax_cross_entropy" if route == "dense" else "linear_softmax_cross_entropy"
    f, parts, _ = VMAPPED[name]
    want = np.stack(np.split(DZ / 6 if route != "linear" else H.T @ DZ / 6, 2, axis=1))
    if route == "closed form":
        options = {"vocab_axis": "v"}
        got = or_error(
            lambda: jax.vmap(lambda z: jaxent.softmax_cross_entropy_gradient(z, Y, **options), axis_name="v")(
                DENSE_PARTS
            )
        )
    elif where == "inside":
        got = or_error(lambda: jax.vmap(jax.grad(f), axis_name="v")(parts))
    else:
        got = or_error(lambda: jax.grad(lambda parts: jax.vmap(f, axis_name="v")(parts)[0])(parts))
    if got is not None:
        close(got, want)


def test_vmap_over_a_batch_inside_shard_map_is_still_right() -> None:
    mesh = jax.make_mesh((4,), ("v",), axis_types=(AxisType.Auto,))
    f = lambda z: jax.vmap(lambda z: jaxent.softmax_cross_entropy(z, Y, vocab_axis="v"))(z)  # noqa: E731
    sharded = jax.shard_map(f, mesh=mesh, in_specs=P(None, None, "v"), out_specs=P())
    both = np.stack([Z, 2 * Z])
    close(jax.jit(sharded)(both), ref.nll(both, np.stack([Y, Y])).mean(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Several mesh axes for the vocabulary

SPLIT = P(None, ("a", "b"))
OVER_TWO_AXES: dict[str, tuple[Call, Any]] = {
    "softmax_cross_entropy": (
        lambda z, w, axis: jaxent.softmax_cross_entropy(z, Y, vocab_axis=axis),
        ref.nll(Z, Y).mean(),
    ),
    "token_statistics": (
        lambda z, w, axis: jaxent.token_statistics(z, Y, vocab_axis=axis, top_k=2).top_log_probs.sum(),
        -np.sort(-ref.log_softmax(Z))[:, :2].sum(),
    ),
    "linear_softmax_cross_entropy": (
        lambda z, w, axis: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis=axis, label_smoothing=0.5),
        (0.5 * ref.nll(Z, Y) - 0.5 * ref.log_softmax(Z).mean(-1)).mean(),
    ),
    "linear_token_statistics": (
        lambda z, w, axis: jaxent.linear_token_statistics(H, w, Y, vocab_axis=axis).entropy.sum(),
        ref.entropy(PROBABILITIES).sum(),
    ),
    "linear_kl_divergence": (
        lambda z, w, axis: jaxent.linear_kl_divergence(H, w, H, 2 * w, vocab_axis=axis),
        ref.kl(Z, 2 * Z).mean(),
    ),
    "linear_gradient_norms": (
        lambda z, w, axis: jaxent.linear_gradient_norms(H, w, Y, vocab_axis=axis).residual.sum(),
        np.linalg.norm(DZ, axis=-1).sum(),
    ),
}


@pytest.mark.parametrize("name", OVER_TWO_AXES)
def test_a_vocabulary_over_two_mesh_axes(name: str) -> None:
    f, want = OVER_TWO_AXES[name]
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def sharded(axis: Any, z: Any, w: Any) -> Any:
        g = jax.shard_map(lambda z, w: f(z, w, axis), mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=P())
        return jax.jit(g)(z, w)

    close(sharded(("a", "b"), Z, W), want)
    if name == "softmax_cross_entropy":
        close(jax.grad(lambda z: sharded(("a", "b"), z, W))(jnp.asarray(Z)), DZ / 6)
    if name == "linear_softmax_cross_entropy":
        wanted = H.T @ (ref.softmax(Z) - 0.5 * ref.onehot(Y, 8) - 0.5 / 8) / 6
        close(jax.grad(lambda w: sharded(("a", "b"), Z, w))(jnp.asarray(W)), wanted)


def test_a_tuple_of_one_mesh_axis() -> None:
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    f = lambda w: jaxent.linear_softmax_cross_entropy(H, w, Y, vocab_axis=("a",))  # noqa: E731
    close(jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(None, "a"), out_specs=P()))(W), ref.nll(Z, Y).mean())


@pytest.mark.parametrize("axis", [3, ("v", 3)], ids=str)
def test_a_vocab_axis_of_another_type(axis: Any) -> None:
    with pytest.raises(TypeError, match=r"jaxent\.softmax_cross_entropy: `vocab_axis` must"):
        jaxent.softmax_cross_entropy(Z, Y, vocab_axis=axis)
