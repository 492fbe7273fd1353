"""The reader of XLA's text, on programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from aot import hlo

pytestmark = pytest.mark.once

# 4 KiB each, in float32.
KIB4 = "f32[8,128]{1,0}"


def program(entry, *computations):
    """A module around the lines of its entry computation."""
    lines = "\n".join(f"  {line}" for line in entry)
    return hlo.parse(
        "\n".join(["HloModule test", *computations, "ENTRY %main () -> f32[] {", lines])
        + "\n}\n"
    )


def test_an_operation_reads_its_operands_and_writes_its_result():
    module = program(
        [
            f"%a = {KIB4} parameter(0)",
            f"%b = {KIB4} parameter(1)",
            f"ROOT %sum = {KIB4} add(%a, %b)",
        ]
    )
    assert module.traffic == 3 * 4096
    assert module.traffic_by_instruction == {"add sum": 3 * 4096}
    assert module.opcodes == {"parameter", "add"}


def test_what_only_names_buffers_is_free():
    module = program(
        [
            f"%a = {KIB4} parameter(0)",
            f"%pair = ({KIB4}, {KIB4}) tuple(%a, %a)",
            f"%b = {KIB4} get-tuple-element(%pair), index=1",
            "ROOT %c = f32[1024]{0} bitcast(%b)",
        ]
    )
    assert module.traffic == 0


def test_collectives_count_as_often_as_they_run():
    module = program(
        [
            "%i = s32[] parameter(0)",
            f"%a = {KIB4} parameter(1)",
            f"%state = (s32[], {KIB4}) tuple(%i, %a)",
            f"%loop = (s32[], {KIB4}) while(%state), condition=%test, body=%step, "
            'backend_config={"known_trip_count":{"n":"3"}}',
            f"%b = {KIB4} all-gather(%a), dimensions={{0}}",
            f"%c = {KIB4} all-reduce-start(%b), to_apply=%add",
            f"ROOT %d = {KIB4} all-reduce-done(%c)",
        ],
        "%step (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {",
        f"  %s = (s32[], {KIB4}) parameter(0)",
        f"  %x = {KIB4} get-tuple-element(%s), index=1",
        f"  %y = {KIB4} all-reduce(%x), to_apply=%add",
        "  %j = s32[] get-tuple-element(%s), index=0",
        f"  ROOT %t = (s32[], {KIB4}) tuple(%j, %y)",
        "}",
    )
    assert sorted(module.collectives) == [
        ("all-gather", 4096),
        *[("all-reduce", 4096)] * 4,
    ]
    assert module.collective_kinds == {"all-gather", "all-reduce"}


def test_memory_on_the_chip_is_free():
    on_chip = "f32[8,128]{1,0:T(8,128)S(1)}"
    module = program(
        [
            "%a = f32[8,128]{1,0:T(8,128)} parameter(0)",
            f"%b = {on_chip} negate(%a)",
            f"%c = {on_chip} negate(%b)",
            "ROOT %d = f32[8,128]{1,0:T(8,128)} negate(%c)",
        ]
    )
    assert module.traffic_by_instruction == {"negate b": 4096, "negate d": 4096}


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("pred[3,5]{1,0}", 15),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("s4[6]{0}", 3),
        ("f8e4m3fn[6]{0}", 6),
        ("f64[]", 8),
        ("token[]", 0),
    ],
)
def test_sizes(array, size):
    module = program([f"ROOT %a = {array} custom-call()"])
    assert module.traffic == size


def test_a_fusion_moves_its_ends_only():
    module = program(
        [
            f"%a = {KIB4} parameter(0)",
            f"ROOT %fused = {KIB4} fusion(%a), kind=kLoop, calls=%inside",
        ],
        f"""%inside (p: f32[8,128]) -> f32[8,128] {{
  %p = {KIB4} parameter(0)
  %negate = {KIB4} negate(%p)
  ROOT %exp = {KIB4} exponential(%negate)
}}""",
    )
    assert module.traffic == 2 * 4096
    assert module.buffers("f32", 1024) == ["fused f32[8, 128]"]
    assert "exponential" in module.opcodes


SLICED = """%inside (p: f32[64,128], i: s32[]) -> f32[8,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %same = f32[64,128]{1,0} bitcast(%p)
  %slice = f32[8,128]{1,0} dynamic-slice(%same, %i, %zero), \
dynamic_slice_sizes={8,128}
  ROOT %exp = f32[8,128]{1,0} exponential(%slice)
}"""


def test_a_fused_slice_reads_the_slice():
    module = program(
        [
            "%a = f32[64,128]{1,0} parameter(0)",
            "%i = s32[] parameter(1)",
            f"ROOT %fused = {KIB4} fusion(%a, %i), kind=kLoop, calls=%inside",
        ],
        SLICED,
    )
    assert module.traffic == 2 * 4096 + 4


def test_a_slice_inside_a_nested_fusion_is_a_slice_too():
    module = program(
        [
            "%a = f32[64,128]{1,0} parameter(0)",
            "%i = s32[] parameter(1)",
            f"ROOT %fused = {KIB4} fusion(%a, %i), kind=kOutput, calls=%outside",
        ],
        SLICED,
        f"""%outside (p: f32[64,128], i: s32[]) -> f32[8,128] {{
  %p = f32[64,128]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %nested = {KIB4} fusion(%p, %i), kind=kLoop, calls=%inside
}}""",
    )
    assert module.traffic == 2 * 4096 + 4


def test_a_value_that_a_nested_fusion_hands_on_is_read_whole():
    module = program(
        [
            f"%a = {KIB4} parameter(0)",
            f"ROOT %fused = {KIB4} fusion(%a), kind=kOutput, calls=%outside",
        ],
        f"""%inside (p: f32[8,128]) -> f32[8,128] {{
  %p = {KIB4} parameter(0)
  ROOT %same = {KIB4} bitcast(%p)
}}""",
        f"""%outside (p: f32[8,128]) -> f32[8,128] {{
  %p = {KIB4} parameter(0)
  %nested = {KIB4} fusion(%p), kind=kLoop, calls=%inside
  ROOT %exp = {KIB4} exponential(%nested)
}}""",
    )
    assert module.traffic == 2 * 4096


def test_a_slice_of_what_a_nested_fusion_hands_on_is_a_slice_too():
    module = program(
        [
            "%a = f32[64,128]{1,0:T(16,128)} parameter(0)",
            "%i = s32[] parameter(1)",
            f"ROOT %fused = {KIB4} fusion(%a, %i), kind=kLoop, calls=%outside",
        ],
        """%retiled (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(16,128)} parameter(0)
  ROOT %copy = f32[64,128]{1,0:T(8,128)} copy(%p)
}""",
        """%outside (p: f32[64,128], i: s32[]) -> f32[8,128] {
  %p = f32[64,128]{1,0:T(16,128)} parameter(0)
  %i = s32[] parameter(1)
  %nested = f32[64,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%retiled
  %slice = f32[8,128]{1,0} dynamic-slice(%nested, %i, %i), dynamic_slice_sizes={8,128}
  ROOT %exp = f32[8,128]{1,0} exponential(%slice)
}""",
    )
    assert module.traffic == 2 * 4096 + 4


def test_an_update_in_place_writes_the_update():
    module = program(
        [
            "%a = f32[64,128]{1,0} parameter(0)",
            f"%b = {KIB4} parameter(1)",
            "%i = s32[] parameter(2)",
            "ROOT %fused = f32[64,128]{1,0} fusion(%a, %b, %i), kind=kLoop, "
            "calls=%inside",
        ],
        f"""%inside (p: f32[64,128], q: f32[8,128], i: s32[]) -> f32[64,128] {{
  %p = f32[64,128]{{1,0}} parameter(0)
  %q = {KIB4} parameter(1)
  %i = s32[] parameter(2)
  ROOT %update = f32[64,128]{{1,0}} dynamic-update-slice(%p, %q, %i, %i)
}}""",
    )
    assert module.traffic == 2 * 4096 + 4


BODY = f"""%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %t = (s32[], {KIB4}) parameter(0)
  %count = s32[] get-tuple-element(%t), index=0
  %value = {KIB4} get-tuple-element(%t), index=1
  %next = {KIB4} negate(%value)
  ROOT %tuple = (s32[], {KIB4}) tuple(%count, %next)
}}"""


def condition(limit):
    return f"""%condition (t: (s32[], f32[8,128])) -> pred[] {{
  %t = (s32[], {KIB4}) parameter(0)
  %count = s32[] get-tuple-element(%t), index=0
  %limit = s32[] {limit}
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}}"""


def loop(attributes, limit):
    return program(
        [
            f"%t = (s32[], {KIB4}) parameter(0)",
            f"ROOT %loop = (s32[], {KIB4}) while(%t), condition=%condition, "
            f"body=%body{attributes}",
        ],
        BODY,
        condition(limit),
    )


def test_a_loop_counts_as_often_as_its_condition_lets_it_run():
    assert loop("", "constant(7)").traffic == 7 * 2 * 4096


def test_a_loop_counts_as_often_as_it_is_known_to_run():
    known = ', backend_config={"known_trip_count":{"n":"5"},"other":{"n":"9"}}'
    assert loop(known, "constant(7)").traffic == 5 * 2 * 4096


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="loop: the trip count cannot be read"):
        _ = loop("", "custom-call()").traffic


def test_a_conditional_costs_what_its_dearest_branch_does():
    branch = """%{name} (p: f32[8,128]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0}} parameter(0)
  %once = f32[8,128]{{1,0}} negate(%p)
  ROOT %twice = f32[8,128]{{1,0}} {last}(%once)
}}"""
    module = program(
        [
            f"%a = {KIB4} parameter(0)",
            "%which = s32[] parameter(1)",
            f"ROOT %either = {KIB4} conditional(%which, %a, %a), "
            "branch_computations={%cheap, %dear}",
        ],
        branch.format(name="cheap", last="bitcast"),
        branch.format(name="dear", last="negate"),
    )
    assert module.traffic == 4 * 4096


def test_a_copy_off_the_chip_is_charged_when_it_starts():
    module = program(
        [
            "%a = f32[8,128]{1,0:T(8,128)} parameter(0)",
            "%start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, "
            "u32[]{:S(2)}) copy-start(%a)",
            "ROOT %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)",
        ]
    )
    assert module.traffic_by_instruction == {"copy-start start": 4096}


def test_a_gather_that_runs_beside_reads_what_it_gathers():
    module = program(
        [
            "%a = f32[64,128]{1,0} parameter(0)",
            "%i = s32[64]{0} parameter(1)",
            "%start = ((f32[64,128]{1,0}, s32[64]{0}), f32[64]{0}, u32[]{:S(2)}) "
            "async-start(%a, %i), calls=%inside",
            "ROOT %done = f32[64]{0} async-done(%start)",
        ],
        """%inside (p: f32[64,128], i: s32[64]) -> f32[64] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[64]{0} parameter(1)
  ROOT %gather = f32[64]{0} gather(%p, %i), slice_sizes={1,1}
}""",
    )
    assert module.traffic == 3 * 256


def test_matrix_products_show_their_operand_types():
    module = program(
        [
            "%a = bf16[8,16]{1,0} parameter(0)",
            "%b = f32[16,4]{1,0} parameter(1)",
            "%c = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={0}",
            "%d = f32[16,4]{1,0} convolution(%a, %a), dim_labels=bf_io->bf",
            'ROOT %e = f32[8,4]{1,0} custom-call(%c), custom_call_target="mine"',
        ]
    )
    assert module.matmul_dtypes == {("bf16", "f32"), ("bf16", "bf16")}
    assert module.custom_calls == {"mine"}


def test_a_dot_costs_two_operations_a_term():
    module = program(
        [
            "%a = bf16[3,8,16]{2,1,0} parameter(0)",
            "%b = bf16[3,16,4]{2,1,0} parameter(1)",
            "ROOT %c = f32[3,8,4]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
        ]
    )
    assert module.matmul_flops == 2 * 3 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("right", "labels"), [("bf16[16,4]", "bf_io->bf"), ("bf16[4,16]", "bf_oi->bf")]
)
def test_a_convolution_that_is_a_matrix_product_costs_what_that_does(right, labels):
    module = program(
        [
            "%a = bf16[8,16]{1,0} parameter(0)",
            f"%b = {right}{{1,0}} parameter(1)",
            f"ROOT %c = f32[8,4]{{1,0}} convolution(%a, %b), dim_labels={labels}",
        ]
    )
    assert module.matmul_flops == 2 * 8 * 16 * 4


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_compiled_elementwise_function_is_one_read_and_one_write():
    module = compiled(lambda x: jnp.exp(-x) * x, (512, 512))
    assert module.traffic == 2 * 512 * 512 * 4
    assert "exponential" in module.opcodes


def test_the_products_of_a_compiled_loop_are_counted_in_full():
    def total(x, matrix):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ matrix), None), x, length=7)[0]

    module = compiled(total, (64, 32), (32, 32))
    assert module.matmul_flops == 7 * 2 * 64 * 32 * 32


def test_a_compiled_loop_is_counted_in_full():
    def total(x):
        return jax.lax.scan(lambda c, row: (c + jnp.cos(row), None), x[0], x)[0]

    # Every step reads a row and the carry and writes the carry.
    steps, size = 100, 4096
    traffic = compiled(total, (steps, size)).traffic
    assert 3 * steps * size * 4 <= traffic <= 6 * steps * size * 4
