"""Which kernels compute a step and a prompt in few visits of the GPU's memory? (Needs Triton; `fused` calls them.)"""

import triton
import triton.language as tl

GOLDEN, MIX_1, MIX_2 = (tl.constexpr(n) for n in (-7046029254386353131, -4658895280553007687, -7723592293110705685))
LOG2_E = tl.constexpr(1.4426950408889634)

# Below: B rows, K inputs, N outputs of a product; H query heads, G of them to a key/value head; D channels of a head.


@triton.jit
def embed_kernel(tokens, table, states, eps, K, BLOCK: tl.constexpr):
    """The normed embedding of a row's token."""
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    channel = tl.arange(0, BLOCK)
    inside = channel < K
    embedding = tl.load(table + token * K + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(embedding * embedding) / K + eps)
    tl.store(states + row * K + channel, (embedding * scale).to(states.dtype.element_ty), mask=inside)


@triton.jit
def _finish_product(
    product, factor, row, column, inside, scales, residual, other, out, banned, cap,
    N, NORM: tl.constexpr, SQUARED: tl.constexpr, CAP: tl.constexpr,
    RESIDUAL: tl.constexpr, MIXED_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What follows a product: the norm of its input, ReLU^2, the residual stream, the cap on logits."""
    if NORM:
        product = product * factor
    if SQUARED:
        product = tl.maximum(product, 0.0)
        product = product * product
    if RESIDUAL:
        kept = tl.load(residual + row * N + column, mask=inside, other=0.0).to(tl.float32)
        if MIXED_RESIDUAL:
            first = tl.load(other + row * N + column, mask=inside, other=0.0).to(tl.float32)
            kept = kept * tl.load(scales) + first * tl.load(scales + 1)
        product = product + kept
    if CAP:
        product = cap * (2.0 / (1.0 + tl.exp(-2.0 / cap * product)) - 1.0)
        product = tl.where(column == banned, float("-inf"), product)
    tl.store(out + row * N + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_one_kernel(
    states, first, scales, weight, residual, other, out, banned, eps, cap,
    N, K: tl.constexpr, MIX: tl.constexpr, NORM: tl.constexpr, SQUARED: tl.constexpr, CAP: tl.constexpr,
    RESIDUAL: tl.constexpr, MIXED_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`project_kernel` for few rows, one to a program: memory is all that counts, so no matrix units."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    channel = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        part = tl.load(weight + column[:, None] * K + begin + channel, mask=inside[:, None], other=0.0)
        x = tl.load(states + row * K + begin + channel).to(tl.float32)
        if MIX:
            x = x * tl.load(scales) + tl.load(first + row * K + begin + channel).to(tl.float32) * tl.load(scales + 1)
        if NORM:
            squares += x * x
        sums += part.to(tl.float32) * x[None, :]
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares) / K + eps)
    _finish_product(
        tl.sum(sums, axis=1), factor, row, column, inside, scales, residual, other, out, banned, cap,
        N, NORM, SQUARED, CAP, RESIDUAL, MIXED_RESIDUAL,
    )  # fmt: skip


@triton.jit
def project_kernel(
    states, first, scales, weight, residual, other, out, banned, eps, cap,
    B, N, K: tl.constexpr, MIX: tl.constexpr, NORM: tl.constexpr, SQUARED: tl.constexpr, CAP: tl.constexpr,
    RESIDUAL: tl.constexpr, MIXED_RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, N) = weight (N, K) times the mixed and normed states (B, K), and what follows."""
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_B,), tl.float32)
    there = row[:, None] < B
    for begin in range(0, K, BLOCK_K):
        part = tl.load(weight + column[None, :] * K + begin + channel[:, None], mask=column[None, :] < N, other=0.0)
        place = row[:, None] * K + begin + channel[None, :]
        x = tl.load(states + place, mask=there, other=0.0).to(tl.float32)
        if MIX:
            x = x * tl.load(scales) + tl.load(first + place, mask=there, other=0.0).to(tl.float32) * tl.load(
                scales + 1
            )
        if NORM:
            squares += tl.sum(x * x, axis=1)
        if EXACT:
            sums += tl.dot(x.to(part.dtype), part, input_precision="ieee")
        else:
            sums += tl.dot(x.to(part.dtype), part)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(squares / K + eps)[:, None]
    _finish_product(
        sums, factor, row[:, None], column[None, :], there & (column[None, :] < N), scales, residual, other, out,
        banned, cap, N, NORM, SQUARED, CAP, RESIDUAL, MIXED_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _load_turned(head, position, cos, sin, eps, HALF: tl.constexpr):
    """The two halves of a head at `head`, normed and turned."""
    channel = tl.arange(0, HALF)
    first, second = tl.load(head + channel).to(tl.float32), tl.load(head + HALF + channel).to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / (2 * HALF) + eps)
    c, s = tl.load(cos + position * HALF + channel), tl.load(sin + position * HALF + channel)
    return (first * c - second * s) * scale, (second * c + first * s) * scale


@triton.jit
def attend_kernel(
    qkv, table, cos, sin, value_table, keys, values, sums, totals, out, rows, capacity, row_stride, scaling, eps,
    PARTS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head's attention over a part of its keys; the last part takes in the new key and value, and keeps them.

    Queries and keys are normed, so their products are bounded and exponentials need no running maximum. `table` has
    the lines TOKEN, POSITION and ACTIVE first (`state`). `sums` (B, H, PARTS, D) and `totals` (B, H, PARTS) are put
    together by `combine_kernel`; a single part writes `out` (B, H, D) itself.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = D // 2
    if tl.load(table + 2 * rows + row) == 0:
        return
    position = tl.load(table + rows + row)
    kv_head = head // G
    place = row.to(tl.int64) * (H // G) + kv_head
    keys += place * capacity * D
    values += place * capacity * D
    line = qkv + row * row_stride
    query_1, query_2 = _load_turned(line + head * D, position, cos, sin, eps, HALF)
    query_1 *= scaling * LOG2_E
    query_2 *= scaling * LOG2_E

    seen = tl.minimum(position, capacity).to(tl.int32)
    # In a ring that is full, the oldest key makes place for the new one.
    leaving = tl.where(position >= capacity, position % capacity, capacity).to(tl.int32)
    length = tl.cdiv(tl.cdiv(seen, PARTS), BLOCK) * BLOCK
    begin = part * length
    end = tl.minimum(begin + length, seen)
    half, channel = tl.arange(0, HALF), tl.arange(0, D)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, D), tl.float32)
    for at in range(begin, end, BLOCK):
        key = at + tl.arange(0, BLOCK)
        visible = (key < end) & (key != leaving)
        start = keys + key[:, None] * D + half
        key_1 = tl.load(start, mask=visible[:, None], other=0.0).to(tl.float32)
        key_2 = tl.load(start + HALF, mask=visible[:, None], other=0.0).to(tl.float32)
        value = tl.load(values + key[:, None] * D + channel, mask=visible[:, None], other=0.0).to(tl.float32)
        score = tl.sum(key_1 * query_1[None, :] + key_2 * query_2[None, :], axis=1)
        weight = tl.where(visible, tl.exp2(score), 0.0)
        total += weight
        mixed += weight[:, None] * value
    denominator = tl.sum(total)
    numerator = tl.sum(mixed, axis=0)

    if part == PARTS - 1:
        key_1, key_2 = _load_turned(line + (H + kv_head) * D, position, cos, sin, eps, HALF)
        value = tl.load(line + (H + H // G + kv_head) * D + channel).to(tl.float32)
        if HAS_VALUES:
            gate = tl.load(line + (H + 2 * (H // G)) * D + kv_head).to(tl.float32)
            looked_up = tl.load(value_table + (tl.load(table + row) * (H // G) + kv_head) * D + channel)
            value += 3.0 / (1.0 + tl.exp(-gate)) * looked_up.to(tl.float32)
        kind = keys.dtype.element_ty
        key_1, key_2, value = key_1.to(kind), key_2.to(kind), value.to(kind)
        if head % G == 0:
            into = (position % capacity) * D
            tl.store(keys + into + half, key_1)
            tl.store(keys + into + HALF + half, key_2)
            tl.store(values + into + channel, value)
        weight = tl.exp2(tl.sum(key_1.to(tl.float32) * query_1 + key_2.to(tl.float32) * query_2))
        denominator += weight
        numerator += weight * value.to(tl.float32)
    if PARTS == 1:
        tl.store(out + (row * H + head) * D + channel, (numerator / denominator).to(out.dtype.element_ty))
    else:
        slot = (row * H + head) * PARTS + part
        tl.store(sums + slot * D + channel, numerator)
        tl.store(totals + slot, denominator)


@triton.jit
def combine_kernel(sums, totals, out, PARTS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """The parts of a head's attention put together."""
    head = tl.program_id(0)
    part, channel = tl.arange(0, BLOCK), tl.arange(0, D)
    inside = part < PARTS
    numerator = tl.load(sums + (head * PARTS + part[:, None]) * D + channel, mask=inside[:, None], other=0.0)
    denominator = tl.load(totals + head * PARTS + part, mask=inside, other=0.0)
    out_row = tl.sum(numerator, axis=0) / tl.sum(denominator)
    tl.store(out + head * D + channel, out_row.to(out.dtype.element_ty))


@triton.jit
def advance_kernel(
    table, forced, chosen, end_ids, emitted, uniform, rows, longest_forced, call_end, B, NUM_ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`state.advance` and, for the step after it, `state.draw_uniform`; the table's lines are `state`'s."""
    row = tl.arange(0, BLOCK)
    here = row < B
    token = tl.load(table + row, mask=here, other=0)
    position = tl.load(table + rows + row, mask=here, other=0)
    active = tl.load(table + 2 * rows + row, mask=here, other=0)
    remaining = tl.load(table + 3 * rows + row, mask=here, other=0)
    seed = tl.load(table + 4 * rows + row, mask=here, other=0)
    forced_at = tl.load(table + 5 * rows + row, mask=here, other=0)
    forced_end = tl.load(table + 6 * rows + row, mask=here, other=0)
    follows = forced_at < forced_end
    due = tl.load(forced + row * longest_forced + forced_at, mask=here & follows, other=0)
    next_token = tl.where(follows, due, tl.load(chosen + row, mask=here, other=0))
    moves = active > 0
    stops = (remaining <= 1) | ((next_token == call_end) & (forced_at >= forced_end))
    for index in tl.static_range(NUM_ENDS):
        stops = stops | (next_token == tl.load(end_ids + index))
    position += active
    tl.store(emitted + row, tl.where(moves, next_token, -1), mask=here)
    tl.store(table + row, tl.where(moves, next_token, token), mask=here)
    tl.store(table + rows + row, position, mask=here)
    tl.store(table + 2 * rows + row, tl.where(stops, 0, active), mask=here)
    tl.store(table + 3 * rows + row, remaining - active, mask=here)
    tl.store(table + 5 * rows + row, forced_at + tl.where(follows, active, 0), mask=here)
    bits = seed + (position + 1) * GOLDEN
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * MIX_1
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * MIX_2
    bits = bits ^ ((bits >> 31) & 0x1FFFFFFFF)
    tl.store(uniform + row, ((bits >> 40) & 0xFFFFFF).to(tl.float32) / 16777216.0, mask=here)


@triton.jit
def mix_and_norm_kernel(states, first, scales, mixed, normed, eps, K, MIX: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < K
    x = tl.load(states + row * K + channel, mask=inside, other=0.0).to(tl.float32)
    if MIX:
        x = x * tl.load(scales) + tl.load(first + row * K + channel, mask=inside, other=0.0) * tl.load(scales + 1)
        tl.store(mixed + row * K + channel, x.to(mixed.dtype.element_ty), mask=inside)
    x = x * tl.rsqrt(tl.sum(x * x) / K + eps)
    tl.store(normed + row * K + channel, x.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def split_heads_kernel(
    qkv, ids, positions, cos, sin, value_table, row_stride, eps, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    HAS_VALUES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """`plain.split_heads` in place, one token to a program."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    head, half = tl.arange(0, BLOCK_H), tl.arange(0, HALF)
    position = tl.load(positions + token)
    inside = (head < H + KV)[:, None]
    start = qkv + token * row_stride + head[:, None] * D + half[None, :]
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)[:, None]
    c, s = tl.load(cos + position * HALF + half)[None, :], tl.load(sin + position * HALF + half)[None, :]
    tl.store(start, ((first * c - second * s) * scale).to(qkv.dtype.element_ty), mask=inside)
    tl.store(start + HALF, ((second * c + first * s) * scale).to(qkv.dtype.element_ty), mask=inside)
    if HAS_VALUES:
        kv_head, channel = tl.arange(0, BLOCK_KV), tl.arange(0, D)
        inside = (kv_head < KV)[:, None]
        line = qkv + token * row_stride + (H + KV) * D
        gate = tl.load(line + KV * D + kv_head, mask=kv_head < KV, other=0.0).to(tl.float32)
        gate = 3.0 / (1.0 + tl.exp(-gate))
        place = kv_head[:, None] * D + channel[None, :]
        looked_up = tl.load(value_table + tl.load(ids + token) * KV * D + place, mask=inside, other=0.0)
        value = tl.load(line + place, mask=inside, other=0.0).to(tl.float32) + gate[:, None] * looked_up.to(tl.float32)
        tl.store(line + place, value.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def cap_kernel(raw, logits, N, cap, banned, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """The cap on logits, one of which is never chosen; the hyperbolic tangent written with an exponential."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(raw + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    if CAP:
        x = cap * (2.0 / (1.0 + tl.exp(-2.0 / cap * x)) - 1.0)
    tl.store(logits + row * N + column, tl.where(column == banned, float("-inf"), x), mask=column < N)


@triton.jit
def square_relu_kernel(states, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(states + place, mask=place < count, other=0.0).to(tl.float32), 0.0)
    tl.store(states + place, (x * x).to(states.dtype.element_ty), mask=place < count)
