"""The way back through Mamba-2's scan, but for the walk over states: notation, layout and helpers are those of ``triton_ssd_kernels``."""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_pretrain.ops.triton_ssd_kernels import add_or_restart, edges_of, load_tile, softplus, store_tile


@triton.jit
def _exponents(
    ends_ptr, sums_ptr, low_sums_ptr, sources, low, at, begin, length, last_begin,
    AHEAD: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(j, i): those of the decays from the steps j of a tile to the steps i of the tile that is AHEAD steps further on; -inf where nothing goes.

    ``last_begin``: where, in the chunk, the document of its last step begins; if that is not inside, documents part nothing in the chunk.
    """
    within = tl.arange(0, TILE)
    apart = tl.load(sums_ptr + at + AHEAD)[None, :] - sources[:, None]
    if EXACT:
        apart += tl.load(low_sums_ptr + at + AHEAD)[None, :] - low[:, None]
    if AHEAD == 0:
        apart = tl.where(within[:, None] <= within[None, :], apart, float("-inf"))
    if HAS_DOCUMENTS:  # noqa: SIM102 (two conditions: one is the compiler's, the other the data's)
        if last_begin > 0:
            document_end = tl.load(ends_ptr + begin + within, mask=within < length - begin, other=0) - begin.to(tl.int32)
            apart = tl.where(within[None, :] + AHEAD < document_end[:, None], apart, float("-inf"))
    return apart


@triton.jit
def _decays_to_end(
    sums_ptr, low_sums_ptr, sources, low, end_at, last_begin, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """(j,): decays from the steps of a tile, where the document of the chunk's last step begins at ``last_begin``, to the end of the chunk."""
    to_end = tl.load(sums_ptr + end_at) - sources
    if EXACT:
        to_end += tl.load(low_sums_ptr + end_at) - low
    to_end = tl.exp2(to_end)
    if HAS_DOCUMENTS:
        to_end = tl.where(tl.arange(0, TILE) >= last_begin, to_end, 0.0)
    return to_end


@triton.jit
def _sent(x, dy, scores, dscores, dx, apart, PRECISION: tl.constexpr):
    """Adds what steps j send to steps i of one tile: to dx and the scores' gradient. Returns them with dy x^T and what flows from j to i.

    ``apart``: exponents of the decays from j to i, -inf where nothing goes.
    """
    decay = tl.exp2(apart)
    dmixing = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
    dx = tl.dot((scores * decay).to(dy.dtype), dy, dx, input_precision=PRECISION)
    change = dmixing * decay
    return dx, dscores + change, dmixing, change * scores


@triton.jit
def _inside(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, dstates_ptr,
    dx_ptr, dscores_ptr, shares_ptr, taken_ptr, cross_ptr,
    x_row, x_head, BC_row, dx_row,
    batch, start, first_head, head_count, length, padded, heads, headdim, state,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
    KEEP: tl.constexpr, J: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile J of a chunk that begins at ``start``: as the source j of what it sends to the steps i of its own tile and of the next."""
    CROSS: tl.constexpr = J + 1 < TILES
    within, channels, states = tl.arange(0, TILE), tl.arange(0, P), tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    begin = start + J * TILE
    inside, inside_next = within < length - begin, within < length - begin - TILE
    x_mask, next_mask = inside[:, None] & has_channel[None, :], inside_next[:, None] & has_channel[None, :]
    diagonal = within[:, None] == within[None, :]
    in_BC = within[:, None] * BC_row + states[None, :]
    B = load_tile(B_ptr + begin * BC_row, in_BC, inside[:, None] & has_state[None, :], MASKED)
    C = load_tile(C_ptr + begin * BC_row, in_BC, inside[:, None] & has_state[None, :], MASKED)
    scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # (j, i), as everything here
    own_scores = tl.sum(tl.where(diagonal, scores, 0.0), axis=1)
    dscores = tl.zeros((TILE, TILE), dtype=tl.float32)
    if CROSS:
        C_next = load_tile(C_ptr + (begin + TILE) * BC_row, in_BC, inside_next[:, None] & has_state[None, :], MASKED)
        scores_next = tl.dot(B, tl.trans(C_next), input_precision=PRECISION)
        dscores_next = tl.zeros((TILE, TILE), dtype=tl.float32)
    last_begin = 0
    if HAS_DOCUMENTS:
        begins_ptr += batch * length
        ends_ptr += batch * length
        _, last_begin = edges_of(begins_ptr, ends_ptr, start, TILES * TILE, length)
    dy_row = heads * headdim
    for i in range(head_count):
        head = first_head + i
        vectors = (batch * heads + head) * padded
        at, end_at = vectors + begin + within, vectors + start + TILES * TILE - 1
        # Through the state after the chunk.
        in_state = states[:, None] * (headdim if MASKED else P) + channels[None, :]
        dS = load_tile(dstates_ptr + head * headdim * state, in_state, has_state[:, None] & has_channel[None, :], MASKED)
        dx = tl.dot(B, dS, input_precision=PRECISION)
        sources = tl.load(sources_ptr + at)
        low = tl.load(low_sources_ptr + at) if EXACT else sources
        dx *= _decays_to_end(sums_ptr, low_sums_ptr, sources, low, end_at, last_begin - J * TILE, HAS_DOCUMENTS, EXACT, TILE)[:, None]
        x = load_tile(x_ptr + begin * x_row + head * x_head, within[:, None] * x_row + channels[None, :], x_mask, MASKED)
        to_states = tl.sum(dx * x.to(tl.float32), axis=1)
        # Through the steps of this tile. A step's own share flows nowhere.
        dy_rows = dy_ptr + (batch * length + begin) * dy_row + head * headdim
        dy = load_tile(dy_rows, within[:, None] * dy_row + channels[None, :], x_mask, MASKED)
        if HAS_D:
            dx += tl.load(D_ptr + head) * dy.to(tl.float32)
        if not KEEP:  # from a zero that no compiler lifts out of the loop
            scores = tl.dot(B, tl.trans(C), tl.zeros((TILE, TILE), tl.float32) + tl.minimum(i, 0), input_precision=PRECISION)
        apart = _exponents(ends_ptr, sums_ptr, low_sums_ptr, sources, low, at, begin, length, last_begin, 0, HAS_DOCUMENTS, EXACT, TILE)
        dx, dscores, dmixing, flow = _sent(x, dy, scores, dscores, dx, apart, PRECISION)
        own = tl.sum(tl.where(diagonal, dmixing, 0.0), axis=1)
        flow = tl.where(diagonal, 0.0, flow)
        given = tl.sum(flow, axis=1)
        tl.store(taken_ptr + at, tl.sum(flow, axis=0))
        # Through those of the next.
        if CROSS:
            dy = load_tile(dy_rows + TILE * dy_row, within[:, None] * dy_row + channels[None, :], next_mask, MASKED)
            if not KEEP:
                scores_next = tl.dot(B, tl.trans(C_next), tl.zeros((TILE, TILE), tl.float32) + tl.minimum(i, 0), input_precision=PRECISION)
            apart = _exponents(
                ends_ptr, sums_ptr, low_sums_ptr, sources, low, at, begin, length, last_begin, TILE, HAS_DOCUMENTS, EXACT, TILE
            )
            dx, dscores_next, dmixing, flow = _sent(x, dy, scores_next, dscores_next, dx, apart, PRECISION)
            given += tl.sum(flow, axis=1)
            tl.store(cross_ptr + at + TILE, tl.sum(flow, axis=0))
        four = (at * 4)[:, None, None] + (tl.arange(0, 2) * 2)[None, :, None] + tl.arange(0, 2)[None, None, :]
        tl.store(shares_ptr + four, tl.join(tl.join(given, own * own_scores), tl.join(to_states, own)))
        dx_rows = dx_ptr + (batch * length + begin) * dx_row + head * headdim
        store_tile(dx_rows, within[:, None] * dx_row + channels[None, :], dx, x_mask, MASKED)
    pair: tl.constexpr = J * TILES - J * (J - 1) // 2  # of (J, J); that of (J, J + 1) follows
    square = within[:, None] * TILE + within[None, :]
    tl.store(dscores_ptr + pair * TILE * TILE + square, dscores)
    if CROSS:
        tl.store(dscores_ptr + (pair + 1) * TILE * TILE + square, dscores_next)


@triton.jit
def ssd_inside(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, dstates_ptr,
    dx_ptr, dscores_ptr, shares_ptr, taken_ptr, cross_ptr,
    x_batch, x_row, x_head, BC_batch, BC_row, BC_group, dx_row,
    length, padded, heads, per_group, headdim, state, chunks, parts, part_heads,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the steps of a tile send to later steps of its chunk and to the state after it, for part_heads heads of a group, one after the other:
    dx, the gradient of the scores (summed over these heads), and what each step gives to and takes from the gradients of step and sum.
    KEEP holds the scores C B^T in registers; without, they are computed anew for every head.
    """
    index, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    part, group = index % parts, index // parts % (heads // per_group)
    chunk = index // parts // (heads // per_group) % chunks
    batch = (index // parts // (heads // per_group) // chunks).to(tl.int64)
    first_head = group.to(tl.int64) * per_group + part * part_heads
    head_count = tl.minimum(part_heads, per_group - part * part_heads)
    x_ptr += batch * x_batch
    B_ptr += batch * BC_batch + group.to(tl.int64) * BC_group
    C_ptr += batch * BC_batch + group.to(tl.int64) * BC_group
    dstates_ptr += (batch * chunks + chunk) * heads * headdim * state
    dscores_ptr += index.to(tl.int64) * (TILES * (TILES + 1) // 2 * TILE * TILE)
    start = (chunk * (TILES * TILE)).to(tl.int64)
    if tile < TILES - 1:
        _inside(
            x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, dstates_ptr,
            dx_ptr, dscores_ptr, shares_ptr, taken_ptr, cross_ptr,
            x_row, x_head, BC_row, dx_row,
            batch, start, first_head, head_count, length, padded, heads, headdim, state,
            HAS_D, HAS_DOCUMENTS, EXACT, MASKED, KEEP, 0, TILES, TILE, P, N, PRECISION,
        )  # fmt: skip
    else:
        _inside(
            x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, dstates_ptr,
            dx_ptr, dscores_ptr, shares_ptr, taken_ptr, cross_ptr,
            x_row, x_head, BC_row, dx_row,
            batch, start, first_head, head_count, length, padded, heads, headdim, state,
            HAS_D, HAS_DOCUMENTS, EXACT, MASKED, KEEP, TILES - 1, TILES, TILE, P, N, PRECISION,
        )  # fmt: skip


@triton.jit
def ssd_edges(
    x_ptr, dy_ptr, C_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, states_ptr, dstates_ptr,
    dB_ptr, dC_ptr, from_states_ptr,
    x_batch, x_row, x_head, BC_batch, BC_row, BC_group,
    vector_size, length, padded, heads, per_group, headdim, state, chunks, parts, part_heads,
    HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through the states before and after a chunk, of one tile, summed over part_heads heads: of C (even programs) and B (odd)."""
    index = tl.program_id(0) // 2
    tile, index = index % TILES, index // TILES
    part, group = index % parts, index // parts % (heads // per_group)
    chunk = index // parts // (heads // per_group) % chunks
    batch = (index // parts // (heads // per_group) // chunks).to(tl.int64)
    first_head = group.to(tl.int64) * per_group + part * part_heads
    head_count = tl.minimum(part_heads, per_group - part * part_heads)
    within, channels, states = tl.arange(0, TILE), tl.arange(0, P), tl.program_id(1) * N + tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    start = (chunk * (TILES * TILE)).to(tl.int64)
    begin = start + tile * TILE
    inside = within < length - begin
    x_mask, BC_mask = inside[:, None] & has_channel[None, :], inside[:, None] & has_state[None, :]
    state_mask = has_state[:, None] & has_channel[None, :]
    of_state = (batch * chunks + chunk) * heads * headdim * state
    in_state = states[:, None] * (headdim if MASKED else P) + channels[None, :]
    vectors = batch * heads * padded
    total = tl.zeros((TILE, N), dtype=tl.float32)
    of_part = (((batch * chunks + chunk) * TILES + tile) * (heads // per_group) + group) * parts + part
    in_part = within[:, None] * state + states[None, :]
    if HAS_DOCUMENTS:
        first_end, last_begin = edges_of(begins_ptr + batch * length, ends_ptr + batch * length, start, TILES * TILE, length)
    in_chunk = tile * TILE + within
    if tl.program_id(0) % 2 == 0:
        C_ptr += batch * BC_batch + group.to(tl.int64) * BC_group + begin * BC_row
        C = load_tile(C_ptr, within[:, None] * BC_row + states[None, :], BC_mask, MASKED)
        from_states_ptr += tl.program_id(1).to(tl.int64) * vector_size
        for i in range(head_count):
            head = first_head + i
            at = vectors + head * padded + begin + within
            weight = tl.exp2(tl.load(sums_ptr + at))
            if HAS_DOCUMENTS:
                weight = tl.where(in_chunk < first_end, weight, 0.0)
            dy_rows = dy_ptr + (batch * length + begin) * (heads * headdim) + head * headdim
            dy = load_tile(dy_rows, within[:, None] * (heads * headdim) + channels[None, :], x_mask, MASKED)
            S = load_tile(states_ptr + of_state + head * headdim * state, in_state, state_mask, MASKED)
            found = tl.dot(dy, tl.trans(S), input_precision=PRECISION) * weight[:, None]
            total += found
            tl.store(from_states_ptr + at, tl.sum(found * C.to(tl.float32), axis=1))
        tl.store(dC_ptr + of_part * (TILE * state) + in_part, total, mask=has_state[None, :])
    else:
        for i in range(head_count):
            head = first_head + i
            at, end_at = vectors + head * padded + begin + within, vectors + head * padded + start + TILES * TILE - 1
            to_end = tl.load(sums_ptr + end_at) - tl.load(sources_ptr + at)
            if EXACT:
                to_end += tl.load(low_sums_ptr + end_at) - tl.load(low_sources_ptr + at)
            weight = tl.exp2(to_end)
            if HAS_DOCUMENTS:
                weight = tl.where(in_chunk >= last_begin, weight, 0.0)
            x_rows = x_ptr + batch * x_batch + begin * x_row + head * x_head
            x = load_tile(x_rows, within[:, None] * x_row + channels[None, :], x_mask, MASKED)
            dS = load_tile(dstates_ptr + of_state + head * headdim * state, in_state, state_mask, MASKED)
            total += tl.dot(x, tl.trans(dS), input_precision=PRECISION) * weight[:, None]
        tl.store(dB_ptr + of_part * (TILE * state) + in_part, total, mask=has_state[None, :])


@triton.jit
def ssd_gather(
    B_ptr, C_ptr, dscores_ptr, dB_parts_ptr, dC_parts_ptr, dxBC_ptr,
    BC_batch, BC_row, BC_group, dxBC_row, length, groups, state, chunks, parts,
    TILES: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB (even programs) and dC (odd) of one tile: the parts through states, added up, and the scores' gradients, added up, times C and B."""
    of_C = tl.program_id(0) % 2
    tile, index = tl.program_id(0) // 2 % TILES, tl.program_id(0) // 2 // TILES
    group, chunk = index % groups, index // groups % chunks
    batch = (index // groups // chunks).to(tl.int64)
    within, states = tl.arange(0, TILE), tl.program_id(1) * N + tl.arange(0, N)
    has_state = states < state
    PAIRS: tl.constexpr = TILES * (TILES + 1) // 2
    dscores_ptr += index.to(tl.int64) * parts * (PAIRS * TILE * TILE)
    start = (chunk * (TILES * TILE)).to(tl.int64)
    other_ptr, parts_ptr = B_ptr, dC_parts_ptr
    if of_C == 0:
        other_ptr, parts_ptr = C_ptr, dB_parts_ptr
    other_ptr += batch * BC_batch + group.to(tl.int64) * BC_group + start * BC_row
    parts_ptr += (((batch * chunks + chunk) * TILES + tile) * groups + group) * parts * (TILE * state)
    found = tl.zeros((TILE, N), dtype=tl.float32)
    for part in range(parts):
        found += tl.load(
            parts_ptr + part * (TILE * state) + (within[:, None] * state + states[None, :]), mask=has_state[None, :], other=0.0
        )
    for i in range(tl.where(of_C == 0, tile, 0), tl.where(of_C == 0, TILES, tile + 1)):
        earlier, later = tl.minimum(tile, i), tl.maximum(tile, i)
        pair = earlier * TILES - earlier * (earlier - 1) // 2 + later - earlier
        # Stored (from, to): as it is for dB, turned for dC.
        in_square = within[:, None] * tl.where(of_C == 0, TILE, 1) + within[None, :] * tl.where(of_C == 0, 1, TILE)
        dscores = tl.zeros((TILE, TILE), dtype=tl.float32)
        for part in range(parts):
            dscores += tl.load(dscores_ptr + (part * PAIRS + pair) * (TILE * TILE) + in_square)
        mask = (within < length - start - i * TILE)[:, None] & has_state[None, :]
        other = tl.load(other_ptr + i * TILE * BC_row + (within[:, None] * BC_row + states[None, :]), mask=mask, other=0.0)
        found = tl.dot(dscores.to(other.dtype), other, found, input_precision=PRECISION)
    rows = start + tile * TILE + within
    column = dxBC_row - ((2 - of_C) * groups - group) * state  # behind dx, dB, then dC
    out = (batch * length + rows[:, None]) * dxBC_row + (column + states[None, :])
    tl.store(dxBC_ptr + out, found.to(dxBC_ptr.dtype.element_ty), mask=(rows < length)[:, None] & has_state[None, :])


@triton.jit
def ssd_finish(
    dt_ptr, A_ptr, bias_ptr, begins_ptr, ends_ptr, shares_ptr, taken_ptr, cross_ptr, from_states_ptr, products_ptr,
    ddt_ptr, sums_ptr,
    dt_batch, dt_row, dt_head, ddt_row, vector_size, batches, length, padded, heads, chunks, from_blocks, product_blocks, dt_min, dt_max,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The gradient of dt, and this chunk's part of those of A, dt_bias and D.

    That of step_k A is what flows from before k to k or later: the chunk's own flows (what a step takes less what it gives, added from the end),
    from the state before to steps from k on, from steps before k to the state after, and from the one state to the other.
    """
    chunk, batch = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    within = tl.arange(0, TILES * TILE)
    rows = (chunk * (TILES * TILE)).to(tl.int64) + within
    columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    present = columns < heads
    mask = present[:, None] & (rows < length)[None, :]
    at = (batch * heads + columns[:, None]) * padded + rows[None, :]
    A = tl.load(A_ptr + columns, mask=present, other=0.0)
    raw = tl.load(dt_ptr + batch * dt_batch + columns[:, None] * dt_head + rows[None, :] * dt_row, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, mask=present, other=0.0)[:, None]
    soft = softplus(raw)
    step = tl.minimum(tl.maximum(soft, dt_min), dt_max)
    given, to_states = tl.load(shares_ptr + at * 4, mask=mask, other=0.0), tl.load(shares_ptr + at * 4 + 1, mask=mask, other=0.0)
    own, skip = tl.load(shares_ptr + at * 4 + 2, mask=mask, other=0.0), tl.load(shares_ptr + at * 4 + 3, mask=mask, other=0.0)
    taken = tl.load(taken_ptr + at, mask=mask, other=0.0).to(tl.float64)
    if TILES > 1:
        taken += tl.load(cross_ptr + at, mask=mask & (within >= TILE)[None, :], other=0.0)
    from_states = tl.zeros((HEADS, TILES * TILE), dtype=tl.float64)
    for _ in range(from_blocks):
        from_states += tl.load(from_states_ptr + at, mask=mask, other=0.0)
        from_states_ptr += vector_size
    product = tl.zeros((HEADS,), dtype=tl.float64)
    for block in range(product_blocks):
        product += tl.load(products_ptr + ((block * batches + batch) * heads + columns) * chunks + chunk, mask=present, other=0.0)
    flow = taken - given
    if HAS_DOCUMENTS:
        restarts = (tl.load(ends_ptr + batch * length + rows, mask=rows < length, other=0) == rows + 1).to(tl.int32)
        restarts = restarts[None, :] + tl.zeros((HEADS, TILES * TILE), dtype=tl.int32)
        flow, _ = tl.associative_scan((flow, restarts), 1, add_or_restart, reverse=True)
    else:
        flow = tl.cumsum(flow, axis=1, reverse=True)
    # What goes through states is zero outside the first or the last document of the chunk: these sums cross nothing.
    earlier = to_states.to(tl.float64)
    change = flow + tl.cumsum(from_states, axis=1, reverse=True) + (tl.cumsum(earlier, axis=1) - earlier) + product[:, None]
    change = tl.where(mask, change.to(tl.float32), 0.0)
    direct = tl.where(step > 0.0, (given + to_states) / step, 0.0) + own
    ddt = (direct + change * A[:, None]) * tl.sigmoid(raw)
    ddt = tl.where(mask & (soft >= dt_min) & (soft <= dt_max), ddt, 0.0)
    tl.store(ddt_ptr + (batch * length + rows[None, :]) * ddt_row + columns[:, None], ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
    of_chunk = (batch * chunks + chunk) * heads + columns
    tl.store(sums_ptr + of_chunk, tl.sum(change * step, axis=1), mask=present)
    if HAS_BIAS:
        tl.store(sums_ptr + batches * chunks * heads + of_chunk, tl.sum(ddt, axis=1), mask=present)
    if HAS_D:
        tl.store(sums_ptr + 2 * batches * chunks * heads + of_chunk, tl.sum(skip, axis=1), mask=present)
