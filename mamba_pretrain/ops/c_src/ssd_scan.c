// Mamba-2's scan: ops/ssd_scan.py says what is computed, ops/c_ssd.py who owns the memory.
//
// The chunked algorithm of arXiv:2405.21060, section 6, with chunks of as many steps as a vector has lanes: inside a chunk and between a chunk
// and the state before it everything is a small matrix product whose operands lie in the nearest caches. Decays between two steps are products of
// the steps' own, so nothing overflows and a document's start makes them exactly zero. A task is one row of the batch and up to HEADS heads of
// one group; tasks share nothing, so results do not depend on how many threads run them. For the backward pass the forward pass keeps the state
// before every KEEP steps (a span); from it the states before the span's chunks are computed again.
//
// Names as in the paper: state S (n, p), y = C S + D x, S += B (dt x). T marks a transposed matrix, whose vectors run over a chunk's steps.

#include "lanes.h"

enum { CHUNK = LANES, KEEP = 64, SPAN = KEEP / CHUNK, HEADS = 4, BLOCK = 4, WIDTH = BLOCK * LANES, ROWS = 8 };

struct ssd {
    struct rows x, dt, z, B, C;     // x, z and the next four (b, l, h * p); dt (b, l, h); B, C (b, l, g * n)
    struct rows dy, y, dx, dz;
    const float *A, *D, *bias;      // (h)
    const uint8_t* starts;          // (b, l)
    const float *initial, *dfinal;  // (b, h, p, n)
    float* final;
    float* checkpoints;         // (b, spans, h, blocks, padded n, WIDTH): states before every KEEP steps
    float* ddt;                 // (b, l, h)
    float *dA, *dD, *dbias;     // sums of each row: (b, h)
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

INLINE int64_t blocks_of(const struct ssd* s) { return (s->headdim + WIDTH - 1) / WIDTH; }

// States, padded with zeros to whole rows of a product.
INLINE int64_t padded_states(const struct ssd* s) { return (s->states + ROWS - 1) / ROWS * ROWS; }

INLINE struct task task_of(const struct ssd* s, int64_t number) {
    int64_t per_group = s->heads / s->groups, parts = (per_group + HEADS - 1) / HEADS;
    int64_t part = number % parts, group = number / parts % s->groups, first = group * per_group + part * HEADS;
    return (struct task){number / parts / s->groups, group, first, smaller(first + HEADS, (group + 1) * per_group)};
}

INLINE struct place place_of(const struct ssd* s, struct task task, int64_t head, int64_t block) {
    return (struct place){task.batch, head, block, s->headdim - block * WIDTH};
}

INLINE int64_t channel(const struct ssd* s, struct place p) { return p.head * s->headdim + p.block * WIDTH; }

// Where a place's state lies among those of a task: (HEADS, blocks, padded n, BLOCK).
INLINE vec* state_of(const struct ssd* s, struct task task, struct place p, vec* states) {
    return states + ((p.head - task.first) * blocks_of(s) + p.block) * padded_states(s) * BLOCK;
}

INLINE vec* checkpoint(const struct ssd* s, struct place p, int64_t span) {
    int64_t spans = (s->length + KEEP - 1) / KEEP;
    int64_t before = ((p.batch * spans + span) * s->heads + p.head) * blocks_of(s) + p.block;
    return (vec*)s->checkpoints + before * padded_states(s) * BLOCK;
}

// A state in memory, (p, n) for each head, to (n, BLOCK) vectors and back. Zero where there is none.
INLINE void read_state(const struct ssd* s, struct place p, const float* states, vec* S) {
    int64_t N = s->states, from = ((p.batch * s->heads + p.head) * s->headdim + p.block * WIDTH) * N;
    memset(S, 0, padded_states(s) * BLOCK * sizeof(vec));
    for (int64_t n = 0; states && n < N; ++n)
        for (int64_t v = 0; v * LANES < p.lanes && v < BLOCK; ++v) S[n * BLOCK + v] = gather(states + from + v * LANES * N + n, N, p.lanes - v * LANES);
}

INLINE void write_state(const struct ssd* s, struct place p, float* states, const vec* S) {
    int64_t N = s->states, to = ((p.batch * s->heads + p.head) * s->headdim + p.block * WIDTH) * N;
    for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v * LANES < p.lanes && v < BLOCK; ++v) scatter(states + to + v * LANES * N + n, N, S[n * BLOCK + v], p.lanes - v * LANES);
}

// out[r][v] += sum over k of a[r][k] b[k][v], for R rows and V vectors, both constants at every call: the sums live in registers.
INLINE void multiply(vec* out, int64_t out_row, const float* a, int64_t a_row, int64_t a_step, const vec* b, int64_t b_step, int64_t K, const int R,
                     const int V) {
    vec total[ROWS * BLOCK];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) total[r * V + v] = splat(0.0f);
    for (int64_t k = 0; k < K; ++k) {
        vec row[BLOCK];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            row[v] = b[k * b_step + v];
            KEEP_IN_REGISTER(row[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) total[r * V + v] += a[r * a_row + k * a_step] * row[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) out[r * out_row + v] += total[r * V + v];
}

// The same for any number of rows, a multiple of 4.
INLINE void product(vec* out, int64_t out_row, const float* a, int64_t a_row, int64_t a_step, const vec* b, int64_t b_step, int64_t K, int64_t rows,
                    const int V) {
    for (int64_t r = 0; r < rows; r += 4) multiply(out + r * out_row, out_row, a + r * a_row, a_row, a_step, b, b_step, K, 4, V);
}

// The same with single vectors, for a multiple of ROWS rows.
INLINE void product_of_vectors(vec* out, const float* a, int64_t a_row, int64_t a_step, const vec* b, int64_t K, int64_t rows) {
    for (int64_t r = 0; r < rows; r += ROWS) multiply(out + r, 1, a + r * a_row, a_row, a_step, b, 1, K, ROWS, 1);
}

// -- what the heads of a group share in one chunk ---------------------------------------------------------------------------------------------

struct shared {
    float *B, *C;        // (CHUNK, padded n); zero past the end of the sequence
    vec *BT, *CT;        // (padded n)
    vec scores[CHUNK];   // [i][j]: C_i . B_j
    vec *dBT, *dCT;      // sums over heads
    vec dscores[CHUNK];
};

INLINE int64_t shared_size(const struct ssd* s) { return 6 * padded_states(s); }

INLINE void place_shared(const struct ssd* s, struct shared* to, vec* memory) {
    int64_t M = padded_states(s);
    to->B = (float*)memory, to->C = (float*)(memory + M);
    to->BT = memory + 2 * M, to->CT = memory + 3 * M, to->dBT = memory + 4 * M, to->dCT = memory + 5 * M;
}

INLINE void read_shared(const struct ssd* s, struct task task, int64_t first, struct shared* to) {
    int64_t M = padded_states(s), steps = smaller(CHUNK, s->length - first);
    memset(to->B, 0, shared_size(s) * sizeof(vec));
    memset(to->scores, 0, sizeof to->scores), memset(to->dscores, 0, sizeof to->dscores);
    for (int64_t i = 0; i < steps; ++i) {
        const float *B = at(&s->B, task.batch, first + i) + task.group * s->states, *C = at(&s->C, task.batch, first + i) + task.group * s->states;
        memcpy(to->B + i * M, B, s->states * sizeof(float));
        memcpy(to->C + i * M, C, s->states * sizeof(float));
        for (int64_t n = 0; n < s->states; ++n) {
            ((float*)to->BT)[n * CHUNK + i] = B[n];
            ((float*)to->CT)[n * CHUNK + i] = C[n];
        }
    }
    product_of_vectors(to->scores, to->C, M, 1, to->BT, M, CHUNK);
}

// -- what a head's step sizes do in one chunk -------------------------------------------------------------------------------------------------

struct decays {
    float dt[CHUNK], slope[CHUNK];  // after bias, softplus and limits; and how the raw value moves it
    float from_before[CHUNK];       // decay of the state before the chunk up to step i
    vec between[CHUNK];             // [i][j]: from step j to step i; the last row is to the chunk's end
    vec mixing[CHUNK];              // between * scores
    float total;
};

INLINE void read_decays(const struct ssd* s, struct place p, int64_t first, const struct shared* shared, struct decays* to) {
    float before = 1.0f;
    vec row = splat(0.0f);
    for (int64_t i = 0; i < CHUNK; ++i) {
        int64_t t = first + i;
        float decay = 1.0f;  // past the end of the sequence a step of size 0 changes nothing
        to->dt[i] = to->slope[i] = 0.0f;
        if (t < s->length) {
            float raw = at(&s->dt, p.batch, t)[p.head] + (s->bias ? s->bias[p.head] : 0.0f);
            float soft = raw > 0.0f ? raw + log1pf(expf(-raw)) : log1pf(expf(raw));
            int inside = soft >= s->dt_min && soft <= s->dt_max, start = s->starts && s->starts[p.batch * s->length + t];
            to->dt[i] = soft < s->dt_min ? s->dt_min : soft > s->dt_max ? s->dt_max : soft;
            to->slope[i] = inside ? 1.0f / (1.0f + expf(-raw)) : 0.0f;
            decay = start ? 0.0f : expf(to->dt[i] * s->A[p.head]);
        }
        row *= decay;
        row[i] = 1.0f;
        to->from_before[i] = before *= decay;
        to->between[i] = row;
        to->mixing[i] = row * shared->scores[i];
    }
    to->total = before;
}

// -- one chunk of one block of channels -------------------------------------------------------------------------------------------------------

typedef vec tile[CHUNK][BLOCK];  // (steps, channels)

// Rows of a (batch, length, channels) tensor; zero past the end of the sequence.
INLINE void read_tile(const struct ssd* s, const struct rows* from, struct place p, int64_t first, tile to) {
    int64_t steps = smaller(CHUNK, s->length - first);
    memset(to, 0, sizeof(tile));
    for (int64_t i = 0; i < steps; ++i)
        for (int64_t v = 0; v * LANES < p.lanes && v < BLOCK; ++v)
            to[i][v] = load(at(from, p.batch, first + i) + channel(s, p) + v * LANES, p.lanes - v * LANES);
}

INLINE void write_tile(const struct ssd* s, const struct rows* to, struct place p, int64_t first, tile from) {
    int64_t steps = smaller(CHUNK, s->length - first);
    for (int64_t i = 0; i < steps; ++i)
        for (int64_t v = 0; v * LANES < p.lanes && v < BLOCK; ++v)
            store(at(to, p.batch, first + i) + channel(s, p) + v * LANES, from[i][v], p.lanes - v * LANES);
}

INLINE void scale_rows(tile to, tile from, const float* factors) {
    for (int64_t i = 0; i < CHUNK; ++i)
        for (int64_t v = 0; v < BLOCK; ++v) to[i][v] = from[i][v] * factors[i];
}

INLINE void transpose(vec* to, tile from) {
    for (int64_t c = 0; c < WIDTH; ++c)
        for (int64_t i = 0; i < CHUNK; ++i) to[c][i] = ((const float*)from[i])[c];
}

INLINE const float* to_end(const struct decays* k) { return (const float*)&k->between[CHUNK - 1]; }

// S = total S + sum over steps of B_j weighted_j
INLINE void update_state(const struct ssd* s, vec* S, const float* B, tile weighted, float total, const int V) {
    int64_t M = padded_states(s);
    for (int64_t i = 0; i < M * BLOCK; ++i) S[i] *= total;
    product(S, BLOCK, B, 1, M, &weighted[0][0], BLOCK, CHUNK, M, V);
}

// C . state of every step, given the state before the chunk.
INLINE void outputs(const struct ssd* s, const struct shared* shared, const struct decays* k, const vec* S, tile added, tile y, const int V) {
    int64_t M = padded_states(s);
    memset(y, 0, sizeof(tile));
    product(&y[0][0], BLOCK, shared->C, M, 1, S, BLOCK, M, CHUNK, V);
    scale_rows(y, y, k->from_before);
    product(&y[0][0], BLOCK, (const float*)k->mixing, CHUNK, 1, &added[0][0], BLOCK, CHUNK, CHUNK, V);
}

INLINE void forward_chunk(const struct ssd* s, struct place p, int64_t first, const struct shared* shared, const struct decays* k, vec* S,
                          const int V) {
    tile x, added, weighted, y, z;
    read_tile(s, &s->x, p, first, x);
    scale_rows(added, x, k->dt);
    scale_rows(weighted, added, to_end(k));
    outputs(s, shared, k, S, added, y, V);
    update_state(s, S, shared->B, weighted, k->total, V);
    if (s->z.data) read_tile(s, &s->z, p, first, z);
    for (int64_t i = 0; i < CHUNK; ++i)
        for (int64_t v = 0; v < V; ++v) {
            if (s->D) y[i][v] += s->D[p.head] * x[i][v];
            if (s->z.data) y[i][v] *= z[i][v] * vsigmoid(z[i][v]);
        }
    write_tile(s, &s->y, p, first, y);
}

// Gradients of one head's chunk, summed over its blocks.
struct sums {
    vec *dBT, *dCT;  // through the states around the chunk: (padded n)
    vec dmixing[CHUNK];
    float ddt[CHUNK], kept, dD;  // through dt x; through the decay of the whole chunk; of D
};

// From the state S before the chunk and the adjoint G of the one after it; leaves in G that of S.
INLINE void backward_chunk(const struct ssd* s, struct place p, int64_t first, const struct shared* shared, const struct decays* k, const vec* S,
                           vec* G, struct sums* sums, const int V) {
    int64_t M = padded_states(s), steps = smaller(CHUNK, s->length - first);
    float D = s->D ? s->D[p.head] : 0.0f;
    tile x, added, dy, decayed, dadded = {0};
    vec addedT[WIDTH], decayedT[WIDTH];
    read_tile(s, &s->x, p, first, x);
    read_tile(s, &s->dy, p, first, dy);
    scale_rows(added, x, k->dt);
    if (s->z.data) {
        tile y, z;
        read_tile(s, &s->z, p, first, z);
        outputs(s, shared, k, S, added, y, V);
        for (int64_t i = 0; i < CHUNK; ++i)
            for (int64_t v = 0; v < V; ++v) {
                vec gate = vsigmoid(z[i][v]), dout = dy[i][v];
                dy[i][v] = dout * z[i][v] * gate;
                z[i][v] = dout * (y[i][v] + D * x[i][v]) * gate * (1.0f + z[i][v] * (1.0f - gate));
            }
        write_tile(s, &s->dz, p, first, z);
    }
    scale_rows(decayed, dy, k->from_before);
    transpose(addedT, added);
    product_of_vectors(sums->dmixing, (const float*)dy, WIDTH, 1, addedT, V * LANES, CHUNK);
    for (int64_t c = 0; c < V * LANES; ++c) addedT[c] *= k->between[CHUNK - 1];
    transpose(decayedT, decayed);
    product_of_vectors(sums->dBT, (const float*)G, WIDTH, 1, addedT, V * LANES, M);
    product_of_vectors(sums->dCT, (const float*)S, WIDTH, 1, decayedT, V * LANES, M);
    product(&dadded[0][0], BLOCK, shared->B, M, 1, G, BLOCK, M, CHUNK, V);
    scale_rows(dadded, dadded, to_end(k));
    product(&dadded[0][0], BLOCK, (const float*)k->mixing, 1, CHUNK, &dy[0][0], BLOCK, CHUNK, CHUNK, V);
    vec kept = splat(0.0f), dD = kept;
    for (int64_t i = 0; i < M * BLOCK; ++i) kept += G[i] * S[i];
    sums->kept += sum(kept) * k->total;
    update_state(s, G, shared->C, decayed, k->total, V);
    for (int64_t i = 0; i < steps; ++i) {
        vec through = splat(0.0f);
        for (int64_t v = 0; v < V; ++v) {
            through += dadded[i][v] * x[i][v];
            dD += dy[i][v] * x[i][v];
            dadded[i][v] = dadded[i][v] * k->dt[i] + D * dy[i][v];
        }
        sums->ddt[i] += sum(through);
    }
    sums->dD += sum(dD);
    write_tile(s, &s->dx, p, first, dadded);
}

// Vectors that hold anything, as a constant that the products are compiled for.
#define FOR_VECTORS(lanes, call)    \
    do {                            \
        if ((lanes) > 2 * LANES) {  \
            enum { V = BLOCK };     \
            call;                   \
        } else if ((lanes) > LANES) { \
            enum { V = 2 };         \
            call;                   \
        } else {                    \
            enum { V = 1 };         \
            call;                   \
        }                           \
    } while (0)

// -- tasks ------------------------------------------------------------------------------------------------------------------------------------

INLINE void forward_task(const struct ssd* s, struct task task, vec* states, struct shared* shared) {
    for (int64_t head = task.first; head < task.last; ++head)
        for (int64_t block = 0; block < blocks_of(s); ++block) {
            struct place p = place_of(s, task, head, block);
            read_state(s, p, s->initial, state_of(s, task, p, states));
        }
    for (int64_t first = 0; first < s->length; first += CHUNK) {
        read_shared(s, task, first, shared);
        for (int64_t head = task.first; head < task.last; ++head) {
            struct decays k;
            read_decays(s, place_of(s, task, head, 0), first, shared, &k);
            for (int64_t block = 0; block < blocks_of(s); ++block) {
                struct place p = place_of(s, task, head, block);
                vec* S = state_of(s, task, p, states);
                if (s->checkpoints && first % KEEP == 0) memcpy(checkpoint(s, p, first / KEEP), S, padded_states(s) * BLOCK * sizeof(vec));
                FOR_VECTORS(p.lanes, forward_chunk(s, p, first, shared, &k, S, V));
            }
        }
    }
    for (int64_t head = task.first; head < task.last; ++head)
        for (int64_t block = 0; block < blocks_of(s); ++block) {
            struct place p = place_of(s, task, head, block);
            write_state(s, p, s->final, state_of(s, task, p, states));
        }
}

// Runs tasks first, ..., last - 1 of batch x groups x parts.
void ssd_scan_forward(const struct ssd* s, int64_t first, int64_t last) {
    int64_t size = HEADS * blocks_of(s) * padded_states(s) * BLOCK;
    vec* states = vectors(size + shared_size(s));
    struct shared shared;
    place_shared(s, &shared, states + size);
    for (int64_t number = first; number < last; ++number) forward_task(s, task_of(s, number), states, &shared);
    free(states);
}

// What a task remembers while it goes backward in time.
struct memory {
    vec* adjoints;  // of the states: (HEADS, blocks, padded n, BLOCK)
    vec* entries;   // one head's states before the chunks of a span: (SPAN, blocks, padded n, BLOCK)
    struct shared shared[SPAN];
    struct sums sums;
    float dA[HEADS], dD[HEADS], dbias[HEADS];
};

// The states before all chunks of a span, of one block of channels.
INLINE void read_entries(const struct ssd* s, struct place p, int64_t first, int64_t chunks, const struct decays* k, struct memory* m, const int V) {
    int64_t size = padded_states(s) * BLOCK, stride = blocks_of(s) * size;
    vec* S = m->entries + p.block * size;
    memcpy(S, checkpoint(s, p, first / KEEP), size * sizeof(vec));
    for (int64_t chunk = 0; chunk + 1 < chunks; ++chunk, S += stride) {
        tile weighted;
        read_tile(s, &s->x, p, first + chunk * CHUNK, weighted);
        scale_rows(weighted, weighted, k[chunk].dt);
        scale_rows(weighted, weighted, to_end(&k[chunk]));
        memcpy(S + stride, S, size * sizeof(vec));
        update_state(s, S + stride, m->shared[chunk].B, weighted, k[chunk].total, V);
    }
}

// What the blocks of a head's chunk have in common: gradients of its step sizes, and what it adds to those of B and C.
INLINE void finish_chunk(const struct ssd* s, struct task task, int64_t head, int64_t first, struct shared* shared, const struct decays* k,
                         struct memory* m) {
    int64_t M = padded_states(s), steps = smaller(CHUNK, s->length - first), slot = head - task.first;
    struct sums* sums = &m->sums;
    vec written = splat(0.0f), read = written, later = written;  // [j]: through the state after the chunk; [i]: through the one before; pairs
    for (int64_t n = 0; n < M; ++n) {
        written += shared->BT[n] * sums->dBT[n];
        read += shared->CT[n] * sums->dCT[n];
        shared->dBT[n] += sums->dBT[n];
        shared->dCT[n] += sums->dCT[n];
    }
    float ddecay[CHUNK], before = 0.0f, after = 0.0f;  // of step i: all that flows across it
    for (int64_t i = CHUNK - 1; i >= 0; --i) {
        later += sums->dmixing[i] * k->mixing[i];
        after += read[i];
        ddecay[i] = after + sums->kept;
        for (int64_t j = 0; j < i; ++j) ddecay[i] += later[j];
        shared->dscores[i] += sums->dmixing[i] * k->between[i];
    }
    for (int64_t i = 0; i < steps; ++i) {
        ddecay[i] += before;
        before += written[i];
        float ddt = (sums->ddt[i] + ddecay[i] * s->A[head]) * k->slope[i];
        m->dA[slot] += ddecay[i] * k->dt[i];
        m->dbias[slot] += ddt;
        s->ddt[(task.batch * s->length + first + i) * s->heads + head] = ddt;
    }
    m->dD[slot] += sums->dD;
}

INLINE void clear_sums(const struct ssd* s, struct sums* sums) {
    memset(sums->dBT, 0, 2 * padded_states(s) * sizeof(vec));  // dCT lies behind it
    memset(sums->dmixing, 0, sizeof sums->dmixing), memset(sums->ddt, 0, sizeof sums->ddt);
    sums->kept = sums->dD = 0.0f;
}

INLINE void backward_head(const struct ssd* s, struct task task, int64_t head, int64_t first, int64_t chunks, struct memory* m) {
    int64_t size = padded_states(s) * BLOCK;
    struct decays k[SPAN];
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        read_decays(s, place_of(s, task, head, 0), first + chunk * CHUNK, &m->shared[chunk], &k[chunk]);
    for (int64_t block = 0; block < blocks_of(s); ++block) {
        struct place p = place_of(s, task, head, block);
        FOR_VECTORS(p.lanes, read_entries(s, p, first, chunks, k, m, V));
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        clear_sums(s, &m->sums);
        for (int64_t block = 0; block < blocks_of(s); ++block) {
            struct place p = place_of(s, task, head, block);
            const vec* S = m->entries + (chunk * blocks_of(s) + block) * size;
            vec* G = state_of(s, task, p, m->adjoints);
            FOR_VECTORS(p.lanes, backward_chunk(s, p, first + chunk * CHUNK, &m->shared[chunk], &k[chunk], S, G, &m->sums, V));
        }
        finish_chunk(s, task, head, first + chunk * CHUNK, &m->shared[chunk], &k[chunk], m);
    }
}

// Adds what came through the scores, and writes this task's part of dB and dC.
INLINE void write_shared(const struct ssd* s, int64_t number, int64_t first, struct shared* shared) {
    int64_t M = padded_states(s), steps = smaller(CHUNK, s->length - first);
    vec dscoresT[CHUNK];
    for (int64_t i = 0; i < CHUNK; ++i)
        for (int64_t j = 0; j < CHUNK; ++j) dscoresT[j][i] = shared->dscores[i][j];
    product_of_vectors(shared->dBT, shared->C, 1, M, shared->dscores, CHUNK, M);
    product_of_vectors(shared->dCT, shared->B, 1, M, dscoresT, CHUNK, M);
    for (int64_t i = 0; i < steps; ++i)
        for (int64_t n = 0; n < s->states; ++n) {
            int64_t to = (number * s->length + first + i) * s->states + n;
            s->dB[to] = shared->dBT[n][i];
            s->dC[to] = shared->dCT[n][i];
        }
}

INLINE void backward_task(const struct ssd* s, int64_t number, struct memory* m) {
    struct task task = task_of(s, number);
    memset(m->dA, 0, sizeof m->dA), memset(m->dD, 0, sizeof m->dD), memset(m->dbias, 0, sizeof m->dbias);
    for (int64_t head = task.first; head < task.last; ++head)
        for (int64_t block = 0; block < blocks_of(s); ++block) {
            struct place p = place_of(s, task, head, block);
            read_state(s, p, s->dfinal, state_of(s, task, p, m->adjoints));
        }
    for (int64_t first = (s->length - 1) / KEEP * KEEP; first >= 0; first -= KEEP) {
        int64_t chunks = (smaller(KEEP, s->length - first) + CHUNK - 1) / CHUNK;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) read_shared(s, task, first + chunk * CHUNK, &m->shared[chunk]);
        for (int64_t head = task.first; head < task.last; ++head) backward_head(s, task, head, first, chunks, m);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) write_shared(s, number, first + chunk * CHUNK, &m->shared[chunk]);
    }
    for (int64_t head = task.first; head < task.last; ++head) {
        int64_t slot = head - task.first, row = task.batch * s->heads + head;
        s->dA[row] = m->dA[slot], s->dD[row] = m->dD[slot], s->dbias[row] = m->dbias[slot];
        for (int64_t block = 0; block < blocks_of(s); ++block) {
            struct place p = place_of(s, task, head, block);
            write_state(s, p, s->dinitial, state_of(s, task, p, m->adjoints));
        }
    }
}

// Runs tasks first, ..., last - 1 of batch x groups x parts.
void ssd_scan_backward(const struct ssd* s, int64_t first, int64_t last) {
    int64_t state = padded_states(s) * BLOCK * blocks_of(s);
    vec* all = vectors((HEADS + SPAN) * state + SPAN * shared_size(s) + 2 * padded_states(s));
    struct memory m = {.adjoints = all, .entries = all + HEADS * state};
    vec* next = m.entries + SPAN * state;
    for (int64_t chunk = 0; chunk < SPAN; ++chunk, next += shared_size(s)) place_shared(s, &m.shared[chunk], next);
    m.sums.dBT = next, m.sums.dCT = next + padded_states(s);
    for (int64_t number = first; number < last; ++number) backward_task(s, number, &m);
    free(all);
}
