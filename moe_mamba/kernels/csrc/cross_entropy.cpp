// Cross entropy of tokens from their logits, and the gradient of the logits, for CPUs: one call for the statistics, one
// for the gradient, and one for both, for those who need the logits no more.
//
// A token is one thread's, and its sum has one order, so that results do not depend on the number of threads.

#include <cmath>
#include <limits>

#include "tile.h"

// Inputs and outputs of both passes; the same fields stand in cpu_cross_entropy.py. Numbers of a token are in the dtype
// that is computed in, logits and their gradient of the type.
struct CrossEntropy {
    int64_t tokens, rows, type, threads;
    Tensor logits, gradient;  // (1, tokens, rows)
    const int64_t* local;     // (tokens): row of the target, or outside of [0, rows)
    void *largest, *total, *predicted;
    const void *log_sum, *incoming, *counts;
};

namespace {

constexpr int64_t SHARE = 1 << 15;  // logits that a thread is worth starting for
constexpr int FOLD = 64;            // vectors that are added before they join the total: long sums lose digits
constexpr int SIDE = 4;             // vectors side by side: none waits for the one before it

// A vector of logits; lanes beyond the last row become minus infinity, whose exponential is 0.
template <class T, class From>
inline Vector<T> load(const From* from, int64_t left) {
    Vector<T> value;
    const int width = std::min<int64_t>(WIDTH<T>, left);
    copy_in<From, T>(from, 0, 1, width, &value);
    for (int lane = width; lane < WIDTH<T>; ++lane) value[lane] = -std::numeric_limits<T>::infinity();
    return value;
}

// NaN is passed over: the sum meets it, and makes the loss NaN.
template <class T, class From>
T largest_of(const From* logits, int64_t rows) {
    constexpr int64_t BLOCK = SIDE * WIDTH<T>;
    Vector<T> most[SIDE];
    for (auto& one : most) one = broadcast<T>(-std::numeric_limits<T>::infinity());
    int64_t row = 0;
    for (; row + BLOCK <= rows; row += BLOCK) {
        UNROLL for (int i = 0; i < SIDE; ++i) {
            const Vector<T> value = load<T>(logits + row + i * WIDTH<T>, WIDTH<T>);
            most[i] = value > most[i] ? value : most[i];
        }
    }
    for (; row < rows; row += WIDTH<T>) {
        const Vector<T> value = load<T>(logits + row, rows - row);
        most[0] = value > most[0] ? value : most[0];
    }
    T found = most[0][0];
    for (const auto& one : most)
        for (int lane = 0; lane < WIDTH<T>; ++lane) found = std::max(found, one[lane]);
    return found;
}

template <class T, class From>
T sum_of_powers(const From* logits, int64_t rows, T shift) {
    constexpr int64_t BLOCK = SIDE * WIDTH<T>;
    Vector<T> total = {};
    for (int64_t first = 0; first < rows; first += FOLD * BLOCK) {
        const int64_t end = std::min(rows, first + FOLD * BLOCK);
        Vector<T> sums[SIDE] = {};
        int64_t row = first;
        for (; row + BLOCK <= end; row += BLOCK)
            UNROLL for (int i = 0; i < SIDE; ++i)
                sums[i] += exp<T>(load<T>(logits + row + i * WIDTH<T>, WIDTH<T>) - shift);
        for (; row < end; row += WIDTH<T>) sums[0] += exp<T>(load<T>(logits + row, end - row) - shift);
        for (int i = 0; i < SIDE; ++i) total += sums[i];
    }
    return sum_of_lanes<T>(total);
}

template <class T, class From>
void statistics(const CrossEntropy& call, int64_t token, const From* logits) {
    const T largest = largest_of<T>(logits, call.rows);
    const T shift = largest == -std::numeric_limits<T>::infinity() ? T(0) : largest;
    const int64_t local = call.local[token];
    ((T*)call.largest)[token] = largest;
    ((T*)call.total)[token] = sum_of_powers<T>(logits, call.rows, shift);
    ((T*)call.predicted)[token] = local >= 0 && local < call.rows ? T(logits[local]) : T(0);
}

// Of exp(logits - log_sum), less 1 at the target, times incoming. `to` may be the logits.
template <class T, class From>
void gradient(const CrossEntropy& call, int64_t token, const From* logits, From* to, T log_sum, T incoming) {
    if (log_sum == std::numeric_limits<T>::infinity()) {  // it does not count, whatever its logits are
        std::fill_n(to, call.rows, From{});
        return;
    }
    const int64_t local = call.local[token];
    const bool is_inside = local >= 0 && local < call.rows;
    const T predicted = is_inside ? T(logits[local]) : T(0);
    constexpr int64_t BLOCK = SIDE * WIDTH<T>;
    int64_t row = 0;
    for (; row + BLOCK <= call.rows; row += BLOCK) {
        UNROLL for (int i = 0; i < SIDE; ++i) {
            const int64_t at = row + i * WIDTH<T>;
            const Vector<T> made = exp<T>(load<T>(logits + at, WIDTH<T>) - log_sum) * incoming;
            copy_out<T>(&made, to + at, 0, 1, WIDTH<T>);
        }
    }
    for (; row < call.rows; row += WIDTH<T>) {
        const int64_t left = std::min<int64_t>(WIDTH<T>, call.rows - row);
        const Vector<T> made = exp<T>(load<T>(logits + row, left) - log_sum) * incoming;
        copy_out<T>(&made, to + row, 0, 1, left);
    }
    if (!is_inside) return;
    const Vector<T> power = exp<T>(broadcast<T>(predicted) - log_sum);
    to[local] = rounded<From>((power[0] - T(1)) * incoming);
}

// Statistics, and the gradient of the losses' sum in the place of the logits, while they are in the nearest cache.
template <class T, class From>
void in_place(const CrossEntropy& call, int64_t token, From* logits) {
    statistics<T>(call, token, logits);
    const T log_sum = std::log(((const T*)call.total)[token]) + ((const T*)call.largest)[token];
    const bool counts = ((const bool*)call.counts)[token];
    gradient<T>(call, token, logits, logits, counts ? log_sum : std::numeric_limits<T>::infinity(), T(1));
}

// Calls use(token, pointer to its logits) for all tokens, with the dtype that is computed in.
template <class Use>
void for_tokens(const CrossEntropy& call, Use use) {
    const int64_t worth = call.tokens * call.rows / SHARE;
    const int64_t team = std::max<int64_t>(1, std::min({call.threads, call.tokens, worth}));
    const auto all = [&](auto computed) {
        using T = decltype(computed);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
        for (int64_t token = 0; token < call.tokens; ++token)
            with_type<T>(Type(call.type), call.logits, 0, token, 0, [&](auto* logits) { use(computed, token, logits); });
    };
    call.type == float64 ? all(double()) : all(float());
}

}  // namespace

extern "C" void cross_entropy_statistics(const CrossEntropy* call) {
    for_tokens(*call, [&](auto computed, int64_t token, auto* logits) {
        statistics<decltype(computed)>(*call, token, logits);
    });
}

extern "C" void cross_entropy_gradient(const CrossEntropy* call) {
    for_tokens(*call, [&](auto computed, int64_t token, auto* logits) {
        using T = decltype(computed);
        auto* to = (decltype(logits))call->gradient.data + token * call->gradient.step_stride;
        gradient<T>(*call, token, logits, to, ((const T*)call->log_sum)[token], ((const T*)call->incoming)[token]);
    });
}

extern "C" void cross_entropy_in_place(const CrossEntropy* call) {
    for_tokens(*call, [&](auto computed, int64_t token, auto* logits) {
        in_place<decltype(computed)>(*call, token, logits);
    });
}
