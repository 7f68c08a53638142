"""Weight gradients: dB = dyᵀ h and dA = dxaᵀ x̃."""

import triton
import triton.language as tl

from .dropout import keep, row_keys
from .tiles import accumulate


@triton.jit
def outer_block(
    block, group, x_ptr, h_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, out_col, out_rank,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What one program of `outer` does: the block-th BLOCK_N columns, the group-th chunk of rows."""
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first = group * chunk
    ranks = tl.arange(0, BLOCK_R)
    wide = columns.to(tl.int64)
    inside = columns < D
    rank_ok = ranks < R
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None]
        row_ok = (rows < M)[:, None]
        x = tl.load(x_ptr + at * x_row + wide[None, :] * x_col, mask=row_ok & inside[None, :], other=0.0).to(DOT)
        h = tl.load(h_ptr + at * R + ranks[None, :], mask=row_ok & rank_ok[None, :], other=0.0)
        if DROPOUT:
            k1, k2 = row_keys(seed_ptr, rows)
            x = tl.where(keep(k1, k2, columns, threshold), x, 0.0)
        acc = accumulate(tl.trans(x), h, acc, PIECES, PRECISION)
    out = tl.cast(group, tl.int64) * D * R + wide[:, None] * out_col + ranks.to(tl.int64)[None, :] * out_rank
    tl.store(parts_ptr + out, acc, mask=inside[:, None] & rank_ok[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def outer(
    x_ptr, h_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, out_col, out_rank,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[g, n, r] = Σ_m x̃[m, n] · h[m, r] over the g-th group of rows.

    Reads x [M, D] once (any strides; masked by the dropout hash if DROPOUT) and h [M, R] contiguous.
    Writes parts [G, …], float32 unless G = 1, each laid out by (out_col, out_rank).
    Work: program (c, g) owns BLOCK_N columns and `chunk` rows, a multiple of BLOCK_M; its sum stays in registers.
    """
    outer_block(tl.program_id(0), tl.program_id(1), x_ptr, h_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold,
                x_row, x_col, out_col, out_rank,
                R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
