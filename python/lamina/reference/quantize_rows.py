"""What quantize_rows computes, in plain PyTorch."""

import torch
from torch import Tensor


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K], scale [] or None -> (codes int8 [..., K], scales float32 [...]).

    The arithmetic is float32 by definition of the format, whatever the dtype of x: the codes are an exact result, not
    an approximation of one.
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    # Correctly rounded divisions: torch computes 127.0 / tensor as a reciprocal and a product, which rounds twice.
    if scale is not None:
        scales = scale.to(torch.float32).expand_as(largest)
        inverse = torch.ones_like(scales) / scales
    else:
        tiny = largest < 1e-36
        scales = torch.where(tiny, torch.zeros_like(largest), largest / 127.0)
        inverse = torch.where(tiny, torch.zeros_like(largest), torch.full_like(largest, 127.0) / largest)
    bad = ~largest.isfinite()
    codes = torch.round(x * inverse[..., None]).clamp(-127, 127)
    codes = codes.masked_fill(bad[..., None], 0)
    return codes.to(torch.int8), scales.masked_fill(bad, torch.nan)
