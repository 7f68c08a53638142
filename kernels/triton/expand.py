"""The update: y = h Bᵀ + bias or base, and dx = keep ⊙ (dxa A). Reads narrow matrices and writes a wide one."""

from torch import Tensor

import triton
import triton.language as tl

from .dropout import NO_MASK, Mask, keep, row_keys
from .launch import Plan, wait_for_previous
from .tiles import ceil_div, expand_step, expand_tile, strides, unit


@triton.jit(do_not_specialize=["M", "threshold"])
def expand(
    h_ptr, b_ptr, bias_ptr, base_ptr, seed_ptr, y_ptr, M, D, threshold, b_row, b_col, base_row, base_col,
    R: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y[m, n] = keep[m, n] · Σ_r h[m, r] · b[n, r] + bias[n] + base[m, n]; a pointer that is None adds nothing.

    Reads h [M, R] contiguous and b [D, R] (any strides), both small; bias [D]; base [M, D] (any strides) once.
    Writes y [M, D] once, contiguous, in its own dtype.
    UNIT: a power of two that divides b_row. Triton itself only notices 16.
    Work: a program owns a tile [BLOCK_M, BLOCK_N] of y. Neighbours share their rows.
    """
    wait_for_previous(EARLY)
    tiles = tl.cdiv(D, BLOCK_N)
    rows = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows.to(tl.int64)[:, None]
    wide = columns.to(tl.int64)[None, :]
    row_ok = (rows < M)[:, None]
    inside = (columns < D)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, R, BLOCK_K):
        ranks = r + tl.arange(0, BLOCK_K)
        h = tl.load(h_ptr + at * R + ranks[None, :], mask=row_ok & (ranks < R)[None, :], other=0.0).to(DOT)
        b_at = wide * (b_row // UNIT * UNIT) + ranks.to(tl.int64)[:, None] * b_col
        b = tl.load(b_ptr + b_at, mask=inside & (ranks < R)[:, None], other=0.0).to(DOT)
        acc = tl.dot(h, b, acc, input_precision=PRECISION)
    if DROPOUT:
        k1, k2 = row_keys(seed_ptr, rows)
        acc = tl.where(keep(k1, k2, columns, threshold), acc, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        base = tl.load(base_ptr + at * base_row + wide * base_col, mask=row_ok & inside, other=0.0)
        acc += base.to(tl.float32)
    tl.store(y_ptr + at * D + wide, acc, mask=row_ok & inside)


def add_expand(
    plan: Plan, h: Tensor, B: Tensor, mask: Mask = NO_MASK, bias: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """y [M, D]; or dx, from dxa as h and A.t() as B."""
    (M, R), D, dot = h.shape, len(B), plan.dots
    y, tile = plan.new_wide(M, D), expand_tile(M, R, dot)
    args = {
        "h_ptr": h, "b_ptr": B, "bias_ptr": bias, "base_ptr": base, "seed_ptr": mask.seed, "y_ptr": y,
        "M": M, "D": D, "threshold": mask.threshold, **strides("b", B), **strides("base", base),
        "R": R, "UNIT": unit(B.stride(0)), "DROPOUT": mask.on, "DOT": dot.narrow, "PRECISION": dot.precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": expand_step(R, dot),
    }  # fmt: skip
    grid = (ceil_div(M, tile.m) * ceil_div(D, tile.n),)
    plan.launch(expand, grid, args, tile.warps, tile.stages)
    return y
