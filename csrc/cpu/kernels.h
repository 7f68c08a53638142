// What the torch-facing code (ops_cpu.cpp) and the kernels compiled once per instruction set share: plain structs.
// Names: M rows, N gate rows, E experts, R ranks, xa = (x ⊙ keep) Aᵀ, γ[m, r] = scaling · gate[i(m), r // (R/E)].
// T is x's element type (float, bf16, double), C the type computed in (float, double), D what x's staged tiles and the
// small operand of dot are held in: C, or bf16 where instructions multiply pairs of it and A and B are bf16 too.
#pragma once
#include <cstdint>

namespace ilora {

constexpr int64_t kRowBlock = 48;    // rows staged at a time: a multiple of both row tiles, 3 (dot) and 4 (expand)
constexpr int64_t kColStep = 96;     // column chunks are multiples of 3 vectors of the widest instruction set, of bf16
constexpr int64_t kColChunk = 576;   // upper bound: a staged block with its mask stays within half of 512 KB of L2
constexpr int64_t kRankStep = 4;     // rank tile of dot and outer; packed operands are padded to it with zeros
constexpr int64_t kAlign = 64;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A packed [R, d] operand lies as [n_chunks][Rp][width]: tiles are dense, so no power-of-two d can thrash a cache set.
struct Packing {
  int64_t d, width, n_chunks, Rp;
  Packing(int64_t d, int64_t R) : d(d), Rp(round_up(R, kRankStep)) {
    n_chunks = (d + kColChunk - 1) / kColChunk;
    width = n_chunks ? round_up((d + n_chunks - 1) / n_chunks, kColStep) : 0;
  }
  int64_t size() const { return n_chunks * Rp * width; }
  int64_t columns(int64_t chunk) const { return d - chunk * width < width ? d - chunk * width : width; }
};

struct Gates {
  int64_t M, N, E, R;
  double scaling;
  const void* gate;          // C [N, E]
  const int32_t* segments;   // [N + 1], or null: row m belongs to instance m / (M / N)
};

// The dropout hash of ilora.reference.keep_mask; all arithmetic modulo 2**32.
constexpr uint32_t kGolden = 0x9E3779B9u, kMul1 = 0x7FEB352Du, kMul2 = 0x846CA68Bu;

inline uint32_t mix(uint32_t v) {
  v = (v ^ v >> 16) * kMul1;
  v = (v ^ v >> 15) * kMul2;
  return v ^ v >> 16;
}

struct Dropout {             // s1, s2: the seed's keys; an element is dropped iff its hash is below the threshold
  bool on;
  uint32_t s1, s2, threshold;
};

struct Matrix {              // row-major with unit column stride
  void* data;
  int64_t row_stride;        // in elements
};

struct Forward {
  Gates gates;
  Dropout dropout;
  Packing a, b;              // of A [R, d_in] and Bᵀ [R, d_out]
  const void *packed_a, *packed_b;  // D and C: dot's operand and expand's
  Matrix x, base, y;         // base.data may be null
  const void* bias;          // T [d_out] or null
  void* xa;                  // [M, R], T if narrow_xa else C
  bool narrow_xa, narrow_y;  // store as T (true) or as C
};

struct Backward {
  Gates gates;
  Dropout dropout;
  Packing a, b;
  const void *packed_a, *packed_b;  // C and D
  Matrix dy, x, dx;          // dx.data may be null: not wanted
  const void* xa;
  bool narrow_xa, narrow_dx;
  void* dgate_rows;          // C [M, E]: Σ_{r in e} dh·xa, before the sum over an instance's rows
};

inline int64_t scratch_size(const Packing& a, const Packing& b) {  // in elements of C, per thread
  const int64_t width = a.width > b.width ? a.width : b.width;
  return 2 * kRowBlock * width + 4 * width + 4 * kRowBlock * a.Rp;
}

// partials: for every row chunk, packed dA then packed dBᵀ, in C.
struct Kernels {
  int64_t size_C;
  using Pack = void(const void* src, bool narrow, int64_t stride_r, int64_t stride_k, int64_t R, const Packing&,
                    void* dst);
  Pack *pack_dot, *pack_expand;  // as D, as C
  void (*forward)(const Forward&, int64_t row_begin, int64_t row_end, void* scratch);
  void (*backward)(const Backward&, int64_t row_begin, int64_t row_end, void* partial, void* scratch);
  void (*reduce)(const void* partials, int64_t stride, int64_t count, const Packing&, int64_t chunk, int64_t R,
                 void* dst, bool narrow, int64_t stride_r, int64_t stride_k);
  void (*sum_gates)(const Gates&, const void* dgate_rows, int64_t begin, int64_t end, void* dgate);
};

enum Element { kFloat, kBFloat16, kBFloat16All, kDouble };  // of x; All: of A and B too

namespace baseline { const Kernels& kernels(Element); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& kernels(Element); }
namespace avx512 { const Kernels& kernels(Element); }
namespace avx512bf16 { const Kernels& kernels(Element); }
#endif

}  // namespace ilora
