"""Fully sharded data parallelism: a kernel whose features are split is gathered once per call, outside the loop."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST, covering, run
from collectives import collectives, large_in_loops
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import CASES, CLASSES, ROWS, Case, arrays, linear_softmax_cross_entropy, summed, with_derivatives
from test_sharding import assert_same

import jaxent
from benchmarks.collectives import Collective
from jaxent._mesh.apply import shard_map_rows

FEATURES, CHUNK = 16, 5


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the axes that split rows, features and classes."""

    mesh: dict[str, int]
    rows: tuple[str, ...]
    features: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def make(self, kind: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh(tuple(self.mesh.values()), tuple(self.mesh), axis_types=(kind,) * len(self.mesh))

    def spec(self, name: str) -> P:
        if name in ("w", "w2"):
            return P(self.features, self.classes)
        usual = arrays()[name][1]
        return P(*(self.rows if axis == "data" else self.classes for axis in usual))

    def size(self, *axes: str) -> int:
        return math.prod(self.mesh[axis] for axis in axes)


LAYOUTS = {
    "fsdp": Layout({"fsdp": 8}, ("fsdp",), ("fsdp",)),
    "fsdp x vocab": Layout({"fsdp": 2, "vocab": 4}, ("fsdp",), ("fsdp",), ("vocab",)),
    "data x fsdp": Layout({"data": 2, "fsdp": 4}, ("data", "fsdp"), ("fsdp",)),
    "features over an axis without rows": Layout({"data": 2, "other": 4}, ("data",), ("other",)),
    "features over one with and one without": Layout({"data": 2, "other": 4}, ("data",), ("data", "other")),
}
MANUAL = tuple(LAYOUTS)[:3]


@functools.cache
def array(name: str) -> np.ndarray:
    x = arrays()[name][0]
    shapes = {"h": (ROWS, FEATURES), "h2": (ROWS, FEATURES), "w": (FEATURES, CLASSES), "w2": (FEATURES, CLASSES)}
    if name in shapes:
        x = np.random.default_rng(sorted(shapes).index(name)).normal(size=shapes[name]).astype(np.float32)
    return x


def placed(layout: Layout, mesh: jax.sharding.Mesh, names: tuple[str, ...]) -> list[jax.Array]:
    return [jax.device_put(array(name), NamedSharding(mesh, layout.spec(name))) for name in names]


def norms(call: Callable[..., Any], data: Any) -> tuple[jax.Array, Any]:
    found = call()
    return summed(sum(jnp.sum(x) for x in found), data), found


LINEAR = {name: CASES[name] for name in ("linear", "linear_rows", "linear_statistics", "divergence", "own")} | {
    "norms": Case(jaxent.linear_gradient_norms, ("h", "w", "y"), ("h", "w"), {"weights": "weights"}, {}, norms)
}
LINEAR = {
    name: dataclasses.replace(case, constants=case.constants | {"chunk_rows": CHUNK}) for name, case in LINEAR.items()
}


@functools.cache
def whole(case: str) -> Any:
    """On one device."""
    call = LINEAR[case]
    f = with_derivatives(functools.partial(call, None, {}), len(call.wanted))
    return run(f, *(array(name) for name in call.names))


def check(case: str, layout: Layout, loss: Callable[..., Any], args: list[jax.Array]) -> None:
    wanted = LINEAR[case].wanted
    program = jax.jit(with_derivatives(loss, len(wanted))).lower(*args).compile(FAST)
    got = program(*args)
    assert_same(got, whole(case))
    for name, parameter, *results in zip(wanted, args, *got[1:], strict=False):
        for result in results:
            assert result.sharding.is_equivalent_to(parameter.sharding, result.ndim), name
    found = collectives(program)
    assert large_in_loops(found, CHUNK * CLASSES // layout.size(*layout.classes)) == []
    assert {c.extent for c in found if c.kind == "all-gather"} <= extents_of_a_kernel(layout)


def extents_of_a_kernel(layout: Layout) -> set[tuple[int, ...]]:
    """Gathered, or gathered over the axes that split no rows alone."""
    classes = CLASSES // layout.size(*layout.classes)
    own = FEATURES // layout.size(*(axis for axis in layout.features if axis in layout.rows))
    return {(FEATURES, classes), (own, classes)}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(
            layout, case, marks=() if i == j % len(LAYOUTS) or (case, i) == ("linear", 1) else pytest.mark.slow
        )
        for i, layout in enumerate(LAYOUTS)
        for j, case in enumerate(LINEAR)
    ],
)
def test_explicit_meshes(layout: str, case: str):
    on = LAYOUTS[layout]
    args = placed(on, on.make(AxisType.Explicit), LINEAR[case].names)
    check(case, on, functools.partial(LINEAR[case], None, {}), args)


def gathered(w: jax.Array, layout: Layout) -> jax.Array:
    """As the documentation says: cast first, so that the gradient is scattered before it is summed over the others."""
    others = tuple(axis for axis in layout.rows if axis not in layout.features)
    w = lax.pcast(w, others, to="varying") if others else w
    return lax.all_gather(w, layout.features, tiled=True)


def gathered_in_shard_map(case: str, layout: Layout, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    call = LINEAR[case]
    axis = {"vocab_axis": layout.classes} if layout.classes else {}

    def part(*args: Any) -> Any:
        named = zip(call.names, args, strict=True)
        return call(layout.rows, axis, *(gathered(x, layout) if name in ("w", "w2") else x for name, x in named))

    out = P(), P() if call.result is CASES["linear"].result else P(layout.rows)
    return jax.shard_map(part, mesh=mesh, in_specs=tuple(layout.spec(name) for name in call.names), out_specs=out)


@pytest.mark.parametrize(("case", "layout"), covering([name for name in LINEAR if name != "own"], MANUAL))
def test_gathered_inside_shard_map(layout: str, case: str):
    on = LAYOUTS[layout]
    mesh = on.make(AxisType.Auto)
    check(case, on, gathered_in_shard_map(case, on, mesh), placed(on, mesh, LINEAR[case].names))


@pytest.mark.parametrize(
    ("layout", "name"), covering(LAYOUTS, ["linear_ggn_vector_product", "linear_fisher_vector_product"])
)
def test_curvature(name: str, layout: str):
    on, function = LAYOUTS[layout], getattr(jaxent, name)

    def product(h: Any, w: Any, v_h: Any, v_w: Any, y: Any) -> Any:
        targets = {"targets": y} if "ggn" in name else {}
        args = (h, w, (v_h, v_w)) if "ggn" in name else (h, w, y, (v_h, v_w))
        return function(*args, **targets, chunk_rows=CHUNK)

    names = ("h", "w", "h2", "w2", "y")
    args = placed(on, on.make(AxisType.Explicit), names)
    got = run(product, *args)
    assert_same(got, run(product, *(array(name) for name in names)))
    for x, like in zip(got, args, strict=False):
        assert x.sharding.is_equivalent_to(like.sharding, 2)


@pytest.mark.grid
def test_the_gradient_of_a_bfloat16_kernel_is_added_in_float32():
    """Seen in the program: a CPU adds bfloat16 in float32 by itself."""
    on = LAYOUTS["fsdp"]
    h, w, y = placed(on, on.make(AxisType.Explicit), ("h", "w", "labels"))
    gradient = jax.grad(lambda w: linear_softmax_cross_entropy(h, w, y))
    program = str(jax.make_jaxpr(gradient)(w.astype(jnp.bfloat16)))
    scattered = re.findall(r":(\w+)\[[\d,]*\]\S* = reduce_scatter", program)
    assert scattered == ["f32"], program


@pytest.mark.grid
def test_the_cotangent_of_whatever_is_gathered_in_bfloat16_is_added_in_float32():
    mesh = LAYOUTS["fsdp"].make(AxisType.Explicit)
    rows, leaf = (jax.device_put(jnp.ones(16, jnp.bfloat16), NamedSharding(mesh, P("fsdp"))) for _ in range(2))
    total = jax.grad(lambda x: shard_map_rows(lambda rows, x: (jnp.sum(rows) * jnp.sum(x * x), rows), rows, x)[0])
    program = str(jax.make_jaxpr(total)(leaf))
    assert re.findall(r":(\w+)\[[\d,]*\]\S* = reduce_scatter", program) == ["f32"], program


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_float32_kernel_multiplied_in_bfloat16(reduction: str):
    """Its gradient is summed over devices in float32, and rounded nowhere."""
    on = LAYOUTS["fsdp x vocab"]

    def loss(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        options = {"chunk_rows": CHUNK, "dtype": jnp.bfloat16, "reduction": reduction}
        return jnp.sum(linear_softmax_cross_entropy(h.astype(jnp.bfloat16), w, y, **options))

    names = ("h", "w", "labels")
    f = jax.value_and_grad(loss, (0, 1))
    got = run(f, *placed(on, on.make(AxisType.Explicit), names))
    want = run(f, *(array(name) for name in names))
    assert_same((got[0], got[1][1]), (want[0], want[1][1]))
    assert got[1][1].dtype == np.float32
    assert got[1][1].sharding.spec == on.spec("w")


@pytest.mark.parametrize("layout", MANUAL)
def test_automatic_meshes_gather_once(layout: str):
    """XLA would gather the kernel anew in every chunk if the types were left to say nothing."""
    on = LAYOUTS[layout]

    def loss(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        return linear_softmax_cross_entropy(h, w, y, chunk_rows=8 * CHUNK)

    args = placed(on, on.make(AxisType.Auto), ("h", "w", "labels"))
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile(FAST)
    want = run(jax.value_and_grad(loss, (0, 1)), *(array(name) for name in ("h", "w", "labels")))
    assert_same(program(*args), want)
    gathers = [(c.extent, c.times, c.looped) for c in collectives(program) if c.kind == "all-gather"]
    assert gathers == [((FEATURES, CLASSES // on.size(*on.classes)), 1, False)]


# ----------------------------------------------------------------------------------------------------------------------
# What crosses the mesh


def step(layout: Layout, kind: str) -> list[Collective]:
    """The collectives of value and gradient of a mean over all rows, in loops of known length."""
    mesh = layout.make(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    options: Any = {"chunk_rows": CHUNK, "ignore_index": None}

    def loss(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        if kind == "explicit":
            return linear_softmax_cross_entropy(h, w, y, **options)

        def part(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
            w = gathered(w, layout)
            axis = {"vocab_axis": layout.classes} if layout.classes else {}
            total = linear_softmax_cross_entropy(h, w, y, reduction="sum_and_weight", **options, **axis)
            return jax.tree.map(lambda x: lax.psum(x, layout.rows), total).mean()

        specs = tuple(layout.spec(name) for name in ("h", "w", "labels"))
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())(h, w, y)

    args = placed(layout, mesh, ("h", "w", "labels"))
    f = jax.value_and_grad(lambda h, w, y: loss(h, w, y), (0, 1))
    return collectives(jax.jit(f).lower(*args).compile(FAST))


def bytes_sent(n: int, d: int, v: int, data: int, fsdp: int, vocab: int) -> float:
    """By each device: the formula of `benchmarks/README.md`, float32 kernels."""
    over_vocab = 2 * (1 - 1 / vocab) * 4 * (n / data / fsdp) * (d + 3)
    over_fsdp = 2 * (1 - 1 / fsdp) * 4 * d * v / vocab
    over_data = 2 * (1 - 1 / data) * 4 * d * v / vocab / fsdp
    return over_vocab + over_fsdp + over_data


@pytest.mark.parametrize("kind", ["explicit", "manual"])
@pytest.mark.parametrize("layout", MANUAL)
def test_bytes_of_a_step(layout: str, kind: str):
    on = LAYOUTS[layout]
    found = step(on, kind)
    fsdp, vocab = on.size(*on.features), on.size(*on.classes)
    data = on.size(*on.rows) // fsdp
    # Apart from numbers of which there is one per device, not one per row or class.
    sent = sum(c.sent for c in found if c.extent)
    assert sent == pytest.approx(bytes_sent(ROWS, FEATURES, CLASSES, data, fsdp, vocab), rel=1e-12)
    assert [(c.kind, c.times, c.looped) for c in found if c.kind != "all-reduce"] == [
        ("all-gather", 1, False),
        ("reduce-scatter", 1, False),
    ]


@pytest.mark.parametrize("loop", ["map", "while", "branch"])
def test_a_gather_in_a_loop_is_seen(loop: str):
    on = LAYOUTS["fsdp x vocab"]
    mesh = on.make(AxisType.Auto)

    def part(h: jax.Array, w: jax.Array) -> jax.Array:
        def product(h: jax.Array) -> jax.Array:
            return h @ lax.all_gather(w * h[0, 0], "fsdp", tiled=True)

        chunks = h.reshape(-1, CHUNK, FEATURES)
        if loop == "map":
            return lax.map(product, chunks).reshape(-1, w.shape[1])
        if loop == "branch":
            nothing = lax.pcast(jnp.zeros((CHUNK, w.shape[1])), ("fsdp", "vocab"), to="varying")
            chosen = lax.map(lambda x: lax.cond(x[0, 0] > 0, product, lambda _: nothing, x), chunks)
            return chosen.reshape(-1, w.shape[1])
        start = lax.pcast(jnp.zeros((h.shape[0], w.shape[1])), ("fsdp", "vocab"), to="varying")

        def below_one(z: jax.Array) -> jax.Array:
            return lax.pmax(jnp.sum(z), ("fsdp", "vocab")) < 1

        return lax.while_loop(below_one, lambda z: z + product(h + z[:, :FEATURES]), start)

    f = jax.shard_map(part, mesh=mesh, in_specs=(on.spec("h"), on.spec("w")), out_specs=P("fsdp", "vocab"))
    found = collectives(jax.jit(f).lower(*placed(on, mesh, ("h", "w"))).compile(FAST))
    large = large_in_loops(found, CHUNK * CLASSES // 4)
    assert {c.kind for c in large} == {"all-gather"}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_features_of_hidden_states_must_be_whole():
    on = LAYOUTS["fsdp"]
    mesh = on.make(AxisType.Explicit)
    h, w, y = placed(on, mesh, ("h", "w", "labels"))
    h = jax.device_put(h, NamedSharding(mesh, P(None, "fsdp")))
    match = r"`hidden` and `kernel` must have whole features in `hidden`.*16@fsdp.*`jax.sharding.reshard`"
    with pytest.raises(ValueError, match=match):
        linear_softmax_cross_entropy(h, w, y)
    with pytest.raises(ValueError, match=match):
        jax.jit(linear_softmax_cross_entropy)(h, w, y)


@pytest.mark.parametrize("layout", ["fsdp", "data x fsdp"])
def test_the_shape_error_says_how_to_gather(layout: str):
    on = LAYOUTS[layout]
    mesh = on.make(AxisType.Auto)
    specs = tuple(on.spec(name) for name in ("h", "w", "labels"))
    f = jax.shard_map(linear_softmax_cross_entropy, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match=r"jax\.lax\.all_gather\(kernel, 'fsdp', tiled=True\)"):
        f(*placed(on, mesh, ("h", "w", "labels")))
    # No axis is of that size: nothing is suggested.
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(features, classes\) with 16 features") as error:
        linear_softmax_cross_entropy(array("h"), array("w")[:2], array("labels"))
    assert "all_gather" not in str(error.value)
