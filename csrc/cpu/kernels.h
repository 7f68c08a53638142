// What the code that is compiled once for each instruction set (kernels.inl) and the code around it share: plain structs.
// Names: M rows, N gate rows, E experts, R ranks, xa = (x ⊙ keep) Aᵀ, γ[m, r] = scaling · gate[i(m), r // (R/E)].
// Types: T is the element type of x, y, dy and dx (float, bf16 or double), C is the type of sums (float or double),
// D is the type that operands are multiplied in: C, or bf16 where the processor multiplies pairs of bf16 and A and B
// are bf16 too. A flag called narrow says that a tensor holds T; otherwise it holds C.
#pragma once
#include <cstdint>

namespace ilora {

constexpr int64_t kRowBlock = 48;   // rows taken at a time
constexpr int64_t kRowPad = 12;     // in scratch they are padded with zeros to a multiple of the row tiles 2, 3 and 4
constexpr int64_t kColStep = 96;    // column chunks are multiples of 3 vectors of the widest instruction set, of bf16
constexpr int64_t kColChunk = 576;  // at most: a block of 48 rows and its mask take half of 512 KB of L2
constexpr int64_t kRankStep = 4;    // packed operands are padded with zeros to a multiple of this many ranks
constexpr int64_t kAlign = 64;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A packed [R, d] operand lies as [n_chunks][Rp][width]: dense tiles, so that no d, power of two or not, makes rows
// compete for the same cache lines.
struct Packing {
  int64_t d, R, Rp, n_chunks, width;
  Packing(int64_t d, int64_t R) : d(d), R(R), Rp(round_up(R, kRankStep)) {
    n_chunks = (d + kColChunk - 1) / kColChunk;
    width = n_chunks ? round_up((d + n_chunks - 1) / n_chunks, kColStep) : 0;
  }
  int64_t size() const { return n_chunks * Rp * width; }
  int64_t offset(int64_t chunk) const { return chunk * Rp * width; }
  int64_t columns(int64_t chunk) const { return d - chunk * width < width ? d - chunk * width : width; }
};

struct Gates {
  int64_t M, N, E, R;
  double scaling;
  const void* gate;         // C [N, E]
  const int32_t* segments;  // [N + 1], or null: row m belongs to instance m / (M / N)
  const int32_t* instances = nullptr;  // [M], or null: the instance of each row, in the place of segments
};

// The hash of ilora.reference.keep_mask; all arithmetic is modulo 2**32.
constexpr uint32_t kGolden = 0x9E3779B9u, kMul1 = 0x7FEB352Du, kMul2 = 0x846CA68Bu;

inline uint32_t mix(uint32_t v) {
  v = (v ^ v >> 16) * kMul1;
  v = (v ^ v >> 15) * kMul2;
  return v ^ v >> 16;
}

struct Dropout {
  bool on;
  uint32_t s1, s2;     // keys made of the seed
  uint32_t threshold;  // an element is dropped if its hash is below this
};

struct Matrix {  // row-major; neighbouring columns lie side by side
  void* data;
  int64_t row_stride;  // in elements
};

struct Ranks {  // [M, R], contiguous
  void* data;
  bool narrow;
};

struct Factor {  // A or Bᵀ, [R, d]
  const void* data;
  bool narrow;
  int64_t stride_r, stride_k;
};

struct ShrinkX {
  int64_t M, R;
  Dropout dropout;
  Packing a;
  const void* packed_a;  // for dot
  Matrix x;
  Ranks xa;  // out
};

struct ExpandXa {
  Gates gates;
  Packing b;
  const void* packed_b;  // for expand
  Ranks xa;
  const void* bias;  // T [d_out], or null
  Matrix base, y;    // base.data may be null; y is the output
  bool narrow_y;
};

struct BackwardDy {
  Gates gates;
  Packing b;
  const void* packed_b;  // for dot
  Matrix dy;
  Ranks xa;
  void* dxa;         // C [M, R], out
  void* dgate_rows;  // C [M, E], out: Σ_{r in e} dh·xa for each row
};

struct BackwardX {
  int64_t M, R;
  Dropout dropout;
  Packing a;
  const void* packed_a;  // for expand
  const void* dxa;       // C [M, R]
  Matrix x, dx;          // dx is an output; without data it is not wanted
  bool narrow_dx;
};

inline int64_t scratch_size(const Packing& p, bool mask) {  // elements of C for each thread
  return (mask ? 2 : 1) * kRowBlock * p.width + 4 * kRowBlock * p.Rp;
}

// The functions of one instruction set and element type. Each pass covers the rows [begin, end). The backward passes
// write dA or dBᵀ of these rows into `partial`, packed; add_partials sums `count` of them for one rank group of a chunk.
struct Kernels {
  int64_t size_C;
  void (*pack_for_dot)(const Factor&, const Packing&, void* packed);
  void (*pack_for_expand)(const Factor&, const Packing&, void* packed);
  void (*shrink_x)(const ShrinkX&, int64_t begin, int64_t end, void* scratch);
  void (*expand_xa)(const ExpandXa&, int64_t begin, int64_t end, void* scratch);
  void (*backward_dy)(const BackwardDy&, int64_t begin, int64_t end, void* partial, void* scratch);
  void (*backward_x)(const BackwardX&, int64_t begin, int64_t end, void* partial, void* scratch);
  void (*add_partials)(const void* partials, int64_t count, const Packing&, int64_t chunk, int64_t first_rank,
                       const Factor& out);
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
