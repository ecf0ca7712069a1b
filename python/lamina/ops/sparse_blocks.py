"""Square blocks of a weight as GPUs read them: values [S, b, b] and an int32 index (see kernels/sparse_linear.py)."""

import torch
from torch import Tensor
from torch.nn import functional as F

# The sizes that the kernels know, by pattern.
BLOCKS = {"16x16": 16, "32x32": 32, "64x64": 64}


def index_length(stored: int, out_features: int, in_features: int, block: int) -> int:
    """Elements of the index of so many stored blocks of a weight [out_features, in_features].

    A zero for each input that the last blocks have beyond the weight's edge makes the length tell in_features.
    """
    return 2 * (-(-out_features // block) - (-in_features // block)) + 2 + 3 * stored + -in_features % block


def pack_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The blocks of a weight [N, K], on any device, that hold a value other than zero, and their index.

    Rows and columns that a block has beyond the weight's edge are zeros.
    """
    n, k = weight.shape
    tiles = F.pad(weight, (0, -k % block, 0, -n % block))
    tiles = tiles.unflatten(0, (-(-n // block), block)).unflatten(2, (-(-k // block), block)).transpose(1, 2)
    kept = (tiles != 0).any(3).any(2)
    values = tiles[kept].contiguous()
    if values.shape[0] >= 2**31:
        raise ValueError(f"a weight has {values.shape[0]} blocks, but an index counts up to {2**31 - 1}")
    block_of = (kept.flatten().cumsum(0) - 1).view(kept.shape)
    columns, entries = kept.nonzero()[:, 1], kept.T.nonzero()
    sections = (
        *(_first(kept), _longest_first(kept), columns),
        *(_first(kept.T), _longest_first(kept.T), entries[:, 1], block_of.T[kept.T]),
    )
    return values, F.pad(torch.cat(sections).to(torch.int32), (0, -k % block))


def unpack_blocks(values: Tensor, index: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight [out_features, in_features] with its zeros; `pack_blocks` is the inverse."""
    block = values.shape[1]
    height, width = -(-out_features // block), -(-in_features // block)
    tiles = values.new_zeros(height * width, block, block)
    tiles[places(index, values.shape[0], height, width)] = values
    weight = tiles.view(height, width, block, block).transpose(1, 2).reshape(height * block, width * block)
    return weight[:out_features, :in_features].contiguous()


def join(values: Tensor, index: Tensor) -> Tensor:
    """int8 values [S, b, b] and their index as one tensor [.., b, b], of which the index fills the last blocks."""
    block = values.shape[1]
    rest = F.pad(index.view(torch.int8), (0, -4 * index.numel() % block**2)).view(-1, block, block)
    return torch.cat([values, rest])


def split(data: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor] | None:
    """What `join` joined, of a weight of this size; None if it cannot be one. Reads no values."""
    total, block, _ = data.shape
    # The one number whose values and index, 12 bytes of it for each block, fill the last block of `data`.
    stored = (total * block**2 - 4 * index_length(0, out_features, in_features, block)) // (block**2 + 12)
    length = index_length(stored, out_features, in_features, block)
    if stored < 0 or stored + -(-4 * length // block**2) != total:
        return None
    return data[:stored], data[stored:].reshape(-1).view(torch.int32)[:length]


def places(index: Tensor, stored: int, height: int, width: int) -> Tensor:
    """Where each block lies among the height * width blocks of the weight, row by row: int64 [stored]."""
    counts = index[: height + 1].diff()
    rows = torch.repeat_interleave(torch.arange(height, device=index.device), counts, output_size=stored)
    return rows * width + index[2 * height + 1 : 2 * height + 1 + stored]


def _first(kept: Tensor) -> Tensor:
    """Blocks before each row of kept [rows, columns], and all of them."""
    return F.pad(kept.sum(1).cumsum(0), (1, 0))


def _longest_first(kept: Tensor) -> Tensor:
    return kept.sum(1).argsort(descending=True, stable=True)
