"""The float weight of a quantized layer, which exists only while somebody uses it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What is known without the values.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "ndim", "requires_grad", "shape")),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized", "is_sparse")
    ),
    *(
        Tensor.dim,
        Tensor.element_size,
        Tensor.get_device,
        Tensor.is_complex,
        Tensor.is_floating_point,
        Tensor.is_signed,
    ),
    *(Tensor.__len__, Tensor.numel, Tensor.size),
}


class DequantizedWeight(Tensor):
    """A tensor whose values `compute()` gives: anew at each use, so that no second copy of the weight stays in memory.

    Shape, dtype and device cost nothing: models such as T5 ask a layer for its weight's dtype on every call. In every
    other operation it is the plain tensor `compute()` returns.

    >>> linear.weight.dtype                        # reads no weight
    >>> torch.nn.functional.linear(x, linear.weight)   # computes it
    """

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        compute: Callable[[], Tensor],
        device: torch.device | str = "cpu",
    ) -> "DequantizedWeight":
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._compute = compute
        return weight

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # For calls that come from C++ and never passed __torch_function__.
        args, kwargs = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs or {}))
        return func(*args, **kwargs)
