// The frozen linear on CPU tensors.

#include "bindings_dense_common.h"

namespace {

using namespace moelora::tensors;
using moelora::kLinearBlock;

// Lanes of one register, at the widest level, and rows of whole tiles: pieces end at such.
constexpr int64_t kLinearUnit = 16;
constexpr int64_t kLinearRows = 48;

// from [..., terms] times the weight, whose side `terms` is summed over, and y [..., its other
// side].
struct Product {
  Tensor y;
  moelora::Linear p;

  Product(const Tensor& from, const char* name, const Tensor& weight, int terms,
          const OptionalTensor& bias = {})
      : y(from) {
    STD_TORCH_CHECK(weight.dim() == 2, "weight: wanted 2 dimensions");
    const Vectors v = vectors_of(from, name);
    STD_TORCH_CHECK(v.columns == weight.size(terms), name, ": wanted last dimension ",
                    weight.size(terms));
    check_like(weight, from, shape_of(weight), "weight");
    const int64_t columns = weight.size(1 - terms);
    check_bias(bias, from, columns);
    std::vector<int64_t> shape = shape_of(from);
    shape.back() = columns;
    y = empty(shape, from.scalar_type());
    p = {v.T,        v.columns,     v.at,   v.ld, read(weight), rows_of(weight, "weight").stride,
         read(bias), data<void>(y), columns};
  }
};

// Calls f(a0, a1, b0, b1) for pieces that cover A by B, on all threads.  Each piece packs a panel
// of its own along A, so B is cut only as far as threads would else wait for each other.
template <class F>
void split_grid(const moelora::Linear& p, int64_t A, int64_t B, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || A * B * p.terms <= kSerialProducts) return f(0, A, 0, B);
  const int64_t a = (A + kLinearBlock - 1) / kLinearBlock,
                most = (B + kLinearRows - 1) / kLinearRows;
  int64_t b = 1;
  double busy = 0;  // the share of the time in which threads have work
  for (int64_t parts = 1; parts <= std::min(most, 4 * threads) && busy < 0.95; ++parts) {
    const int64_t rounds = (a * parts + threads - 1) / threads;
    const double share = static_cast<double>(a * parts) / static_cast<double>(rounds * threads);
    if (share > busy) busy = share, b = parts;
  }
  // Piece i of n, in whole units.
  const auto cut = [](int64_t total, int64_t unit, int64_t i, int64_t n) {
    return std::min(total, i * ((total + unit - 1) / unit) / n * unit);
  };
  torch::stable::parallel_for(0, a * b, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t i = u / b, j = u % b;
      f(cut(A, kLinearUnit, i, a), cut(A, kLinearUnit, i + 1, a), cut(B, kLinearRows, j, b),
        cut(B, kLinearRows, j + 1, b));
    }
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Product product(x, "x", weight, 1, bias);
  const moelora::Linear& p = product.p;
  const int64_t T = p.T, N = weight.size(0);
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  if (T <= kernels.small_linear_tokens)
    split(T ? N : 0, kColumnUnit, [&](int64_t n0, int64_t n1) { kernels.small_linear(p, n0, n1); });
  else
    split_grid(p, T, N, [&](int64_t t0, int64_t t1, int64_t n0, int64_t n1) {
      kernels.linear(p, t0, t1, n0, n1);
    });
  return product.y;
}

Tensor linear_backward(const Tensor& dy, const Tensor& weight) {
  const Product product(dy, "dy", weight, 0);
  const moelora::Linear& p = product.p;
  const int64_t T = p.T, K = weight.size(1);
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(dy));
  split_grid(p, K, T, [&](int64_t c0, int64_t c1, int64_t t0, int64_t t1) {
    kernels.linear_backward(p, t0, t1, c0, c1);
  });
  return product.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}
