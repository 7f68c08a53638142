// The schema of ilora_native: the four primitives of ilora/op/reference.py on the CPU (cpu/ops.cpp), those of
// ilora/grouped/reference.py (cpu/grouped_ops.cpp), and a layer's whole forward for a few rows, on the CPU and on a GPU
// (cuda/ops_cuda.cpp, a library of its own).
// keep is 0 where the hash of `seed` is below drop_below, else 1; γ[m, r] = scaling · gate[i(m), r // (R/E)].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ilora_native, m) {
  // xa [M, R] = (x ⊙ keep) Aᵀ, in A's dtype.
  m.def("shrink_x(Tensor x, Tensor A, int drop_below, Tensor? seed) -> Tensor");
  // y [M, d_out] = (γ ⊙ xa) Bᵀ + bias, or + base, in x's dtype, or in float32 if wide. Of x only the dtype matters.
  m.def(
      "expand_xa(Tensor x, Tensor xa, Tensor? bias, Tensor? base, Tensor B, Tensor gate, Tensor? segments, "
      "float scaling, bool wide) -> Tensor");
  // dxa [M, R] = γ ⊙ (dy B), in float32 or float64; dB and dgate.
  m.def(
      "backward_dy(Tensor dy, Tensor xa, Tensor B, Tensor gate, Tensor? segments, float scaling) "
      "-> (Tensor dxa, Tensor dB, Tensor dgate)");
  // dx [M, d_in] = keep ⊙ (dxa A), in x's dtype, or in float32 if wide; without rows unless need_dx. dA = dxaᵀ (x ⊙ keep).
  m.def(
      "backward_x(Tensor dxa, Tensor x, Tensor A, int drop_below, Tensor? seed, bool need_dx, bool wide) "
      "-> (Tensor dx, Tensor dA)");
  // y = x Wᵀ + bias + base + (x Aᵀ ⊙ γ) Bᵀ and xa = x Aᵀ.
  m.def(
      "decode(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor gate, "
      "Tensor? segments, float scaling) -> (Tensor y, Tensor xa)");
  // As the first four, for rows sorted by slot: slot s has the rows [offsets[s], offsets[s + 1]), A [X, R, d_in] and
  // B [X, d_out, R]; row m belongs to instance instances[m]. bias is [X, d_out].
  m.def("grouped_shrink_x(Tensor x, Tensor A, Tensor offsets, int drop_below, Tensor? seed) -> Tensor");
  m.def(
      "grouped_expand_xa(Tensor x, Tensor xa, Tensor? bias, Tensor? base, Tensor B, Tensor offsets, Tensor gate, "
      "Tensor instances, float scaling, bool wide) -> Tensor");
  m.def(
      "grouped_backward_dy(Tensor dy, Tensor xa, Tensor B, Tensor offsets, Tensor gate, Tensor instances, "
      "float scaling) -> (Tensor dxa, Tensor dB, Tensor dgate)");
  m.def(
      "grouped_backward_x(Tensor dxa, Tensor x, Tensor A, Tensor offsets, int drop_below, Tensor? seed, bool need_dx, "
      "bool wide) -> (Tensor dx, Tensor dA)");
}
