"""int8_pool2d on a GPU: the bits of the CPU."""

import pytest
import torch
from tolerances import assert_exact

from lamina.ops import int8_adaptive_avg_pool2d, int8_avg_pool2d, int8_max_pool2d, int8_pool2d
from lamina.ops.library import CPU_IMPLEMENTATIONS

cpu = CPU_IMPLEMENTATIONS[torch.ops.lamina.int8_pool2d.default]


def images(device, *shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(device)


def on_cpu(x, kind, kernel, stride, padding, dilation=(1, 1), ceil_mode=False, include=True, divisor=None, *scales):
    scales = [t.cpu() if isinstance(t, torch.Tensor) else t for t in scales]
    return cpu(x.cpu(), kind, kernel, stride, padding, dilation, ceil_mode, include, divisor, *scales)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("geometry", [((3, 3), (2, 2), (1, 1)), ((2, 5), (1, 3), (0, 2)), ((4, 1), (3, 2), (2, 0))])
def test_windows(device, geometry, ceil_mode):
    kernel, stride, padding = geometry
    for x in (images(device, 2, 5, 11, 12), images(device, 1, 16, 8, 7).to(memory_format=torch.channels_last)):
        y = int8_max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_exact(y.cpu(), on_cpu(x, "max", kernel, stride, padding, (1, 1), ceil_mode))
        for include in (False, True):
            y = int8_avg_pool2d(x, kernel, stride, padding, ceil_mode, include)
            assert_exact(y.cpu(), on_cpu(x, "avg", kernel, stride, padding, (1, 1), ceil_mode, include))
    x_scale, out_scale = torch.tensor(0.03, device=device), torch.tensor(0.0211, device=device)
    for given in [{}, {"out_scale": out_scale}, {"out_dtype": torch.bfloat16}]:
        y = int8_avg_pool2d(x, kernel, stride, padding, ceil_mode, divisor_override=7, x_scale=x_scale, **given)
        scales = x_scale, given.get("out_scale"), given.get("out_dtype")
        assert_exact(y.cpu(), on_cpu(x, "avg", kernel, stride, padding, (1, 1), ceil_mode, True, 7, *scales))


def test_dilation_and_unbatched_images(device):
    x = images(device, 6, 9, 9)
    y = int8_max_pool2d(x, 3, 1, 1, 2)
    assert_exact(y.cpu(), on_cpu(x, "max", (3, 3), (1, 1), (1, 1), (2, 2)))


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 9), (10, 2)])
def test_adaptive(device, size):
    x, scale = images(device, 2, 20, 7, 9), torch.tensor(0.03, device=device)
    assert_exact(int8_adaptive_avg_pool2d(x, size).cpu(), on_cpu(x, "adaptive_avg", size, (1, 1), (0, 0)))
    ends = ((1, 1), False, True, None, scale)
    assert_exact(
        int8_adaptive_avg_pool2d(x, size, x_scale=scale).cpu(), on_cpu(x, "adaptive_avg", size, (1, 1), (0, 0), *ends)
    )


def test_refuses_what_does_not_fit(device):
    x, scale = images(device, 1, 3, 6, 6), torch.tensor(0.1, device=device)
    for arguments, options, message in [
        ((x.float(), "max", 2), {}, "int8_pool2d: x is float32, but must be int8"),
        ((x, "min", 2), {}, "int8_pool2d: kind 'min' is unknown; use max, avg or adaptive_avg"),
        ((x, "max", 2), {"x_scale": scale}, "int8_pool2d: the largest codes keep their scale"),
        ((x, "avg", 2), {"out_scale": scale}, "int8_pool2d: out_scale goes with x_scale"),
        ((x, "avg", 2, 2, 2), {}, "int8_pool2d: padding is 2, but must be at most half of the kernel, 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            int8_pool2d(*arguments, **options)
