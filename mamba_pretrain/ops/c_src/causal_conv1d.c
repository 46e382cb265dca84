// Depthwise causal convolution: ops/causal_conv1d.py says what is computed, ops/c_conv.py who owns the memory.
//
// A task is one row of the batch and GROUP vectors of channels. It follows time; the inputs (and, backward, the gradients) that taps still
// reach are at hand in a short window. Tasks share nothing.

#include "lanes.h"

enum { GROUP = 8, MAX_TAPS = 8 };

struct conv {
    struct rows x, dy;
    const float *weight, *bias;  // (w, d), (d)
    const int32_t* document;     // (b, l): equal numbers mean the same document
    const float* history;        // (b, w - 1, d): inputs before position 0
    float *y, *dx, *dhistory;    // (b, l, d), (b, l, d), (b, w - 1, d)
    float *dweight, *dbias;      // sums of each row: (b, w, d), (b, d)
    int64_t length, channels, taps, silu;
};

struct place {
    int64_t batch, channel, lanes;  // of one vector
};

// The vectors of a task: from the returned one, LANES channels apart, while there are lanes; GROUP at most.
INLINE struct place first_of(const struct conv* s, int64_t task) {
    int64_t groups = (s->channels + GROUP * LANES - 1) / (GROUP * LANES), channel = task % groups * GROUP * LANES;
    return (struct place){task / groups, channel, smaller(s->channels - channel, GROUP * LANES)};
}

INLINE struct place following(struct place p) { return (struct place){p.batch, p.channel + LANES, p.lanes - LANES}; }

// The input at step t, which may lie before position 0.
INLINE vec input(const struct conv* s, struct place p, int64_t t) {
    int64_t reach = s->taps - 1;
    if (t >= 0) return load(at(&s->x, p.batch, t) + p.channel, p.lanes);
    return load(s->history + (p.batch * reach + reach + t) * s->channels + p.channel, p.lanes);
}

// How many steps back from t the taps may reach without leaving its document.
INLINE int64_t reach_at(const struct conv* s, int64_t batch, int64_t t) {
    if (!s->document) return s->taps - 1;
    const int32_t* document = s->document + batch * s->length;
    int64_t back = 0;  // what lies before position 0 belongs to the document there, which has number 0
    while (back + 1 < s->taps && (t - back - 1 >= 0 ? document[t - back - 1] : 0) == document[t]) ++back;
    return back;
}

INLINE vec weight(const struct conv* s, struct place p, int64_t taps, int64_t back) {
    return load(s->weight + (taps - 1 - back) * s->channels + p.channel, p.lanes);
}

// The sum over taps at step t, before the activation; leaves the input k steps back in seen[k].
INLINE vec weighed(const struct conv* s, struct place p, int64_t t, int64_t taps, int64_t reach, vec* seen) {
    vec y = s->bias ? load(s->bias + p.channel, p.lanes) : splat(0.0f);
    for (int64_t k = reach; k >= 0; --k) {
        seen[k] = input(s, p, t - k);
        y += weight(s, p, taps, k) * seen[k];
    }
    return y;
}

INLINE void forward_step(const struct conv* s, struct place p, int64_t t, int64_t taps, int64_t reach) {
    for (; p.lanes > 0; p = following(p)) {
        vec seen[MAX_TAPS], y = weighed(s, p, t, taps, reach, seen);
        store(s->y + (p.batch * s->length + t) * s->channels + p.channel, s->silu ? y * vsigmoid(y) : y, p.lanes);
    }
}

// Runs tasks first, ..., last - 1 of batch x groups.
void causal_conv1d_forward(const struct conv* s, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
        struct place p = first_of(s, task);
        for (int64_t t = 0; t < s->length; ++t) {
            int64_t reach = reach_at(s, p.batch, t);
            if (s->taps == 4 && reach == 3)  // the usual case, with constants
                forward_step(s, p, t, 4, 3);
            else
                forward_step(s, p, t, s->taps, reach);
        }
    }
}

// What a task sums up while it goes back in time: dx of step t is complete when steps t, ..., t + taps - 1 have added what they owe it.
struct sums {
    vec owed[GROUP][MAX_TAPS];  // [k]: to the step k back
    vec weight[GROUP][MAX_TAPS], bias[GROUP];
};

INLINE void backward_step(const struct conv* s, struct place p, int64_t t, struct sums* sums, int64_t taps, int64_t reach) {
    for (int64_t vector = 0; p.lanes > 0; p = following(p), ++vector) {
        vec seen[MAX_TAPS], y = weighed(s, p, t, taps, reach, seen), dy = load(at(&s->dy, p.batch, t) + p.channel, p.lanes);
        vec* owed = sums->owed[vector];
        if (s->silu) {
            vec gate = vsigmoid(y);
            dy *= gate * (1.0f + y * (1.0f - gate));
        }
        sums->bias[vector] += dy;
        for (int64_t k = 0; k <= reach; ++k) {
            sums->weight[vector][k] += dy * seen[k];
            owed[k] += dy * weight(s, p, taps, k);
        }
        store(s->dx + (p.batch * s->length + t) * s->channels + p.channel, owed[0], p.lanes);
        for (int64_t k = 1; k < taps; ++k) owed[k - 1] = owed[k];
        owed[taps - 1] = splat(0.0f);
    }
}

// Runs tasks first, ..., last - 1 of batch x groups.
void causal_conv1d_backward(const struct conv* s, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
        struct place p = first_of(s, task);
        struct sums sums;
        memset(&sums, 0, sizeof sums);
        for (int64_t t = s->length - 1; t >= 0; --t) {
            int64_t reach = reach_at(s, p.batch, t);
            if (s->taps == 4 && reach == 3)
                backward_step(s, p, t, &sums, 4, 3);
            else
                backward_step(s, p, t, &sums, s->taps, reach);
        }
        int64_t taps = s->taps;
        for (int64_t vector = 0; p.lanes > 0; p = following(p), ++vector) {
            store(s->dbias + p.batch * s->channels + p.channel, sums.bias[vector], p.lanes);
            for (int64_t k = 0; k < taps; ++k)
                store(s->dweight + (p.batch * taps + taps - 1 - k) * s->channels + p.channel, sums.weight[vector][k], p.lanes);
            for (int64_t k = 0; k + 1 < taps; ++k)
                store(s->dhistory + (p.batch * (taps - 1) + taps - 2 - k) * s->channels + p.channel, sums.owed[vector][k], p.lanes);
        }
    }
}
