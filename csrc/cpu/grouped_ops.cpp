// The ops of ilora_native for rows sorted by slot, on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "grouped.h"
#include "tensors.h"

namespace ilora::ops {
namespace {

int64_t item_size(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? 8 : t.scalar_type() == ScalarType::Float ? 4 : 2;
}

void check_factors(const char* name, const Tensor& t, int64_t X, int64_t rows, int64_t columns, const Types& types) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(types.narrow(t) || t.scalar_type() == types.sums, name, ": has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == X && t.size(1) == rows && t.size(2) == columns, name, ": expected [", X,
                  ", ", rows, ", ", columns, "]");
}

Factors factors_A(const Types& types, const Tensor& A) {
  return {{A.data_ptr(), types.narrow(A), A.stride(1), A.stride(2)}, A.stride(0) * item_size(A)};
}

Factors factors_Bt(const Types& types, const Tensor& B) {
  return {{B.data_ptr(), types.narrow(B), B.stride(2), B.stride(1)}, B.stride(0) * item_size(B)};
}

Tensor empty(int64_t X, int64_t rows, int64_t columns, ScalarType type) {
  return torch::stable::view(ops::empty(X * rows, columns, type), {X, rows, columns});
}

const int32_t* integers(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count, name,
                  ": expected contiguous int32 [", count, "] on the CPU");
  return static_cast<const int32_t*>(t.data_ptr());
}

Slots slots(const Tensor& offsets, int64_t M) {
  const int64_t X = offsets.numel() - 1;
  STD_TORCH_CHECK(X >= 0, "offsets: expected [X + 1]");
  const int32_t* at = integers("offsets", offsets, X + 1);
  bool rises = at[0] == 0 && at[X] == M;
  for (int64_t s = 0; s < X; ++s) rises = rises && at[s] <= at[s + 1];
  STD_TORCH_CHECK(rises, "offsets: expected offsets rising from 0 to M=", M);
  return {X, at};
}

Gates gates(const Types& types, const Tensor& gate, const Tensor& instances, double scaling, int64_t M, int64_t R) {
  const int64_t N = gate.size(0), E = gate.size(1);
  check("gate", gate, N, E, types.sums, types.sums);
  STD_TORCH_CHECK(gate.is_contiguous() && E > 0 && R % E == 0,
                  "gate: expected a contiguous tensor whose columns divide the ranks evenly");
  const int32_t* of = integers("instances", instances, M);
  bool there = true;
  for (int64_t m = 0; m < M; ++m) there = there && of[m] >= 0 && of[m] < N;
  STD_TORCH_CHECK(there, "instances: expected numbers from 0 to N-1=", N - 1);
  return {M, N, E, R, scaling, gate.data_ptr(), nullptr, of};
}

Tensor grouped_shrink_x(Tensor x, Tensor A, Tensor offsets, int64_t drop_below, MaybeTensor seed) {
  const Types types(x, A);
  x = dense_rows(x);
  const int64_t M = x.size(0), d_in = x.size(1), R = A.size(1);
  const Slots own = slots(offsets, M);
  check("x", x, M, d_in, types.x, types.x);
  check_factors("A", A, own.count, R, d_in, types);
  Tensor xa = ops::empty(M, R, A.scalar_type());
  const ShrinkX f{M, R, dropout(drop_below, seed), Packing(d_in, R), nullptr, matrix(x),
                  {xa.data_ptr(), types.narrow(xa)}};
  ilora::grouped_shrink_x(types.kernels, f, own, factors_A(types, A));
  return xa;
}

Tensor grouped_expand_xa(Tensor x, Tensor xa, MaybeTensor bias, MaybeTensor base, Tensor B, Tensor offsets, Tensor gate,
                         Tensor instances, double scaling, bool wide) {
  const Types types(x, B);
  const int64_t M = xa.size(0), R = xa.size(1), d_out = B.size(1);
  const Slots own = slots(offsets, M);
  check_factors("B", B, own.count, d_out, R, types);
  Tensor y = ops::empty(M, d_out, wide ? types.sums : types.x);
  ExpandXa f{gates(types, gate, instances, scaling, M, R), Packing(d_out, R), nullptr, ranks("xa", types, xa, M, R),
             nullptr, {}, matrix(y), types.narrow(y)};
  if (bias) {
    STD_TORCH_CHECK(!base, "bias: expected no base beside it");
    check("bias", *bias, own.count, d_out, types.x, types.x);
    *bias = dense_rows(*bias);
    f.bias = bias->data_ptr();
  }
  if (base) {
    *base = dense_rows(*base);
    check("base", *base, M, d_out, types.x, types.x);
    f.base = matrix(*base);
  }
  ilora::grouped_expand_xa(types.kernels, f, own, factors_Bt(types, B), bias ? bias->stride(0) * item_size(*bias) : 0);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> grouped_backward_dy(Tensor dy, Tensor xa, Tensor B, Tensor offsets, Tensor gate,
                                                       Tensor instances, double scaling) {
  const Types types(dy, B);
  dy = dense_rows(dy);
  const int64_t M = dy.size(0), d_out = B.size(1), R = B.size(2);
  const Slots own = slots(offsets, M);
  check("dy", dy, M, d_out, types.x, types.x);
  check_factors("B", B, own.count, d_out, R, types);
  const Gates g = gates(types, gate, instances, scaling, M, R);
  Tensor dxa = ops::empty(M, R, types.sums), dgate = ops::empty(g.N, g.E, types.sums);
  Tensor dB = empty(own.count, d_out, R, B.scalar_type());
  const BackwardDy f{g, Packing(d_out, R), nullptr, matrix(dy), ranks("xa", types, xa, M, R), dxa.data_ptr(), nullptr};
  ilora::grouped_backward_dy(types.kernels, f, own, factors_Bt(types, B), factors_Bt(types, dB), dgate.data_ptr());
  return {dxa, dB, dgate};
}

std::tuple<Tensor, Tensor> grouped_backward_x(Tensor dxa, Tensor x, Tensor A, Tensor offsets, int64_t drop_below,
                                              MaybeTensor seed, bool need_dx, bool wide) {
  const Types types(x, A);
  x = dense_rows(x);
  const int64_t M = x.size(0), d_in = x.size(1), R = A.size(1);
  const Slots own = slots(offsets, M);
  check("x", x, M, d_in, types.x, types.x);
  check_factors("A", A, own.count, R, d_in, types);
  check("dxa", dxa, M, R, types.sums, types.sums);
  STD_TORCH_CHECK(dxa.is_contiguous(), "dxa: expected a contiguous tensor");
  Tensor dx = ops::empty(need_dx ? M : 0, d_in, wide ? types.sums : types.x);
  Tensor dA = empty(own.count, R, d_in, A.scalar_type());
  const BackwardX f{M, R, dropout(drop_below, seed), Packing(d_in, R), nullptr, dxa.data_ptr(), matrix(x),
                    need_dx ? matrix(dx) : Matrix{}, types.narrow(dx)};
  ilora::grouped_backward_x(types.kernels, f, own, factors_A(types, A), factors_A(types, dA));
  return {dx, dA};
}

}  // namespace
}  // namespace ilora::ops

STABLE_TORCH_LIBRARY_IMPL(ilora_native, CPU, m) {
  m.impl("grouped_shrink_x", TORCH_BOX(&ilora::ops::grouped_shrink_x));
  m.impl("grouped_expand_xa", TORCH_BOX(&ilora::ops::grouped_expand_xa));
  m.impl("grouped_backward_dy", TORCH_BOX(&ilora::ops::grouped_backward_dy));
  m.impl("grouped_backward_x", TORCH_BOX(&ilora::ops::grouped_backward_x));
}
