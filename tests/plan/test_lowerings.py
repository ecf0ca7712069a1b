"""What lamina's ops do in the place of torch's: the same results, and no call of torch left."""

import pytest
import torch
from test_plans import EVERY, Net, close, torch_calls
from tolerances import assert_exact
from torch import nn
from torch.nn import functional as F

import lamina


def check(forward, *inputs, left=(), exact=True, **layers):
    """A plan of `forward` gives what eager gives, twice, and leaves nothing but `left` to torch."""
    net = Net(forward, **layers).eval()
    plan = lamina.make_plan(net, inputs, options=EVERY)
    assert torch_calls(plan) == [f"aten.{name}" for name in left]
    with torch.no_grad():
        for _ in range(2):
            expected, actual = net(*inputs), plan(*inputs)
            if exact:
                assert_exact(actual, expected)
            else:
                close(actual, expected)
    return plan


# -- padding


@pytest.mark.parametrize("pad", [(1, 2), (0, 0, 3, 0), (2, 1, 1, 0, 0, 4), (1, 0, 0, 0, 0, 0, 2, 1)])
def test_padding_with_a_constant(pad):
    x = torch.randn(2, 3, 4, 5)
    check(lambda m, x: F.pad(x * 2, pad, value=-1.5), x)
    check(lambda m, x: F.pad(x * 2, pad), x.contiguous(memory_format=torch.channels_last))
    check(lambda m, x: F.pad(x > 0, pad, value=True), x)


def test_padding_that_cuts_off_stays_torchs():
    check(lambda m, x: F.pad(x * 2, (1, -1)), torch.randn(2, 5), left=["constant_pad_nd.default"])


def test_padding_by_nothing_is_memory_of_its_own():
    x = torch.randn(2, 5)
    plan = check(lambda m, x: F.pad(x, (0, 0)), x)
    assert plan(x).data_ptr() != x.data_ptr()


# -- places


def test_places_that_lie_evenly():
    """As masks of padding are read: rows one by one, all columns of each."""
    mask = torch.rand(3, 6) > 0.5
    rows, columns = torch.arange(3)[:, None, None, None], torch.arange(6)[None, None, None, :]
    check(lambda m, mask: mask[rows, columns], mask)
    check(lambda m, x: (x * 2)[rows[:, 0, 0], columns[0, 0, :, ::2]], torch.randn(3, 6, 4))


def test_places_in_any_order():
    x = torch.randn(5, 6, 4)
    rows, columns = torch.tensor([4, 0, -1, 2]), torch.tensor([1, -6, 5, 5])
    check(lambda m, x: (x * 2)[rows], x)
    check(lambda m, x: (x * 2)[rows, columns], x)
    check(lambda m, x: (x * 2)[rows[:, None], columns], x)
    check(lambda m, x: (x * 2)[rows.flip(0)], x)


def test_places_that_hang_on_an_input_stay_torchs():
    x, rows = torch.randn(5, 4), torch.tensor([3, -1])
    check(lambda m, x, rows: (x * 2)[rows], x, rows, left=["index.Tensor"])


# -- convolutions


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (2, {"stride": 2}),
        (4, {"stride": 2, "padding": 1, "bias": False}),
        (8, {"stride": 4, "padding": 2}),
        ((3, 5), {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}),
        (3, {"stride": 1, "padding": 2}),
        (2, {"stride": 3}),
    ],
    ids=str,
)
def test_transposed_convolutions(kernel, options):
    x = torch.randn(2, 5, 7, 6)
    for form in (x, x.contiguous(memory_format=torch.channels_last)):
        layer = nn.ConvTranspose2d(5, 4, kernel, **options)
        check(lambda m, x: m.up(x), form, up=layer, exact=False)


def test_transposed_convolutions_in_one_dimension():
    layer = nn.ConvTranspose1d(5, 4, 6, stride=3, padding=1, output_padding=2)
    check(lambda m, x: m.up(x), torch.randn(2, 5, 7), up=layer, exact=False)


def test_other_transposed_convolutions_stay_torchs():
    for options in ({"groups": 2}, {"dilation": 2}):
        layer = nn.ConvTranspose2d(4, 4, 3, **options)
        check(lambda m, x: m.up(x), torch.randn(2, 4, 7, 6), up=layer, exact=False, left=["convolution.default"])


# -- pixels


@pytest.mark.parametrize("factor", [2, (1, 3)])
def test_nearest_pixels(factor):
    x = torch.randn(2, 5, 3, 4)
    for form in (x, x.contiguous(memory_format=torch.channels_last)):
        check(lambda m, x: F.interpolate(x * 2, scale_factor=factor), form)
    check(lambda m, x: F.interpolate(x * 2, size=(6, 4)), x)


def test_nearest_pixels_that_are_repeated_unevenly_stay_torchs():
    check(lambda m, x: F.interpolate(x * 2, size=(7, 4)), torch.randn(1, 2, 3, 4), left=["upsample_nearest2d.default"])


def test_means_over_windows_larger_than_the_image():
    pool = nn.AvgPool2d(9, ceil_mode=True)
    check(lambda m, x: m.pool(x), torch.randn(2, 3, 4, 5), pool=pool, exact=False)


def test_global_means_of_images_that_are_channels_last():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    check(lambda m, x: F.adaptive_avg_pool2d(x * 2, 1).flatten(1), x, exact=False)


# -- numbers


def test_logarithms_of_softmax():
    x = torch.randn(3, 7, 5) * 30
    for dim in (-1, 1):
        check(lambda m, x: F.log_softmax(x, dim), x, exact=False)  # noqa: B023  (called before the next one)


def test_one_row_times_a_matrix():
    check(lambda m, a, b: torch.bmm(a, b), torch.randn(3, 1, 9), torch.randn(3, 9, 17), exact=False)
    check(lambda m, a, b: a @ b, torch.randn(3, 2, 9), torch.randn(3, 9, 17), exact=False, left=["bmm.default"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_are_compared_exactly(dtype):
    near = 2**24
    values = [near - 1, near, near + 1, -near + 1, -near, -near - 1, 0, 7, 2**30 + 1]
    x = torch.tensor([values, values[::-1]], dtype=dtype)
    for limit in (0, 7, near - 1, 1 - near):
        check(lambda m, x: torch.stack([x == limit, x != limit, x < limit, x <= limit, x > limit, x >= limit]), x)  # noqa: B023
    check(lambda m, x: x == near, x, left=["eq.Scalar"])
    check(lambda m, x: x < torch.arange(9, dtype=dtype), x)
    check(lambda m, x, y: x < y, x, x.flip(0).contiguous(), left=["lt.Tensor"])


def test_integers_truths_and_floats_into_each_other():
    x, i = torch.randn(3, 5) * 9, torch.randint(-2, 3, (3, 5))
    check(lambda m, x: (x * 2).long(), x)
    check(lambda m, i: (i.bool(), i.float() * 2, i.int()), i)
    check(lambda m, x: ((x > 0).long(), (x > 0).int()), x)


def test_copies_keep_the_order_in_memory():
    check(lambda m, x: (x.t() * 1).clone().t().view(-1), torch.randn(3, 5))
    check(lambda m, x: x.permute(2, 0, 1).clone(), torch.randn(3, 5, 2))
