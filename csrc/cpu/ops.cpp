// The ops of ilora_native on the CPU.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "tensors.h"

namespace ilora::ops {
namespace {

Factor factor_A(const Types& types, const Tensor& A) {
  return {A.data_ptr(), types.narrow(A), A.stride(0), A.stride(1)};
}

Factor factor_Bt(const Types& types, const Tensor& B) {
  return {B.data_ptr(), types.narrow(B), B.stride(1), B.stride(0)};
}

Gates gates(const Types& types, const Tensor& gate, const MaybeTensor& segments, double scaling, int64_t M, int64_t R) {
  const int64_t N = gate.size(0), E = gate.size(1);
  check("gate", gate, N, E, types.sums, types.sums);
  STD_TORCH_CHECK(gate.is_contiguous() && E > 0 && R % E == 0,
                  "gate: expected a contiguous tensor whose columns divide the ranks evenly");
  STD_TORCH_CHECK(M == 0 || N > 0, "gate: has no rows, x has");
  if (segments)
    STD_TORCH_CHECK(segments->is_cpu() && segments->scalar_type() == ScalarType::Int && segments->is_contiguous() &&
                        segments->numel() == N + 1,
                    "segments: expected contiguous int32 [N + 1] on the CPU");
  return {M, N, E, R, scaling, gate.data_ptr(), segments ? static_cast<const int32_t*>(segments->data_ptr()) : nullptr};
}

Tensor shrink_x(Tensor x, Tensor A, int64_t drop_below, MaybeTensor seed) {
  const Types types(x, A);
  x = dense_rows(x);
  const int64_t M = x.size(0), d_in = x.size(1), R = A.size(0);
  check("x", x, M, d_in, types.x, types.x);
  check("A", A, R, d_in, types.x, types.sums);
  Tensor xa = empty(M, R, A.scalar_type());
  const Packing a(d_in, R);
  ilora::shrink_x(types.kernels, {M, R, dropout(drop_below, seed), a, nullptr, matrix(x), {xa.data_ptr(), types.narrow(xa)}},
           factor_A(types, A));
  return xa;
}

// y = (γ ⊙ xa) Bᵀ + bias, or + base; y may be base.
void expand_into(const Tensor& y, const Types& types, const Tensor& xa, const MaybeTensor& bias,
                 const MaybeTensor& base, const Tensor& B, const Tensor& gate, const MaybeTensor& segments,
                 double scaling) {
  const int64_t M = xa.size(0), R = xa.size(1), d_out = B.size(0);
  check("B", B, d_out, R, types.x, types.sums);
  ExpandXa f{gates(types, gate, segments, scaling, M, R), Packing(d_out, R), nullptr, ranks("xa", types, xa, M, R),
             nullptr, {}, matrix(y), types.narrow(y)};
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->numel() == d_out && types.narrow(*bias) && !base,
                    "bias: expected contiguous [d_out] in x's dtype on the CPU, and no base beside it");
    f.bias = bias->data_ptr();
  }
  if (base) {
    check("base", *base, M, d_out, types.x, types.x);
    f.base = matrix(*base);
  }
  ilora::expand_xa(types.kernels, f, factor_Bt(types, B));
}

Tensor expand_xa(Tensor x, Tensor xa, MaybeTensor bias, MaybeTensor base, Tensor B, Tensor gate, MaybeTensor segments,
                 double scaling, bool wide) {
  const Types types(x, B);
  if (base) base = dense_rows(*base);
  Tensor y = empty(xa.size(0), B.size(0), wide ? types.sums : types.x);
  expand_into(y, types, xa, bias, base, B, gate, segments, scaling);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward_dy(Tensor dy, Tensor xa, Tensor B, Tensor gate, MaybeTensor segments,
                                               double scaling) {
  const Types types(dy, B);
  dy = dense_rows(dy);
  const int64_t M = dy.size(0), d_out = B.size(0), R = B.size(1);
  check("dy", dy, M, d_out, types.x, types.x);
  check("B", B, d_out, R, types.x, types.sums);
  const Gates g = gates(types, gate, segments, scaling, M, R);
  Tensor dxa = empty(M, R, types.sums), dB = empty(d_out, R, B.scalar_type()), dgate = empty(g.N, g.E, types.sums);
  const BackwardDy f{g, Packing(d_out, R), nullptr, matrix(dy), ranks("xa", types, xa, M, R), dxa.data_ptr(), nullptr};
  ilora::backward_dy(types.kernels, f, factor_Bt(types, B), factor_Bt(types, dB), dgate.data_ptr());
  return {dxa, dB, dgate};
}

std::tuple<Tensor, Tensor> backward_x(Tensor dxa, Tensor x, Tensor A, int64_t drop_below, MaybeTensor seed,
                                      bool need_dx, bool wide) {
  const Types types(x, A);
  x = dense_rows(x);
  const int64_t M = x.size(0), d_in = x.size(1), R = A.size(0);
  check("x", x, M, d_in, types.x, types.x);
  check("A", A, R, d_in, types.x, types.sums);
  check("dxa", dxa, M, R, types.sums, types.sums);
  STD_TORCH_CHECK(dxa.is_contiguous(), "dxa: expected a contiguous tensor");
  Tensor dx = empty(need_dx ? M : 0, d_in, wide ? types.sums : types.x), dA = empty(R, d_in, A.scalar_type());
  const BackwardX f{M, R, dropout(drop_below, seed), Packing(d_in, R), nullptr, dxa.data_ptr(), matrix(x),
                    need_dx ? matrix(dx) : Matrix{}, types.narrow(dx)};
  ilora::backward_x(types.kernels, f, factor_A(types, A), factor_A(types, dA));
  return {dx, dA};
}

// For a few rows. The frozen product comes first and the update is added to it: one call of the dispatcher in all.
std::tuple<Tensor, Tensor> decode(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor base, Tensor A, Tensor B,
                                  Tensor gate, MaybeTensor segments, double scaling) {
  const Types types(x, A);
  Tensor xa = shrink_x(x, A, 0, std::nullopt);
  if (!weight) return {expand_xa(x, xa, std::nullopt, base, B, gate, segments, scaling, false), xa};
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(x), from(*weight), from(bias)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == 0,
                  "the frozen layer's product failed");
  Tensor y = to<Tensor>(stack[0]);
  expand_into(y, types, xa, std::nullopt, y, B, gate, segments, scaling);
  return {y, xa};
}

}  // namespace
}  // namespace ilora::ops

STABLE_TORCH_LIBRARY_IMPL(ilora_native, CPU, m) {
  m.impl("shrink_x", TORCH_BOX(&ilora::ops::shrink_x));
  m.impl("expand_xa", TORCH_BOX(&ilora::ops::expand_xa));
  m.impl("backward_dy", TORCH_BOX(&ilora::ops::backward_dy));
  m.impl("backward_x", TORCH_BOX(&ilora::ops::backward_x));
  m.impl("decode", TORCH_BOX(&ilora::ops::decode));
}
