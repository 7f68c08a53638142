// Compiles csrc/cuda/decode.cuh for the CPU, as a shared library that tests/test_cuda_sources.py loads.
#include "emulator.h"

#include "../../csrc/cuda/decode.cuh"

namespace ilora {

template <class T, class P, class S, int C> void launch(const Decode& d) {
  const int columns = (d.d_out + S::kColumns - 1) / S::kColumns;
  run_grid((columns + C - 1) / C * C, (d.M + S::kRows - 1) / S::kRows, C, S::kThreads, Layout<S>(d.R).size,
           [&](float* smem) { decode_block<T, P, S, C>(d, smem); });
}

template <class T, class P, int C> void choose(const Decode& d) {
  if (!d.weight) return d.M <= 8 ? launch<T, P, Shape<2, 1, 0, 8>, C>(d) : launch<T, P, Shape<2, 2, 0, 8>, C>(d);
  return d.M <= 8 ? launch<T, P, Shape<1, 1, 8, 4>, C>(d) : launch<T, P, Shape<2, 2, 8, 4>, C>(d);
}

template <int C> void choose(const Decode& d) {
  const bool same = d.type == d.adapter_type;
  if (d.type == kFloat) return choose<float, float, C>(d);
  if (d.type == kBFloat16) return same ? choose<bf16, bf16, C>(d) : choose<bf16, float, C>(d);
  return same ? choose<f16, f16, C>(d) : choose<f16, float, C>(d);
}

}  // namespace ilora

extern "C" void add_buffer(const void* at, int64_t bytes) { ilora::buffers[reinterpret_cast<uintptr_t>(at)] = bytes; }
extern "C" void clear_buffers() { ilora::buffers.clear(); }
extern "C" void decode(const ilora::Decode* d, int cluster) {
  cluster == 1 ? ilora::choose<1>(*d) : ilora::choose<8>(*d);
}
