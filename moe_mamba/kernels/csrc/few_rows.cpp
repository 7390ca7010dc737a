// Products of a few bf16 rows with bf16 matrices, for generation: each matrix is read once, as it lies.
//
// Libraries lay a matrix out anew for every product, which takes longer than reading it where there are few rows. Here
// a vector of the matrix is widened to fp32 once for a block of rows, and all sums are in fp32. A task owns some of the
// outputs with the whole of their sums, so that results do not depend on the number of threads.

#include "tile.h"

// Inputs and outputs; the same fields stand in few_rows.py. Strides are from a row to the next, in elements.
struct FewRows {
    int64_t rows, inner, out, is_transposed, threads, x_stride, weight_stride;
    const Bfloat16 *x, *weight;  // (rows, inner); (inner, out), or transposed (out, inner)
    Bfloat16* y;                 // (rows, out), without gaps
};

namespace {

using V = Vector<float>;

constexpr int LANES = WIDTH<float>;
constexpr int LINES = 8;                          // of the matrix that are read side by side
constexpr int ROWS = VECTOR_BYTES == 64 ? 4 : 2;  // of x that a widened vector serves: LINES x ROWS sums in registers
constexpr int64_t AHEAD = 512;                    // elements of a line that are asked for before they are read
constexpr int64_t SHARE = 1 << 18;                // elements of a matrix that a thread is worth starting for

typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Wholes __attribute__((vector_size(VECTOR_BYTES)));

// A vector of bf16 numbers as fp32, whose upper halves they are.
inline V widened(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (V)(__builtin_convertvector(halves, Wholes) << 16);
}

// The same of fewer numbers; the other lanes are 0.
inline V widened(const Bfloat16* from, int count) {
    Halves halves = {};
    std::memcpy(&halves, from, count * sizeof(Bfloat16));
    return (V)(__builtin_convertvector(halves, Wholes) << 16);
}

// The rows of x in fp32, each from an aligned address and with zeros up to a whole vector.
struct Rows {
    const int64_t count, stride;
    Buffer<V> values;

    explicit Rows(const FewRows& product)
        : count(product.rows), stride((product.inner + LANES - 1) / LANES), values(count * stride) {
        for (int64_t row = 0; row < count; ++row) {
            float* to = (float*)(values + row * stride);
            for (int64_t k = 0; k < product.inner; ++k) to[k] = product.x[row * product.x_stride + k];
        }
    }
    const V* row(int64_t index) const { return values + index * stride; }
};

// Calls use(tile, what reads its numbers) for every vector of a line, the last of which may be short.
template <class Use>
void walk(int64_t length, Use use) {
    const int64_t whole = length / LANES;
    for (int64_t tile = 0; tile < whole; ++tile) use(tile, [](const Bfloat16* at) { return widened(at); });
    if (const int left = length % LANES) use(whole, [=](const Bfloat16* at) { return widened(at, left); });
}

// One output of COUNT rows for each of LINES lines of a transposed matrix, `apart` from one another: sums along them.
template <int COUNT, int LINES>
void dot(const FewRows& product, const Rows& rows, int64_t row, int64_t first, int64_t apart) {
    V sums[LINES][COUNT] = {};
    const Bfloat16* lines[LINES];
    UNROLL for (int l = 0; l < LINES; ++l) lines[l] = product.weight + (first + l * apart) * product.weight_stride;
    const auto add = [&](int64_t tile, auto weights_of) {
        UNROLL for (int l = 0; l < LINES; ++l) {
            const V weights = weights_of(lines[l] + tile * LANES);
            __builtin_prefetch(lines[l] + tile * LANES + AHEAD);
            UNROLL for (int r = 0; r < COUNT; ++r) sums[l][r] += weights * rows.row(row + r)[tile];
        }
    };
    walk(product.inner, add);
    UNROLL for (int l = 0; l < LINES; ++l)
        UNROLL for (int r = 0; r < COUNT; ++r)
            product.y[(row + r) * product.out + first + l * apart] = Bfloat16::rounded(sum_of_lanes<float>(sums[l][r]));
}

// Adds LINES lines of a matrix, `apart` from one another, each times its element of a row, to the sums of COUNT rows.
template <int COUNT, int LINES>
void add_lines(const FewRows& product, const Rows& rows, int64_t row, int64_t line, int64_t apart, int64_t first,
               int64_t outputs, V* sums) {
    const int64_t tiles = (outputs + LANES - 1) / LANES;
    const Bfloat16* lines[LINES];
    float factors[LINES][COUNT];
    UNROLL for (int l = 0; l < LINES; ++l) {
        lines[l] = product.weight + (line + l * apart) * product.weight_stride + first;
        UNROLL for (int r = 0; r < COUNT; ++r) factors[l][r] = ((const float*)rows.row(row + r))[line + l * apart];
    }
    walk(outputs, [&](int64_t tile, auto weights_of) {
        V total[COUNT];
        UNROLL for (int r = 0; r < COUNT; ++r) total[r] = sums[r * tiles + tile];
        UNROLL for (int l = 0; l < LINES; ++l) {
            const V weights = weights_of(lines[l] + tile * LANES);
            __builtin_prefetch(lines[l] + tile * LANES + AHEAD);
            UNROLL for (int r = 0; r < COUNT; ++r) total[r] += weights * factors[l][r];
        }
        UNROLL for (int r = 0; r < COUNT; ++r) sums[r * tiles + tile] = total[r];
    });
}

// Calls use(first, apart, constant) for sets of so many lines that together are all of them, each once. Lines of a set
// lie far apart: a processor fetches ahead within a page, so that several pages at once give it more to fetch.
template <class Use>
void for_lines(int64_t first, int64_t last, Use use) {
    const int64_t apart = (last - first) / LINES;
    for (int64_t line = first; line < first + apart; ++line) use(line, apart, std::integral_constant<int, LINES>());
    for (int64_t line = first + LINES * apart; line < last; ++line) use(line, 0, std::integral_constant<int, 1>());
}

// Calls use(first row, constant) for blocks of rows.
template <class Use>
void for_rows(int64_t count, Use use) {
    int64_t row = 0;
    for (; row + ROWS <= count; row += ROWS) use(row, std::integral_constant<int, ROWS>());
    for (; row < count; ++row) use(row, std::integral_constant<int, 1>());
}

// Outputs first..last: lines of a transposed matrix, which stay in the cache for the further blocks of rows.
void transposed_task(const FewRows& product, const Rows& rows, int64_t first, int64_t last) {
    for_lines(first, last, [&](int64_t line, int64_t apart, auto lines) {
        for_rows(rows.count, [&](int64_t row, auto count) {
            dot<count(), lines()>(product, rows, row, line, apart);
        });
    });
}

// Outputs first..last: columns of a matrix.
void plain_task(const FewRows& product, const Rows& rows, int64_t first, int64_t last) {
    const int64_t tiles = (last - first + LANES - 1) / LANES;
    Buffer<V> sums(rows.count * tiles);
    for_lines(0, product.inner, [&](int64_t line, int64_t apart, auto lines) {
        for_rows(rows.count, [&](int64_t row, auto count) {
            add_lines<count(), lines()>(product, rows, row, line, apart, first, last - first, sums + row * tiles);
        });
    });
    for (int64_t row = 0; row < rows.count; ++row)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int width = std::min<int64_t>(LANES, last - first - tile * LANES);
            copy_out<float>(sums + row * tiles + tile, product.y + row * product.out + first + tile * LANES, 0, 1,
                            width);
        }
}

}  // namespace

extern "C" void few_rows(const FewRows* product) {
    const Rows rows(*product);
    const auto task = product->is_transposed ? transposed_task : plain_task;
    const int64_t worth = product->inner * product->out / SHARE;
    const int64_t team = std::max<int64_t>(1, std::min({product->threads, worth, (product->out + LANES - 1) / LANES}));
    const int64_t span = ((product->out + team - 1) / team + LANES - 1) / LANES * LANES;
    if (team == 1) return task(*product, rows, 0, product->out);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t first = 0; first < product->out; first += span)
        task(*product, rows, first, std::min(first + span, product->out));
}
