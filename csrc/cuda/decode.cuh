// y = x Wᵀ + bias + base + ((x Aᵀ) ⊙ γ) Bᵀ for a few rows, in one launch.
//
// A block computes 16·CT columns of y for 8·NT rows. Its kStream warps read the block's rows of W, by far the largest
// read. Meanwhile its other kRank warps compute the low-rank term, so that the reads of W never wait for it. A cluster
// of C blocks shares the work of x Aᵀ: each block computes the partial sums over a C-th of d_in, and every block reads
// the partial sums of all from their shared memory and adds them in the same order. Every sum has a fixed order, so
// the same inputs give the same bits. No state survives a launch.
#pragma once
#include "decode.h"
#include "product.cuh"

namespace ilora {

template <int CT_, int NT_, int STREAM_, int RANK_> struct Shape {
  static constexpr int CT = CT_, NT = NT_, kStream = STREAM_, kRank = RANK_;
  static constexpr int kColumns = 16 * CT, kRows = 8 * NT, kLine = kColumns + 4;  // + 4 avoids bank conflicts
  static constexpr int kRankThreads = 32 * kRank, kThreads = 32 * (kStream + kRank);
};

// Offsets into shared memory, in floats. It holds, in this order: the partial sums of x Wᵀ [kStream][kRows][kLine], the
// partial sums of x Aᵀ [parts][tiles][16][kRows], their sum xa [R16][kRows], h = γ ⊙ xa [R16][kRows], the update h Bᵀ
// [kRows][kColumns], and each row's instance [kRows]. R16 is R rounded up to a multiple of 16.
template <class S> struct Layout {
  int tiles, parts, groups;  // tiles of 16 ranks; warps that share a tile; tiles computed at the same time
  int ranks, xa, h, update, instance, size;
  ILORA_BOTH explicit Layout(int R) {
    tiles = (R + 15) / 16;
    parts = tiles < S::kRank ? S::kRank / tiles : 1;
    groups = S::kRank / parts;
    ranks = S::kStream * S::kRows * S::kLine;
    xa = ranks + parts * tiles * 16 * S::kRows;
    h = xa + tiles * 16 * S::kRows;
    update = h + tiles * 16 * S::kRows;
    instance = update + S::kRows * S::kColumns;
    size = instance + S::kRows;
  }
};

ILORA_DEVICE int instance_of(const Decode& d, int row) {
  if (!d.segments) return row / (d.M / d.N);
  int found = 0, above = d.N;  // found stays in [0, N) even if the segments hold wrong values
  while (above - found > 1) {
    const int middle = (found + above) / 2;
    (load(d.segments + middle) <= row ? found : above) = middle;
  }
  return found;
}

ILORA_DEVICE float gate_of(const Decode& d, int instance, int expert) {
  const int64_t at = instance * d.gate_row + expert * d.gate_col;
  if (d.gate_type == kFloat) return load(static_cast<const float*>(d.gate) + at);
  if (d.gate_type == kBFloat16) return widen(load(static_cast<const bf16*>(d.gate) + at));
  return widen(load(static_cast<const f16*>(d.gate) + at));
}

// Writes this block's partial sums of x Aᵀ, over columns [begin, end) and all of its warps, to smem[xa] [R16][kRows].
template <class T, class P, class S, int U>
ILORA_DEVICE void rank_sums(const Decode& d, const Layout<S>& at, float* smem, int rows, int begin, int end) {
  const int warp = thread_index() / 32, lane = thread_index() % 32, part = warp % at.parts;
  const T* x = static_cast<const T*>(d.x) + int64_t(block_row()) * S::kRows * d.x_row;
  if (warp / at.parts < at.groups)
    for (int tile = warp / at.parts; tile < at.tiles; tile += at.groups) {
      const P* a = static_cast<const P*>(d.A) + 16 * tile * d.a_row;
      Product<T, P, 1, S::NT, U, false> product(a, d.a_row, d.R - 16 * tile, x, d.x_row, rows, lane);
      sweep(product, begin, end, part, at.parts, d.vec_a);
      put(product.c, smem + at.ranks + (part * at.tiles + tile) * 16 * S::kRows, 1, S::kRows, lane);
    }
  group_sync(S::kRankThreads);
  const int count = at.tiles * 16 * S::kRows;
  for (int i = thread_index(); i < count; i += S::kRankThreads) {
    float sum = 0.f;
    for (int p = 0; p < at.parts; ++p) sum += smem[at.ranks + p * count + i];
    smem[at.xa + i] = sum;
  }
}

// Adds the partial sums of the cluster's blocks, which gives xa, and writes smem[h] = γ ⊙ xa. The first block of each
// row of blocks writes xa to global memory.
template <class P, class S, int C>
ILORA_DEVICE void gate_ranks(const Decode& d, const Layout<S>& at, float* smem, int rows) {
  const int width = d.R / d.E;
  const int* instance = reinterpret_cast<const int*>(smem + at.instance);
  for (int i = thread_index(); i < d.R * S::kRows; i += S::kRankThreads) {
    const int r = i / S::kRows, m = i % S::kRows;
    float xa = 0.f;
#pragma unroll
    for (int c = 0; c < C; ++c) xa += C == 1 ? smem[at.xa + i] : remote(smem + at.xa + i, c);
    if (m >= rows) continue;
    smem[at.h + i] = xa * d.scaling * gate_of(d, instance[m], r / width);
    if (block_column() == 0) {
      const int64_t out = (int64_t(block_row()) * S::kRows + m) * d.R + r;
      narrow(xa, static_cast<P*>(d.xa)[out]);
    }
  }
}

// Writes smem[update] = h Bᵀ [kRows][kColumns].
template <class P, class S> ILORA_DEVICE void expand(const Decode& d, const Layout<S>& at, float* smem, int rows) {
  constexpr int V = 16 / int(sizeof(P));
  for (int i = thread_index(); i < S::kColumns * rows; i += S::kRankThreads) {
    const int n = i % S::kColumns, m = i / S::kColumns, column = block_column() * S::kColumns + n;
    float sum = 0.f;
    if (column < d.d_out) {
      const P* b = static_cast<const P*>(d.B) + column * d.b_row;
#pragma unroll 2
      for (int r = 0; r < d.R; r += V) {
        Words<4> words;
        if (d.vec_b && r + V <= d.R)
          fetch<true, false, V>(b, r, d.R, words);
        else
          fetch<false, false, V>(b, r, d.R, words);
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (r + v < d.R) sum += smem[at.h + (r + v) * S::kRows + m] * element<P>(words.w, v);
      }
    }
    smem[at.update + m * S::kColumns + n] = sum;
  }
}

// Computes the low-rank term of the block's columns into smem[update]. The block's first kRank warps call it.
template <class T, class P, class S, int C>
ILORA_DEVICE void low_rank(const Decode& d, const Layout<S>& at, float* smem, int rows) {
  const int thread = thread_index(), first = block_row() * S::kRows;
  const int column = block_column() * S::kColumns + thread;
  if (thread < S::kColumns && column < d.d_out) prefetch(static_cast<const P*>(d.B) + column * d.b_row);
  if (thread < rows) reinterpret_cast<int*>(smem + at.instance)[thread] = instance_of(d, first + thread);
  const int share = (d.d_in + 32 * C - 1) / (32 * C) * 32, begin = C == 1 ? 0 : cluster_rank() * share;
  const int end = begin + share < d.d_in ? begin + share : d.d_in;
  rank_sums<T, P, S, (C > 1 || S::NT > 1) ? 1 : 8 / int(sizeof(P))>(d, at, smem, rows, begin, end);
  group_sync(S::kRankThreads);
  if (C > 1) cluster_arrive(), cluster_wait();  // every block of the cluster has written its partial sums
  gate_ranks<P, S, C>(d, at, smem, rows);
  if (C > 1) cluster_arrive();  // this warp has read them; decode_block waits for the others before the block ends
  group_sync(S::kRankThreads);
  expand<P, S>(d, at, smem, rows);
}

// Computes one warp's partial sums of x Wᵀ into smem [warp][kRows][kLine].
template <class T, class S> ILORA_DEVICE void frozen(const Decode& d, float* smem, int rows) {
  const int warp = thread_index() / 32 - S::kRank, lane = thread_index() % 32;
  const int column = block_column() * S::kColumns;
  if (column >= d.d_out) return;
  const T* x = static_cast<const T*>(d.x) + int64_t(block_row()) * S::kRows * d.x_row;
  const T* w = static_cast<const T*>(d.weight) + column * d.w_row;
  Product<T, T, S::CT, S::NT, 8 / int(sizeof(T)), true> product(w, d.w_row, d.d_out - column, x, d.x_row, rows, lane);
  sweep(product, 0, d.d_in, warp, S::kStream, d.vec_w);
  put(product.c, smem + warp * S::kRows * S::kLine, S::kLine, 1, lane);
}

// Adds the partial sums of x Wᵀ, the update, bias and base in a fixed order, and writes y.
template <class T, class S> ILORA_DEVICE void store(const Decode& d, const Layout<S>& at, const float* smem, int rows) {
  for (int i = thread_index(); i < S::kColumns * rows; i += S::kThreads) {
    const int n = i % S::kColumns, m = i / S::kColumns, column = block_column() * S::kColumns + n;
    if (column >= d.d_out) continue;
    const int64_t row = int64_t(block_row()) * S::kRows + m;
    float y = smem[at.update + m * S::kColumns + n];
#pragma unroll
    for (int w = 0; w < S::kStream; ++w) y += smem[(w * S::kRows + m) * S::kLine + n];
    if (d.bias) y += widen(load(static_cast<const T*>(d.bias) + column));
    if (d.base) y += widen(load(static_cast<const T*>(d.base) + row * d.base_row + column));
    narrow(y, static_cast<T*>(d.y)[row * d.d_out + column]);
  }
}

template <class T, class P, class S, int C> ILORA_DEVICE void decode_block(const Decode& d, float* smem) {
  const Layout<S> at(d.R);
  const int left = d.M - block_row() * S::kRows, rows = left < S::kRows ? left : S::kRows;
  if (thread_index() < S::kRankThreads) {
    low_rank<T, P, S, C>(d, at, smem, rows);
  } else {
    if (C > 1) cluster_join();
    frozen<T, S>(d, smem, rows);
    if (C > 1) cluster_wait(), cluster_join();
  }
  block_sync();
  store<T, S>(d, at, smem, rows);
  if (C > 1) cluster_wait();  // do not end, and free this shared memory, before the other blocks have read it
}

}  // namespace ilora
