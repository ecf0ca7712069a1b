"""int8_conv2d in Triton: an implicit product over NHWC pixels of int8 codes, summed exactly in int32.

    y[pixel, n] = act(float(sum_taps,c x[pixel + tap, c] w[n, tap, c]) * (w_scale[n] * x_scale) + bias[n]
                      + residual[pixel, n] * residual_scale)

Output pixels are rows and output channels columns of a matrix; nothing is gathered in memory: a program goes through
taps and channels, and reads for each of its pixels the channels under the tap, zeros outside the image. On a GPU a
weight lies as [N, KH, KW, C / groups], so that both operands are runs of channels. Where these are no runs of 16 bytes
(an image of three channels), taps and channels are one index, and bytes are read one by one. One filter for each
channel has no product to make: taps are added up in registers.

The operations behind the sums are those of csrc/ops/int8_conv2d.cpp in their order, with 1 / out_scale folded into
scale, bias and residual where the CPU folds it. It decides that for an image, here each pixel does for its channels of
a program: int8 outputs are the bits of the CPU but for images in which some |y| might pass 2^30 steps of the output.

float pixels become codes first: the largest |x| of each image by a maximum of its bits, exact in any order, then the
codes, which are written as NHWC whatever the order of x.
"""

import torch
import triton
import triton.language as tl
from lamina.kernels.device import capability, check_same_device, multiprocessors, on_device_of
from lamina.kernels.epilogue import activate, int8_codes, magnitude_bits, round_half_even
from lamina.kernels.tuning.int8_conv2d import Int8ConvTile, int8_conv_tile
from torch import Tensor

_PIXELS: tl.constexpr = tl.constexpr(2048)

# A change of these compiles nothing: images of every size are one kernel.
_ANY = ("pixels", "height", "width", "out_height", "out_width", "stride_y", "stride_x", "top", "left")
_ANY += ("dilation_y", "dilation_x")


@triton.jit
def _image_maxima_kernel(x, bits, size, inner, outer_stride, inner_stride, image_stride, BLOCK: tl.constexpr):
    """bits[image] = max of the bits of |x| over the image's `size` values; x is [outer][inner] in steps of any size."""
    parts = tl.cdiv(size, 8 * BLOCK)
    image, place = (tl.program_id(0) // parts).to(tl.int64), (tl.program_id(0) % parts).to(tl.int64)
    most = tl.zeros((BLOCK,), tl.int32)
    for part in range(8):
        at = (place * 8 + part) * BLOCK + tl.arange(0, BLOCK)
        offset = at // inner * outer_stride + at % inner * inner_stride
        v = tl.load(x + image * image_stride + offset, at < size, 0.0).to(tl.float32)
        most = tl.maximum(most, magnitude_bits(v))
    tl.atomic_max(bits + image, tl.max(most, 0))


@triton.jit(do_not_specialize=["pixels", "width"])
def _quantize_pixels_kernel(
    x,
    bits,
    given,
    codes,
    scales,
    pixels,
    channels,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pixels [ROWS] of an image, all their channels -> codes [pixels, channels]; and the image's scale."""
    parts = tl.cdiv(pixels, ROWS)
    image, place = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    pixel = place.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.load(bits + image)
    bad = largest >= 0x7F800000
    value = largest.to(tl.float32, bitcast=True)
    if HAS_SCALE:
        scale = tl.load(given)
    else:
        # Below 1e-36 the inverse of a scale would overflow; such an image counts as zero.
        scale = tl.where(value < 127e-36, 0.0, tl.div_rn(tl.where(bad, 0.0, value), 127.0))
    usable = (scale > 0.0) & (bad == 0)
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    if place == 0:
        tl.store(scales + image, tl.where(bad, float("nan"), scale))
    from_pixel = x + image * image_stride + pixel // width * row_stride + pixel % width * column_stride
    to_pixel = codes + (image * pixels + pixel) * channels
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        v = tl.load(from_pixel[:, None] + channel[None, :] * channel_stride, mask, 0.0).to(tl.float32)
        v = tl.where(usable, v, 0.0)
        tl.store(to_pixel[:, None] + channel[None, :], int8_codes(v, inverse), mask)


@triton.jit
def _finish(
    sums,
    pixel,
    channel,
    there,
    of_channel,
    per_image,
    all_channels,
    depth,
    x_scale,
    x_scale_step,
    w_scale,
    bias,
    residual,
    residual_scale,
    out_scale,
    out,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_CODES: tl.constexpr,
    WANTS_CODES: tl.constexpr,
):
    """sums int32 [pixels, channels] of a block -> out; `there` and `of_channel` say which are wanted."""
    wanted = there[:, None] & of_channel[None, :]
    at = pixel.to(tl.int64)[:, None] * all_channels + channel[None, :]
    by_channel = tl.load(w_scale + channel, of_channel, 0.0)
    by_image = tl.load(x_scale + pixel // per_image * x_scale_step, there, 0.0)
    scale = by_channel[None, :] * by_image[:, None]
    offset = tl.zeros((1, channel.shape[0]), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, of_channel, 0.0).to(tl.float32)[None, :]
    step = 1.0
    if RESIDUAL_CODES:
        step = tl.load(residual_scale)
    EXACT: tl.constexpr = ACTIVATION == "none" or ACTIVATION == "relu" or ACTIVATION == "relu6"
    FOLDS: tl.constexpr = WANTS_CODES and EXACT and (RESIDUAL_CODES or not HAS_RESIDUAL)
    if WANTS_CODES:
        inverse = tl.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.load(out_scale) + tl.zeros((1, 1), tl.float32))
    if FOLDS:
        # A pixel folds 1 / out_scale in where none of its |y| can pass 2^30; else, or with a NaN, the factor is 1.
        most = scale * inverse * (16256.0 * depth) + tl.abs(offset * inverse)
        if HAS_RESIDUAL:
            most = most + 128.0 * (step * inverse)
        folds = tl.max(tl.where(most <= 1073741824.0, 0, 1), 1)[:, None] == 0
        factor = tl.where(folds, inverse, 1.0)
        scale, offset, step = scale * factor, offset * factor, step * factor
    y = sums.to(tl.float32) * scale + offset
    if HAS_RESIDUAL:
        added = tl.load(residual + at, wanted, 0).to(tl.float32)
        if RESIDUAL_CODES:
            y = y + added * step
        else:
            y = y + added
    if FOLDS:
        if ACTIVATION != "none":
            y = tl.where(y < 0.0, 0.0, y)
        if ACTIVATION == "relu6":
            # 6 steps of 2^22 and more are beyond 127 however they are rounded.
            steps = tl.minimum(round_half_even(tl.minimum(6.0 * inverse, 4194304.0)), 127.0)
            highest = tl.where(folds, steps, 6.0)
            y = tl.where(y > highest, highest, y)
        tl.store(out + at, int8_codes(y, tl.where(folds, 1.0, inverse)), wanted)
    elif WANTS_CODES:
        tl.store(out + at, int8_codes(activate(y, ACTIVATION), inverse), wanted)
    else:
        tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), wanted)


@triton.jit(do_not_specialize=_ANY)
def _int8_conv2d_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    residual,
    residual_scale,
    out_scale,
    out,
    partial,
    pixels,
    channels,
    group_channels,
    height,
    width,
    out_height,
    out_width,
    image_stride,
    row_stride,
    column_stride,
    stride_y,
    stride_x,
    top,
    left,
    dilation_y,
    dilation_x,
    x_scale_step,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_CODES: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    RUNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """channels: of a group's input; group_channels: of its output. Programs: tiles, groups, shares of the sum."""
    across = tl.cdiv(group_channels, BLOCK_N)
    pixel = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    in_group = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    per_image = out_height * out_width
    there = pixel < pixels
    image, place = pixel // per_image, pixel % per_image
    y = place // out_width * stride_y - top
    column = place % out_width * stride_x - left
    x_at = x + image.to(tl.int64) * image_stride + group * channels
    x_at += y.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    depth = KH * KW * channels
    # What lies beyond the last channel reads the first again: no mask, and never stored.
    filter_row = group.to(tl.int64) * group_channels + in_group % group_channels
    w_at = w + filter_row * depth

    at = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(channels, BLOCK_K)  # of a tap
    all_steps = KH * KW * blocks if RUNS else tl.cdiv(depth, BLOCK_K)
    steps = tl.cdiv(all_steps, SPLIT)
    begin = tl.program_id(2) * steps
    end = min(begin + steps, all_steps)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(begin, end):
        if RUNS:
            tap = step // blocks
            channel = step % blocks * BLOCK_K + at
            tap_y, tap_x = tap // KW * dilation_y, tap % KW * dilation_x
            inside = there & (y + tap_y >= 0) & (y + tap_y < height) & (column + tap_x >= 0) & (column + tap_x < width)
            # Offsets of a tap and not of pixels: they may pass 2^31 only in images that large.
            offset = tap_y * row_stride + tap_x * column_stride + channel
            if EVEN:
                a = tl.load(x_at[:, None] + offset[None, :], inside[:, None], 0)
                b = tl.load(w_at[:, None] + (tap * channels + channel)[None, :])
            else:
                of_tap = (channel < channels)[None, :]
                a = tl.load(x_at[:, None] + offset[None, :], inside[:, None] & of_tap, 0)
                b = tl.load(w_at[:, None] + (tap * channels + channel)[None, :], of_tap, 0)
        else:
            k = step * BLOCK_K + at
            tap = k // channels
            tap_y, tap_x = tap // KW * dilation_y, tap % KW * dilation_x
            offset = tap_y * row_stride + tap_x * column_stride + k % channels
            tap_y, tap_x = y[:, None] + tap_y[None, :], column[:, None] + tap_x[None, :]
            inside = (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
            a = tl.load(x_at[:, None] + offset[None, :], inside & there[:, None] & (k < depth)[None, :], 0)
            b = tl.load(w_at[:, None] + k[None, :], (k < depth)[None, :], 0)
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    all_channels = group_channels * tl.num_programs(1)
    channel = group * group_channels + in_group
    of_channel = in_group < group_channels
    if SPLIT > 1:
        to = (tl.program_id(2).to(tl.int64) * pixels + pixel.to(tl.int64))[:, None] * all_channels + channel[None, :]
        tl.store(partial + to, sums, there[:, None] & of_channel[None, :])
    else:
        _finish(
            sums,
            pixel,
            channel,
            there,
            of_channel,
            per_image,
            all_channels,
            depth,
            x_scale,
            x_scale_step,
            w_scale,
            bias,
            residual,
            residual_scale,
            out_scale,
            out,
            ACTIVATION,
            HAS_BIAS,
            HAS_RESIDUAL,
            RESIDUAL_CODES,
            WANTS_CODES,
        )


@triton.jit(do_not_specialize=["pixels", "per_image"])
def _int8_conv2d_finish_kernel(
    partial,
    x_scale,
    w_scale,
    bias,
    residual,
    residual_scale,
    out_scale,
    out,
    pixels,
    all_channels,
    per_image,
    depth,
    x_scale_step,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_CODES: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = pixel < pixels
    wanted = there[:, None] & (channel < all_channels)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for share in tl.static_range(SPLIT):
        at = (pixel.to(tl.int64) + share * pixels.to(tl.int64))[:, None] * all_channels + channel[None, :]
        sums += tl.load(partial + at, wanted, 0)
    _finish(
        sums,
        pixel,
        channel,
        there,
        channel < all_channels,
        per_image,
        all_channels,
        depth,
        x_scale,
        x_scale_step,
        w_scale,
        bias,
        residual,
        residual_scale,
        out_scale,
        out,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
        RESIDUAL_CODES,
        WANTS_CODES,
    )


@triton.jit(do_not_specialize=_ANY)
def _int8_depthwise_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    residual,
    residual_scale,
    out_scale,
    out,
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    image_stride,
    row_stride,
    column_stride,
    stride_y,
    stride_x,
    top,
    left,
    dilation_y,
    dilation_x,
    x_scale_step,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_CODES: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    per_image = out_height * out_width
    there, of_channel = pixel < pixels, channel < channels
    image, place = pixel // per_image, pixel % per_image
    y = place // out_width * stride_y - top
    column = place % out_width * stride_x - left
    x_at = x + image.to(tl.int64) * image_stride + y.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(KH * KW):
        tap_y, tap_x = tap // KW * dilation_y, tap % KW * dilation_x
        inside = there & (y + tap_y >= 0) & (y + tap_y < height) & (column + tap_x >= 0) & (column + tap_x < width)
        offset = tap_y * row_stride + tap_x * column_stride + channel
        a = tl.load(x_at[:, None] + offset[None, :], inside[:, None] & of_channel[None, :], 0)
        b = tl.load(w + channel * (KH * KW) + tap, of_channel, 0)
        sums += a.to(tl.int32) * b.to(tl.int32)[None, :]
    _finish(
        sums,
        pixel,
        channel,
        there,
        of_channel,
        per_image,
        channels,
        KH * KW,
        x_scale,
        x_scale_step,
        w_scale,
        bias,
        residual,
        residual_scale,
        out_scale,
        out,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
        RESIDUAL_CODES,
        WANTS_CODES,
    )


def quantize_pixels(x: Tensor, scale: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    """x [images, channels, height, width] float, any strides -> codes int8 [images, height, width, channels] and scales
    float32 [images]: max |x| / 127 of each image, or `scale` [] with codes clamped; NaN for an image that is not
    finite."""
    images, channels, height, width = x.shape
    size = channels * height * width
    bits = torch.zeros(images, dtype=torch.int32, device=x.device)
    if images == 0 or size == 0:
        scales.copy_(torch.zeros_like(scales) if scale is None else scale.expand_as(scales))
        return
    image, channel, row, column = x.stride()
    # In the order of memory where an image's values lie in one or two even steps, else by channels.
    inner, outer_stride, inner_stride = height * width, channel, column
    if channel == 1 and column == channels and row == channels * width:
        inner, outer_stride, inner_stride = size, 0, 1
    elif row != column * width:
        x = x.contiguous(memory_format=torch.channels_last)
        image, channel, row, column = size, 1, channels * width, channels
        inner, outer_stride, inner_stride = size, 0, 1
    block = max(16, min(128, triton.next_power_of_2(channels)))
    rows = max(1, 4096 // block)
    with on_device_of(x):
        _image_maxima_kernel[(images * triton.cdiv(size, 8 * _PIXELS.value),)](
            x,
            bits,
            size,
            inner,
            outer_stride,
            inner_stride,
            image,
            BLOCK=_PIXELS.value,
            num_warps=8,
        )
        _quantize_pixels_kernel[(images * triton.cdiv(height * width, rows),)](
            x,
            bits,
            scale,
            codes,
            scales,
            height * width,
            channels,
            width,
            image,
            channel,
            row,
            column,
            HAS_SCALE=scale is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=False,
        )


def int8_conv2d(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
    tile: Int8ConvTile | None = None,
) -> None:
    """codes int8 [images, height, width, channels] with adjacent channels, x_scale float32 [] or [images], weight int8
    [N, KH, KW, C / groups] contiguous, residual and out [images, out height, out width, N] contiguous; padding: top,
    bottom, left, right. Scales are float32, of outputs and residuals []."""
    check_same_device(
        "int8_conv2d",
        codes,
        x_scale=x_scale,
        packed_weight=weight,
        scale=w_scale,
        bias=bias,
        residual=residual,
        residual_scale=residual_scale,
        out_scale=out_scale,
    )
    images, height, width, _ = codes.shape
    n, kh, kw, channels = weight.shape
    _, out_height, out_width, _ = out.shape
    pixels = images * out_height * out_width
    if pixels == 0 or n == 0:
        return
    depthwise = groups > 1 and channels == 1 and n == groups
    group_channels = n // groups
    if tile is None:
        tile = int8_conv_tile(
            pixels, group_channels, groups, channels, kh * kw, capability(codes), multiprocessors(codes)
        )
    ends = (x_scale, w_scale, bias, residual, residual_scale, out_scale, out)
    geometry = (
        height,
        width,
        out_height,
        out_width,
        *codes.stride()[:3],
        *stride,
        padding[0],
        padding[2],
        *dilation,
        x_scale.stride(0) if x_scale.ndim else 0,
    )
    options = {
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "RESIDUAL_CODES": residual is not None and residual.dtype is torch.int8,
        "WANTS_CODES": out_scale is not None,
        "enable_fp_fusion": False,
    }
    with on_device_of(codes):
        if depthwise:
            block = max(16, min(128, triton.next_power_of_2(n)))
            rows = 4096 // block
            _int8_depthwise_kernel[(triton.cdiv(pixels, rows), triton.cdiv(n, block))](
                codes, weight, *ends, pixels, n, *geometry, KH=kh, KW=kw, BLOCK_M=rows, BLOCK_N=block, **options
            )
            return
        partial = None
        if tile.split > 1:
            partial = torch.empty(tile.split, pixels, n, dtype=torch.int32, device=codes.device)
        tiles = triton.cdiv(pixels, tile.pixels) * triton.cdiv(group_channels, tile.channels)
        _int8_conv2d_kernel[(tiles, groups, tile.split)](
            codes,
            weight,
            *ends,
            partial,
            pixels,
            channels,
            group_channels,
            *geometry,
            KH=kh,
            KW=kw,
            BLOCK_M=tile.pixels,
            BLOCK_N=tile.channels,
            BLOCK_K=tile.k,
            SPLIT=tile.split,
            RUNS=channels % 16 == 0,
            EVEN=channels % tile.k == 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **options,
        )
        if partial is not None:
            _int8_conv2d_finish_kernel[(triton.cdiv(pixels, 4), triton.cdiv(n, 256))](
                partial,
                *ends,
                pixels,
                n,
                out_height * out_width,
                kh * kw * channels,
                geometry[-1],
                SPLIT=tile.split,
                BLOCK_M=4,
                BLOCK_N=256,
                num_warps=4,
                **options,
            )
