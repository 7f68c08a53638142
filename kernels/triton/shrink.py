"""xa = x̃ Aᵀ: reads a wide matrix and leaves a narrow one."""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .dropout import Mask, keep, row_keys
from .launch import Launch, Plan
from .tiles import ceil_div, pow2, programs_per_sm, shrink_tile, splits, strides


@triton.jit
def accumulate(wide, narrow, acc, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """acc + wide @ narrow in float32, on the tensor cores of wide's dtype.

    wide [a, k] is a tile of an activation, narrow [k, b] a tile of a rank-sized matrix. A float32 narrow beside a
    bfloat16 wide is split into PIECES = 3 bfloat16 terms of 8 bits each. Their products are exact, so the result has
    float32's accuracy while the large tile stays 16 bits wide.
    """
    for _ in tl.static_range(PIECES):
        piece = narrow.to(wide.dtype)
        acc = tl.dot(wide, piece, acc, input_precision=PRECISION)
        if PIECES > 1:
            narrow = narrow - piece.to(tl.float32)
    return acc


@triton.jit
def shrink_block(
    block, split, x_ptr, a_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, a_row, a_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The work of one program of `shrink`: the block-th BLOCK_M rows and the split-th chunk of columns."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    first = split * chunk
    start = (first + columns).to(tl.int64)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_row + start[None, :] * x_col
    a_ptrs = a_ptr + start[:, None] * a_col + ranks.to(tl.int64)[None, :] * a_row
    if DROPOUT:
        k1, k2 = row_keys(seed_ptr, rows)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(first, tl.minimum(first + chunk, D), BLOCK_K):
        inside = k + columns < D
        x = tl.load(x_ptrs, mask=(rows < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        a = tl.load(a_ptrs, mask=inside[:, None] & (ranks < R)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep(k1, k2, k + columns, threshold), x, 0.0)
        acc = accumulate(x, a, acc, PIECES, PRECISION)
        x_ptrs += tl.cast(x_col, tl.int64) * BLOCK_K
        a_ptrs += tl.cast(a_col, tl.int64) * BLOCK_K
    out = (tl.cast(split, tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(parts_ptr + out, acc, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink(
    x_ptr, a_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, a_row, a_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[s, m, r] = Σ_k x̃[m, k] · a[r, k], summed over the s-th chunk of columns.

    Reads x [M, D] once (dropped out if DROPOUT) and a [R, D], both of any strides.
    Writes parts [S, M, R] float32, contiguous. `gate_ranks` or `sums` adds them up over s, in order.
    Work: program (i, s) owns BLOCK_M rows and `chunk` columns, a multiple of BLOCK_K.
    """
    shrink_block(tl.program_id(0), tl.program_id(1), x_ptr, a_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold,
                 x_row, x_col, a_row, a_col,
                 R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R)  # fmt: skip


def add_shrink(plan: Plan, x: Tensor, A: Tensor, mask: Mask) -> Tensor:
    """The partial sums [S, M, R] of xa, or xa [M, R] itself, in float32."""
    (M, D), R = x.shape, len(A)
    tile = shrink_tile(plan.device, x, R, plan.dots, mask.on)
    S, chunk = splits(plan.device, ceil_div(M, tile.m), D, tile.n, programs_per_sm(R))
    parts = x.new_empty((M, R) if S == 1 else (S, M, R), dtype=torch.float32)
    args = {
        "x_ptr": x, "a_ptr": A, "seed_ptr": mask.seed, "parts_ptr": parts,
        "M": M, "D": D, "chunk": chunk, "threshold": mask.threshold, **strides("x", x), **strides("a", A),
        "R": R, "DROPOUT": mask.on, **plan.dots.arguments(),
        "BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    plan.launches.append(Launch(shrink, (ceil_div(M, tile.m), S), args, tile.warps, tile.stages))
    return parts
