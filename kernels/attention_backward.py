"""attention_backward on NVIDIA GPUs, as FlashAttention-2 has it: scores are computed again from the log-sum-exp.

    P = exp(score - lse)                      score and lse as the forward has them
    dS = P (Z (dO V^T) - delta)               Z: 0 where dropout drops, else 1 / keep;  delta = sum_c dO O - dlse
    dV = (Z P)^T dO    dK = scale dS^T Q    dQ = scale dS K    dmask = dS    dsink = -sum_q exp(sink - lse) delta

with dS times 1 - tanh^2 before the products where scores are capped. Every sum has one owner: a program of one kernel
sums dK and dV of a block of keys over all queries and all heads that share it, one of another dQ of a block of queries,
one of a third the gradient of a tile of an added mask. So the same inputs give the same bits, at the price of computing
the scores twice (and a third time for a mask).

As in the forward, operands are taken for finite, and a block whose result is not is computed again with care.
"""

import torch
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
    query_range,
    score_tile,
    seed_words,
    sequence,
    sort_blocks,
    strides_of,
    window_of,
)
from lamina.kernels.device import on_device_of
from lamina.kernels.tuning import attention as tuning
from lamina.kernels.tuning.attention import AttentionShape, Tiles
from torch import Tensor

_ANY = ("heads", "group", "blocks", "queries", "keys", "bottom_right", "left", "right", "keep", "low", "high")
_ANY += ("list_batch", "list_head", "others", "batches", "mask_heads", "row_blocks", "key_blocks")
_ANY += ("delta_batch", "delta_head")
_ANY_DELTA = ("heads", "blocks", "queries", "lse_batch", "lse_head", "grad_lse_batch", "grad_lse_head")


@triton.jit(do_not_specialize=_ANY_DELTA)
def _attention_delta_kernel(
    out,
    grad,
    lse,
    grad_lse,
    delta,
    lse2,
    out_batch,
    out_head,
    out_row,
    out_column,
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    lse_batch,
    lse_head,
    lse_row,
    grad_lse_batch,
    grad_lse_head,
    grad_lse_row,
    heads,
    blocks,
    queries,
    ROWS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """delta and the log-sum-exp in units of log2 [B, H, L]; that of a query without keys is inf, so that P is 0."""
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % heads
    batch = program // blocks // heads
    first = block * ROWS
    out_of = sequence(out, batch, head, 0, out_batch, out_head, out_row, out_column, False)
    grad_of = sequence(grad, batch, head, 0, grad_batch, grad_head, grad_row, grad_column, False)
    o = load_rows(out_of, first, queries, ROWS, VALUE_SIZE, VALUE_COLUMNS, True, False).to(tl.float32)
    g = load_rows(grad_of, first, queries, ROWS, VALUE_SIZE, VALUE_COLUMNS, True, False).to(tl.float32)
    rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
    inside = rows < queries
    far_batch = tl.cast(batch, tl.int64)
    value = tl.load(lse + far_batch * lse_batch + head * lse_head + rows * lse_row, mask=inside, other=0.0)
    sums = tl.sum(o * g, 1)
    if GRAD_LSE:
        at = grad_lse + far_batch * grad_lse_batch + head * grad_lse_head + rows * grad_lse_row
        sums -= tl.where(value == float("-inf"), 0.0, tl.load(at, mask=inside, other=0.0))
    to = (far_batch * heads + head) * queries + rows
    tl.store(delta + to, sums, mask=inside)
    tl.store(lse2 + to, tl.where(value == float("-inf"), float("inf"), value * 1.4426950408889634), mask=inside)


@triton.jit
def _keys_tile(
    grad_k,
    grad_v,
    k,
    v,
    q_of,
    grad_of,
    row_numbers,
    first_row,
    first_key,
    limits,
    factors,
    mask_of,
    dropout,
    growth,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    MIXED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Adds what a block of rows gives to grad_k [KEYS, COLUMNS], without the scale, and grad_v [KEYS, VALUE_COLUMNS].

    Tiles are [keys, rows], so that weights are the first factor of the products that follow.
    """
    ROWS: tl.constexpr = SHAPE[0]
    KEYS: tl.constexpr = SHAPE[1]
    queries = limits[0]
    lse2, delta = row_numbers
    rows = first_row + tl.arange(0, ROWS)
    q = load_rows(q_of, first_row, queries, ROWS, SHAPE[2], SHAPE[3], True, TMA)
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    top = tl.load(lse2 + rows, mask=rows < queries, other=float("inf"))
    row = rows[None, :]
    column = (first_key + tl.arange(0, KEYS))[:, None]
    scores, keep, curve = score_tile(product, row, column, limits, factors, mask_of, FLAGS, MIXED)
    if FLAGS[5]:
        weights = tl.exp2(scores - top[None, :])
    else:
        weights = tl.exp2(scores * factors[0] - top[None, :])
    grad = load_rows(grad_of, first_row, queries, ROWS, SHAPE[4], SHAPE[5], True, TMA)
    grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if CAREFUL:
        keep = keep & (row < queries)
        weights = tl.where(keep, weights, 0.0)
    left = weights
    if DROPOUT:
        kept = tl.trans(kept_by_dropout(first_row, first_key, dropout, ROWS, KEYS))
        left = tl.where(kept, weights * growth, 0.0)
        grad_weights = tl.where(kept, grad_weights * growth, 0.0)
    if CAREFUL:
        wide = grad.to(tl.float32)
        grad = tl.where(is_finite(wide), wide, 0.0).to(grad.dtype)
    grad_v = tl.dot(left.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    change = weights * (grad_weights - tl.load(delta + rows, mask=rows < queries, other=0.0)[None, :])
    if FLAGS[3]:
        change *= 1.0 - curve * curve
    if CAREFUL:
        change = tl.where(keep, change, 0.0)
        wide = q.to(tl.float32)
        q = tl.where(is_finite(wide), wide, 0.0).to(q.dtype)
    grad_k = tl.dot(change.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _takes_not_finite(
    operand,
    first_row,
    first_key,
    limits,
    factors,
    mask_of,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
    BY_KEYS: tl.constexpr,
):
    """Where an operand of rows (BY_KEYS), or of keys, is not finite and the row takes the key."""
    row = first_row + tl.arange(0, SHAPE[0])
    column = first_key + tl.arange(0, SHAPE[1])
    if BY_KEYS:
        row = row[None, :]
        column = column[:, None]
        nothing = tl.zeros([SHAPE[1], SHAPE[0]], tl.float32)
    else:
        row = row[:, None]
        column = column[None, :]
        nothing = tl.zeros([SHAPE[0], SHAPE[1]], tl.float32)
    _, keep, _ = score_tile(nothing, row, column, limits, factors, mask_of, FLAGS, True)
    takes = tl.where(keep & (row < limits[0]), 1.0, nothing).to(operand.dtype)
    bad = tl.where(is_finite(operand.to(tl.float32)), 0.0, 1.0).to(operand.dtype)
    return tl.dot(takes, bad) > 0.0


@triton.jit(do_not_specialize=_ANY)
def _attention_backward_keys_kernel(
    q,
    k,
    v,
    grad,
    delta,
    lse2,
    grad_k,
    grad_v,
    mask,
    slopes,
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
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    grad_k_batch,
    grad_k_head,
    grad_k_row,
    grad_v_batch,
    grad_v_head,
    grad_v_row,
    delta_batch,
    delta_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    slopes_batch,
    slopes_head,
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
    factor,
    growth,
    keep,
    low,
    high,
    list_batch,
    list_head,
    others,
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
    DROPOUT: tl.constexpr,
    LISTS: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % blocks
    kv_head = program // blocks % (heads // group)
    batch = program // blocks // (heads // group)
    first_key = block * KEYS
    at_batch, q_begin, k_begin, queries, keys = bounds_of_sequence(batch, q_ends, k_ends, queries, keys, VARLEN)
    if VARLEN:  # noqa: SIM102, the one is decided when it is compiled, the other in the kernel
        if first_key >= keys:
            return
    limits = (queries, keys, (keys - queries) * bottom_right, left, right)
    k_of = sequence(k, at_batch, kv_head, k_begin, k_batch, k_head, k_row, k_column, TMA)
    v_of = sequence(v, at_batch, kv_head, k_begin, v_batch, v_head, v_row, v_column, TMA)
    SHAPE: tl.constexpr = (ROWS, KEYS, SIZE, COLUMNS, VALUE_SIZE, VALUE_COLUMNS)
    FLAGS: tl.constexpr = (MASK, LEFT, RIGHT, CAPPED, SLOPED, CAPPED or SLOPED or MASK == 2 or NEGATIVE)

    begin, full_begin, full_end, end = query_range(first_key, limits, ROWS, KEYS, LEFT, RIGHT)
    k_tile = load_rows(k_of, first_key, keys, KEYS, SIZE, COLUMNS, True, TMA)
    v_tile = load_rows(v_of, first_key, keys, KEYS, VALUE_SIZE, VALUE_COLUMNS, True, TMA)
    k_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
    v_sums = tl.zeros([KEYS, VALUE_COLUMNS], tl.float32)
    for g in range(group):
        head = kv_head * group + g
        q_of = sequence(q, at_batch, head, q_begin, q_batch, q_head, q_row, q_column, TMA)
        grad_of = sequence(grad, at_batch, head, q_begin, grad_batch, grad_head, grad_row, grad_column, TMA)
        numbers = tl.cast(at_batch, tl.int64) * delta_batch + tl.cast(head, tl.int64) * delta_head + q_begin
        row_numbers = (lse2 + numbers, delta + numbers)
        mask_of = (mask, mask_row, mask_column)
        if MASK != 0:
            mask_of = (
                mask + (tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head),
                mask_row,
                mask_column,
            )
        slope = 0.0
        if SLOPED:
            slope = tl.load(slopes + batch * slopes_batch + head * slopes_head) * 1.4426950408889634
        factors = (scale, cap, slope)
        dropout = (head, batch, low, high, keep)
        full = full_end - full_begin
        mixed = full_begin - begin + end - full_end
        front = full_begin - begin
        order = lists
        if LISTS:
            place = batch * list_batch + head * list_head + block
            full = tl.load(counts + 2 * place)
            mixed = tl.load(counts + 2 * place + 1)
            order = lists + tl.cast(place, tl.int64) * others
        elif MASK != 0:
            full = 0
            front = 0
            mixed = end - begin
        if LISTS or MASK == 0:
            for i in tl.range(0, full):
                if LISTS:
                    first_row = tl.load(order + i) * ROWS
                else:
                    first_row = (full_begin + i) * ROWS
                k_sums, v_sums = _keys_tile(
                    k_sums, v_sums, k_tile, v_tile, q_of, grad_of, row_numbers, first_row, first_key, limits, factors,
                    mask_of, dropout, growth, SHAPE, FLAGS, DROPOUT, TMA, PRECISION, False, False,
                )  # fmt: skip
        if LISTS or MASK != 0 or LEFT or RIGHT:
            for i in tl.range(0, mixed):
                if LISTS:
                    first_row = tl.load(order + (others - 1 - i)) * ROWS
                else:
                    first_row = (begin + i + tl.where(i < front, 0, full)) * ROWS
                k_sums, v_sums = _keys_tile(
                    k_sums, v_sums, k_tile, v_tile, q_of, grad_of, row_numbers, first_row, first_key, limits, factors,
                    mask_of, dropout, growth, SHAPE, FLAGS, DROPOUT, TMA, PRECISION, True, False,
                )  # fmt: skip

    careful = 0
    if MASK != 0 or LEFT or RIGHT or VARLEN:
        careful = any_not_finite(k_sums) + any_not_finite(v_sums)
        if careful != 0:
            k_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
            v_sums = tl.zeros([KEYS, VALUE_COLUMNS], tl.float32)
            for g in range(group):
                head = kv_head * group + g
                q_of = sequence(q, at_batch, head, q_begin, q_batch, q_head, q_row, q_column, TMA)
                grad_of = sequence(grad, at_batch, head, q_begin, grad_batch, grad_head, grad_row, grad_column, TMA)
                numbers = tl.cast(at_batch, tl.int64) * delta_batch + tl.cast(head, tl.int64) * delta_head + q_begin
                row_numbers = (lse2 + numbers, delta + numbers)
                mask_of = (mask, mask_row, mask_column)
                if MASK != 0:
                    mask_of = (
                        mask + (tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head),
                        mask_row,
                        mask_column,
                    )
                slope = 0.0
                if SLOPED:
                    slope = tl.load(slopes + batch * slopes_batch + head * slopes_head) * 1.4426950408889634
                factors = (scale, cap, slope)
                dropout = (head, batch, low, high, keep)
                for j in tl.range(begin, end, num_stages=1):
                    k_sums, v_sums = _keys_tile(
                        k_sums, v_sums, k_tile, v_tile, q_of, grad_of, row_numbers, j * ROWS, first_key, limits,
                        factors, mask_of, dropout, growth, SHAPE, FLAGS, DROPOUT, TMA, PRECISION, True, True,
                    )  # fmt: skip

    inside = (first_key + tl.arange(0, KEYS) < keys)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    grad_k += tl.cast(at_batch, tl.int64) * grad_k_batch + tl.cast(kv_head, tl.int64) * grad_k_head
    k_at = grad_k + tl.cast(k_begin + first_key, tl.int64) * grad_k_row
    k_at = k_at + (tl.arange(0, KEYS)[:, None] * grad_k_row + columns)
    k_inside = inside & (columns < SIZE)
    tl.store(k_at, (k_sums * factor).to(grad_k.dtype.element_ty), mask=k_inside)
    columns = tl.arange(0, VALUE_COLUMNS)[None, :]
    grad_v += tl.cast(at_batch, tl.int64) * grad_v_batch + tl.cast(kv_head, tl.int64) * grad_v_head
    v_at = grad_v + tl.cast(k_begin + first_key, tl.int64) * grad_v_row
    v_at = v_at + (tl.arange(0, KEYS)[:, None] * grad_v_row + columns)
    v_inside = inside & (columns < VALUE_SIZE)
    tl.store(v_at, v_sums.to(grad_v.dtype.element_ty), mask=v_inside)

    # What rows that are not finite give to the keys that they take: behind the stores, where no sums hold registers.
    if MASK != 0 or LEFT or RIGHT or VARLEN:  # noqa: SIM102, a constant of the compilation
        if careful != 0:
            for g in range(group):
                head = kv_head * group + g
                q_of = sequence(q, at_batch, head, q_begin, q_batch, q_head, q_row, q_column, TMA)
                grad_of = sequence(grad, at_batch, head, q_begin, grad_batch, grad_head, grad_row, grad_column, TMA)
                mask_of = (mask, mask_row, mask_column)
                if MASK != 0:
                    mask_of = (
                        mask + (tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head),
                        mask_row,
                        mask_column,
                    )
                factors = (scale, cap, 0.0)
                for j in tl.range(begin, end, num_stages=1):
                    tile = load_rows(q_of, j * ROWS, queries, ROWS, SIZE, COLUMNS, True, TMA)
                    bad = _takes_not_finite(tile, j * ROWS, first_key, limits, factors, mask_of, SHAPE, FLAGS, True)
                    nothing = tl.full([KEYS, COLUMNS], float("nan"), tl.float32).to(grad_k.dtype.element_ty)
                    tl.store(k_at, nothing, mask=k_inside & bad)
                for j in tl.range(begin, end, num_stages=1):
                    tile = load_rows(grad_of, j * ROWS, queries, ROWS, VALUE_SIZE, VALUE_COLUMNS, True, TMA)
                    bad = _takes_not_finite(tile, j * ROWS, first_key, limits, factors, mask_of, SHAPE, FLAGS, True)
                    nothing = tl.full([KEYS, VALUE_COLUMNS], float("nan"), tl.float32).to(grad_v.dtype.element_ty)
                    tl.store(v_at, nothing, mask=v_inside & bad)


@triton.jit
def _change_tile(
    q,
    grad,
    top,
    delta,
    k,
    v,
    first_row,
    first_key,
    limits,
    factors,
    mask_of,
    dropout,
    growth,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MIXED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dS [ROWS, KEYS] before and after it passes the cap."""
    ROWS: tl.constexpr = SHAPE[0]
    KEYS: tl.constexpr = SHAPE[1]
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_key + tl.arange(0, KEYS))[None, :]
    scores, keep, curve = score_tile(product, row, column, limits, factors, mask_of, FLAGS, MIXED)
    if FLAGS[5]:
        weights = tl.exp2(scores - top[:, None])
    else:
        weights = tl.exp2(scores * factors[0] - top[:, None])
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        kept = kept_by_dropout(first_row, first_key, dropout, ROWS, KEYS)
        grad_weights = tl.where(kept, grad_weights * growth, 0.0)
    change = weights * (grad_weights - delta[:, None])
    passed = change
    if FLAGS[3]:
        passed = change * (1.0 - curve * curve)
    if CAREFUL:
        change = tl.where(keep, change, 0.0)
        passed = tl.where(keep, passed, 0.0)
    return change, passed


@triton.jit
def _queries_tile(
    q_sums,
    slope_sums,
    q,
    grad,
    top,
    delta,
    k_of,
    v_of,
    first_row,
    first_key,
    limits,
    factors,
    mask_of,
    dropout,
    growth,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOPES: tl.constexpr,
    MIXED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Adds what a block of keys gives to q_sums [ROWS, COLUMNS], without the scale, and to the slope's rows."""
    ROWS: tl.constexpr = SHAPE[0]
    KEYS: tl.constexpr = SHAPE[1]
    k = load_rows(k_of, first_key, limits[1], KEYS, SHAPE[2], SHAPE[3], MIXED, TMA)
    v = load_rows(v_of, first_key, limits[1], KEYS, SHAPE[4], SHAPE[5], MIXED, TMA)
    change, passed = _change_tile(
        q, grad, top, delta, k, v, first_row, first_key, limits, factors, mask_of, dropout, growth, SHAPE, FLAGS,
        DROPOUT, PRECISION, MIXED, CAREFUL,
    )  # fmt: skip
    if SLOPES:
        row = (first_row + tl.arange(0, ROWS))[:, None]
        column = (first_key + tl.arange(0, KEYS))[None, :]
        slope_sums -= tl.sum(change * tl.abs(row + limits[2] - column).to(tl.float32), 1)
    if CAREFUL:
        wide = k.to(tl.float32)
        k = tl.where(is_finite(wide), wide, 0.0).to(k.dtype)
    q_sums = tl.dot(passed.to(k.dtype), k, q_sums, input_precision=PRECISION)
    return q_sums, slope_sums


@triton.jit(do_not_specialize=_ANY)
def _attention_backward_queries_kernel(
    q,
    k,
    v,
    grad,
    delta,
    lse2,
    grad_q,
    slope_parts,
    mask,
    slopes,
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
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    grad_q_batch,
    grad_q_head,
    grad_q_row,
    delta_batch,
    delta_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    slopes_batch,
    slopes_head,
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
    factor,
    growth,
    keep,
    low,
    high,
    list_batch,
    list_head,
    others,
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
    SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    LISTS: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
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
    grad_of = sequence(grad, at_batch, head, q_begin, grad_batch, grad_head, grad_row, grad_column, TMA)
    k_of = sequence(k, at_batch, head // group, k_begin, k_batch, k_head, k_row, k_column, TMA)
    v_of = sequence(v, at_batch, head // group, k_begin, v_batch, v_head, v_row, v_column, TMA)
    if MASK != 0:
        mask += tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes + batch * slopes_batch + head * slopes_head) * 1.4426950408889634
    factors = (scale, cap, slope)
    mask_of = (mask, mask_row, mask_column)
    dropout = (head, batch, low, high, keep)
    SHAPE: tl.constexpr = (ROWS, KEYS, SIZE, COLUMNS, VALUE_SIZE, VALUE_COLUMNS)
    FLAGS: tl.constexpr = (MASK, LEFT, RIGHT, CAPPED, SLOPED, CAPPED or SLOPED or MASK == 2 or NEGATIVE)

    order = lists
    begin, full_begin, full_end, end = key_range(first_row, limits, ROWS, KEYS, LEFT, RIGHT)
    full = full_end - full_begin
    front = full_begin - begin
    mixed = front + end - full_end
    if LISTS:
        place = batch * list_batch + head * list_head + block
        full = tl.load(counts + 2 * place)
        mixed = tl.load(counts + 2 * place + 1)
        order += tl.cast(place, tl.int64) * others
    elif MASK != 0:
        full = 0
        front = 0
        mixed = end - begin

    rows = first_row + tl.arange(0, ROWS)
    numbers = tl.cast(at_batch, tl.int64) * delta_batch + tl.cast(head, tl.int64) * delta_head + q_begin
    q_tile = load_rows(q_of, first_row, queries, ROWS, SIZE, COLUMNS, True, TMA)
    grad_tile = load_rows(grad_of, first_row, queries, ROWS, VALUE_SIZE, VALUE_COLUMNS, True, TMA)
    top = tl.load(lse2 + numbers + rows, mask=rows < queries, other=float("inf"))
    deltas = tl.load(delta + numbers + rows, mask=rows < queries, other=0.0)
    q_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    slope_sums = tl.zeros([ROWS], tl.float32)
    if LISTS or MASK == 0:
        for i in tl.range(0, full):
            if LISTS:
                first_key = tl.load(order + i) * KEYS
            else:
                first_key = (full_begin + i) * KEYS
            q_sums, slope_sums = _queries_tile(
                q_sums, slope_sums, q_tile, grad_tile, top, deltas, k_of, v_of, first_row, first_key, limits, factors,
                mask_of, dropout, growth, SHAPE, FLAGS, DROPOUT, TMA, PRECISION, SLOPES, False, False,
            )  # fmt: skip
    for i in tl.range(0, mixed):
        if LISTS:
            first_key = tl.load(order + (others - 1 - i)) * KEYS
        else:
            first_key = (begin + i + tl.where(i < front, 0, full)) * KEYS
        q_sums, slope_sums = _queries_tile(
            q_sums, slope_sums, q_tile, grad_tile, top, deltas, k_of, v_of, first_row, first_key, limits, factors,
            mask_of, dropout, growth, SHAPE, FLAGS, DROPOUT, TMA, PRECISION, SLOPES, True, False,
        )  # fmt: skip

    if MASK != 0 or LEFT or RIGHT or VARLEN:  # noqa: SIM102, a constant of the compilation
        if any_not_finite(q_sums) != 0:
            q_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            slope_sums = tl.zeros([ROWS], tl.float32)
            for j in tl.range(begin, end, num_stages=1):
                q_sums, slope_sums = _queries_tile(
                    q_sums, slope_sums, q_tile, grad_tile, top, deltas, k_of, v_of, first_row, j * KEYS, limits,
                    factors, mask_of, dropout, growth, SHAPE, FLAGS, DROPOUT, TMA, PRECISION, SLOPES, True, True,
                )  # fmt: skip
            for j in tl.range(begin, end, num_stages=1):
                tile = load_rows(k_of, j * KEYS, keys, KEYS, SIZE, COLUMNS, True, TMA)
                bad = _takes_not_finite(tile, first_row, j * KEYS, limits, factors, mask_of, SHAPE, FLAGS, False)
                q_sums += tl.where(bad, float("nan"), 0.0)

    columns = tl.arange(0, COLUMNS)[None, :]
    grad_q += tl.cast(at_batch, tl.int64) * grad_q_batch + tl.cast(head, tl.int64) * grad_q_head
    at = grad_q + tl.cast(q_begin + first_row, tl.int64) * grad_q_row
    at = at + (tl.arange(0, ROWS)[:, None] * grad_q_row + columns)
    inside = (rows < queries)[:, None] & (columns < SIZE)
    tl.store(at, (q_sums * factor).to(grad_q.dtype.element_ty), mask=inside)
    if SLOPES:
        at_part = (tl.cast(batch, tl.int64) * heads + head) * blocks + block
        tl.store(slope_parts + at_part, tl.sum(tl.where(rows < queries, slope_sums, 0.0), 0))


@triton.jit(do_not_specialize=_ANY)
def _attention_backward_mask_kernel(
    q,
    k,
    v,
    grad,
    delta,
    lse2,
    grad_mask,
    mask,
    slopes,
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
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    delta_batch,
    delta_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    slopes_batch,
    slopes_head,
    batches,
    heads,
    mask_heads,
    group,
    row_blocks,
    key_blocks,
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
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALL_BATCHES: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient [batches or 1, heads or 1, queries or 1, keys or 1] of an added mask, summed over what is ALL."""
    program = tl.program_id(0)
    key_block = program % key_blocks
    row_block = program // key_blocks % row_blocks
    mask_head_index = program // key_blocks // row_blocks % mask_heads
    mask_batch_index = program // key_blocks // row_blocks // mask_heads
    limits = (queries, keys, (keys - queries) * bottom_right, left, right)
    SHAPE: tl.constexpr = (ROWS, KEYS, SIZE, COLUMNS, VALUE_SIZE, VALUE_COLUMNS)
    FLAGS: tl.constexpr = (2, LEFT, RIGHT, CAPPED, SLOPED, True)
    batch_begin = mask_batch_index
    batch_end = mask_batch_index + 1
    if ALL_BATCHES:
        batch_begin = 0
        batch_end = batches
    head_begin = mask_head_index
    head_end = mask_head_index + 1
    if ALL_HEADS:
        head_begin = 0
        head_end = heads
    row_begin = row_block
    row_end = row_block + 1
    if ALL_ROWS:
        row_begin, _, _, row_end = query_range(key_block * KEYS, limits, ROWS, KEYS, LEFT, RIGHT)
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    for batch in range(batch_begin, batch_end):
        for head in range(head_begin, head_end):
            q_of = sequence(q, batch, head, 0, q_batch, q_head, q_row, q_column, TMA)
            grad_of = sequence(grad, batch, head, 0, grad_batch, grad_head, grad_row, grad_column, TMA)
            k_of = sequence(k, batch, head // group, 0, k_batch, k_head, k_row, k_column, TMA)
            v_of = sequence(v, batch, head // group, 0, v_batch, v_head, v_row, v_column, TMA)
            numbers = tl.cast(batch, tl.int64) * delta_batch + tl.cast(head, tl.int64) * delta_head
            slope = 0.0
            if SLOPED:
                slope = tl.load(slopes + batch * slopes_batch + head * slopes_head) * 1.4426950408889634
            factors = (scale, cap, slope)
            mask_of = (
                mask + (tl.cast(batch, tl.int64) * mask_batch + tl.cast(head, tl.int64) * mask_head),
                mask_row,
                mask_column,
            )
            dropout = (head, batch, low, high, keep)
            for i in range(row_begin, row_end):
                first_row = i * ROWS
                rows = first_row + tl.arange(0, ROWS)
                q_tile = load_rows(q_of, first_row, queries, ROWS, SIZE, COLUMNS, True, TMA)
                grad_tile = load_rows(grad_of, first_row, queries, ROWS, VALUE_SIZE, VALUE_COLUMNS, True, TMA)
                top = tl.load(lse2 + numbers + rows, mask=rows < queries, other=float("inf"))
                deltas = tl.load(delta + numbers + rows, mask=rows < queries, other=0.0)
                begin, _, _, end = key_range(first_row, limits, ROWS, KEYS, LEFT, RIGHT)
                if not ALL_KEYS:
                    end = tl.minimum(end, key_block + 1)
                    begin = tl.maximum(begin, key_block)
                for j in tl.range(begin, end):
                    k_tile = load_rows(k_of, j * KEYS, keys, KEYS, SIZE, COLUMNS, True, TMA)
                    v_tile = load_rows(v_of, j * KEYS, keys, KEYS, VALUE_SIZE, VALUE_COLUMNS, True, TMA)
                    change, _passed = _change_tile(
                        q_tile, grad_tile, top, deltas, k_tile, v_tile, first_row, j * KEYS, limits, factors, mask_of,
                        dropout, growth, SHAPE, FLAGS, DROPOUT, PRECISION, True, True,
                    )  # fmt: skip
                    sums += change
    place = tl.cast(mask_batch_index * mask_heads + mask_head_index, tl.int64)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = key_block * KEYS + tl.arange(0, KEYS)
    if ALL_ROWS:
        tl.store(grad_mask + place * keys + columns, tl.sum(sums, 0), mask=columns < keys)
    elif ALL_KEYS:
        tl.store(grad_mask + place * queries + rows, tl.sum(sums, 1), mask=rows < queries)
    else:
        at = grad_mask + (place * queries + rows[:, None]) * keys + columns[None, :]
        tl.store(at, sums, mask=(rows < queries)[:, None] & (columns < keys)[None, :])


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    mask: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    is_causal: bool = False,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    ends: tuple[Tensor, Tensor, int, int] | None = None,
    mask_gradient: bool = False,
    slopes_gradient: bool = False,
    sinks_gradient: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes the gradients of query, key and value; returns those of mask, slopes and sinks in float32, where wanted.

    Four-dimensional tensors as `attention` takes them; the gradients have adjacent columns.
    """
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    at_batch = batch = query.shape[0]
    rows = queries
    q_ends = k_ends = None
    if ends is not None:
        q_ends, k_ends, queries, keys = ends
        batch = q_ends.shape[0] - 1
    size, value_size = query.shape[3], value.shape[3]
    delta = lse.new_empty((at_batch, heads, rows))
    lse2 = torch.empty_like(delta)
    wants_slopes = slopes_gradient and alibi_slopes is not None
    slope_parts = None
    kind, arch = mask_kind(mask), capability(query)
    columns, value_columns = block_of(size), block_of(value_size)
    shape = max(columns, value_columns), query.element_size(), kind > 0, arch
    left, right = window_of(is_causal, window_left, window_right, queries + keys)
    sizes = batch, heads, queries, keys
    limits = (keys - queries) * bottom_right, left, right
    kept = keep_below(dropout_p)
    tma = by_descriptors(arch, query, key, value, grad_out)
    sorts = is_sorted(mask, sizes, arch)
    # The names of what all three kernels take.
    common = {
        "delta": delta,
        "lse2": lse2,
        "mask": as_bytes(mask),
        "slopes": alibi_slopes,
        **_named("q", strides_of(query, tma)),
        **_named("k", strides_of(key, tma)),
        **_named("v", strides_of(value, tma)),
        **_named("grad", strides_of(grad_out, tma)),
        "delta_batch": heads * rows,
        "delta_head": rows,
        **dict(
            zip(("mask_batch", "mask_head", "mask_row", "mask_column"), broadcast_strides(mask, sizes), strict=True)
        ),
        "slopes_batch": alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.ndim == 2 else 0,
        "slopes_head": 0 if alibi_slopes is None else alibi_slopes.stride(-1),
        "heads": heads,
        "group": heads // max(key.shape[1], 1),
        "queries": queries,
        "keys": keys,
        "bottom_right": int(bottom_right),
        "left": left,
        "right": right,
        "scale": (scale if scale else 2.0**-100) * LOG2E,  # 0 times the -inf of a key that is left out would be NaN
        "cap": softcap * LOG2E,
        "growth": 65536 / kept if kept else 0.0,
        "keep": kept,
        **dict(zip(("low", "high"), seed_words(seed), strict=True)),
        "SIZE": size,
        "VALUE_SIZE": value_size,
        "COLUMNS": columns,
        "VALUE_COLUMNS": value_columns,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "CAPPED": softcap > 0,
        "SLOPED": alibi_slopes is not None,
        "DROPOUT": kept < 65536,
        "TMA": tma,
        "PRECISION": "tf32x3",
    }

    def operands(tiles: Tiles) -> dict[str, object]:
        if not tma:
            return {"q": query, "k": key, "v": value, "grad": grad_out}
        return {
            "q": described(query, tiles.queries, columns),
            "k": described(key, tiles.keys, columns),
            "v": described(value, tiles.keys, value_columns),
            "grad": described(grad_out, tiles.queries, value_columns),
        }

    def arguments(kernel: str, tiles: Tiles) -> dict[str, object]:
        by_keys = kernel == "keys"
        others = triton.cdiv(queries, tiles.queries) if by_keys else triton.cdiv(keys, tiles.keys)
        lists = {"lists": None, "counts": None, "list_batch": 0, "list_head": 0}
        if sorts:
            lists = sort_blocks(mask, sizes, limits, tiles, by_keys)
        return {
            **common,
            **operands(tiles),
            **lists,
            "q_ends": q_ends,
            "k_ends": k_ends,
            "factor": scale,
            "others": others,
            "MASK": kind,
            "NEGATIVE": scale < 0,
            "LISTS": sorts,
            "VARLEN": ends is not None,
        }

    with on_device_of(query):
        if at_batch * heads * rows:
            blocks = triton.cdiv(rows, 32)
            _attention_delta_kernel[blocks * heads * at_batch,](
                out,
                grad_out,
                lse,
                grad_lse,
                delta,
                lse2,
                *out.stride(),
                *grad_out.stride(),
                *lse.stride(),
                *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
                heads,
                blocks,
                rows,
                ROWS=32,
                VALUE_SIZE=value_size,
                VALUE_COLUMNS=value_columns,
                GRAD_LSE=grad_lse is not None,
            )
        if batch * heads * keys and grad_key.numel() + grad_value.numel():
            tiles = tuning.attention_tiles(AttentionShape("keys", *shape))
            blocks = triton.cdiv(keys, tiles.keys)
            _attention_backward_keys_kernel[blocks * key.shape[1] * batch,](
                grad_k=grad_key,
                grad_v=grad_value,
                **_named("grad_k", grad_key.stride()[:3]),
                **_named("grad_v", grad_value.stride()[:3]),
                blocks=blocks,
                **arguments("keys", tiles),
                **_launch(tiles),
            )
        if batch * heads * queries and grad_query.numel():
            tiles = tuning.attention_tiles(AttentionShape("queries", *shape))
            blocks = triton.cdiv(queries, tiles.queries)
            if wants_slopes:
                slope_parts = lse.new_zeros((batch, heads, blocks))
            _attention_backward_queries_kernel[blocks * heads * batch,](
                grad_q=grad_query,
                slope_parts=slope_parts,
                **_named("grad_q", grad_query.stride()[:3]),
                blocks=blocks,
                SLOPES=wants_slopes,
                **arguments("queries", tiles),
                **_launch(tiles),
            )
        grad_mask = None
        if mask_gradient:
            tiles = tuning.attention_tiles(AttentionShape("mask", *shape))
            grad_mask = _mask_gradient(mask, sizes, tiles, {**common, **operands(tiles)})
    grad_slopes = grad_sinks = None
    if wants_slopes:
        grad_slopes = lse.new_zeros((batch, heads)) if slope_parts is None else slope_parts.sum(2)
        grad_slopes = grad_slopes if alibi_slopes.ndim == 2 else grad_slopes.sum(0)
    if sinks_gradient:
        shares = torch.exp2(sinks[:, None] * LOG2E - lse2)  # 0 for a query without keys, whose lse2 is inf
        grad_sinks = -(shares * delta).sum((0, 2))
    return grad_mask, grad_slopes, grad_sinks


def _named(name: str, strides: tuple[int, ...]) -> dict[str, int]:
    return {f"{name}_{d}": s for d, s in zip(("batch", "head", "row", "column"), strides, strict=False)}


def _launch(tiles: Tiles) -> dict[str, int]:
    return {
        "ROWS": tiles.queries,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _mask_gradient(
    mask: Tensor, sizes: tuple[int, int, int, int], tiles: Tiles, arguments: dict[str, object]
) -> Tensor:
    """A mask of queries and keys has an owner for each of its tiles, who takes the batches and heads that share it one
    after the other. One of queries or of keys alone is small: every head sums its own, and then those are added up."""
    batch, heads, queries, keys = sizes
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    all_rows, all_keys = shape[2] == 1 != queries, shape[3] == 1 != keys
    alone = all_rows or all_keys
    all_batches, all_heads = not alone and shape[0] == 1, not alone and shape[1] == 1
    batches_there, heads_there = 1 if all_batches else batch, 1 if all_heads else heads
    sums = mask.new_zeros(
        (batches_there, heads_there, 1 if all_rows else queries, 1 if all_keys and not all_rows else keys),
        dtype=torch.float32,
    )
    if sums.numel() and batch * heads * queries * keys:
        row_blocks = 1 if all_rows else triton.cdiv(queries, tiles.queries)
        key_blocks = 1 if all_keys and not all_rows else triton.cdiv(keys, tiles.keys)
        _attention_backward_mask_kernel[key_blocks * row_blocks * heads_there * batches_there,](
            grad_mask=sums,
            batches=batch,
            mask_heads=heads_there,
            row_blocks=row_blocks,
            key_blocks=key_blocks,
            ALL_BATCHES=all_batches,
            ALL_HEADS=all_heads,
            ALL_ROWS=all_rows,
            ALL_KEYS=all_keys and not all_rows,
            **arguments,
            **_launch(tiles),
        )
    over = [d for d in range(4) if shape[d] == 1 != sums.shape[d]]
    return (sums.sum(over, keepdim=True) if over else sums).reshape(mask.shape)
