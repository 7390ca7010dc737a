// Vectors of channels, and the functions of them that the kernels need.
//
// GCC's and Clang's vector types: the same source becomes AVX-512, AVX2, SSE or NEON code, whatever the machine has.
// Nothing here relies on -ffast-math: NaN stays NaN, and infinities are right.
#pragma once

#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define UNROLL _Pragma("GCC unroll 16")

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int mantissa = 23;
    static constexpr int bias = 127;
    static constexpr float round = 12582912.0f + bias;  // 1.5 2^23 + bias: a sum is rounded, its low bits are n + bias
    static constexpr float log2e = 1.44269502e+00f, log2e_rest = 1.92596299e-08f;
    static constexpr int log1p_terms = 8;
    // 2^f for |f| <= 1/2 by Remez' algorithm with 2^0 = 1 exactly, which a state kept for a million steps needs;
    // relative error 3.3e-9 before rounding
    static constexpr float power[] = {1.0f,           6.93147196e-01f, 2.40226513e-01f, 5.55034085e-02f,
                                      9.61801153e-03f, 1.33965498e-03f, 1.54745104e-04f};
};

template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int mantissa = 52;
    static constexpr int bias = 1023;
    static constexpr double round = 6755399441055744.0 + bias;
    static constexpr double log2e = 1.4426950408889634, log2e_rest = 2.0355273740931033e-17;
    static constexpr int log1p_terms = 17;
    // ln(2)^k / k!
    static constexpr double power[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158,
                                       0.009618129107628477, 0.0013333558146428443, 0.0001540353039338161,
                                       1.5252733804059841e-05, 1.321548679014431e-06, 1.01780860092397e-07,
                                       7.054911620801123e-09, 4.4455382718708116e-10, 2.5678435993488206e-11};
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
constexpr int WIDTH = VECTOR_BYTES / sizeof(T);  // channels of a vector

template <class T>
inline Vector<T> broadcast(T value) {
    return value - Vector<T>{};  // value + 0 would make +0 of -0
}

// x within bounds; NaN where x is NaN. On x86 one instruction a bound, where GCC makes two of the plain form.
template <class T>
inline Vector<T> clamp(Vector<T> x, T low, T high) {
    const Vector<T> least = broadcast<T>(low), most = broadcast<T>(high);
#ifdef __AVX512F__
    if constexpr (sizeof(T) == sizeof(float))
        return (Vector<T>)_mm512_min_ps((__m512)most, _mm512_max_ps((__m512)least, (__m512)x));
    else
        return (Vector<T>)_mm512_min_pd((__m512d)most, _mm512_max_pd((__m512d)least, (__m512d)x));
#elif defined(__AVX__)
    if constexpr (sizeof(T) == sizeof(float))
        return (Vector<T>)_mm256_min_ps((__m256)most, _mm256_max_ps((__m256)least, (__m256)x));
    else
        return (Vector<T>)_mm256_min_pd((__m256d)most, _mm256_max_pd((__m256d)least, (__m256d)x));
#else
    x = x < least ? least : x;
    return x > most ? most : x;
#endif
}

// 2^n times the polynomial of f
template <class T>
inline Vector<T> scaled_power(Vector<T> shifted, Vector<T> f) {
    using S = Simd<T>;
    constexpr int terms = sizeof(S::power) / sizeof(T);
    Vector<T> power = broadcast<T>(S::power[terms - 1]);
    UNROLL for (int k = terms - 2; k >= 0; --k) power = power * f + S::power[k];
    return power * (Vector<T>)((typename S::Bits)shifted << S::mantissa);
}

// 2^x: 0 where it would be subnormal, infinity from 2^(bias + 1/2) on, NaN for NaN.
template <class T>
inline Vector<T> exp2(Vector<T> x) {
    using S = Simd<T>;
    x = clamp<T>(x, -S::bias, S::bias + 1);
    const Vector<T> shifted = x + S::round;
    return scaled_power<T>(shifted, x - (shifted - S::round));
}

// e^x, like exp2 but exact to the last bits for large |x| too.
template <class T>
inline Vector<T> exp(Vector<T> x) {
    using S = Simd<T>;
    x = clamp<T>(x, -S::bias / S::log2e, (S::bias + 1) / S::log2e);
    const Vector<T> shifted = x * S::log2e + S::round;
    const Vector<T> n = shifted - S::round;
    return scaled_power<T>(shifted, (x * S::log2e - n) + x * S::log2e_rest);
}

template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
    return T(1) / (T(1) + exp<T>(-x));
}

template <class T>
struct Softplus {
    Vector<T> value, slope;
};

// log(1 + e^x) and its derivative; as in torch x and 1 from x = 20 on.
template <class T>
inline Softplus<T> softplus(Vector<T> x) {
    using S = Simd<T>;
    const Vector<T> zero = {}, one = broadcast<T>(1);
    const Vector<T> u = exp<T>(x > zero ? -x : x);
    const Vector<T> s = u / (u + T(2));  // log(1 + u) = 2 artanh(s), s <= 1/3
    const Vector<T> square = s * s;
    Vector<T> series = broadcast<T>(T(1) / (2 * S::log1p_terms - 1));
    UNROLL for (int k = S::log1p_terms - 2; k >= 0; --k) series = series * square + T(1) / (2 * k + 1);
    const Vector<T> value = (x > zero ? x : zero) + 2 * s * series;
    const Vector<T> slope = (x > zero ? one : u) / (one + u);
    return {x > T(20) ? x : value, x > T(20) ? one : slope};
}

template <class T>
inline T sum_of_lanes(Vector<T> v) {
    T lanes[WIDTH<T>];
    UNROLL for (int i = 0; i < WIDTH<T>; ++i) lanes[i] = v[i];
    UNROLL for (int half = WIDTH<T> / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
