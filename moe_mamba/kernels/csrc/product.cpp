// Products of two bf16 matrices with sums in fp32, for processors that multiply fp32 faster than bf16.
//
// Both matrices are widened as they are packed, which every fast product does anyway: panels of a few rows, or columns,
// in the order in which they are read. A tile of sums stays in registers. Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication" (2008), is the order of the loops. A sum's order does not depend on threads.

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
constexpr int64_t INNER = 256;        // of a pass: a panel of b stays in the first cache
constexpr int64_t BLOCK = ROWS * 16;  // rows of a that stay in the second cache
constexpr int64_t SPAN = COLUMNS * 32;  // columns of b that are packed at once
constexpr int64_t SHARE = 1 << 20;    // multiplications that a thread is worth starting for

int64_t panels(int64_t length, int64_t width) { return (length + width - 1) / width; }

// Packs lines first..first + count of a matrix, and `inner` elements of each, into panels of WIDTH lines: for each
// element of the sum, WIDTH lines side by side; lines that are not there are zeros.
template <int WIDTH>
void pack(const Bfloat16* from, int64_t line, int64_t along, int64_t count, int64_t inner, float* to) {
    for (int64_t first = 0; first < count; first += WIDTH, to += WIDTH * inner) {
        const int width = std::min<int64_t>(WIDTH, count - first);
        const Bfloat16* lines = from + first * line;
        if (width < WIDTH) std::fill_n(to, WIDTH * inner, 0.0f);
        if (line == 1 && width == WIDTH) {
            for (int64_t k = 0; k < inner; ++k)
#pragma omp simd
                for (int l = 0; l < WIDTH; ++l) to[k * WIDTH + l] = lines[k * along + l];
        } else if (width == WIDTH) {
            for (int64_t k = 0; k < inner; ++k)
                UNROLL for (int l = 0; l < WIDTH; ++l) to[k * WIDTH + l] = lines[l * line + k * along];
        } else {
            for (int64_t k = 0; k < inner; ++k)
                for (int l = 0; l < width; ++l) to[k * WIDTH + l] = lines[l * line + k * along];
        }
    }
}

// Adds the product of a panel of a and one of b to a tile of sums (ROWS, VECTORS), or begins it.
void multiply(const float* a, const V* b, int64_t inner, bool begins, V* tile, int64_t stride) {
    V sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < inner; ++k, a += ROWS, b += VECTORS)
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int v = 0; v < VECTORS; ++v) sums[r][v] += b[v] * a[r];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < VECTORS; ++v)
            tile[r * stride + v] = begins ? sums[r][v] : tile[r * stride + v] + sums[r][v];
}

// Rows from..to of columns first..last of the product.
void part(const Product& p, int64_t from, int64_t to, int64_t first, int64_t last) {
    const int64_t span = panels(std::min(SPAN, last - first), COLUMNS) * VECTORS;  // vectors of a row of sums
    Buffer<V> packed_b(span * p.inner), sums(BLOCK * span);
    Buffer<float> packed_a(BLOCK * std::min(INNER, p.inner));
    for (int64_t column = first; column < last; column += SPAN) {
        const int64_t columns = std::min(SPAN, last - column), wide = panels(columns, COLUMNS);
        for (int64_t k = 0; k < p.inner; k += INNER)
            pack<COLUMNS>(p.b + k * p.b_inner + column * p.b_column, p.b_column, p.b_inner, columns,
                          std::min(INNER, p.inner - k), (float*)(packed_b + k * wide * VECTORS));
        for (int64_t row = from; row < to; row += BLOCK) {
            const int64_t rows = std::min(BLOCK, to - row), high = panels(rows, ROWS);
            for (int64_t k = 0; k < p.inner; k += INNER) {
                const int64_t inner = std::min(INNER, p.inner - k);
                pack<ROWS>(p.a + row * p.a_row + k * p.a_inner, p.a_row, p.a_inner, rows, inner, packed_a);
                for (int64_t w = 0; w < wide; ++w)
                    for (int64_t h = 0; h < high; ++h)
                        multiply(packed_a + h * ROWS * inner, packed_b + (k * wide + w * inner) * VECTORS, inner, k == 0,
                                 sums + h * ROWS * span + w * VECTORS, span);
            }
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < columns; c += LANES)
                    copy_out<float>(sums + r * span + c / LANES, p.y + (row + r) * p.y_row + column + c, 0, 1,
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
