// The element types that every back end computes in.
#pragma once

namespace moelora {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Bytes of an accumulator: float, or double for double.
constexpr int accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
constexpr int element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace moelora
