// dgate[m, e] = Σ_{r in e} dh[m, r] · xa[m, r], before the sum over an instance's rows
template <class C> FN void put_gate_rows(const C* dh, const C* xa, int64_t rows, int64_t Rp, const Gates& g, C* dgate) {
  const int64_t ranks = g.R / g.E;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t e = 0; e < g.E; ++e) {
      C total = 0;
      for (int64_t r = e * ranks; r < (e + 1) * ranks; ++r) total += dh[m * Rp + r] * xa[m * Rp + r];
      dgate[m * g.E + e] = total;
    }
}

// dh = dy B, dxa = γ ⊙ dh, dBᵀ = (γ ⊙ xa)ᵀ dy, and the rows of dgate
template <class T, class C, class D>
ILORA_TARGET void backward_dy(const BackwardDy& f, int64_t begin, int64_t end, void* partial, void* memory) {
  const Scratch<C> s(memory, f.b);
  const int64_t R = f.b.R, Rp = f.b.Rp, ld = f.b.width, stride = f.dy.row_stride;
  const D* b = static_cast<const D*>(f.packed_b);
  C* dB = static_cast<C*>(partial);
  D* block = reinterpret_cast<D*>(s.block);
  for (int64_t row = begin; row < end; row += kRowBlock) {
    const int64_t rows = end - row < kRowBlock ? end - row : kRowBlock;
    fill_gamma(f.gates, row, rows, s.gamma, Rp);
    get_ranks<T>(f.xa, row, rows, R, s.h, Rp);
    for (int64_t i = 0; i < rows * Rp; ++i) s.h[i] *= s.gamma[i];
    const D* h = pairs_of_rows(s.h, rows, Rp, reinterpret_cast<D*>(s.pairs));
    fill_zero(s.p, kRowBlock * Rp);
    for (int64_t c = 0; c < f.b.n_chunks; ++c) {
      const int64_t n = f.b.columns(c);
      const int64_t in_place = columns_in_place<T, C, D>(rows, n, Dropout{});
      if (in_place) {
        const D* dy = at<D>(f.dy, row, c * ld);
        dot(dy, stride, kRowBlock * stride, b + f.b.offset(c), ld, rows, in_place, s.p, Rp);
        outer(h, Rp, dy, stride, 0, rows, in_place, dB + f.b.offset(c), ld, row == begin);
      }
      if (in_place == n) continue;
      const int64_t rest = f.b.offset(c) + in_place;
      copy_rows<T, C>(f.dy, row, rows, c * ld + in_place, n - in_place, ld, Dropout{}, block, static_cast<C*>(nullptr));
      dot(block, ld, 0, b + rest, ld, rows, n - in_place, s.p, Rp);
      outer(h, Rp, block, ld, 0, rows, n - in_place, dB + rest, ld, row == begin);
    }
    get_ranks<T>(f.xa, row, rows, R, s.h, Rp);
    put_gate_rows(s.p, s.h, rows, Rp, f.gates, static_cast<C*>(f.dgate_rows) + row * f.gates.E);
    for (int64_t i = 0; i < rows * Rp; ++i) s.p[i] *= s.gamma[i];
    put_ranks<C>(s.p, Rp, Ranks{f.dxa, false}, row, rows, R);
  }
}

// dA = dxaᵀ (x ⊙ keep), dx = keep ⊙ (dxa A)
template <class T, class C, class D, class O>
ILORA_TARGET void backward_x_into(const BackwardX& f, int64_t begin, int64_t end, void* partial, void* memory) {
  const Scratch<C> s(memory, f.a);
  const int64_t Rp = f.a.Rp, ld = f.a.width;
  const D* a = static_cast<const D*>(f.packed_a);
  C *dA = static_cast<C*>(partial), *mask = f.dropout.on && f.dx.data ? s.mask : nullptr;
  D* block = reinterpret_cast<D*>(s.block);
  for (int64_t row = begin; row < end; row += kRowBlock) {
    const int64_t rows = end - row < kRowBlock ? end - row : kRowBlock;
    get_ranks<C>(Ranks{const_cast<void*>(f.dxa), false}, row, rows, f.R, s.p, Rp);
    const D* by_rows = pairs_of_rows(s.p, rows, Rp, reinterpret_cast<D*>(s.pairs));
    const D* by_ranks = pairs_of_ranks(s.p, round_up(rows, 4), Rp, reinterpret_cast<D*>(s.h));
    for (int64_t c = 0; c < f.a.n_chunks; ++c) {
      const int64_t n = f.a.columns(c);
      const int64_t in_place = columns_in_place<T, C, D>(rows, n, f.dropout), rest = f.a.offset(c) + in_place;
      if (in_place)
        outer(by_rows, Rp, at<D>(f.x, row, c * ld), f.x.row_stride, kRowBlock * f.x.row_stride, rows, in_place,
              dA + f.a.offset(c), ld, row == begin);
      if (in_place < n) {
        copy_rows<T, C>(f.x, row, rows, c * ld + in_place, n - in_place, ld, f.dropout, block, mask);
        outer(by_rows, Rp, block, ld, 0, rows, n - in_place, dA + rest, ld, row == begin);
      }
      if (!f.dx.data) continue;
      const Rows<T, C, O> to{at<O>(f.dx, row, c * ld), f.dx.row_stride, nullptr, 0, mask, ld};
      expand(by_ranks, a + f.a.offset(c), f.a, n, rows, to);
    }
  }
}

template <class T, class C, class D>
ILORA_TARGET void backward_x(const BackwardX& f, int64_t begin, int64_t end, void* partial, void* memory) {
  if (f.narrow_dx) backward_x_into<T, C, D, T>(f, begin, end, partial, memory);
  else backward_x_into<T, C, D, C>(f, begin, end, partial, memory);
}
