// Root-mean-square norms: ops/rms_norm.py says what is computed, ops/c_norm.py who owns the memory.
//
// What is normalised is x, or x + residual, or x silu(z), in groups of channels. A task is ROWS rows; each group of a row is read twice, the
// second time from the nearest cache. Tasks share nothing.

#include "lanes.h"

enum { ROWS = 64 };
enum kind { PLAIN, RESIDUAL, GATED };

struct norm {
    struct rows x, other, dy, dtotal;  // one batch of rows; other: residual or z; dtotal: gradient of x + residual, if it has one
    const float* weight;               // (d)
    float *y, *total;                  // (rows, d); total: x + residual
    float *dx, *dother;                // (rows, d); the gradient of x + residual is both its terms'
    float* dweight;                    // sums of each task: (tasks, d); zero before
    int64_t count, channels, size;     // rows, their channels, channels of a group
    float eps;
};

// One group of one row.
struct place {
    const float *x, *other, *dy, *weight;
    int64_t offset;  // in contiguous (rows, d)
};

INLINE struct place place_of(const struct norm* s, int64_t row, int64_t first) {
    return (struct place){
        .x = at(&s->x, 0, row) + first,
        .other = s->other.data ? at(&s->other, 0, row) + first : NULL,
        .dy = s->dy.data ? at(&s->dy, 0, row) + first : NULL,
        .weight = s->weight + first,
        .offset = row * s->channels + first,
    };
}

// What is normalised, of one vector.
INLINE vec value_at(struct place p, int64_t c, int64_t lanes, const enum kind kind) {
    vec x = load(p.x + c, lanes);
    if (kind == PLAIN) return x;
    vec other = load(p.other + c, lanes);
    return kind == RESIDUAL ? x + other : x * other * vsigmoid(other);
}

// One over the root mean square of the group; and, going back, the mean of dy weight times the normalised group.
INLINE float scale_of(const struct norm* s, struct place p, float* along, const enum kind kind) {
    vec squares = splat(0.0f), products = squares;
    for (int64_t c = 0; c < s->size; c += LANES) {
        int64_t lanes = s->size - c;
        vec value = value_at(p, c, lanes, kind);
        squares += value * value;
        if (along) products += value * load(p.dy + c, lanes) * load(p.weight + c, lanes);
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)s->size + s->eps);
    if (along) *along = sum(products) * scale / (float)s->size;
    return scale;
}

INLINE void forward_group(const struct norm* s, struct place p, const enum kind kind) {
    float scale = scale_of(s, p, NULL, kind);
    for (int64_t c = 0; c < s->size; c += LANES) {
        int64_t lanes = s->size - c;
        vec value = value_at(p, c, lanes, kind);
        if (kind == RESIDUAL) store(s->total + p.offset + c, value, lanes);
        store(s->y + p.offset + c, value * scale * load(p.weight + c, lanes), lanes);
    }
}

INLINE void backward_group(const struct norm* s, struct place p, int64_t row, int64_t first, float* dweight, const enum kind kind) {
    float along, scale = scale_of(s, p, &along, kind);
    for (int64_t c = 0; c < s->size; c += LANES) {
        int64_t lanes = s->size - c;
        vec normalised = value_at(p, c, lanes, kind) * scale, dy = load(p.dy + c, lanes);
        vec dvalue = (dy * load(p.weight + c, lanes) - normalised * along) * scale;
        if (kind == GATED) {
            vec x = load(p.x + c, lanes), z = load(p.other + c, lanes), gate = vsigmoid(z);
            store(s->dother + p.offset + c, dvalue * x * gate * (1.0f + z * (1.0f - gate)), lanes);
            dvalue *= z * gate;
        } else if (s->dtotal.data) {
            dvalue += load(at(&s->dtotal, 0, row) + first + c, lanes);
        }
        store(s->dx + p.offset + c, dvalue, lanes);
        store(dweight + c, load(dweight + c, lanes) + dy * normalised, lanes);
    }
}

INLINE void forward(const struct norm* s, int64_t first, int64_t last, const enum kind kind) {
    for (int64_t row = first * ROWS; row < smaller(last * ROWS, s->count); ++row)
        for (int64_t group = 0; group < s->channels; group += s->size) forward_group(s, place_of(s, row, group), kind);
}

INLINE void backward(const struct norm* s, int64_t first, int64_t last, const enum kind kind) {
    for (int64_t row = first * ROWS; row < smaller(last * ROWS, s->count); ++row)
        for (int64_t group = 0; group < s->channels; group += s->size)
            backward_group(s, place_of(s, row, group), row, group, s->dweight + row / ROWS * s->channels + group, kind);
}

// All run tasks first, ..., last - 1, of ROWS rows each.
void rms_norm_forward(const struct norm* s, int64_t first, int64_t last) {
    if (s->other.data)
        forward(s, first, last, RESIDUAL);
    else
        forward(s, first, last, PLAIN);
}

void rms_norm_backward(const struct norm* s, int64_t first, int64_t last) {
    if (s->other.data)
        backward(s, first, last, RESIDUAL);
    else
        backward(s, first, last, PLAIN);
}

void gated_rms_norm_forward(const struct norm* s, int64_t first, int64_t last) { forward(s, first, last, GATED); }

void gated_rms_norm_backward(const struct norm* s, int64_t first, int64_t last) { backward(s, first, last, GATED); }
