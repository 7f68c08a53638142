"""dh = dy B and dB = dyᵀ h in one launch.

Each is computed by programs of its own, near enough in time that the second to read a part of dy finds it in the L2
cache.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .grad_weights import grad_weight_block
from .launch import Launch, Plan, new_parts
from .shrink import shrink_block
from .tiles import ceil_div, cell, grad_weight_tile, pow2, programs_per_sm, shrink_tile, strides, unit


@triton.jit(do_not_specialize=["M"])
def grad_dy(
    dy_ptr, h_ptr, b_ptr, dh_ptr, db_ptr, M, D, rows, columns, dy_row, dy_col, b_row, b_col,
    R: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    ALONG_M: tl.constexpr, ALONG_N: tl.constexpr, DOWN_M: tl.constexpr, DOWN_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh[s, m, r] = Σ_n dy[m, n] · b[n, r], summed over the s-th `columns` columns, and
    db[g, n, r] = Σ_m dy[m, n] · h[m, r], summed over the g-th `rows` rows.

    Reads dy [M, D] (any strides) twice, once of it from L2; h [M, R] contiguous; b [D, R] (any strides).
    Writes dh [S, M, R] float32 and db [G, D, R], float32 unless G = 1, both contiguous.
    Work: a cell of rows × columns of dy has `rows` / ALONG_M programs that go along its rows, as `shrink` does, and
    then `columns` / DOWN_N that go down its columns, as `grad_weights` does. Cells follow one another by rows. No
    program waits for another. The steps are ALONG_N columns and DOWN_M rows.
    """
    along, down = rows // ALONG_M, columns // DOWN_N
    at, task = tl.program_id(0) // (along + down), tl.program_id(0) % (along + down)
    g, s = at // tl.cdiv(D, columns), at % tl.cdiv(D, columns)
    if task < along:
        block = g * along + task
        if block * ALONG_M < M:  # the last cell may be short
            shrink_block(block, s, dy_ptr, b_ptr, None, dh_ptr, M, D, columns, 0, dy_row, dy_col, b_col,
                         b_row // UNIT * UNIT, R, False, DOT, PIECES, PRECISION, ALONG_M, ALONG_N, BLOCK_R)  # fmt: skip
    else:
        block = s * down + task - along
        if block * DOWN_N < D:
            grad_weight_block(block, g, dy_ptr, h_ptr, None, db_ptr, M, D, rows, 0, dy_row, dy_col, R, 1,
                              R, False, DOT, PIECES, PRECISION, DOWN_M, DOWN_N, BLOCK_R)  # fmt: skip


def add_grad_dy(plan: Plan, dy: Tensor, h: Tensor, B: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
    """The partial sums [S, M, R] of dh, or dh [M, R] itself, in float32; and those of dB [D, R], or dB itself."""
    (M, D), R = dy.shape, h.shape[1]
    along, down = shrink_tile(plan.device, dy, R, plan.dots), grad_weight_tile(plan.device, dy, R, plan.dots)
    rows, columns = cell(plan.device, dy, along, down, programs_per_sm(R))
    G, S = ceil_div(M, rows), ceil_div(D, columns)
    dh, db = dy.new_empty((M, R) if S == 1 else (S, M, R), dtype=torch.float32), new_parts(G, dB)
    args = {
        "dy_ptr": dy, "h_ptr": h, "b_ptr": B, "dh_ptr": dh, "db_ptr": db, "M": M, "D": D,
        "rows": rows, "columns": columns, **strides("dy", dy), **strides("b", B),
        "R": R, "UNIT": unit(B.stride(0)), **plan.dots.arguments(),
        "ALONG_M": along.m, "ALONG_N": along.n, "DOWN_M": down.m, "DOWN_N": down.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    grid = (G * S * (rows // along.m + columns // down.n),)
    warps, stages = max(along.warps, down.warps), min(along.stages, down.stages)
    plan.launches.append(Launch(grad_dy, grid, args, warps, stages))
    return dh, db
