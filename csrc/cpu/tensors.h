// Tensors as the ops of ilora_native take them: checked, and their memory as the primitives take it.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "primitives.h"

namespace ilora::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

struct Types {  // of one call: x's, the one that sums have, and whether A and B have x's or the sums'
  ScalarType x, sums;
  const Kernels& kernels;
  Types(const Tensor& like_x, const Tensor& factor)
      : x(like_x.scalar_type()), sums(x == ScalarType::Double ? x : ScalarType::Float),
        kernels(best_kernels(element(x, factor.scalar_type()))) {}
  static Element element(ScalarType x, ScalarType factor) {
    if (x == ScalarType::Float) return kFloat;
    if (x == ScalarType::Double) return kDouble;
    STD_TORCH_CHECK(x == ScalarType::BFloat16, "ilora_native takes float32, bfloat16 and float64");
    return factor == x ? kBFloat16All : kBFloat16;
  }
  bool narrow(const Tensor& t) const { return t.scalar_type() == x; }
};

inline void check(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType type, ScalarType other) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type || t.scalar_type() == other, name, ": has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected [", rows, ", ", columns,
                  "]");
}

inline Tensor empty(int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) == 0,
                  "ilora_native: out of memory: [", rows, ", ", columns, "]");
  return Tensor(handle);
}

// t, or a copy of it whose neighbouring columns lie side by side; an expanded gradient has stride 0, for example.
inline Tensor dense_rows(const Tensor& t) {
  return t.dim() != 2 || t.size(1) < 2 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Matrix matrix(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

inline Ranks ranks(const char* name, const Types& types, const Tensor& t, int64_t M, int64_t R) {
  check(name, t, M, R, types.x, types.sums);
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  return {t.data_ptr(), types.narrow(t)};
}

inline Dropout dropout(int64_t drop_below, const MaybeTensor& seed) {
  if (!seed || drop_below == 0) return {false, 0, 0, 0};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: expected one int64 on the CPU");
  const uint64_t value = *static_cast<const int64_t*>(seed->data_ptr());
  const uint32_t low = uint32_t(value), high = uint32_t(value >> 32);
  return {true, mix(mix(high ^ kGolden) ^ low), mix(mix(low ^ kGolden) ^ high), uint32_t(drop_below)};
}

}  // namespace ilora::ops
