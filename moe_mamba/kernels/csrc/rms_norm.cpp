// The root mean square norm of bf16 rows with the residual sum before it, for generation: one pass over each row.
//
// Sums are in fp32, a row's in one order whatever the number of threads; a row is one thread's.

#include <cmath>

#include "tile.h"

// Inputs and outputs; the same fields stand in cpu_rms_norm.py. Strides are from a row to the next, in elements.
struct Norm {
    int64_t rows, d, threads, x_stride, residual_stride;
    double epsilon;
    const Bfloat16 *x, *residual;  // (rows, d); or null
    const float* weight;           // (d)
    Bfloat16 *y, *stream;          // (rows, d), without gaps; the sum, or null without a residual
};

namespace {

using V = Vector<float>;
constexpr int LANES = WIDTH<float>;
constexpr int64_t SHARE = 1 << 15;  // elements that a thread is worth starting for

void normalize(const Norm& norm, int64_t row, V* wide) {
    const int64_t tiles = (norm.d + LANES - 1) / LANES;
    const Bfloat16 *x = norm.x + row * norm.x_stride, *residual = norm.residual + row * norm.residual_stride;
    V squares = {};
    for (int64_t tile = 0, c = 0; tile < tiles; ++tile, c += LANES) {
        const int width = std::min<int64_t>(LANES, norm.d - c);
        V value;
        copy_in<Bfloat16, float>(x + c, 0, 1, width, &value);
        if (norm.residual) {
            V other;
            copy_in<Bfloat16, float>(residual + c, 0, 1, width, &other);
            other += value;
            Bfloat16* stream = norm.stream + row * norm.d + c;
            copy_out<float>(&other, stream, 0, 1, width);
            copy_in<Bfloat16, float>(stream, 0, 1, width, &value);  // as it was rounded
        }
        wide[tile] = value;
        squares += value * value;
    }
    const float scale = 1 / std::sqrt(sum_of_lanes<float>(squares) / norm.d + float(norm.epsilon));
    for (int64_t tile = 0, c = 0; tile < tiles; ++tile, c += LANES) {
        const int width = std::min<int64_t>(LANES, norm.d - c);
        V weight;
        copy_in<float, float>(norm.weight + c, 0, 1, width, &weight);
        const V y = wide[tile] * scale * weight;
        copy_out<float>(&y, norm.y + row * norm.d + c, 0, 1, width);
    }
}

}  // namespace

extern "C" void rms_norm(const Norm* norm) {
    const int64_t team = std::max<int64_t>(1, std::min({norm->threads, norm->rows, norm->rows * norm->d / SHARE}));
    const int64_t tiles = (norm->d + LANES - 1) / LANES;
    if (team == 1) {
        const Buffer<V> wide(tiles);
        for (int64_t row = 0; row < norm->rows; ++row) normalize(*norm, row, wide);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        const Buffer<V> wide(tiles);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < norm->rows; ++row) normalize(*norm, row, wide);
    }
}
