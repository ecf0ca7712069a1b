"""attention on NVIDIA GPUs: softmax(scale * q k^T + mask) v in one pass over the keys, as FlashAttention-2 has it.

A program computes a block of queries of one head. Blocks of keys that every query of the block takes run without mask
code; those at the edge of what the queries see come after them, with it; the rest is not visited. The blocks of a mask
that many heads share are sorted beforehand into full, mixed and empty ones, by a kernel of their own.

A key that takes no part has a weight of 0, and 0 * NaN is NaN. So the pass goes on the assumption that values are
finite. Where the output is not, which is seen at once, the block is computed again with more care: that costs nothing
where there are no NaN.
"""

import triton
import triton.language as tl
from lamina.kernels.attention_scores import (
    LOG2E,
    any_not_finite,
    as_bytes,
    block_of,
    bounds_of_sequence,
    broadcast_strides,
    by_descriptors,
    capability,
    described,
    is_finite,
    is_sorted,
    keep_below,
    kept_by_dropout,
    key_range,
    load_rows,
    mask_kind,
    score_tile,
    seed_words,
    sequence,
    sort_blocks,
    strides_of,
    window_of,
)
from lamina.kernels.device import on_device_of
from lamina.kernels.tuning import attention as tuning
from lamina.kernels.tuning.attention import AttentionShape
from torch import Tensor

# A change of these compiles nothing: lengths, limits, counts and seeds.
_ANY = ("heads", "group", "blocks", "queries", "keys", "bottom_right", "left", "right", "keep", "low", "high")
_ANY += ("list_batch", "list_head", "key_blocks", "lse_batch", "lse_head")


@triton.jit
def _forward_tile(
    acc,
    top,
    total,
    q,
    k_of,
    v_of,
    first_row,
    first_key,
    limits,
    factors,
    mask_of,
    dropout,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    MIXED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Adds a block of keys to acc [ROWS, VALUE_COLUMNS] and total [ROWS], both relative to exp2(top)."""
    ROWS: tl.constexpr = SHAPE[0]
    KEYS: tl.constexpr = SHAPE[1]
    keys = limits[1]
    k = load_rows(k_of, first_key, keys, KEYS, SHAPE[2], SHAPE[3], MIXED, TMA)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_key + tl.arange(0, KEYS))[None, :]
    scores, _, _ = score_tile(product, row, column, limits, factors, mask_of, FLAGS, MIXED)
    if FLAGS[5]:
        new_top = tl.maximum(top, tl.max(scores, 1))
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * factors[0])
    base = new_top
    if MIXED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without keys so far
    if FLAGS[5]:
        weights = tl.exp2(scores - base[:, None])
    else:
        weights = tl.exp2(scores * factors[0] - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    if DROPOUT:
        kept = kept_by_dropout(first_row, first_key, dropout, ROWS, KEYS)
        weights = tl.where(kept, weights, 0.0)
    v = load_rows(v_of, first_key, keys, KEYS, SHAPE[4], SHAPE[5], MIXED, TMA)
    if CAREFUL:
        wide = v.to(tl.float32)
        v = tl.where(is_finite(wide), wide, 0.0).to(v.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _mark_infinite(
    acc,
    v_of,
    first_row,
    first_key,
    limits,
    factors,
    mask_of,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Gives the values of a block of keys that are not finite to the rows that take them."""
    ROWS: tl.constexpr = SHAPE[0]
    KEYS: tl.constexpr = SHAPE[1]
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_key + tl.arange(0, KEYS))[None, :]
    nothing = tl.zeros([ROWS, KEYS], tl.float32)
    _, keep, _ = score_tile(nothing, row, column, limits, factors, mask_of, FLAGS, True)
    v = load_rows(v_of, first_key, limits[1], KEYS, SHAPE[4], SHAPE[5], True, TMA)
    wide = v.to(tl.float32)
    takes = tl.where(keep, 1.0, nothing).to(v.dtype)
    up = tl.where((wide == float("inf")) | (wide != wide), 1.0, 0.0).to(v.dtype)
    acc += tl.where(tl.dot(takes, up) > 0.0, float("inf"), 0.0)
    down = tl.where((wide == float("-inf")) | (wide != wide), 1.0, 0.0).to(v.dtype)
    acc -= tl.where(tl.dot(takes, down) > 0.0, float("inf"), 0.0)
    return acc


@triton.jit(do_not_specialize=_ANY)
def _attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    mask,
    slopes,
    sinks,
    lists,
    counts,
    q_ends,
    k_ends,
    q_batch,
    q_head,
    q_row,
    q_column,
    k_batch,
    k_head,
    k_row,
    k_column,
    v_batch,
    v_head,
    v_row,
    v_column,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    slopes_batch,
    slopes_head,
    sinks_head,
    heads,
    group,
    blocks,
    queries,
    keys,
    bottom_right,
    left,
    right,
    scale,
    cap,
    growth,
    keep,
    low,
    high,
    list_batch,
    list_head,
    key_blocks,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPED: tl.constexpr,
    SINKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    LISTS: tl.constexpr,
    VARLEN: tl.constexpr,
    LSE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % blocks
    if RIGHT:
        block = blocks - 1 - block  # causal blocks grow with the query: the longest first
    head = program // blocks % heads
    batch = program // blocks // heads
    first_row = block * ROWS
    at_batch, q_begin, k_begin, queries, keys = bounds_of_sequence(batch, q_ends, k_ends, queries, keys, VARLEN)
    if VARLEN:  # noqa: SIM102, the one is decided when it is compiled, the other in the kernel
        if first_row >= queries:
            return
    limits = (queries, keys, (keys - queries) * bottom_right, left, right)
    q_of = sequence(q, at_batch, head, q_begin, q_batch, q_head, q_row, q_column, TMA)
    k_of = sequence(k, at_batch, head // group, k_begin, k_batch, k_head, k_row, k_column, TMA)
    v_of = sequence(v, at_batch, head // group, k_begin, v_batch, v_head, v_row, v_column, TMA)
    if MASK != 0:
        mask += tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes + batch * slopes_batch + head * slopes_head) * 1.4426950408889634
    sink = float("-inf")
    if SINKS:
        sink = tl.load(sinks + head * sinks_head) * 1.4426950408889634
    factors = (scale, cap, slope)
    mask_of = (mask, mask_row, mask_column)
    dropout = (head, batch, low, high, keep)
    SHAPE: tl.constexpr = (ROWS, KEYS, SIZE, COLUMNS, VALUE_SIZE, VALUE_COLUMNS)
    FLAGS: tl.constexpr = (MASK, LEFT, RIGHT, CAPPED, SLOPED, CAPPED or SLOPED or MASK == 2)

    # Which blocks of keys: `full` of them without mask code, `mixed` with it.
    order = lists
    begin, full_begin, full_end, end = key_range(first_row, limits, ROWS, KEYS, LEFT, RIGHT)
    full = full_end - full_begin
    if LISTS:
        place = batch * list_batch + head * list_head + block
        full = tl.load(counts + 2 * place)
        mixed = tl.load(counts + 2 * place + 1)
        order += tl.cast(place, tl.int64) * key_blocks
    elif MASK != 0:
        full = 0
        full_begin = begin
        full_end = begin
        mixed = end - begin
    else:
        mixed = full_begin - begin + end - full_end

    q_tile = load_rows(q_of, first_row, queries, ROWS, SIZE, COLUMNS, True, TMA)
    if NEGATIVE:
        q_tile = (-q_tile.to(tl.float32)).to(
            q_tile.dtype
        )  # so that the scale is positive, and the largest product is the largest score
    acc = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    top = tl.zeros([ROWS], tl.float32) + sink
    total = tl.where(top > float("-inf"), 1.0, 0.0)
    if LISTS or MASK == 0:
        for i in tl.range(0, full, warp_specialize=SPECIALIZE):
            if LISTS:
                first_key = tl.load(order + i) * KEYS
            else:
                first_key = (full_begin + i) * KEYS
            acc, top, total = _forward_tile(
                acc, top, total, q_tile, k_of, v_of, first_row, first_key, limits, factors, mask_of, dropout, SHAPE,
                FLAGS, DROPOUT, TMA, PRECISION, False, False,
            )  # fmt: skip
    for i in tl.range(0, mixed):
        if LISTS:
            first_key = tl.load(order + (key_blocks - 1 - i)) * KEYS
        else:
            first_key = (tl.where(i < full_begin - begin, begin, full_end - full_begin + begin) + i) * KEYS
        acc, top, total = _forward_tile(
            acc, top, total, q_tile, k_of, v_of, first_row, first_key, limits, factors, mask_of, dropout, SHAPE, FLAGS,
            DROPOUT, TMA, PRECISION, True, False,
        )  # fmt: skip

    if MASK != 0 or LEFT or RIGHT or VARLEN:  # noqa: SIM102, a constant of the compilation
        if any_not_finite(acc) != 0:
            acc = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
            top = tl.zeros([ROWS], tl.float32) + sink
            total = tl.where(top > float("-inf"), 1.0, 0.0)
            for j in tl.range(begin, end, num_stages=1):
                acc, top, total = _forward_tile(
                    acc, top, total, q_tile, k_of, v_of, first_row, j * KEYS, limits, factors, mask_of, dropout, SHAPE,
                    FLAGS, DROPOUT, TMA, PRECISION, True, True,
                )  # fmt: skip
            for j in tl.range(begin, end, num_stages=1):
                acc = _mark_infinite(acc, v_of, first_row, j * KEYS, limits, factors, mask_of, SHAPE, FLAGS, TMA)

    acc = acc * tl.where(total != 0.0, growth / total, 0.0)[:, None]
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, VALUE_COLUMNS)
    out += tl.cast(at_batch, tl.int64) * out_batch + tl.cast(head, tl.int64) * out_head
    out += tl.cast(q_begin + first_row, tl.int64) * out_row
    at = out + (tl.arange(0, ROWS)[:, None] * out_row + columns[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < queries)[:, None] & (columns < VALUE_SIZE)[None, :])
    if LSE:
        lse += tl.cast(at_batch, tl.int64) * lse_batch + tl.cast(head, tl.int64) * lse_head + q_begin
        value = tl.where(total != 0.0, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(lse + rows, value, mask=rows < queries)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    low_precision: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    ends: tuple[Tensor, Tensor, int, int] | None = None,
) -> None:
    """Writes [B, H, L, Dv] into out, with adjacent columns, and if given the log-sum-exp [B, H, L], with adjacent rows.

    query [B, H, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] with any strides; a mask broadcasts to [B, H, L, S].
    Products of float32 are made of three of TF32, which tensor cores have and whose error is that of float32; of one if
    low_precision. ends: (cumulative lengths of queries, of keys, the longest of both), for sequences one behind the
    other in a batch of one.
    """
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    batch = query.shape[0]
    q_ends = k_ends = None
    if ends is not None:
        q_ends, k_ends, queries, keys = ends
        batch = q_ends.shape[0] - 1
    size, value_size = query.shape[3], value.shape[3]
    if batch * heads * queries == 0 or (out.numel() == 0 and lse is None):
        return
    kind, arch = mask_kind(mask), capability(query)
    columns, value_columns = block_of(size), block_of(value_size)
    widest = max(columns, value_columns)
    tiles = tuning.attention_tiles(AttentionShape("forward", widest, query.element_size(), kind > 0, arch))
    left, right = window_of(is_causal, window_left, window_right, queries + keys)
    sizes = batch, heads, queries, keys
    slopes_strides = (0, 0)
    if alibi_slopes is not None:
        slopes_strides = (0, *alibi_slopes.stride())[-2:]
    kept = keep_below(dropout_p)
    tma = by_descriptors(arch, query, key, value)
    blocks = triton.cdiv(queries, tiles.queries)
    lists = {"lists": None, "counts": None, "list_batch": 0, "list_head": 0}
    with on_device_of(query):
        if is_sorted(mask, sizes, arch):
            limits = (keys - queries) * bottom_right, left, right
            lists = sort_blocks(mask, sizes, limits, tiles, by_keys=False)
        _attention_forward_kernel[blocks * heads * batch,](
            described(query, tiles.queries, columns) if tma else query,
            described(key, tiles.keys, columns) if tma else key,
            described(value, tiles.keys, value_columns) if tma else value,
            out,
            lse,
            as_bytes(mask),
            alibi_slopes,
            sinks,
            lists["lists"],
            lists["counts"],
            q_ends,
            k_ends,
            *strides_of(query, tma),
            *strides_of(key, tma),
            *strides_of(value, tma),
            *out.stride()[:3],
            *((0, 0) if lse is None else lse.stride()[:2]),
            *broadcast_strides(mask, sizes),
            *slopes_strides,
            0 if sinks is None else sinks.stride(0),
            heads,
            heads // key.shape[1],
            blocks,
            queries,
            keys,
            int(bottom_right),
            left,
            right,
            max(abs(scale), 2.0**-100) * LOG2E,  # 0 times the -inf of a key that is left out would be NaN
            softcap * LOG2E,
            65536 / kept if kept else 0.0,
            kept,
            *seed_words(seed),
            lists["list_batch"],
            lists["list_head"],
            triton.cdiv(keys, tiles.keys),
            SIZE=size,
            VALUE_SIZE=value_size,
            ROWS=tiles.queries,
            KEYS=tiles.keys,
            COLUMNS=columns,
            VALUE_COLUMNS=value_columns,
            NEGATIVE=scale < 0,
            MASK=kind,
            LEFT=left >= 0,
            RIGHT=right >= 0,
            CAPPED=softcap > 0,
            SLOPED=alibi_slopes is not None,
            SINKS=sinks is not None,
            DROPOUT=kept < 65536,
            LISTS=lists["lists"] is not None,
            VARLEN=ends is not None,
            LSE=lse is not None,
            TMA=tma,
            PRECISION="tf32" if low_precision else "tf32x3",
            SPECIALIZE=tiles.specialize,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
