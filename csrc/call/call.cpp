// The module ilora._call: a call of the operation on the CPU, from its checks to its autograd node, in one step of C++.
// It takes the common case and returns None for every other, also for what the checks in Python will refuse. It calls the
// same primitives and products as ilora/op/native.py, in the same order, so its results are the same to the bit.
// Built against the torch that is installed, whose version it says; ilora/op/native.py passes it over under another.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <cmath>
#include <cstdlib>

namespace ilora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kFewRows = 16, kMaxRank = 256;  // FEW_ROWS of native.py, MAX_RANK of checks.py
bool hardware_bfloat16 = false;                   // _HARDWARE_BFLOAT16 of native.py

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Arguments {
  Tensor x, weight;
  MaybeTensor bias;
  Tensor A, B, gate;
  double scaling = 0, dropout_p = 0;  // scaling with the 1/(1-p) of dropout
};

// ---------------------------------------------------------------------------------------------- the arithmetic

bool through_float32(const Tensor& a, int64_t stride) {
  return a.scalar_type() == at::kBFloat16 && !hardware_bfloat16 && (a.size(0) >= 8 || stride != 1);
}

Tensor add_product(Tensor out, const Tensor& a, const Tensor& b) {
  const auto type = out.scalar_type();
  if (out.size(0) < kFewRows || out.size(1) < kFewRows)
    out.add_(at::mm(a.to(type), b.to(type)));
  else
    out.addmm_(a.to(type), b.to(type));
  return out.to(a.scalar_type());
}

Tensor dense_gate(const Tensor& gate, const Tensor& x) {
  return gate.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

int64_t drop_below(double dropout_p) {
  return std::min<int64_t>(std::llrint(std::nearbyint(dropout_p * 0x1p32)), 0xFFFFFFFF);
}

std::tuple<Tensor, Tensor> forward(const Arguments& f, const MaybeTensor& seed) {
  static const auto shrink_x =
      find_op<Tensor(const Tensor&, const Tensor&, int64_t, const MaybeTensor&)>("ilora_native::shrink_x");
  static const auto expand_xa =
      find_op<Tensor(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                     const MaybeTensor&, double, bool)>("ilora_native::expand_xa");
  static const auto decode =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                         const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, double)>(
          "ilora_native::decode");
  const Tensor x = f.x.dim() == 2 ? f.x : f.x.reshape({-1, f.x.size(-1)}), turned = f.weight.t();
  const Tensor gate = dense_gate(f.gate, x);
  const bool wide = through_float32(x, turned.stride(0));
  Tensor y, xa;
  if (x.size(0) < kFewRows && !seed && !wide) {
    std::tie(y, xa) = decode.call(x, f.weight, f.bias, std::nullopt, f.A, f.B, gate, std::nullopt, f.scaling);
  } else {
    xa = shrink_x.call(x, f.A, drop_below(f.dropout_p), seed);
    y = expand_xa.call(x, xa, f.bias, std::nullopt, f.B, gate, std::nullopt, f.scaling, wide);
    y = add_product(std::move(y), x, turned);
  }
  if (f.x.dim() != 2) {
    auto shape = f.x.sizes().vec();
    shape.back() = f.B.size(0);
    y = at::_unsafe_view(y, shape);  // not view: autograd would refuse in-place operations on a node's output
  }
  return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Arguments& f, const Tensor& xa, const MaybeTensor& seed,
                                                    const Tensor& dy_any, bool need_dx) {
  static const auto backward_dy =
      find_op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                 const MaybeTensor&, double)>("ilora_native::backward_dy");
  static const auto backward_x =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, const MaybeTensor&, bool,
                                         bool)>("ilora_native::backward_x");
  const Tensor dy = dy_any.reshape({-1, dy_any.size(-1)}), x = f.x.reshape({-1, f.x.size(-1)});
  auto [dxa, dB, dgate] = backward_dy.call(dy, xa, f.B, dense_gate(f.gate, dy), std::nullopt, f.scaling);
  const bool wide = need_dx && through_float32(dy, f.weight.stride(0));
  auto [dx, dA] = backward_x.call(dxa, x, f.A, drop_below(f.dropout_p), seed, need_dx, wide);
  if (need_dx) dx = add_product(dx, dy, f.weight).view(f.x.sizes());
  return {dx, dA, dB, dgate.to(f.gate.scalar_type())};
}

// ---------------------------------------------------------------------------------------------- the common case

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) { return !(keys.raw_repr() & ~allowed.raw_repr()); }

// A dense CPU tensor that nothing but autograd watches: no subclass, transform, lazy negation or forward-mode tangent.
bool plain(const Tensor& t) {
  static const auto allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                           c10::DispatchKey::ADInplaceOrView});
  return within(t.key_set(), allowed) && !t._fw_grad(0).defined();
}

// Whether this thread runs without modes: dispatch and function modes, transforms of torch.func, tracing, autocast.
bool no_mode_is_on() {
  return within(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set) &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !at::impl::torch_function_mode_enabled();
}

// The rules of check_tensors and check_dtypes in checks.py.
bool allowed(const Arguments& f) {
  const auto type = f.x.scalar_type(), low = f.A.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16 && type != at::kDouble) return false;
  if (f.weight.scalar_type() != type || f.B.scalar_type() != low || !at::isFloatingType(f.gate.scalar_type())) return false;
  if (low != type && !(low == at::kFloat && type == at::kBFloat16)) return false;
  if (f.x.dim() < 1 || f.weight.dim() != 2 || f.A.dim() != 2 || f.B.dim() != 2 || f.gate.dim() != 2) return false;
  const int64_t d_in = f.x.size(-1), d_out = f.B.size(0), R = f.A.size(0), N = f.gate.size(0), E = f.gate.size(1);
  if (f.x.numel() == 0 || f.A.size(1) != d_in || f.B.size(1) != R || d_out < 1 || R < 1 || R > kMaxRank) return false;
  if (f.weight.size(0) != d_out || f.weight.size(1) != d_in || E < 1 || R % E || N < 1) return false;
  if (f.bias && !(f.bias->scalar_type() == type && f.bias->dim() == 1 && f.bias->size(0) == d_out &&
                  f.bias->is_contiguous()))
    return false;
  // gate_fits of checks.py, but for the products of several leading dimensions that are not all
  const int64_t first = f.x.dim() > 1 ? f.x.size(0) : 1;
  return (first % N == 0 || f.x.numel() == N * d_in) && f.dropout_p >= 0 && f.dropout_p < 1;
}

// ---------------------------------------------------------------------------------------------- autograd

struct Layer : torch::autograd::Function<Layer> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        const Tensor& A, const Tensor& B, const Tensor& gate, double scaling, double dropout_p,
                        const MaybeTensor& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, xa] = ilora::forward({x, weight, bias, A, B, gate, scaling, dropout_p}, seed);
    ctx->save_for_backward({x, xa, weight, A, B, gate, seed.value_or(Tensor())});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["bias"] = bias.has_value();
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list dys) {
    variable_list grads(9);
    const Tensor& dy = dys[0];
    if (!dy.defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &xa = saved[1], &weight = saved[2], &A = saved[3], &B = saved[4], &gate = saved[5];
    const MaybeTensor seed = saved[6].defined() ? MaybeTensor(saved[6]) : std::nullopt;
    const double scaling = ctx->saved_data["scaling"].toDouble(), dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const bool need_dx = ctx->needs_input_grad(0);
    const bool common = !at::GradMode::is_enabled() && no_mode_is_on() && plain(dy) && plain(x) && plain(xa) &&
                        plain(weight) && plain(A) && plain(B) && plain(gate) && dy.scalar_type() == x.scalar_type();
    std::tuple<Tensor, Tensor, Tensor, Tensor> found;
    if (common) {
      at::AutoDispatchBelowADInplaceOrView guard;
      found = ilora::backward({x, weight, std::nullopt, A, B, gate, scaling, dropout_p}, xa, seed, dy, need_dx);
    } else {  // under create_graph, say: this op refuses to be differentiated again
      static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&,
          const MaybeTensor&, double, double, const MaybeTensor&, bool, c10::string_view)>("ilora::backward");
      found = op.call(dy, x, xa, weight, A, B, gate, std::nullopt, scaling, dropout_p, seed, need_dx, "native");
    }
    const auto flat = [](const Tensor& t) { return t.reshape({-1, t.size(-1)}); };
    if (need_dx) grads[0] = std::get<0>(found);
    if (ctx->needs_input_grad(1)) grads[1] = at::mm(flat(dy).t(), flat(x));
    const bool bias = ctx->saved_data["bias"].toBool();  // needs_input_grad does not count a missing one
    if (bias && ctx->needs_input_grad(2)) grads[2] = flat(dy).sum(0);
    if (ctx->needs_input_grad(2 + bias)) grads[3] = std::get<1>(found);
    if (ctx->needs_input_grad(3 + bias)) grads[4] = std::get<2>(found);
    if (ctx->needs_input_grad(4 + bias)) grads[5] = std::get<3>(found);
    return grads;
  }
};

// ---------------------------------------------------------------------------------------------- the Python function

// Reads a plain Tensor or Parameter, and of these no subclass.
bool read(PyObject* object, Tensor& into) {
  if (!THPVariable_CheckExact(object)) return false;
  into = THPVariable_Unpack(object);
  return plain(into);
}

// The backend that is asked for, or ILORA_BACKEND, leaves the choice to this module.
bool native_is_wanted(PyObject* backend) {
  if (backend != Py_None) return PyUnicode_Check(backend) && PyUnicode_CompareWithASCIIString(backend, "native") == 0;
  const char* variable = std::getenv("ILORA_BACKEND");
  return !variable || !*variable || std::string_view(variable) == "native";
}

// ilora_linear(x, weight, bias, A, B, gate, scaling, dropout_p, backend) -> y, or None for what is no common case.
PyObject* ilora_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments f;
  TORCH_CHECK(count == 9, "ilora._call.ilora_linear takes 9 arguments");
  if (args[2] != Py_None && !read(args[2], f.bias.emplace())) Py_RETURN_NONE;
  if (!read(args[0], f.x) || !read(args[1], f.weight) || !read(args[3], f.A) || !read(args[4], f.B) ||
      !read(args[5], f.gate) || !PyFloat_CheckExact(args[6]) || !PyFloat_CheckExact(args[7]) ||
      !native_is_wanted(args[8]))
    Py_RETURN_NONE;
  f.scaling = PyFloat_AS_DOUBLE(args[6]);
  f.dropout_p = PyFloat_AS_DOUBLE(args[7]);
  if (!no_mode_is_on() || !allowed(f)) Py_RETURN_NONE;
  f.scaling /= 1 - f.dropout_p;
  Tensor y;
  {
    pybind11::gil_scoped_release release;
    MaybeTensor seed;
    if (f.dropout_p > 0) seed = at::randint(INT64_MAX, {1}, at::kLong);
    bool wanted = f.bias && f.bias->requires_grad();
    for (const Tensor* t : {&f.x, &f.weight, &f.A, &f.B, &f.gate}) wanted |= t->requires_grad();
    if (wanted && at::GradMode::is_enabled()) {
      y = Layer::apply(f.x, f.weight, f.bias, f.A, f.B, f.gate, f.scaling, f.dropout_p, seed);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = std::get<0>(forward(f, seed));
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"ilora_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(ilora_linear)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace ilora

PYBIND11_MODULE(_call, m) {
  m.attr("torch_version") = C10_STRINGIZE(ILORA_TORCH_VERSION);
  m.def("set_hardware_bfloat16", [](bool there) { ilora::hardware_bfloat16 = there; });
  PyModule_AddFunctions(m.ptr(), ilora::methods);
}
