"""The frozen product with the update inside it: y = x Wᵀ + bias + h Bᵀ, and dx = dy W + keep ⊙ (dxa A)."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Dots, GemmTile, ceil_div, gemm_programs, gemm_step, unit
from .dropout import Mask, keep, row_keys
from .launch import Device, Launch, begin


@triton.jit
def corner(tile, M, D, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile. GROUP rows of tiles are walked column by column, to meet x and w in L2."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N)
    tile = tl.minimum(tile, down * across - 1)
    first = tile // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return (first + within % high) * BLOCK_M, within // high * BLOCK_N


@triton.jit
def _narrow(
    h_ptr, low_ptr, row, column, M, D, low_col, low_rank, first: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The low-rank operands of the tile at (row, column), BLOCK_R ranks from the first: h [m, r] and low [r, n]."""
    rows, columns, ranks = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_R)
    h_at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    low_at = columns.to(tl.int64)[None, :] * (low_col // UNIT * UNIT) + ranks.to(tl.int64)[:, None] * low_rank
    h = tl.load(h_ptr + h_at, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0)
    return h, tl.load(low_ptr + low_at, mask=(columns < D)[None, :] & (ranks < R)[:, None], other=0.0)


@triton.jit
def _halves(acc):
    """The left and the right half of a tile's columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def quarters(acc):
    """The four quarters of a tile's columns: stored one by one they need a quarter of the shared memory."""
    left, right = _halves(acc)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["M", "threshold"])
def gemm(
    x, w, y, h_ptr, low_ptr, bias_ptr, seed_ptr, M, D, K, threshold, low_col, low_rank,
    R: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr, TURNED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] + keep[m, n] · Σ_r h[m, r] · low[n, r]; a pointer that is None adds 0.

    x [M, K], w ([D, K] if TURNED, else [K, D]) and y [M, D]: tensor descriptors, of blocks [BLOCK_M, BLOCK_K], w's two
    and [BLOCK_M, BLOCK_N / 4]; h [M, R] contiguous; low [D, R] (any strides); bias [D]. Writes y once.
    UNIT: a power of two dividing low_col, for Triton to know (it only asks whether 16 does).
    Work: a program takes every num_programs-th tile [BLOCK_M, BLOCK_N] of y. The accumulator starts from the low-rank
    product (masked there: dropout is before A, never before W). Its operands are asked for before the loop of the tile
    before (AHEAD: they arrive meanwhile), or after it.
    """
    begin(PDL)
    step = tl.num_programs(0)
    row, column = corner(tl.program_id(0), M, D, GROUP, BLOCK_M, BLOCK_N)
    h, low = _narrow(h_ptr, low_ptr, row, column, M, D, low_col, low_rank, 0, R, UNIT, BLOCK_M, BLOCK_N, BLOCK_R)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(D, BLOCK_N), step):
        acc = tl.dot(h.to(DOT), low.to(DOT))
        for r in tl.static_range(BLOCK_R, R, BLOCK_R):
            h, low = _narrow(h_ptr, low_ptr, row, column, M, D, low_col, low_rank, r, R, UNIT,
                             BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
            acc = tl.dot(h.to(DOT), low.to(DOT), acc)
        columns = column + tl.arange(0, BLOCK_N)
        if DROPOUT:
            k1, k2 = row_keys(seed_ptr, row + tl.arange(0, BLOCK_M))
            acc = tl.where(keep(k1, k2, columns, threshold), acc, 0.0)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        after, beside = corner(tile + step, M, D, GROUP, BLOCK_M, BLOCK_N)  # the next tile, or the last again
        if AHEAD:
            h, low = _narrow(h_ptr, low_ptr, after, beside, M, D, low_col, low_rank, 0, R, UNIT,
                             BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
        for k in range(0, K, BLOCK_K):
            a = x.load([row, k]).to(DOT)
            b = w.load([column, k]).T if TURNED else w.load([k, column])
            acc = tl.dot(a, b.to(DOT), acc)
        if not AHEAD:
            h, low = _narrow(h_ptr, low_ptr, after, beside, M, D, low_col, low_rank, 0, R, UNIT,
                             BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
        parts = quarters(acc)
        for q in tl.static_range(4):
            y.store([row, column + q * (BLOCK_N // 4)], parts[q].to(y.dtype))
        row, column = after, beside


def rows_of(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix whose rows are contiguous, matrix or its transpose, and whether it was turned."""
    return (matrix.t(), True) if matrix.stride(1) != 1 and matrix.stride(0) == 1 else (matrix, False)


def described(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """Made here, on the host: passed by value, descriptors need no workspace and stay with a captured graph."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block)


def operand(matrix: Tensor, n: int, k: int) -> tuple[TensorDescriptor, bool]:
    """(the descriptor, whether tiles are [n, k], to be turned) of a matrix [N, K] one of whose strides is 1."""
    rows, turned = rows_of(matrix)
    return described(rows, [k, n] if turned else [n, k]), not turned


def gemm_launch(
    device: Device, tile: GemmTile, dot: Dots, x: Tensor, weight: Tensor, y: Tensor, h: Tensor,
    low: Tensor, mask: Mask, bias: Tensor | None,
) -> Launch:  # fmt: skip
    """weight [D, K], low [D, R]."""
    (M, D), K, R = y.shape, x.shape[1], h.shape[1]
    w, turned = operand(weight, tile.n, tile.k)
    args = {
        "x": described(x, [tile.m, tile.k]), "w": w, "y": described(y, [tile.m, tile.n // 4]),
        "h_ptr": h, "low_ptr": low, "bias_ptr": bias, "seed_ptr": mask.seed,
        "M": M, "D": D, "K": K, "threshold": mask.threshold, "low_col": low.stride(0), "low_rank": low.stride(1),
        "R": R, "UNIT": unit(low.stride(0)), "DROPOUT": mask.on, "TURNED": turned, "DOT": dot.wide,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": gemm_step(R), "GROUP": tile.group,
        "AHEAD": R > 16 or not mask.on,  # both together spill a few registers under Triton 3.6
    }  # fmt: skip
    programs = gemm_programs(device, tile, R, "gemm", ceil_div(M, tile.m) * ceil_div(D, tile.n))
    return Launch(gemm, (programs,), args, tile.warps, tile.stages)
