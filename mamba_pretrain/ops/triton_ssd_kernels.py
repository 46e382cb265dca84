"""Triton kernels of Mamba-2's scan: what happens inside a chunk is matrix products, between chunks a state is carried.

With s_i = step_i A the chunk's running sum is c_i (kept times log2 e: decays are powers of two), so that within a document and a chunk

    y_i = sum_{j <= i} exp(c_i - c_j) step_j (C_i . B_j) x_j + exp(c_i) C_i . S + D x_i        S: the state before the chunk
    S' = exp(c_end) S + sum_j exp(c_end - c_j) step_j x_j B_j^T

Sums restart where a document begins and pairs of different documents are masked before they are multiplied, so nothing crosses, to the bit.
Activations are read where they are, strided, channels adjacent; offsets between rows are 64-bit. Steps and sums are (b, h, padded), fp32, padded
to whole chunks by steps of zero. There are no atomics: a value is written by one program, sums over programs are finished in a fixed order.

``ssd_prepare`` makes steps and sums; ``ssd_forward`` walks along the chunks of a head with its state in registers. The way back is
``ssd_states`` (states before chunks; then, from the end, their gradients after chunks), ``ssd_inside`` (dx and the gradients of the scores C B^T,
summed over heads), ``ssd_edges`` (dB and dC through the states), ``ssd_gather`` (dB and dC together) and ``ssd_finish`` (dt, A, and what is summed).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)): log1p(u), u = exp(-|x|), by the series of 2 artanh(u / (2 + u)), which keeps all digits where u is tiny."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _add_or_restart(before, restarts_before, value, restarts):
    """Running sums (of the first of each pair) that restart where the second is set."""
    return tl.where(restarts > 0, value, before + value), restarts_before | restarts


@triton.jit
def ssd_prepare(
    dt_ptr, A_ptr, bias_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr,
    dt_batch, dt_row, dt_head, length, padded, heads, dt_min, dt_max,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Steps and their sums of some heads in one chunk; sums are added in fp64. EXACT stores what fp32 rounds off beside them."""
    batch = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside, present = rows < length, columns < heads
    mask = present[:, None] & inside[None, :]
    raw = tl.load(dt_ptr + batch * dt_batch + columns[:, None] * dt_head + rows[None, :] * dt_row, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, mask=present, other=0.0)[:, None]
    A = tl.load(A_ptr + columns, mask=present, other=0.0)
    step = tl.where(mask, tl.minimum(tl.maximum(_softplus(raw), dt_min), dt_max), 0.0)
    change = (step * A[:, None]).to(tl.float64) * LOG2E
    if HAS_DOCUMENTS:
        document = tl.load(documents_ptr + batch * length + rows, mask=inside, other=0)
        before = tl.load(documents_ptr + batch * length + rows - 1, mask=inside & (rows > 0), other=0)
        begins = (inside & (document != before)).to(tl.int32)[None, :] + tl.zeros((HEADS, CHUNK), dtype=tl.int32)
        total, _ = tl.associative_scan((change, begins), 1, _add_or_restart)
    else:
        total = tl.cumsum(change, axis=1)
    offsets = (batch * heads + columns[:, None]) * padded + rows[None, :]
    rounded = total.to(tl.float32)
    tl.store(steps_ptr + offsets, step, mask=present[:, None])
    tl.store(sums_ptr + offsets, rounded, mask=present[:, None])
    if EXACT:
        tl.store(low_ptr + offsets, (total - rounded.to(tl.float64)).to(tl.float32), mask=present[:, None])


@triton.jit
def ssd_forward(
    x_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, before_ptr, y_ptr, final_ptr,
    x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group,
    length, padded, heads, per_group, headdim, state, chunks, segments, segment_chunks,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_BEFORE: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one head (or some of its channels) in one segment, chunk after chunk; and the state after the last segment."""
    head = tl.program_id(0) % heads
    segment = tl.program_id(0) // heads % segments
    batch = (tl.program_id(0) // heads // segments).to(tl.int64)
    within = tl.arange(0, CHUNK)
    channels, states = tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    x_ptr += batch * x_batch + head.to(tl.int64) * x_head + within[:, None] * x_row + channels[None, :]
    B_ptr += batch * B_batch + (head // per_group).to(tl.int64) * B_group + within[:, None] * B_row + states[None, :]
    C_ptr += batch * C_batch + (head // per_group).to(tl.int64) * C_group + within[:, None] * C_row + states[None, :]
    y_row = heads * headdim
    y_ptr += batch * length * y_row + head * headdim + within[:, None] * y_row + channels[None, :]
    vectors = (batch * heads + head) * padded
    if HAS_DOCUMENTS:
        documents_ptr += batch * length
    in_state = channels[:, None] * state + states[None, :]
    state_mask = has_channel[:, None] & has_state[None, :]
    S = tl.zeros((P, N), dtype=tl.float32)
    if HAS_BEFORE:
        S = tl.load(before_ptr + ((batch * segments + segment) * heads + head) * headdim * state + in_state, mask=state_mask, other=0.0)
    skip = 0.0
    if HAS_D:
        skip = tl.load(D_ptr + head)
    causal = within[:, None] >= within[None, :]
    first = segment.to(tl.int64) * segment_chunks
    for i in range(0, tl.minimum(segment_chunks, chunks - segment * segment_chunks)):
        start = (first + i) * CHUNK
        inside = within < length - start
        x = tl.load(x_ptr + start * x_row, mask=inside[:, None] & has_channel[None, :], other=0.0)
        B = tl.load(B_ptr + start * B_row, mask=inside[:, None] & has_state[None, :], other=0.0)
        C = tl.load(C_ptr + start * C_row, mask=inside[:, None] & has_state[None, :], other=0.0)
        at = vectors + start
        sums, step = tl.load(sums_ptr + at + within), tl.load(steps_ptr + at + within)
        end = tl.load(sums_ptr + at + CHUNK - 1)
        to_end, apart = end - sums, sums[:, None] - sums[None, :]
        if EXACT:
            low = tl.load(low_ptr + at + within)
            to_end += tl.load(low_ptr + at + CHUNK - 1) - low
            apart += low[:, None] - low[None, :]
        from_before, to_end, kept = tl.exp2(sums), tl.exp2(to_end), tl.exp2(end)
        joined = causal
        if HAS_DOCUMENTS:
            document = tl.load(documents_ptr + start + within, mask=inside, other=-1)
            previous = tl.load(documents_ptr + start - 1, mask=start > 0, other=0)
            last = tl.load(documents_ptr + tl.minimum(start + CHUNK, length) - 1)
            joined = causal & (document[:, None] == document[None, :])
            from_before = tl.where(document == previous, from_before, 0.0)
            to_end = tl.where(document == last, to_end, 0.0)
            kept = tl.where(previous == last, kept, 0.0)
        mixing = tl.dot(C, tl.trans(B), input_precision=PRECISION) * tl.exp2(tl.where(joined, apart, float("-inf"))) * step[None, :]
        y = tl.dot(C, tl.trans(S.to(C.dtype)), input_precision=PRECISION) * from_before[:, None]
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision=PRECISION)
        if HAS_D:
            y += skip * x.to(tl.float32)
        tl.store(y_ptr + start * y_row, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & has_channel[None, :])
        added = tl.trans(x).to(tl.float32) * (step * to_end)[None, :]
        S = tl.dot(added.to(B.dtype), B, S * kept, input_precision=PRECISION)
    if segment == segments - 1:
        tl.store(final_ptr + (batch * heads + head) * headdim * state + in_state, S, mask=state_mask)


@triton.jit
def ssd_states(
    u_ptr, V_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, edge_ptr, before_ptr, states_ptr, products_ptr, end_ptr, decay_ptr,
    u_batch, u_row, u_head, V_batch, V_row, V_group,
    length, padded, heads, per_group, headdim, state, chunks, segments, segment_chunks,
    REVERSE: tl.constexpr, WRITE: tl.constexpr, STORE_END: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_EDGE: tl.constexpr,
    EXACT: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before every chunk from u = x, V = B; REVERSE: their gradients after every chunk from u = dy, V = C.

    WRITE stores them, and on the way back what decays over whole chunks do to the loss (the gradient of c_end that goes through them);
    STORE_END stores where a segment's state ends up, and without WRITE also by how much the segment lets a state decay.
    """
    head = tl.program_id(0) % heads
    segment = tl.program_id(0) // heads % segments
    batch = (tl.program_id(0) // heads // segments).to(tl.int64)
    within = tl.arange(0, CHUNK)
    channels, states = tl.program_id(1) * P + tl.arange(0, P), tl.program_id(2) * N + tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    u_ptr += batch * u_batch + head.to(tl.int64) * u_head + within[:, None] * u_row + channels[None, :]
    V_ptr += batch * V_batch + (head // per_group).to(tl.int64) * V_group + within[:, None] * V_row + states[None, :]
    vectors = (batch * heads + head) * padded
    if HAS_DOCUMENTS:
        documents_ptr += batch * length
    in_state = channels[:, None] * state + states[None, :]
    state_mask = has_channel[:, None] & has_state[None, :]
    of_segment = ((batch * segments + segment) * heads + head) * headdim * state + in_state
    S = tl.zeros((P, N), dtype=tl.float32)
    if HAS_EDGE:
        S = tl.load(edge_ptr + of_segment, mask=state_mask, other=0.0)
    first = segment.to(tl.int64) * segment_chunks
    count = tl.minimum(segment_chunks, chunks - segment * segment_chunks)
    decay = 1.0
    for i in range(0, count):
        chunk = first + i
        if REVERSE:
            chunk = first + count - 1 - i
        start = chunk * CHUNK
        inside = within < length - start
        u = tl.load(u_ptr + start * u_row, mask=inside[:, None] & has_channel[None, :], other=0.0)
        V = tl.load(V_ptr + start * V_row, mask=inside[:, None] & has_state[None, :], other=0.0)
        at = vectors + start
        sums, end = tl.load(sums_ptr + at + within), tl.load(sums_ptr + at + CHUNK - 1)
        kept = tl.exp2(end)
        if REVERSE:
            weight = tl.exp2(sums)
        else:
            to_end = end - sums
            if EXACT:
                to_end += tl.load(low_ptr + at + CHUNK - 1) - tl.load(low_ptr + at + within)
            weight = tl.exp2(to_end) * tl.load(steps_ptr + at + within)
        if HAS_DOCUMENTS:
            document = tl.load(documents_ptr + start + within, mask=inside, other=-1)
            previous = tl.load(documents_ptr + start - 1, mask=start > 0, other=0)
            last = tl.load(documents_ptr + tl.minimum(start + CHUNK, length) - 1)
            kept = tl.where(previous == last, kept, 0.0)
            if REVERSE:
                weight = tl.where(document == previous, weight, 0.0)
            else:
                weight = tl.where(document == last, weight, 0.0)
        if WRITE:
            of_chunk = ((batch * chunks + chunk) * heads + head) * headdim * state + in_state
            tl.store(states_ptr + of_chunk, S.to(states_ptr.dtype.element_ty), mask=state_mask)
            if REVERSE:
                before = tl.load(before_ptr + of_chunk, mask=state_mask, other=0.0).to(tl.float32)
                block = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
                batches = tl.num_programs(0) // heads // segments
                of_product = ((block * batches + batch) * heads + head) * chunks + chunk
                tl.store(products_ptr + of_product, tl.sum(S * before) * kept)
        else:
            decay *= kept
        added = tl.trans(u).to(tl.float32) * weight[None, :]
        S = tl.dot(added.to(V.dtype), V, S * kept, input_precision=PRECISION)
    if STORE_END:
        tl.store(end_ptr + of_segment, S, mask=state_mask)
        if not WRITE:
            tl.store(decay_ptr + (batch * segments + segment) * heads + head, decay)


@triton.jit
def _inside(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, dstates_ptr,
    dx_ptr, dscores_ptr, direct_ptr, flow_ptr, cross_ptr, through_ptr, skip_ptr,
    x_row, x_head, dy_row, dy_head, B_row, C_row,
    batch, start, first_head, head_count, length, padded, heads, headdim, state,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr,
    J: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile J of a chunk that begins at ``start``: as the source j of what it sends to the steps i of its own tile and of the next."""
    CROSS: tl.constexpr = J + 1 < TILES
    within, channels, states = tl.arange(0, TILE), tl.arange(0, P), tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    begin = start + J * TILE
    inside, inside_next = within < length - begin, within < length - begin - TILE
    causal, diagonal = within[:, None] <= within[None, :], within[:, None] == within[None, :]
    B = tl.load(B_ptr + begin * B_row + within[:, None] * B_row + states[None, :], mask=inside[:, None] & has_state[None, :], other=0.0)
    C_ptrs = C_ptr + begin * C_row + within[:, None] * C_row + states[None, :]
    C = tl.load(C_ptrs, mask=inside[:, None] & has_state[None, :], other=0.0)
    scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # (j, i), as everything here
    dscores = tl.zeros((TILE, TILE), dtype=tl.float32)
    if CROSS:
        C_next = tl.load(C_ptrs + TILE * C_row, mask=inside_next[:, None] & has_state[None, :], other=0.0)
        scores_next = tl.dot(B, tl.trans(C_next), input_precision=PRECISION)
        dscores_next = tl.zeros((TILE, TILE), dtype=tl.float32)
    joined = causal
    if HAS_DOCUMENTS:
        documents_ptr += batch * length
        document = tl.load(documents_ptr + begin + within, mask=inside, other=-1)
        last = tl.load(documents_ptr + tl.minimum(start + TILES * TILE, length) - 1)
        joined = causal & (document[:, None] == document[None, :])
        if CROSS:
            next_document = tl.load(documents_ptr + begin + TILE + within, mask=inside_next, other=-1)
            joined_next = document[:, None] == next_document[None, :]
    own_scores = tl.sum(tl.where(diagonal, scores, 0.0), axis=1)
    dx_row = heads * headdim
    for i in range(0, head_count):
        head = first_head + i
        x_mask = inside[:, None] & has_channel[None, :]
        x = tl.load(x_ptr + begin * x_row + head * x_head + within[:, None] * x_row + channels[None, :], mask=x_mask, other=0.0)
        dy_ptrs = dy_ptr + begin * dy_row + head * dy_head + within[:, None] * dy_row + channels[None, :]
        dy = tl.load(dy_ptrs, mask=x_mask, other=0.0)
        of_state = head * headdim * state + channels[:, None] * state + states[None, :]
        dS = tl.load(dstates_ptr + of_state, mask=has_channel[:, None] & has_state[None, :], other=0.0)
        at = (batch * heads + head) * padded + begin
        sums, step = tl.load(sums_ptr + at + within), tl.load(steps_ptr + at + within)
        end_at = (batch * heads + head) * padded + start + TILES * TILE - 1
        to_end, apart = tl.load(sums_ptr + end_at) - sums, sums[None, :] - sums[:, None]
        if EXACT:
            low = tl.load(low_ptr + at + within)
            to_end += tl.load(low_ptr + end_at) - low
            apart += low[None, :] - low[:, None]
        to_end = tl.exp2(to_end)
        if HAS_DOCUMENTS:
            to_end = tl.where(document == last, to_end, 0.0)
        # Through the state after the chunk.
        dx = tl.dot(B, tl.trans(dS), input_precision=PRECISION) * to_end[:, None]
        through = tl.sum(dx * x.to(tl.float32), axis=1)
        dx *= step[:, None]
        # Through the steps of this tile. A step's own share flows nowhere.
        decay = tl.exp2(tl.where(joined, apart, float("-inf"))) * step[:, None]
        mixing = scores * decay
        dmixing = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        dx = tl.dot(mixing.to(dy.dtype), dy, dx, input_precision=PRECISION)
        dscores += dmixing * decay
        own = tl.sum(tl.where(diagonal, dmixing, 0.0), axis=1)
        flow = tl.where(diagonal, 0.0, dmixing * mixing)
        given, taken = tl.sum(flow, axis=1), tl.sum(flow, axis=0)
        if CROSS:
            apart = tl.load(sums_ptr + at + TILE + within)[None, :] - sums[:, None]
            if EXACT:
                apart += tl.load(low_ptr + at + TILE + within)[None, :] - low[:, None]
            if HAS_DOCUMENTS:
                apart = tl.where(joined_next, apart, float("-inf"))
            decay = tl.exp2(apart) * step[:, None]
            mixing = scores_next * decay
            dy_next = tl.load(dy_ptrs + TILE * dy_row, mask=inside_next[:, None] & has_channel[None, :], other=0.0)
            dmixing = tl.dot(x, tl.trans(dy_next), input_precision=PRECISION)
            dx = tl.dot(mixing.to(dy.dtype), dy_next, dx, input_precision=PRECISION)
            dscores_next += dmixing * decay
            flow = dmixing * mixing
            given += tl.sum(flow, axis=1)
            tl.store(cross_ptr + at + TILE + within, tl.sum(flow, axis=0))
        tl.store(flow_ptr + at + within, taken - given)
        tl.store(direct_ptr + at + within, tl.where(step > 0.0, given / step, 0.0) + own * own_scores)
        tl.store(through_ptr + at + within, through)
        if HAS_D:
            dx += tl.load(D_ptr + head) * dy.to(tl.float32)
            tl.store(skip_ptr + head, tl.sum(own))
        dx_ptrs = dx_ptr + (batch * length + begin + within[:, None]) * dx_row + head * headdim + channels[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=x_mask)
    pair: tl.constexpr = J * TILES - J * (J - 1) // 2  # of (J, J); that of (J, J + 1) follows
    square = within[:, None] * TILE + within[None, :]
    tl.store(dscores_ptr + pair * TILE * TILE + square, dscores)
    if CROSS:
        tl.store(dscores_ptr + (pair + 1) * TILE * TILE + square, dscores_next)


@triton.jit
def ssd_inside(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, dstates_ptr,
    dx_ptr, dscores_ptr, direct_ptr, flow_ptr, cross_ptr, through_ptr, skip_ptr,
    x_batch, x_row, x_head, dy_batch, dy_row, dy_head, B_batch, B_row, B_group, C_batch, C_row, C_group,
    length, padded, heads, per_group, headdim, state, chunks, parts,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr,
    HEADS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the steps of a tile send to later steps of its chunk and to the state after it, for HEADS heads of a group, one after the other:
    dx, the gradient of the scores (summed over these heads), and what each step gives to and takes from the gradients of step and sum.
    """
    index, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    part, group = index % parts, index // parts % (heads // per_group)
    chunk = index // parts // (heads // per_group) % chunks
    batch = (index // parts // (heads // per_group) // chunks).to(tl.int64)
    first_head = group.to(tl.int64) * per_group + part * HEADS
    head_count = tl.minimum(HEADS, per_group - part * HEADS)
    x_ptr += batch * x_batch
    dy_ptr += batch * dy_batch
    B_ptr += batch * B_batch + group.to(tl.int64) * B_group
    C_ptr += batch * C_batch + group.to(tl.int64) * C_group
    dstates_ptr += (batch * chunks + chunk) * heads * headdim * state
    dscores_ptr += index.to(tl.int64) * (TILES * (TILES + 1) // 2 * TILE * TILE)
    skip_ptr += ((batch * chunks + chunk) * TILES + tile) * heads
    start = (chunk * (TILES * TILE)).to(tl.int64)
    if tile == 0:
        _inside(
            x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, dstates_ptr,
            dx_ptr, dscores_ptr, direct_ptr, flow_ptr, cross_ptr, through_ptr, skip_ptr,
            x_row, x_head, dy_row, dy_head, B_row, C_row,
            batch, start, first_head, head_count, length, padded, heads, headdim, state,
            HAS_D, HAS_DOCUMENTS, EXACT, 0, TILES, TILE, P, N, PRECISION,
        )  # fmt: skip
    else:
        _inside(
            x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, dstates_ptr,
            dx_ptr, dscores_ptr, direct_ptr, flow_ptr, cross_ptr, through_ptr, skip_ptr,
            x_row, x_head, dy_row, dy_head, B_row, C_row,
            batch, start, first_head, head_count, length, padded, heads, headdim, state,
            HAS_D, HAS_DOCUMENTS, EXACT, TILES - 1, TILES, TILE, P, N, PRECISION,
        )  # fmt: skip


@triton.jit
def ssd_edges(
    x_ptr, dy_ptr, C_ptr, documents_ptr, steps_ptr, sums_ptr, low_ptr, states_ptr, dstates_ptr, dB_ptr, dC_ptr, from_ptr,
    x_batch, x_row, x_head, dy_batch, dy_row, dy_head, C_batch, C_row, C_group,
    vector_size, length, padded, heads, per_group, headdim, state, chunks, parts,
    HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr,
    HEADS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through the states before and after a chunk, of one tile, summed over HEADS heads of a group: of C (even programs) and B (odd)."""
    index = tl.program_id(0) // 2
    tile, index = index % TILES, index // TILES
    part, group = index % parts, index // parts % (heads // per_group)
    chunk = index // parts // (heads // per_group) % chunks
    batch = (index // parts // (heads // per_group) // chunks).to(tl.int64)
    first_head = group.to(tl.int64) * per_group + part * HEADS
    head_count = tl.minimum(HEADS, per_group - part * HEADS)
    within, channels, states = tl.arange(0, TILE), tl.arange(0, P), tl.program_id(1) * N + tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    start = (chunk * (TILES * TILE)).to(tl.int64)
    begin = start + tile * TILE
    inside = within < length - begin
    x_mask, s_mask, c_mask = inside[:, None] & has_channel[None, :], has_channel[:, None] & has_state[None, :], inside[:, None] & has_state[None, :]
    of_state = (batch * chunks + chunk) * heads * headdim * state + channels[:, None] * state + states[None, :]
    vectors = batch * heads * padded
    total = tl.zeros((TILE, N), dtype=tl.float32)
    if HAS_DOCUMENTS:
        documents_ptr += batch * length
        document = tl.load(documents_ptr + begin + within, mask=inside, other=-1)
    of_part = (((batch * chunks + chunk) * TILES + tile) * (heads // per_group) + group) * parts + part
    out = of_part * (TILE * state) + within[:, None] * state + states[None, :]
    if tl.program_id(0) % 2 == 0:
        dy_ptr += batch * dy_batch + begin * dy_row + within[:, None] * dy_row + channels[None, :]
        C_ptr += batch * C_batch + group.to(tl.int64) * C_group + begin * C_row + within[:, None] * C_row + states[None, :]
        C = tl.load(C_ptr, mask=c_mask, other=0.0).to(tl.float32)
        from_ptr += tl.program_id(1).to(tl.int64) * vector_size
        if HAS_DOCUMENTS:
            same = document == tl.load(documents_ptr + start - 1, mask=start > 0, other=0)
        for i in range(0, head_count):
            head = first_head + i
            dy = tl.load(dy_ptr + head * dy_head, mask=x_mask, other=0.0)
            S = tl.load(states_ptr + of_state + head * headdim * state, mask=s_mask, other=0.0)
            at = vectors + head * padded + begin + within
            weight = tl.exp2(tl.load(sums_ptr + at))
            if HAS_DOCUMENTS:
                weight = tl.where(same, weight, 0.0)
            found = tl.dot((dy.to(tl.float32) * weight[:, None]).to(S.dtype), S, input_precision=PRECISION)
            tl.store(from_ptr + at, tl.sum(found * C, axis=1))
            total += found
        tl.store(dC_ptr + out, total, mask=has_state[None, :])
    else:
        x_ptr += batch * x_batch + begin * x_row + within[:, None] * x_row + channels[None, :]
        if HAS_DOCUMENTS:
            same = document == tl.load(documents_ptr + tl.minimum(start + TILES * TILE, length) - 1)
        for i in range(0, head_count):
            head = first_head + i
            x = tl.load(x_ptr + head * x_head, mask=x_mask, other=0.0)
            S = tl.load(dstates_ptr + of_state + head * headdim * state, mask=s_mask, other=0.0)
            at = vectors + head * padded
            end = at + start + TILES * TILE - 1
            at += begin + within
            to_end = tl.load(sums_ptr + end) - tl.load(sums_ptr + at)
            if EXACT:
                to_end += tl.load(low_ptr + end) - tl.load(low_ptr + at)
            weight = tl.exp2(to_end) * tl.load(steps_ptr + at)
            if HAS_DOCUMENTS:
                weight = tl.where(same, weight, 0.0)
            total = tl.dot((x.to(tl.float32) * weight[:, None]).to(S.dtype), S, total, input_precision=PRECISION)
        tl.store(dB_ptr + out, total, mask=has_state[None, :])


@triton.jit
def ssd_gather(
    B_ptr, C_ptr, dscores_ptr, dB_parts_ptr, dC_parts_ptr, dB_ptr, dC_ptr,
    B_batch, B_row, B_group, C_batch, C_row, C_group, length, groups, state, chunks, parts,
    TILES: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dC of one tile: the parts through states added up, and the scores' gradients, added up, times C and B."""
    tile, index = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    group, chunk = index % groups, index // groups % chunks
    batch = (index // groups // chunks).to(tl.int64)
    within, states = tl.arange(0, TILE), tl.program_id(1) * N + tl.arange(0, N)
    has_state = states < state
    PAIRS: tl.constexpr = TILES * (TILES + 1) // 2
    square = within[:, None] * TILE + within[None, :]
    dscores_ptr += (index.to(tl.int64) * parts * PAIRS) * TILE * TILE + square
    start = (chunk * (TILES * TILE)).to(tl.int64)
    B_ptr += batch * B_batch + group.to(tl.int64) * B_group + start * B_row + within[:, None] * B_row + states[None, :]
    C_ptr += batch * C_batch + group.to(tl.int64) * C_group + start * C_row + within[:, None] * C_row + states[None, :]
    dB, dC = tl.zeros((TILE, N), dtype=tl.float32), tl.zeros((TILE, N), dtype=tl.float32)
    of_parts = (((batch * chunks + chunk) * TILES + tile) * groups + group) * parts * (TILE * state) + within[:, None] * state + states[None, :]
    for part in range(parts):
        dB += tl.load(dB_parts_ptr + of_parts + part * (TILE * state), mask=has_state[None, :], other=0.0)
        dC += tl.load(dC_parts_ptr + of_parts + part * (TILE * state), mask=has_state[None, :], other=0.0)
    for other in range(0, TILES):
        j, i = tl.minimum(tile, other), tl.maximum(tile, other)
        pair = j * TILES - j * (j - 1) // 2 + i - j
        dscores = tl.zeros((TILE, TILE), dtype=tl.float32)
        for part in range(parts):
            dscores += tl.load(dscores_ptr + (part * PAIRS + pair) * TILE * TILE)
        mask = (within < length - start - other * TILE)[:, None] & has_state[None, :]
        if other >= tile:
            C = tl.load(C_ptr + other * TILE * C_row, mask=mask, other=0.0)
            dB = tl.dot(dscores.to(C.dtype), C, dB, input_precision=PRECISION)
        if other <= tile:
            B = tl.load(B_ptr + other * TILE * B_row, mask=mask, other=0.0)
            dC = tl.dot(tl.trans(dscores).to(B.dtype), B, dC, input_precision=PRECISION)
    rows = start + tile * TILE + within
    out = ((batch * length + rows[:, None]) * groups + group) * state + states[None, :]
    mask = (rows < length)[:, None] & has_state[None, :]
    tl.store(dB_ptr + out, dB.to(dB_ptr.dtype.element_ty), mask=mask)
    tl.store(dC_ptr + out, dC.to(dC_ptr.dtype.element_ty), mask=mask)


@triton.jit
def ssd_finish(
    dt_ptr, A_ptr, bias_ptr, documents_ptr, steps_ptr, direct_ptr, flow_ptr, cross_ptr, through_ptr, from_ptr, products_ptr, skip_ptr,
    ddt_ptr, sums_ptr,
    dt_batch, dt_row, dt_head, vector_size, batches, length, padded, heads, chunks, from_blocks, product_blocks, dt_min, dt_max,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The gradient of dt, and this chunk's part of those of A, dt_bias and D.

    That of s_k = step_k A is what flows from before k to k or later: the chunk's own flows (what a step takes less what it gives, added from the
    end), from the state before to steps from k on, from steps before k to the state after, and from the one state to the other.
    """
    chunk, batch = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    within = tl.arange(0, TILES * TILE)
    rows = (chunk * (TILES * TILE)).to(tl.int64) + within
    columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    present = columns < heads
    mask = present[:, None] & (rows < length)[None, :]
    at = (batch * heads + columns[:, None]) * padded + rows[None, :]
    step = tl.load(steps_ptr + at, mask=mask, other=0.0)
    through = tl.load(through_ptr + at, mask=mask, other=0.0)
    direct = tl.load(direct_ptr + at, mask=mask, other=0.0)
    flow = tl.load(flow_ptr + at, mask=mask, other=0.0).to(tl.float64)
    if TILES > 1:
        flow += tl.load(cross_ptr + at, mask=mask & (within >= TILE)[None, :], other=0.0)
    taken = tl.zeros((HEADS, TILES * TILE), dtype=tl.float64)
    for block in range(from_blocks):
        taken += tl.load(from_ptr + at, mask=mask, other=0.0)
        from_ptr += vector_size
    product = tl.zeros((HEADS,), dtype=tl.float64)
    for block in range(product_blocks):
        product += tl.load(products_ptr + ((block * batches + batch) * heads + columns) * chunks + chunk, mask=present, other=0.0)
    given = (through * step).to(tl.float64)
    if HAS_DOCUMENTS:
        document = tl.load(documents_ptr + batch * length + rows, mask=rows < length, other=-1)
        after = tl.load(documents_ptr + batch * length + rows + 1, mask=rows + 1 < length, other=-1)
        ends = (document != after).to(tl.int32)[None, :] + tl.zeros((HEADS, TILES * TILE), dtype=tl.int32)
        flow, _ = tl.associative_scan((flow, ends), 1, _add_or_restart, reverse=True)
    else:
        flow = tl.cumsum(flow, axis=1, reverse=True)
    # Sums of what is zero outside the first and the last document of the chunk: nothing crosses.
    change = flow + tl.cumsum(taken, axis=1, reverse=True) + (tl.cumsum(given, axis=1) - given) + product[:, None]
    change = change.to(tl.float32)
    A = tl.load(A_ptr + columns, mask=present, other=0.0)
    raw = tl.load(dt_ptr + batch * dt_batch + columns[:, None] * dt_head + rows[None, :] * dt_row, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, mask=present, other=0.0)[:, None]
    soft = _softplus(raw)
    ddt = (direct + through + change * A[:, None]) * tl.sigmoid(raw)
    ddt = tl.where(mask & (soft >= dt_min) & (soft <= dt_max), ddt, 0.0)
    tl.store(ddt_ptr + (batch * length + rows[None, :]) * heads + columns[:, None], ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
    of_chunk = (batch * chunks + chunk) * heads + columns
    tl.store(sums_ptr + of_chunk, tl.sum(change * step, axis=1), mask=present)
    if HAS_BIAS:
        tl.store(sums_ptr + batches * chunks * heads + of_chunk, tl.sum(ddt, axis=1), mask=present)
    if HAS_D:
        skip = tl.zeros((HEADS,), dtype=tl.float32)
        for tile in range(TILES):
            skip += tl.load(skip_ptr + ((batch * chunks + chunk) * TILES + tile) * heads + columns, mask=present, other=0.0)
        tl.store(sums_ptr + 2 * batches * chunks * heads + of_chunk, skip, mask=present)
