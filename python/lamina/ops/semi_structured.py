"""Weights of which two of four neighbouring inputs are zero ("2:4") on sparse tensor cores, by the kernels in torch.

    cusparselt   data [N, S], opaque, and an index without elements, int32 [0, K], whose shape tells K; GPUs from 8.0
    cutlass      data [N, K / 2], the values, and index int16 [N, K / 16], which says where they stand; GPUs 8.x

Both fuse the bias and no more. Which is faster, and whether the dense product is, hangs on the GPU and the shape:
`lamina.sparsity.choose_pattern` measures it, and what it found is remembered by `prefer`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PATTERN = "2:4"

# Multiples that the kernels ask of rows of x, outputs and inputs.
_ROWS, _OUTPUTS, _INPUTS = 8, 32, 64

_preferred: dict[tuple, str] = {}


def kernels(device: torch.device) -> tuple[str, ...]:
    """The kernels that this torch has for the device, the likely faster first."""
    if device.type != "cuda":
        return ()
    on_ampere = torch.cuda.get_device_capability(device)[0] == 8
    found = ("cusparselt",) if torch.backends.cusparselt.is_available() else ()
    return (*found, "cutlass") if on_ampere else found


def obstacle(weight: Tensor) -> str | None:
    """Why no kernel takes a weight [N, K] as 2:4, in words; None if one does. Looks at the values."""
    n, k = weight.shape
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, and 2:4 kernels take bfloat16 and float16"
    if n == 0 or k == 0 or n % _OUTPUTS or k % _INPUTS:
        return f"its weight is [{n}, {k}], and 2:4 kernels take multiples of [{_OUTPUTS}, {_INPUTS}]"
    if bool(((weight.reshape(n, k // 4, 4) != 0).sum(2) > 2).any()):
        return "more than two of four neighbours in its weight are not zero"
    return None if kernels(weight.device) else f"this PyTorch has no 2:4 kernel for {weight.device}"


def prefer(weight: Tensor, kernel: str) -> None:
    """Pack weights of this shape, dtype and device for `kernel` from now on."""
    _preferred[_kind(weight)] = kernel


def _kind(weight: Tensor) -> tuple:
    return (*weight.shape, weight.dtype, weight.device)


def pack(weight: Tensor, kernel: str | None = None) -> tuple[Tensor, Tensor]:
    """(data, index) of a weight without an `obstacle`; kernel: None for the one preferred."""
    weight = weight.contiguous()
    kernel = kernel or _preferred.get(_kind(weight)) or kernels(weight.device)[0]
    if kernel == "cusparselt":
        return torch._cslt_compress(weight), weight.new_empty((0, weight.shape[1]), dtype=torch.int32)
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    return sparse_semi_structured_from_dense_cutlass(weight)


def kernel_of(data: Tensor, index: Tensor) -> str | None:
    """The kernel that (data, index) was packed for; None for what `pack` cannot have given."""
    if data.ndim != 2 or index.ndim != 2:
        return None
    if index.dtype is torch.int32 and index.shape[0] == 0:
        return "cusparselt"
    return "cutlass" if index.dtype is torch.int16 else None


def in_features(data: Tensor, index: Tensor) -> int:
    """K of a packed weight."""
    return index.shape[1] if index.shape[0] == 0 else 2 * data.shape[1]


def unpack(data: Tensor, index: Tensor) -> Tensor:
    """The weight [N, K] with its zeros: the product with the identity, which is exact."""
    identity = torch.eye(in_features(data, index), dtype=data.dtype, device=data.device)
    return multiply(identity, data, index, None).T.contiguous()


def multiply(x: Tensor, data: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight.T + bias [N], of x's dtype, which is that of the weight."""
    rows = x.shape[0]
    # The kernels take whole groups of rows, one below the other.
    x = F.pad(x, (0, 0, 0, -rows % _ROWS)).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if kernel_of(data, index) == "cusparselt":
        return torch._cslt_sparse_mm(data, x.T, bias=bias, transpose_result=True)[:rows]
    if bias is None:
        y = torch._sparse_semi_structured_mm(data, index, x.T)
    else:
        y = torch._sparse_semi_structured_addmm(bias, data, index, x.T)
    return y.T[:rows].contiguous()
