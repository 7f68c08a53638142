// The three products, on packed and zero-padded operands, so that no tile has an edge. Tiles of 3×4 or 4×3 accumulators
// fit 16 registers and load 7 vectors for 12 fused multiply-adds.

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
template <class C> FN C sum(Vec<C> v) { return Sum<C, ILORA_BYTES>::of(v); }

// p[m, r] += Σ_k x[m, k] · w[r, k] for 3 rows and 4 ranks; n is a multiple of W.
template <class C> FN void dot_tile(const C* x, const C* w, int64_t ld, int64_t n, C* p, int64_t ld_p) {
  Vec<C> acc[3][4] = {};
  for (int64_t k = 0; k < n; k += Simd<C>::W) {
    Vec<C> xs[3], ws[4];
    for (int i = 0; i < 3; ++i) xs[i] = load<Vec<C>>(x + i * ld + k);
    for (int j = 0; j < 4; ++j) ws[j] = load<Vec<C>>(w + j * ld + k);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] += xs[i] * ws[j];
  }
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) p[i * ld_p + j] += sum<C>(acc[i][j]);
}

#ifdef ILORA_PAIRS
FN void dot_tile(const bf16* x, const bf16* w, int64_t ld, int64_t n, float* p, int64_t ld_p) {
  __m512 acc[3][4] = {};
  for (int64_t k = 0; k < n; k += 2 * Simd<float>::W) {
    __m512bh xs[3], ws[4];
    for (int i = 0; i < 3; ++i) xs[i] = load<__m512bh>(x + i * ld + k);
    for (int j = 0; j < 4; ++j) ws[j] = load<__m512bh>(w + j * ld + k);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xs[i], ws[j]);
  }
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) p[i * ld_p + j] += sum<float>((Vec<float>)acc[i][j]);
}
#endif

// g[r, k] (+)= Σ_m h[m, r] · x[m, k] for J ranks and 3 vectors of columns.
template <int J, class C, class D>
FN void outer_tile(const C* h, int64_t ld_h, const D* x, int64_t ld, int64_t rows, C* g, bool first) {
  constexpr int W = Simd<C>::W;
  Vec<C> acc[J][3] = {};
  if (!first)
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < 3; ++i) acc[j][i] = load<Vec<C>>(g + j * ld + i * W);
  for (int64_t m = 0; m < rows; ++m) {
    Vec<C> xs[3];
    for (int i = 0; i < 3; ++i) xs[i] = Memory<C, D>::get(x + m * ld + i * W);
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < 3; ++i) acc[j][i] += xs[i] * h[m * ld_h + j];
  }
  for (int j = 0; j < J; ++j)
    for (int i = 0; i < 3; ++i) store(g + j * ld + i * W, acc[j][i]);
}

// y[m, k] = Σ_r h[m, r] · w[r, k] for 4 rows and 3 vectors of columns.
template <class C> FN void expand_tile(const C* h, int64_t ld_h, const C* w, int64_t ld, int64_t R, C* y) {
  constexpr int W = Simd<C>::W;
  Vec<C> acc[4][3] = {};
  for (int64_t r = 0; r < R; ++r) {
    Vec<C> ws[3];
    for (int i = 0; i < 3; ++i) ws[i] = load<Vec<C>>(w + r * ld + i * W);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 3; ++i) acc[j][i] += ws[i] * h[j * ld_h + r];
  }
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 3; ++i) store(y + j * ld + i * W, acc[j][i]);
}
