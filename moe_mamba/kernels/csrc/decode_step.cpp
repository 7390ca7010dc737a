// One token of many sequences, for generation: the step of Mamba's convolution and that of its selective scan.
//
// A task is a block of batch rows and a group of channels. It lays out what its rows share (taps, decays) in vectors of
// channels once, and then reads and writes each state once. No sum crosses tasks, so results do not depend on the
// number of threads; a step too small to share stays on one.

#include "tile.h"

// Inputs and outputs of a step; the same fields stand in cpu_step.py of either room. Tensors are of the type, with a
// row for each sequence; what is untyped has no gaps, and is in the dtype that is computed in unless it says otherwise.
struct ScanStep {
    int64_t batch, d_inner, d_state, type, threads;
    Tensor x, delta, z, B, C, y;
    const void *A, *D, *delta_bias;  // (d_inner, d_state); (d_inner); (d_inner) or null
    const void* state;               // (batch, d_state, d_inner)
    void* new_state;
};

struct ConvStep {
    int64_t batch, channels, width, type, threads;
    Tensor x, y, state, new_state;  // states: (batch, width - 1, channels)
    const void *weight, *bias;      // of the type: (channels, width), the present last; (channels)
};

namespace {

constexpr int ROWS = 16;         // of a task
constexpr int GROUP = 256;       // channels of a task
constexpr int64_t SHARE = 1 << 15;  // elements of the states that a thread is worth starting for
constexpr double LOG2E = 1.4426950408889634;

// Which rows and channels a task has.
template <class T>
struct Part {
    const int64_t first_row, last_row, first, channels, tiles;

    Part(int64_t index, int64_t batch, int64_t d)
        : first_row(index / groups(d) * ROWS),
          last_row(std::min(first_row + ROWS, batch)),
          first(index % groups(d) * GROUP),
          channels(std::min<int64_t>(GROUP, d - first)),
          tiles((channels + WIDTH<T> - 1) / WIDTH<T>) {}

    static int64_t groups(int64_t d) { return (d + GROUP - 1) / GROUP; }
    static int64_t count(int64_t batch, int64_t d) { return (batch + ROWS - 1) / ROWS * groups(d); }
    int width(int64_t tile) const { return std::min<int64_t>(WIDTH<T>, channels - tile * WIDTH<T>); }
};

// The address of a row, and a vector of channels from an address and back.
template <class From>
From* row_of(const Tensor& tensor, int64_t row, int64_t step, int64_t channel) {
    return (From*)tensor.data + row * tensor.batch_stride + step * tensor.step_stride + channel;
}
template <class T, class From>
Vector<T> load(const From* from, int width) {
    Vector<T> vector;
    copy_in<From, T>(from, 0, 1, width, &vector);
    return vector;
}
template <class T, class To>
void store(Vector<T> vector, To* to, int width) {
    copy_out<T>(&vector, to, 0, 1, width);
}

// Rows of `count` numbers, one row a channel, as vectors of channels: (count, tiles).
template <class T, class From>
void channels_last(const From* from, int64_t count, const Part<T>& part, T factor, Vector<T>* target) {
    T* to = (T*)target;
    for (int64_t c = 0; c < part.channels; ++c)
        for (int64_t n = 0; n < count; ++n) to[n * part.tiles * WIDTH<T> + c] = T(from[c * count + n]) * factor;
}

template <class T, class From>
void scan_task(const ScanStep& scan, int64_t index) {
    using V = Vector<T>;
    const Part<T> part(index, scan.batch, scan.d_inner);
    const int64_t states = scan.d_state, tiles = part.tiles, first = part.first;
    Buffer<V> decay(states * tiles), delta(tiles), entering(tiles), read(tiles);
    channels_last<T>((const T*)scan.A + first * states, states, part, T(LOG2E), (V*)decay);
    for (int64_t row = part.first_row; row < part.last_row; ++row) {
        const From* from_x = row_of<From>(scan.x, row, 0, first);
        const From* from_delta = row_of<From>(scan.delta, row, 0, first);
        for (int64_t tile = 0, c = 0; tile < tiles; ++tile, c += WIDTH<T>) {
            const int width = part.width(tile);
            const V x = load<T>(from_x + c, width);
            V raw = load<T>(from_delta + c, width);
            if (scan.delta_bias) raw += load<T>((const T*)scan.delta_bias + first + c, width);
            delta[tile] = softplus<T>(raw).value;
            entering[tile] = delta[tile] * x;
            read[tile] = load<T>((const T*)scan.D + first + c, width) * x;
        }
        for (int64_t n = 0; n < states; ++n) {
            const T B = T(*row_of<From>(scan.B, row, 0, n)), C = T(*row_of<From>(scan.C, row, 0, n));
            const int64_t at = (row * states + n) * scan.d_inner + first;
            const T* before = (const T*)scan.state + at;
            T* after = (T*)scan.new_state + at;
            for (int64_t tile = 0; tile < tiles; ++tile, before += WIDTH<T>, after += WIDTH<T>) {
                const int width = part.width(tile);
                const V kept = exp2<T>(delta[tile] * decay[n * tiles + tile]) * load<T>(before, width);
                const V h = kept + entering[tile] * B;
                store<T>(h, after, width);
                read[tile] += h * C;
            }
        }
        From* to = row_of<From>(scan.y, row, 0, first);
        const From* from_z = scan.z.data ? row_of<From>(scan.z, row, 0, first) : nullptr;
        for (int64_t tile = 0, c = 0; tile < tiles; ++tile, c += WIDTH<T>) {
            const V z = from_z ? load<T>(from_z + c, part.width(tile)) : V{};
            store<T>(from_z ? read[tile] * z * sigmoid<T>(z) : read[tile], to + c, part.width(tile));
        }
    }
}

template <class T, class From>
void conv_task(const ConvStep& conv, int64_t index) {
    using V = Vector<T>;
    const Part<T> part(index, conv.batch, conv.channels);
    const int64_t reach = conv.width - 1;
    Buffer<V> taps(conv.width * part.tiles);
    channels_last<T>((const From*)conv.weight + part.first * conv.width, conv.width, part, T(1), (V*)taps);
    const From* bias = (const From*)conv.bias + part.first;
    for (int64_t row = part.first_row; row < part.last_row; ++row) {
        for (int64_t tile = 0, c = part.first; tile < part.tiles; ++tile, c += WIDTH<T>) {
            const int width = part.width(tile);
            V out = load<T>(bias + tile * WIDTH<T>, width);
            for (int64_t k = 0; k <= reach; ++k) {
                const From* from = k < reach ? row_of<From>(conv.state, row, k, c) : row_of<From>(conv.x, row, 0, c);
                const V input = load<T>(from, width);
                out += taps[k * part.tiles + tile] * input;
                if (k > 0) store<T>(input, row_of<From>(conv.new_state, row, k - 1, c), width);
            }
            store<T>(out * sigmoid<T>(out), row_of<From>(conv.y, row, 0, c), width);
        }
    }
}

// Calls use(a number of the type computed in, an element of the tensors' type).
template <class Use>
void with_types(int64_t type, Use use) {
    switch (type) {
        case float64: return use(double(), double());
        case bfloat16: return use(float(), Bfloat16());
        case float16: return use(float(), Float16());
        default: return use(float(), float());
    }
}

// Runs every task, on as many threads as there is work for.
template <class Use>
void for_tasks(int64_t batch, int64_t d, int64_t elements, int64_t threads, Use use) {
    const int64_t tasks = Part<float>::count(batch, d);
    const int64_t team = std::max<int64_t>(1, std::min({threads, tasks, batch * d * elements / SHARE}));
    if (team == 1) {
        for (int64_t index = 0; index < tasks; ++index) use(index);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(team)
    for (int64_t index = 0; index < tasks; ++index) use(index);
}

}  // namespace

extern "C" void selective_scan_step(const ScanStep* scan) {
    with_types(scan->type, [&](auto work, auto element) {
        for_tasks(scan->batch, scan->d_inner, scan->d_state, scan->threads,
                  [&](int64_t index) { scan_task<decltype(work), decltype(element)>(*scan, index); });
    });
}
extern "C" void causal_conv_step(const ConvStep* conv) {
    with_types(conv->type, [&](auto work, auto element) {
        for_tasks(conv->batch, conv->channels, conv->width, conv->threads,
                  [&](int64_t index) { conv_task<decltype(work), decltype(element)>(*conv, index); });
    });
}
