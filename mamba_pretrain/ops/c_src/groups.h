// Tasks of kernels that treat channels alike: one row of the batch and GROUP vectors of neighbouring channels.

#pragma once
#include "lanes.h"

enum { GROUP = 8 };

struct place {
    int64_t batch, channel, lanes;  // of one vector; lanes: channels from here to the group's end, more than the vector holds but for its last
};

INLINE int64_t groups_of(int64_t channels) { return (channels + GROUP * LANES - 1) / (GROUP * LANES); }

// A task's vectors: for (p = first_of(channels, task); p.lanes > 0; p = following(p))
INLINE struct place first_of(int64_t channels, int64_t task) {
    int64_t channel = task % groups_of(channels) * GROUP * LANES;
    return (struct place){task / groups_of(channels), channel, smaller(channels - channel, GROUP * LANES)};
}

INLINE struct place following(struct place p) { return (struct place){p.batch, p.channel + LANES, p.lanes - LANES}; }
