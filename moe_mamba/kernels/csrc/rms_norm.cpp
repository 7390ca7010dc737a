// The root mean square norm of bf16 rows with the residual sum before it, and its gradients: one pass over memory each.
//
// Sums are in fp32, in one order whatever the number of threads: those of a row are one thread's, and the gradient of
// the weight is summed over blocks of rows, whose sums are added in their order.

#include <cmath>

#include "tile.h"

// Inputs and outputs; the same fields stand in cpu_rms_norm.py. Strides are from a row to the next, in elements.
struct Norm {
    int64_t rows, d, threads, x_stride, residual_stride;
    double epsilon;
    const Bfloat16 *x, *residual;  // (rows, d); or null
    const float* weight;           // (d)
    Bfloat16 *y, *stream;          // (rows, d), without gaps; the sum, or null without a residual
    float* scale;                  // (rows), one over the root mean square; or null
};

struct NormGradient {
    int64_t rows, d, threads, stream_stride, y_stride, incoming_stride;
    const Bfloat16 *stream, *y_gradient, *stream_gradient;  // (rows, d); the last or null
    const float *weight, *scale;                            // (d), (rows)
    Bfloat16* x_gradient;                                   // (rows, d), without gaps
    float* weight_gradient;                                 // (d)
};

namespace {

using V = Vector<float>;
constexpr int LANES = WIDTH<float>;
constexpr int64_t SHARE = 1 << 15;  // elements that a thread is worth starting for
constexpr int64_t BLOCK = 64;       // rows whose gradients of the weight are one sum

int64_t tiles_of(int64_t d) { return (d + LANES - 1) / LANES; }

template <class From>
V read(const From* row, int64_t d, int64_t tile) {
    V value;
    copy_in<From, float>(row + tile * LANES, 0, 1, std::min<int64_t>(LANES, d - tile * LANES), &value);
    return value;
}

template <class To>
void write(const V& value, To* row, int64_t d, int64_t tile) {
    copy_out<float>(&value, row + tile * LANES, 0, 1, std::min<int64_t>(LANES, d - tile * LANES));
}

// To the nearest number of bf16, ties to even; NaN stays.
V rounded_to_bf16(V x) {
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    const Bits bits = (Bits)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return x == x ? (V)nearest : x;
}

void normalize(const Norm& norm, int64_t row, V* wide) {
    const int64_t d = norm.d, tiles = tiles_of(d);
    const Bfloat16 *x = norm.x + row * norm.x_stride, *residual = norm.residual + row * norm.residual_stride;
    Bfloat16* stream = norm.stream + row * d;
    V squares = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
        V value = read(x, d, tile);
        if (norm.residual) {
            value = rounded_to_bf16(value + read(residual, d, tile));
            write(value, stream, d, tile);
        }
        wide[tile] = value;
        squares += value * value;
    }
    const float scale = 1 / std::sqrt(sum_of_lanes<float>(squares) / d + float(norm.epsilon));
    if (norm.scale) norm.scale[row] = scale;
    for (int64_t tile = 0; tile < tiles; ++tile)
        write(wide[tile] * scale * read(norm.weight, d, tile), norm.y + row * d, d, tile);
}

// Adds to weight_gradient; normal and weighted are room for a row.
void differentiate(const NormGradient& norm, int64_t row, V* normal, V* weighted, V* weight_gradient) {
    const int64_t d = norm.d, tiles = tiles_of(d);
    const Bfloat16 *stream = norm.stream + row * norm.stream_stride, *incoming = norm.y_gradient + row * norm.y_stride;
    const Bfloat16* further = norm.stream_gradient + row * norm.incoming_stride;
    const float scale = norm.scale[row];
    V products = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const V gradient = read(incoming, d, tile);
        normal[tile] = read(stream, d, tile) * scale;
        weighted[tile] = gradient * read(norm.weight, d, tile);
        weight_gradient[tile] += gradient * normal[tile];
        products += weighted[tile] * normal[tile];
    }
    const float shared = sum_of_lanes<float>(products) / d;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        V change = (weighted[tile] - normal[tile] * shared) * scale;
        if (norm.stream_gradient) change += read(further, d, tile);
        write(change, norm.x_gradient + row * d, d, tile);
    }
}

// Calls use(item) for each of count, by as many threads as the elements are worth; make() is what a thread needs.
template <class Make, class Use>
void share(int64_t count, int64_t elements, int64_t threads, Make make, Use use) {
    const int64_t team = std::max<int64_t>(1, std::min({threads, count, elements / SHARE}));
    if (team == 1) {  // without the start of a team, which takes longer than a token's norm
        const auto room = make();
        for (int64_t item = 0; item < count; ++item) use(item, room);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        const auto room = make();
#pragma omp for schedule(static)
        for (int64_t item = 0; item < count; ++item) use(item, room);
    }
}

}  // namespace

extern "C" void rms_norm(const Norm* norm) {
    const int64_t tiles = tiles_of(norm->d);
    share(norm->rows, norm->rows * norm->d, norm->threads, [=] { return Buffer<V>(tiles, false); },
          [=](int64_t row, V* wide) { normalize(*norm, row, wide); });
}

extern "C" void rms_norm_backward(const NormGradient* norm) {
    const int64_t d = norm->d, tiles = tiles_of(d), blocks = (norm->rows + BLOCK - 1) / BLOCK;
    const Buffer<V> sums(blocks * tiles);
    V* const all = sums;
    share(blocks, norm->rows * d, norm->threads, [=] { return Buffer<V>(2 * tiles, false); },
          [=](int64_t block, V* room) {
              const int64_t end = std::min(norm->rows, (block + 1) * BLOCK);
              for (int64_t row = block * BLOCK; row < end; ++row)
                  differentiate(*norm, row, room, room + tiles, all + block * tiles);
          });
    for (int64_t tile = 0; tile < tiles; ++tile) {
        V total = {};
        for (int64_t block = 0; block < blocks; ++block) total += all[block * tiles + tile];
        write(total, norm->weight_gradient, d, tile);
    }
}
