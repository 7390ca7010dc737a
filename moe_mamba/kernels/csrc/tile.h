// Tiles: some time steps of one vector of channels, read from tensors of any float type and written back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "simd.h"

enum Type : int64_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

template <class To, class From>
inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Bfloat16 {
    uint16_t bits;
    operator float() const { return bits_of<float>(uint32_t(bits) << 16); }
    static Bfloat16 rounded(float value) {
        const uint32_t wide = bits_of<uint32_t>(value);
        const uint32_t nearest = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // ties to even
        return {uint16_t(value != value ? 0x7fc0 : nearest)};
    }
};

struct Float16 {
    uint16_t bits;
    operator float() const {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7fff) << 13;
        // the exponent counts from 15, not 127: a product shifts it, and makes normal numbers of subnormal ones
        const uint32_t finite = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p112f);
        const uint32_t special = magnitude | 0x7f800000;  // infinity and NaN
        return bits_of<float>(sign | (magnitude >= 0x0f800000 ? special : finite));
    }
    static Float16 rounded(float value) {
        const uint32_t wide = bits_of<uint32_t>(value), sign = wide & 0x80000000, magnitude = wide ^ sign;
        const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // ties to even
        const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds
        uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
        half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // from 65520 on: infinity
        half = magnitude > 0x7f800000 ? 0x7e00 : half;   // NaN
        return {uint16_t((sign >> 16) | half)};
    }
};

template <class To, class From>
inline To rounded(From value) {
    if constexpr (sizeof(To) == 2)
        return To::rounded(value);
    else
        return value;
}

// A tensor (batch, steps, channels) whose channels lie side by side; strides in elements.
struct Tensor {
    char* data;  // null: left out
    int64_t batch_stride, step_stride;
};

// Reads steps x channels (at most a vector) into vectors, whose further lanes become 0.
template <class From, class T>
inline void copy_in(const From* source, int64_t stride, int64_t steps, int channels, Vector<T>* tile) {
    for (int64_t t = 0; t < steps; ++t, source += stride) {
        T* lanes = (T*)(tile + t);
        if (channels == WIDTH<T>) {
#pragma omp simd
            for (int c = 0; c < WIDTH<T>; ++c) lanes[c] = T(source[c]);
        } else {
            for (int c = 0; c < WIDTH<T>; ++c) lanes[c] = c < channels ? T(source[c]) : T(0);
        }
    }
}

template <class T, class To>
inline void copy_out(const Vector<T>* tile, To* target, int64_t stride, int64_t steps, int channels) {
    for (int64_t t = 0; t < steps; ++t, target += stride) {
        const T* lanes = (const T*)(tile + t);
        if (channels == WIDTH<T>) {
#pragma omp simd
            for (int c = 0; c < WIDTH<T>; ++c) target[c] = rounded<To>(lanes[c]);
        } else {
            for (int c = 0; c < channels; ++c) target[c] = rounded<To>(lanes[c]);
        }
    }
}

// Calls use(pointer) with the address of an element, in the type of the tensor: fp64 goes only with fp64.
template <class T, class Use>
inline void with_type(Type type, const Tensor& tensor, int64_t row, int64_t step, int64_t channel, Use use) {
    const int64_t at = row * tensor.batch_stride + step * tensor.step_stride + channel;
    if constexpr (sizeof(T) == sizeof(double)) {
        use((double*)tensor.data + at);
    } else {
        switch (type) {
            case bfloat16: return use((Bfloat16*)tensor.data + at);
            case float16: return use((Float16*)tensor.data + at);
            default: return use((float*)tensor.data + at);
        }
    }
}

// Aligned memory that begins as zeros, or with whatever is there.
template <class V>
class Buffer {
   public:
    explicit Buffer(int64_t count, bool zeros = true)
        : data_(static_cast<V*>(::operator new(count * sizeof(V), std::align_val_t(64)))) {
        if (zeros) std::fill_n(data_, count, V{});
    }
    ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator V*() const { return data_; }

   private:
    V* data_;
};
