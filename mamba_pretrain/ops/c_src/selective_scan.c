// Mamba-1's selective scan: ops/selective_scan.py says what is computed, ops/c_scan.py who owns the memory.
//
// The recurrence runs step by step, LANES channels at a time, with the state in registers or the nearest cache. A task is one row of the batch
// and GROUP vectors of channels; tasks share nothing, so results do not depend on how many threads run them. For the backward pass the forward
// pass keeps the state before every CHUNK steps; a chunk's states are recomputed from it.

#include "groups.h"

enum { CHUNK = 32, MAX_STATES = 256 };

struct scan {
    struct rows u, delta, z, B, C, dy;
    const float *A, *D, *bias;  // A (n, d)
    const uint8_t* starts;      // (b, l)
    const float *initial, *dfinal;  // (b, d, n)
    float *y, *final;
    float* checkpoints;  // (b, chunks, n, d): states before each chunk
    float *du, *ddelta, *dz;  // (b, l, d)
    float *dA, *dD, *dbias, *dinitial;  // sums of each row: (b, n, d), (b, d), (b, d); (b, d, n)
    float *dB, *dC;  // sums of each task: (b, groups, l, n)
    int64_t length, channels, states;
};

INLINE int starts_at(const struct scan* s, int64_t batch, int64_t t) { return s->starts && s->starts[batch * s->length + t]; }

INLINE float* checkpoint(const struct scan* s, struct place p, int64_t chunk, int64_t n) {
    int64_t chunks = (s->length + CHUNK - 1) / CHUNK;
    return s->checkpoints + ((p.batch * chunks + chunk) * s->states + n) * s->channels + p.channel;
}

INLINE vec raw_delta(const struct scan* s, struct place p, int64_t t) {
    vec raw = load(at(&s->delta, p.batch, t) + p.channel, p.lanes);
    return s->bias ? raw + load(s->bias + p.channel, p.lanes) : raw;
}

INLINE void forward_vector(const struct scan* s, struct place p, const int64_t N) {
    vec A[MAX_STATES], h[MAX_STATES];
    for (int64_t n = 0; n < N; ++n) {
        A[n] = load(s->A + n * s->channels + p.channel, p.lanes);
        h[n] = s->initial ? gather(s->initial + (p.batch * s->channels + p.channel) * N + n, N, p.lanes) : splat(0.0f);
    }
    vec D = s->D ? load(s->D + p.channel, p.lanes) : splat(0.0f);
    for (int64_t t = 0; t < s->length; ++t) {
        if (s->checkpoints && t % CHUNK == 0)
            for (int64_t n = 0; n < N; ++n) store(checkpoint(s, p, t / CHUNK, n), h[n], p.lanes);
        if (starts_at(s, p.batch, t))
            for (int64_t n = 0; n < N; ++n) h[n] = splat(0.0f);
        const float *B = at(&s->B, p.batch, t), *C = at(&s->C, p.batch, t);
        vec dt = vsoftplus(raw_delta(s, p, t)), u = load(at(&s->u, p.batch, t) + p.channel, p.lanes);
        vec x = dt * u, y = D * u;
        for (int64_t n = 0; n < N; ++n) {
            h[n] = vexp(dt * A[n]) * h[n] + x * B[n];
            y += h[n] * C[n];
        }
        if (s->z.data) {
            vec z = load(at(&s->z, p.batch, t) + p.channel, p.lanes);
            y *= z * vsigmoid(z);
        }
        store(s->y + (p.batch * s->length + t) * s->channels + p.channel, y, p.lanes);
    }
    for (int64_t n = 0; n < N; ++n) scatter(s->final + (p.batch * s->channels + p.channel) * N + n, N, h[n], p.lanes);
}

// Runs tasks first, ..., last - 1 of batch x groups.
void selective_scan_forward(const struct scan* s, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
        for (struct place p = first_of(s->channels, task); p.lanes > 0; p = following(p)) {
            if (s->states == 16)  // a constant: the state lives in registers
                forward_vector(s, p, 16);
            else
                forward_vector(s, p, s->states);
        }
}

// What a task remembers while it goes backward in time, vectors by vector.
struct memory {
    vec *h, *a;    // one chunk's states and decays: (CHUNK, n); recomputed for each vector of channels
    vec *dB, *dC;  // one chunk's gradients, lanes not yet summed: (CHUNK, n)
    vec *g, *dA;   // adjoint of the state and gradient of A: (GROUP, n)
    vec *dD, *dbias;  // (GROUP)
};

// One chunk of one vector: recomputes its states, then walks back.
INLINE void backward_chunk(const struct scan* s, struct place p, int64_t chunk, struct memory m, int64_t vector, const int64_t N) {
    vec A[MAX_STATES], dt[CHUNK], raw[CHUNK], u[CHUNK], y[CHUNK];
    int64_t first = chunk * CHUNK, steps = smaller(CHUNK, s->length - first);
    for (int64_t n = 0; n < N; ++n) A[n] = load(s->A + n * s->channels + p.channel, p.lanes);
    for (int64_t i = 0; i < steps; ++i) {
        const float *B = at(&s->B, p.batch, first + i), *C = at(&s->C, p.batch, first + i);
        int start = starts_at(s, p.batch, first + i);
        raw[i] = raw_delta(s, p, first + i);
        dt[i] = vsoftplus(raw[i]);
        u[i] = load(at(&s->u, p.batch, first + i) + p.channel, p.lanes);
        vec x = dt[i] * u[i], sum = splat(0.0f);
        for (int64_t n = 0; n < N; ++n) {
            vec a = start ? splat(0.0f) : vexp(dt[i] * A[n]);
            vec before = i ? m.h[(i - 1) * N + n] : load(checkpoint(s, p, chunk, n), p.lanes);
            vec h = a * before + x * B[n];
            m.a[i * N + n] = a;
            m.h[i * N + n] = h;
            sum += h * C[n];
        }
        y[i] = sum;
    }
    vec D = s->D ? load(s->D + p.channel, p.lanes) : splat(0.0f);
    vec *g = m.g + vector * N, *dA = m.dA + vector * N;
    for (int64_t i = steps - 1; i >= 0; --i) {
        int64_t t = first + i, here = (p.batch * s->length + t) * s->channels + p.channel;
        const float *B = at(&s->B, p.batch, t), *C = at(&s->C, p.batch, t);
        vec dy = load(at(&s->dy, p.batch, t) + p.channel, p.lanes);
        if (s->z.data) {
            vec z = load(at(&s->z, p.batch, t) + p.channel, p.lanes), gate = vsigmoid(z);
            store(s->dz + here, dy * (y[i] + D * u[i]) * gate * (1.0f + z * (1.0f - gate)), p.lanes);
            dy *= z * gate;
        }
        vec x = dt[i] * u[i], dx = splat(0.0f), ddt = splat(0.0f);
        for (int64_t n = 0; n < N; ++n) {
            vec a = m.a[i * N + n], adjoint = g[n] + dy * C[n];
            vec before = i ? m.h[(i - 1) * N + n] : load(checkpoint(s, p, chunk, n), p.lanes);
            m.dC[i * N + n] += dy * m.h[i * N + n];
            m.dB[i * N + n] += adjoint * x;
            dx += adjoint * B[n];
            adjoint *= a;  // now of the state before; exactly 0 where a document begins
            vec dlog = adjoint * before;
            ddt += dlog * A[n];
            dA[n] += dlog * dt[i];
            g[n] = adjoint;
        }
        vec ddelta = (ddt + dx * u[i]) * vsigmoid(raw[i]);
        store(s->ddelta + here, ddelta, p.lanes);
        store(s->du + here, dx * dt[i] + D * dy, p.lanes);
        m.dD[vector] += dy * u[i];
        m.dbias[vector] += ddelta;
    }
}

INLINE void begin_task(const struct scan* s, int64_t task, struct memory m) {
    int64_t N = s->states;
    int64_t vector = 0;
    for (struct place p = first_of(s->channels, task); p.lanes > 0; p = following(p), ++vector) {
        m.dD[vector] = m.dbias[vector] = splat(0.0f);
        for (int64_t n = 0; n < N; ++n) {
            const float* from = s->dfinal + (p.batch * s->channels + p.channel) * N + n;
            m.g[vector * N + n] = s->dfinal ? gather(from, N, p.lanes) : splat(0.0f);
            m.dA[vector * N + n] = splat(0.0f);
        }
    }
}

INLINE void end_task(const struct scan* s, int64_t task, struct memory m) {
    int64_t N = s->states;
    int64_t vector = 0;
    for (struct place p = first_of(s->channels, task); p.lanes > 0; p = following(p), ++vector) {
        int64_t row = p.batch * s->channels + p.channel;
        store(s->dD + row, m.dD[vector], p.lanes);
        store(s->dbias + row, m.dbias[vector], p.lanes);
        for (int64_t n = 0; n < N; ++n) {
            store(s->dA + (p.batch * N + n) * s->channels + p.channel, m.dA[vector * N + n], p.lanes);
            scatter(s->dinitial + row * N + n, N, m.g[vector * N + n], p.lanes);
        }
    }
}

// Runs tasks first, ..., last - 1 of batch x groups.
void selective_scan_backward(const struct scan* s, int64_t first, int64_t last) {
    int64_t N = s->states, chunks = (s->length + CHUNK - 1) / CHUNK;
    vec* all = vectors(4 * CHUNK * N + 2 * GROUP * N + 2 * GROUP);
    struct memory m = {.h = all};
    m.a = m.h + CHUNK * N, m.dB = m.a + CHUNK * N, m.dC = m.dB + CHUNK * N;
    m.g = m.dC + CHUNK * N, m.dA = m.g + GROUP * N, m.dD = m.dA + GROUP * N, m.dbias = m.dD + GROUP;
    for (int64_t task = first; task < last; ++task) {
        begin_task(s, task, m);
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            memset(m.dB, 0, 2 * CHUNK * N * sizeof(vec));
            int64_t vector = 0;
            for (struct place p = first_of(s->channels, task); p.lanes > 0; p = following(p), ++vector) {
                if (N == 16)
                    backward_chunk(s, p, chunk, m, vector, 16);
                else
                    backward_chunk(s, p, chunk, m, vector, N);
            }
            int64_t steps = smaller(CHUNK, s->length - chunk * CHUNK), to = (task * s->length + chunk * CHUNK) * N;
            for (int64_t i = 0; i < steps * N; ++i) {
                s->dB[to + i] = sum(m.dB[i]);
                s->dC[to + i] = sum(m.dC[i]);
            }
        }
        end_task(s, task, m);
    }
    free(all);
}
