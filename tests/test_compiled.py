"""What the compilers of accelerators make of the losses: passes, products, copies, collectives. Nothing is run.

Marked `compiler`, and skipped where the compiler is not installed: `JAX_PLATFORMS=cpu pytest -m compiler`, and
`benchmarks/README.md` says how to install one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from benchmarks import compilers
from benchmarks.collectives import collectives
from benchmarks.compiled import Reading, compile_for
from benchmarks.compiled_programs import on_device
from benchmarks.compiled_scale import Step, compile_step, numbers_sent
from benchmarks.kernels import Kernel

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("one_device")]

N, D, V, CHUNK = 8192, 1024, 32768, 2048
GPU, TPU = "h100", "v5p"
TARGETS = [GPU, TPU]


def compiled_for(
    target: str, function: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any], gradient: bool = True
) -> Reading:
    if how := compilers.absent(compilers.platform_of(target)):
        pytest.skip(f"no compiler for {target}: {how}")
    only_cpu()
    place = on_device(compilers.topology(target).devices[0])
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    # Every row counts: no part of a chunk is left. On GPUs the first chunk of a gradient stands before the loop.
    return compile_for(function, arguments, unknown_trips=(N // CHUNK - (target == GPU and gradient), 0))


def only_cpu() -> None:
    """JAX must not look for the devices: the plugin that compiles for them would not be registered without one."""
    if getattr(jax.config, "jax_platforms", None) != "cpu":
        pytest.skip("compiling for devices that are not here takes JAX_PLATFORMS=cpu")


@functools.cache
def step(target: str, embedding: bool) -> Reading:
    """Value and gradient of a bf16 head in four chunks; of an embedding `(V, D)`, its transpose is the kernel."""

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        kernel = kernel.T if embedding else kernel
        return jaxent.linear_softmax_cross_entropy(hidden, kernel, labels, chunk_rows=CHUNK)

    kernel = ((V, D) if embedding else (D, V), jnp.bfloat16)
    function = jax.value_and_grad(loss, argnums=(0, 1))
    return compiled_for(target, function, ((N, D), jnp.bfloat16), kernel, ((N,), jnp.int32))


def passes(kernels: list[Kernel], dtype: str) -> tuple[float, float]:
    """How often a chunk's logits are written and read, in a dtype."""
    parts = [
        [(k.times * part.bytes, part.array) for k in kernels for part in found(k)]
        for found in (lambda k: k.written, lambda k: k.read)
    ]
    size = N * V * (4 if dtype == "f32" else 2)
    written, read = (sum(b for b, a in part if a.dtype == dtype and a.size == CHUNK * V) / size for part in parts)
    return round(written, 3), round(read, 3)


@pytest.mark.parametrize("target", TARGETS)
def test_three_products_of_bf16_operands_that_add_up_in_float32(target: str):
    reading = step(target, False)
    found = [(str(product), kernel.times * product.flops) for kernel in reading.kernels for product in kernel.products]
    assert {kind for kind, _ in found} == {"bf16 -> f32"}
    assert sum(flops for _, flops in found) == 3 * 2 * N * D * V


@pytest.mark.parametrize("target", TARGETS)
def test_passes_over_a_chunk(target: str):
    """Bytes moved for each logit: 4 for a pass in float32, 2 for one in bf16.

    The logits are written once and read twice, for their sums and for `dz`, which is written once and read by both
    products of the gradient; or these compute it from the logits again, as the TPU's compiler likes to do.
    """
    written, read = passes(step(target, False).kernels, "f32")
    narrow_written, narrow_read = passes(step(target, False).kernels, "bf16")
    assert written == 1
    assert narrow_written <= 1
    assert 4 * (written + read) + 2 * (narrow_written + narrow_read) <= 18


@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_of_the_kernel_adds_up_in_place(target: str):
    in_loop = [kernel for kernel in step(target, False).kernels if kernel.in_loop]
    writers = [k for k in in_loop for part in k.written if part.array.size == D * V and part.bytes == 4 * D * V]
    assert len(writers) == 1
    assert writers[0].products
    assert [part.array.dtype for part in writers[0].read if part.array.size == D * V] == ["f32"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("embedding", [False, True])
def test_no_copy_of_a_kernel_in_a_loop(target: str, embedding: bool):
    in_loop = [kernel for kernel in step(target, embedding).kernels if kernel.in_loop]
    copies = [k.name for k in in_loop if not k.products for part in k.written if part.array.size == D * V]
    assert not copies


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_as_large_as_all_logits(target: str):
    reading = step(target, False)
    assert max(part.array.size for kernel in reading.kernels for part in kernel.written) < N * V
    # One chunk in float32, its gradient in bf16, and the kernel's gradient in float32; the rest is rows.
    assert reading.temp_bytes < 1.3 * (CHUNK * V * 6 + D * V * 4)


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_take_one_product(target: str):
    function = functools.partial(jaxent.linear_token_statistics, chunk_rows=CHUNK)
    reading = compiled_for(
        target, function, ((N, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((N,), jnp.int32), gradient=False
    )
    assert sum(kernel.times * kernel.flops for kernel in reading.kernels) == 2 * N * D * V
    assert passes(reading.kernels, "f32")[0] == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fsdp", [False, True])
def test_an_automatic_mesh_sends_a_gradient_once(target: str, fsdp: bool):
    """The accelerators' compilers add up the kernel's gradient after the loop; the CPU's in every chunk."""
    if how := compilers.absent(compilers.platform_of(target)):
        pytest.skip(f"no compiler for {target}: {how}")
    only_cpu()
    devices = compilers.topology(target, gpus=4).devices
    mesh = Mesh(np.array(devices).reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    n, d, v = 4096, 256, 8192
    specs = P("data"), P("data") if fsdp else P(), P("data")
    shapes = ((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((n,), jnp.int32)
    split = [NamedSharding(mesh, spec) for spec in specs]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=s) for shape, s in zip(shapes, split, strict=True)]
    function = jax.value_and_grad(functools.partial(jaxent.linear_softmax_cross_entropy, chunk_rows=n // 4), (0, 1))
    step = jax.jit(function, out_shardings=(NamedSharding(mesh, P()), tuple(split[:2])))
    found = collectives(step.lower(*arguments).compile().as_text() or "")
    assert not [c for c in found if c.looped and c.extent]
    large = {c.kind for c in found if c.numbers >= d * v // 4}
    if not fsdp:
        assert large == {"all-reduce"}
    else:
        assert large == {"all-gather", "reduce-scatter" if target == GPU else "all-reduce"}


def test_a_float32_kernel_is_gathered_in_the_dtype_of_the_products():
    """Here, since the CPU's compiler gathers bf16 as float32."""
    if how := compilers.absent("cuda"):
        pytest.skip(f"no compiler for GPUs: {how}")
    only_cpu()
    devices = compilers.topology(GPU, gpus=4).devices
    mesh = Mesh(np.array(devices).reshape(-1), ("fsdp",), axis_types=(AxisType.Explicit,))
    shapes = ((4096, 256), jnp.bfloat16), ((256, 8192), jnp.float32), ((4096,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P("fsdp"))) for shape in shapes]
    loss = functools.partial(jaxent.linear_softmax_cross_entropy, dtype=jnp.bfloat16, chunk_rows=256)
    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    found = [c for c in collectives(step.as_text() or "") if c.extent]
    assert {(c.kind, c.dtype, c.looped) for c in found} == {
        ("all-gather", "bf16", False),
        ("reduce-scatter", "f32", False),
    }


def test_a_pod_sends_what_the_formula_says():
    """1,024 chips as 128 x 8. Numbers, not bytes: the compiler narrows a float32 sum of what is rounded to bf16."""
    if how := compilers.absent("tpu"):
        pytest.skip(f"no compiler for TPUs: {how}")
    only_cpu()
    pod = Step(128, 8, features=1024)
    found = [c for c in collectives(compile_step(pod).text) if c.extent]
    assert {c.kind for c in found} == {"all-reduce"}
    assert numbers_sent(found, pod) == pod.numbers_sent


# Of an odd number of classes the estimate is negative: some instructions count as -1 s.
@pytest.mark.parametrize(
    ("shape", "kernel_dtype"),
    [
        *(
            (shape, jnp.bfloat16)
            for shape in [
                (1024, 2048, 32768),
                (2048, 2304, 65536),
                (2048, 4096, 128256),
                (1024, 4096, 65536),
                (512, 4096, 65536),
                (2048, 5120, 65536),
                (2048, 1024, 131072),
                (2048, 768, 50304),  # GPT-2, in a whole number of registers
                (1728, 896, 151936),  # Qwen2.5-0.5B
                (1024, 2304, 256000),  # Gemma-2 2B
                (1024, 3584, 152064),  # Qwen2.5-7B
            ]
        ),
        ((2048, 4096, 128256), jnp.float32),
        ((2048, 768, 50304), jnp.float32),
    ],
)
def test_the_predicted_time_is_the_compilers_own(shape: tuple[int, int, int], kernel_dtype: Any):
    """On a v5e, whose compiler's `optimal_seconds` counts the body of a loop once: so in one chunk."""
    rows, features, classes = shape

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        options: dict[str, Any] = {"dtype": jnp.bfloat16, "chunk_rows": rows, "ignore_index": None}
        return jaxent.linear_softmax_cross_entropy(hidden, kernel, labels, **options)

    function = jax.value_and_grad(loss, argnums=(0, 1))
    shapes = ((rows, features), jnp.bfloat16), ((features, classes), kernel_dtype), ((rows,), jnp.int32)
    reading = compiled_for("v5e", function, *shapes)
    planned = jaxent.plan(*shape, dtype="bfloat16", kernel_dtype=kernel_dtype, device="v5e", chunk_rows=rows)
    assert planned.milliseconds == pytest.approx(1e3 * reading.cost["optimal_seconds"], rel=0.15)
