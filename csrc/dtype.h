// The element types that every back end computes in.
#pragma once

namespace moelora {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace moelora
