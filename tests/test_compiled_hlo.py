"""The reader of compiled programs: work and traffic of kernels, from texts as both vendors' compilers write them."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.hlo import parse
from benchmarks.kernels import kernels

CARRY = "(s32[], f32[8,32]{1,0:T(8,128)}, f32[16,4]{1,0}, bf16[4,16,8]{2,1,0}, /*index=4*/f32[4,32]{1,0})"
LOOP = """HloModule loop, is_scheduled=true

%chunk (p0: bf16[4,16,8], p1: s32[]) -> bf16[4,8] {
  %p0 = bf16[4,16,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[4,1,8]{2,1,0} dynamic-slice(%p0, %zero, %p1, %zero), dynamic_slice_sizes={4,1,8}
  ROOT %rows = bf16[4,8]{1,0} bitcast(%slice)
}

%product (p0.1: bf16[4,8], p1.1: f32[4,32], p2: f32[8,32]) -> f32[8,32] {
  %p2 = f32[8,32]{1,0} parameter(2)
  %p0.1 = bf16[4,8]{1,0} parameter(0)
  %p1.1 = f32[4,32]{1,0} parameter(1)
  %narrow = bf16[4,32]{1,0} convert(%p1.1)
  %dot = f32[8,32]{1,0} dot(%p0.1, %narrow), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %add = f32[8,32]{1,0} add(%p2, %dot)
}

%update (p0.2: f32[16,4], p1.2: s32[], p2.2: f32[4]) -> f32[16,4] {
  %p0.2 = f32[16,4]{1,0} parameter(0)
  %p1.2 = s32[] parameter(1)
  %p2.2 = f32[4]{0:T(128)S(1)} parameter(2)
  %zero.2 = s32[] constant(0)
  %row = f32[1,4]{1,0} bitcast(%p2.2)
  ROOT %dus = f32[16,4]{1,0} dynamic-update-slice(%p0.2, %row, %p1.2, %zero.2)
}

%body (carry: CARRY) -> CARRY {
  %carry = CARRY parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %sum = f32[8,32]{1,0} get-tuple-element(%carry), index=1
  %out = f32[16,4]{1,0} get-tuple-element(%carry), index=2
  %all = bf16[4,16,8]{2,1,0} get-tuple-element(%carry), index=3
  %dz = f32[4,32]{1,0} get-tuple-element(%carry), index=4
  %fusion.1 = bf16[4,8]{1,0} fusion(%all, %i), kind=kLoop, calls=%chunk
  %fusion.2 = f32[8,32]{1,0} fusion(%fusion.1, %dz, %sum), kind=kOutput, calls=%product
  %small = f32[4]{0:T(128)S(1)} reduce(%dz, %i), dimensions={1}, to_apply=%region
  %fusion.3 = f32[16,4]{1,0} fusion(%out, %i, %small), kind=kLoop, calls=%update
  %one = s32[] constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  ROOT %tuple = CARRY tuple(%next, %fusion.2, %fusion.3, %all, %dz)
}

%condition (carry.1: CARRY) -> pred[] {
  %carry.1 = CARRY parameter(0)
  %bound = s32[] constant(16)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (h: bf16[4,16,8], dz.1: f32[4,32]) -> f32[8,32] {
  %h = bf16[4,16,8]{2,1,0} parameter(0)
  %dz.1 = f32[4,32]{1,0} parameter(1)
  %zeros = f32[8,32]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = CARRY tuple(%i0, %zeros, %o, %h, %dz.1)
  %loop = CARRY while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,32]{1,0} get-tuple-element(%loop), index=1
}
""".replace("CARRY", CARRY)


def test_kernels_of_a_loop():
    found = {kernel.name: kernel for kernel in kernels(LOOP)}
    assert {kernel.times for kernel in found.values()} == {16}
    assert all(kernel.in_loop for kernel in found.values())
    # A slice reads what it takes; the product reads float32, multiplies bfloat16 and adds to its sum in place.
    assert (found["fusion.1"].bytes, found["fusion.1"].flops) == (2 * 4 * 8 * 2 + 4, 0)
    product = found["fusion.2"]
    assert product.flops == 2 * 4 * 8 * 32
    assert [str(p) for p in product.products] == ["bf16 -> f32"]
    assert sum(part.bytes for part in product.read) == 4 * 8 * 2 + 4 * 32 * 4 + 8 * 32 * 4
    assert sum(part.bytes for part in product.written) == 8 * 32 * 4
    # What is in another memory space costs nothing, nor does what an update leaves as it was.
    assert not found["small"].written
    assert [(part.array.shape, part.bytes) for part in found["fusion.3"].written] == [((16, 4), 16)]
    assert [(part.array.shape, part.bytes) for part in found["fusion.3"].read] == [((), 4)]


def test_of_what_a_gather_takes_no_more_is_read():
    """Nor of what is computed for it elementwise; all of what is written out after that."""
    text = """%taken (p0: f32[8,32], p1: pred[8,32], p2: s32[8,1]) -> (f32[8], f32[8,32]) {
  %p0 = f32[8,32]{1,0} parameter(0)
  %p1 = pred[8,32]{1,0} parameter(1)
  %p2 = s32[8,1]{1,0} parameter(2)
  %kept = f32[8,32]{1,0} select(%p1, %p0, %p0)
  %gather = f32[8]{0} gather(%kept, %p2), slice_sizes={1,1}
  %both = pred[8,32]{1,0} and(%p1, %p1)
  ROOT %out = (f32[8], pred[8,32]) tuple(%gather, %both)
}

ENTRY %main (a: f32[8,32], b: pred[8,32], c: s32[8,1]) -> (f32[8], pred[8,32]) {
  %a = f32[8,32]{1,0} parameter(0)
  %b = pred[8,32]{1,0} parameter(1)
  %c = s32[8,1]{1,0} parameter(2)
  ROOT %r = (f32[8]{0}, pred[8,32]{1,0}) fusion(%a, %b, %c), kind=kLoop, calls=%taken
}
"""
    (kernel,) = kernels(text)
    assert {part.array.dtype: part.bytes for part in kernel.read} == {"f32": 2 * 8 * 4, "pred": 8 * 32, "s32": 8 * 4}
    assert [part.bytes for part in kernel.written] == [8 * 4, 8 * 32]


def test_a_loop_of_unknown_length_counts_as_the_caller_says():
    unknown = LOOP.replace("direction=LT", "direction=NE")
    assert {kernel.times for kernel in kernels(unknown, unknown_trips=(7,))} == {7}
    assert not kernels(unknown, unknown_trips=(0,))
    noted = unknown.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert {kernel.times for kernel in kernels(noted, unknown_trips=(7,))} == {3}


@pytest.mark.parametrize(
    ("line", "flops", "kind"),
    [
        ("f32[6,10]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 6 * 4 * 10, "bf16 -> f32"),
        (
            "f32[6,10]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
            "operand_precision={highest,highest}",
            2 * 6 * 4 * 10,
            "bf16 -> f32",
        ),
        (
            '(f32[6,10]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 6 * 4 * 10,
            "bf16 -> f32",
        ),
        ("f32[6,10]{1,0} add(%a, %b)", 0, None),
    ],
)
def test_products_as_the_compilers_write_them(line: str, flops: int, kind: str | None):
    text = f"""ENTRY %main (a: bf16[6,4], b: bf16[4,10]) -> f32[6,10] {{
  %a = bf16[6,4]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[4,10]{{1,0}} parameter(1)
  ROOT %r = {line}
}}
"""
    (kernel,) = kernels(text)
    assert kernel.flops == flops
    assert [str(p) for p in kernel.products] == ([kind] if kind else [])


def test_the_most_expensive_branch_counts():
    text = """%cheap (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%dear (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p.1, %p.1)
}

ENTRY %main (x: f32[8], which: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %which = pred[] parameter(1)
  ROOT %r = f32[8]{0} conditional(%which, %x, %x), branch_computations={%cheap, %dear}
}
"""
    assert [(kernel.name, kernel.bytes) for kernel in kernels(text)] == [("twice", 64)]


def test_a_program_of_this_machine_is_read():
    """Whole numbers that no text of ours has been fitted to: jax's own compiler for this CPU."""
    x, y = jnp.ones((32, 8)), jnp.ones((8, 16))
    text = jax.jit(lambda x, y: jnp.sum(jnp.sin(x @ y), axis=0)).lower(x, y).compile().as_text() or ""
    assert sum(kernel.times * kernel.flops for kernel in kernels(text)) in (0, 2 * 32 * 8 * 16)
    assert parse(text)["ENTRY"].root.arrays[0].shape == (16,)
