// xa = (x ⊙ keep) Aᵀ
template <class T, class C, class D>
ILORA_TARGET void shrink_x(const ShrinkX& f, int64_t begin, int64_t end, void* memory) {
  const Scratch<C> s(memory, f.a);
  const int64_t Rp = f.a.Rp, ld = f.a.width;
  const D* a = static_cast<const D*>(f.packed_a);
  D* block = reinterpret_cast<D*>(s.block);
  for (int64_t row = begin; row < end; row += kRowBlock) {
    const int64_t rows = end - row < kRowBlock ? end - row : kRowBlock;
    fill_zero(s.p, kRowBlock * Rp);
    for (int64_t c = 0; c < f.a.n_chunks; ++c) {
      const int64_t n = f.a.columns(c);
      const int64_t in_place = columns_in_place<T, C, D>(rows, n, f.dropout);
      if (in_place)
        dot(at<D>(f.x, row, c * ld), f.x.row_stride, kRowBlock * f.x.row_stride, a + f.a.offset(c), ld, rows, in_place,
            s.p, Rp);
      if (in_place == n) continue;
      copy_rows<T, C>(f.x, row, rows, c * ld + in_place, n - in_place, ld, f.dropout, block, static_cast<C*>(nullptr));
      dot(block, ld, 0, a + f.a.offset(c) + in_place, ld, rows, n - in_place, s.p, Rp);
    }
    put_ranks<T>(s.p, Rp, f.xa, row, rows, f.R);
  }
}

template <class T, class C, class D, class O>
ILORA_TARGET void expand_xa_into(const ExpandXa& f, int64_t begin, int64_t end, void* memory) {
  const Scratch<C> s(memory, f.b);
  const int64_t Rp = f.b.Rp;
  const D* b = static_cast<const D*>(f.packed_b);
  const Matrix& added = f.base;
  for (int64_t row = begin; row < end; row += kRowBlock) {
    const int64_t rows = end - row < kRowBlock ? end - row : kRowBlock;
    fill_gamma(f.gates, row, rows, s.gamma, Rp);
    get_ranks<T>(f.xa, row, rows, f.b.R, s.p, Rp);
    for (int64_t i = 0; i < rows * Rp; ++i) s.p[i] *= s.gamma[i];
    const D* h = pairs_of_ranks(s.p, round_up(rows, 4), Rp, reinterpret_cast<D*>(s.pairs));
    for (int64_t c = 0; c < f.b.n_chunks; ++c) {
      const int64_t column = c * f.b.width;
      const T* add = f.bias ? static_cast<const T*>(f.bias) + column : nullptr;
      if (added.data) add = at<T>(added, row, column);
      const Rows<T, C, O> to{at<O>(f.y, row, column), f.y.row_stride, add, added.data ? added.row_stride : 0, nullptr, 0};
      expand(h, b + f.b.offset(c), f.b, f.b.columns(c), rows, to);
    }
  }
}

// y = (γ ⊙ xa) Bᵀ + bias, or + base
template <class T, class C, class D>
ILORA_TARGET void expand_xa(const ExpandXa& f, int64_t begin, int64_t end, void* memory) {
  if (f.narrow_y) expand_xa_into<T, C, D, T>(f, begin, end, memory);
  else expand_xa_into<T, C, D, C>(f, begin, end, memory);
}
