// The row-block passes of forward and backward, compiled once per instruction set: the including file defines
// ILORA_ISA (a namespace), ILORA_BYTES (vector width) and ILORA_TARGET (a function attribute); ILORA_PAIRS where there
// are instructions for bfloat16.
// No standard header but kernels.h's: an inline function of theirs compiled for AVX-512 could win at link time.
// (immintrin.h's are always inlined.)
#include "kernels.h"

#ifdef ILORA_PAIRS
#include <immintrin.h>
#endif

#define FN ILORA_TARGET inline __attribute__((always_inline))

namespace ilora::ILORA_ISA {
namespace {

#include "simd.inl"
#include "tiles.inl"

template <class C> struct Scratch {  // of one thread; see scratch_size
  C *block, *mask, *strip, *gamma, *xa, *h, *p;
  int64_t Rp;
  ILORA_TARGET Scratch(void* memory, const Packing& a, const Packing& b) : Rp(a.Rp) {
    const int64_t width = a.width > b.width ? a.width : b.width, side = kRowBlock * Rp;
    block = static_cast<C*>(memory);
    mask = block + kRowBlock * width;
    strip = mask + kRowBlock * width;
    gamma = strip + 4 * width;
    xa = gamma + side, h = xa + side, p = h + side;
  }
};

// γ of a block's rows, [rows, Rp], zero in the padding.
template <class C> ILORA_TARGET void fill_gamma(const Gates& g, int64_t row, int64_t rows, C* gamma, int64_t Rp) {
  const int64_t per_gate = g.N ? g.M / g.N : 1, ranks = g.R / g.E;
  int64_t i = 0;
  if (g.segments) {
    int64_t low = 0, high = g.N;  // first segment that ends after the row
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (g.segments[middle + 1] <= row) low = middle + 1; else high = middle;
    }
    i = low;
  }
  int64_t previous = -1;
  for (int64_t m = 0; m < rows; ++m, gamma += Rp) {
    if (!g.segments) i = (row + m) / per_gate;
    else while (i < g.N && g.segments[i + 1] <= row + m) ++i;
    if (i >= g.N) i = g.N - 1;
    const C* gate = static_cast<const C*>(g.gate) + i * g.E;
    for (int64_t r = 0; r < Rp; ++r)
      gamma[r] = i == previous ? gamma[r - Rp] : r < g.R ? C(gate[r / ranks] * g.scaling) : C(0);
    previous = i;
  }
}

// Columns [column, column + n) of `rows` rows, as D in [rows rounded up to 3, ld]; with dropout also the mask kept.
template <class T, class C, class D>
ILORA_TARGET void stage(const Matrix& x, int64_t row, int64_t rows, int64_t column, int64_t n, int64_t ld,
                        const Dropout& dropout, D* block, C* mask) {
  using Piece = Staged<T, C, D>;
  constexpr int W = Simd<C>::W;
  const int64_t padded = round_up(n, 3 * W * int64_t(sizeof(C) / sizeof(D)));
  for (int64_t m = 0; m < rows; ++m) {
    const T* src = static_cast<const T*>(x.data) + (row + m) * x.row_stride + column;
    D* dst = block + m * ld;
    int64_t k = 0;
    if (dropout.on) {
      KeepMask<C> keep(dropout, row + m, column);
      for (; k < n; k += W) {
        __builtin_prefetch(src + k + 2 * x.row_stride);
        const auto kept = keep.next();
        const auto v = k + W <= n ? Piece::get(src + k) : Piece::some(src + k, n - k);
        store(dst + k, Piece::masked(v, kept));
        if (mask) store(mask + m * ld + k, kept);
      }
    } else {
      for (; k + W <= n; k += W) {
        __builtin_prefetch(src + k + 2 * x.row_stride);  // rows of a chunk are too short for the hardware's streams
        store(dst + k, Piece::get(src + k));
      }
      if (k < n) store(dst + k, Piece::some(src + k, n - k)), k += W;
    }
    for (; k < padded; k += W) store(dst + k, typename Piece::V{});
  }
  for (int64_t m = rows; m < round_up(rows, 3); ++m)
    for (int64_t k = 0; k < padded; k += W) store(block + m * ld + k, typename Piece::V{});
}

// p [rows, Rp] += block · wᵀ
template <class C, class D>
ILORA_TARGET void dot(const D* block, const D* w, int64_t ld, int64_t rows, int64_t n, C* p, int64_t Rp) {
  n = round_up(n, Simd<C>::W * int64_t(sizeof(C) / sizeof(D)));
  for (int64_t m = 0; m < rows; m += 3)
    for (int64_t r = 0; r < Rp; r += 4) dot_tile(block + m * ld, w + r * ld, ld, n, p + m * Rp + r, Rp);
}

// g [Rp, ld] (+)= hᵀ · block
template <class C, class D>
ILORA_TARGET void outer(const C* h, const D* block, int64_t ld, int64_t rows, int64_t n, C* g, int64_t Rp, bool first) {
  constexpr int64_t wide = ILORA_BYTES == 64 ? 8 : 4;  // ranks of a tile: what its registers hold
  for (int64_t k = 0; k < n; k += 3 * Simd<C>::W) {
    int64_t r = 0;
    for (; r + wide <= Rp; r += wide) outer_tile<wide>(h + r, Rp, block + k, ld, rows, g + r * ld + k, first);
    if (r < Rp) outer_tile<4>(h + r, Rp, block + k, ld, rows, g + r * ld + k, first);
  }
}

// One row out: strip (+ add), zero where the mask is, rounded to O.
template <class C, class T, class O>
ILORA_TARGET void put_row(const C* strip, int64_t n, const T* add, const C* mask, O* dst) {
  constexpr int W = Simd<C>::W;
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    auto v = load<Vec<C>>(strip + k);
    if (mask) v = masked<C>(v, load<MaskVec<C>>(mask + k));
    if (add) v += Memory<C, T>::get(add + k);
    Memory<C, O>::put(dst + k, v);
  }
  if (k == n) return;
  auto v = load<Vec<C>>(strip + k);
  if (mask) v = masked<C>(v, load<MaskVec<C>>(mask + k));
  if (add) v += get_some<C, T>(add + k, n - k);
  put_some<C, O>(dst + k, v, n - k);
}

// Rows about to be written: their lines travel while the strip is computed.
FN void prefetch_rows(const Matrix& out, int64_t row, int64_t rows, int64_t column, int64_t n, int64_t size) {
  for (int64_t j = 0; j < rows; ++j) {
    const char* dst = static_cast<const char*>(out.data) + ((row + j) * out.row_stride + column) * size;
    for (int64_t k = 0; k < n * size; k += kAlign) __builtin_prefetch(dst + k, 1);
  }
}

// out[:, chunk's columns] = keep ⊙ (h · w) + bias, or + base
template <class T, class C>
ILORA_TARGET void expand(const C* h, const C* w, int64_t R, const Packing& pack, int64_t chunk, int64_t row,
                         int64_t rows, const void* bias, const Matrix& base, const C* mask, C* strip, const Matrix& out,
                         bool narrow) {
  const int64_t ld = pack.width, n = pack.columns(chunk), column = chunk * ld;
  for (int64_t m = 0; m < rows; m += 4) {
    const int64_t strip_rows = rows - m < 4 ? rows - m : 4;
    prefetch_rows(out, row + m, strip_rows, column, n, narrow ? sizeof(T) : sizeof(C));
    for (int64_t k = 0; k < n; k += 3 * Simd<C>::W) expand_tile<C>(h + m * pack.Rp, pack.Rp, w + k, ld, R, strip + k);
    for (int64_t j = 0; j < strip_rows; ++j) {
      const T* add = bias ? static_cast<const T*>(bias) + column : nullptr;
      if (base.data) add = static_cast<const T*>(base.data) + (row + m + j) * base.row_stride + column;
      const C* keep = mask ? mask + (m + j) * ld : nullptr;
      const int64_t at = (row + m + j) * out.row_stride + column;
      if (narrow) put_row<C, T, T>(strip + j * ld, n, add, keep, static_cast<T*>(out.data) + at);
      else put_row<C, T, C>(strip + j * ld, n, add, keep, static_cast<C*>(out.data) + at);
    }
  }
}

template <class C> FN void fill_zero(C* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

template <class T, class C, class D>
ILORA_TARGET void forward(const Forward& f, int64_t row_begin, int64_t row_end, void* memory) {
  const Scratch<C> s(memory, f.a, f.b);
  const int64_t R = f.gates.R, Rp = s.Rp;
  const D* a = static_cast<const D*>(f.packed_a);
  const C* b = static_cast<const C*>(f.packed_b);
  D* block = reinterpret_cast<D*>(s.block);
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t rows = row_end - row < kRowBlock ? row_end - row : kRowBlock;
    fill_gamma(f.gates, row, rows, s.gamma, Rp);
    fill_zero(s.p, kRowBlock * Rp);
    for (int64_t c = 0; c < f.a.n_chunks; ++c) {
      const int64_t ld = f.a.width, n = f.a.columns(c);
      stage<T, C>(f.x, row, rows, c * ld, n, ld, f.dropout, block, static_cast<C*>(nullptr));
      dot(block, a + c * Rp * ld, ld, rows, n, s.p, Rp);
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t r = 0; r < R; ++r) {
        const int64_t at = (row + m) * R + r;
        if (f.narrow_xa) Memory<C, T>::put_one(static_cast<T*>(f.xa) + at, s.p[m * Rp + r]);
        else static_cast<C*>(f.xa)[at] = s.p[m * Rp + r];
        s.p[m * Rp + r] *= s.gamma[m * Rp + r];
      }
    for (int64_t c = 0; c < f.b.n_chunks; ++c)
      expand<T, C>(s.p, b + c * Rp * f.b.width, R, f.b, c, row, rows, f.bias, f.base, nullptr, s.strip, f.y,
                   f.narrow_y);
  }
}

// From a block of dy: dh (in p, on return dxa = γ ⊙ dh), this chunk's part of dBᵀ, and dgate's rows.
template <class T, class C, class D>
ILORA_TARGET void backward_dy(const Backward& f, const Scratch<C>& s, int64_t row, int64_t rows, C* part_b,
                              bool first) {
  const int64_t E = f.gates.E, R = f.gates.R, Rp = s.Rp, ld = f.b.width;
  const D* b = static_cast<const D*>(f.packed_b);
  D* block = reinterpret_cast<D*>(s.block);
  fill_gamma(f.gates, row, rows, s.gamma, Rp);
  fill_zero(s.h, kRowBlock * Rp);
  fill_zero(s.p, kRowBlock * Rp);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = (row + m) * R + r;
      const C xa = f.narrow_xa ? Memory<C, T>::get_one(static_cast<const T*>(f.xa) + at) : static_cast<const C*>(f.xa)[at];
      s.xa[m * Rp + r] = xa;
      s.h[m * Rp + r] = xa * s.gamma[m * Rp + r];
    }
  for (int64_t c = 0; c < f.b.n_chunks; ++c) {
    const int64_t n = f.b.columns(c);
    stage<T, C>(f.dy, row, rows, c * ld, n, ld, Dropout{}, block, static_cast<C*>(nullptr));
    dot(block, b + c * Rp * ld, ld, rows, n, s.p, Rp);
    outer(s.h, block, ld, rows, n, part_b + c * Rp * ld, Rp, first);
  }
  C* dgate = static_cast<C*>(f.dgate_rows) + row * E;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t e = 0; e < E; ++e) {
      C total = 0;
      for (int64_t r = e * (R / E); r < (e + 1) * (R / E); ++r) total += s.p[m * Rp + r] * s.xa[m * Rp + r];
      dgate[m * E + e] = total;
    }
  for (int64_t i = 0; i < rows * Rp; ++i) s.p[i] *= s.gamma[i];
}

// One row chunk; partial receives its packed dA, then its packed dBᵀ.
template <class T, class C, class D>
ILORA_TARGET void backward(const Backward& f, int64_t row_begin, int64_t row_end, void* partial, void* memory) {
  const Scratch<C> s(memory, f.a, f.b);
  const int64_t Rp = s.Rp, ld = f.a.width;
  const C* a = static_cast<const C*>(f.packed_a);
  C *part_a = static_cast<C*>(partial), *part_b = part_a + f.a.size();
  C* mask = f.dropout.on && f.dx.data ? s.mask : nullptr;
  D* block = reinterpret_cast<D*>(s.block);
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t rows = row_end - row < kRowBlock ? row_end - row : kRowBlock;
    backward_dy<T, C, D>(f, s, row, rows, part_b, row == row_begin);
    for (int64_t c = 0; c < f.a.n_chunks; ++c) {
      const int64_t n = f.a.columns(c);
      stage<T, C>(f.x, row, rows, c * ld, n, ld, f.dropout, block, mask);
      outer(s.p, block, ld, rows, n, part_a + c * Rp * ld, Rp, row == row_begin);
      if (f.dx.data)
        expand<T, C>(s.p, a + c * Rp * ld, f.gates.R, f.a, c, row, rows, nullptr, Matrix{}, mask, s.strip, f.dx,
                     f.narrow_dx);
    }
  }
}

#include "edges.inl"

}  // namespace

template <class T, class C, class D> static const Kernels table = {
    sizeof(C), pack<T, C, D>, pack<T, C, C>, forward<T, C, D>, backward<T, C, D>, reduce<T, C>, sum_gates<C>};

const Kernels& kernels(Element element) {
  switch (element) {
    case kFloat: return table<float, float, float>;
    case kBFloat16: return table<bf16, float, float>;
    case kBFloat16All: return table<bf16, float, PairsOr<float>>;
    default: return table<double, double, double>;
  }
}

}  // namespace ilora::ILORA_ISA
