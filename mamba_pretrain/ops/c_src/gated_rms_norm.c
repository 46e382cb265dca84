// Mamba-2's gated norm: ops/rms_norm.py says what is computed, ops/c_norm.py who owns the memory.
//
// A task is ROWS rows; each group of channels of a row is read twice, the second time from the nearest cache. Tasks share nothing.

#include "lanes.h"

enum { ROWS = 64 };

struct norm {
    struct rows x, z, dy;  // one batch of rows
    const float* weight;   // (d)
    float *y, *dx, *dz;    // (rows, d)
    float* dweight;        // sums of each task: (tasks, d); zero before
    int64_t count, channels, size;  // rows, their channels, channels of a group
    float eps;
};

// One group of one row: channels first, ..., first + size - 1.
struct place {
    const float *x, *z, *dy, *weight;
    int64_t row, first;
};

INLINE struct place place_of(const struct norm* s, int64_t row, int64_t first) {
    const float* dy = s->dy.data ? at(&s->dy, 0, row) + first : NULL;
    return (struct place){at(&s->x, 0, row) + first, at(&s->z, 0, row) + first, dy, s->weight + first, row, first};
}

// One over the root mean square of the gated group, and the mean of dy weight times the normalised group.
INLINE float scale_of(const struct norm* s, struct place p, float* along) {
    vec squares = splat(0.0f), products = squares;
    for (int64_t c = 0; c < s->size; c += LANES) {
        int64_t lanes = s->size - c;
        vec z = load(p.z + c, lanes), gated = load(p.x + c, lanes) * z * vsigmoid(z);
        squares += gated * gated;
        if (p.dy) products += gated * load(p.dy + c, lanes) * load(p.weight + c, lanes);
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)s->size + s->eps);
    *along = sum(products) * scale / (float)s->size;
    return scale;
}

// Runs tasks first, ..., last - 1, of ROWS rows each.
void gated_rms_norm_forward(const struct norm* s, int64_t first, int64_t last) {
    for (int64_t row = first * ROWS; row < smaller(last * ROWS, s->count); ++row)
        for (int64_t group = 0; group < s->channels; group += s->size) {
            struct place p = place_of(s, row, group);
            float along, scale = scale_of(s, p, &along);
            for (int64_t c = 0; c < s->size; c += LANES) {
                int64_t lanes = s->size - c;
                vec z = load(p.z + c, lanes), gated = load(p.x + c, lanes) * z * vsigmoid(z);
                store(s->y + row * s->channels + group + c, gated * scale * load(p.weight + c, lanes), lanes);
            }
        }
}

// Runs tasks first, ..., last - 1, of ROWS rows each.
void gated_rms_norm_backward(const struct norm* s, int64_t first, int64_t last) {
    for (int64_t row = first * ROWS; row < smaller(last * ROWS, s->count); ++row)
        for (int64_t group = 0; group < s->channels; group += s->size) {
            struct place p = place_of(s, row, group);
            float along, scale = scale_of(s, p, &along), *dweight = s->dweight + row / ROWS * s->channels + group;
            for (int64_t c = 0; c < s->size; c += LANES) {
                int64_t lanes = s->size - c, to = row * s->channels + group + c;
                vec x = load(p.x + c, lanes), z = load(p.z + c, lanes), dy = load(p.dy + c, lanes);
                vec gate = vsigmoid(z), normalised = x * z * gate * scale;
                vec dgated = (dy * load(p.weight + c, lanes) - normalised * along) * scale;
                store(s->dx + to, dgated * z * gate, lanes);
                store(s->dz + to, dgated * x * gate * (1.0f + z * (1.0f - gate)), lanes);
                store(dweight + c, load(dweight + c, lanes) + dy * normalised, lanes);
            }
        }
}
