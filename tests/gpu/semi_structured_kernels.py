"""torch's kernels for 2:4, emulated where torch has none: on the CPU."""

import pytest
import torch

from lamina.ops import semi_structured


def compress(weight: torch.Tensor) -> torch.Tensor:
    """In the place of cuSPARSELt on a machine without: values, the first two of four, and their places behind them."""
    n = weight.shape[0]
    order = (weight.view(n, -1, 4) == 0).int().argsort(dim=2, stable=True)[..., :2].sort(2).values
    values = weight.view(n, -1, 4).gather(2, order).view(n, -1)
    places = (order[..., 0] + 4 * order[..., 1]).view(n, -1)
    pairs = places[:, ::2] * 16 + places[:, 1::2]
    return torch.cat([values, pairs.to(weight.dtype)], 1)


def expand(compressed: torch.Tensor, k: int) -> torch.Tensor:
    n = compressed.shape[0]
    pairs = compressed[:, k // 2 :].int() & 255
    places = torch.stack([pairs // 16, pairs % 16], 2).view(n, -1)
    order = torch.stack([places % 4, places // 4], 2).long()
    weight = torch.zeros(n, k // 4, 4, dtype=compressed.dtype)
    return weight.scatter_(2, order, compressed[:, : k // 2].view(n, -1, 2)).view(n, k)


def multiply_compressed(compressed, dense, bias=None, out_dtype=None, transpose_result=False):
    assert dense.shape[1] % 16 == 0
    assert not dense.is_contiguous()
    assert transpose_result
    y = expand(compressed, dense.shape[0]).double() @ dense.double()
    y = y if bias is None else y + bias.double()[:, None]
    return y.T.contiguous().to(out_dtype or dense.dtype)


def multiply_by_cutlass(values, meta, dense):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    assert dense.shape[1] % 8 == 0
    return (sparse_semi_structured_to_dense_cutlass(values, meta).float() @ dense.float()).to(dense.dtype)


@pytest.fixture(name="kernel", params=["cusparselt", "cutlass"])
def kernel_for_two_of_four(request, monkeypatch) -> str:
    """A kernel for 2:4, emulated on the CPU, where torch has none."""
    if torch.cuda.is_available():
        if request.param not in semi_structured.kernels(torch.device("cuda")):
            pytest.skip(f"this GPU has no {request.param}")
    else:
        add = lambda bias, *rest: (multiply_by_cutlass(*rest).float() + bias.float()[:, None]).to(bias.dtype)  # noqa: E731
        monkeypatch.setattr(semi_structured, "kernels", lambda device: (request.param,))
        monkeypatch.setattr(torch, "_cslt_compress", compress)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply_compressed)
        monkeypatch.setattr(torch, "_sparse_semi_structured_mm", multiply_by_cutlass)
        monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", add)
    monkeypatch.setattr(semi_structured, "_preferred", {})
    return request.param
