// Defines the functions of csrc/cuda/device.cuh for a CPU. Every GPU thread is a fiber; a fiber that waits at a barrier
// lets the others run. Every read of global memory is checked: it must lie inside a registered buffer and be aligned as
// the GPU instruction demands.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change the stack
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define ILORA_DEVICE inline
#define ILORA_BOTH inline

namespace ilora {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
template <int N> struct alignas(4 * N) Words { uint32_t w[N]; };

struct Barrier {
  int arrived = 0, phase = 0;
};

struct Block {
  int column, row, rank;
  std::vector<float> smem;
  Barrier all, group, warp[32];
  uint32_t slots[32][32][6];  // [warp][lane]: registers that the lanes of a warp exchange
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  int threads;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it goes on; jumping there takes no system call, as swapcontext does
  std::unique_ptr<char[]> stack;
  Cluster* cluster;
  Block* block;
  int thread, ticket = 0;
  bool begun = false, done = false;
};

inline Fiber* self = nullptr;
inline jmp_buf scheduler;
inline std::map<uintptr_t, size_t> buffers;  // start and length

inline void yield() {
  Fiber* me = self;
  if (!_setjmp(me->place)) _longjmp(scheduler, 1);
  self = me;
}

// Runs a fiber until it yields or is done.
inline void resume(Fiber& f) {
  self = &f;
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.place, 1);
  f.begun = true;
  setcontext(&f.start);
}

inline int arrive(Barrier& b, int count) {
  const int phase = b.phase;
  if (++b.arrived == count) b.arrived = 0, ++b.phase;
  return phase;
}

inline void wait(const Barrier& b, int phase) {
  while (b.phase == phase) yield();
}

inline void check(const void* at, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  auto next = buffers.upper_bound(address);
  const bool inside = next != buffers.begin() && address + bytes <= (--next)->first + next->second;
  if (!inside || address % bytes) {
    std::fprintf(stderr, "a bad read of %zu bytes, %s\n", bytes, inside ? "unaligned" : "outside of every tensor");
    std::abort();
  }
}

inline int thread_index() { return self->thread; }
inline int block_column() { return self->block->column; }
inline int block_row() { return self->block->row; }

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float widen(float v) { return v; }
inline float widen(bf16 v) { return float_of(uint32_t(v.bits) << 16); }
inline float widen(f16 v) {
  _Float16 half;
  std::memcpy(&half, &v, 2);
  return float(half);
}
inline void narrow(float v, float& out) { out = v; }
inline void narrow(float v, bf16& out) {  // to nearest, ties to even; no NaNs here
  const uint32_t bits = bits_of(v);
  out.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float v, f16& out) {
  const _Float16 half = _Float16(v);
  std::memcpy(&out, &half, 2);
}

template <class T> T load(const T* at) {
  check(at, sizeof(T));
  return *at;
}
template <bool STREAM, int N> void load(const void* at, Words<N>& v) {
  check(at, sizeof(v));
  std::memcpy(&v, at, sizeof(v));
}
inline void prefetch(const void* at) { check(at, 1); }

inline uint32_t (&slots())[32][6] { return self->block->slots[self->thread / 32]; }
inline void warp_sync() {
  Barrier& b = self->block->warp[self->thread / 32];
  wait(b, arrive(b, 32));
}

inline float shuffle_xor(float v, int mask) {
  slots()[self->thread % 32][0] = bits_of(v);
  warp_sync();
  const float other = float_of(slots()[(self->thread % 32) ^ mask][0]);
  warp_sync();
  return other;
}

// Registers hold a and b as the PTX manual lays them out for mma.m16n8k16. Register i of a in lane 4g + t holds row
// g + 8 (i % 2), columns 2t + 8 (i / 2) and the one after it. Register i of b holds column g, rows 2t + 8i and the one
// after it.
template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T) {
  const int lane = self->thread % 32;
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(slots()[lane], mine, sizeof(mine));
  warp_sync();
  const auto half = [](uint32_t word, int which) { return widen(T{uint16_t(word >> 16 * which)}); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, high = k / 8;
      const uint32_t a = slots()[row % 8 * 4 + t][row / 8 + 2 * high], b = slots()[column * 4 + t][4 + high];
      c[i] += half(a, k % 2) * half(b, k % 2);
    }
  }
  warp_sync();
}

inline int threads_of_block = 0;
inline void block_sync() { wait(self->block->all, arrive(self->block->all, threads_of_block)); }
inline void group_sync(int threads) { wait(self->block->group, arrive(self->block->group, threads)); }
inline int cluster_rank() { return self->block->rank; }
inline void cluster_arrive() { self->ticket = arrive(self->cluster->barrier, self->cluster->threads); }
inline void cluster_join() { cluster_arrive(); }
inline void cluster_wait() { wait(self->cluster->barrier, self->ticket); }
inline float remote(const float* at, int rank) {
  return self->cluster->blocks[rank]->smem.data()[at - self->block->smem.data()];
}

// Runs every thread of a grid of columns × rows blocks in clusters of `cluster`, one cluster after another.
inline void run_grid(int columns, int rows, int cluster, int threads, int floats, std::function<void(float*)> kernel) {
  static std::function<void(float*)> body;
  body = kernel;
  threads_of_block = threads;
  constexpr size_t kStack = 64 << 10;
  for (int row = 0; row < rows; ++row)
    for (int first = 0; first < columns; first += cluster) {
      Cluster group{{}, {}, cluster * threads};
      std::vector<Fiber> fibers(cluster * threads);
      for (int b = 0; b < cluster; ++b) {
        group.blocks.emplace_back(new Block{first + b, row, b, std::vector<float>(floats, 1e30f), {}, {}, {}, {}});
        for (int t = 0; t < threads; ++t) {
          Fiber& f = fibers[b * threads + t];
          f.stack.reset(new char[kStack]);
          f.cluster = &group, f.block = group.blocks[b].get(), f.thread = t;
          getcontext(&f.start);
          f.start.uc_stack.ss_sp = f.stack.get(), f.start.uc_stack.ss_size = kStack;
          makecontext(&f.start, +[] { body(self->block->smem.data()), self->done = true, _longjmp(scheduler, 1); }, 0);
        }
      }
      for (bool busy = true; busy;) {
        busy = false;
        for (Fiber& f : fibers)
          if (!f.done) busy = true, resume(f);
      }
    }
}

}  // namespace ilora
