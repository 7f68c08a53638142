// One warp computes Σ_k w[n, k] · x[m, k] in float32, for 16·CT rows of w and 8·NT rows of x.
//
// In both matrices k is the contiguous dimension, so every lane reads 16 bytes of its own rows straight into registers
// and needs no shared memory. The result has the layout of the tensor cores: in lane 4g + t, c[ct][nt][2i + j] belongs
// to row 16ct + g + 8i of w and row 8nt + 2t + j of x. A lane loads w for U steps before it multiplies any. For rows
// past the end it reads the last row again, and the caller ignores the results.
#pragma once

namespace ilora {

// Reads V elements of a row starting at k, with zeros from `end` on. FAST: the caller knows that the address is aligned
// and that all of the elements lie before `end`.
template <bool FAST, bool STREAM, int V, class T>
ILORA_DEVICE void fetch(const T* row, int k, int end, Words<V * int(sizeof(T)) / 4>& out) {
  if constexpr (FAST) {
    load<STREAM>(row + k, out);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) out.w[i] = k + i < end ? bits_of(load(row + k + i)) : 0u;
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const uint32_t low = k + i < end ? load(row + k + i).bits : 0u;
      const uint32_t high = k + i + 1 < end ? load(row + k + i + 1).bits : 0u;
      out.w[i / 2] = low | high << 16;
    }
  }
}

template <class T> ILORA_DEVICE float element(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 4) {
    return float_of(words[i]);
  } else {
    return widen(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
  }
}

// 16-bit w and x, on the tensor cores. In a step of 32 columns lane 4g + t reads columns 8t to 8t + 7 of both w and x.
// The instruction expects other columns in these registers, but any order of k gives the same sum of products, as long
// as w and x use the same.
template <class T, class P, int CT, int NT, int U, bool STREAM> struct Product {
  static_assert(sizeof(T) == 2 && sizeof(P) == 2);
  static constexpr int kStep = 32, kSteps = U;
  const P* w[CT][2];
  const T* x[NT];
  int t;
  float c[CT][NT][4] = {};

  ILORA_DEVICE Product(const P* w_at, int64_t w_row, int w_rows, const T* x_at, int64_t x_row, int x_rows, int lane)
      : t(lane % 4) {
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * CT; ++i) w[i / 2][i % 2] = w_at + w_row * (g + 8 * i < w_rows ? g + 8 * i : w_rows - 1);
#pragma unroll
    for (int n = 0; n < NT; ++n) x[n] = x_at + x_row * (g + 8 * n < x_rows ? g + 8 * n : x_rows - 1);
  }

  template <bool FAST, int STEPS> ILORA_DEVICE void steps(int k, int end) {
    Words<4> ws[STEPS][CT][2], xs[STEPS][NT];
#pragma unroll
    for (int u = 0; u < STEPS; ++u) {
      const int at = k + 32 * u + 8 * t;
#pragma unroll
      for (int i = 0; i < 2 * CT; ++i) fetch<FAST, STREAM, 8>(w[i / 2][i % 2], at, end, ws[u][i / 2][i % 2]);
#pragma unroll
      for (int n = 0; n < NT; ++n) fetch<FAST, false, 8>(x[n], at, end, xs[u][n]);
    }
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int h = 0; h < 4; h += 2)
#pragma unroll
        for (int i = 0; i < CT * NT; ++i) {
          const Words<4>(&a)[2] = ws[u][i / NT];
          const Words<4>& b = xs[u][i % NT];
          mma(c[i / NT][i % NT], a[0].w[h], a[1].w[h], a[0].w[h + 1], a[1].w[h + 1], b.w[h], b.w[h + 1], T{});
        }
  }

  ILORA_DEVICE void finish() {}
};

// float32 w and x of any type, by fused multiply-adds. In a step of 16 columns lane 4g + t reads columns 4t to 4t + 3,
// and multiplies them with all rows of x. `finish` adds the sums of the four lanes with the same g.
template <class T, int CT, int NT, int U, bool STREAM> struct Product<T, float, CT, NT, U, STREAM> {
  static constexpr int kStep = 16, kSteps = U;
  const float* w[CT][2];
  const T* x;
  int64_t x_row;
  int x_rows, t;
  float c[CT][NT][4] = {};
  float sum[CT][2][8 * NT] = {};

  ILORA_DEVICE Product(const float* w_at, int64_t w_row, int w_rows, const T* x_at, int64_t x_row, int x_rows,
                       int lane)
      : x(x_at), x_row(x_row), x_rows(x_rows), t(lane % 4) {
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * CT; ++i) w[i / 2][i % 2] = w_at + w_row * (g + 8 * i < w_rows ? g + 8 * i : w_rows - 1);
  }

  template <bool FAST, int STEPS> ILORA_DEVICE void steps(int k, int end) {
    Words<4> ws[STEPS][CT][2];
#pragma unroll
    for (int i = 0; i < 2 * CT * STEPS; ++i) {
      const int u = i / 2 / CT, ct = i / 2 % CT, half = i % 2;
      fetch<FAST, STREAM, 4>(w[ct][half], k + 16 * u + 4 * t, end, ws[u][ct][half]);
    }
#pragma unroll
    for (int m = 0; m < 8 * NT; ++m) {
      if (m >= x_rows) break;
#pragma unroll
      for (int u = 0; u < STEPS; ++u) {
        Words<int(sizeof(T))> xs;
        fetch<FAST, false, 4>(x + m * x_row, k + 16 * u + 4 * t, end, xs);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 2 * CT; ++j)
            sum[j / 2][j % 2][m] += float_of(ws[u][j / 2][j % 2].w[i]) * element<T>(xs.w, i);
      }
    }
  }

  ILORA_DEVICE void finish() {
#pragma unroll
    for (int i = 0; i < CT * 2 * 8 * NT; ++i) {
      const int m = i % (8 * NT), half = i / (8 * NT) % 2, ct = i / (16 * NT);
      float v = sum[ct][half][m];
      v += shuffle_xor(v, 1);
      v += shuffle_xor(v, 2);
      if (m % 8 / 2 == t) c[ct][m / 8][2 * half + m % 2] = v;
    }
  }
};

// Multiplies columns [begin, end), split among `parts` warps, of which this one is number `part`.
template <class Product>
ILORA_DEVICE void sweep(Product& product, int begin, int end, int part, int parts, bool vec) {
  constexpr int kStep = Product::kStep, kChunk = kStep * Product::kSteps;
  for (int chunk = begin + part * kChunk; chunk < end; chunk += parts * kChunk) {
    if (vec && chunk + kChunk <= end) {
      product.template steps<true, Product::kSteps>(chunk, end);
    } else {
#pragma unroll 1
      for (int k = chunk; k < end && k < chunk + kChunk; k += kStep) product.template steps<false, 1>(k, end);
    }
  }
  product.finish();
}

// Writes the whole tile: out[m · m_step + n · n_step] = c of row n of w and row m of x.
template <int CT, int NT>
ILORA_DEVICE void put(const float (&c)[CT][NT][4], float* out, int m_step, int n_step, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < CT * NT * 4; ++i) {
    const int part = i % 4, nt = i / 4 % NT, ct = i / 4 / NT;
    out[(8 * nt + 2 * t + part % 2) * m_step + (16 * ct + g + part / 2 * 8) * n_step] = c[ct][nt][part];
  }
}

}  // namespace ilora
