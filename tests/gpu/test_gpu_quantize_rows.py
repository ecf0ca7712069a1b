"""quantize_rows on a GPU: codes and scales are the bits of the reference."""

import pytest
import torch
from tolerances import assert_exact

from lamina.ops import quantize_rows
from lamina.reference.quantize_rows import quantize_rows as reference

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, scale=None):
    codes, scales = quantize_rows(x, scale)
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    expected = reference(x.cpu(), None if scale is None else scale.cpu())
    assert_exact((codes.cpu(), scales.cpu()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize("shape", [(5, 77), (3, 1), (1, 768), (2, 4, 33), (70, 16), (19,), (2, 1500)], ids=str)
def test_codes_are_those_of_the_reference(device, shape, dtype, scale):
    x = torch.randn(shape).to(dtype).to(device)
    check(x, None if scale is None else torch.tensor(scale, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_rows_longer_than_a_block(device, dtype, scale):
    x = torch.randn(2, 20000).to(dtype).to(device)
    check(x, None if scale is None else torch.tensor(scale, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_ties_clamps_and_rows_that_are_not_finite(device, dtype, scale):
    x = 20 * torch.randn(30, 97)
    x[:10] = (torch.randint(-127, 127, (10, 97)) + 0.5) / 4
    x[:10, 0] = 127 / 4
    x[10], x[11, 5], x[12, 6], x[13, 7], x[14, 8] = 0.0, float("nan"), float("inf"), -float("inf"), 3e38
    x[15] *= 1e-38
    check(x.to(dtype).to(device), None if scale is None else torch.tensor(scale, device=device))


@pytest.mark.parametrize("layout", ["transposed", "every_second", "row_repeated", "sliced"])
def test_strides(device, layout):
    x = torch.randn(40, 60, device=device)
    x = {
        "transposed": x.T,
        "every_second": x[::2, ::2],
        "row_repeated": x[:1].expand(7, 60),
        "sliced": x[3:9, 5:38],
    }[layout]
    check(x)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing(device, shape):
    check(torch.empty(shape, device=device))


def test_the_same_bits_again(device):
    x = torch.randn(33, 300, device=device)
    assert_exact(quantize_rows(x), quantize_rows(x))


def test_refuses_what_it_cannot_take(device):
    with pytest.raises(ValueError, match="quantize_rows: x is float64, but must be float32, bfloat16 or float16"):
        quantize_rows(torch.ones(2, 5, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match="quantize_rows: x is a scalar"):
        quantize_rows(torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match=r"quantize_rows: scale is float32 \[2\], but must be float32 \[\]"):
        quantize_rows(torch.ones(2, 5, device=device), torch.ones(2, device=device))


def _compiled(dtype: torch.dtype, k: int, given: bool = False):
    def launch():
        from lamina.kernels.quantize_rows import quantize_rows as kernel

        kernel(
            torch.empty(64, k, dtype=dtype, device="meta"),
            torch.empty((), device="meta") if given else None,
            torch.empty(64, k, dtype=torch.int8, device="meta"),
            torch.empty(64, device="meta"),
        )

    return launch


COMPILED = [
    _compiled(torch.bfloat16, 768),
    _compiled(torch.float32, 4096),
    _compiled(torch.bfloat16, 4096, given=True),
    _compiled(torch.float16, 77),
    _compiled(torch.bfloat16, 16384),
    _compiled(torch.bfloat16, 28672),
]
