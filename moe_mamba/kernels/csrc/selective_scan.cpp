// Mamba-1's selective scan, forward and backward (arXiv 2312.00752, algorithm 2), for CPUs.
//
// A task is one batch row and one group of channels. It walks over time in chunks of STEPS, within a chunk over vectors
// of channels, and for a vector over blocks of states, so that what a block needs lies in registers and in the first
// cache. The forward pass keeps the states that enter a chunk; the backward pass computes those between again. Sums
// over channels (gradients of B and C) and over rows (of A, D and the bias) leave as one partial sum a task, so that
// results do not depend on the number of threads.
//
// Notation: h is a state, a = exp(delta A) its decay, g the gradient of the state after a step and p = a g what of it
// reaches the state before. A tile is a vector of channels in the chunk.

#include <algorithm>
#include <memory>

#include "tile.h"

// Inputs and outputs of both passes; the same fields stand in cpu_scan.py. Tensors are of the type, what is untyped is
// in the dtype that is computed in and has no gaps.
struct Scan {
    int64_t batch, length, d_inner, d_state, groups, chunks, type, threads;
    Tensor x, delta, z, B, C, y, y_gradient, x_gradient, delta_gradient, z_gradient;
    const uint8_t* starts;                              // (batch, length), or null
    const void *decay, *D, *delta_bias;                 // A log2(e) (d_state, d_inner); (d_inner); (d_inner) or null
    const void *initial_state, *final_gradient;         // (batch, d_state, d_inner); the state may be null
    void *kept;                                         // batch x chunks x d_state x d_inner, in an order of its own
    void *final_state, *initial_gradient, *A_gradient;  // (batch, d_state, d_inner)
    void *D_gradient, *bias_gradient;                   // (batch, d_inner)
    void *B_gradient, *C_gradient;                      // (batch, groups, length, d_state)
};

namespace {

constexpr int STEPS = 16;   // from one kept state to the next; cpu_scan.py knows it
constexpr int GROUP = 128;  // channels of a task; cpu_scan.py knows it
constexpr int BLOCK = 4;    // states that are worked on at once

// What both passes share: the operands of one row and one group of channels.
template <class T>
struct Task {
    using V = Vector<T>;

    const Scan& scan;
    const int64_t row, group, first, channels, tiles, d_state;
    const uint8_t* starts;
    Buffer<V> decay, state;  // (tiles, d_state)
    Buffer<V> D, bias;       // (tiles)
    Buffer<T> B, C;          // (STEPS, d_state)
    V x[STEPS], raw[STEPS], z[STEPS], delta[STEPS], entering[STEPS], read[STEPS];

    Task(const Scan& scan, int64_t index)
        : scan(scan),
          row(index / scan.groups),
          group(index % scan.groups),
          first(group * GROUP),
          channels(std::min<int64_t>(GROUP, scan.d_inner - first)),
          tiles((channels + WIDTH<T> - 1) / WIDTH<T>),
          d_state(scan.d_state),
          starts(scan.starts ? scan.starts + row * scan.length : nullptr),
          decay(tiles * d_state),
          state(tiles * d_state),
          D(tiles),
          bias(tiles),
          B(STEPS * d_state),
          C(STEPS * d_state) {
        read_channels(scan.decay, 0, d_state, decay);
        read_channels(scan.D, 0, 1, D);
        if (scan.delta_bias) read_channels(scan.delta_bias, 0, 1, bias);
    }

    int width(int64_t tile) const { return std::min<int64_t>(WIDTH<T>, channels - tile * WIDTH<T>); }
    int steps(int64_t chunk) const { return std::min<int64_t>(STEPS, scan.length - chunk * STEPS); }
    bool resets(int64_t chunk, int t) const { return starts && starts[chunk * STEPS + t]; }

    // From a row of (rows, count, d_inner) to (tiles, count) vectors.
    void read_channels(const void* source, int64_t from_row, int64_t count, V* target) const {
        const T* from = (const T*)source + from_row * count * scan.d_inner + first;
        for (int64_t tile = 0; tile < tiles; ++tile, from += WIDTH<T>, target += count)
            copy_in<T, T>(from, scan.d_inner, count, width(tile), target);
    }
    // And back, to the task's own row.
    void write_channels(const V* source, int64_t count, void* target) const {
        T* to = (T*)target + row * count * scan.d_inner + first;
        for (int64_t tile = 0; tile < tiles; ++tile, to += WIDTH<T>, source += count)
            copy_out<T, T>(source, to, scan.d_inner, count, width(tile));
    }
    // Where the tile's (d_state, width) states that enter a chunk are kept.
    T* kept(int64_t chunk, int64_t tile) const {
        return (T*)scan.kept + ((row * scan.chunks + chunk) * scan.d_inner + first + tile * WIDTH<T>) * d_state;
    }
    void load(const Tensor& tensor, int64_t chunk, int64_t tile, V* target) const {
        with_type<T>(Type(scan.type), tensor, row, chunk * STEPS, first + tile * WIDTH<T>, [&](const auto* from) {
            for (int t = 0; t < steps(chunk); ++t)  // the next tile: rows are too far apart for the CPU to foresee it
                __builtin_prefetch(from + t * tensor.step_stride + WIDTH<T>);
            copy_in<std::decay_t<decltype(*from)>, T>(from, tensor.step_stride, steps(chunk), width(tile), target);
        });
    }
    void store(const V* source, const Tensor& tensor, int64_t chunk, int64_t tile) const {
        with_type<T>(Type(scan.type), tensor, row, chunk * STEPS, first + tile * WIDTH<T>, [&](auto* to) {
            copy_out<T>(source, to, tensor.step_stride, steps(chunk), width(tile));
        });
    }
    void load_inputs(int64_t chunk, int64_t tile) {
        load(scan.x, chunk, tile, x);
        load(scan.delta, chunk, tile, raw);
        if (scan.z.data) load(scan.z, chunk, tile, z);
    }
    void load_projection(const Tensor& tensor, int64_t chunk, T* target) const {
        for (int t = 0; t < steps(chunk); ++t, target += d_state) {
            with_type<T>(Type(scan.type), tensor, row, chunk * STEPS + t, 0, [&](const auto* from) {
                for (int64_t n = 0; n < d_state; ++n) target[n] = T(from[n]);
            });
        }
    }
    void load_projections(int64_t chunk) {
        load_projection(scan.B, chunk, B);
        load_projection(scan.C, chunk, C);
    }
};

template <class T>
struct Forward : Task<T> {
    using V = Vector<T>;
    using Base = Task<T>;
    using Base::scan, Base::d_state, Base::x, Base::raw, Base::z, Base::delta, Base::entering, Base::read;

    Forward(const Scan& scan, int64_t index) : Base(scan, index) {
        if (scan.initial_state) this->read_channels(scan.initial_state, this->row, d_state, this->state);
    }

    void run() {
        for (int64_t chunk = 0; chunk < scan.chunks; ++chunk) {
            this->load_projections(chunk);
            for (int64_t tile = 0; tile < this->tiles; ++tile) run_tile(chunk, tile);
        }
        this->write_channels(this->state, d_state, scan.final_state);
    }

    void run_tile(int64_t chunk, int64_t tile) {
        const int steps = this->steps(chunk), width = this->width(tile);
        V* state = this->state + tile * d_state;
        copy_out<T, T>(state, this->kept(chunk, tile), width, d_state, width);
        this->load_inputs(chunk, tile);
        for (int t = 0; t < steps; ++t) {
            delta[t] = softplus<T>(raw[t] + this->bias[tile]).value;
            entering[t] = delta[t] * x[t];
            read[t] = this->D[tile] * x[t];
        }
        int64_t n = 0;
        for (; n + BLOCK <= d_state; n += BLOCK) advance<BLOCK>(chunk, tile, n, state + n);
        for (; n < d_state; ++n) advance<1>(chunk, tile, n, state + n);
        if (scan.z.data)
            for (int t = 0; t < steps; ++t) read[t] *= z[t] * sigmoid<T>(z[t]);
        this->store(read, scan.y, chunk, tile);
    }

    // COUNT states from n on, over the chunk; adds what is read of them.
    template <int COUNT>
    void advance(int64_t chunk, int64_t tile, int64_t n, V* state) {
        const V* decay = this->decay + tile * d_state + n;
        V h[COUNT];
        UNROLL for (int i = 0; i < COUNT; ++i) h[i] = state[i];
        for (int t = 0; t < this->steps(chunk); ++t) {
            if (this->resets(chunk, t))
                UNROLL for (int i = 0; i < COUNT; ++i) h[i] = V{};
            const T *B = this->B + t * d_state + n, *C = this->C + t * d_state + n;
            V sum = read[t];
            UNROLL for (int i = 0; i < COUNT; ++i) {
                h[i] = exp2<T>(delta[t] * decay[i]) * h[i] + entering[t] * B[i];
                sum += h[i] * C[i];
            }
            read[t] = sum;
        }
        UNROLL for (int i = 0; i < COUNT; ++i) state[i] = h[i];
    }
};

template <class T>
struct Backward : Task<T> {
    using V = Vector<T>;
    using Base = Task<T>;
    using Base::scan, Base::d_state, Base::x, Base::raw, Base::z, Base::delta, Base::entering, Base::read;

    Buffer<V> A_gradient;                 // (tiles, d_state); the state is p
    Buffer<V> D_gradient, bias_gradient;  // (tiles)
    Buffer<V> before;                     // (d_state), the states that enter the chunk
    Buffer<V> B_sums, C_sums;             // (STEPS, d_state), over the vectors so far
    V slope[STEPS], gate_slope[STEPS];
    V read_gradient[STEPS];      // of C h + D x
    V entering_gradient[STEPS];  // of delta x
    V exponent_gradient[STEPS];  // of delta log2(e), through the decays
    V decays[STEPS][BLOCK], states[STEPS][BLOCK];  // states before each step

    Backward(const Scan& scan, int64_t index)
        : Base(scan, index),
          A_gradient(this->tiles * d_state),
          D_gradient(this->tiles),
          bias_gradient(this->tiles),
          before(d_state),
          B_sums(STEPS * d_state),
          C_sums(STEPS * d_state) {
        this->read_channels(scan.final_gradient, this->row, d_state, this->state);
    }

    void run() {
        for (int64_t chunk = scan.chunks - 1; chunk >= 0; --chunk) {
            this->load_projections(chunk);
            for (int64_t tile = 0; tile < this->tiles; ++tile) run_tile(chunk, tile);
            write_sums(chunk, B_sums, scan.B_gradient);
            write_sums(chunk, C_sums, scan.C_gradient);
        }
        this->write_channels(this->state, d_state, scan.initial_gradient);
        this->write_channels(A_gradient, d_state, scan.A_gradient);
        this->write_channels(D_gradient, 1, scan.D_gradient);
        this->write_channels(bias_gradient, 1, scan.bias_gradient);
    }

    // The task's partial sums of a chunk; they begin as zeros again.
    void write_sums(int64_t chunk, V* sums, void* target) const {
        const int64_t task = this->row * scan.groups + this->group;
        T* to = (T*)target + (task * scan.length + chunk * STEPS) * d_state;
        for (int64_t i = 0; i < this->steps(chunk) * d_state; ++i) {
            to[i] = sum_of_lanes<T>(sums[i]);
            sums[i] = V{};
        }
    }

    void run_tile(int64_t chunk, int64_t tile) {
        const int steps = this->steps(chunk), width = this->width(tile);
        copy_in<T, T>(this->kept(chunk, tile), width, d_state, width, before);
        this->load_inputs(chunk, tile);
        this->load(scan.y_gradient, chunk, tile, read_gradient);
        prepare(steps, tile);
        int64_t n = 0;
        for (; n + BLOCK <= d_state; n += BLOCK) run_states<BLOCK>(chunk, tile, n);
        for (; n < d_state; ++n) run_states<1>(chunk, tile, n);
        finish(steps, tile);
        this->store(x, scan.x_gradient, chunk, tile);
        this->store(raw, scan.delta_gradient, chunk, tile);
        if (scan.z.data) this->store(z, scan.z_gradient, chunk, tile);
    }

    void prepare(int steps, int64_t tile) {
        for (int t = 0; t < steps; ++t) {
            const Softplus<T> step = softplus<T>(raw[t] + this->bias[tile]);
            delta[t] = step.value;
            slope[t] = step.slope;
            entering[t] = step.value * x[t];
            read[t] = this->D[tile] * x[t];
            entering_gradient[t] = exponent_gradient[t] = V{};
        }
        if (!scan.z.data) return;
        for (int t = 0; t < steps; ++t) {
            const V gate = sigmoid<T>(z[t]);
            gate_slope[t] = read_gradient[t] * (gate + z[t] * gate * (T(1) - gate));
            read_gradient[t] *= z[t] * gate;
        }
    }

    // Gradients of x, delta and z, written over them.
    void finish(int steps, int64_t tile) {
        constexpr T ln2 = T(0.69314718055994531);  // the exponent is delta A, and A = ln(2) decay
        for (int t = 0; t < steps; ++t) {
            D_gradient[tile] += read_gradient[t] * x[t];
            raw[t] = (exponent_gradient[t] * ln2 + entering_gradient[t] * x[t]) * slope[t];
            bias_gradient[tile] += raw[t];
            x[t] = entering_gradient[t] * delta[t] + read_gradient[t] * this->D[tile];
        }
        if (scan.z.data)
            for (int t = 0; t < steps; ++t) z[t] = gate_slope[t] * read[t];
    }

    template <int COUNT>
    void run_states(int64_t chunk, int64_t tile, int64_t n) {
        const V* decay = this->decay + tile * d_state + n;
        recompute<COUNT>(chunk, n, decay);
        V* p_memory = this->state + tile * d_state + n;
        V* A_memory = A_gradient + tile * d_state + n;
        V p[COUNT], A_sum[COUNT];
        UNROLL for (int i = 0; i < COUNT; ++i) {
            p[i] = p_memory[i];
            A_sum[i] = V{};
        }
        for (int t = this->steps(chunk) - 1; t >= 0; --t) {
            if (this->resets(chunk, t))
                step_back<COUNT, true>(t, n, decay, p, A_sum);
            else
                step_back<COUNT, false>(t, n, decay, p, A_sum);
        }
        UNROLL for (int i = 0; i < COUNT; ++i) {
            p_memory[i] = p[i];
            A_memory[i] += A_sum[i];
        }
    }

    // COUNT states from n on, forward over the chunk: decays, states, what is read of them, and the gradient of C.
    template <int COUNT>
    void recompute(int64_t chunk, int64_t n, const V* decay) {
        V h[COUNT];
        UNROLL for (int i = 0; i < COUNT; ++i) h[i] = before[n + i];
        for (int t = 0; t < this->steps(chunk); ++t) {
            if (this->resets(chunk, t))
                UNROLL for (int i = 0; i < COUNT; ++i) h[i] = V{};
            const T *B = this->B + t * d_state + n, *C = this->C + t * d_state + n;
            V* C_sum = C_sums + t * d_state + n;
            V sum = read[t];
            UNROLL for (int i = 0; i < COUNT; ++i) {
                const V a = exp2<T>(delta[t] * decay[i]);
                decays[t][i] = a;
                states[t][i] = h[i];
                h[i] = a * h[i] + entering[t] * B[i];
                sum += h[i] * C[i];
                C_sum[i] += read_gradient[t] * h[i];
            }
            read[t] = sum;
        }
    }

    template <int COUNT, bool RESETS>
    void step_back(int t, int64_t n, const V* decay, V (&p)[COUNT], V (&A_sum)[COUNT]) {
        const T *B = this->B + t * d_state + n, *C = this->C + t * d_state + n;
        V* B_sum = B_sums + t * d_state + n;
        V to_entering = entering_gradient[t], to_exponent = exponent_gradient[t];
        UNROLL for (int i = 0; i < COUNT; ++i) {
            const V g = p[i] + read_gradient[t] * C[i];
            B_sum[i] += g * entering[t];
            to_entering += g * B[i];
            if (RESETS) {
                p[i] = V{};  // nothing is multiplied, because 0 x NaN is NaN
                continue;
            }
            p[i] = decays[t][i] * g;
            const V exponent = p[i] * states[t][i];  // gradient of delta A
            A_sum[i] += exponent * delta[t];
            to_exponent += exponent * decay[i];
        }
        entering_gradient[t] = to_entering;
        exponent_gradient[t] = to_exponent;
    }
};

template <template <class> class Pass>
void run(const Scan& scan) {
    const int64_t tasks = scan.batch * scan.groups;
#pragma omp parallel for schedule(dynamic) num_threads(scan.threads)
    for (int64_t index = 0; index < tasks; ++index) {
        if (scan.type == float64)
            std::make_unique<Pass<double>>(scan, index)->run();
        else
            std::make_unique<Pass<float>>(scan, index)->run();
    }
}

}  // namespace

extern "C" void selective_scan_forward(const Scan* scan) { run<Forward>(*scan); }
extern "C" void selective_scan_backward(const Scan* scan) { run<Backward>(*scan); }
