#include "grouped.h"

#include <vector>

#include "parallel.h"

namespace ilora {
namespace {

constexpr int64_t kForwardRows = 4 * kRowBlock;  // of a piece, where nothing is summed over rows

struct Piece { int64_t slot, begin, end; };  // rows of one slot

// The rows of each slot in order, long runs cut into pieces of `rows`.
std::vector<Piece> cut(const Slots& slots, int64_t rows) {
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < slots.count; ++s)
    for (int64_t m = slots.offsets[s]; m < slots.offsets[s + 1]; m += rows)
      pieces.push_back({s, m, std::min<int64_t>(m + rows, slots.offsets[s + 1])});
  return pieces;
}

// Runs f(i, packed, scratch) for each piece; pack(slot, packed) goes before it, once for pieces of one slot in a row.
template <class P, class F>
void for_pieces(const Kernels& k, const std::vector<Piece>& pieces, const Packing& p, bool mask, const P& pack,
                const F& f) {
  const int64_t count = pieces.size(), rows = count ? pieces.back().end : 0;
  parallel_for(0, count, serial_below(count, count * p.size() + rows * p.d), [&](int64_t begin, int64_t end) {
    const Memory packed(p.size() * k.size_C), scratch(scratch_size(p, mask) * k.size_C);
    for (int64_t i = begin; i < end; ++i) {
      if (i == begin || pieces[i].slot != pieces[i - 1].slot) pack(pieces[i].slot, packed.at(0));
      f(i, packed.at(0), scratch.at(0));
    }
  });
}

// out of each slot = the sum of the partial gradients of its pieces, in their order; zero without any.
void add_pieces(const Kernels& k, const std::vector<Piece>& pieces, const Memory& partials, const Packing& p,
                const Slots& slots, const Factors& out) {
  std::vector<int64_t> first(slots.count + 1, 0);
  for (const Piece& piece : pieces) ++first[piece.slot + 1];
  for (int64_t s = 0; s < slots.count; ++s) first[s + 1] += first[s];
  const int64_t groups = p.Rp / kRankStep, tasks = slots.count * p.n_chunks * groups;
  const int64_t elements = (slots.count + pieces.size()) * p.size();
  parallel_for(0, tasks, serial_below(tasks, elements), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t s = t / (p.n_chunks * groups), chunk = t / groups % p.n_chunks;
      k.add_partials(partials.at(first[s] * p.size() * k.size_C), first[s + 1] - first[s], p, chunk,
                     t % groups * kRankStep, out.of(s));
    }
  });
}

// dgate[i, e] = scaling · Σ over the instance's rows, in row order.
template <class C> void sum_by_instance(const Gates& g, const C* dgate_rows, C* dgate) {
  std::vector<double> totals(g.N * g.E, 0.0);
  for (int64_t m = 0; m < g.M; ++m)
    for (int64_t e = 0; e < g.E; ++e) totals[g.instances[m] * g.E + e] += dgate_rows[m * g.E + e];
  for (int64_t i = 0; i < g.N * g.E; ++i) dgate[i] = C(g.scaling * totals[i]);
}

}  // namespace

void grouped_shrink_x(const Kernels& k, ShrinkX f, const Slots& slots, const Factors& A) {
  const auto pieces = cut(slots, kForwardRows);
  for_pieces(
      k, pieces, f.a, false, [&](int64_t slot, void* packed) { k.pack_for_dot(A.of(slot), f.a, packed); },
      [&](int64_t i, const void* packed, void* scratch) {
        ShrinkX own = f;
        own.packed_a = packed;
        k.shrink_x(own, pieces[i].begin, pieces[i].end, scratch);
      });
}

void grouped_expand_xa(const Kernels& k, ExpandXa f, const Slots& slots, const Factors& Bt, int64_t bias_stride) {
  const auto pieces = cut(slots, kForwardRows);
  for_pieces(
      k, pieces, f.b, false, [&](int64_t slot, void* packed) { k.pack_for_expand(Bt.of(slot), f.b, packed); },
      [&](int64_t i, const void* packed, void* scratch) {
        ExpandXa own = f;
        own.packed_b = packed;
        if (f.bias) own.bias = static_cast<const char*>(f.bias) + pieces[i].slot * bias_stride;
        k.expand_xa(own, pieces[i].begin, pieces[i].end, scratch);
      });
}

void grouped_backward_dy(const Kernels& k, BackwardDy f, const Slots& slots, const Factors& Bt, const Factors& dBt,
                         void* dgate) {
  const auto pieces = cut(slots, rows_of_partial(k, f.gates.M, f.b));
  const Memory partials(pieces.size() * f.b.size() * k.size_C), dgate_rows(f.gates.M * f.gates.E * k.size_C);
  f.dgate_rows = dgate_rows.at(0);
  for_pieces(
      k, pieces, f.b, false, [&](int64_t slot, void* packed) { k.pack_for_dot(Bt.of(slot), f.b, packed); },
      [&](int64_t i, const void* packed, void* scratch) {
        BackwardDy own = f;
        own.packed_b = packed;
        k.backward_dy(own, pieces[i].begin, pieces[i].end, partials.at(i * f.b.size() * k.size_C), scratch);
      });
  add_pieces(k, pieces, partials, f.b, slots, dBt);
  if (k.size_C == sizeof(float))
    sum_by_instance(f.gates, static_cast<const float*>(f.dgate_rows), static_cast<float*>(dgate));
  else
    sum_by_instance(f.gates, static_cast<const double*>(f.dgate_rows), static_cast<double*>(dgate));
}

void grouped_backward_x(const Kernels& k, BackwardX f, const Slots& slots, const Factors& A, const Factors& dA) {
  const auto pieces = cut(slots, rows_of_partial(k, f.M, f.a));
  const Memory partials(pieces.size() * f.a.size() * k.size_C);
  for_pieces(
      k, pieces, f.a, f.dropout.on, [&](int64_t slot, void* packed) { k.pack_for_expand(A.of(slot), f.a, packed); },
      [&](int64_t i, const void* packed, void* scratch) {
        BackwardX own = f;
        own.packed_a = packed;
        k.backward_x(own, pieces[i].begin, pieces[i].end, partials.at(i * f.a.size() * k.size_C), scratch);
      });
  add_pieces(k, pieces, partials, f.a, slots, dA);
}

}  // namespace ilora
