// The schema of ilora_native; each device registers its implementations under the same names: cpu/ops_cpu.cpp, and
// cuda/ops_cuda.cpp, which is a library of its own, has forward and decode alone, and takes few rows.
// forward and backward leave the frozen product to a matrix multiplication that accumulates on top (beta = 1).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ilora_native, m) {
  // y = bias + base + ((x ⊙ keep) Aᵀ ⊙ γ) Bᵀ, in float32 instead of bfloat16 if wide; xa [M, R] ungated.
  m.def(
      "forward(Tensor x, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor gate, Tensor? segments, float scaling, "
      "int drop_below, Tensor? seed, bool wide) -> (Tensor y, Tensor xa)");
  // dx = keep ⊙ (dxa A), empty unless need_dx.
  m.def(
      "backward(Tensor dy, Tensor x, Tensor xa, Tensor A, Tensor B, Tensor gate, Tensor? segments, float scaling, "
      "int drop_below, Tensor? seed, bool need_dx, bool wide) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)");
  // y = x Wᵀ + bias + base + (x Aᵀ ⊙ γ) Bᵀ in one launch, on a GPU.
  m.def(
      "decode(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor gate, "
      "Tensor? segments, float scaling) -> (Tensor y, Tensor xa)");
}
