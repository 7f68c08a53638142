// One launch of the decode kernels, in plain types: what the torch-facing code (ops_cuda.cpp) and the kernels share.
// Names: M rows, N gate rows, E experts, R ranks, xa = x Aᵀ, γ[m, r] = scaling · gate[i(m), r // (R/E)].
#pragma once
#include <cstdint>

namespace ilora {

enum Element { kFloat, kBFloat16, kHalf };

constexpr int kDecodeRows = 64;       // at most, without W
constexpr int kDecodeFusedRows = 16;  // at most, with W in the same launch
constexpr int kDecodeRanks = 128;     // at most

// y [M, d_out] = x Wᵀ + bias + base + ((x Aᵀ) ⊙ γ) Bᵀ and xa [M, R], both contiguous; null pointers add nothing.
// Every other matrix has columns of stride 1 and the given row stride; the gate has any strides.
struct Decode {
  int M, d_in, d_out, R, N, E;
  const void *x, *weight, *bias, *base, *A, *B, *gate;
  const int32_t* segments;  // [N + 1], or null: runs of M / N rows
  void *y, *xa;             // in x's type and in A's
  int64_t x_row, w_row, base_row, a_row, b_row, gate_row, gate_col;
  float scaling;
  Element type, adapter_type, gate_type;  // of x, W, bias, base, y; of A and B: the same or kFloat; of the gate
  bool vec_w, vec_a, vec_b;  // whether x and W, x and A, B may be read 16 bytes at a time (see aligned)
};

inline bool aligned(const void* at, int64_t row, int size) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0 && row * size % 16 == 0;
}

// Launches on a cudaStream_t of the current device. Returns null, or what went wrong.
const char* launch_decode(const Decode& d, void* stream);

}  // namespace ilora
