"""Weight gradients: dA = dxaᵀ x̃, and dB = dyᵀ h in the same launch where it is wanted."""

from torch import Tensor

import triton
import triton.language as tl

from .dropout import Mask, keep, row_keys
from .launch import Plan, new_parts, wait_for_previous
from .shrink import accumulate
from .tiles import ceil_div, grad_weight_tile, pow2, programs_per_sm, splits, strides


@triton.jit
def grad_weight_sum(
    columns, first, last, x_ptr, h_ptr, seed_ptr, D, threshold, x_row, x_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_m x̃[m, n] · h[m, r] for BLOCK_N columns n and all ranks r, over the rows first <= m < last: [BLOCK_N, BLOCK_R].

    Reads x [M, D] once (any strides; dropped out if DROPOUT) and h [M, R] contiguous. The sum stays in registers.
    """
    ranks = tl.arange(0, BLOCK_R)
    wide = columns.to(tl.int64)
    inside = columns < D
    rank_ok = ranks < R
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m in range(first, last, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None]
        row_ok = (rows < last)[:, None]
        x = tl.load(x_ptr + at * x_row + wide[None, :] * x_col, mask=row_ok & inside[None, :], other=0.0).to(DOT)
        h = tl.load(h_ptr + at * R + ranks[None, :], mask=row_ok & rank_ok[None, :], other=0.0)
        if DROPOUT:
            k1, k2 = row_keys(seed_ptr, rows)
            x = tl.where(keep(k1, k2, columns, threshold), x, 0.0)
        acc = accumulate(tl.trans(x), h, acc, PIECES, PRECISION)
    return acc


@triton.jit
def grad_weight_block(
    block, group, x_ptr, h_ptr, seed_ptr, parts_ptr, M, D, chunk, threshold, x_row, x_col, out_col, out_rank,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[g, n, r], the sum of the block-th BLOCK_N columns over the group-th `chunk` rows.

    Writes parts [G, D · R], each part laid out by (out_col, out_rank).
    """
    columns, ranks = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    first = group * chunk
    last = tl.minimum(first + chunk, M)
    acc = grad_weight_sum(columns, first, last, x_ptr, h_ptr, seed_ptr, D, threshold, x_row, x_col,
                          R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
    out = columns.to(tl.int64)[:, None] * out_col + ranks.to(tl.int64)[None, :] * out_rank
    inside = (columns < D)[:, None] & (ranks < R)[None, :]
    tl.store(parts_ptr + tl.cast(group, tl.int64) * D * R + out, acc, mask=inside)


@triton.jit(do_not_specialize=["M", "threshold"])
def grad_weights(
    x_ptr, dxa_ptr, seed_ptr, dy_ptr, h_ptr, da_ptr, db_ptr, M, D_IN, D_OUT, chunk, threshold,
    x_row, x_col, dy_row, dy_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """da[g] = dxaᵀ x̃ and db[g] = dyᵀ h, each summed over the g-th `chunk` rows; without dy_ptr, da alone.

    Reads x [M, D_IN] (dropped out if DROPOUT) and dy [M, D_OUT] once, of any strides; dxa and h [M, R] contiguous.
    Writes da [G, R, D_IN] and db [G, D_OUT, R], contiguous, float32 unless G = 1.
    Work: program (c, g) owns BLOCK_N columns and `chunk` rows, a multiple of BLOCK_M. The first ⌈D_IN / BLOCK_N⌉
    programs of a chunk take columns of x, the others columns of dy.
    """
    wait_for_previous(EARLY)
    column, first = tl.program_id(0), tl.cdiv(D_IN, BLOCK_N)
    if column < first:
        grad_weight_block(column, tl.program_id(1), x_ptr, dxa_ptr, seed_ptr, da_ptr, M, D_IN, chunk, threshold,
                          x_row, x_col, 1, D_IN,
                          R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
    elif dy_ptr is not None:
        grad_weight_block(column - first, tl.program_id(1), dy_ptr, h_ptr, None, db_ptr, M, D_OUT, chunk, 0,
                          dy_row, dy_col, R, 1,
                          R, False, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip


def add_grad_weights(
    plan: Plan, x: Tensor, dxa: Tensor, dA: Tensor, mask: Mask, dy: Tensor | None = None, h: Tensor | None = None,
    dB: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The partial sums of dA [R, d_in] and of dB [d_out, R], or dA and dB themselves. dy, h and dB go together."""
    (M, D_IN), R = x.shape, len(dA)
    D_OUT = 0 if dy is None else dy.shape[1]
    one = grad_weight_tile(plan.device, x, R, plan.dots, mask.on)
    two = one if dy is None else grad_weight_tile(plan.device, dy, R, plan.dots)
    m, n, stages = min(one.m, two.m), min(one.n, two.n), min(one.stages, two.stages)
    warps = one.warps if one.n < two.n else max(one.warps, two.warps)
    C = ceil_div(D_IN, n) + ceil_div(D_OUT, n)
    G, chunk = splits(plan.device, C, M, m, programs_per_sm(R))
    da, db = new_parts(G, dA), None if dB is None else new_parts(G, dB)
    args = {
        "x_ptr": x, "dxa_ptr": dxa, "seed_ptr": mask.seed, "dy_ptr": dy, "h_ptr": h, "da_ptr": da, "db_ptr": db,
        "M": M, "D_IN": D_IN, "D_OUT": D_OUT, "chunk": chunk, "threshold": mask.threshold,
        **strides("x", x), **strides("dy", dy), "R": R, "DROPOUT": mask.on, **plan.dots.arguments(),
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    plan.launch(grad_weights, (C, G), args, warps, stages)
    return da, db
