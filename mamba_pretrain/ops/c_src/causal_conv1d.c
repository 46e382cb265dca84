// Depthwise causal convolution: ops/causal_conv1d.py says what is computed, ops/c_conv.py who owns the memory.
//
// A task is one row of the batch and GROUP vectors of channels. It follows time in strips; backward, each vector crosses a strip by itself, with
// its sums in registers. Tasks share nothing.

#include "groups.h"

enum { STRIP = 32, MAX_TAPS = 8 };

struct conv {
    struct rows x, dy;
    const float *weight, *bias;  // (w, d), (d)
    const int32_t* document;     // (b, l): equal numbers mean the same document
    const float* history;        // (b, w - 1, d): inputs before position 0
    float *y, *dx, *dhistory;    // (b, l, d), (b, l, d), (b, w - 1, d)
    float *dweight, *dbias;      // sums of each row: (b, w, d), (b, d)
    int64_t length, channels, taps, silu;
};

// The input at step t, which may lie before position 0.
INLINE vec input(const struct conv* s, struct place p, int64_t t) {
    int64_t reach = s->taps - 1;
    if (t >= 0) return load(at(&s->x, p.batch, t) + p.channel, p.lanes);
    return load(s->history + (p.batch * reach + reach + t) * s->channels + p.channel, p.lanes);
}

// How many steps back from each step of a strip the taps may reach without leaving its document; returns the least.
INLINE int64_t read_reach(const struct conv* s, int64_t batch, int64_t first, int64_t steps, int64_t* reach) {
    int64_t least = s->taps - 1;
    for (int64_t i = 0; i < steps; ++i) {
        reach[i] = s->taps - 1;
        if (!s->document) continue;
        const int32_t* document = s->document + batch * s->length;
        int64_t t = first + i, back = 0;  // what lies before position 0 belongs to the document there, which has number 0
        while (back + 1 < s->taps && (t - back - 1 >= 0 ? document[t - back - 1] : 0) == document[t]) ++back;
        reach[i] = back;
        least = smaller(least, back);
    }
    return least;
}

// What a vector needs everywhere: its weights by how far they reach back, and its bias.
struct weights {
    vec back[MAX_TAPS], bias;
};

INLINE struct weights read_weights(const struct conv* s, struct place p, const int64_t taps) {
    struct weights w = {.bias = s->bias ? load(s->bias + p.channel, p.lanes) : splat(0.0f)};
    for (int64_t k = 0; k < taps; ++k) w.back[k] = load(s->weight + (taps - 1 - k) * s->channels + p.channel, p.lanes);
    return w;
}

// The sum over taps at step t, before the activation; leaves the input k steps back in seen[k].
INLINE vec weighed(const struct conv* s, struct place p, int64_t t, const struct weights* w, int64_t reach, vec* seen) {
    vec y = w->bias;
    for (int64_t k = reach; k >= 0; --k) {
        seen[k] = input(s, p, t - k);
        y += w->back[k] * seen[k];
    }
    return y;
}

// `usual`: all taps of all steps reach their inputs, so that a constant number of taps makes loops without conditions.
INLINE void forward_strip(const struct conv* s, struct place start, int64_t first, int64_t steps, const int64_t* reach, const int64_t taps,
                          const int usual) {
    for (int64_t i = 0; i < steps; ++i)
        for (struct place p = start; p.lanes > 0; p = following(p)) {
            struct weights w = read_weights(s, p, taps);
            vec seen[MAX_TAPS], y = weighed(s, p, first + i, &w, usual ? taps - 1 : reach[i], seen);
            store(s->y + (p.batch * s->length + first + i) * s->channels + p.channel, s->silu ? y * vsigmoid(y) : y, p.lanes);
        }
}

// Runs tasks first, ..., last - 1 of batch x groups.
void causal_conv1d_forward(const struct conv* s, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
        struct place p = first_of(s->channels, task);
        for (int64_t t = 0; t < s->length; t += STRIP) {
            int64_t reach[STRIP], steps = smaller(STRIP, s->length - t), least = read_reach(s, p.batch, t, steps, reach);
            if (s->taps == 4 && least == 3)
                forward_strip(s, p, t, steps, reach, 4, 1);
            else
                forward_strip(s, p, t, steps, reach, s->taps, 0);
        }
    }
}

// What a vector sums up while it goes back in time: dx of step t is complete when steps t, ..., t + taps - 1 have added what they owe it.
struct sums {
    vec owed[MAX_TAPS];  // [k]: to the step k back
    vec weight[MAX_TAPS], bias;
};

INLINE void backward_strip(const struct conv* s, struct place p, int64_t first, int64_t steps, const int64_t* reach, struct sums* all, const int64_t taps,
                           const int usual) {
    for (; p.lanes > 0; p = following(p), ++all) {
        struct weights w = read_weights(s, p, taps);
        struct sums sums = *all;
        for (int64_t i = steps - 1; i >= 0; --i) {
            int64_t t = first + i, far = usual ? taps - 1 : reach[i];
            vec seen[MAX_TAPS], y = weighed(s, p, t, &w, far, seen), dy = load(at(&s->dy, p.batch, t) + p.channel, p.lanes);
            if (s->silu) {
                vec gate = vsigmoid(y);
                dy *= gate * (1.0f + y * (1.0f - gate));
            }
            sums.bias += dy;
            for (int64_t k = 0; k <= far; ++k) {
                sums.weight[k] += dy * seen[k];
                sums.owed[k] += dy * w.back[k];
            }
            store(s->dx + (p.batch * s->length + t) * s->channels + p.channel, sums.owed[0], p.lanes);
            for (int64_t k = 1; k < taps; ++k) sums.owed[k - 1] = sums.owed[k];
            sums.owed[taps - 1] = splat(0.0f);
        }
        *all = sums;
    }
}

// Runs tasks first, ..., last - 1 of batch x groups.
void causal_conv1d_backward(const struct conv* s, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
        struct place p = first_of(s->channels, task);
        struct sums sums[GROUP];
        memset(sums, 0, sizeof sums);
        for (int64_t t = (s->length - 1) / STRIP * STRIP; t >= 0; t -= STRIP) {
            int64_t reach[STRIP], steps = smaller(STRIP, s->length - t), least = read_reach(s, p.batch, t, steps, reach);
            if (s->taps == 4 && least == 3)
                backward_strip(s, p, t, steps, reach, sums, 4, 1);
            else
                backward_strip(s, p, t, steps, reach, sums, s->taps, 0);
        }
        int64_t taps = s->taps;
        for (const struct sums* sum = sums; p.lanes > 0; p = following(p), ++sum) {
            store(s->dbias + p.batch * s->channels + p.channel, sum->bias, p.lanes);
            for (int64_t k = 0; k < taps; ++k)
                store(s->dweight + (p.batch * taps + taps - 1 - k) * s->channels + p.channel, sum->weight[k], p.lanes);
            for (int64_t k = 0; k + 1 < taps; ++k)
                store(s->dhistory + (p.batch * (taps - 1) + taps - 2 - k) * s->channels + p.channel, sum->owed[k], p.lanes);
        }
    }
}
