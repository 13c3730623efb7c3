"""Bad input of the information measures: an error that names function, argument and what is expected."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measures import INF, NAN

import jaxent as info

P3, P4 = np.full(3, 1 / 3, np.float32), np.full(4, 0.25, np.float32)
BAD = {
    "counts": (
        info.entropy, (jnp.array([3, 5, 2]),), {}, TypeError,
        r"`p` must have a floating dtype \(a one-hot list as `\[0.0, 1.0\]`, counts as `counts / counts.sum\(\)`\)",
    ),
    "axis twice": (info.entropy, (np.ones((2, 3), "f4"),), {"axis": (0, -2)}, ValueError, r"none twice, got \(0, -2\)"),
    "no axis": (info.entropy, (P3,), {"axis": ()}, ValueError, r"`axis` must name at least one axis"),
    "axis None": (info.entropy, (P3,), {"axis": None}, TypeError, r"`axis` must be an int or a tuple of them, got N"),
    "weight": (
        info.jensen_shannon_divergence, (P3, P3), {"weight": 2}, ValueError, r"`weight` must lie in \[0, 1\], got 2",
    ),
    "distribution axis": (
        info.generalized_jensen_shannon_divergence, (np.ones((2, 3), "f4"),), {"distribution_axis": 1}, ValueError,
        r"`axis` must leave out `distribution_axis`, got -1 and 1",
    ),
    "one distribution": (
        info.generalized_jensen_shannon_divergence, (P3,), {}, ValueError, r"have a distribution axis and a class axis",
    ),
    "weights of distributions": (
        info.generalized_jensen_shannon_divergence, (np.ones((2, 3), "f4"),), {"weights": [1]}, ValueError,
        r"`weights` must have shape \(2,\)",
    ),
    "integers": (info.entropy, ([1, 0],), {}, TypeError, r"jaxent\.entropy: `p` must have a floating dtype .*got int"),
    "q of integers": (info.kl_divergence, (P3, [1, 0, 0]), {}, TypeError, r"`q` must have a floating dtype"),
    "text": (info.self_information, ("half",), {}, TypeError, r"self_information: `p` must have a floating dtype"),
    "a scalar": (info.entropy, (0.5,), {}, ValueError, r"entropy: `p` must have a class axis at -1, got float"),
    "no classes": (info.entropy, (P3[:0],), {}, ValueError, r"entropy: `p` must have at least one class"),
    "axis": (info.entropy, (P3,), {"axis": 1}, ValueError, r"entropy: `axis` must lie in \[-1, 1\)"),
    "axis of bool": (info.entropy, (P3,), {"axis": True}, TypeError, r"entropy: `axis` must be an int"),
    "where": (info.entropy, (P3,), {"where": P3}, TypeError, r"entropy: `where` must have dtype bool"),
    "where's shape": (
        info.kl_divergence, (P3, P3), {"where": [True, False]}, ValueError,
        r"`where` must broadcast to shape \(3,\), that of `p` and `q`, got bool\[2\]",
    ),
    "classes": (
        info.kl_divergence, (P3, P4), {}, ValueError,
        r"kl_divergence: `q` must have 3 classes at axis -1, as `p` has, got float32\[4\]",
    ),
    "one class is not broadcast": (info.kl_divergence, (P3, P3[:1]), {}, ValueError, r"`q` must have 3 classes"),
    "batch": (
        info.cross_entropy, (np.ones((2, 3), "f4"), np.ones((4, 3), "f4")), {}, ValueError,
        r"cross_entropy: `q` must broadcast against `p`, float32\[2,3\], got float32\[4,3\]",
    ),
    "logits": (info.kl_divergence_with_logits, (P3, P4), {}, ValueError, r"`q_logits` must have 3 classes"),
    "base of text": (info.entropy, (P3,), {"base": "two"}, TypeError, r"entropy: `base` must be a number, got 'two'"),
    "base of two numbers": (info.entropy, (P3,), {"base": [2, 3]}, ValueError, r"entropy: `base` must be a scalar"),
    "order": (info.renyi_entropy, (P3, -1), {}, ValueError, r"renyi_entropy: `order` must lie in \[0, inf\], got -1"),
    "order nan": (info.renyi_divergence, (P3, P3, NAN), {}, ValueError, r"renyi_divergence: `order` must lie in"),
    "order inf": (info.tsallis_entropy, (P3, INF), {}, ValueError, r"`order` must lie in \[0, inf\), got inf"),
    "order array": (
        info.renyi_entropy, (P3, jnp.float32(2)), {}, TypeError,
        r"renyi_entropy: `order` must be a Python number, known when the function is traced, got float32\[\]",
    ),
    "one variable": (info.joint_entropy, (P3,), {}, ValueError, r"joint_entropy: `pxy` must have two class axes"),
    "batch axis": (
        info.conditional_entropy, (np.ones((2, 3, 4), "f4"),), {"axis": 0}, ValueError,
        r"conditional_entropy: `axis` must be one of the last two of 3, got -3",
    ),
    "float labels": (info.empirical_distribution, (P3, 3), {}, TypeError, r"`labels` must have an integer dtype"),
    "num_classes": (info.empirical_distribution, ([0], 0), {}, ValueError, r"`num_classes` must be at least 1, got 0"),
    "num_classes of float": (info.empirical_distribution, ([0], 3.0), {}, TypeError, r"`num_classes` must be an int"),
    "weights": (info.empirical_distribution, ([0], 3), {"weights": P3}, ValueError, r"must have shape \(1,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    function, arguments, options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        function(*arguments, **options)


def test_a_base_of_the_host_is_checked_under_jit_too():
    for base in (0, 1, -2.0, INF):
        with pytest.raises(ValueError, match="entropy: `base` must be positive, finite and not 1, got"):
            jax.jit(lambda p, base=base: info.entropy(p, base=base))(P3)
    for base in (2**32 + 2, 2**40, np.int64(2**40)):
        want = info.entropy(P3) / math.log(float(base))
        np.testing.assert_allclose(info.entropy(P3, base=base), want, rtol=1e-6)
