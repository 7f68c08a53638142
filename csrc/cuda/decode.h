// Describes one launch of the decode kernels in plain types. ops_cuda.cpp fills it in, and the kernels read it.
// Names: M rows, N gate rows, E experts, R ranks, xa = x Aᵀ, γ[m, r] = scaling · gate[i(m), r // (R/E)].
#pragma once
#include <cstdint>

namespace ilora {

enum Element { kFloat, kBFloat16, kHalf };

constexpr int kDecodeRows = 64;       // the most rows without W
constexpr int kDecodeFusedRows = 16;  // the most rows with W in the same launch
constexpr int kDecodeRanks = 128;     // the most ranks

// The kernel writes y [M, d_out] = x Wᵀ + bias + base + ((x Aᵀ) ⊙ γ) Bᵀ and xa [M, R], both contiguous. If weight, bias
// or base is null, its term is left out. Every other matrix has columns of stride 1 and the given row stride; the gate
// may have any strides.
struct Decode {
  int M, d_in, d_out, R, N, E;
  const void *x, *weight, *bias, *base, *A, *B, *gate;
  const int32_t* segments;  // [N + 1]; if null, each instance has M / N consecutive rows
  void *y, *xa;             // y in the type of x, xa in the type of A
  int64_t x_row, w_row, base_row, a_row, b_row, gate_row, gate_col;
  float scaling;
  Element type;          // of x, W, bias, base and y
  Element adapter_type;  // of A and B: the type of x, or kFloat
  Element gate_type;
  bool vec_w, vec_a, vec_b;  // whether `aligned` holds for x and W, for x and A, and for B
};

// Whether every row can be read 16 bytes at a time: its start and its row stride are multiples of 16 bytes.
inline bool aligned(const void* at, int64_t row, int size) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0 && row * size % 16 == 0;
}

// Launches on a cudaStream_t of the current device. Returns null, or CUDA's description of the error.
const char* launch_decode(const Decode& d, void* stream);

}  // namespace ilora
