"""What crosses the mesh, in bytes: `benchmarks/README.md`, "How cost grows", against the collectives of the HLO."""

import contextlib
import functools
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives, foreign
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CHUNK,
    CLASSES,
    FAST,
    FEATURES,
    KERNEL,
    KINDS,
    LOGITS,
    MESHES,
    ROW,
    ROWS,
    TOP,
    linear_softmax_cross_entropy,
    linear_token_statistics,
    make_mesh,
    token_statistics,
)

import jaxent

LABELS = np.zeros(ROWS, np.int32)


def arguments_on(mesh: jax.sharding.Mesh, specs: Any, shapes: Any) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(shape, np.int32 if len(shape) == 1 else np.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]


def compile_on(mesh: jax.sharding.Mesh, f: Any, *specs: Any, shapes: Any) -> Any:
    return jax.jit(f).lower(*arguments_on(mesh, specs, shapes)).compile(FAST)


def step_on(shape: str, kind: str, chunk_rows: int | None) -> Any:
    """Value and gradient of a mean over all rows, compiled."""
    mesh, specs = make_mesh(shape, kind), (ROW, KERNEL, ROW)

    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        if kind != "manual":
            return linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=chunk_rows)

        def part(*args: Any) -> Any:
            options = {"vocab_axis": "vocab", "reduction": "sum_and_weight", "chunk_rows": chunk_rows}
            return jax.tree.map(
                lambda x: jax.lax.psum(x, "data"), linear_softmax_cross_entropy(*args, **options)
            ).mean()

        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())(hidden, kernel, labels)

    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        step = jax.value_and_grad(loss, argnums=(0, 1))
        return compile_on(mesh, step, *specs, shapes=((ROWS, FEATURES), (FEATURES, CLASSES), (ROWS,)))


def bytes_sent(n: int, d: int, v: int, data: int, vocab: int) -> tuple[float, float]:
    """What each device sends over the vocabulary axis and over the data axis: the formula of `benchmarks/README.md`."""
    over_vocab = 2 * (vocab - 1) / vocab * 4 * (n / data) * (d + 3)
    over_data = 2 * (data - 1) / data * 4 * d * (v / vocab)
    return over_vocab, over_data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", MESHES)
def test_bytes_of_a_step(shape: str, kind: str):
    found = collectives(step_on(shape, kind, None))
    assert foreign(found, *MESHES[shape]) == []
    # Apart from numbers of which there is one per device, not one per row or class.
    sent = sum(c.sent for c in found if c.extent)
    assert sent == pytest.approx(sum(bytes_sent(ROWS, FEATURES, CLASSES, *MESHES[shape])), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_gradient_crosses_once_unless_xla_decides(kind: str):
    data, vocab = MESHES["2x4"]
    found = collectives(step_on("2x4", kind, CHUNK))
    assert foreign(found, data, vocab) == []
    kernel = [c.times for c in found if c.extent == (FEATURES, CLASSES // vocab)]
    chunks = -(-ROWS // (CHUNK // 8 * 8)) if kind == "automatic" else 1
    assert kernel == [chunks]


def test_rows_split_over_several_axes_of_an_automatic_mesh_stay_where_they_are():
    """With `explicit_axes`, as the README says; without, XLA gathers the rows over the second axis."""
    mesh, rows, batch = make_mesh("2x4", "automatic"), P("data", "vocab"), (8, ROWS // 8)

    def step(hidden: Any, kernel: Any, labels: Any) -> Any:
        labels = labels.reshape(batch, out_sharding=rows)

        def loss(hidden: Any, kernel: Any) -> Any:
            return linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=9)

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)

    with jax.set_mesh(mesh):
        explicit = jax.sharding.explicit_axes(step, in_sharding=(rows, P(), P()))
        found = collectives(
            compile_on(mesh, explicit, rows, P(), P(), shapes=((*batch, FEATURES), (FEATURES, CLASSES), (ROWS,)))
        )
    assert {c.kind for c in found} == {"all-reduce"}
    assert [(c.extent, c.times) for c in found if c.extent] == [((FEATURES, CLASSES), 1)]


def test_what_an_automatic_mesh_sums_in_every_chunk_is_said_where_the_mesh_is_known():
    mesh, specs = make_mesh("2x4", "automatic"), (P("data"), P(), P("data"))

    def rows(hidden: Any, kernel: Any, labels: Any) -> Any:
        return linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none", chunk_rows=9)

    def trace(f: Any, argnums: Any) -> None:
        arguments = arguments_on(mesh, specs, ((ROWS, FEATURES), (FEATURES, CLASSES), (ROWS,)))
        jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)), argnums)).trace(*arguments)

    with jax.set_mesh(mesh), warnings.catch_warnings():
        with pytest.warns(jaxent.ShardingWarning, match=r"explicit_axes\(f, in_sharding=") as said:
            trace(rows, (0, 1))
        assert len(said) == 1
        warnings.simplefilter("error")  # and nothing of other calls
        trace(rows, 0)
        trace(jax.sharding.explicit_axes(rows, in_sharding=specs), (0, 1))
        trace(functools.partial(linear_softmax_cross_entropy, chunk_rows=9), (0, 1))


def test_the_readme_says_what_the_formula_gives():
    text = (pathlib.Path(__file__).parents[1] / "benchmarks" / "README.md").read_text()
    section = text[text.index("## How cost grows") :]
    rows = re.findall(r"^\| (\d+) x (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \|", section, re.MULTILINE)
    assert len(rows) >= 3
    for data, vocab, *stated in rows:
        assert int(data) * int(vocab) == 1024
        sent = bytes_sent(2**22, 8192, 262144, int(data), int(vocab))
        assert [float(x) for x in stated] == [pytest.approx(x / 1e9, abs=0.005) for x in sent]


# ----------------------------------------------------------------------------------------------------------------------
# The reader of the HLO sees what must not be there

WHOLE = P(None, None)


def planted(fault: str, mesh: jax.sharding.Mesh) -> Any:
    """A program with a fault of its own, of hidden states and a kernel."""

    def spread(x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def in_a_loop(h: jax.Array, w: jax.Array) -> jax.Array:
        def step(x: jax.Array) -> jax.Array:
            return x @ jnp.sin(jax.lax.all_gather(w * x[0, 0], "vocab", axis=1, tiled=True))[:, : w.shape[1]]

        return jax.lax.map(step, h.reshape(5, -1, FEATURES)).reshape(-1, w.shape[1])

    faults = {
        "gathered logits": lambda h, w: jnp.max(spread(h @ w, WHOLE), axis=-1),
        "gathered kernel": lambda h, w: spread(h @ spread(w, WHOLE), LOGITS),
        "gathered in a loop": jax.shard_map(in_a_loop, mesh=mesh, in_specs=(ROW, KERNEL), out_specs=LOGITS),
        "split features": lambda h, w: spread(h, P("data", "vocab")) @ spread(w, P("vocab", None)),
        "rows in runs": lambda h, w: jnp.roll(h, 1, axis=0) @ w,
        "resharded": lambda h, w: spread(spread(h @ w, P(("data", "vocab"), None)) * 2, LOGITS),
    }
    shapes = (
        (ROWS, 8 if fault == "split features" else FEATURES),
        (8 if fault == "split features" else FEATURES, CLASSES),
    )
    return compile_on(mesh, faults[fault], ROW, KERNEL, shapes=shapes)


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("gathered logits", {"all-gather"}),
        ("gathered kernel", {"all-gather"}),
        ("gathered in a loop", {"all-gather"}),
        ("split features", {"all-reduce"}),
        ("rows in runs", {"collective-permute"}),
        ("resharded", {"all-to-all"}),
    ],
)
def test_planted_faults_are_seen(fault: str, kinds: set[str]):
    found = foreign(collectives(planted(fault, make_mesh("2x4", "automatic"))), *MESHES["2x4"])
    assert kinds & {c.kind for c in found}
    assert {c.times for c in found} == {5 if "loop" in fault else 1}


# ----------------------------------------------------------------------------------------------------------------------
# Where the arrays' types do not tell of the mesh


@pytest.mark.parametrize("linear", [False, True])
def test_top_classes_when_only_jit_knows_the_mesh(linear: bool):
    mesh = make_mesh("2x4", "automatic")
    split = [NamedSharding(mesh, spec) for spec in ((ROW, KERNEL) if linear else (LOGITS,))]

    def statistics(*args: Any) -> Any:
        if linear:
            return linear_token_statistics(*args, LABELS, top_k=TOP, chunk_rows=40)
        return token_statistics(*args, LABELS, top_k=TOP)

    shapes = [(ROWS, FEATURES), (FEATURES, CLASSES)] if linear else [(ROWS, CLASSES)]
    like = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    program = jax.jit(statistics, in_shardings=split).lower(*like).compile(FAST)
    assert foreign(collectives(program), *MESHES["2x4"]) == []
