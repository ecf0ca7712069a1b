"""What the kernels of attention, its gradient and attention_varlen share: tiles, scores and dropout.

Scores are in units of log2, so that a weight is one exp2. They are computed where two index tiles `row` and `column`
broadcast to, so that a tile may lie as [queries, keys] or as [keys, queries]. What a call asks for is known when its
kernel is compiled, and what it does not costs nothing:

    MASK      0 none, 1 boolean, 2 added to the scores
    LEFT      a query sees no further to the left than `left` keys
    RIGHT     nor to the right than `right` (0 where causal)
    CAPPED    softcap, SLOPED: ALiBi
    DROPOUT   weights are dropped
    TMA       operands come as tensor descriptors, by the copy engine of Hopper and later; else by pointers
"""

import torch
import triton
import triton.language as tl
from lamina.kernels import device
from lamina.kernels.tuning import attention as tuning
from lamina.kernels.tuning.attention import Tiles
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634  # in kernels as a number: they take no globals
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_rows(
    rows_of,
    first,
    count,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUNDED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows first .. first + ROWS - 1 of a sequence, [ROWS, COLUMNS]; 0 behind column SIZE and, if BOUNDED, row count.

    rows_of: what `sequence` gives. With TMA the rows behind `count` are 0 or the next sequence's.
    """
    source, batch, head, begin, row_stride, column_stride = rows_of
    if TMA:
        tile = tl.reshape(source.load([batch, head, begin + first, 0]), [ROWS, COLUMNS])
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        at = source + tl.cast(first, tl.int64) * row_stride
        at = at + (rows[:, None] * row_stride + columns[None, :] * column_stride)
        if BOUNDED and SIZE != COLUMNS:
            tile = tl.load(at, mask=(rows < count - first)[:, None] & (columns < SIZE)[None, :], other=0.0)
        elif BOUNDED:
            tile = tl.load(at, mask=(rows < count - first)[:, None], other=0.0)
        elif SIZE != COLUMNS:
            tile = tl.load(at, mask=(columns < SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def sequence(source, batch, head, begin, batch_stride, head_stride, row_stride, column_stride, TMA: tl.constexpr):
    """The rows of a head from row `begin` on, for load_rows; source is a pointer or, with TMA, a descriptor."""
    if not TMA:
        source += tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        source += tl.cast(begin, tl.int64) * row_stride
    return source, batch, head, begin, row_stride, column_stride


@triton.jit
def bounds_of_sequence(batch, q_ends, k_ends, queries, keys, VARLEN: tl.constexpr):
    """(batch of the tensors, first query, first key, queries, keys) of a sequence; with VARLEN the tensors have one
    batch, in which sequences lie one behind the other."""
    at_batch = batch
    q_begin = 0
    k_begin = 0
    if VARLEN:
        at_batch = 0
        q_begin = tl.load(q_ends + batch).to(tl.int32)
        k_begin = tl.load(k_ends + batch).to(tl.int32)
        queries = tl.load(q_ends + batch + 1).to(tl.int32) - q_begin
        keys = tl.load(k_ends + batch + 1).to(tl.int32) - k_begin
    return at_batch, q_begin, k_begin, queries, keys


@triton.jit
def tanh(x):
    """Exact to 3 eps of the result: near 0 by its series, where 1 - exp would cancel."""
    size = tl.abs(x)
    e = tl.exp2(size * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    y = size * size
    series = 1.0 + y * (-0.33333334 + y * (0.13333334 + y * (-0.053968254 + y * (0.021869488 - y * 0.008863236))))
    near = size * series
    return tl.where(x < 0.0, -1.0, 1.0) * tl.where(size < 0.25, near, far)


@triton.jit
def score_tile(product, row, column, limits, factors, mask_of, FLAGS: tl.constexpr, MIXED: tl.constexpr):
    """Scores of q k^T, which keys are kept, and the tanh of the cap.

    Scores are -inf where a key takes no part. Unless they are READY they are still to be multiplied by `scale`, that of
    the scores times log2(e), which is positive then; they are if they are capped or something is added. Unless MIXED
    every key of the tile is kept, and there is no mask to be added.

    limits: (queries, keys, shift, left, right); query i stands at position i + shift among the keys.
    factors: (scale, cap, slope) in units of log2.
    mask_of: (pointer to the head's, stride of rows, stride of columns).
    FLAGS: (MASK, LEFT, RIGHT, CAPPED, SLOPED, READY).
    """
    queries, keys, shift, left, right = limits
    scale, cap, slope = factors
    scores = product
    curve = product
    if FLAGS[3]:
        curve = tanh(product * (scale / cap))
        scores = curve * cap
    elif FLAGS[5]:
        scores = product * scale
    if FLAGS[4]:
        scores -= slope * tl.abs(row + shift - column).to(tl.float32)
    keep = column < keys
    if MIXED:
        position = row + shift
        if FLAGS[2]:
            keep = keep & (column <= position + right)
        if FLAGS[1]:
            keep = keep & (column >= position - left)
        if FLAGS[0] != 0:
            mask, mask_row, mask_column = mask_of
            at = mask + (tl.cast(row, tl.int64) * mask_row + tl.cast(column, tl.int64) * mask_column)
            if FLAGS[0] == 1:
                keep = keep & (tl.load(at, mask=(row < queries) & (column < keys), other=0) != 0)
            else:
                added = tl.load(at, mask=(row < queries) & (column < keys), other=0.0).to(tl.float32)
                keep = keep & (added != float("-inf"))
                scores += added * 1.4426950408889634
        scores = tl.where(keep, scores, float("-inf"))
    return scores, keep, curve


@triton.jit
def kept_by_dropout(first_row, first_column, dropout, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Which weights [ROWS, KEYS] dropout keeps: see dropout_mask in lamina.reference.attention.

    dropout: (head, batch, lower and upper half of the seed, keep_below). A call of Philox serves the eight keys of a
    block; first_column is a multiple of 8.
    """
    head, batch, low, high, keep_below = dropout
    zero = tl.zeros([ROWS, KEYS // 8], tl.uint32)
    c0 = (first_row + tl.arange(0, ROWS)).to(tl.uint32)[:, None] + zero
    c1 = (first_column // 8 + tl.arange(0, KEYS // 8)).to(tl.uint32)[None, :] + zero
    c2 = tl.cast(head, tl.uint32) + zero
    c3 = tl.cast(batch, tl.uint32) + zero
    k0 = tl.cast(low, tl.uint32) + zero
    k1 = tl.cast(high, tl.uint32) + zero
    f0 = tl.full([ROWS, KEYS // 8], 0xD2511F53, tl.uint32)
    f2 = tl.full([ROWS, KEYS // 8], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, f0)
        low0 = c0 * f0
        high2 = tl.umulhi(c2, f2)
        low2 = c2 * f2
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + tl.full([ROWS, KEYS // 8], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([ROWS, KEYS // 8], 0xBB67AE85, tl.uint32)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [ROWS, KEYS / 8, 2, 2], in order from the last dimension on
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [ROWS, KEYS]).to(tl.int32) < keep_below


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def any_not_finite(tile):
    """Whether a tile of two dimensions holds NaN or an infinity, a number.

    One reduction of all of it: behind one along the rows, Triton 3.6 fails to compile it for Blackwell.
    """
    return tl.max(tl.where(is_finite(tile), 0, 1))


@triton.jit
def key_range(
    first_row,
    limits,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """The blocks of keys that rows first_row .. first_row + ROWS - 1 look at: begin, full begin, full end, end.

    Every row takes every key of the blocks between full begin and full end.
    """
    queries, keys, shift, left, right = limits
    position = first_row + shift
    last = tl.minimum(first_row + ROWS, queries) - 1 + shift
    high = keys
    full_end = keys // KEYS
    if RIGHT:
        high = tl.maximum(tl.minimum(keys, last + right + 1), 0)
        full_end = tl.minimum(full_end, tl.maximum(position + right + 1, 0) // KEYS)
    end = tl.cdiv(high, KEYS)
    begin = 0
    full_begin = 0
    if LEFT:
        begin = tl.minimum(tl.maximum(position - left, 0) // KEYS, end)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(last - left, 0), KEYS), end)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def query_range(
    first_key,
    limits,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """The blocks of rows that look at keys first_key .. first_key + KEYS - 1: begin, full begin, full end, end.

    Rows behind the last and keys behind the last count as kept.
    """
    queries, keys, shift, left, right = limits
    last = tl.minimum(first_key + KEYS, keys) - 1
    high = queries
    if LEFT:
        high = tl.maximum(tl.minimum(queries, last + left - shift + 1), 0)
    end = tl.cdiv(high, ROWS)
    full_end = end
    if LEFT:
        full_end = tl.minimum(end, tl.maximum(first_key + left - shift + 1, 0) // ROWS)
    begin = 0
    full_begin = 0
    if RIGHT:
        begin = tl.minimum(tl.maximum(first_key - right - shift, 0) // ROWS, end)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(last - right - shift, 0), ROWS), end)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=("heads", "blocks", "queries", "keys", "shift", "left", "right", "others"))
def _sort_blocks_kernel(
    mask,
    lists,
    counts,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    heads,
    blocks,
    queries,
    keys,
    shift,
    left,
    right,
    others,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BY_KEYS: tl.constexpr,
):
    """The blocks that one block of queries (BY_KEYS: of keys) looks at: full ones from the front of its list, mixed
    ones from the back, and the number of both."""
    place = tl.program_id(0)
    block = place % blocks
    head = place // blocks % heads
    batch = place // blocks // heads
    limits = (queries, keys, shift, left, right)
    mask += tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head
    lists += tl.cast(place, tl.int64) * others
    if BY_KEYS:
        begin, _, _, end = query_range(block * KEYS, limits, ROWS, KEYS, LEFT, RIGHT)
    else:
        begin, _, _, end = key_range(block * ROWS, limits, ROWS, KEYS, LEFT, RIGHT)
    full = 0
    mixed = 0
    for other in tl.range(begin, end, num_stages=3):
        if BY_KEYS:
            row = (other * ROWS + tl.arange(0, ROWS))[:, None]
            column = (block * KEYS + tl.arange(0, KEYS))[None, :]
        else:
            row = (block * ROWS + tl.arange(0, ROWS))[:, None]
            column = (other * KEYS + tl.arange(0, KEYS))[None, :]
        inside = (row < queries) & (column < keys)
        at = mask + (tl.cast(row, tl.int64) * mask_row + tl.cast(column, tl.int64) * mask_column)
        keep = inside
        if RIGHT:
            keep = keep & (column <= row + shift + right)
        if LEFT:
            keep = keep & (column >= row + shift - left)
        if MASK == 1:
            value = tl.load(at, mask=inside, other=0)
            takes = keep & (value != 0)
            whole = takes
        else:
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            takes = keep & (value != float("-inf"))
            whole = keep & (value == 0.0)
        # Rows behind the last do not matter, and to a block of keys nor do keys behind the last.
        if BY_KEYS:
            whole = whole | ((row >= queries) | (column >= keys))
        else:
            whole = whole | ((row >= queries) & (column < keys))
        some = tl.max(tl.max(takes.to(tl.int32), 1), 0) != 0
        every = some & (tl.min(tl.min(whole.to(tl.int32), 1), 0) != 0)
        tl.store(lists + full, other, mask=every)
        tl.store(lists + (others - 1 - mixed), other, mask=some & (every == 0))
        full += every.to(tl.int32)
        mixed += (some & (every == 0)).to(tl.int32)
    tl.store(counts + 2 * place, full)
    tl.store(counts + 2 * place + 1, mixed)


def sort_blocks(
    mask: Tensor, sizes: tuple[int, int, int, int], limits: tuple[int, int, int], tiles: Tiles, by_keys: bool
) -> dict[str, object]:
    """For the kernels: which blocks of a mask that heads share are full, mixed and empty.

    sizes: of [B, H, L, S]; limits: (shift, left, right), -1 for none of the last two.
    """
    shift, left, right = limits
    strides = broadcast_strides(mask, sizes)
    batch, heads = (n if stride else 1 for n, stride in zip(sizes[:2], strides, strict=False))
    blocks, others = triton.cdiv(sizes[2], tiles.queries), triton.cdiv(sizes[3], tiles.keys)
    if by_keys:
        blocks, others = others, blocks
    lists = mask.new_empty((batch * heads * blocks, others), dtype=torch.int32)
    counts = mask.new_empty((batch * heads * blocks, 2), dtype=torch.int32)
    _sort_blocks_kernel[batch * heads * blocks,](
        as_bytes(mask),
        lists,
        counts,
        *strides,
        heads,
        blocks,
        *sizes[2:],
        shift,
        left,
        right,
        others,
        ROWS=tiles.queries,
        KEYS=tiles.keys,
        MASK=mask_kind(mask),
        LEFT=left >= 0,
        RIGHT=right >= 0,
        BY_KEYS=by_keys,
    )
    return {
        "lists": lists,
        "counts": counts,
        "list_batch": heads * blocks if batch > 1 else 0,
        "list_head": blocks if heads > 1 else 0,
    }


def is_sorted(mask: Tensor | None, sizes: tuple[int, int, int, int], capability: int) -> bool:
    """Whether sorting a mask's blocks pays: several heads or batches share them, and they are many."""
    if mask is None:
        return False
    strides = broadcast_strides(mask, sizes)
    shared = (1 if strides[0] else sizes[0]) * (1 if strides[1] else sizes[1])
    return shared > 1 and min(sizes[2:]) >= tuning.attention_sorted_from(capability) and strides[2] != 0


def mask_kind(mask: Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype is torch.bool else 2


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype is torch.bool else mask


def window_of(is_causal: bool, left: int, right: int, most: int) -> tuple[int, int]:
    """(left, right), -1 for no limit and no number above `most`, which no distance exceeds."""
    return min(left, most) if left >= 0 else -1, 0 if is_causal else min(right, most) if right >= 0 else -1


def capability(tensor: Tensor) -> int:
    """Compute capability that kernels for this tensor are compiled for, as 90; 0 in the interpreter."""
    return 0 if INTERPRETED else device.capability(tensor)


def is_describable(tensor: Tensor) -> bool:
    """Whether the copy engine takes a tensor [B, H, rows, columns]: columns adjacent, all else aligned to 16 bytes."""
    size = tensor.element_size()
    if tensor.numel() == 0 or tensor.data_ptr() % 16 or (tensor.shape[3] > 1 and tensor.stride(3) != 1):
        return False
    return all(
        n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(tensor.shape[:3], tensor.stride(), strict=False)
    )


def by_descriptors(arch: int, *tensors: Tensor) -> bool:
    """Whether operands come by the copy engine.

    On Hopper those of float32 come by pointers: Triton 3.6 then pipelines their loads, and the kernels of heads of 64
    and 128 spill half of the bytes or less.
    """
    fits = arch == 0 or arch >= 100 or (arch >= 90 and tensors[0].element_size() == 2)
    return fits and all(map(is_describable, tensors))


def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles [1, 1, rows, columns]; what lies outside of the tensor is 0."""
    # The stride of a dimension of one element says nothing and may be unaligned.
    strides = [16 if n == 1 else s for n, s in zip(tensor.shape[:3], tensor.stride(), strict=False)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def strides_of(tensor: Tensor, tma: bool) -> tuple[int, int, int, int]:
    """What a kernel is told of an operand. A descriptor has strides of its own; these, which change with the lengths,
    would only compile the kernel again: Triton does so for a number that is or is no multiple of 16."""
    return (0, 0, 0, 0) if tma else tensor.stride()


def block_of(size: int) -> int:
    """Columns of a tile: tensor cores take multiples of 16, and the sides of tiles are powers of 2."""
    return max(16, triton.next_power_of_2(size))


def keep_below(dropout_p: float) -> int:
    """Dropout keeps a weight whose 16 random bits are below this."""
    return round((1.0 - dropout_p) * 65536)


def seed_words(seed: Tensor | None) -> tuple[int, int]:
    """Lower and upper half as signed numbers, which are always of one type."""
    value = 0 if seed is None else int(seed)
    return tuple((word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000 for word in (value, value >> 32))


def broadcast_strides(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Of a mask seen as [B, H, L, S]; 0 where it is broadcast."""
    if mask is None:
        return 0, 0, 0, 0
    missing = 4 - mask.ndim
    sizes, strides = (1,) * missing + tuple(mask.shape), (0,) * missing + tuple(mask.stride())
    return tuple(0 if n == 1 else s for n, s in zip(sizes, strides, strict=True))
