"""From wide to narrow: xa = x̃ Aᵀ, and dh = dy B."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import config
from .config import Dots, ceil_div, pow2
from .dropout import Mask, keep, row_keys
from .launch import Device, Launch, begin
from .tiles import accumulate


@triton.jit
def shrink_block(
    block, split, x_ptr, w_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, w_rank, w_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What one program of `shrink` does, for the block-th BLOCK_M rows and the split-th chunk of columns."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    first = split * chunk
    start = (first + columns).to(tl.int64)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_row + start[None, :] * x_col
    w_ptrs = w_ptr + start[:, None] * w_col + ranks.to(tl.int64)[None, :] * w_rank
    if DROPOUT:
        k1, k2 = row_keys(seed_ptr, rows)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(first, tl.minimum(first + chunk, D), BLOCK_K):
        inside = k + columns < D
        x = tl.load(x_ptrs, mask=(rows < M)[:, None] & inside[None, :], other=0.0).to(DOT)
        w = tl.load(w_ptrs, mask=inside[:, None] & (ranks < R)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep(k1, k2, k + columns, threshold), x, 0.0)
        acc = accumulate(x, w, acc, PIECES, PRECISION)
        x_ptrs += tl.cast(x_col, tl.int64) * BLOCK_K
        w_ptrs += tl.cast(w_col, tl.int64) * BLOCK_K
    out = (tl.cast(split, tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(parts_ptr + out, acc, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink(
    x_ptr, w_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, w_rank, w_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[s, m, r] = Σ_k x̃[m, k] · w[r, k] over the s-th chunk of columns.

    Reads x [M, D] once (masked by the dropout hash if DROPOUT) and w [R, D], both of any strides.
    Writes parts [S, M, R] float32, contiguous: to be summed over s, in order, by gate_ranks.
    Work: program (i, s) owns BLOCK_M rows and `chunk` columns, a multiple of BLOCK_K.
    """
    begin(PDL)
    shrink_block(tl.program_id(0), tl.program_id(1), x_ptr, w_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold,
                 x_row, x_col, w_rank, w_col,
                 R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R)  # fmt: skip


def shrink_launch(device: Device, dot: Dots, x: Tensor, A: Tensor, mask: Mask) -> tuple[Launch, Tensor]:
    """The launch, and xa's partial sums [S, M, R]."""
    (M, D), R = x.shape, len(A)
    tile = config.shrink_tile(device, x, R, dot)
    S, chunk = config.splits(device, ceil_div(M, tile.m), D, tile.n, config.per_sm(R))
    parts = x.new_empty(S, M, R, dtype=torch.float32)
    args = {
        "x_ptr": x, "w_ptr": A, "seed_ptr": mask.seed, "parts_ptr": parts,
        "M": M, "D": D, "chunk": chunk, "threshold": mask.threshold,
        "x_row": x.stride(0), "x_col": x.stride(1), "w_rank": A.stride(0), "w_col": A.stride(1),
        "R": R, "DROPOUT": mask.on, "DOT": dot.wide, "PIECES": dot.pieces, "PRECISION": dot.precision,
        "BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    return Launch(shrink, (ceil_div(M, tile.m), S), args, tile.warps, tile.stages), parts
