// The three products. No tile has an edge: what does not fill one is copied and padded with zeros first. Tiles of 3×4 or
// 4×3 accumulators fit 16 registers and load 7 vectors for 12 fused multiply-adds. With bf16 operands an instruction
// multiplies pairs: of columns in dot, of rows in outer, of ranks in expand.
// x may lie in scratch or in the tensor itself; `ahead`, if not 0, is how many elements further on the tensor will be
// read next, and is asked for now.
constexpr int kDotRows = ILORA_BYTES == 64 ? 4 : 3;

template <class D> FN void prefetch(const D* x, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kAlign) __builtin_prefetch(reinterpret_cast<const char*>(x) + b, 0, 2);
}

template <class C, int BYTES> struct Sum {  // of the lanes of BYTES bytes, by halves
  typedef C V __attribute__((vector_size(BYTES)));
  static FN C of(V v) {
    if constexpr (BYTES == 16) {
      C s = v[0] + v[1];
      if constexpr (sizeof(C) == 4) s += v[2] + v[3];
      return s;
    } else {
      typename Sum<C, BYTES / 2>::V half[2];
      __builtin_memcpy(half, &v, BYTES);
      return Sum<C, BYTES / 2>::of(half[0] + half[1]);
    }
  }
};

// p[j] += the sum of the lanes of acc[j], for 4 vectors.
template <class C> FN void add_sums(const Vec<C>* acc, C* p) {
  for (int j = 0; j < 4; ++j) p[j] += Sum<C, ILORA_BYTES>::of(acc[j]);
}
#if ILORA_BYTES == 64
FN void add_sums(const Vec<float>* acc, float* p) {
  const __m512 a = (__m512)acc[0], b = (__m512)acc[1], c = (__m512)acc[2], d = (__m512)acc[3];
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 all = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);  // a b c d in each quarter
  const __m128 low = _mm512_castps512_ps128(all) + _mm512_extractf32x4_ps(all, 1);
  const __m128 high = _mm512_extractf32x4_ps(all, 2) + _mm512_extractf32x4_ps(all, 3);
  store(p, load<__m128>(p) + (low + high));
}
#endif

// p[m, r] += Σ_k x[m, k] · w[r, k] for kDotRows rows and 4 ranks; n is a multiple of the vector's elements.
template <class C>
FN void dot_tile(const C* x, int64_t ld_x, int64_t ahead, const C* w, int64_t ld_w, int64_t n, C* p, int64_t Rp) {
  Vec<C> acc[kDotRows][4] = {};
  for (int64_t k = 0; k < n; k += Simd<C>::W) {
    Vec<C> xs[kDotRows], ws[4];
    for (int i = 0; i < kDotRows; ++i) {
      xs[i] = load<Vec<C>>(x + i * ld_x + k);
      if (ahead) prefetch(x + i * ld_x + k + ahead, ILORA_BYTES);
    }
    for (int j = 0; j < 4; ++j) ws[j] = load<Vec<C>>(w + j * ld_w + k);
    for (int i = 0; i < kDotRows; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] += xs[i] * ws[j];
  }
  for (int i = 0; i < kDotRows; ++i) add_sums(acc[i], p + i * Rp);
}

// g[r, k] (+)= Σ_m h[m, r] · x[m, k] for J ranks and 3 vectors of columns.
template <int J, class C>
FN void outer_tile(const C* h, int64_t Rp, const C* x, int64_t ld_x, int64_t ahead, int64_t rows, C* g, int64_t ld,
                   bool first) {
  constexpr int W = Simd<C>::W;
  Vec<C> acc[J][3] = {};
  if (!first)
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < 3; ++i) acc[j][i] = load<Vec<C>>(g + j * ld + i * W);
  for (int64_t m = 0; m < rows; ++m) {
    Vec<C> xs[3];
    for (int i = 0; i < 3; ++i) xs[i] = load<Vec<C>>(x + m * ld_x + i * W);
    if (ahead) prefetch(x + m * ld_x + ahead, 3 * ILORA_BYTES);
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < 3; ++i) acc[j][i] += xs[i] * h[m * Rp + j];
  }
  for (int j = 0; j < J; ++j)
    for (int i = 0; i < 3; ++i) store(g + j * ld + i * W, acc[j][i]);
}

// sums[m, k] = Σ_r h[m, r] · w[r, k] for 4 rows and 3 vectors of columns.
template <class C> struct Sums { Vec<C> of[4][3]; };

template <class C> FN Sums<C> expand_tile(const C* h, int64_t ld_h, const C* w, int64_t ld, int64_t R) {
  constexpr int W = Simd<C>::W;
  Sums<C> sums = {};
  for (int64_t r = 0; r < R; ++r) {
    Vec<C> ws[3];
    for (int i = 0; i < 3; ++i) ws[i] = load<Vec<C>>(w + r * ld + i * W);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 3; ++i) sums.of[j][i] += ws[i] * h[j * ld_h + r];
  }
  return sums;
}

#ifdef ILORA_PAIRS
FN __m512bh pair_everywhere(const bf16* p) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(p)); }

FN void dot_tile(const bf16* x, int64_t ld_x, int64_t ahead, const bf16* w, int64_t ld_w, int64_t n, float* p,
                 int64_t Rp) {
  __m512 acc[kDotRows][4] = {};
  for (int64_t k = 0; k < n; k += 32) {
    __m512bh xs[kDotRows], ws[4];
    for (int i = 0; i < kDotRows; ++i) {
      xs[i] = load<__m512bh>(x + i * ld_x + k);
      if (ahead) prefetch(x + i * ld_x + k + ahead, ILORA_BYTES);
    }
    for (int j = 0; j < 4; ++j) ws[j] = load<__m512bh>(w + j * ld_w + k);
    for (int i = 0; i < kDotRows; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xs[i], ws[j]);
  }
  for (int i = 0; i < kDotRows; ++i) {
    Vec<float> sums[4];
    for (int j = 0; j < 4; ++j) sums[j] = (Vec<float>)acc[i][j];
    add_sums(sums, p + i * Rp);
  }
}

// J ranks and 32 columns; h is [rows / 2][Rp][2]. Two rows of x are interleaved within 128 bits, so that g's columns
// come out in the order of column_of_lane.
template <int J>
FN void outer_tile(const bf16* h, int64_t Rp, const bf16* x, int64_t ld_x, int64_t ahead, int64_t rows, float* g,
                   int64_t ld, bool first) {
  __m512 acc[J][2] = {};
  if (!first)
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < 2; ++i) acc[j][i] = load<__m512>(g + j * ld + i * 16);
  for (int64_t m = 0; m < rows; m += 2) {
    const __m512i even = load<__m512i>(x + m * ld_x), odd = load<__m512i>(x + (m + 1) * ld_x);
    if (ahead) prefetch(x + m * ld_x + ahead, ILORA_BYTES), prefetch(x + (m + 1) * ld_x + ahead, ILORA_BYTES);
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    for (int j = 0; j < J; ++j) {
      const __m512bh ranks = pair_everywhere(h + m * Rp + 2 * j);
      acc[j][0] = _mm512_dpbf16_ps(acc[j][0], ranks, low);
      acc[j][1] = _mm512_dpbf16_ps(acc[j][1], ranks, high);
    }
  }
  for (int j = 0; j < J; ++j)
    for (int i = 0; i < 2; ++i) store(g + j * ld + i * 16, acc[j][i]);
}

// w is [Rp / 2][ld][2].
FN Sums<float> expand_tile(const bf16* h, int64_t ld_h, const bf16* w, int64_t ld, int64_t R) {
  __m512 acc[4][3] = {};
  for (int64_t r = 0; r < R; r += 2) {
    __m512bh ws[3];
    for (int i = 0; i < 3; ++i) ws[i] = load<__m512bh>(w + r * ld + i * 32);
    for (int j = 0; j < 4; ++j) {
      const __m512bh ranks = pair_everywhere(h + j * ld_h + r);
      for (int i = 0; i < 3; ++i) acc[j][i] = _mm512_dpbf16_ps(acc[j][i], ranks, ws[i]);
    }
  }
  Sums<float> sums;
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 3; ++i) sums.of[j][i] = (Vec<float>)acc[j][i];
  return sums;
}
#endif

// The column, of a group, that lane k of a packed sum of outer belongs to.
template <class C, class D> FN int64_t column_of_lane(int64_t k) {
  if constexpr (sizeof(C) == sizeof(D)) return k;
  const int64_t group = k / 32 * 32, half = k / 16 % 2, quarter = k / 4 % 4;
  return group + quarter * 8 + half * 4 + k % 4;
}

// p [rows, Rp] += x · wᵀ
template <class C, class D>
FN void dot(const D* x, int64_t ld_x, int64_t ahead, const D* w, int64_t ld_w, int64_t rows, int64_t n, C* p,
            int64_t Rp) {
  n = round_up(n, ILORA_BYTES / sizeof(D));
  for (int64_t m = 0; m < rows; m += kDotRows)
    for (int64_t r = 0; r < Rp; r += 4)
      dot_tile(x + m * ld_x, ld_x, r ? 0 : ahead, w + r * ld_w, ld_w, n, p + m * Rp + r, Rp);
}

// Columns of an outer tile.
template <class C, class D> constexpr int64_t kOuterColumns = sizeof(D) < sizeof(C) ? 32 : 3 * Simd<C>::W;

// g [Rp, ld] (+)= hᵀ · x
template <class C, class D>
FN void outer(const D* h, int64_t Rp, const D* x, int64_t ld_x, int64_t ahead, int64_t rows, int64_t n, C* g,
              int64_t ld, bool first) {
  constexpr int64_t wide = ILORA_BYTES == 64 ? 8 : 4, step = sizeof(C) / sizeof(D);
  for (int64_t k = 0; k < n; k += kOuterColumns<C, D>) {
    int64_t r = 0;
    for (; r + wide <= Rp; r += wide)
      outer_tile<wide>(h + step * r, Rp, x + k, ld_x, r ? 0 : ahead, rows, g + r * ld + k, ld, first);
    if (r < Rp) outer_tile<4>(h + step * r, Rp, x + k, ld_x, r ? 0 : ahead, rows, g + r * ld + k, ld, first);
  }
}

// How many of a block's n columns can be multiplied where they lie in the tensor; the rest is copied first.
template <class A, class B> constexpr bool kSame = false;
template <class A> constexpr bool kSame<A, A> = true;
template <class T, class C, class D> FN int64_t columns_in_place(int64_t rows, int64_t n, const Dropout& dropout) {
  const bool fits = kSame<T, D> && !dropout.on && rows % kDotRows == 0 && rows % 2 == 0;
  return fits ? n / kOuterColumns<C, D> * kOuterColumns<C, D> : 0;
}
