// What the primitives share around the kernels: aligned memory, and how work is cut for threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace ilora {

using torch::stable::parallel_for;

constexpr int64_t kMinRowChunk = 128, kMaxRowChunks = 32;
constexpr int64_t kPartialBytes = 32 << 20;  // of all row chunks' partial gradients; but at least 4 chunks

struct Memory {  // one aligned allocation
  char* bytes;
  explicit Memory(size_t size) : bytes(static_cast<char*>(std::malloc(size + kAlign))) {
    STD_TORCH_CHECK(bytes, "ilora_native: out of memory: ", size, " bytes");
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(bytes); }
  char* at(size_t offset) const { return bytes + (kAlign - reinterpret_cast<uintptr_t>(bytes) % kAlign) + offset; }
};

// parallel_for's grain for tasks that read this many elements together: a few elements are not worth waking threads for.
inline int64_t serial_below(int64_t tasks, int64_t elements) {
  return std::max<int64_t>(1, (tasks << 17) / std::max<int64_t>(elements, 1));
}

// How many rows share one partial gradient of this size. It depends on the shapes alone, so that no result depends on the
// number of threads.
inline int64_t rows_of_partial(const Kernels& k, int64_t M, const Packing& p) {
  const int64_t bytes = std::max<int64_t>(p.size() * k.size_C, 1);
  const int64_t most = std::clamp<int64_t>(kPartialBytes / bytes, 4, kMaxRowChunks);
  return std::max(round_up((M + most - 1) / most, 12), kMinRowChunk);
}

}  // namespace ilora
