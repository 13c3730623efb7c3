"""What holds between the measures, whatever the distributions: hypothesis looks for a counterexample."""

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jaxent as info

CLASSES = 4
check = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Distributions are multiples of 2**-16 that sum to exactly one, so that the identities hold exactly for the given
# numbers. All have one shape, so that each measure is compiled once.
_parts = st.integers(0, 2**16)


def _distribution(cuts: list[int], size: int) -> np.ndarray:
    edges = [0, *sorted(cuts), 2**16]
    return (np.diff(edges) / 2**16).astype(np.float32)[:size]


def distributions(size: int = CLASSES) -> st.SearchStrategy[np.ndarray]:
    """Any distribution, with classes of probability 0 among the first that are tried."""
    return st.lists(_parts, min_size=size - 1, max_size=size - 1).map(lambda cuts: _distribution(cuts, size))


def joints() -> st.SearchStrategy[np.ndarray]:
    return distributions(3 * CLASSES).map(lambda p: p.reshape(3, CLASSES))


def logits() -> st.SearchStrategy[np.ndarray]:
    """On a grid of 2**-6, so that shifting by a power of two is exact."""
    grid = st.integers(-(2**12), 2**12).map(lambda n: n / 64)
    return st.lists(grid, min_size=CLASSES, max_size=CLASSES).map(lambda z: np.array(z, np.float32))


@functools.cache
def compiled(name: str, **options: Any) -> Any:
    return jax.jit(functools.partial(getattr(info, name), **options))


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance)


entropy, cross_entropy, kl, js = (
    compiled(name) for name in ("entropy", "cross_entropy", "kl_divergence", "jensen_shannon_divergence")
)


@check
@given(distributions())
def test_entropy_lies_between_0_and_log_c(p: np.ndarray):
    h = float(entropy(p))
    assert 0 <= h <= np.log(CLASSES) * (1 + 1e-6)
    assert (h == 0) == (p.max() == 1)


@check
@given(distributions(), distributions())
def test_divergences_are_0_only_between_equals(p: np.ndarray, q: np.ndarray):
    """Nearly equal too: `q` moves by the smallest step that keeps its sum."""
    nearly = p.copy()
    nearly[np.argmax(p)] -= 2.0**-16
    nearly[np.argmin(p)] += 2.0**-16
    for other in (q, nearly):
        for divergence in (kl, js, compiled("renyi_divergence", order=2.0)):
            assert divergence(p, other) > 0 or np.array_equal(p, other)
    for divergence in (kl, js, compiled("renyi_divergence", order=2.0)):
        assert divergence(p, p) == 0


@check
@given(distributions(), distributions())
def test_cross_entropy_is_entropy_plus_divergence(p: np.ndarray, q: np.ndarray):
    close(cross_entropy(p, q), entropy(p) + kl(p, q))


@check
@given(distributions(), distributions())
def test_jensen_shannon_is_symmetric_and_bounded(p: np.ndarray, q: np.ndarray):
    close(js(p, q), js(q, p), 3e-7)
    assert 0 <= js(p, q) <= np.log(2) * (1 + 1e-6)
    close(js(p, q), entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


@pytest.mark.grid
@check
@given(distributions(), distributions())
def test_renyi_is_monotone_in_the_order(p: np.ndarray, q: np.ndarray):
    orders = (0.0, 0.5, 1.0, 1.0 + 1e-6, 2.0, float("inf"))
    entropies = [float(compiled("renyi_entropy", order=a)(p)) for a in orders]
    divergences = [float(compiled("renyi_divergence", order=a)(p, q)) for a in orders]
    for i in range(len(orders) - 1):
        assert entropies[i] >= entropies[i + 1] - 1e-6
        assert divergences[i] <= divergences[i + 1] * (1 + 1e-6) + 1e-6


@check
@given(joints())
def test_chain_rule_and_mutual_information(p: np.ndarray):
    p_x, p_y = p.sum(axis=1), p.sum(axis=0)
    joint, mutual = compiled("joint_entropy")(p), compiled("mutual_information")(p)
    y_given_x, x_given_y = (compiled("conditional_entropy", axis=axis)(p) for axis in (-2, -1))
    h_x = compiled("entropy", axis=-1)(p_x)
    close(joint, h_x + y_given_x)
    close(joint, entropy(p_y) + x_given_y)
    close(mutual, h_x - x_given_y, 2e-6)
    close(mutual, entropy(p_y) - y_given_x, 2e-6)
    close(mutual, compiled("mutual_information")(p.T))
    assert mutual >= 0
    assert y_given_x >= 0
    close(mutual, kl(p.ravel(), np.outer(p_x, p_y).ravel()), 2e-6)


@check
@given(distributions(), distributions(), st.lists(distributions(3), min_size=CLASSES, max_size=CLASSES))
def test_processing_data_adds_no_information(p: np.ndarray, q: np.ndarray, rows: list[np.ndarray]):
    """The divergence of two sources does not grow in a channel, nor does what its output tells of the input."""
    channel = np.stack(rows)
    for divergence in (kl, js):
        assert divergence(p @ channel, q @ channel) <= divergence(p, q) * (1 + 1e-5) + 1e-6
    mutual = compiled("mutual_information")
    through = p[:, None] * channel
    merged = through @ np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert mutual(merged) <= mutual(through) + 1e-6


@check
@given(distributions(), distributions(), st.lists(st.booleans(), min_size=CLASSES, max_size=CLASSES))
def test_masking_is_deleting(p: np.ndarray, q: np.ndarray, mask: list[bool]):
    """As deleting changes the shape, setting both to 0 stands for it; `test_information` deletes."""
    where = np.array(mask)
    masked = [np.where(where, x, 0).astype(np.float32) for x in (p, q)]
    for name in ("cross_entropy", "kl_divergence", "jensen_shannon_divergence"):
        assert compiled(name)(p, q, where=where) == compiled(name)(*masked)
    assert entropy(p, where=where) == entropy(masked[0])


@check
@given(logits(), logits(), st.sampled_from([-(2.0**13), -50.0, 2.0**13]))
def test_adding_a_constant_to_logits_changes_nothing(z_p: np.ndarray, z_q: np.ndarray, shift: float):
    moved = [z + np.float32(s) for z, s in ((z_p, shift), (z_q, -shift))]
    assert compiled("entropy_with_logits")(z_p) == compiled("entropy_with_logits")(moved[0])
    for name in ("kl_divergence_with_logits", "cross_entropy_with_logits"):
        assert compiled(name)(z_p, z_q) == compiled(name)(*moved)
    assert compiled("kl_divergence_with_logits")(z_p, moved[0]) == 0


@check
@given(logits(), logits())
def test_logits_and_their_probabilities_agree(z_p: np.ndarray, z_q: np.ndarray):
    p, q = (np.asarray(jnp.exp(-compiled("self_information_with_logits")(z))) for z in (z_p, z_q))
    close(compiled("entropy_with_logits")(z_p), entropy(p), 2e-5)
    for name in ("kl_divergence", "cross_entropy"):
        from_logits = compiled(f"{name}_with_logits")(z_p, z_q)
        # Below the smallest normal number `q` is 0, and the divergence of the probabilities infinite.
        if q.min() > 1e-37:
            close(from_logits, compiled(name)(p, q), 2e-5)
        assert 0 <= from_logits < np.inf


MEASURES = [
    functools.partial(info.renyi_entropy, order=2),
    info.kl_divergence,
    info.kl_divergence_with_logits,
]


@pytest.mark.parametrize("measure", MEASURES)
def test_batch_is_vmap_is_loop(measure: Any, rng: np.random.Generator):
    p, q = (rng.dirichlet(np.ones(5), size=(2, 3)).astype(np.float32) for _ in range(2))
    arguments = (p,) if isinstance(measure, functools.partial) else (p, q)
    batched = measure(*arguments)
    mapped = jax.jit(jax.vmap(jax.vmap(measure)))(*arguments)
    looped = np.array([[measure(*(x[i, j] for x in arguments)) for j in range(3)] for i in range(2)])
    np.testing.assert_allclose(mapped, batched, rtol=1e-6)
    np.testing.assert_allclose(looped, batched, rtol=1e-6)
    per_row = jax.jit(jax.vmap(jax.vmap(jax.grad(measure))))(*arguments)
    total = jax.jit(jax.grad(lambda *x: measure(*x).sum()))(*arguments)
    np.testing.assert_allclose(per_row, total, rtol=1e-5, atol=1e-6)
