"""`plan` tells what a call takes: XLA's own figures on this device, a sum of what is held on others."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxent
from jaxent._engine.devices import DEVICES
from jaxent.cli import main

pytestmark = pytest.mark.usefixtures("one_device")
N, D, V = 512, 48, 4096
ALL_ON = {"label_smoothing": 0.1, "z_loss": 1e-4, "soft_cap": 30.0, "temperature": 2.0, "weights": True}
LOSS, STATISTICS, DIVERGENCE = "linear_softmax_cross_entropy", "linear_token_statistics", "linear_kl_divergence"
CHUNKS = [("float32", 128), ("bfloat16", N), ("bfloat16", 128), ("float32", N)]
CELLS = [
    (function, reduction, dtype, chunk_rows, options)
    for function, reduction, options in [
        (LOSS, "mean", {}),
        (LOSS, "mean", ALL_ON),
        (LOSS, "none", {}),
        (STATISTICS, "mean", {}),
        (DIVERGENCE, "mean", {}),
        (LOSS, "mean", {"with_statistics": True}),
        (LOSS, "sum", {"bias": True, "where": True, "class_weights": True}),
        (LOSS, "none", {"soft_cap": 30.0, "with_statistics": True}),
        (STATISTICS, "mean", {"soft_cap": 30.0, "top_k": 4}),
        (DIVERGENCE, "none", {"temperature": 2.0}),
        (DIVERGENCE, "mean", {"divergence": "jensen_shannon", "weights": True}),
    ]
    for dtype, chunk_rows in CHUNKS
]
CELLS += [
    (function, "mean", dtype, chunk_rows, options)
    for function, options in [
        ("linear_gradient_norms", {"soft_cap": 30.0, "weights": True}),
        ("linear_gradient_norms", {"per": "sequence", "tokens": 64}),
        ("linear_ggn_vector_product", {"class_weights": True, "label_smoothing": 0.1}),
        ("linear_fisher_vector_product", {"where": True}),
        ("linear_ggn_diagonal", {"z_loss": 1e-4}),
        ("linear_kl_divergence_from_top", {"top_k": 16}),
        ("linear_rows", {"soft_cap": 30.0}),
    ]
    for dtype, chunk_rows in [("bfloat16", 128), ("float32", N)]
]


def cells() -> list[Any]:
    """The plain loss in every dtype and chunk; every other call in one of them, the rest are `slow`."""
    usual = {i for i in range(len(CELLS)) if i < len(CHUNKS) or i % len(CHUNKS) == i // len(CHUNKS) % len(CHUNKS)}
    return [pytest.param(*cell, marks=() if i in usual else pytest.mark.slow) for i, cell in enumerate(CELLS)]


def allocated(function: str, reduction: str, dtype: str, chunk_rows: int, options: dict[str, Any]) -> int:
    """By XLA, for the call as a user writes it."""
    like = jax.ShapeDtypeStruct
    head = like((N, D), dtype), like((D, V), dtype)
    labels = like((N,), jnp.int32)
    shapes = {
        "weights": ((N,), jnp.float32),
        "where": ((N,), bool),
        "class_weights": ((V,), dtype),
        "bias": ((V,), dtype),
    }
    given = {name: like(*shapes[name]) for name in options if name in shapes}
    rest: dict[str, Any] = {name: value for name, value in options.items() if name not in shapes}

    def statistics(hidden: Any, kernel: Any, labels: Any, given: Any) -> Any:
        return jaxent.linear_token_statistics(hidden, kernel, labels, chunk_rows=chunk_rows, **rest, **given)

    def loss(hidden: Any, kernel: Any, labels: Any, given: Any) -> Any:
        options: Any = {"chunk_rows": chunk_rows, "reduction": reduction, **rest, **given}
        found: Any = jaxent.linear_softmax_cross_entropy(hidden, kernel, labels, **options)
        losses, extra = found if "with_statistics" in rest else (found, ())
        return losses.sum(), extra

    def divergence(hidden_q: Any, kernel_q: Any, hidden: Any, kernel: Any, given: Any) -> Any:
        options: Any = {"chunk_rows": chunk_rows, "reduction": reduction, **rest, **given}
        found: Any = jaxent.linear_kl_divergence(hidden, kernel, hidden_q, kernel_q, **options)
        return found.sum()

    def curvature(hidden: Any, kernel: Any, labels: Any, given: Any) -> Any:
        options: Any = {"chunk_rows": chunk_rows, **rest, **given}
        if function == "linear_ggn_diagonal":
            return jaxent.linear_ggn_diagonal(hidden, kernel, **options)
        if function == "linear_fisher_vector_product":
            return jaxent.linear_fisher_vector_product(hidden, kernel, labels, (hidden, kernel), **options)
        return jaxent.linear_ggn_vector_product(hidden, kernel, (hidden, kernel), targets=labels, **options)

    def norms(hidden: Any, kernel: Any, labels: Any, given: Any) -> Any:
        tokens = rest.pop("tokens", None)
        if tokens is not None:
            hidden, labels = hidden.reshape(-1, tokens, D), labels.reshape(-1, tokens)
        return jaxent.linear_gradient_norms(hidden, kernel, labels, chunk_rows=chunk_rows, **rest, **given)

    def own(hidden: Any, kernel: Any, labels: Any, given: Any) -> Any:
        def nll(z: jax.Array, labels: jax.Array) -> jax.Array:
            return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=-1)[:, 0]

        return jaxent.linear_rows(nll, hidden, kernel, labels, chunk_rows=chunk_rows, **rest, **given).sum()

    def from_top(hidden: Any, kernel: Any, classes: Any, log_probs: Any) -> Any:
        return jaxent.linear_kl_divergence_from_top(hidden, kernel, classes, log_probs, chunk_rows=chunk_rows)

    top = like((N, options.get("top_k", 1)), jnp.int32), like((N, options.get("top_k", 1)), jnp.float32)
    program, arguments = {
        "linear_gradient_norms": (norms, (*head, labels, given)),
        "linear_ggn_vector_product": (curvature, (*head, labels, given)),
        "linear_fisher_vector_product": (curvature, (*head, labels, given)),
        "linear_ggn_diagonal": (curvature, (*head, labels, given)),
        "linear_rows": (jax.value_and_grad(own, argnums=(0, 1)), (*head, labels, given)),
        "linear_kl_divergence_from_top": (jax.value_and_grad(from_top, argnums=(0, 1)), (*head, *top)),
        LOSS: (jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), (*head, labels, given)),
        STATISTICS: (statistics, (*head, labels, given)),
        DIVERGENCE: (jax.value_and_grad(divergence, argnums=(0, 1)), (*head, *head, given)),
    }[function]
    memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(("function", "reduction", "dtype", "chunk_rows", "options"), cells())
def test_temporaries_are_those_that_xla_allocates(
    function: str, reduction: Any, dtype: str, chunk_rows: int, options: dict[str, Any]
):
    found = jaxent.plan(N, D, V, dtype=dtype, function=function, reduction=reduction, chunk_rows=chunk_rows, **options)
    there = allocated(function, reduction, dtype, chunk_rows, options)
    assert found.temp_bytes == pytest.approx(there, rel=0.1, abs=2**21)
    assert found.num_chunks == N // chunk_rows


LLAMA = (32768, 4096, 128256)


# MiB that NVIDIA's compiler and the TPUs' allocate in bf16, and GB that their programs move, as the suite `compiled`
# reads them; the last three are one chip of 1,024 as 128 x 8, 16 x 64 and 1024 x 1.
@pytest.mark.parametrize(
    ("device", "function", "shape", "temp_mib", "moved_gb"),
    [
        ("h100", LOSS, LLAMA, 6866, 112.3),
        ("h100", STATISTICS, LLAMA, 3298, 57.6),
        ("h100", DIVERGENCE, LLAMA, 5764, 295.4),
        ("h100", LOSS, (32768, 768, 50257), 2131, 33.2),
        ("h100", LOSS, (32768, 2304, 256000), 7070, 230.3),
        ("b200", LOSS, LLAMA, 6866, 112.3),
        ("b200", DIVERGENCE, LLAMA, 17011, 419.0),
        ("v5p", LOSS, LLAMA, 2262, 175.8),
        ("v6e", LOSS, LLAMA, 3241, 156.8),
        ("v5e", LOSS, LLAMA, 2262, 175.8),
        ("tpu7x", LOSS, LLAMA, 3764, None),
        ("tpu7x", STATISTICS, LLAMA, 2021, 70.2),
        ("v5e", DIVERGENCE, LLAMA, 2756, 416.4),
        ("v5p", DIVERGENCE, LLAMA, 3507, 298.7),
        ("tpu7x", DIVERGENCE, LLAMA, 5767, 307.7),
        # Whether the gradient of the logits is written depends on the features per row, and on v5e on odd classes.
        ("v5e", LOSS, (32768, 768, 50257), 541, None),
        ("v5e", LOSS, (32768, 1536, 151936), 2394, 146.2),
        ("v5e", LOSS, (32768, 2304, 128256), 2130, 128.2),
        ("v6e", LOSS, (32768, 2560, 128256), 2416, 143.3),
        ("v6e", LOSS, (32768, 3072, 128256), 2506, 148.5),
        ("v5p", LOSS, (32768, 3584, 128256), 2981, 170.6),
        ("v5p", LOSS, (32768, 4096, 256000), 4257, 348.5),
        ("tpu7x", LOSS, (32768, 2304, 256000), 5395, 276.3),
        ("v5p", LOSS, (32768, 1024, 32768), 513, None),
        ("v5p", LOSS, (32768, 8192, 32768), 1057, None),
        ("v5p", LOSS, (262144, 8192, 4096), 4229, 103.8),
        ("v5p", LOSS, (4096, 8192, 262144), 8258, None),
        # Of a TPU7x, too: 2.5 features per row, and 3.
        ("tpu7x", LOSS, (32768, 5120, 128256), 4329, None),
        ("tpu7x", LOSS, (32768, 6144, 128256), 4393, None),
        # With these classes the kernel lies in the layout that its products want; else it is copied for few chunks.
        ("tpu7x", STATISTICS, (32768, 768, 50257), 397, None),
        ("tpu7x", STATISTICS, (32768, 768, 50304), 471, None),
        ("tpu7x", DIVERGENCE, (32768, 768, 50257), 1177, None),
        ("tpu7x", DIVERGENCE, (32768, 768, 50304), 1252, None),
        ("tpu7x", LOSS, (32768, 2304, 128257), 2275, None),
        ("tpu7x", LOSS, (16384, 2304, 128256), 3267, None),
        ("tpu7x", LOSS, (18432, 2304, 128256), 2712, None),
        ("tpu7x", LOSS, (2048, 2304, 128256), 1503, None),
        ("tpu7x", LOSS, (32768, 2048, 16384), 329, None),
        # Whether the gradient of the hidden states goes through vector memory, or fits where the kernel's will be.
        ("v5p", LOSS, (32768, 768, 50257), 785, None),
        ("v5p", LOSS, (28672, 768, 65536), 961, None),
        ("v5p", LOSS, (65536, 768, 98304), 1537, None),
        ("v6e", LOSS, (61440, 768, 98304), 1442, None),
        ("v6e", LOSS, (65536, 768, 98304), 1537, None),
        ("v6e", LOSS, (32768, 8192, 40960), 1313, None),
    ],
)
def test_memory_of_a_device_that_is_not_here(
    device: str, function: str, shape: tuple[int, int, int], temp_mib: float, moved_gb: float | None
):
    found = jaxent.plan(*shape, dtype="bfloat16", device=device, function=function)
    assert found.temp_bytes / 2**20 == pytest.approx(temp_mib, rel=0.05)
    assert moved_gb is None or found.bytes_moved / 1e9 == pytest.approx(moved_gb, rel=0.05)


@pytest.mark.parametrize(("device", "temp_mib"), [("h100", 6381), ("v5e", 2261), ("tpu7x", 2762)])
def test_memory_of_a_float32_kernel(device: str, temp_mib: float):
    found = jaxent.plan(*LLAMA, dtype="bfloat16", kernel_dtype="float32", device=device)
    assert found.temp_bytes / 2**20 == pytest.approx(temp_mib, rel=0.05)


@pytest.mark.parametrize(
    ("device", "function", "features", "classes", "temp_mib"),
    [
        # Its copy, or the logits, is where the gradient of the hidden states will be.
        ("v6e", LOSS, 768, 32768, 433),
        ("v5e", LOSS, 2048, 32768, 393),
        ("tpu7x", LOSS, 768, 16384, 241),
        ("tpu7x", LOSS, 2048, 16384, 265),
        # Its copy is in vector memory or too large for that; or the gradient of the logits is written.
        ("v5e", LOSS, 768, 50257, 442),
        ("v5e", LOSS, 768, 57344, 805),
        ("v5e", LOSS, 4096, 11264, 257),
        ("v5e", STATISTICS, 768, 50304, 394),
        ("v5e", STATISTICS, 768, 65536, 609),
        ("v6e", STATISTICS, 768, 47104, 369),
        ("v6e", STATISTICS, 768, 50257, 468),
        ("v5p", STATISTICS, 768, 16384, 156),
        ("tpu7x", STATISTICS, 768, 16384, 132),
        ("tpu7x", STATISTICS, 768, 24576, 232),
        ("v5e", DIVERGENCE, 768, 32768, 737),
    ],
)
def test_memory_of_a_small_float32_kernel(device: str, function: str, features: int, classes: int, temp_mib: float):
    options: Any = {"dtype": "bfloat16", "kernel_dtype": "float32", "device": device, "function": function}
    found = jaxent.plan(32768, features, classes, **options)
    assert found.temp_bytes / 2**20 == pytest.approx(temp_mib, rel=0.05)


@pytest.mark.parametrize(("shape", "temp_mib"), [((32768, 8192, 32768), 1153), ((262144, 8192, 4096), 4293)])
def test_memory_of_a_chip_among_those_that_split_the_classes(shape: tuple[int, int, int], temp_mib: float):
    """Of 1,024 v5p as 128 x 8 and as 16 x 64."""
    found = jaxent.plan(*shape, dtype="bfloat16", device="v5p", vocab_axis="vocab")
    assert found.temp_bytes / 2**20 == pytest.approx(temp_mib, rel=0.05)


@pytest.mark.parametrize(
    ("device", "rows", "temp_mib"), [("v6e", 2560, 3258), ("v5p", 4096, 4393), ("tpu7x", 3840, 5184)]
)
def test_memory_of_larger_chunks_on_a_tpu(device: str, rows: int, temp_mib: float):
    found = jaxent.plan(12 * rows, 4096, 128256, dtype="bfloat16", device=device, chunk_rows=rows)
    assert found.temp_bytes / 2**20 == pytest.approx(temp_mib, rel=0.05)


def test_a_kernel_of_another_dtype_is_cast_once():
    narrow = jaxent.plan(32768, 4096, 128256, dtype="bfloat16", device="h100")
    mixed = jaxent.plan(32768, 4096, 128256, dtype="bfloat16", kernel_dtype="float32", device="h100")
    assert mixed.chunk_rows == narrow.chunk_rows
    assert mixed.bytes_moved == narrow.bytes_moved
    copy, sum_as_result = 2 * 4096 * 128256, 4 * 4096 * 128256
    hidden = 4 * 4096 * 32768  # the sum of the narrow kernel's gradient left room for it
    assert mixed.temp_bytes - narrow.temp_bytes == copy - sum_as_result + hidden


def test_time_by_terms():
    found = jaxent.plan(32768, 4096, 128256, dtype="bfloat16", device="h100").milliseconds
    assert found is not None
    assert found == pytest.approx(sum(found.terms.values()))
    assert found.products == pytest.approx(1e3 * 6 * 32768 * 4096 * 128256 / 989.4e12)
    assert min(found.passes, found.kernel_gradient) > 0
    assert found.collectives == 0


@pytest.mark.parametrize(
    ("function", "reduction", "products"),
    [
        (LOSS, "mean", 3),
        (LOSS, "none", 4),
        (STATISTICS, "mean", 1),
        (DIVERGENCE, "mean", 4),
        ("linear_rows", "mean", 4),
        ("linear_ggn_vector_product", "mean", 5),
    ],
)
def test_products_of_each_function(function: str, reduction: Any, products: int):
    found = jaxent.plan(64, 8, 128, function=function, reduction=reduction, device="v5e")
    assert found.matrix_products == products
    assert found.multiply_adds == products * 64 * 8 * 128


def test_an_unknown_device_has_no_time_and_says_so():
    found = jaxent.plan(2**20, 64, 2**15, device="abacus")
    assert (found.device, found.milliseconds) == ("abacus", None)
    assert "abacus" in (found.note or "")
    assert found.chunk_rows == 2**13
    assert jaxent.plan(8, 8, 8).device == "cpu"
    assert jaxent.plan(8, 8, 8, device="NVIDIA H100 80GB HBM3").device == "h100"


def test_nothing_is_compiled_for_more_rows_than_int32_counts():
    found = jaxent.plan(2**40, 64, 2**15, chunk_rows=64)
    assert found.temp_bytes == found.estimated_temp_bytes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_dtype": "int8"}, TypeError, "`kernel_dtype` must be floating"),
        ({"device": 3}, TypeError, "`device` must be a name or None, got 3"),
        ({"function": "softmax"}, ValueError, "`function` must be one of 'linear_softmax_cross_entropy'"),
        ({"top_k": 3}, TypeError, "`top_k` is not an option of linear_softmax_cross_entropy, which takes bias"),
        ({"function": "linear_gradient_norms", "per": "sequence"}, ValueError, "`tokens` must tell how many of the 8"),
        ({"function": "linear_ggn_diagonal", "reduction": "none"}, ValueError, "`reduction` must be 'mean' or 'sum'"),
        ({"soft_cap": "high"}, TypeError, "`soft_cap` must be a number, or whether it is on, got 'high'"),
        ({"flops_per_second": 1e9}, ValueError, "`bytes_per_second` is needed, too"),
        ({"flops_per_second": "1e9", "bytes_per_second": 1}, TypeError, "`flops_per_second` must be a number or None"),
        (
            {"flops_per_second": 1, "bytes_per_second": 0.0},
            ValueError,
            "`bytes_per_second` must be positive and finite",
        ),
    ],
)
def test_wrong_options_of_a_plan(options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"jaxent.plan: {message}"):
        jaxent.plan(8, 8, 8, **options)


def test_every_function_of_hidden_states_is_known():
    names = [name for name in jaxent.__all__ if name.startswith("linear_")]
    for name in names:
        assert str(jaxent.plan(64, 8, 128, function=name, device="h100")).startswith("1 chunk of 64 rows, ")
    assert len(names) == 10


def test_options_are_on_or_off():
    plain = jaxent.plan(8, 8, 8)
    off = {"label_smoothing": 0.0, "soft_cap": None, "temperature": 1.0, "with_statistics": False, "weights": None}
    assert jaxent.plan(8, 8, 8, **off) == plain
    assert jaxent.plan(8, 8, 8, soft_cap=True) == jaxent.plan(8, 8, 8, soft_cap=30.0) != plain
    assert jaxent.plan(8, 8, 8, weights=jnp.ones(8)) == jaxent.plan(8, 8, 8, weights=True) != plain


def test_measured_rates_are_those_of_a_device():
    stated, shape = DEVICES["h100"], (4096, 512, 32768)
    product_rate, byte_rate = stated.product_rate("float32"), stated.bytes_per_second
    own, there = (
        jaxent.plan(*shape, chunk_rows=512, device=name, flops_per_second=product_rate, bytes_per_second=byte_rate)
        for name in (None, "h100")
    )
    assert (own.milliseconds, own.note) == (there.milliseconds, None)
    assert there == jaxent.plan(*shape, chunk_rows=512, device="h100")
    slow = jaxent.plan(*shape, chunk_rows=512, flops_per_second=1e11, bytes_per_second=1e10).milliseconds
    assert slow is not None
    assert slow.products == pytest.approx(1e3 * 6 * 4096 * 512 * 32768 / 1e11)
    # The logits are read for the sums, dz is written and read; dW is read and written in every chunk, behind its work.
    # The hidden states are read and written in another order, and so is their gradient, after zeros.
    assert slow.passes == pytest.approx(1e3 * (12 * 4096 * 32768 + 20 * 4096 * 512) / 1e10)
    narrow = jaxent.plan(*shape, dtype="bfloat16", flops_per_second=1e11, bytes_per_second=1e10).milliseconds
    assert narrow is not None
    assert narrow.products == slow.products


# ----------------------------------------------------------------------------------------------------------------------
# jaxent plan

SIZES = ["--tokens", "32768", "--features", "4096", "--classes", "128256"]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *SIZES, "--device", "h100"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "on h100" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["dense", "1,639", "3,277", "6,560", "10,923", "16,384"]
    assert "6,560 (chosen)" in out
    assert not err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *SIZES, "--device", "v5p", "--kernel-dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["kernel_dtype"], found["chunk_rows"]) == ("v5p", "float32", 2048)
    assert found["rows_at_a_time"][0]["chunk_rows"] is None
    assert all(line["ms"] > 200 for line in found["rows_at_a_time"])


def test_the_command_notes_what_is_not_known(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--tokens", "8", "--features", "4", "--classes", "9", "--device", "abacus"]) == 0
    out, err = capsys.readouterr()
    assert " - " in out
    assert all(name in err for name in ("abacus", *DEVICES))


def test_one_rate_is_not_enough(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *SIZES, "--flops-per-second", "1e11"]) == 2
    assert "--bytes-per-second together" in capsys.readouterr().err
    assert main(["plan", *SIZES, "--flops-per-second", "1e11", "--bytes-per-second", "1e10", "--json"]) == 0
    dense, *rows = json.loads(capsys.readouterr().out)["rows_at_a_time"]
    work = 1e3 * 6 * 32768 * 4096 * 128256 / 1e11
    assert dense["products"] == pytest.approx(work)
    assert all(row["products"] == pytest.approx(work) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SIZES[:4], "the following arguments are required: --classes"),
        ([*SIZES, "--tokens", "0"], "argument --tokens: must be a whole number from 1 to"),
        ([*SIZES, "--chunk-rows", "many"], "argument --chunk-rows: must be a whole number from 1 to"),
        ([*SIZES, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([*SIZES, "spare"], "unrecognized arguments: spare"),
        ([*SIZES, "--flops-per-second", "0"], "argument --flops-per-second: must be"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments])
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert message in err
