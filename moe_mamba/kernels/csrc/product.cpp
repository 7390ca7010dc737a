// Products of two bf16 matrices with sums in fp32, for processors that multiply fp32 faster than bf16.
//
// Both matrices are widened as they are packed, which every fast product does anyway: panels of a few rows, or columns,
// in the order in which they are read. A tile of sums stays in registers. Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication" (2008), has the idea; the order of the loops is for fewer packed bytes than
// the second cache has. A sum's order does not depend on threads.

#include <utility>

#include "tile.h"

// Inputs and output; the same fields stand in widened.py. Strides in elements.
struct Product {
    int64_t rows, inner, columns, threads;
    int64_t a_row, a_inner, b_inner, b_column, y_row;
    const Bfloat16 *a, *b;  // (rows, inner), (inner, columns)
    Bfloat16* y;            // (rows, columns), columns side by side
};

namespace {

using V = Vector<float>;

constexpr int LANES = WIDTH<float>;
constexpr int ROWS = VECTOR_BYTES == 64 ? 12 : 6;  // of a tile: ROWS x VECTORS sums fill the registers
constexpr int VECTORS = 2;
constexpr int COLUMNS = VECTORS * LANES;
constexpr int64_t INNER = 256;          // of a pass: a panel of b stays in the first cache
constexpr int64_t BLOCK = ROWS * 16;    // rows of a that are packed at once
constexpr int64_t CHUNK = BLOCK * 4;    // rows that packed columns of b are read for
constexpr int64_t SPAN = COLUMNS * 16;  // columns of b that are packed at once
constexpr int64_t STRIP = 16;           // elements of lines that are packed for all panels before the next ones
constexpr int64_t SHARE = 1 << 20;      // multiplications that a thread is worth starting for

int64_t panels(int64_t length, int64_t width) { return (length + width - 1) / width; }

using Bits = Simd<float>::Bits;

// Lanes of two vectors, chosen by constants.
#ifdef __clang__
#define CHOSEN(first, second, ...) __builtin_shufflevector(first, second, __VA_ARGS__)
#else
#define CHOSEN(first, second, ...) __builtin_shuffle(first, second, Bits{__VA_ARGS__})
#endif

// Of each run of 2 HALF lanes, the second half of `first` and the first half of `second` change places.
template <int HALF, int... L>
inline void swap_halves(Bits& first, Bits& second, std::integer_sequence<int, L...>) {
    const Bits low = CHOSEN(first, second, (L & HALF ? LANES + L - HALF : L)...);
    second = CHOSEN(first, second, (L & HALF ? LANES + L : L + HALF)...);
    first = low;
}

// Turns a square of lanes, a vector for each line: by halves, then by quarters, down to single lanes.
template <int HALF = LANES / 2>
inline void transpose(Bits* square) {
    UNROLL for (int l = 0; l < LANES; ++l)
        if (!(l & HALF)) swap_halves<HALF>(square[l], square[l + HALF], std::make_integer_sequence<int, LANES>());
    if constexpr (HALF > 1) transpose<HALF / 2>(square);
}

// Packs a panel of lines that lie apart, each with its elements side by side: squares of pairs of elements are turned.
template <int WIDTH>
void pack_lines(const Bfloat16* lines, int64_t line, int64_t inner, float* to) {
    int64_t k = 0;
    for (; k + 2 * LANES <= inner; k += 2 * LANES)
        UNROLL for (int first = 0; first < WIDTH; first += LANES) {
            Bits square[LANES];
            UNROLL for (int l = 0; l < LANES; ++l)
                std::memcpy(square + l, lines + (first + l < WIDTH ? first + l : 0) * line + k, sizeof(Bits));
            transpose(square);
            // A whole vector may reach into the next element, which comes next; not where lines are there already.
            const int64_t bytes = first == 0 || first + LANES <= WIDTH ? sizeof(Bits) : (WIDTH - first) * sizeof(float);
            UNROLL for (int l = 0; l < LANES; ++l) {
                const Bits even = square[l] << 16, odd = square[l] & ~0xffff;
                std::memcpy(to + (k + 2 * l) * WIDTH + first, &even, bytes);
                std::memcpy(to + (k + 2 * l + 1) * WIDTH + first, &odd, bytes);
            }
        }
    for (; k < inner; ++k)
        for (int l = 0; l < WIDTH; ++l) to[k * WIDTH + l] = lines[l * line + k];
}

// Packs `count` lines of a matrix, and `inner` elements of each, into panels of WIDTH lines: for each element of the
// sum, WIDTH lines side by side; lines that are not there are zeros. May write a vector too far.
template <int WIDTH>
void pack(const Bfloat16* from, int64_t line, int64_t along, int64_t count, int64_t inner, float* to) {
    const int64_t whole = along == 1 || line == 1 ? count / WIDTH * WIDTH : 0;
    if (line == 1) {
        for (int64_t begin = 0; begin < inner; begin += STRIP)
            for (int64_t first = 0; first < whole; first += WIDTH)
                for (int64_t k = begin; k < std::min(begin + STRIP, inner); ++k)
#pragma omp simd
                    for (int l = 0; l < WIDTH; ++l) to[first * inner + k * WIDTH + l] = from[first + l + k * along];
    } else {
        for (int64_t first = 0; first < whole; first += WIDTH)
            pack_lines<WIDTH>(from + first * line, line, inner, to + first * inner);
    }
    for (int64_t first = whole; first < count; first += WIDTH)
        for (int64_t k = 0; k < inner; ++k)
            for (int l = 0; l < WIDTH; ++l)
                to[first * inner + k * WIDTH + l] =
                    first + l < count ? float(from[(first + l) * line + k * along]) : 0.0f;
}

// Adds the product of HIGH rows of a panel of a, and a panel of b, to a tile of sums (HIGH, VECTORS), or begins it.
template <int HIGH>
void multiply(const float* a, const V* b, int64_t inner, bool begins, V* tile, int64_t stride) {
    V sums[HIGH][VECTORS] = {};
    for (int64_t k = 0; k < inner; ++k, a += ROWS, b += VECTORS)
        UNROLL for (int r = 0; r < HIGH; ++r)
            UNROLL for (int v = 0; v < VECTORS; ++v) sums[r][v] += b[v] * a[r];
    UNROLL for (int r = 0; r < HIGH; ++r)
        UNROLL for (int v = 0; v < VECTORS; ++v)
            tile[r * stride + v] = begins ? sums[r][v] : tile[r * stride + v] + sums[r][v];
}

// What multiplies the rows that are left: a third of a panel, two thirds, or all of it.
auto multiplier(int64_t left) {
    constexpr int THIRD = ROWS / 3;
    return left > 2 * THIRD ? multiply<ROWS> : left > THIRD ? multiply<2 * THIRD> : multiply<THIRD>;
}

// Rows from..to of columns first..last of the product.
void part(const Product& p, int64_t from, int64_t to, int64_t first, int64_t last) {
    const int64_t span = panels(std::min(SPAN, last - first), COLUMNS) * VECTORS;  // vectors of a row of sums
    const int64_t pass = std::min(INNER, p.inner);
    const Buffer<V> packed_b(span * pass, false);
    const Buffer<V> sums((std::min(CHUNK, to - from) + ROWS) * span, p.inner == 0);  // else the first pass begins them
    const Buffer<float> packed_a(BLOCK * pass + LANES, false);
    for (int64_t column = first; column < last; column += SPAN) {
        const int64_t columns = std::min(SPAN, last - column), wide = panels(columns, COLUMNS);
        for (int64_t top = from; top < to; top += CHUNK) {
            const int64_t bottom = std::min(top + CHUNK, to);
            for (int64_t k = 0; k < p.inner; k += INNER) {
                const int64_t inner = std::min(INNER, p.inner - k);
                pack<COLUMNS>(p.b + k * p.b_inner + column * p.b_column, p.b_column, p.b_inner, columns, inner,
                              (float*)(V*)packed_b);
                for (int64_t row = top; row < bottom; row += BLOCK) {
                    const int64_t rows = std::min(BLOCK, bottom - row);
                    pack<ROWS>(p.a + row * p.a_row + k * p.a_inner, p.a_row, p.a_inner, rows, inner, packed_a);
                    for (int64_t w = 0; w < wide; ++w)
                        for (int64_t r = 0; r < rows; r += ROWS)
                            multiplier(rows - r)(packed_a + r * inner, packed_b + w * inner * VECTORS, inner, k == 0,
                                                 sums + (row - top + r) * span + w * VECTORS, span);
                }
            }
            for (int64_t row = top; row < bottom; ++row)
                for (int64_t c = 0; c < columns; c += LANES)
                    copy_out<float>(sums + (row - top) * span + c / LANES, p.y + row * p.y_row + column + c, 0, 1,
                                    std::min<int64_t>(LANES, columns - c));
        }
    }
}

}  // namespace

// Threads share the longer side of the product, in whole tiles; each packs what it needs.
extern "C" void product(const Product* product) {
    const bool by_rows = product->rows >= product->columns;
    const int64_t length = by_rows ? product->rows : product->columns, tile = by_rows ? ROWS : COLUMNS;
    const int64_t worth = product->rows * product->inner * product->columns / SHARE;
    const int64_t team = std::max<int64_t>(1, std::min({product->threads, worth, panels(length, tile)}));
    const int64_t share = panels(panels(length, team), tile) * tile;
    if (team == 1) return part(*product, 0, product->rows, 0, product->columns);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t first = 0; first < length; first += share) {
        const int64_t last = std::min(first + share, length);
        by_rows ? part(*product, first, last, 0, product->columns) : part(*product, 0, product->rows, first, last);
    }
}
