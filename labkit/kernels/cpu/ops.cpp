// The steps of a decoder layer between its matrix products, each as one operation on a CPU.
//
// PyTorch computes each of them as several small operations, and between two of them all threads meet. Here
// one loop does the whole step while the numbers are still in registers. Attention reads blocks where they
// lie; nothing is gathered. All is written with ATen's vectors, so the same source serves AVX2, AVX512 and
// NEON, and all arithmetic is in fp32. Where the model is in bf16, results are rounded where PyTorch would
// round them. A cache may also be in 8 bits: `labkit/kernels/int8_kv.py` says how its blocks lie then.
//
// The arguments are checked in `labkit/kernels/cpu/ops.py`.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "vectors.h"

namespace {

using at::Tensor;
using at::vec::fmadd;
constexpr int64_t kGrain = 8192;  // numbers that are worth a thread
constexpr int kShare = 8;         // queries that share one reading of a key

// Call work(row) for each row of `width` numbers, on as many threads as they are worth.
template <typename Work>
void for_rows(int64_t rows, int64_t width, const Work& work) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

// -- norms ----------------------------------------------------------------------------------------

// Normalise `width` numbers by their root mean square; `from` and `to` may be the same.
template <typename T>
void normalise(const T* from, const T* weight, T* to, int64_t width, float eps) {
  Vec squares(0.f);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec x = load(from + d, width - d);
    squares = fmadd(x, x, squares);
  }
  const Vec scale(1.f / std::sqrt(sum(squares) / width + eps));
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec x = rounded<T>(load(from + d, width - d) * scale);
    store(to + d, x * load(weight + d, width - d), width - d);
  }
}

// Call f with a number of the type of `x`, which is fp32 or bf16.
template <typename F>
void by_type(const Tensor& x, const F& f) {
  x.scalar_type() == at::kFloat ? f(float{}) : f(Half{});
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty_like(x);
  const int64_t width = x.size(1);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *from = x.const_data_ptr<T>(), *scale = weight.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(x.size(0), width, [&](int64_t row) {
      normalise(from + row * width, scale, to + row * width, width, static_cast<float>(eps));
    });
  });
  return out;
}

// Returns x + delta, and that normalised.
std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& delta, const Tensor& weight, double eps) {
  Tensor total = at::empty_like(x), out = at::empty_like(x);
  const int64_t width = x.size(1);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *a = x.const_data_ptr<T>(), *b = delta.const_data_ptr<T>(), *scale = weight.const_data_ptr<T>();
    T *added = total.mutable_data_ptr<T>(), *to = out.mutable_data_ptr<T>();
    for_rows(x.size(0), width, [&](int64_t row) {
      const int64_t at = row * width;
      for (int64_t d = 0; d < width; d += kLanes) {
        store(added + at + d, load(a + at + d, width - d) + load(b + at + d, width - d), width - d);
      }
      normalise(added + at, scale, to + at, width, static_cast<float>(eps));
    });
  });
  return {total, out};
}

// -- the MLP's gate, and rows for products of whole numbers ---------------------------------------

// silu(gate) * up, where a row holds all gates and then all ups.
Tensor silu_mul(const Tensor& gate_up) {
  const int64_t width = gate_up.size(1) / 2;
  Tensor out = at::empty({gate_up.size(0), width}, gate_up.options());
  by_type(gate_up, [&](auto type) {
    using T = decltype(type);
    const T* from = gate_up.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(gate_up.size(0), width, [&](int64_t row) {
      const T *gates = from + 2 * row * width, *ups = gates + width;
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec gate = load(gates + d, width - d);
        const Vec opened = rounded<T>(gate / (Vec(1.f) + gate.neg().exp()));
        store(to + row * width + d, opened * load(ups + d, width - d), width - d);
      }
    });
  });
  return out;
}

// Returns x divided by the largest size of a number in its row, in fp32, and those sizes.
std::tuple<Tensor, Tensor> scale_rows(const Tensor& x, double least) {
  const int64_t width = x.size(1);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  Tensor sizes = at::empty({x.size(0), 1}, out.options());
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T* from = x.const_data_ptr<T>();
    float *to = out.mutable_data_ptr<float>(), *most = sizes.mutable_data_ptr<float>();
    for_rows(x.size(0), width, [&](int64_t row) {
      const T* numbers = from + row * width;
      Vec found(static_cast<float>(least));
      for (int64_t d = 0; d < width; d += kLanes) {
        found = at::vec::maximum(found, load(numbers + d, width - d).abs());
      }
      most[row] = largest(found);
      const Vec size(most[row]);
      for (int64_t d = 0; d < width; d += kLanes) {
        store(to + row * width + d, load(numbers + d, width - d) / size, width - d);
      }
    });
  });
  return {out, sizes};
}

// -- rotary positions and the cache ---------------------------------------------------------------

// Turn the pairs of one head (see `apply_rotary` in labkit/core/model.py).
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, T* to, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t begin = 0; begin < dim; begin += half) {
    const T* other = x + (half - begin);  // the other number of each pair
    for (int64_t d = 0; d < half; d += kLanes) {
      const int64_t i = begin + d, left = half - d;
      const Vec kept = rounded<T>(load(x + i, left) * load(cos + i, left));
      store(to + i, fmadd(load(other + d, left), load(sin + i, left), kept), left);
    }
  }
}

// The scales of a piece (block_size, head_dim) of a cache in 8 bits, which lie behind its numbers.
template <typename C>
auto* scales_of(C* piece, int64_t size, int64_t dim) {
  return reinterpret_cast<std::conditional_t<std::is_const_v<C>, const float, float>*>(piece + size * dim);
}

// Write a vector in 8 bits, bit for bit as `quantize` in labkit/kernels/int8_kv.py rounds it.
template <typename T>
void write_int8(const T* x, int8_t* blocks, int64_t slot, int64_t size, int64_t dim) {
  Vec found(0.f);
  for (int64_t d = 0; d < dim; d += kLanes) found = at::vec::maximum(found, load(x + d, dim - d).abs());
  const float scale = std::max(largest(found) / 127.f, std::numeric_limits<float>::min());
  int8_t* piece = blocks + slot / size * size * (dim + 4);
  scales_of(piece, size, dim)[slot % size] = scale;
  for (int64_t d = 0; d < dim; d += kLanes) {
    float numbers[kLanes] = {};
    if (std::isfinite(scale)) (load(x + d, dim - d) / Vec(scale)).round().store(numbers);
    std::copy_n(numbers, std::min(kLanes, dim - d), piece + slot % size * dim + d);
  }
}

// Returns the rotated queries, and writes the rotated keys and the values to their slots in a layer's blocks.
Tensor rotate_and_write(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& blocks, const Tensor& slots,
    int64_t heads, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps) {
  const int64_t rows = qkv.size(0), dim = cos.size(-1), kv_heads = blocks.size(2), size = blocks.size(3);
  int8_t* bytes = blocks.scalar_type() == at::kChar ? blocks.mutable_data_ptr<int8_t>() : nullptr;
  const int64_t width = (heads + 2 * kv_heads) * dim;
  Tensor out = at::empty({rows, heads, dim}, qkv.options());
  const int64_t* places = slots.const_data_ptr<int64_t>();  // (2, rows * kv_heads)
  by_type(qkv, [&](auto type) {
    using T = decltype(type);
    const T *from = qkv.const_data_ptr<T>(), *c = cos.const_data_ptr<T>(), *s = sin.const_data_ptr<T>();
    const T* q_weight = q_norm ? q_norm->const_data_ptr<T>() : nullptr;
    const T* k_weight = k_norm ? k_norm->const_data_ptr<T>() : nullptr;
    T *to = out.mutable_data_ptr<T>(), *vectors = static_cast<T*>(blocks.data_ptr());
    for_rows(rows, width, [&](int64_t row) {
      const T *row_cos = c + row * dim, *row_sin = s + row * dim;
      std::vector<T> normed(q_norm ? dim : 0), turned(bytes ? dim : 0);
      for (int64_t head = 0; head < heads + kv_heads; ++head) {
        const T* x = from + row * width + head * dim;
        const bool is_query = head < heads;
        if (q_norm) {
          normalise(x, is_query ? q_weight : k_weight, normed.data(), dim, static_cast<float>(eps));
          x = normed.data();
        }
        const int64_t slot = is_query ? 0 : places[row * kv_heads + head - heads];
        T* target = is_query ? to + (row * heads + head) * dim : bytes ? turned.data() : vectors + slot * dim;
        rotate(x, row_cos, row_sin, target, dim);
        if (bytes && !is_query) write_int8(target, bytes, slot, size, dim);
      }
      for (int64_t head = 0; head < kv_heads; ++head) {
        const T* x = from + row * width + (heads + kv_heads + head) * dim;
        const int64_t slot = places[(rows + row) * kv_heads + head];
        if (bytes) {
          write_int8(x, bytes, slot, size, dim);
        } else {
          std::copy_n(x, dim, vectors + slot * dim);
        }
      }
    });
  });
  return out;
}

// -- attention ------------------------------------------------------------------------------------

// The scores of `count` queries (count, dim) against keys (tokens, dim): scores[n * stride + t].
template <int count, typename C>
void score(const C* keys, const float* queries, float* scores, int64_t tokens, int64_t dim, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    Vec products[count];
    for (int n = 0; n < count; ++n) products[n] = Vec(0.f);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec key = load(keys + t * dim + d, dim - d);
      for (int n = 0; n < count; ++n) {
        products[n] = fmadd(load(queries + n * dim + d, dim - d), key, products[n]);
      }
    }
    for (int n = 0; n < count; ++n) scores[n * stride + t] = sum(products[n]);
  }
}

// Add values (tokens, dim), each times its weight, to the results (count, dim).
template <int count, typename C>
void gather(const C* values, const float* weights, float* results, int64_t tokens, int64_t dim, int64_t stride) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec totals[count];
    for (int n = 0; n < count; ++n) totals[n] = load(results + n * dim + d, dim - d);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec value = load(values + t * dim + d, dim - d);
      for (int n = 0; n < count; ++n) totals[n] = fmadd(Vec(weights[n * stride + t]), value, totals[n]);
    }
    for (int n = 0; n < count; ++n) store(results + n * dim + d, totals[n], dim - d);
  }
}

// Multiply numbers (count, tokens) by the scale of each token.
template <int count>
void multiply(float* numbers, const float* scales, int64_t tokens, int64_t stride) {
  for (int n = 0; n < count; ++n) {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      float* at = numbers + n * stride + t;
      store(at, load(at, tokens - t) * load(scales + t, tokens - t), tokens - t);
    }
  }
}

// Turn scores into weights that add up to the number that is returned.
float exponentiate(float* scores, int64_t tokens) {
  Vec found(-std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < tokens; t += kLanes) {
    if (tokens - t >= kLanes) found = at::vec::maximum(found, Vec::loadu(scores + t));
  }
  float most = largest(found);
  for (int64_t t = tokens / kLanes * kLanes; t < tokens; ++t) most = scores[t] <= most ? most : scores[t];
  Vec total(0.f);
  float rest = 0;
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const Vec weight = (load(scores + t, tokens - t) - Vec(most)).exp();
    store(scores + t, weight, tokens - t);
    if (tokens - t >= kLanes) {
      total = total + weight;
    } else {
      for (int64_t i = t; i < tokens; ++i) rest += scores[i];
    }
  }
  return sum(total) + rest;
}

// Queries of one row that share the keys of one head.
struct Task {
  int64_t row, kv_head, first, count;
};

template <int count, typename T, typename C>
void attend(
    const Task& task, const T* q, T* out, const C* blocks, at::IntArrayRef strides, const int64_t* table,
    const int64_t* lengths, int64_t size, int64_t group, int64_t heads, int64_t dim, float scale,
    int64_t window, std::vector<float>& room) {
  int64_t places[count], ends[count], begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int n = 0; n < count; ++n) {  // the queries of a head, then those of the next in its group
    const int64_t number = task.first + n, query = number / group;
    places[n] = (query * heads + task.kv_head * group + number % group) * dim;
    ends[n] = lengths[query];
    begin = std::min(begin, std::max<int64_t>(0, ends[n] - window));
    end = std::max(end, ends[n]);
  }
  const int64_t tokens = end - begin;
  room.resize(count * (2 * dim + tokens));
  float *queries = room.data(), *results = queries + count * dim, *scores = results + count * dim;
  for (int n = 0; n < count; ++n) {
    for (int64_t d = 0; d < dim; ++d) queries[n * dim + d] = static_cast<float>(q[places[n] + d]) * scale;
  }
  std::fill_n(results, count * dim, 0.f);
  constexpr bool in_int8 = std::is_same_v<C, int8_t>;
  const C* keys = blocks + task.kv_head * strides[2];
  const auto each_block = [&](int64_t part, const auto& work) {
    for (int64_t t = begin; t < end;) {
      const int64_t next = std::min(end, (t / size + 1) * size);
      if (next < end) {
        const auto* ahead = reinterpret_cast<const char*>(keys + table[next / size] * strides[0] + part);
        for (int64_t byte = 0; byte < strides[2] * static_cast<int64_t>(sizeof(C)); byte += 64) {
          __builtin_prefetch(ahead + byte);
        }
      }
      const C* piece = keys + table[t / size] * strides[0] + part;
      const float* scales = in_int8 ? scales_of(piece, size, dim) + t % size : nullptr;
      work(piece + t % size * dim, scales, t - begin, next - t);
      t = next;
    }
  };
  each_block(0, [&](const C* some_keys, const float* scales, int64_t at, int64_t some) {
    score<count>(some_keys, queries, scores + at, some, dim, tokens);
    if (in_int8) multiply<count>(scores + at, scales, some, tokens);
  });
  float totals[count];
  for (int n = 0; n < count; ++n) {
    float* own = scores + n * tokens;
    const int64_t first = std::max<int64_t>(0, ends[n] - window) - begin, last = ends[n] - begin;
    std::fill(own, own + first, 0.f);  // what the query does not see weighs nothing
    std::fill(own + last, own + tokens, 0.f);
    totals[n] = exponentiate(own + first, last - first);
  }
  each_block(strides[1], [&](const C* values, const float* scales, int64_t at, int64_t some) {
    if (in_int8) multiply<count>(scores + at, scales, some, tokens);
    gather<count>(values, scores + at, results, some, dim, tokens);
  });
  for (int n = 0; n < count; ++n) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      store(out + places[n] + d, load(results + n * dim + d, dim - d) / Vec(totals[n]), dim - d);
    }
  }
}

Tensor paged_attention(
    const Tensor& q, const Tensor& blocks, const Tensor& tables, const Tensor& lengths, double scale,
    int64_t window) {
  const int64_t rows = tables.size(0), queries = q.size(0) / rows, heads = q.size(1), dim = q.size(2);
  const int64_t kv_heads = blocks.size(2), size = blocks.size(3), group = heads / kv_heads;
  std::vector<Task> tasks;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t first = 0; first < queries * group; first += kShare) {
        tasks.push_back({row, head, first, std::min<int64_t>(kShare, queries * group - first)});
      }
    }
  }
  Tensor out = at::empty_like(q);
  const int64_t *table = tables.const_data_ptr<int64_t>(), *length = lengths.const_data_ptr<int64_t>();
  by_type(q, [&](auto type) {
    using T = decltype(type);
    const T* from = q.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int8_t* bytes = blocks.scalar_type() == at::kChar ? blocks.const_data_ptr<int8_t>() : nullptr;
    const T* cache = bytes ? nullptr : blocks.const_data_ptr<T>();
    // Rows differ in length, so a thread that is done takes the next task: none has a fixed share.
    std::atomic<size_t> next{0};
    const int64_t threads = std::min<int64_t>(tasks.size(), at::get_num_threads());
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      std::vector<float> room;
      for (size_t i; (i = next.fetch_add(1)) < tasks.size();) {
        const Task& task = tasks[i];
        const auto run = [&](auto count) {
          const int64_t at = task.row * queries;
          const auto over = [&](const auto* numbers) {
            attend<decltype(count)::value>(
                task, from + at * heads * dim, to + at * heads * dim, numbers, blocks.strides(),
                table + task.row * tables.size(1), length + at, size, group, heads, dim,
                static_cast<float>(scale), window, room);
          };
          bytes ? over(bytes) : over(cache);
        };
        switch (task.count) {
          case 1: run(std::integral_constant<int, 1>{}); break;
          case 2: run(std::integral_constant<int, 2>{}); break;
          case 3: run(std::integral_constant<int, 3>{}); break;
          case 4: run(std::integral_constant<int, 4>{}); break;
          case 5: run(std::integral_constant<int, 5>{}); break;
          case 6: run(std::integral_constant<int, 6>{}); break;
          case 7: run(std::integral_constant<int, 7>{}); break;
          default: run(std::integral_constant<int, kShare>{});
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(labkit_cpu, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm);
  library.def(
      "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor)", add_rms_norm);
  library.def("silu_mul(Tensor gate_up) -> Tensor", silu_mul);
  library.def("scale_rows(Tensor x, float least) -> (Tensor, Tensor)", scale_rows);
  library.def(
      "rotate_and_write(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) blocks, Tensor slots, int heads, "
      "Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor",
      rotate_and_write);
  library.def(
      "paged_attention(Tensor q, Tensor blocks, Tensor tables, Tensor lengths, float scale, int window) "
      "-> Tensor",
      paged_attention);
}
