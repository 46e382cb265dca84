"""Triton kernels of Mamba-2's scan: what happens inside a chunk is matrix products, between chunks a state is carried.

With c_i the running sum of step A inside a chunk, in a document

    y_i = sum_{j <= i} exp(c_i - c_j) step_j (C_i . B_j) x_j + exp(c_i) C_i . S + D x_i        S: the state before the chunk
    S' = exp(c_end) S + sum_j exp(c_end - c_j) step_j x_j B_j^T

Kernels read c (``sums``) and c_j - log(step_j) (``sources``), so that one exponential gives decay and step together; both times log2 e, since decays
are powers of two. Sums restart where a document begins and pairs of different documents are masked before they are multiplied: nothing crosses, to
the bit. ``begins`` and ``ends`` (b, l) say of every step where its document does; the first begins at -1, the last ends nowhere.
Activations are read where they are, strided, channels adjacent; rows are 64-bit offsets apart. Sums and sources are (b, h, padded) fp32,
padded to whole chunks by steps of zero. States are stored (b, chunks, h, n, p) in the activations' dtype. There are no atomics: a value is written
by one program, sums over programs are finished in a fixed order. dx, dB and dC of a step lie beside each other in a row of (b, l, ``dxBC_row``).

``ssd_prepare`` makes sums and sources; ``ssd_forward`` walks along the chunks of a head with its state in registers. The way back is
``ssd_states`` (states before chunks; then, from the end, their gradients after chunks), ``ssd_inside`` (dx and the gradients of the scores C B^T,
summed over heads), ``ssd_edges`` (dB and dC through the states), ``ssd_gather`` (dB and dC together) and ``ssd_finish`` (dt, A, and what is summed);
all but the first in ``triton_ssd_backward_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)): log1p(u), u = exp(-|x|), by the series of 2 artanh(u / (2 + u)), which keeps all digits where u is tiny."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def add_or_restart(before, restarts_before, value, restarts):
    """Running sums (of the first of each pair) that restart where the second is set."""
    return tl.where(restarts > 0, value, before + value), restarts_before | restarts


@triton.jit
def load_tile(ptr, offsets, mask, MASKED: tl.constexpr):
    """What the mask lets through, zero elsewhere; all of it where tiles end with the tensor."""
    if MASKED:
        return tl.load(ptr + offsets, mask=mask, other=0.0)
    return tl.load(ptr + offsets)


@triton.jit
def store_tile(ptr, offsets, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(ptr + offsets, value.to(ptr.dtype.element_ty))


@triton.jit
def edges_of(begins_ptr, ends_ptr, start, CHUNK: tl.constexpr, length):
    """Where in a chunk the document ends that the step before the chunk belongs to, and where that of its last step begins (or before it)."""
    first_end = tl.load(ends_ptr + tl.maximum(start - 1, 0)) - start.to(tl.int32)
    return first_end, tl.load(begins_ptr + tl.minimum(start + CHUNK, length) - 1) - start.to(tl.int32)


@triton.jit
def _place(heads, segments):
    """The head, the segment and the row of the batch (64 bits) of a program that walks along the chunks."""
    return tl.program_id(0) % heads, tl.program_id(0) // heads % segments, (tl.program_id(0) // heads // segments).to(tl.int64)


@triton.jit
def ssd_prepare(
    dt_ptr, A_ptr, bias_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr,
    dt_batch, dt_row, dt_head, length, padded, heads, dt_min, dt_max,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Sums and sources of some heads in one chunk, added in fp64. EXACT stores what fp32 rounds off beside them."""
    batch = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside, present = rows < length, columns < heads
    mask = present[:, None] & inside[None, :]
    raw = tl.load(dt_ptr + batch * dt_batch + columns[:, None] * dt_head + rows[None, :] * dt_row, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, mask=present, other=0.0)[:, None]
    A = tl.load(A_ptr + columns, mask=present, other=0.0)
    step = tl.where(mask, tl.minimum(tl.maximum(softplus(raw), dt_min), dt_max), 0.0)
    change = (step * A[:, None]).to(tl.float64) * LOG2E
    if HAS_DOCUMENTS:
        restarts = (tl.load(begins_ptr + batch * length + rows, mask=inside, other=-1) == rows).to(tl.int32)
        total, _ = tl.associative_scan((change, restarts[None, :] + tl.zeros((HEADS, CHUNK), dtype=tl.int32)), 1, add_or_restart)
    else:
        total = tl.cumsum(change, axis=1)
    offsets = (batch * heads + columns[:, None]) * padded + rows[None, :]
    sums = total.to(tl.float32)
    tl.store(sums_ptr + offsets, sums, mask=present[:, None])
    if EXACT:
        source = total - tl.log2(step.to(tl.float64))
        sources = source.to(tl.float32)
        tl.store(low_sums_ptr + offsets, (total - sums.to(tl.float64)).to(tl.float32), mask=present[:, None])
        low = tl.where(step > 0.0, source - sources.to(tl.float64), 0.0).to(tl.float32)
        tl.store(low_sources_ptr + offsets, low, mask=present[:, None])
    else:
        sources = (total - tl.log2(step).to(tl.float64)).to(tl.float32)
    tl.store(sources_ptr + offsets, sources, mask=present[:, None])


@triton.jit
def ssd_forward(
    x_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, before_ptr, y_ptr, final_ptr,
    x_batch, x_row, x_head, BC_batch, BC_row, BC_group,
    length, padded, heads, per_group, headdim, state, chunks, segments, segment_chunks,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_BEFORE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one head (or some of its channels) in one segment, chunk after chunk; and the state after the last segment."""
    head, segment, batch = _place(heads, segments)
    within = tl.arange(0, CHUNK)
    channels, states = tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    of_group = batch * BC_batch + (head // per_group).to(tl.int64) * BC_group
    x_ptr += batch * x_batch + head.to(tl.int64) * x_head
    y_row = heads * headdim
    y_ptr += batch * length * y_row + head * headdim
    vectors = (batch * heads + head) * padded
    if HAS_DOCUMENTS:
        begins_ptr += batch * length
        ends_ptr += batch * length
    in_state = channels[None, :] * state + states[:, None]
    state_mask = has_state[:, None] & has_channel[None, :]
    S = tl.zeros((N, P), dtype=tl.float32)
    if HAS_BEFORE:
        S = tl.load(before_ptr + ((batch * segments + segment) * heads + head) * headdim * state + in_state, mask=state_mask, other=0.0)
    skip = 0.0
    if HAS_D:
        skip = tl.load(D_ptr + head)
    first = segment.to(tl.int64) * segment_chunks
    for i in range(tl.minimum(segment_chunks, chunks - segment * segment_chunks)):
        start = (first + i) * CHUNK
        inside = within < length - start
        x_mask, BC_mask = inside[:, None] & has_channel[None, :], inside[:, None] & has_state[None, :]
        at, end_at = vectors + start + within, vectors + start + CHUNK - 1
        B = load_tile(B_ptr + of_group + start * BC_row, within[:, None] * BC_row + states[None, :], BC_mask, MASKED)
        C = load_tile(C_ptr + of_group + start * BC_row, within[:, None] * BC_row + states[None, :], BC_mask, MASKED)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        sums, sources, end = tl.load(sums_ptr + at), tl.load(sources_ptr + at), tl.load(sums_ptr + end_at)
        apart, to_end = sums[:, None] - sources[None, :], end - sources
        if EXACT:
            low = tl.load(low_sources_ptr + at)
            apart += tl.load(low_sums_ptr + at)[:, None] - low[None, :]
            to_end += tl.load(low_sums_ptr + end_at) - low
        from_before, to_end, kept = tl.exp2(sums), tl.exp2(to_end), tl.exp2(end)
        mixing = scores * tl.exp2(tl.where(within[:, None] >= within[None, :], apart, float("-inf")))
        if HAS_DOCUMENTS:
            first_end, last_begin = edges_of(begins_ptr, ends_ptr, start, CHUNK, length)
            from_before = tl.where(within < first_end, from_before, 0.0)
            to_end = tl.where(within >= last_begin, to_end, 0.0)
            kept = tl.where(last_begin < 0, kept, 0.0)
            if last_begin > 0:  # in most chunks no document begins
                begins = tl.load(begins_ptr + start + within, mask=inside, other=0) - start.to(tl.int32)
                mixing = tl.where(within[None, :] >= begins[:, None], mixing, 0.0)
        y = tl.dot(C, S.to(C.dtype), input_precision=PRECISION) * from_before[:, None]
        x = load_tile(x_ptr + start * x_row, within[:, None] * x_row + channels[None, :], x_mask, MASKED)
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision=PRECISION)
        if HAS_D:
            y += skip * x.to(tl.float32)
        store_tile(y_ptr + start * y_row, within[:, None] * y_row + channels[None, :], y, x_mask, MASKED)
        added = (x.to(tl.float32) * to_end[:, None]).to(x.dtype)
        S = tl.dot(tl.trans(B), added, S * kept, input_precision=PRECISION)
    if segment == segments - 1:
        tl.store(final_ptr + (batch * heads + head) * headdim * state + in_state, S, mask=state_mask)


@triton.jit
def _edge_weights(
    begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, vectors, start, length,
    REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """By how much each step of a chunk counts in the state after it (REVERSE: in the gradient of the state before it), and how much of the state
    at the chunk's other edge is kept."""
    within = tl.arange(0, CHUNK)
    at, end_at = vectors + start + within, vectors + start + CHUNK - 1
    end = tl.load(sums_ptr + end_at)
    kept = tl.exp2(end)
    if REVERSE:
        weight = tl.exp2(tl.load(sums_ptr + at))
    else:
        to_end = end - tl.load(sources_ptr + at)
        if EXACT:
            to_end += tl.load(low_sums_ptr + end_at) - tl.load(low_sources_ptr + at)
        weight = tl.exp2(to_end)
    if HAS_DOCUMENTS:
        first_end, last_begin = edges_of(begins_ptr, ends_ptr, start, CHUNK, length)
        kept = tl.where(last_begin < 0, kept, 0.0)
        weight = tl.where(within < first_end if REVERSE else within >= last_begin, weight, 0.0)
    return weight, kept


@triton.jit
def ssd_states(
    u_ptr, V_ptr, begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr,
    edge_ptr, before_ptr, states_ptr, products_ptr, end_ptr, decay_ptr,
    u_batch, u_row, u_head, BC_batch, BC_row, BC_group,
    length, padded, heads, per_group, headdim, state, chunks, segments, segment_chunks,
    REVERSE: tl.constexpr, WRITE: tl.constexpr, STORE_END: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_EDGE: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before every chunk from u = x, V = B; REVERSE: their gradients after every chunk from u = dy, V = C.

    WRITE stores them, and on the way back what decays over whole chunks do to the loss (the gradient of c_end that goes through them);
    STORE_END stores where a segment's state ends up, and without WRITE also by how much the segment lets a state decay. WIDTH is the channels of
    a head, for where MASKED is false.
    """
    head, segment, batch = _place(heads, segments)
    within = tl.arange(0, CHUNK)
    channels, states = tl.program_id(1) * P + tl.arange(0, P), tl.program_id(2) * N + tl.arange(0, N)
    has_channel, has_state = channels < headdim, states < state
    u_ptr += batch * u_batch + head.to(tl.int64) * u_head
    V_ptr += batch * BC_batch + (head // per_group).to(tl.int64) * BC_group
    vectors = (batch * heads + head) * padded
    if HAS_DOCUMENTS:
        begins_ptr += batch * length
        ends_ptr += batch * length
    state_mask = has_state[:, None] & has_channel[None, :]
    of_segment = ((batch * segments + segment) * heads + head) * headdim * state
    S = tl.zeros((N, P), dtype=tl.float32)
    if HAS_EDGE:
        S = tl.load(edge_ptr + of_segment + channels[None, :] * state + states[:, None], mask=state_mask, other=0.0)
    first = segment.to(tl.int64) * segment_chunks
    count = tl.minimum(segment_chunks, chunks - segment * segment_chunks)
    decay = 1.0
    for i in range(count):
        chunk = first + i
        if REVERSE:
            chunk = first + count - 1 - i
        start = chunk * CHUNK
        inside = within < length - start
        if WRITE:
            of_chunk = ((batch * chunks + chunk) * heads + head) * headdim * state
            in_state = states[:, None] * (headdim if MASKED else WIDTH) + channels[None, :]
            if REVERSE:
                before = load_tile(before_ptr + of_chunk, in_state, state_mask, MASKED)
            store_tile(states_ptr + of_chunk, in_state, S, state_mask, MASKED)
        weight, kept = _edge_weights(
            begins_ptr, ends_ptr, sums_ptr, sources_ptr, low_sums_ptr, low_sources_ptr, vectors, start, length,
            REVERSE, HAS_DOCUMENTS, EXACT, CHUNK,
        )  # fmt: skip
        u_mask, V_mask = inside[:, None] & has_channel[None, :], inside[:, None] & has_state[None, :]
        u = load_tile(u_ptr + start * u_row, within[:, None] * u_row + channels[None, :], u_mask, MASKED)
        V = load_tile(V_ptr + start * BC_row, within[:, None] * BC_row + states[None, :], V_mask, MASKED)
        if not WRITE:
            decay *= kept
        elif REVERSE:
            block = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
            batches = tl.num_programs(0) // heads // segments
            of_product = ((block * batches + batch) * heads + head) * chunks + chunk
            tl.store(products_ptr + of_product, tl.sum(S * before.to(tl.float32)) * kept)
        added = (u.to(tl.float32) * weight[:, None]).to(u.dtype)
        S = tl.dot(tl.trans(V), added, S * kept, input_precision=PRECISION)
    if STORE_END:
        tl.store(end_ptr + of_segment + channels[None, :] * state + states[:, None], S, mask=state_mask)
        if not WRITE:
            tl.store(decay_ptr + (batch * segments + segment) * heads + head, decay)
