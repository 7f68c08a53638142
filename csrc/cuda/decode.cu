// The decode kernel for each type and size, and the choice of the one that fits. nvcc compiles this file without torch.
#include "device.cuh"

#include "decode.cuh"

#include <cuda_runtime.h>

#include <atomic>

namespace ilora {
namespace {

template <class T, class P, class S>
__global__ void __launch_bounds__(S::kThreads, S::CT == 1 ? 2 : 1) decode_kernel(const __grid_constant__ Decode d) {
  extern __shared__ float smem[];
  decode_block<T, P, S, kCluster>(d, smem);
}

// Sets size to the number of blocks in a cluster on the current device. The code that the driver picks decides it: code
// for sm_90 and later uses clusters of 8 (kCluster), older code uses none.
template <class Kernel> cudaError_t cluster_size(Kernel kernel, int& size) {
  static std::atomic<int> known[64];  // by device; 0 until it has been asked
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  size = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
  if (size) return cudaSuccess;
  cudaFuncAttributes facts;
  if (const cudaError_t error = cudaFuncGetAttributes(&facts, kernel)) return error;
  size = facts.ptxVersion >= 90 ? 8 : 1;
  if (device < 64) known[device].store(size, std::memory_order_relaxed);
  return cudaSuccess;
}

template <class T, class P, class S> cudaError_t launch(const Decode& d, cudaStream_t stream) {
  int cluster = 1;
  if (const cudaError_t error = cluster_size(decode_kernel<T, P, S>, cluster)) return error;
  const int columns = (d.d_out + S::kColumns - 1) / S::kColumns;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((columns + cluster - 1) / cluster * cluster, (d.M + S::kRows - 1) / S::kRows);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = sizeof(float) * Layout<S>(d.R).size;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, decode_kernel<T, P, S>, d);
}

template <class T, class P> cudaError_t choose(const Decode& d, cudaStream_t stream) {
  const bool few = d.M <= 8;
  if (!d.weight) return few ? launch<T, P, Shape<2, 1, 0, 8>>(d, stream) : launch<T, P, Shape<2, 2, 0, 8>>(d, stream);
  return few ? launch<T, P, Shape<1, 1, 8, 4>>(d, stream) : launch<T, P, Shape<2, 2, 8, 4>>(d, stream);
}

}  // namespace

const char* launch_decode(const Decode& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool same = d.type == d.adapter_type;
  cudaError_t error = cudaErrorInvalidValue;
  if (d.type == kFloat && same) error = choose<float, float>(d, on);
  if (d.type == kBFloat16) error = same ? choose<bf16, bf16>(d, on) : choose<bf16, float>(d, on);
  if (d.type == kHalf) error = same ? choose<f16, f16>(d, on) : choose<f16, float>(d, on);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ilora
