// Rows on their way in and out: what a block of them looks like in scratch, and how finished rows are stored.

template <class C> struct Scratch {  // of one thread; see scratch_size
  C *p, *gamma, *h, *pairs, *block, *mask;
  ILORA_TARGET Scratch(void* memory, const Packing& pack) {
    const int64_t side = kRowBlock * pack.Rp;
    p = static_cast<C*>(memory), gamma = p + side, h = gamma + side, pairs = h + side;
    block = pairs + side, mask = block + kRowBlock * pack.width;
  }
};

template <class C> FN void fill_zero(C* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

template <class T> FN T* at(const Matrix& t, int64_t row, int64_t column) {
  return static_cast<T*>(t.data) + row * t.row_stride + column;
}

// γ of a block's rows, [rows, Rp]; zero for the ranks of the padding.
template <class C> ILORA_TARGET void fill_gamma(const Gates& g, int64_t row, int64_t rows, C* gamma, int64_t Rp) {
  const int64_t per_gate = g.N ? g.M / g.N : 1, ranks = g.R / g.E;
  int64_t i = 0;
  if (g.segments && !g.instances) {
    int64_t low = 0, high = g.N;  // find the first segment that ends after the row
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (g.segments[middle + 1] <= row) low = middle + 1; else high = middle;
    }
    i = low;
  }
  int64_t previous = -1;
  for (int64_t m = 0; m < rows; ++m, gamma += Rp) {
    if (g.instances) i = g.instances[row + m];
    else if (!g.segments) i = (row + m) / per_gate;
    else while (i < g.N && g.segments[i + 1] <= row + m) ++i;
    if (i >= g.N) i = g.N - 1;
    const C* gate = static_cast<const C*>(g.gate) + i * g.E;
    if (i == previous)
      for (int64_t r = 0; r < Rp; ++r) gamma[r] = gamma[r - Rp];
    else
      for (int64_t r = 0; r < Rp; ++r) gamma[r] = r < g.R ? C(gate[r / ranks] * g.scaling) : C(0);
    previous = i;
  }
}

// p [rows, Rp] = rows of src [M, R], zero for the ranks and rows of the padding.
template <class T, class C>
ILORA_TARGET void get_ranks(const Ranks& src, int64_t row, int64_t rows, int64_t R, C* p, int64_t Rp) {
  constexpr int64_t W = Simd<C>::W;
  const int64_t at = row * R, n = rows * R;
  fill_zero(p + rows * Rp, (round_up(rows, kRowPad) - rows) * Rp);
  if (src.narrow && Rp == R) {  // no padding between the rows, so they go as one
    const T* from = static_cast<const T*>(src.data) + at;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(p + i, Memory<C, T>::get(from + i));
    for (; i < n; ++i) convert(p[i], from[i]);
    return;
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t r = 0; r < R; ++r)
      if (src.narrow) convert(p[m * Rp + r], static_cast<const T*>(src.data)[at + m * R + r]);
      else p[m * Rp + r] = static_cast<const C*>(src.data)[at + m * R + r];
    for (int64_t r = R; r < Rp; ++r) p[m * Rp + r] = 0;
  }
}

// The reverse.
template <class T, class C>
ILORA_TARGET void put_ranks(const C* p, int64_t Rp, const Ranks& dst, int64_t row, int64_t rows, int64_t R) {
  constexpr int64_t W = Simd<C>::W;
  if (dst.narrow && Rp == R) {  // no padding between the rows, so they go as one
    T* out = static_cast<T*>(dst.data) + row * R;
    const int64_t n = rows * R;
    int64_t i = 0;
    for (; i + W <= n; i += W) Memory<C, T>::put(out + i, load<Vec<C>>(p + i));
    for (; i < n; ++i) convert(out[i], p[i]);
    return;
  }
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r = 0; r < R; ++r)
      if (dst.narrow) convert(static_cast<T*>(dst.data)[(row + m) * R + r], p[m * Rp + r]);
      else static_cast<C*>(dst.data)[(row + m) * R + r] = p[m * Rp + r];
}

// Columns [column, column + n) of the rows, as D in [rows rounded up to kRowPad, ld]; under dropout what is dropped is
// zero, and the mask is kept if there is room for it.
template <class T, class C, class D>
ILORA_TARGET void copy_rows(const Matrix& x, int64_t row, int64_t rows, int64_t column, int64_t n, int64_t ld,
                            const Dropout& dropout, D* block, C* mask) {
  using Piece = Copied<T, C, D>;
  constexpr int W = Simd<C>::W;
  const int64_t padded = round_up(n, kColStep);
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
        __builtin_prefetch(src + k + 2 * x.row_stride);  // a chunk's rows are too short for the hardware to foresee
        store(dst + k, Piece::get(src + k));
      }
      if (k < n) store(dst + k, Piece::some(src + k, n - k)), k += W;
    }
    for (; k < padded; k += W) store(dst + k, typename Piece::V{});
  }
  for (int64_t m = rows; m < round_up(rows, kRowPad); ++m)
    for (int64_t k = 0; k < padded; k += W) store(block + m * ld + k, typename Piece::V{});
}

// h [rows, Rp] as outer and expand read it: itself, or rounded to bf16, pairs of rows or of ranks side by side.
template <class C> FN const C* pairs_of_rows(const C* h, int64_t, int64_t, C*) { return h; }
template <class C> FN const C* pairs_of_ranks(const C* h, int64_t, int64_t, C*) { return h; }
#ifdef ILORA_PAIRS
ILORA_TARGET const bf16* pairs_of_rows(const float* h, int64_t rows, int64_t Rp, bf16* pairs) {
  const __m256i order = _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int64_t m = 0; m < rows; m += 2)
    for (int64_t r = 0; r < Rp; r += 4) {
      const __m256 both = _mm256_set_m128(load<__m128>(h + (m + 1) * Rp + r), load<__m128>(h + m * Rp + r));
      const __m256i rounded = _mm256_castsi128_si256((__m128i)_mm256_cvtneps_pbh(both));
      store(pairs + m * Rp + 2 * r, _mm256_castsi256_si128(_mm256_permutexvar_epi16(order, rounded)));
    }
  return pairs;
}
ILORA_TARGET const bf16* pairs_of_ranks(const float* h, int64_t rows, int64_t Rp, bf16* pairs) {
  for (int64_t i = 0; i < rows * Rp; i += 16) Memory<float, bf16>::put(pairs + i, load<Vec<float>>(h + i));
  return pairs;
}
#endif

// Where expand's rows go and what is added to them: out = keep ⊙ sums + add.
template <class T, class C, class O> struct Rows {
  O* out;
  int64_t stride;
  const T* add;  // or null
  int64_t add_stride;
  const C* mask;  // or null
  int64_t mask_stride;

  FN void put(int64_t m, int64_t k, Vec<C> v) const {
    if (mask) v = masked<C>(v, load<MaskVec<C>>(mask + m * mask_stride + k));
    if (add) v += Memory<C, T>::get(add + m * add_stride + k);
    Memory<C, O>::put(out + m * stride + k, v);
  }
  // At the edges: `rows` rows of 3 vectors, of which n elements belong to out.
  ILORA_TARGET __attribute__((noinline)) void put_strip(int64_t m, int64_t k, const C* strip, int64_t rows,
                                                        int64_t n) const {
    constexpr int64_t W = Simd<C>::W;
    for (int64_t end = m + rows; m < end; ++m, strip += 3 * W)
      for (int64_t i = 0; i < 3 * W && i < n; i += W) {
        auto v = load<Vec<C>>(strip + i);
        if (i + W <= n) {
          put(m, k + i, v);
          continue;
        }
        if (mask) v = masked<C>(v, load<MaskVec<C>>(mask + m * mask_stride + k + i));
        if (add) v += get_some<C, T>(add + m * add_stride + k + i, n - i);
        put_some<C, O>(out + m * stride + k + i, v, n - i);
      }
  }
  FN void prefetch(int64_t m, int64_t rows, int64_t n) const {  // so that the lines are there when they are written
    for (int64_t j = m; j < m + rows; ++j)
      for (int64_t k = 0; k < n; k += kAlign / sizeof(O)) __builtin_prefetch(out + j * stride + k, 1);
  }
};

// A chunk of columns: out = keep ⊙ (h · w) + add
template <class T, class C, class D, class O>
ILORA_TARGET void expand(const D* h, const D* w, const Packing& pack, int64_t n, int64_t rows, Rows<T, C, O> to) {
  constexpr int64_t W = Simd<C>::W, step = sizeof(C) / sizeof(D);  // pairs of ranks lie side by side in w
  const int64_t R = pack.R, Rp = pack.Rp, ld = pack.width;
  for (int64_t m = 0; m < rows; m += 4) {
    const int64_t count = rows - m < 4 ? rows - m : 4;
    to.prefetch(m, count, n);
    for (int64_t k = 0; k < n; k += 3 * W) {
      const Sums<C> sums = expand_tile(h + m * Rp, Rp, w + k * step, ld, R);
      if (count == 4 && k + 3 * W <= n) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 3
          for (int i = 0; i < 3; ++i) to.put(m + j, k + i * W, sums.of[j][i]);
      } else {
        C strip[4][3 * W];
        store(&strip[0][0], sums);
        to.put_strip(m, k, &strip[0][0], count, n - k);
      }
    }
  }
}
