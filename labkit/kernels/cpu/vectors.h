// Numbers in and out of ATen's vectors, `count` at a time, at most kLanes. All arithmetic is in fp32.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

namespace {

using Half = c10::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

inline Vec load(const float* from, int64_t count) {
  return count >= kLanes ? Vec::loadu(from) : Vec::loadu(from, count);
}

inline Vec load(const Half* from, int64_t count) {
  Vec out;
  if (count >= kLanes) {
    at::vec::load_fp32_from_bf16(from, out);
    return out;
  }
  Half padded[kLanes] = {};
  std::copy_n(from, count, padded);
  at::vec::load_fp32_from_bf16(padded, out);
  return out;
}

inline Vec load(const int8_t* from, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)  // ATen converts whole vectors of bytes alone, and would read too far
  if (count >= kLanes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if (count >= kLanes) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
#endif
  float numbers[kLanes] = {};
  std::copy_n(from, std::min(count, kLanes), numbers);
  return Vec::loadu(numbers);
}

inline void store(float* to, const Vec& value, int64_t count) {
  value.store(to, std::min(count, kLanes));
}

inline void store(Half* to, const Vec& value, int64_t count) {
  at::vec::convert_float_bfloat16(value, value).store(to, std::min(count, kLanes));
}

// What is left of a value once it has been stored as T.
template <typename T>
inline Vec rounded(const Vec& value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    Half kept[2 * kLanes];
    store(kept, value, kLanes);
    return load(kept, kLanes);
  }
}

inline float sum(const Vec& value) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, value);
}

inline float largest(const Vec& value) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, value);
}

}  // namespace
