"""What pool2d and int8_pool2d share: the windows of a pooling, what they must fit, and how many of them there are."""

from collections.abc import Sequence

from torch import Tensor


def pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)


def check_windows(
    op: str,
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    divisor: int | None,
) -> None:
    """What must hold before an output can be allocated. `kernel` is the output's size for "adaptive_avg"."""
    if x.ndim not in (3, 4):
        raise ValueError(f"{op}: x has shape {list(x.shape)}, but must be [images, channels, height, width]")
    if divisor is not None and divisor == 0:
        raise ValueError(f"{op}: divisor_override is 0, but must not be")
    if kind == "adaptive_avg":
        if min(kernel) < 0:
            raise ValueError(f"{op}: the output's size is {list(kernel)}, but must not be negative")
        return
    for name, values in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
        if min(values) < 1:
            raise ValueError(f"{op}: {name} is {list(values)}, but must be positive")
    for size, k, p, d in zip(x.shape[-2:], kernel, padding, dilation, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"{op}: the padded input has {size + 2 * p} pixels, but the kernel covers {d * (k - 1) + 1}"
            )


def output_size(
    image: Sequence[int],
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """[height, width] of the output for an image [height, width]."""
    if kind == "adaptive_avg":
        return list(kernel)
    return [_windows(*of, ceil_mode) for of in zip(image, kernel, stride, padding, dilation, strict=True)]


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    # No window begins behind the last pixel and its padding.
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count
