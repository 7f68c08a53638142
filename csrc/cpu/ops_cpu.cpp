// The ops of ilora_native on the CPU: checks, memory and threads around the kernels of the best instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

namespace ilora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxRowChunks = 32;
constexpr int64_t kPartialBytes = 32 << 20;  // of all row chunks' partial dA and dB; 4 chunks whatever they take

const Kernels& best_kernels(Element element) {
#if defined(__x86_64__)
  static const int level = [] {
    const char* limit = std::getenv("ILORA_ISA");  // "baseline", "avx2", "avx512": to test what lesser machines run
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

struct Types {
  ScalarType x, compute;
  const Kernels& kernels;
  Types(ScalarType x, ScalarType a)
      : x(x), compute(x == ScalarType::Double ? x : ScalarType::Float), kernels(best_kernels(element(x, a))) {}
  static Element element(ScalarType x, ScalarType a) {
    if (x == ScalarType::Float) return kFloat;
    if (x == ScalarType::Double) return kDouble;
    STD_TORCH_CHECK(x == ScalarType::BFloat16, "ilora_native takes float32, bfloat16 and float64");
    return a == x ? kBFloat16All : kBFloat16;
  }
  bool narrow(const Tensor& t) const { return t.scalar_type() == x; }
};

// A [rows, columns] tensor of one of two types; only rows may be strided, unless any_stride.
void check(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType type, ScalarType other,
           bool any_stride = false) {
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type || t.scalar_type() == other, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " has the wrong shape");
  STD_TORCH_CHECK(any_stride || rows == 0 || columns < 2 || t.stride(1) == 1, name, " has strided columns");
}

Matrix matrix(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

Gates make_gates(const Types& types, const Tensor& gate, const MaybeTensor& segments, double scaling, int64_t M,
                 int64_t R) {
  const int64_t N = gate.size(0), E = gate.size(1);
  check("gate", gate, N, E, types.compute, types.compute);
  STD_TORCH_CHECK(gate.is_contiguous() && E > 0 && R % E == 0, "gate is not contiguous, or E does not divide R");
  STD_TORCH_CHECK(M == 0 || N > 0, "rows without a gate");
  Gates g{M, N, E, R, scaling, gate.data_ptr(), nullptr};
  if (segments) {
    STD_TORCH_CHECK(segments->is_cpu() && segments->scalar_type() == ScalarType::Int && segments->is_contiguous() &&
                        segments->numel() == N + 1, "segments is not int32 [N + 1] on the CPU");
    g.segments = static_cast<const int32_t*>(segments->data_ptr());
    STD_TORCH_CHECK(g.segments[0] == 0 && g.segments[N] == M, "segments do not cover the rows");
  } else {
    STD_TORCH_CHECK(N == 0 || M % N == 0, "N does not divide M");
  }
  return g;
}

Dropout make_dropout(int64_t drop_below, const MaybeTensor& seed) {
  if (!seed) return {};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed is not one int64 on the CPU");
  const uint64_t word = *static_cast<const uint64_t*>(seed->data_ptr());
  const uint32_t lo = uint32_t(word), hi = uint32_t(word >> 32);
  return {true, mix(mix(hi ^ kGolden) ^ lo), mix(mix(lo ^ kGolden) ^ hi), uint32_t(drop_below)};
}

void check_params(const Types& types, const Tensor& A, const Tensor& B, int64_t d_in) {
  check("A", A, A.size(0), d_in, types.x, types.compute, true);
  check("B", B, B.size(0), A.size(0), A.scalar_type(), A.scalar_type(), true);
}

struct Memory {  // one aligned allocation, cut into pieces
  char* bytes;
  explicit Memory(size_t size) : bytes(static_cast<char*>(std::malloc(size + kAlign))) {
    STD_TORCH_CHECK(bytes, "out of memory: ", size, " bytes");
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(bytes); }
  char* at(size_t offset) const { return bytes + (kAlign - reinterpret_cast<uintptr_t>(bytes) % kAlign) + offset; }
};

// A and Bᵀ, packed side by side, each in the room that C takes.
void pack(const Types& types, const Tensor& A, const Tensor& B, const Packing& a, const Packing& b,
          Kernels::Pack* pack_a, Kernels::Pack* pack_b, char* packed) {
  const bool narrow = types.narrow(A);
  const int64_t R = A.size(0);
  pack_a(A.data_ptr(), narrow, A.stride(0), A.stride(1), R, a, packed);
  pack_b(B.data_ptr(), narrow, B.stride(1), B.stride(0), R, b, packed + a.size() * types.kernels.size_C);
}

std::tuple<Tensor, Tensor> forward(Tensor x, MaybeTensor bias, MaybeTensor base, Tensor A, Tensor B, Tensor gate,
                                   MaybeTensor segments, double scaling, int64_t drop_below, MaybeTensor seed,
                                   bool wide) {
  const Types types(x.scalar_type(), A.scalar_type());
  const Kernels& k = types.kernels;
  const int64_t M = x.size(0), d_in = x.size(1), d_out = B.size(0), R = A.size(0);
  check("x", x, M, d_in, types.x, types.x);
  check_params(types, A, B, d_in);
  const auto y_type = wide ? types.compute : types.x, xa_type = types.narrow(A) ? types.x : types.compute;
  Tensor y = torch::stable::new_empty(x, {M, d_out}, y_type), xa = torch::stable::new_empty(x, {M, R}, xa_type);
  const Packing a(d_in, R), b(d_out, R);
  Forward f{make_gates(types, gate, segments, scaling, M, R), make_dropout(drop_below, seed), a, b, nullptr, nullptr,
            matrix(x), {}, matrix(y), nullptr, xa.data_ptr(), types.narrow(xa), types.narrow(y)};
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->numel() == d_out && types.narrow(*bias) && !base,
                    "bias is not contiguous [d_out] in x's dtype, or stands beside base");
    f.bias = bias->data_ptr();
  }
  if (base) {
    check("base", *base, M, d_out, types.x, types.x);
    f.base = matrix(*base);
  }
  const Memory packed((a.size() + b.size()) * k.size_C);
  pack(types, A, B, a, b, k.pack_dot, k.pack_expand, packed.at(0));
  f.packed_a = packed.at(0), f.packed_b = packed.at(a.size() * k.size_C);
  torch::stable::parallel_for(0, (M + kRowBlock - 1) / kRowBlock, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch(scratch_size(a, b) * k.size_C);
    k.forward(f, begin * kRowBlock, std::min(end * kRowBlock, M), scratch.at(0));
  });
  return {y, xa};
}

// parallel_for's grain for tasks that read this many elements together: few are not worth waking threads for.
int64_t serial_below(int64_t tasks, int64_t elements) {
  return std::max<int64_t>(1, (tasks << 18) / std::max<int64_t>(elements, 1));
}

// dA and dB from the row chunks' partials, one column chunk a task.
void reduce(const Types& types, const char* partials, int64_t count, const Packing& a, const Packing& b,
            const Tensor& dA, const Tensor& dB) {
  const Kernels& k = types.kernels;
  const int64_t stride = a.size() + b.size(), R = dA.size(0);
  const bool narrow = types.narrow(dA);
  const int64_t tasks = a.n_chunks + b.n_chunks;
  torch::stable::parallel_for(0, tasks, serial_below(tasks, count * stride), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      if (c < a.n_chunks)
        k.reduce(partials, stride, count, a, c, R, dA.data_ptr(), narrow, a.d, 1);
      else
        k.reduce(partials + a.size() * k.size_C, stride, count, b, c - a.n_chunks, R, dB.data_ptr(), narrow, 1, R);
  });
}

// Rows a chunk of partial sums covers: a function of the shapes alone, so that no result depends on the threads.
int64_t rows_per_chunk(int64_t M, int64_t partial_bytes) {
  const int64_t chunks = std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(partial_bytes, 1), 4, kMaxRowChunks);
  return std::max(round_up((M + chunks - 1) / chunks, kRowBlock), kRowBlock);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor xa, Tensor A, Tensor B, Tensor gate,
                                                    MaybeTensor segments, double scaling, int64_t drop_below,
                                                    MaybeTensor seed, bool need_dx, bool wide) {
  const Types types(x.scalar_type(), A.scalar_type());
  const Kernels& k = types.kernels;
  const int64_t M = x.size(0), d_in = x.size(1), d_out = B.size(0), R = A.size(0), E = gate.size(1);
  check("x", x, M, d_in, types.x, types.x);
  check("dy", dy, M, d_out, types.x, types.x);
  check("xa", xa, M, R, types.x, types.compute);
  STD_TORCH_CHECK(xa.is_contiguous(), "xa is not contiguous");
  check_params(types, A, B, d_in);
  Tensor dx = torch::stable::new_empty(x, {need_dx ? M : 0, d_in}, wide ? types.compute : types.x);
  Tensor dA = torch::stable::new_empty(A, {R, d_in}), dB = torch::stable::new_empty(B, {d_out, R});
  Tensor dgate = torch::stable::new_empty(gate, {gate.size(0), E});
  const Packing a(d_in, R), b(d_out, R);
  Backward f{make_gates(types, gate, segments, scaling, M, R), make_dropout(drop_below, seed), a, b, nullptr, nullptr,
             matrix(dy), matrix(x), need_dx ? matrix(dx) : Matrix{}, xa.data_ptr(), types.narrow(xa),
             types.narrow(dx), nullptr};
  const int64_t both = (a.size() + b.size()) * k.size_C;
  const int64_t rows = rows_per_chunk(M, both), chunks = (M + rows - 1) / rows;
  const Memory memory((1 + chunks) * both + M * E * k.size_C);
  pack(types, A, B, a, b, k.pack_expand, k.pack_dot, memory.at(0));
  f.packed_a = memory.at(0), f.packed_b = memory.at(a.size() * k.size_C), f.dgate_rows = memory.at((1 + chunks) * both);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch(scratch_size(a, b) * k.size_C);
    for (int64_t c = begin; c < end; ++c)
      k.backward(f, c * rows, std::min((c + 1) * rows, M), memory.at((1 + c) * both), scratch.at(0));
  });
  reduce(types, memory.at(both), chunks, a, b, dA, dB);
  const int64_t N = gate.size(0);
  torch::stable::parallel_for(0, N, serial_below(N, M * E), [&](int64_t begin, int64_t end) {
    k.sum_gates(f.gates, f.dgate_rows, begin, end, dgate.data_ptr());
  });
  return {dx, dA, dB, dgate};
}

}  // namespace
}  // namespace ilora

STABLE_TORCH_LIBRARY_IMPL(ilora_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&ilora::forward));
  m.impl("backward", TORCH_BOX(&ilora::backward));
}
