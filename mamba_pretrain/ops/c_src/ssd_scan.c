// Mamba-2's scan: ops/ssd_scan.py says what is computed, ops/c_ssd.py who owns the memory.
//
// The recurrence itself, step by step, with one head's (state x BLOCK x LANES) numbers in the nearest cache: on a CPU it needs no more
// arithmetic than the chunked form by matmuls, and a fraction of the memory traffic. A task is one row of the batch and up to HEADS heads of one
// group; tasks share nothing, so results do not depend on how many threads run them. For the backward pass the forward pass keeps the state
// before every KEEP steps; from it the states before every CHUNK steps are computed again, and from those a chunk's.

#include "lanes.h"

enum { KEEP = 64, CHUNK = 16, HEADS = 4, BLOCK = 4 };

struct ssd {
    struct rows x, dt, z, B, C, dy;  // x, z, dy (b, l, h * p); dt (b, l, h); B, C (b, l, g * n)
    const float *A, *D, *bias;       // (h)
    const uint8_t* starts;           // (b, l)
    const float *initial, *dfinal;   // (b, h, p, n)
    float *y, *final;
    float* checkpoints;        // (b, kept, h, blocks, n, BLOCK, LANES): states before every KEEP steps
    float *dx, *ddt, *dz;      // (b, l, h * p), (b, l, h)
    float *dA, *dD, *dbias;    // sums of each row: (b, h)
    float *dB, *dC, *dinitial;  // sums of each task: (b, g, parts, l, n); (b, h, p, n)
    int64_t length, heads, headdim, groups, states;
    float dt_min, dt_max;
};

// Where a task works: heads first, ..., last - 1 of a row, all of one group.
struct task {
    int64_t batch, group, first, last;
};

struct place {
    int64_t batch, head, block, lanes;  // of up to BLOCK vectors of one head; lanes may be more than they hold
};

INLINE int64_t blocks_of(const struct ssd* s) { return (s->headdim + BLOCK * LANES - 1) / (BLOCK * LANES); }

INLINE struct task task_of(const struct ssd* s, int64_t number) {
    int64_t per_group = s->heads / s->groups, parts = (per_group + HEADS - 1) / HEADS;
    int64_t part = number % parts, group = number / parts % s->groups, first = group * per_group + part * HEADS;
    return (struct task){number / parts / s->groups, group, first, smaller(first + HEADS, (group + 1) * per_group)};
}

INLINE struct place place_of(const struct ssd* s, struct task task, int64_t head, int64_t block) {
    return (struct place){task.batch, head, block, s->headdim - block * BLOCK * LANES};
}

// Vectors of a block that hold anything.
INLINE int64_t vectors_in(struct place p) { return smaller(BLOCK, (p.lanes + LANES - 1) / LANES); }

INLINE int64_t channel(const struct ssd* s, struct place p) { return p.head * s->headdim + p.block * BLOCK * LANES; }

INLINE vec* checkpoint(const struct ssd* s, struct place p, int64_t number) {
    int64_t kept = (s->length + KEEP - 1) / KEEP;
    int64_t before = ((p.batch * kept + number) * s->heads + p.head) * blocks_of(s) + p.block;
    return (vec*)s->checkpoints + before * s->states * BLOCK;
}

// A state in memory, (p, n) for each head, to (n, BLOCK) vectors and back. Zero where there is none.
INLINE void read_state(const struct ssd* s, struct place p, const float* states, vec* h) {
    int64_t N = s->states, from = ((p.batch * s->heads + p.head) * s->headdim + p.block * BLOCK * LANES) * N;
    for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v < BLOCK; ++v)
            h[n * BLOCK + v] = states && p.lanes > v * LANES ? gather(states + from + v * LANES * N + n, N, p.lanes - v * LANES) : splat(0.0f);
}

INLINE void write_state(const struct ssd* s, struct place p, float* states, const vec* h) {
    int64_t N = s->states, to = ((p.batch * s->heads + p.head) * s->headdim + p.block * BLOCK * LANES) * N;
    for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v < vectors_in(p); ++v) scatter(states + to + v * LANES * N + n, N, h[n * BLOCK + v], p.lanes - v * LANES);
}

// What a step's size does: dt after bias, softplus and limits; the decay; and how the raw value moves dt.
struct steps {
    float dt[KEEP], decay[KEEP], slope[KEEP];
    int start[KEEP];
};

INLINE void read_steps(const struct ssd* s, int64_t batch, int64_t head, int64_t first, struct steps* k) {
    int64_t count = smaller(KEEP, s->length - first);
    for (int64_t i = 0; i < count; ++i) {
        float raw = at(&s->dt, batch, first + i)[head] + (s->bias ? s->bias[head] : 0.0f);
        float soft = raw > 0.0f ? raw + log1pf(expf(-raw)) : log1pf(expf(raw));
        int inside = soft >= s->dt_min && soft <= s->dt_max;
        k->dt[i] = soft < s->dt_min ? s->dt_min : soft > s->dt_max ? s->dt_max : soft;
        k->slope[i] = inside ? 1.0f / (1.0f + expf(-raw)) : 0.0f;
        k->start[i] = s->starts && s->starts[batch * s->length + first + i];
        k->decay[i] = k->start[i] ? 0.0f : expf(k->dt[i] * s->A[head]);
    }
}

INLINE const float* shared(const struct rows* rows, struct task task, int64_t t, int64_t N) { return at(rows, task.batch, t) + task.group * N; }

// after = decay before + x B, and y = C . after, for V vectors. Where a document begins, what was before does not count, whatever it was.
INLINE void advance(vec* after, const vec* before, float decay, int start, const vec* x, const float* B, const float* C, vec* y, int64_t N,
                    const int64_t V) {
    static const vec nothing[BLOCK];
    for (int64_t v = 0; v < V; ++v) y[v] = splat(0.0f);
    for (int64_t n = 0; n < N; ++n) {
        const vec* from = start ? nothing : before + n * BLOCK;
        for (int64_t v = 0; v < V; ++v) {
            vec h = from[v] * decay + x[v] * B[n];
            after[n * BLOCK + v] = h;
            y[v] += h * C[n];
        }
    }
}

INLINE void forward_block(const struct ssd* s, struct task task, struct place p, vec* h, const int64_t V) {
    int64_t N = s->states, width = s->heads * s->headdim;
    struct steps k;
    read_state(s, p, s->initial, h);
    for (int64_t t = 0; t < s->length; ++t) {
        int64_t i = t % KEEP;
        if (i == 0) {
            read_steps(s, p.batch, p.head, t, &k);
            if (s->checkpoints) memcpy(checkpoint(s, p, t / KEEP), h, N * BLOCK * sizeof(vec));
        }
        vec x[BLOCK], added[BLOCK], y[BLOCK];
        for (int64_t v = 0; v < V; ++v) {
            x[v] = load(at(&s->x, p.batch, t) + channel(s, p) + v * LANES, p.lanes - v * LANES);
            added[v] = x[v] * k.dt[i];
        }
        advance(h, h, k.decay[i], k.start[i], added, shared(&s->B, task, t, N), shared(&s->C, task, t, N), y, N, V);
        for (int64_t v = 0; v < V; ++v) {
            int64_t here = channel(s, p) + v * LANES;
            vec out = s->D ? y[v] + s->D[p.head] * x[v] : y[v];
            if (s->z.data) {
                vec z = load(at(&s->z, p.batch, t) + here, p.lanes - v * LANES);
                out *= z * vsigmoid(z);
            }
            store(s->y + (p.batch * s->length + t) * width + here, out, p.lanes - v * LANES);
        }
    }
    write_state(s, p, s->final, h);
}

// Runs tasks first, ..., last - 1 of batch x groups x parts.
void ssd_scan_forward(const struct ssd* s, int64_t first, int64_t last) {
    vec* h = vectors(s->states * BLOCK);
    for (int64_t number = first; number < last; ++number) {
        struct task task = task_of(s, number);
        for (int64_t head = task.first; head < task.last; ++head)
            for (int64_t block = 0; block < blocks_of(s); ++block) {
                struct place p = place_of(s, task, head, block);
                if (vectors_in(p) == BLOCK)  // a constant: a step's vectors live in registers
                    forward_block(s, task, p, h, BLOCK);
                else
                    forward_block(s, task, p, h, vectors_in(p));
            }
    }
    free(h);
}

// What a task remembers while it goes backward in time.
struct memory {
    vec* g;        // adjoint of the state: (HEADS, blocks, n, BLOCK)
    vec* entries;  // states before the chunks of what lies between two kept ones: (KEEP / CHUNK, n, BLOCK)
    vec* h;        // states before the steps of one chunk, and after the last: (CHUNK + 1, n, BLOCK)
    vec *dB, *dC;  // gradients of KEEP steps, lanes not yet summed: (KEEP, n)
    float dA[HEADS], dD[HEADS], dbias[HEADS];
    float ddt[KEEP], ddecay[KEEP];  // of one head: through dt x, and through dt A
};

// Steps first + from, ..., first + to - 1: recomputes the states of this chunk, then walks back.
INLINE void backward_chunk(const struct ssd* s, struct task task, struct place p, int64_t first, int64_t from, int64_t to, const struct steps* k,
                           struct memory* m, const vec* entry, const int64_t V) {
    int64_t N = s->states, width = s->heads * s->headdim, size = N * BLOCK;
    vec x[CHUNK][BLOCK], y[CHUNK][BLOCK], added[BLOCK], *g = m->g + ((p.head - task.first) * blocks_of(s) + p.block) * size;
    memcpy(m->h, entry, size * sizeof(vec));
    for (int64_t i = from; i < to; ++i) {
        for (int64_t v = 0; v < V; ++v) {
            x[i - from][v] = load(at(&s->x, p.batch, first + i) + channel(s, p) + v * LANES, p.lanes - v * LANES);
            added[v] = x[i - from][v] * k->dt[i];
        }
        vec* before = m->h + (i - from) * size;
        const float *B = shared(&s->B, task, first + i, N), *C = shared(&s->C, task, first + i, N);
        advance(before + size, before, k->decay[i], k->start[i], added, B, C, y[i - from], N, V);
    }
    float D = s->D ? s->D[p.head] : 0.0f;
    for (int64_t i = to - 1; i >= from; --i) {
        int64_t t = first + i, here = channel(s, p);
        const float *B = shared(&s->B, task, t, N), *C = shared(&s->C, task, t, N);
        vec dy[BLOCK], dadded[BLOCK], ddecay[BLOCK];
        for (int64_t v = 0; v < V; ++v) {
            vec value = x[i - from][v];
            dy[v] = load(at(&s->dy, p.batch, t) + here + v * LANES, p.lanes - v * LANES);
            if (s->z.data) {
                vec z = load(at(&s->z, p.batch, t) + here + v * LANES, p.lanes - v * LANES), gate = vsigmoid(z);
                vec dz = dy[v] * (y[i - from][v] + D * value) * gate * (1.0f + z * (1.0f - gate));
                store(s->dz + (p.batch * s->length + t) * width + here + v * LANES, dz, p.lanes - v * LANES);
                dy[v] *= z * gate;
            }
            added[v] = value * k->dt[i];
            dadded[v] = ddecay[v] = splat(0.0f);
        }
        const vec *before = m->h + (i - from) * size, *after = before + size;
        for (int64_t n = 0; n < N; ++n) {
            vec dB = splat(0.0f), dC = dB;
            for (int64_t v = 0; v < V; ++v) {
                vec adjoint = g[n * BLOCK + v] + dy[v] * C[n];
                dC += dy[v] * after[n * BLOCK + v];
                dB += adjoint * added[v];
                dadded[v] += adjoint * B[n];
                ddecay[v] += adjoint * before[n * BLOCK + v];
                g[n * BLOCK + v] = adjoint * k->decay[i];
            }
            m->dB[i * N + n] += dB;
            m->dC[i * N + n] += dC;
        }
        for (int64_t v = 0; v < V; ++v) {
            vec value = x[i - from][v];
            m->ddt[i] += sum(dadded[v] * value);
            if (!k->start[i]) m->ddecay[i] += sum(ddecay[v]) * k->decay[i];
            m->dD[p.head - task.first] += sum(dy[v] * value);
            store(s->dx + (p.batch * s->length + t) * width + here + v * LANES, dadded[v] * k->dt[i] + D * dy[v], p.lanes - v * LANES);
        }
    }
}

// What lies between two kept states of one block of channels, from its last chunk to its first.
INLINE void backward_block(const struct ssd* s, struct task task, struct place p, int64_t first, const struct steps* k, struct memory* m,
                           const int64_t V) {
    int64_t N = s->states, size = N * BLOCK, steps = smaller(KEEP, s->length - first), chunks = (steps + CHUNK - 1) / CHUNK;
    memcpy(m->entries, checkpoint(s, p, first / KEEP), size * sizeof(vec));
    for (int64_t i = 0; i < (chunks - 1) * CHUNK; ++i) {
        vec added[BLOCK], y[BLOCK], *to = m->entries + (i / CHUNK + 1) * size, *from = i % CHUNK ? to : to - size;
        for (int64_t v = 0; v < V; ++v)
            added[v] = load(at(&s->x, p.batch, first + i) + channel(s, p) + v * LANES, p.lanes - v * LANES) * k->dt[i];
        const float *B = shared(&s->B, task, first + i, N), *C = shared(&s->C, task, first + i, N);
        advance(to, from, k->decay[i], k->start[i], added, B, C, y, N, V);
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk)
        backward_chunk(s, task, p, first, chunk * CHUNK, smaller((chunk + 1) * CHUNK, steps), k, m, m->entries + chunk * size, V);
}

// The same for one head: all its blocks, then what they have in common.
INLINE void backward_head(const struct ssd* s, struct task task, int64_t head, int64_t first, struct memory* m) {
    int64_t steps = smaller(KEEP, s->length - first), slot = head - task.first;
    struct steps k;
    read_steps(s, task.batch, head, first, &k);
    memset(m->ddt, 0, sizeof m->ddt), memset(m->ddecay, 0, sizeof m->ddecay);
    for (int64_t block = 0; block < blocks_of(s); ++block) {
        struct place p = place_of(s, task, head, block);
        if (vectors_in(p) == BLOCK)
            backward_block(s, task, p, first, &k, m, BLOCK);
        else
            backward_block(s, task, p, first, &k, m, vectors_in(p));
    }
    for (int64_t i = 0; i < steps; ++i) {
        float ddt = (m->ddt[i] + m->ddecay[i] * s->A[head]) * k.slope[i];
        m->dA[slot] += m->ddecay[i] * k.dt[i];
        m->dbias[slot] += ddt;
        s->ddt[(task.batch * s->length + first + i) * s->heads + head] = ddt;
    }
}

INLINE void backward_task(const struct ssd* s, int64_t number, struct memory* m) {
    struct task task = task_of(s, number);
    int64_t N = s->states, blocks = blocks_of(s);
    memset(m->dA, 0, sizeof m->dA), memset(m->dD, 0, sizeof m->dD), memset(m->dbias, 0, sizeof m->dbias);
    for (int64_t head = task.first; head < task.last; ++head)
        for (int64_t block = 0; block < blocks; ++block)
            read_state(s, place_of(s, task, head, block), s->dfinal, m->g + ((head - task.first) * blocks + block) * N * BLOCK);
    for (int64_t first = (s->length - 1) / KEEP * KEEP; first >= 0; first -= KEEP) {
        memset(m->dB, 0, 2 * KEEP * N * sizeof(vec));
        for (int64_t head = task.first; head < task.last; ++head) backward_head(s, task, head, first, m);
        int64_t steps = smaller(KEEP, s->length - first), to = (number * s->length + first) * N;
        for (int64_t i = 0; i < steps * N; ++i) {
            s->dB[to + i] = sum(m->dB[i]);
            s->dC[to + i] = sum(m->dC[i]);
        }
    }
    for (int64_t head = task.first; head < task.last; ++head) {
        int64_t slot = head - task.first, row = task.batch * s->heads + head;
        s->dA[row] = m->dA[slot], s->dD[row] = m->dD[slot], s->dbias[row] = m->dbias[slot];
        for (int64_t block = 0; block < blocks; ++block)
            write_state(s, place_of(s, task, head, block), s->dinitial, m->g + (slot * blocks + block) * N * BLOCK);
    }
}

// Runs tasks first, ..., last - 1 of batch x groups x parts.
void ssd_scan_backward(const struct ssd* s, int64_t first, int64_t last) {
    int64_t size = s->states * BLOCK;
    struct memory m;
    m.g = vectors((HEADS * blocks_of(s) + KEEP / CHUNK + CHUNK + 1) * size + 2 * KEEP * s->states);
    m.entries = m.g + HEADS * blocks_of(s) * size, m.h = m.entries + KEEP / CHUNK * size;
    m.dB = m.h + (CHUNK + 1) * size, m.dC = m.dB + KEEP * s->states;
    for (int64_t number = first; number < last; ++number) backward_task(s, number, &m);
    free(m.g);
}
