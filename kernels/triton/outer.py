"""Weight gradients: dB = dyᵀ h and dA = dxaᵀ x̃."""

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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[g, n, r] = Σ_m x̃[m, n] · h[m, r] over the g-th group of rows.

    Reads x [M, D] once (any strides; masked by the dropout hash if DROPOUT) and h [M, R] contiguous.
    Writes parts [G, …], float32 unless G = 1, each laid out by (out_col, out_rank).
    Work: program (c, g) owns BLOCK_N columns and `chunk` rows, a multiple of BLOCK_M; its sum stays in registers.
    """
    begin(PDL)
    outer_block(tl.program_id(0), tl.program_id(1), x_ptr, h_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold,
                x_row, x_col, out_col, out_rank,
                R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip


@triton.jit(do_not_specialize=["M", "threshold"])
def outers(
    x_ptr, dxa_ptr, seed_ptr, dy_ptr, h_ptr, da_ptr, db_ptr, M, D_IN, D_OUT, chunk, threshold,
    x_row, x_col, dy_row, dy_col, da_col, da_rank, db_col, db_rank,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Both weight gradients in one launch: `outer` of x and dxa, and of dy and h, where no mask is.

    The first ⌈D_IN / BLOCK_N⌉ programs of a chunk of rows are the former's, the others the latter's.
    """
    begin(PDL)
    column, first = tl.program_id(0), tl.cdiv(D_IN, BLOCK_N)
    if column < first:
        outer_block(column, tl.program_id(1), x_ptr, dxa_ptr, seed_ptr, da_ptr, M, D_IN, chunk, threshold,
                    x_row, x_col, da_col, da_rank,
                    R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
    else:
        outer_block(column - first, tl.program_id(1), dy_ptr, h_ptr, None, db_ptr, M, D_OUT, chunk, 0,
                    dy_row, dy_col, db_col, db_rank,
                    R, False, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip


def _parts(G: int, out: Tensor) -> Tensor:
    """Room for G partial sums of out; out itself where there is one."""
    return out if G == 1 else out.new_empty(G, *out.shape, dtype=torch.float32)


def outer_launch(
    device: Device, dot: Dots, x: Tensor, h: Tensor, out: Tensor, strides: tuple[int, int], mask: Mask
) -> tuple[Launch, Tensor]:
    """The launch, and the partial sums [G, …], or out itself. strides: out's (column, rank) strides."""
    (M, D), R = x.shape, h.shape[1]
    tile = config.outer_tile(device, x, R, dot)
    C = ceil_div(D, tile.n)
    G, chunk = config.splits(device, C, M, tile.m, config.per_sm(R))
    parts = _parts(G, out)
    args = {
        "x_ptr": x, "h_ptr": h, "seed_ptr": mask.seed, "parts_ptr": parts, "M": M, "D": D, "chunk": chunk,
        "threshold": mask.threshold, "x_row": x.stride(0), "x_col": x.stride(1),
        "out_col": strides[0], "out_rank": strides[1], "R": R, "DROPOUT": mask.on,
        "DOT": dot.wide, "PIECES": dot.pieces, "PRECISION": dot.precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    return Launch(outer, (C, G), args, tile.warps, tile.stages), parts


def outers_launch(
    device: Device, dot: Dots, x: Tensor, dxa: Tensor, dA: Tensor, mask: Mask, dy: Tensor, h: Tensor, dB: Tensor
) -> tuple[Launch, Tensor, Tensor]:
    """The launch, and the partial sums of dA and of dB, or dA and dB themselves; both contiguous."""
    (M, D_IN), D_OUT, R = x.shape, dy.shape[1], len(dA)
    one, two = (config.outer_tile(device, wide, R, dot) for wide in (x, dy))
    m, n, warps, stages = min(one.m, two.m), one.n, max(one.warps, two.warps), min(one.stages, two.stages)
    C = ceil_div(D_IN, n) + ceil_div(D_OUT, n)
    G, chunk = config.splits(device, C, M, m, config.per_sm(R))
    da, db = _parts(G, dA), _parts(G, dB)
    args = {
        "x_ptr": x, "dxa_ptr": dxa, "seed_ptr": mask.seed, "dy_ptr": dy, "h_ptr": h, "da_ptr": da, "db_ptr": db,
        "M": M, "D_IN": D_IN, "D_OUT": D_OUT, "chunk": chunk, "threshold": mask.threshold,
        "x_row": x.stride(0), "x_col": x.stride(1), "dy_row": dy.stride(0), "dy_col": dy.stride(1),
        "da_col": 1, "da_rank": D_IN, "db_col": R, "db_rank": 1,
        "R": R, "DROPOUT": mask.on, "DOT": dot.wide, "PIECES": dot.pieces, "PRECISION": dot.precision,
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    return Launch(outers, (C, G), args, warps, stages), da, db
