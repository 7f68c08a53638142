#include "primitives.h"

#include <string>

#include "parallel.h"

namespace ilora {
namespace {

// Runs f(row_begin, row_end, scratch) over blocks of rows.
template <class F> void for_rows(int64_t M, int64_t scratch_bytes, const F& f) {
  parallel_for(0, (M + kRowBlock - 1) / kRowBlock, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch(scratch_bytes);
    f(begin * kRowBlock, std::min(end * kRowBlock, M), scratch.at(0));
  });
}

// Runs f(row_begin, row_end, partial, scratch) over chunks of rows, and adds the partial gradients into out.
template <class F>
void for_row_chunks(const Kernels& k, int64_t M, const Packing& p, int64_t scratch_bytes, const Factor& out, const F& f) {
  const int64_t rows = rows_of_partial(k, M, p), chunks = (M + rows - 1) / rows;
  const Memory partials(chunks * p.size() * k.size_C);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch(scratch_bytes);
    for (int64_t c = begin; c < end; ++c)
      f(c * rows, std::min((c + 1) * rows, M), partials.at(c * p.size() * k.size_C), scratch.at(0));
  });
  const int64_t groups = p.Rp / kRankStep, tasks = p.n_chunks * groups;
  parallel_for(0, tasks, serial_below(tasks, chunks * p.size()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      k.add_partials(partials.at(0), chunks, p, t / groups, t % groups * kRankStep, out);
  });
}

}  // namespace

const Kernels& best_kernels(Element element) {
#if defined(__x86_64__)
  static const int level = [] {
    const char* limit = std::getenv("ILORA_ISA");  // to test what lesser processors run
    const std::string most = limit ? limit : "";
    STD_TORCH_CHECK(most == "" || most == "baseline" || most == "avx2" || most == "avx512", "ILORA_ISA=", most,
                    ": expected baseline, avx2 or avx512, the most that may be used");
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (most == "baseline" || !has_avx2) return 0;
    if (most == "avx2" || !has_avx512) return 1;
    return most == "avx512" || !__builtin_cpu_supports("avx512bf16") ? 2 : 3;
  }();
  if (level == 3) return avx512bf16::kernels(element);
  if (level == 2) return avx512::kernels(element);
  if (level == 1) return avx2::kernels(element);
#endif
  return baseline::kernels(element);
}

void shrink_x(const Kernels& k, ShrinkX f, const Factor& A) {
  const Memory packed(f.a.size() * k.size_C);
  k.pack_for_dot(A, f.a, packed.at(0));
  f.packed_a = packed.at(0);
  for_rows(f.M, scratch_size(f.a, false) * k.size_C,
           [&](int64_t begin, int64_t end, void* scratch) { k.shrink_x(f, begin, end, scratch); });
}

void expand_xa(const Kernels& k, ExpandXa f, const Factor& Bt) {
  const Memory packed(f.b.size() * k.size_C);
  k.pack_for_expand(Bt, f.b, packed.at(0));
  f.packed_b = packed.at(0);
  for_rows(f.gates.M, scratch_size(f.b, false) * k.size_C,
           [&](int64_t begin, int64_t end, void* scratch) { k.expand_xa(f, begin, end, scratch); });
}

void backward_dy(const Kernels& k, BackwardDy f, const Factor& Bt, const Factor& dBt, void* dgate) {
  const int64_t M = f.gates.M, N = f.gates.N, E = f.gates.E;
  const Memory packed(f.b.size() * k.size_C), dgate_rows(M * E * k.size_C);
  k.pack_for_dot(Bt, f.b, packed.at(0));
  f.packed_b = packed.at(0), f.dgate_rows = dgate_rows.at(0);
  for_row_chunks(k, M, f.b, scratch_size(f.b, false) * k.size_C, dBt,
                 [&](int64_t begin, int64_t end, void* partial, void* scratch) {
                   k.backward_dy(f, begin, end, partial, scratch);
                 });
  parallel_for(0, N, serial_below(N, M * E),
               [&](int64_t begin, int64_t end) { k.sum_gates(f.gates, f.dgate_rows, begin, end, dgate); });
}

void backward_x(const Kernels& k, BackwardX f, const Factor& A, const Factor& dA) {
  const Memory packed(f.a.size() * k.size_C);
  k.pack_for_expand(A, f.a, packed.at(0));
  f.packed_a = packed.at(0);
  for_row_chunks(k, f.M, f.a, scratch_size(f.a, f.dropout.on) * k.size_C, dA,
                 [&](int64_t begin, int64_t end, void* partial, void* scratch) {
                   k.backward_x(f, begin, end, partial, scratch);
                 });
}

}  // namespace ilora
