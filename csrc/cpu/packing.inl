// What happens once for each call: A or B goes in, the sums of partial gradients and of the gate's come out.

FN void convert(float& to, float from) { to = from; }
FN void convert(double& to, double from) { to = from; }
FN void convert(bf16& to, bf16 from) { to = from; }
FN void convert(float& to, bf16 from) { to = Memory<float, bf16>::get_one(&from); }
FN void convert(bf16& to, float from) { Memory<float, bf16>::put_one(&to, from); }

// packed = f in the layout of Packing; PAIRS: [n_chunks][Rp / 2][width][2].
template <bool PAIRS, class S, class O> ILORA_TARGET void pack_as(const Factor& f, const Packing& p, O* packed) {
  for (int64_t i = 0; i < p.size(); ++i) packed[i] = O{};
  const S* src = static_cast<const S*>(f.data);
  for (int64_t c = 0; c < p.n_chunks; ++c) {
    const S* from = src + c * p.width * f.stride_k;
    O* to = packed + p.offset(c);
    const int64_t n = p.columns(c), step = PAIRS ? 2 : 1;
    const auto rank = [&](int64_t r) { return PAIRS ? (r & ~int64_t{1}) * p.width + (r & 1) : r * p.width; };
    if (f.stride_r == 1)
      for (int64_t k = 0; k < n; ++k)
        for (int64_t r = 0; r < p.R; ++r) convert(to[rank(r) + k * step], from[r + k * f.stride_k]);
    else
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t k = 0; k < n; ++k) convert(to[rank(r) + k * step], from[r * f.stride_r + k * f.stride_k]);
  }
}

template <class T, class C, class D> ILORA_TARGET void pack_for_dot(const Factor& f, const Packing& p, void* packed) {
  if (f.narrow) pack_as<false, T>(f, p, static_cast<D*>(packed));
  else if constexpr (sizeof(C) == sizeof(D)) pack_as<false, C>(f, p, static_cast<D*>(packed));
}

template <class T, class C, class D>
ILORA_TARGET void pack_for_expand(const Factor& f, const Packing& p, void* packed) {
  constexpr bool pairs = sizeof(D) < sizeof(C);
  if (f.narrow) pack_as<pairs, T>(f, p, static_cast<D*>(packed));
  else if constexpr (!pairs) pack_as<false, C>(f, p, static_cast<D*>(packed));
}

// out[r, k] = Σ partials, in the order of the row chunks, for a column chunk and kRankStep ranks from first_rank on.
template <class T, class C, class D>
ILORA_TARGET void add_partials(const void* partials, int64_t count, const Packing& p, int64_t chunk,
                               int64_t first_rank, const Factor& out) {
  constexpr int W = Simd<C>::W;
  const C* base = static_cast<const C*>(partials) + p.offset(chunk);
  const int64_t n = p.columns(chunk), last_rank = first_rank + kRankStep < p.R ? first_rank + kRankStep : p.R;
  for (int64_t r = first_rank; r < last_rank; ++r)
    for (int64_t k = 0; k < round_up(n, 32); k += W) {
      Vec<C> total = {};
      for (int64_t i = 0; i < count; ++i) total += load<Vec<C>>(base + i * p.size() + r * p.width + k);
      for (int j = 0; j < W; ++j) {
        const int64_t column = column_of_lane<C, D>(k + j);
        if (column >= n) continue;
        const int64_t at = r * out.stride_r + (chunk * p.width + column) * out.stride_k;
        if (out.narrow) convert(static_cast<T*>(const_cast<void*>(out.data))[at], total[j]);
        else static_cast<C*>(const_cast<void*>(out.data))[at] = total[j];
      }
    }
}

// dgate[i, e] = scaling · Σ over the instance's rows, in row order.
template <class C>
ILORA_TARGET void sum_gates(const Gates& g, const void* dgate_rows, int64_t begin, int64_t end, void* dgate) {
  constexpr int64_t most = 8;  // experts summed side by side
  const int64_t per_gate = g.M / g.N;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = g.segments ? g.segments[i] : i * per_gate;
    const int64_t last = g.segments ? g.segments[i + 1] : first + per_gate;
    for (int64_t e = 0; e < g.E; e += most) {
      const int64_t count = g.E - e < most ? g.E - e : most;
      double total[most] = {};
      for (int64_t m = first; m < last; ++m)
        for (int64_t j = 0; j < count; ++j) total[j] += static_cast<const C*>(dgate_rows)[m * g.E + e + j];
      for (int64_t j = 0; j < count; ++j) static_cast<C*>(dgate)[i * g.E + e + j] = C(g.scaling * total[j]);
    }
  }
}
