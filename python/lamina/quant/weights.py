"""Quantization of weights: int8 with a scale per output channel, int4 with a scale per group of inputs."""

import math

import torch
from torch import Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floating-point weight [N, ...] -> (codes int8 [N, ...] in [-127, 127], scale float32 [N]).

    scale = max|channel| / 127, codes = round half to even (weight / scale). A channel of zeros gets scale 1, so that
    its codes mean zero without a division by zero. Raises ValueError for NaN or infinity, naming the channel.

    >>> codes, scale = quantize_weight(linear.weight)
    """
    flat = weight.detach().to(torch.float32).flatten(1)
    largest = flat.abs().amax(dim=1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
    bad = (~torch.isfinite(largest)).nonzero()
    if bad.numel():
        raise ValueError(f"quantize_weight: output channel {bad[0].item()} has a NaN or infinite weight")
    # 127 / largest overflows below 1e-36; such a channel counts as zero.
    largest = torch.where(largest < 1e-36, torch.full_like(largest, 127.0), largest)
    # By a tensor: by a number, torch multiplies with its reciprocal on a GPU, which rounds twice.
    scale = largest / torch.full_like(largest, 127.0)
    codes = torch.round(flat / scale[:, None]).clamp_(-127, 127).to(torch.int8)
    return codes.reshape(weight.shape), scale


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """codes int8 [N, ...], scale [N] -> float32 [N, ...]."""
    return codes.to(torch.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))


# Where the search for a group's scale starts: the largest value of the group becomes about minus this many steps.
_INT4_STARTS = (8.0, 7.3, 8.7)
# Weights that are searched at once, so that the passes stay in cache.
_INT4_CHUNK = 1 << 18


def quantize_weight_groups(weight: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Floating-point weight [N, K] -> (codes int8 [N, K] in [-8, 7], scale bfloat16 [N, ceil(K / group_size)]).

    Symmetric: weight = code * scale. The scale's sign is chosen so that the value of the largest magnitude takes code
    -8, the one code without a counterpart, and its size by least squares from three starting points: 1.5 dB better than
    max / 7. `group_size` is a multiple of 32, what the kernels' layout takes; the last group may be shorter. A group
    of zeros gets scale 1. Raises ValueError for NaN or infinity, naming the channel.

    Groups of 32 without an offset are as accurate as groups of 64 with one, which take the same 4.5 bits a weight:
    21.8 and 21.8 dB for normal weights, 21.5 and 21.5 dB for MiniLM's; and no offset has to be read and added.

    >>> codes, scale = quantize_weight_groups(linear.weight, group_size=32)
    """
    if group_size <= 0 or group_size % 32:
        raise ValueError(f"quantize_weight_groups: group_size is {group_size}, but must be a positive multiple of 32")
    n, k = weight.shape
    weight = weight.detach().to(torch.float32)
    bad = (~torch.isfinite(weight)).any(dim=1).nonzero()
    if bad.numel():
        raise ValueError(f"quantize_weight_groups: output channel {bad[0].item()} has a NaN or infinite weight")
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - k)).reshape(n * groups, group_size)
    parts = [_quantize_groups(part) for part in padded.split(max(1, _INT4_CHUNK // group_size))]
    codes = torch.cat([part[0] for part in parts]) if parts else padded.to(torch.int8)
    scale = torch.cat([part[1] for part in parts]) if parts else padded.new_empty(0, dtype=torch.bfloat16)
    return codes.reshape(n, groups * group_size)[:, :k].contiguous(), scale.reshape(n, groups)


def _quantize_groups(values: Tensor) -> tuple[Tensor, Tensor]:
    """values float32 [groups, group_size] -> (codes int8 [groups, group_size], scale bfloat16 [groups])."""
    largest = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    largest = torch.where(largest.abs() < 1e-36, torch.full_like(largest, math.inf), largest)
    unit = values / largest  # in [-1, 1], so that squares neither overflow nor vanish

    def rounded(step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """step of `unit` -> (codes, squared error, scale), with the step that bfloat16 makes of it."""
        scale = (step * largest).to(torch.bfloat16)
        scale = torch.where(largest.isinf(), torch.ones_like(scale), scale)
        step = scale.to(torch.float32) / largest
        codes = torch.where(largest.isinf(), torch.zeros_like(unit), torch.round(unit / step).clamp_(-8, 7))
        return codes, (codes * step - unit).square().sum(dim=1, keepdim=True), scale

    best = None
    for start in _INT4_STARTS:
        found = rounded(torch.full_like(largest, -1 / start))
        for again in (False, True):
            if again:  # the best step for these codes
                codes = found[0]
                total = codes.square().sum(dim=1, keepdim=True).clamp_min(1)
                found = rounded((codes * unit).sum(dim=1, keepdim=True) / total)
            if best is None:
                best = found
            else:
                better = found[1] < best[1]
                best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best[0].to(torch.int8), best[2].flatten()


def dequantize_weight_groups(codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """codes int8 [N, K], scale [N, ceil(K / group_size)] -> float32 [N, K], exact for bfloat16 scales."""
    wide = scale.to(torch.float32).repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]
    return codes.to(torch.float32) * wide


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes [N, K] in [-8, 7] -> uint8 [N, ceil(K / 2)]: two's complement, even k in the low half.

    >>> pack_nibbles(torch.tensor([[1, -8, 7]], dtype=torch.int8)).tolist()
    [[129, 7]]
    """
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8) & 15
    return even[:, ::2] | even[:, 1::2] << 4


def unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, ceil(k / 2)] -> int8 codes [N, k]."""
    both = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :k]
    return (both ^ 8).to(torch.int8) - 8
