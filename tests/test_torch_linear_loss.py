"""The linear loss of `jaxent.torch_compat`: derivatives that PyTorch's chunks refuse, chunks as PyTorch cuts them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

from jaxent import torch_compat

nn: Any = torch_compat  # as people write it; untyped, since tables of options are dictionaries


def linear_case(
    rng: np.random.Generator, places: tuple[int, ...], targets: str
) -> tuple[Any, Any, Any, dict[str, Any]]:
    target = rng.integers(0, 3, size=(4, *places))
    if targets == "probabilities":
        target = np.moveaxis(rng.dirichlet(np.ones(3), size=(4, *places)), -1, 1)
    h, w = rng.normal(size=(4, 2)), rng.normal(size=(3, *places, 2))
    return (
        h,
        w,
        target,
        {"linear_bias": rng.normal(size=(3, *places)), "weight": rng.uniform(0.5, 2, 3), "label_smoothing": 0.125},
    )


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("places", "targets"), [((), "probabilities"), ((2,), "probabilities"), ((2, 1), "labels")])
def test_the_linear_loss_has_the_derivatives_that_pytorchs_chunks_refuse(
    places: tuple[int, ...], targets: str, rng: np.random.Generator
):
    h, w, target, options = linear_case(rng, places, targets)
    chunked = nn.LinearCrossEntropyOptions(batch_chunk_size=3)

    def streamed(h: Any, w: Any, bias: Any) -> jax.Array:
        return nn.linear_cross_entropy(h, w, target, **options | {"linear_bias": bias}, options=chunked)

    def dense(h: Any, w: Any, bias: Any) -> jax.Array:
        z = jnp.einsum("nd,c...d->nc...", h, w) + bias[None]
        rest = {k: v for k, v in options.items() if k != "linear_bias"}
        return nn.cross_entropy(z, target, **rest)

    at = (h, w, options["linear_bias"])
    steps = tuple(rng.normal(size=x.shape) for x in at)
    both = [jax.jit(lambda f=f: jax.jvp(jax.value_and_grad(f, (0, 1, 2)), at, steps))() for f in (streamed, dense)]
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_chunks_as_pytorch_cuts_them():
    sizes = (8192, 4096, 128256)
    table: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"batch_chunk_size": 1000}, 1000),
        ({"batch_chunk_size": 10**6}, 8192),
        ({"chunking_method": None}, 8192),
        ({"chunking_method": "aspect_ratio"}, 256),
        ({"chunking_method": "aspect_ratio:2"}, 128),
        ({"chunking_method": "aspect_ratio:1000"}, 1),
        ({"chunking_method": "aspect_ratio:2", "batch_chunk_size": 128, "acc_policy": "compact"}, 128),
    ]
    for options, want in table:
        assert nn.LinearCrossEntropyOptions(**options).chunk_rows(*sizes) == want, options
    with pytest.raises(ValueError, match="agree"):
        nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio", batch_chunk_size=7).chunk_rows(*sizes)
    for wrong in ({"batch_chunk_size": 0}, {"chunking_method": "aspect_ratio:x"}, {"acc_policy": "fast"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            nn.LinearCrossEntropyOptions(**wrong)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_of_all_rows_are_never_held(reduction: str, rng: np.random.Generator):
    h, w, target, options = linear_case(rng, (7,), "labels")

    def loss(h: Any, w: Any) -> jax.Array:
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        return jnp.sum(nn.linear_cross_entropy(h, w, target, **options, reduction=reduction, options=chunks))

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, w))
    assert "[2,3,7]" in program
    assert not any(shape in program for shape in ("[4,21]", "[4,3,7]"))


@pytest.mark.grid
def test_an_ignored_row_of_a_linear_loss_is_as_if_deleted(rng: np.random.Generator):
    h, w, target, options = linear_case(rng, (2,), "labels")
    target[1], target[3, 0] = -100, -100
    h[1] = np.nan
    kept = [0, 2, 3]
    gradient = jax.grad(functools.partial(nn.linear_cross_entropy, **options), (0, 1))
    by_h, by_w = gradient(h, w, target)
    want_h, want_w = gradient(h[kept], w, target[kept])
    assert np.all(by_h[1] == 0)
    assert_close(by_h[jnp.array(kept)], want_h, ulp=4, dtype=np.float32, size=1)
    assert_close(by_w, want_w, ulp=4, dtype=np.float32, size=1)
