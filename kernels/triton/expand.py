"""From narrow to wide: y = h Bᵀ + bias or base, and dx = keep ⊙ (dxa A)."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from . import config
from .config import Dots, ceil_div
from .dropout import Mask, keep, row_keys
from .launch import Launch, begin


@triton.jit(do_not_specialize=["M", "threshold"])
def expand(
    h_ptr, w_ptr, bias_ptr, base_ptr, seed_ptr, y_ptr, M, D, threshold, w_col, w_rank, base_row, base_col,
    R: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = keep[m, n] · Σ_r h[m, r] · w[n, r] + bias[n] + base[m, n]; a pointer that is None adds nothing.

    Reads h [M, R] contiguous and w [D, R] (any strides), both small; bias [D]; base [M, D] (any strides) once.
    Writes y [M, D] once, contiguous, in its own dtype.
    UNIT: a power of two dividing w_col, for Triton to know (it only asks whether 16 does).
    Work: a program owns a tile [BLOCK_M, BLOCK_N] of y; neighbours share their rows.
    """
    begin(PDL)
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
        w_at = wide * (w_col // UNIT * UNIT) + ranks.to(tl.int64)[:, None] * w_rank
        w = tl.load(w_ptr + w_at, mask=inside & (ranks < R)[:, None], other=0.0).to(DOT)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    if DROPOUT:
        k1, k2 = row_keys(seed_ptr, rows)
        acc = tl.where(keep(k1, k2, columns, threshold), acc, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        base = tl.load(base_ptr + at * base_row + wide * base_col, mask=row_ok & inside, other=0.0)
        acc += base.to(tl.float32)
    tl.store(y_ptr + at * D + wide, acc, mask=row_ok & inside)


def expand_launch(
    dot: Dots, y: Tensor, h: Tensor, w: Tensor, mask: Mask, bias: Tensor | None, base: Tensor | None
) -> Launch:  # fmt: skip
    """w [D, R]."""
    (M, D), R = y.shape, h.shape[1]
    tile = config.expand_tile(M, R, dot)
    base_strides = (0, 0) if base is None else base.stride()
    args = {
        "h_ptr": h, "w_ptr": w, "bias_ptr": bias, "base_ptr": base,
        "seed_ptr": mask.seed, "y_ptr": y, "M": M, "D": D, "threshold": mask.threshold,
        "w_col": w.stride(0), "w_rank": w.stride(1), "base_row": base_strides[0], "base_col": base_strides[1],
        "R": R, "UNIT": config.unit(w.stride(0)), "DROPOUT": mask.on, "DOT": dot.narrow, "PRECISION": dot.precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": config.expand_step(R, dot),
    }  # fmt: skip
    return Launch(expand, (ceil_div(M, tile.m) * ceil_div(D, tile.n),), args, tile.warps, tile.stages)
