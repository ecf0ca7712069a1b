"""What layers with a packed sparse weight have in common: the pattern, memory, state_dict."""

from abc import abstractmethod

import torch
from torch import Tensor

from lamina.nn.packed_weight import PackedWeight, on_host
from lamina.ops.sparse_linear import (
    GPU_PATTERNS,
    PATTERNS,
    PackedSparseWeight,
    SparseInfo,
    move_sparse_weight,
    pack_sparse_weight,
    sparse_info,
    sparse_kernel,
    traced_sparse_weight,
    unpack_sparse_weight,
)


class SparseWeight(PackedWeight):
    """Before an nn layer in the bases: its weight does not train, and only blocks with values other than zero are held.

    The state_dict has `weight`, uint8: the packed bytes, whose header names pattern, version, dtype and sizes; a float
    `weight` is packed in the layer's pattern when it is loaded.
    """

    # On a GPU these are the values, which .to(bfloat16) would round.
    _kept_dtypes = ("_packed",)

    def _set_pattern(self, pattern: str) -> None:
        known = *PATTERNS, *GPU_PATTERNS
        if pattern not in known:
            raise ValueError(f"{type(self).__name__}: pattern '{pattern}' is unknown; use one of {', '.join(known)}")
        self.pattern = pattern

    @property
    @abstractmethod
    def rows_shape(self) -> tuple[int, int]:
        """The weight as the rows [outputs, inputs] that the kernels multiply."""

    @abstractmethod
    def _as_rows(self, weight: Tensor) -> Tensor:
        """A float weight as these rows."""

    @abstractmethod
    def _from_rows(self, rows: Tensor) -> Tensor:
        """The inverse."""

    def _pack(self, weight: Tensor, scale: Tensor | None) -> PackedSparseWeight:
        if weight.is_floating_point():
            return pack_sparse_weight(self._as_rows(weight), self.pattern)
        info = sparse_info(weight)
        if (info.out_features, info.in_features) != self.rows_shape:
            raise ValueError(
                f"size mismatch: [{info.out_features}, {info.in_features}] in the checkpoint, {list(self.rows_shape)} "
                "in the layer"
            )
        return PackedSparseWeight(weight.clone(), info.out_features)

    def _set_packed(self, packed: PackedSparseWeight) -> None:
        self.register_buffer("_packed", packed.data, persistent=False)
        self.register_buffer("_index", packed.index, persistent=False)

    def _place(self, packed: PackedSparseWeight) -> None:
        # A packed weight brings its own pattern; blocks that only GPUs have kernels for are packed in smaller ones.
        own = sparse_info(packed.data).pattern
        if GPU_PATTERNS.get(self.pattern, self.pattern) != own:
            self.pattern = own
        super()._place(packed)

    def _moved(self, packed: PackedSparseWeight, device: torch.device) -> PackedSparseWeight:
        return move_sparse_weight(packed, self.rows_shape[1], self.pattern, device)

    def pack_saved(self, weight: Tensor, scale: Tensor | None, name: str = "weight") -> PackedSparseWeight:
        if weight.is_floating_point():
            return super().pack_saved(weight, scale, name)
        try:
            return self._pack(on_host(weight), None)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from None

    def _saved(self) -> tuple[Tensor, None]:
        return self._for_host().data.detach().to(self._like.device), None

    def _dequantize(self, traced: bool) -> Tensor:
        if traced:
            return self._from_rows(traced_sparse_weight(self.packed_weight, self.rows_shape[1]))
        rows = unpack_sparse_weight(self._for_host()).to(self._like.device, torch.float32)
        return self._from_rows(rows)

    @property
    def packed_weight(self) -> PackedSparseWeight:
        return PackedSparseWeight(self._packed, self.rows_shape[0], self._index)

    @property
    def sparse_info(self) -> SparseInfo:
        """Pattern, dtype, sizes and density of the packed weight."""
        return sparse_info(self._for_host().data)

    def options(self) -> dict[str, str | int | None]:
        return {**super().options(), "pattern": self.pattern}

    def extra_repr(self) -> str:
        words = f"{super().extra_repr()}, pattern={self.pattern}, density={self.sparse_info.density:.3g}"
        return words + kernel_in_words(self.pattern, self._like.device, dense=self._index is None)


def kernel_in_words(pattern: str, device: torch.device, dense: bool) -> str:
    """What a layer's repr says of the kernel that multiplies its weight; dense: whether it lies on a GPU as it is."""
    if device.type == "cpu":
        return ""
    kernel = sparse_kernel(pattern, device)
    if dense and not kernel.startswith("dense"):
        kernel = "dense: no kernel for 2:4 takes it"
    return f", kernel={kernel}"
