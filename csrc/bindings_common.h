// What the bindings share, the only files that know tensors, and only through the LibTorch stable
// ABI: reading, checking, allocating, and splitting work over torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moelora::tensors {

using moelora::Dropout;
using moelora::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "x: the cpu kernels compute in float32, bfloat16, float16, float64");
  }
}

inline ScalarType accumulator_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of a tensor that the kernels take.  Tensor::element_size is no part of torch 2.10's stable ABI.
inline int64_t element_size(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// A contiguous tensor straight from the allocator: through the dispatcher, as torch::stable::empty
// goes, each costs more than the routing of a token.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, int32_t device_type,
                    int32_t device_index) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  int32_t code = aoti_torch_dtype_float32();
  if (dtype == ScalarType::BFloat16) code = aoti_torch_dtype_bfloat16();
  if (dtype == ScalarType::Half) code = aoti_torch_dtype_float16();
  if (dtype == ScalarType::Double) code = aoti_torch_dtype_float64();
  if (dtype == ScalarType::Long) code = aoti_torch_dtype_int64();
  AtenTensorHandle handle;
  const auto error =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               code, device_type, device_index, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "out of memory");
  return Tensor(handle);
}
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return empty(shape, dtype, aoti_torch_device_type_cpu(), 0);
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
inline const void* read(const Tensor& t) { return t.const_data_ptr(); }
inline const void* read(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

// A tensor [..., columns] as rows: contiguous, or a matrix whose rows are.
struct Rows {
  int64_t count, stride;
};
inline Rows rows_of(const Tensor& t, const char* name) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims > 0, name, ": wanted at least one dimension");
  Rows rows = {1, t.size(dims - 1)};
  for (int64_t d = 0; d + 1 < dims; ++d) rows.count *= t.size(d);
  if (rows.count == 0 || rows.stride == 0 || t.is_contiguous()) return rows;
  STD_TORCH_CHECK(dims == 2 && (t.size(1) == 1 || t.stride(1) == 1), name,
                  ": wanted a contiguous tensor or a matrix with contiguous rows");
  return {rows.count, t.stride(0)};
}

// That `t` has x's dtype and the given shape.
inline void check_like(const Tensor& t, const Tensor& x, const std::vector<int64_t>& shape,
                       const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": wanted x's dtype");
  STD_TORCH_CHECK(shape_of(t) == shape, name, ": has a shape that does not fit the others");
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": wanted a contiguous tensor");
}

// x's shape with N columns.
inline void check_output(const Tensor& y, const Tensor& x, int64_t N, const char* name) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = N;
  check_like(y, x, shape, name);
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t N) {
  if (!bias) return;
  check_like(*bias, x, {N}, "bias");
  check_contiguous(*bias, "bias");
}

// Runs f(begin, end) over [0, n) in pieces whose ends are multiples of `unit`.
template <class F>
void split(int64_t n, int64_t unit, const F& f) {
  const int64_t units = (n + unit - 1) / unit;
  torch::stable::parallel_for(
      0, units, 1, [&](int64_t begin, int64_t end) { f(begin * unit, std::min(n, end * unit)); });
}

// Column pieces: whole cache lines of any type and whole tiles of any level.
constexpr int64_t kColumnUnit = 128;

// Fewer tokens than this share threads within a token instead of between tokens.
constexpr int64_t kSmallT = moelora::kTokenUnit;
// Multiply-adds that take less time than waking the other threads.
constexpr int64_t kSerialProducts = 1 << 19;
// Up to this many tokens, threads split expand by columns, so that each fills half the panels;
// beyond, by tokens in the same parallel region as the rest.
constexpr int64_t kColumnSplitT = 128;

inline std::optional<Dropout> make_dropout(const std::optional<Tensor>& seed, double p) {
  if (p <= 0) return std::nullopt;
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: wanted an int64 tensor of one element, as dropout > 0");
  return moelora::make_dropout(*static_cast<const int64_t*>(seed->const_data_ptr()), p);
}

}  // namespace moelora::tensors
