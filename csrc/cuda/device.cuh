// Wraps the GPU instructions that the kernels use, in a line or two of PTX each: conversions, loads, tensor cores,
// barriers, clusters. tests/cuda/emulator.h defines the same functions for a CPU, so that the tests run the kernels'
// own source without a GPU.
#pragma once
#include <cstdint>

#define ILORA_DEVICE __device__ __forceinline__
#define ILORA_BOTH __host__ __device__ inline

namespace ilora {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kCluster = 8;  // blocks that read each other's shared memory
#else
constexpr int kCluster = 1;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
template <int N> struct alignas(4 * N) Words { uint32_t w[N]; };

ILORA_DEVICE int thread_index() { return int(threadIdx.x); }
ILORA_DEVICE int block_column() { return int(blockIdx.x); }
ILORA_DEVICE int block_row() { return int(blockIdx.y); }

ILORA_DEVICE float widen(float v) { return v; }
ILORA_DEVICE float widen(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
ILORA_DEVICE float widen(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
ILORA_DEVICE void narrow(float v, float& out) { out = v; }
ILORA_DEVICE void narrow(float v, bf16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
ILORA_DEVICE void narrow(float v, f16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
ILORA_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
ILORA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Loads from global memory that no running kernel writes. STREAM is for data that is read once: it takes no room in L1.
template <class T> ILORA_DEVICE T load(const T* at) { return *at; }
template <bool STREAM> ILORA_DEVICE void load(const void* at, Words<4>& v) {
  if constexpr (STREAM)
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(at));
  else
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(at));
}
template <bool STREAM> ILORA_DEVICE void load(const void* at, Words<2>& v) {
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(at));
}
ILORA_DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// c [16, 8] += a [16, 16] b [16, 8]. Lane 4g + t holds elements of rows g and g + 8 of a and of column g of b; its
// c[2i + j] is row g + 8i, column 2t + j.
ILORA_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
ILORA_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

ILORA_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
ILORA_DEVICE void block_sync() { __syncthreads(); }
// A barrier for the block's first `threads` threads only.
ILORA_DEVICE void group_sync(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
ILORA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
ILORA_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Arrives without a memory fence, which would delay the warp's loads. For warps that wrote nothing that others read.
ILORA_DEVICE void cluster_join() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
ILORA_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Reads the float that block `rank` of the cluster has at the same offset of its shared memory.
ILORA_DEVICE float remote(const float* at, int rank) {
  const uint32_t here = uint32_t(__cvta_generic_to_shared(at));
  uint32_t there;
  float v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
  return v;
}
#else
ILORA_DEVICE int cluster_rank() { return 0; }
ILORA_DEVICE void cluster_arrive() {}
ILORA_DEVICE void cluster_join() {}
ILORA_DEVICE void cluster_wait() {}
ILORA_DEVICE float remote(const float* at, int) { return *at; }
#endif

}  // namespace ilora
