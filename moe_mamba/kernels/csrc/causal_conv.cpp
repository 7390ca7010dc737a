// Mamba's short causal convolution with its SiLU, forward and backward, for CPUs.
//
// A task is one batch row and one group of channels. It walks over time once; a ring of WIDEST rows holds the inputs
// that the taps reach, and in the backward pass the gradients of them that are not complete yet. Sums over time leave
// as one partial sum a batch row, so that results do not depend on the number of threads.

#include "tile.h"

// Inputs and outputs of both passes; the same fields stand in cpu_conv.py. Tensors are of the type, what is untyped is
// in the dtype that is computed in and has no gaps.
struct Conv {
    int64_t batch, length, channels, width, groups, type, threads;
    Tensor x, initial_state, y, y_gradient, x_gradient, state_gradient;  // states: (batch, width - 1, channels)
    const uint8_t* starts;                                               // (batch, length), or null
    const void *taps, *bias;              // (width, channels), the present first; (channels)
    void *taps_gradient, *bias_gradient;  // (batch, width, channels), (batch, channels)
};

namespace {

constexpr int WIDEST = 4;   // taps
constexpr int GROUP = 256;  // channels of a task; cpu_conv.py knows it
constexpr int FOLD = 32;    // steps whose sums are added before they join the total: long sums lose digits

template <class T>
struct Task {
    using V = Vector<T>;

    const Conv& conv;
    const int64_t row, first, channels, tiles;
    const int reach;  // how far back the taps go
    Buffer<V> taps, bias, past, pending, gradient;      // (WIDEST, tiles), (tiles), rings (WIDEST, tiles), (tiles)
    Buffer<V> sums, totals;                             // (WIDEST + 1, tiles), of the taps' and the bias' gradients

    Task(const Conv& conv, int64_t index)
        : conv(conv),
          row(index / conv.groups),
          first(index % conv.groups * GROUP),
          channels(std::min<int64_t>(GROUP, conv.channels - first)),
          tiles((channels + WIDTH<T> - 1) / WIDTH<T>),
          reach(conv.width - 1),
          taps(WIDEST * tiles),
          bias(tiles),
          past(WIDEST * tiles),
          pending(WIDEST * tiles),
          gradient(tiles),
          sums((WIDEST + 1) * tiles),
          totals((WIDEST + 1) * tiles) {
        const T *from_taps = (const T*)conv.taps + first, *from_bias = (const T*)conv.bias + first;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int k = 0; k <= reach; ++k) {
                const T* from = from_taps + k * conv.channels + tile * WIDTH<T>;
                copy_in<T, T>(from, 0, 1, width(tile), taps + k * tiles + tile);
            }
            copy_in<T, T>(from_bias + tile * WIDTH<T>, 0, 1, width(tile), bias + tile);
        }
        for (int k = 1; k <= reach; ++k) load(conv.initial_state, reach - k, ring(past, -k));
    }

    int width(int64_t tile) const { return std::min<int64_t>(WIDTH<T>, channels - tile * WIDTH<T>); }
    V* ring(const Buffer<V>& rows, int64_t step) const { return rows + (step + WIDEST) % WIDEST * tiles; }

    void load(const Tensor& tensor, int64_t step, V* target) const {
        with_type<T>(Type(conv.type), tensor, row, step, first, [&](const auto* from) {
            for (int64_t tile = 0; tile < tiles; ++tile, from += WIDTH<T>)
                copy_in<std::decay_t<decltype(*from)>, T>(from, 0, 1, width(tile), target + tile);
        });
    }
    void store(const V* source, const Tensor& tensor, int64_t step) const {
        with_type<T>(Type(conv.type), tensor, row, step, first, [&](auto* to) {
            for (int64_t tile = 0; tile < tiles; ++tile, to += WIDTH<T>)
                copy_out<T>(source + tile, to, 0, 1, width(tile));
        });
    }

    // Calls use(constant) with the number of taps that a step sees, the present included.
    template <class Use>
    void with_taps(int seen, Use use) const {
        switch (seen) {
            case 0: return use(std::integral_constant<int, 1>());
            case 1: return use(std::integral_constant<int, 2>());
            case 2: return use(std::integral_constant<int, 3>());
            default: return use(std::integral_constant<int, 4>());
        }
    }

    // Calls use(step, constant) for every step, its input in the ring.
    template <class Use>
    void walk(Use use) {
        const uint8_t* starts = conv.starts ? conv.starts + row * conv.length : nullptr;
        int seen = reach;
        for (int64_t t = 0; t < conv.length; ++t) {
            load(conv.x, t, ring(past, t));
            seen = starts && starts[t] ? 0 : std::min(seen + 1, reach);
            with_taps(seen, [&](auto count) { use(t, count); });
        }
    }

    template <int COUNT>
    V convolve(V* const (&inputs)[WIDEST], int64_t tile) const {
        V out = bias[tile];
        UNROLL for (int k = 0; k < COUNT; ++k) out += taps[k * tiles + tile] * inputs[k][tile];
        return out;
    }

    void forward() {
        walk([&](int64_t t, auto count) {
            V* const inputs[WIDEST] = {ring(past, t), ring(past, t - 1), ring(past, t - 2), ring(past, t - 3)};
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const V out = convolve<count()>(inputs, tile);
                gradient[tile] = out * sigmoid<T>(out);
            }
            store(gradient, conv.y, t);
        });
    }

    void backward() {
        walk([&](int64_t t, auto count) {
            load(conv.y_gradient, t, gradient);
            step_back<count()>(t);
            if (t % FOLD == FOLD - 1) fold();
            store_gradient(t - reach);  // no later step reaches it
        });
        for (int64_t t = conv.length - reach; t < conv.length; ++t) store_gradient(t);
        fold();
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int k = 0; k <= reach; ++k) {
                T* to = (T*)conv.taps_gradient + (row * conv.width + k) * conv.channels + first + tile * WIDTH<T>;
                copy_out<T>(totals + k * tiles + tile, to, 0, 1, width(tile));
            }
            T* to = (T*)conv.bias_gradient + row * conv.channels + first + tile * WIDTH<T>;
            copy_out<T>(totals + WIDEST * tiles + tile, to, 0, 1, width(tile));
        }
    }

    void store_gradient(int64_t t) const {
        if (t >= 0)
            store(ring(pending, t), conv.x_gradient, t);
        else
            store(ring(pending, t), conv.state_gradient, t + reach);
    }

    template <int COUNT>
    void step_back(int64_t t) {
        V* const inputs[WIDEST] = {ring(past, t), ring(past, t - 1), ring(past, t - 2), ring(past, t - 3)};
        V* const to[WIDEST] = {ring(pending, t), ring(pending, t - 1), ring(pending, t - 2), ring(pending, t - 3)};
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const V out = convolve<COUNT>(inputs, tile), gate = sigmoid<T>(out);
            const V g = gradient[tile] * (gate + out * gate * (T(1) - gate));
            sums[WIDEST * tiles + tile] += g;
            to[0][tile] = taps[tile] * g;
            UNROLL for (int k = 0; k < COUNT; ++k) {
                sums[k * tiles + tile] += g * inputs[k][tile];
                if (k > 0) to[k][tile] += taps[k * tiles + tile] * g;
            }
        }
    }

    void fold() {
        for (int64_t i = 0; i < (WIDEST + 1) * tiles; ++i) {
            totals[i] += sums[i];
            sums[i] = V{};
        }
    }
};

template <class Use>
void for_tasks(const Conv& conv, Use use) {
    const int64_t tasks = conv.batch * conv.groups;
#pragma omp parallel for schedule(dynamic) num_threads(conv.threads)
    for (int64_t index = 0; index < tasks; ++index) {
        if (conv.type == float64)
            use(Task<double>(conv, index));
        else
            use(Task<float>(conv, index));
    }
}

}  // namespace

extern "C" void causal_conv_forward(const Conv* conv) {
    for_tasks(*conv, [](auto&& task) { task.forward(); });
}
extern "C" void causal_conv_backward(const Conv* conv) {
    for_tasks(*conv, [](auto&& task) { task.backward(); });
}
