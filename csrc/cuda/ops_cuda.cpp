// The ops of ilora_native on a GPU, for the few rows of a decoding step: they check the arguments, allocate the results
// and call decode.cu. They include no CUDA headers.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "decode.h"

namespace ilora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Element element(const char* name, ScalarType type) {
  if (type == ScalarType::Float) return kFloat;
  if (type == ScalarType::BFloat16) return kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " is not float32, bfloat16 or float16");
  return kHalf;
}

int size(Element type) { return type == kFloat ? 4 : 2; }

// Raises unless t is a [rows, columns] tensor of this type on x's device, with columns of stride 1 unless any_stride.
void check(const char* name, const Tensor& t, const Tensor& x, int64_t rows, int64_t columns, ScalarType type,
           bool any_stride = false) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " is not on x's GPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " has the wrong shape");
  STD_TORCH_CHECK(any_stride || columns < 2 || t.stride(1) == 1, name, " has strided columns");
}

bool whole_vectors(const Tensor& t, Element type) { return aligned(t.data_ptr(), t.stride(0), size(type)); }

void set_gate(Decode& d, const Tensor& x, const Tensor& gate, const MaybeTensor& segments) {
  const int64_t N = gate.size(0), E = gate.size(1);
  check("gate", gate, x, N, E, gate.scalar_type(), true);
  STD_TORCH_CHECK(E > 0 && d.R % E == 0, "E does not divide R");
  STD_TORCH_CHECK(N > 0 && N <= std::numeric_limits<int>::max(), "rows without a gate");
  d.N = int(N), d.E = int(E), d.gate = gate.data_ptr(), d.gate_row = gate.stride(0), d.gate_col = gate.stride(1);
  d.gate_type = element("gate", gate.scalar_type());
  if (segments) {  // its values are not checked: to read them, the host would have to wait for the GPU
    STD_TORCH_CHECK(segments->is_cuda() && segments->get_device_index() == x.get_device_index() &&
                        segments->scalar_type() == ScalarType::Int && segments->is_contiguous() &&
                        segments->numel() == N + 1, "segments is not int32 [N + 1] on x's GPU");
    d.segments = static_cast<const int32_t*>(segments->data_ptr());
  } else {
    STD_TORCH_CHECK(d.M % N == 0, "N does not divide M");
  }
}

void set_base(Decode& d, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base) {
  const ScalarType type = x.scalar_type();
  if (weight) {
    check("weight", *weight, x, d.d_out, d.d_in, type);
    d.weight = weight->data_ptr(), d.w_row = weight->stride(0);
    d.vec_w = whole_vectors(x, d.type) && whole_vectors(*weight, d.type);
  }
  if (bias) {
    STD_TORCH_CHECK(bias->is_cuda() && bias->get_device_index() == x.get_device_index() && bias->is_contiguous() &&
                        bias->numel() == d.d_out && bias->scalar_type() == type,
                    "bias is not contiguous [d_out] in x's dtype, on x's GPU");
    d.bias = bias->data_ptr();
  }
  if (base) {
    check("base", *base, x, d.M, d.d_out, type);
    d.base = base->data_ptr(), d.base_row = base->stride(0);
  }
}

std::tuple<Tensor, Tensor> decode(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor base, Tensor A, Tensor B,
                                  Tensor gate, MaybeTensor segments, double scaling) {
  const int64_t M = x.size(0), d_in = x.size(1), d_out = B.size(0), R = A.size(0);
  check("x", x, x, M, d_in, x.scalar_type());
  check("A", A, x, R, d_in, A.scalar_type());
  check("B", B, x, d_out, R, A.scalar_type());
  const int64_t most = weight ? kDecodeFusedRows : kDecodeRows;
  STD_TORCH_CHECK(M <= most && R >= 1 && R <= kDecodeRanks, "ilora_native on a GPU takes ", most, " rows and ",
                  kDecodeRanks, " ranks at most");
  STD_TORCH_CHECK(d_in >= 1 && d_in < 1 << 30 && d_out < 1 << 30, "too many features, or none");
  Tensor y = torch::stable::new_empty(x, {M, d_out}), xa = torch::stable::new_empty(A, {M, R});
  if (M == 0 || d_out == 0) return {y, xa};
  Decode d = {};
  d.M = int(M), d.d_in = int(d_in), d.d_out = int(d_out), d.R = int(R), d.scaling = float(scaling);
  d.type = element("x", x.scalar_type()), d.adapter_type = element("A", A.scalar_type());
  STD_TORCH_CHECK(d.adapter_type == d.type || d.adapter_type == kFloat, "A is not in x's dtype, nor in float32");
  d.x = x.data_ptr(), d.x_row = x.stride(0), d.A = A.data_ptr(), d.a_row = A.stride(0);
  d.B = B.data_ptr(), d.b_row = B.stride(0), d.y = y.data_ptr(), d.xa = xa.data_ptr();
  d.vec_a = whole_vectors(x, d.type) && whole_vectors(A, d.adapter_type);
  d.vec_b = whole_vectors(B, d.adapter_type);
  set_gate(d, x, gate, segments);
  set_base(d, x, weight, bias, base);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  // torch 2.10 and 2.11 have no STABLE_TORCH_ERROR_CODE_CHECK yet.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch_decode(d, stream);
  STD_TORCH_CHECK(!error, "ilora_native on a GPU: ", error);
  return {y, xa};
}

}  // namespace
}  // namespace ilora

STABLE_TORCH_LIBRARY_IMPL(ilora_native, CUDA, m) {
  m.impl("decode", TORCH_BOX(&ilora::decode));
}
