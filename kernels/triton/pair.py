"""dh = dy B and dB = dyᵀ h in one launch: each by programs of its own, near enough to find dy in the L2 cache."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import Dots, ceil_div, cell, outer_tile, per_sm, pow2, shrink_tile, unit
from .launch import Device, Launch, begin
from .outer import outer_block
from .shrink import shrink_block


@triton.jit(do_not_specialize=["M"])
def pair(
    x_ptr, h_ptr, w_ptr, dh_ptr, parts_ptr, M, D, rows, columns, x_row, x_col, w_col, w_rank, out_col, out_rank,
    R: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    ALONG_M: tl.constexpr, ALONG_N: tl.constexpr, DOWN_M: tl.constexpr, DOWN_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dh[s, m, r] = Σ_n x[m, n] · w[n, r] over the s-th `columns` columns, and
    parts[g, n, r] = Σ_m x[m, n] · h[m, r] over the g-th `rows` rows.

    Reads x [M, D] (any strides) twice, once of it from L2; h [M, R] contiguous; w [D, R] (any strides).
    Writes dh [S, M, R] float32; parts [G, …], float32 unless G = 1, each laid out by (out_col, out_rank).
    Work: a cell of rows × columns of x has `rows` / ALONG_M programs that go along its rows (shrink's) and then
    `columns` / DOWN_N that go down its columns (outer's); cells follow one another by rows. No program waits for
    another. The steps are ALONG_N columns and DOWN_M rows; rows and columns are multiples of either's block.
    """
    begin(PDL)
    along, down = rows // ALONG_M, columns // DOWN_N
    at, task = tl.program_id(0) // (along + down), tl.program_id(0) % (along + down)
    g, s = at // tl.cdiv(D, columns), at % tl.cdiv(D, columns)
    if task < along:
        block = g * along + task
        if block * ALONG_M < M:  # the last cell may be short
            shrink_block(block, s, x_ptr, w_ptr, None, dh_ptr, M, D, columns, 0, x_row, x_col, w_rank,
                         w_col // UNIT * UNIT, R, False, DOT, PIECES, PRECISION, ALONG_M, ALONG_N, BLOCK_R)  # fmt: skip
    else:
        block = s * down + task - along
        if block * DOWN_N < D:
            outer_block(block, g, x_ptr, h_ptr, None, parts_ptr, M, D, rows, 0, x_row, x_col, out_col, out_rank,
                        R, False, DOT, PIECES, PRECISION, DOWN_M, DOWN_N, BLOCK_R)  # fmt: skip


def pair_launch(
    device: Device, dot: Dots, x: Tensor, h: Tensor, w: Tensor, out: Tensor, strides: tuple[int, int]
) -> tuple[Launch, Tensor, Tensor]:
    """The launch, dh's partial sums [S, M, R], and those of dB [G, …]; out itself where G = 1. strides: out's
    (column, rank) strides."""
    (M, D), R = x.shape, h.shape[1]
    along, down = shrink_tile(device, x, R, dot), outer_tile(device, x, R, dot)
    rows, columns = cell(device, x, along, down, per_sm(R))
    G, S = ceil_div(M, rows), ceil_div(D, columns)
    dh = x.new_empty(S, M, R, dtype=torch.float32)
    parts = out if G == 1 else x.new_empty(G, *out.shape, dtype=torch.float32)
    args = {
        "x_ptr": x, "h_ptr": h, "w_ptr": w, "dh_ptr": dh, "parts_ptr": parts, "M": M, "D": D,
        "rows": rows, "columns": columns, "x_row": x.stride(0), "x_col": x.stride(1),
        "w_col": w.stride(0), "w_rank": w.stride(1), "out_col": strides[0], "out_rank": strides[1],
        "R": R, "UNIT": unit(w.stride(0)), "DOT": dot.wide, "PIECES": dot.pieces, "PRECISION": dot.precision,
        "ALONG_M": along.m, "ALONG_N": along.n, "DOWN_M": down.m, "DOWN_N": down.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    grid = (G * S * (rows // along.m + columns // down.n),)
    launch = Launch(pair, grid, args, max(along.warps, down.warps), min(along.stages, down.stages))
    return launch, dh, parts
