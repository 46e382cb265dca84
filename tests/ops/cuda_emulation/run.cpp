// Compiled once per kernel and specialisation, with SOURCE the kernel's file, KERNEL its name, PARAMS its argument's type and SHARED_BYTES what it asks
// for.
#include SOURCE

extern "C" __attribute__((visibility("default"))) void run(const void* params, int x, int y, int z, int threads) {
    gridDim = {x, y, z};
    blockDim = {threads, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(threads, SHARED_BYTES, [&] { KERNEL(*static_cast<const PARAMS*>(params)); });
}
