"""elementwise: every instruction against float64 and torch, programs of any form, and what bad input gets."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import INSTRUCTION_ERROR, assert_exact, assert_instruction

from lamina import _C
from lamina.ops import elementwise, elementwise_program
from lamina.ops.elementwise import DTYPES, INSTRUCTIONS, instructions
from lamina.reference.elementwise import INSTRUCTIONS as REFERENCES
from lamina.reference.elementwise import elementwise as reference

HEADER = Path(__file__).parents[2] / "csrc/cpu/kernels/elementwise.h"

SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, -3e38, 2.5, -2.5, 0.5, -0.3),
    *(88.5, -87.0, -100.0, 9000.0, 1e6, 3.5, 8388609.0, -4194303.5),
]


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def numbers(generator: torch.Generator) -> torch.Tensor:
    """Of every size and sign, and those that are special."""
    normal = 4 * torch.randn(2000, generator=generator)
    sizes = torch.exp(160 * torch.rand(2000, generator=generator) - 80)
    near_one = 0.5 + torch.rand(1000, generator=generator)
    return torch.cat([torch.tensor(SPECIAL), normal, sizes, -sizes[:1000], near_one])


def operands_of(name: str, generator: torch.Generator) -> list[torch.Tensor]:
    if name == "pow":
        base = torch.exp(20 * torch.rand(3000, generator=generator) - 10)
        near_one = 0.5 + torch.rand(3000, generator=generator)
        powers = torch.cat([16 * torch.rand(3000, generator=generator) - 8, 100 * torch.randn(3000).clamp(-2, 2)])
        special = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL))
        return [torch.cat([special[:, 0], base, near_one]), torch.cat([special[:, 1], powers])]
    x = numbers(generator)
    if name == "hardswish":
        x = x[x.abs() < 1e37]  # six times x must be finite, as in torch
    return [x.roll(i * 7) for i in range(INSTRUCTIONS[name])]


# -- instructions


def test_python_and_the_kernel_agree_on_the_instructions():
    found = re.findall(r"^  CODE\((\w+), (\d), \d+\)", HEADER.read_text("utf-8"), flags=re.MULTILINE)
    assert [(name, int(count)) for name, count in found] == list(INSTRUCTIONS.items())
    assert list(REFERENCES) == list(INSTRUCTIONS)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_is_as_good_as_it_says(isa, name, generator):
    operands = operands_of(name, generator)
    actual = elementwise(operands, [(name, *range(len(operands)))], dtype=torch.float32)
    if name == "sqrt":
        # Rounded correctly, which torch.sqrt is not.
        assert_exact(actual, operands[0].double().sqrt().float())
    elif name in INSTRUCTION_ERROR:
        assert_instruction(actual, name, operands[0].double(), REFERENCES[name](*(x.double() for x in operands)))
    else:
        assert_exact(actual, REFERENCES[name](*operands).float())


@pytest.mark.parametrize("name", ["add", "mul", "div", "sub", "maximum", "minimum", "lt", "eq", "where"])
def test_operands_may_be_scalars_and_constants(isa, name, generator):
    x = torch.randn(70, generator=generator)
    rest = INSTRUCTIONS[name] - 1
    constants = [0.3, -1.5][:rest]
    expected = REFERENCES[name](x, *map(torch.tensor, constants)).float()
    program = [(name, *range(rest + 1))]
    assert_exact(elementwise([x], program, constants, dtype=torch.float32), expected)
    scalars = [torch.tensor(c) for c in constants]
    assert_exact(elementwise([x, *scalars], program, dtype=torch.float32), expected)
    spread = [s.expand(70) for s in scalars]
    assert_exact(elementwise([x, *spread], program, dtype=torch.float32), expected)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -0.5, -1.0, 1.0])
def test_simple_powers_are_torchs(isa, exponent, generator):
    x = numbers(generator)
    expected = torch.pow(x.double(), 0.5).float() if exponent == 0.5 else torch.pow(x, exponent)
    assert_exact(elementwise([x], [("pow", 0, 1)], [exponent]), expected)


def test_any_power_of_a_constant_exponent(isa, generator):
    x = operands_of("pow", generator)[0]
    for exponent in (0.0, 4.0, -2.0, 0.75, 1.7):
        actual = elementwise([x], [("pow", 0, 1)], [exponent])
        assert_instruction(actual, "pow", x.double(), torch.pow(x.double(), torch.tensor(exponent).double().item()))


def test_a_neighbour_changes_nothing(isa, generator):
    """Elements that need libm do not pull others along: the same element, the same bits."""
    x = numbers(generator)
    for name in ("sin", "cos", "exp", "log"):
        whole = elementwise([x], [(name, 0)])
        apart = torch.cat([elementwise([piece], [(name, 0)]) for piece in x.split(7)])
        assert_exact(whole, apart, name)
    y = x.roll(3)
    apart = [elementwise([a, b], [("pow", 0, 1)]) for a, b in zip(x.split(5), y.split(5), strict=True)]
    assert_exact(elementwise([x, y], [("pow", 0, 1)]), torch.cat(apart))


# -- programs

ARITHMETIC = ("add", "sub", "mul", "maximum", "minimum", "neg", "abs", "lt", "ge", "where", "logical_not", "relu")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_program_is_torchs_bit_for_bit(data):
    """Of instructions that round once: shapes that broadcast, dtypes and strides of every kind, results used again."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = draw(
        st.lists(st.sampled_from([1, 2, 3, 5, 16, 17, 40, 1100]), max_size=4).filter(lambda s: math.prod(s) < 4e4)
    )
    inputs = []
    for i in range(draw(st.integers(1, 4))):
        sizes = [1 if i and draw(st.booleans()) else size for size in shape]
        x = 4 * torch.randn(sizes, generator=generator)
        order = draw(st.permutations(range(len(sizes))))
        x = x.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])
        inputs.append((x > 0) if draw(st.integers(0, 3)) == 0 else x.to(draw(st.sampled_from(DTYPES[:2]))))
    constants = [0.5, -2.0][: draw(st.integers(0, 2))]
    program, count = [], len(inputs) + len(constants)
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(ARITHMETIC))
        program.append((name, *(draw(st.integers(0, count - 1)) for _ in range(INSTRUCTIONS[name]))))
        count += 1
    for dtype in DTYPES:
        actual = elementwise(inputs, program, constants, dtype=dtype)
        assert_exact(actual, reference(inputs, program, constants).to(dtype), str(program))


def test_a_program_may_keep_many_results(generator):
    x = torch.randn(3000, generator=generator)
    squares = [("mul", 0, i) for i in range(40)]
    sums = [("add", 1, 2)] + [("add", 40 + i, 2 + i) for i in range(1, 39)]
    assert_exact(elementwise([x], squares + sums), reference([x], squares + sums))


def test_in_place(generator):
    """The compiled function may write over an input that lies as its output does."""
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.randn(2, 37, 90, generator=generator).to(dtype).unbind()
        program = elementwise_program([("mul", 0, 1), ("sub", 2, 0), ("add", 3, 0)])
        expected = torch.ops.lamina.elementwise([x, y], program, [], dtype)
        _C.elementwise([x, y], program, [], x)
        assert_exact(x, expected)


def test_results_keep_the_layout_of_images(generator):
    x, bias = torch.randn(2, 5, 7, 6, generator=generator), torch.randn(5, 1, 1, generator=generator)
    last = x.contiguous(memory_format=torch.channels_last)
    assert elementwise([x, bias], [("add", 0, 1)]).is_contiguous()
    assert elementwise([bias, last], [("add", 0, 1)]).is_contiguous(memory_format=torch.channels_last)
    assert elementwise([last, x], [("add", 0, 1)]).is_contiguous(memory_format=torch.channels_last)


def test_dtype_of_the_result():
    x, h = torch.randn(4), torch.randn(4).bfloat16()
    assert elementwise([x, h], [("add", 0, 1)]).dtype is torch.float32
    assert elementwise([h, h], [("add", 0, 1)]).dtype is torch.bfloat16
    assert elementwise([h > 0], [("neg", 0)]).dtype is torch.float32
    assert elementwise([x], [("gt", 0, 1)], [0.0]).dtype is torch.bool


def test_names_and_numbers():
    program = [("add", 0, 1), ("where", 2, 0, 1), ("relu", 3)]
    assert elementwise_program(program) == (0, 0, 1, -1, 38, 2, 0, 1, 19, 3, -1, -1)
    assert instructions(elementwise_program(program)) == program


def test_gradients_and_other_dtypes_are_torchs(generator):
    x = torch.randn(3, 5, generator=generator, requires_grad=True)
    elementwise([x], [("mul", 0, 0), ("relu", 1)]).sum().backward()
    assert_exact(x.grad, (2 * x).detach())
    y = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    assert_exact(elementwise([y], [("exp", 0)]), y.exp())
    assert elementwise([y.to("meta")], [("exp", 0)]).shape == (3, 5)


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "inputs and program must hold at least one"),
        ({"program": []}, "inputs and program must hold at least one"),
        ({"program": [("plus", 0, 1)]}, "instruction 0 is 'plus'; use one of add, "),
        ({"program": [("add", 0)]}, "instruction 0, add, has 1 operands, but takes 2"),
        (
            {"program": [("add", 0, 2)]},
            "instruction 0, add, has operand 2, but there are 2 inputs, constants and results",
        ),
        ({"inputs": [torch.ones(3), torch.ones(4)]}, r"inputs of shapes \[3\], \[4\] do not broadcast"),
        ({"dtype": torch.int32}, "out is int32, but must be float32 or bfloat16 or bool"),
        ({"constants": [0.0] * 70}, "there are 72 inputs and constants, but at most 63 are taken"),
        ({"inputs": [torch.ones([1] * 17)] * 2}, "out has 17 dimensions, but at most 16 are taken"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_refuses_in_one_sentence(arguments, message):
    call = {"inputs": [torch.ones(3)] * 2, "program": [("add", 0, 1)], "constants": [], "dtype": None, **arguments}
    with pytest.raises(ValueError, match=f"elementwise: {message}") as error:
        elementwise(call["inputs"], call["program"], call["constants"], dtype=call["dtype"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("program", "out", "message"),
    [
        ([0, 0], torch.empty(3), "program has 2 numbers, but must have four for each"),
        ([99, 0, 0, -1], torch.empty(3), "instruction 0 has code 99, but codes are 0 to 38"),
        ([19, 0, 0, -1], torch.empty(3), "instruction 0, relu, takes 1 operands, the others must be -1, not 0"),
        (
            [19, 0, -1, -1],
            torch.empty(4),
            r"inputs\[0\] is float32\[3\], but must broadcast to the shape of out, float32\[4",
        ),
        ([19, 0, -1, -1], torch.empty(1).expand(3), "out is expanded"),
    ],
)
def test_compiled_function_refuses_in_one_sentence(program, out, message):
    with pytest.raises(ValueError, match=f"elementwise: {message}"):
        _C.elementwise([torch.ones(3)], program, [], out)
