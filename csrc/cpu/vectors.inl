// Vectors of ILORA_BYTES bytes through the GCC/Clang vector extension, and the passage between memory's element types
// and the type computed in. Included inside namespace ilora::ILORA_ISA; FN gives each function its instruction set.

struct bf16 { uint16_t bits; };

template <class C> struct IntOf { using S = int32_t; using U = uint32_t; };
template <> struct IntOf<double> { using S = int64_t; using U = uint64_t; };

template <class C> struct Simd {
  static constexpr int W = ILORA_BYTES / sizeof(C);
  using S = typename IntOf<C>::S;
  typedef C V __attribute__((vector_size(ILORA_BYTES)));
  typedef S Mask __attribute__((vector_size(ILORA_BYTES)));                       // lanes 0 or -1
  typedef uint32_t Word __attribute__((vector_size(ILORA_BYTES / sizeof(C) * 4)));  // W words, for the hash
  typedef int32_t SWord __attribute__((vector_size(ILORA_BYTES / sizeof(C) * 4)));
  typedef uint16_t Half __attribute__((vector_size(ILORA_BYTES / sizeof(C) * 2)));
};
template <class C> using Vec = typename Simd<C>::V;
template <class C> using MaskVec = typename Simd<C>::Mask;

template <class V, class P> FN V load(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P> FN void store(P* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }

// One vector of C read from, or rounded to, W elements of T.
template <class C, class T> struct Memory;
template <class C> struct Memory<C, C> {
  static FN Vec<C> get(const C* p) { return load<Vec<C>>(p); }
  static FN void put(C* p, Vec<C> v) { store(p, v); }
  static FN C get_one(const C* p) { return *p; }
  static FN void put_one(C* p, C v) { *p = v; }
};
template <> struct Memory<float, bf16> {
  using F = Simd<float>;
  static FN Vec<float> get(const bf16* p) {
    const auto wide = __builtin_convertvector(load<F::Half>(p), F::Word) << 16;
    return load<Vec<float>>(&wide);
  }
#ifdef ILORA_PAIRS
  static FN void put(bf16* p, Vec<float> v) { store(p, _mm512_cvtneps_pbh((__m512)v)); }  // subnormals become zero
#else
  static FN void put(bf16* p, Vec<float> v) {  // to nearest, ties to even; NaN stays NaN
    const auto u = load<F::Word>(&v);
    const F::Word is_nan = (F::Word)(v != v);
    const F::Word rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    store(p, __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), F::Half));
  }
#endif
  static FN float get_one(const bf16* p) {
    const uint32_t wide = uint32_t(p->bits) << 16;
    return load<float>(&wide);
  }
  static FN void put_one(bf16* p, float v) {
    const auto u = load<uint32_t>(&v);
    p->bits = uint16_t(v != v ? 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
};

template <class C, class T> FN Vec<C> get_some(const T* p, int64_t n) {  // n < W elements, the rest zero
  T buffer[Simd<C>::W] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return Memory<C, T>::get(buffer);
}
template <class C, class T> FN void put_some(T* p, Vec<C> v, int64_t n) {
  T buffer[Simd<C>::W];
  Memory<C, T>::put(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class C> FN Vec<C> masked(Vec<C> v, MaskVec<C> mask) {
  const auto bits = load<MaskVec<C>>(&v) & mask;
  return load<Vec<C>>(&bits);
}

// W elements of x as a block of copied rows holds them.
template <class T, class C, class D> struct Copied {
  using V = Vec<C>;
  static FN V get(const T* p) { return Memory<C, T>::get(p); }
  static FN V some(const T* p, int64_t n) { return get_some<C, T>(p, n); }
  static FN V masked(V v, MaskVec<C> mask) { return ILORA_ISA::masked<C>(v, mask); }
};
template <> struct Copied<bf16, float, bf16> {
  using V = Simd<float>::Half;
  static FN V get(const bf16* p) { return load<V>(p); }
  static FN V some(const bf16* p, int64_t n) {
    V v = {};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i].bits;
    return v;
  }
  static FN V masked(V v, MaskVec<float> mask) { return v & __builtin_convertvector(mask, V); }
};

#ifdef ILORA_PAIRS
template <class C> using PairsOr = bf16;
#else
template <class C> using PairsOr = C;
#endif

// keep of W consecutive columns of a row; next() moves on by W.
constexpr uint32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
template <class C> struct KeepMask {
  using W = typename Simd<C>::Word;
  W counter, key2, threshold;
  FN KeepMask(const Dropout& p, int64_t row, int64_t column) {
    const uint32_t k1 = mix(uint32_t(row) ^ p.s1);
    key2 = W{} + mix(k1 + p.s2);
    threshold = W{} + p.threshold;
    counter = (load<W>(kLanes) + uint32_t(column)) * kGolden + k1;
  }
  FN MaskVec<C> next() {
    W v = counter;
    counter += kGolden * uint32_t(Simd<C>::W);
    v = (v ^ v >> 16) * kMul1;
    v = ((v ^ v >> 15) + key2) * kMul2;
    return __builtin_convertvector((typename Simd<C>::SWord)(v >= threshold), MaskVec<C>);
  }
};
