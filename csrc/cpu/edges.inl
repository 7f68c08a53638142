// What happens once per call: operands in, partial sums and gate gradients out.

// dst = src [R, d] (any strides) as O in the layout of Packing, padding zeroed.
template <class T, class C, class O>
ILORA_TARGET void pack(const void* src, bool narrow, int64_t stride_r, int64_t stride_k, int64_t R, const Packing& p,
                       void* dst) {
  O* out = static_cast<O*>(dst);
  for (int64_t c = 0; c < p.n_chunks; ++c)
    for (int64_t r = 0; r < p.Rp; ++r, out += p.width) {
      const int64_t n = r < R ? p.columns(c) : 0, at = r * stride_r + c * p.width * stride_k;
      if (narrow)
        for (int64_t k = 0; k < n; ++k)
          Memory<C, O>::put_one(out + k, Memory<C, T>::get_one(static_cast<const T*>(src) + at + k * stride_k));
      else
        for (int64_t k = 0; k < n; ++k) Memory<C, O>::put_one(out + k, static_cast<const C*>(src)[at + k * stride_k]);
      for (int64_t k = n; k < p.width; ++k) out[k] = O{};
    }
}

// dst[r, k] = Σ partials, in the order of the row chunks, for the columns of one chunk of the packing.
template <class T, class C>
ILORA_TARGET void reduce(const void* partials, int64_t stride, int64_t count, const Packing& p, int64_t chunk,
                         int64_t R, void* dst, bool narrow, int64_t stride_r, int64_t stride_k) {
  constexpr int W = Simd<C>::W;
  const C* base = static_cast<const C*>(partials) + chunk * p.Rp * p.width;
  const int64_t n = p.columns(chunk);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t k = 0; k < n; k += W) {
      Vec<C> total = {};
      for (int64_t i = 0; i < count; ++i) total += load<Vec<C>>(base + i * stride + r * p.width + k);
      const int64_t at = r * stride_r + (chunk * p.width + k) * stride_k;
      for (int64_t j = 0; j < W && k + j < n; ++j)
        if (narrow) Memory<C, T>::put_one(static_cast<T*>(dst) + at + j * stride_k, total[j]);
        else static_cast<C*>(dst)[at + j * stride_k] = total[j];
    }
}

// dgate[i, e] = scaling · Σ over the instance's rows, in row order.
template <class C>
ILORA_TARGET void sum_gates(const Gates& g, const void* dgate_rows, int64_t begin, int64_t end, void* dgate) {
  const int64_t per_gate = g.M / g.N;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = g.segments ? g.segments[i] : i * per_gate;
    const int64_t last = g.segments ? g.segments[i + 1] : first + per_gate;
    for (int64_t e = 0; e < g.E; ++e) {
      double total = 0;
      for (int64_t m = first; m < last; ++m) total += static_cast<const C*>(dgate_rows)[m * g.E + e];
      static_cast<C*>(dgate)[i * g.E + e] = C(g.scaling * total);
    }
  }
}
