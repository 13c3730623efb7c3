"""Losses over eight devices: automatic, explicit and manual meshes give what one device gives, and send little."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from cases import FAST, run
from collectives import collectives, foreign
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CASES,
    CLASSES,
    FEATURES,
    KINDS,
    MESHES,
    SHARDABLE,
    TOP,
    arrays,
    compiled,
    linear_ggn_vector_product,
    linear_kl_divergence,
    linear_softmax_cross_entropy,
    linear_token_statistics,
    make_mesh,
    placed,
    softmax_cross_entropy,
    unsharded,
)

import jaxent


def grid() -> list[Any]:
    """Outside `slow`: two losses in all three ways on both axes of a mesh, the others in one of the ways, and on meshes
    of which one axis is all.
    """
    rows = []
    for at, case in enumerate(CASES):
        kinds = [kind for kind in KINDS if kind != "manual" or case in SHARDABLE]
        for place, (shape, kind) in enumerate(itertools.product(MESHES, kinds)):
            if case.endswith("smoothed"):
                usual = shape != "2x4" and place % len(kinds) == (at + place // len(kinds)) % len(kinds)
            else:
                usual = shape == "2x4" and (case in ("dense", "linear") or kind == kinds[at % len(kinds)])
            rows.append(pytest.param(case, shape, kind, marks=() if usual else pytest.mark.slow))
    return rows


def assert_same(got: Any, want: Any) -> None:
    """Equal but for sums in another order, measured against the largest entry."""

    def check(a: Any, b: Any) -> None:
        if b.dtype == np.int32:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b), initial=1e-3))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(check, got, want)


@pytest.mark.rows(4)
@pytest.mark.parametrize(("case", "shape", "kind"), grid())
def test_value_gradient_and_hessian_product(case: str, shape: str, kind: str):
    program = compiled(case, shape, kind)
    args = placed(case, make_mesh(shape, kind))
    got = program(*args)
    assert_same(got, unsharded(case))
    _, gradient, product = got
    for name, parameter, *results in zip(CASES[case].wanted, args, gradient, product, strict=False):
        for result in results[: 1 if case == "nll" else 2]:  # which is linear: its Hessian product is a constant
            assert result.sharding.is_equivalent_to(parameter.sharding, result.ndim), name
    assert foreign(collectives(program), *MESHES[shape]) == []


# ----------------------------------------------------------------------------------------------------------------------
# Explicit meshes beyond the grid


def on(mesh: jax.sharding.Mesh, name: str, spec: P | None = None) -> jax.Array:
    x, usual = arrays()[name]
    return jax.device_put(x, NamedSharding(mesh, usual if spec is None else spec))


@pytest.mark.grid
def test_a_batch_split_over_several_axes_stays_where_it_is():
    mesh, spec = make_mesh("2x4", "explicit"), P("data", "vocab")
    h = jax.device_put(arrays()["h"][0].reshape(8, 20, FEATURES), NamedSharding(mesh, spec))
    y = jax.device_put(arrays()["y"][0].reshape(8, 20), NamedSharding(mesh, spec))
    w = on(mesh, "w", P())

    def losses(h: Any, w: Any, y: Any) -> Any:
        rows = linear_softmax_cross_entropy(h, w, y, chunk_rows=9, reduction="none")
        by = jax.grad(lambda h, w: linear_softmax_cross_entropy(h, w, y, chunk_rows=9), argnums=(0, 1))(h, w)
        return rows, by, linear_token_statistics(h, w, np.abs(arrays()["y"][0]).reshape(8, 20) % CLASSES, top_k=2)

    want = run(losses, *(np.asarray(x) for x in (h, w, y)))
    program = jax.jit(losses).lower(h, w, y).compile(FAST)
    got = program(h, w, y)
    assert_same(got, want)
    for x in (got[0], got[1][0], got[2].rank):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    sent = collectives(program)
    assert [c for c in sent if c.kind != "all-reduce"] == []
    assert {c.extent for c in sent} <= {(), (FEATURES, CLASSES)}
    # Labels of the host, outside jit, where `shard_map` takes no array without a mesh.
    assert_same(linear_softmax_cross_entropy(h, w, np.asarray(y), chunk_rows=9, reduction="none"), want[0])


@pytest.mark.grid
def test_without_jit_and_with_labels_of_the_host():
    mesh = make_mesh("2x4", "explicit")
    y, c, where = (arrays()[name][0] for name in ("y", "c", "where"))
    options = {"where": where, "label_smoothing": 0.125}
    z, h, w = (on(mesh, name) for name in ("z", "h", "w"))

    def unsharded_ones(z: Any, h: Any, w: Any, y: Any, c: Any) -> Any:
        dense = softmax_cross_entropy(z, y, class_weights=c, **options)
        linear = linear_softmax_cross_entropy(h, w, y, class_weights=c, reduction="sum", **options)
        return dense, linear, jaxent.softmax_cross_entropy_gradient(z, y)

    gradient = jaxent.softmax_cross_entropy_gradient(z, y)
    assert gradient.sharding == z.sharding
    dense = softmax_cross_entropy(z, y, class_weights=c, **options)
    linear = linear_softmax_cross_entropy(h, w, y, class_weights=on(mesh, "c"), reduction="sum", **options)
    assert_same((dense, linear, gradient), run(unsharded_ones, *(arrays()[name][0] for name in "zhw"), y, c))


@pytest.mark.grid
def test_vmap_over_an_axis_that_is_split():
    mesh = make_mesh("2x4", "explicit")
    h = jax.device_put(arrays()["h"][0].reshape(4, 40, FEATURES), NamedSharding(mesh, P("data")))
    y = jax.device_put(arrays()["labels"][0].reshape(4, 40), NamedSharding(mesh, P("data")))

    def gradients(h: Any, w: Any, y: Any) -> Any:
        def one(h: Any, y: Any) -> Any:
            loss = jax.value_and_grad(linear_softmax_cross_entropy, argnums=(0, 1))(h, w, y, chunk_rows=16)
            return loss, linear_softmax_cross_entropy(h, w, y, reduction="none")

        return jax.vmap(one)(h, y)

    with jax.set_mesh(mesh):  # without it jax 0.12 cannot even map `jnp.where(y == 0, 0.0, 1.0)`
        got = run(gradients, h, on(mesh, "w"), y)
    assert_same(got, run(gradients, np.asarray(h), arrays()["w"][0], np.asarray(y)))
    assert got[0][1][1].sharding.spec == P("data", None, "vocab")


def test_classes_split_over_two_axes():
    mesh = make_mesh("2x4", "explicit")
    w, c = on(mesh, "w", P(None, ("vocab", "data"))), on(mesh, "c", P(("vocab", "data")))
    h, y = arrays()["h"][0], arrays()["y"][0]

    def gradients(h: Any, w: Any, y: Any, c: Any) -> Any:
        return jax.grad(linear_softmax_cross_entropy, argnums=(0, 1))(h, w, y, class_weights=c)

    got = run(gradients, h, w, y, c)
    assert_same(got, run(gradients, h, arrays()["w"][0], y, arrays()["c"][0]))
    assert got[1].sharding == w.sharding


# ----------------------------------------------------------------------------------------------------------------------
# Vocabularies that the axis does not divide


def test_an_uneven_vocabulary_under_automatic_sharding():
    mesh, uneven = make_mesh("2x4", "automatic"), CLASSES - 2
    h, w = on(mesh, "h"), arrays()["w"][0][:, :uneven]
    y = arrays()["labels"][0] % uneven

    def step(h: Any, w: Any) -> Any:
        gradient = jax.value_and_grad(linear_softmax_cross_entropy, argnums=1)(h, w, y, label_smoothing=0.125)
        return gradient, linear_token_statistics(h, w, y, top_k=TOP)

    def split(h: Any, w: Any) -> Any:
        return step(h, jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, "vocab"))))

    assert_same(run(split, h, w), run(step, np.asarray(h), w))


@pytest.mark.grid
def test_an_uneven_vocabulary_is_padded_with_classes_of_bias_minus_infinity():
    mesh, uneven = make_mesh("2x4", "automatic"), CLASSES - 2
    real = np.arange(CLASSES) < uneven
    h, w, y = arrays()["h"][0], arrays()["w"][0], arrays()["labels"][0] % uneven
    b = np.where(real, arrays()["b"][0], -np.inf).astype(np.float32)
    c = np.where(real, arrays()["c"][0], 0).astype(np.float32)

    def loss(h: Any, w: Any, b: Any, c: Any, t: float, **axis: Any) -> Any:
        """Without smoothing and with it, which spreads over `CLASSES` classes instead of `uneven` ones."""
        plain = linear_softmax_cross_entropy(h, w, y, bias=b, z_loss=0.25, **axis)
        options = {"class_weights": c, "label_smoothing": 1 - (1 - 0.125) / t, "z_loss": 0.25 / t}
        return plain + t * linear_softmax_cross_entropy(h, w, y, bias=b, **options, **axis)

    def part(*args: Any) -> Any:
        return loss(*args, t=1 - 0.125 + 0.125 * CLASSES / uneven, vocab_axis="vocab")

    split = (P(), P(None, "vocab"), P("vocab"), P("vocab"))
    spread = jax.shard_map(part, mesh=mesh, in_specs=split, out_specs=P())
    every = (0, 1, 2, 3)
    value, (by_h, *padded) = run(jax.value_and_grad(spread, argnums=every), h, w, b, c)
    by_w, by_b, by_c = (x[..., :uneven] for x in padded)
    unpadded = h, w[:, :uneven], b[:uneven], c[:uneven]
    want = run(jax.value_and_grad(lambda *args: loss(*args, t=1.0), argnums=every), *unpadded)
    assert_same((value, (by_h, by_w, by_b, by_c)), want)
    assert not np.any(padded[0][:, uneven:])
    assert not np.any(padded[1][uneven:])


# ----------------------------------------------------------------------------------------------------------------------
# Errors


WHOLE = P()


def manual(f: Any, *specs: P, out: P = WHOLE) -> Any:
    mesh = make_mesh("2x4", "manual")
    return lambda *args: jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out)(*args)


def call(name: str, **options: Any) -> Any:
    """The loss of that name as a function of its logits, or of hidden and kernel, and of its labels."""
    return lambda *args, **more: getattr(jaxent, name)(*args, **options, **more)


DENSE = ("softmax_cross_entropy", "softmax_cross_entropy_gradient", "token_statistics")
LINEAR = ("linear_softmax_cross_entropy", "linear_token_statistics", "linear_gradient_norms")
GATHERED = LINEAR[:2]  # take hidden states that were gathered over the vocabulary axis


@pytest.mark.parametrize("name", DENSE + LINEAR)
def test_manual_axes_that_do_not_fit(name: str):
    linear = name in LINEAR
    x = [arrays()[n][0] for n in (("h", "w") if linear else ("z",))]
    y = arrays()["labels"][0]
    labels = "labels" if "statistics" in name else "targets"
    split = (P(), P(None, "vocab")) if linear else (P(None, "vocab"),)
    whole = (P(),) * len(split)
    with pytest.raises(ValueError, match=rf"jaxent\.{name}: `vocab_axis` must name a mesh axis .* got 'model'"):
        manual(call(name, vocab_axis="model"), *split, P())(*x, y)
    with jax.set_mesh(make_mesh("2x4", "explicit")), pytest.raises(ValueError, match=r"outside shard_map leave it out"):
        call(name, vocab_axis="vocab")(*x, y)
    with pytest.raises(
        ValueError, match=rf"jaxent\.{name}: `{labels}` must be the same on all devices of `vocab_axis`"
    ):
        manual(call(name, vocab_axis="vocab"), *split, P("vocab"))(*x, y)
    if linear:
        hidden = "`hidden` must be the same on all devices of `vocab_axis`.*pmean"
        with pytest.raises(ValueError, match=f"`{labels}` must have shape" if name in GATHERED else hidden):
            manual(call(name, vocab_axis="vocab"), P("vocab"), P(None, "vocab"), P())(*x, y)
    which = "kernel" if linear else "logits"
    with pytest.raises(ValueError, match=rf"jaxent\.{name}: `{which}` must hold each device's own classes"):
        manual(call(name, vocab_axis="vocab"), *whole, P())(*x, y)


def test_hidden_states_split_over_the_vocabulary_axis():
    """Without labels there is no number of rows to compare theirs with."""
    specs = (P("vocab"), P(None, "vocab"))
    for name, function in (
        ("linear_kl_divergence", lambda h, w: linear_kl_divergence(h, w, h, w, vocab_axis="vocab")),
        ("linear_token_statistics", lambda h, w: linear_token_statistics(h, w, vocab_axis="vocab").entropy),
        ("linear_ggn_vector_product", lambda h, w: linear_ggn_vector_product(h, w, (h, w), vocab_axis="vocab")),
    ):
        with pytest.raises(ValueError, match=rf"jaxent\.{name}: `hidden(_p)?` must be the same on all devices"):
            manual(function, *specs)(arrays()["h"][0], arrays()["w"][0])


@pytest.mark.grid
def test_hidden_states_gathered_over_the_vocabulary_axis():
    """Sequence parallelism (Korthikanti et al., 2022): the gradient is summed as it goes back to its rows."""
    h, w, y = (arrays()[n][0] for n in ("h", "w", "labels"))
    y = np.abs(y)  # -100 is no label of the statistics

    def log_likelihood(*args: Any, **options: Any) -> jax.Array:
        log_prob = linear_token_statistics(*args, **options).log_prob
        assert log_prob is not None
        return jax.numpy.mean(log_prob)

    for loss in (linear_softmax_cross_entropy, log_likelihood):

        def part(h: jax.Array, w: jax.Array, y: jax.Array, loss: Any = loss) -> jax.Array:
            return loss(jax.lax.all_gather(h, "vocab", tiled=True), w, y, vocab_axis="vocab")

        f = jax.value_and_grad(manual(part, P("vocab"), P(None, "vocab"), P()), (0, 1))
        program = jax.jit(f).lower(h, w, y).compile()
        assert_same(program(h, w, y), jax.value_and_grad(loss, (0, 1))(h, w, y))
        assert "reduce-scatter(" in (program.as_text() or "")


def test_explicit_splits_that_do_not_fit():
    mesh = make_mesh("2x4", "explicit")

    def names(f: Any, *args: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            f(*args)
        with pytest.raises(ValueError, match=match):
            jax.jit(f)(*args)

    z, h, w = (on(mesh, name) for name in ("z", "h", "w"))
    y, along_vocab = on(mesh, "labels"), on(mesh, "labels", P("vocab"))
    for name, args in (("softmax_cross_entropy", (z,)), ("nll_loss", (z,)), ("linear_softmax_cross_entropy", (h, w))):
        labels = "labels" if name == "nll_loss" else "targets"
        names(call(name), *args, along_vocab, match=rf"jaxent\.{name}: `{labels}` must be whole .*160@vocab")
    weights = on(mesh, "weights", P("vocab"))
    names(
        lambda *a: linear_softmax_cross_entropy(*a[:-1], weights=a[-1]),
        h,
        w,
        y,
        weights,
        match="`weights` must be whole",
    )
    both = r"jaxent.linear_softmax_cross_entropy: `hidden` and `kernel` must "
    loss = call("linear_softmax_cross_entropy")
    names(loss, on(mesh, "h", P("vocab")), w, y, match=both + "be split over different mesh axes")
    classes = on(mesh, "c", P("data"))
    names(lambda *a: loss(*a[:-1], class_weights=a[-1]), h, w, y, classes, match="`class_weights` must be split over")
    kl = jaxent.linear_kl_divergence
    names(kl, h, w, on(mesh, "h2", P()), on(mesh, "w2"), match="`hidden_p` and `hidden_q` must be split over the same")
    names(kl, h, w, on(mesh, "h2"), on(mesh, "w2", P()), match="`kernel_p` and `kernel_q` must be split over the same")
