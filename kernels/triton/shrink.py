"""xa = x̃ Aᵀ: reads a wide matrix and leaves a narrow one, gated in the same launch where programs take whole rows."""

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

from .dropout import Mask, keep, row_keys
from .gates import NO_GATE, Gate, add_gate_ranks, gammas, store_gated
from .launch import Plan, wait_for_previous
from .tiles import Tile, ceil_div, pow2, programs_per_sm, shrink_tile, splits, strides, whole_row_tile


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
    rows, split, x_ptr, a_ptr, seed_ptr, M, D, chunk, threshold, x_row, x_col, a_row, a_col,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The sums [BLOCK_M, BLOCK_R] of one program of `shrink`, for its rows and the split-th chunk of columns."""
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
    return acc


@triton.jit
def store_part(total, parts_ptr, rows, split, M, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """parts[split] of parts [S, M, R]."""
    ranks = tl.arange(0, BLOCK_R)
    at = (tl.cast(split, tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(parts_ptr + at, total, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["M", "N", "run", "width", "threshold"])
def shrink(
    x_ptr, a_ptr, seed_ptr, parts_ptr, xa_ptr, h_ptr, gate_ptr, segments_ptr,
    M, D, N, chunk, run, width, threshold, scaling, x_row, x_col, a_row, a_col, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr,
    DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """parts[s, m, r] = Σ_k x̃[m, k] · a[r, k], summed over the s-th chunk of columns; or, if parts_ptr is None and a
    chunk is a whole row, xa[m, r], the same sum, and h = γ ⊙ xa.

    Reads x [M, D] once (dropped out if DROPOUT) and a [R, D], both of any strides.
    Writes parts [S, M, R] float32, which `gate_ranks` or `sums` adds up over s, in order; or xa and h [M, R]. All are
    contiguous.
    Work: program (i, s) owns BLOCK_M rows and `chunk` columns, a multiple of BLOCK_K.
    """
    wait_for_previous(EARLY)
    rows, split = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    total = shrink_block(rows, split, x_ptr, a_ptr, seed_ptr, M, D, chunk, threshold, x_row, x_col, a_row, a_col,
                         R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R)  # fmt: skip
    if parts_ptr is not None:
        store_part(total, parts_ptr, rows, split, M, R, BLOCK_R)
    else:
        ranks = tl.arange(0, BLOCK_R)
        gamma = gammas(rows, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col, R, RANK)
        store_gated(total, gamma, rows, M, scaling, xa_ptr, h_ptr, None, None, R, BLOCK_R)


def add_shrink(plan: Plan, x: Tensor, A: Tensor, mask: Mask) -> Tensor:
    """The partial sums [S, M, R] of xa, or xa [M, R] itself, in float32."""
    (M, D), R = x.shape, len(A)
    tile = shrink_tile(plan.device, x, R, plan.dots, mask.on)
    S, chunk = splits(plan.device, ceil_div(M, tile.m), D, tile.n, programs_per_sm(R))
    parts = x.new_empty((M, R) if S == 1 else (S, M, R), dtype=torch.float32)
    _add_shrink(plan, x, A, mask, tile, (S, chunk), {"parts_ptr": parts, "xa_ptr": None, "h_ptr": None, **NO_GATE})
    return parts


def add_gated_shrink(plan: Plan, x: Tensor, A: Tensor, mask: Mask, gate: Gate, xa: Tensor, h: Tensor) -> None:
    """Fills xa and h = γ ⊙ xa [M, R], in one launch or two."""
    tile = None if mask.on else whole_row_tile(plan.device, x, len(A), plan.dots)  # the mask's work asks for more warps
    if tile is None:
        add_gate_ranks(plan, gate, add_shrink(plan, x, A, mask), h, raw=xa)
    else:
        chunk = ceil_div(x.shape[1], tile.n) * tile.n
        ranks = {"parts_ptr": None, "xa_ptr": xa, "h_ptr": h, **gate.arguments(), "RANK": len(A) // gate.gate.shape[1]}
        _add_shrink(plan, x, A, mask, tile, (1, chunk), ranks)


def _add_shrink(
    plan: Plan, x: Tensor, A: Tensor, mask: Mask, tile: Tile, split: tuple[int, int], ranks: dict[str, Any]
) -> None:
    """split: (parts, columns of a part). ranks: the arguments about what is written."""
    (M, D), R, (S, chunk) = x.shape, len(A), split
    args = {
        "x_ptr": x, "a_ptr": A, "seed_ptr": mask.seed, **ranks,
        "M": M, "D": D, "chunk": chunk, "threshold": mask.threshold, **strides("x", x), **strides("a", A),
        "R": R, "DROPOUT": mask.on, **plan.dots.arguments(),
        "BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    plan.launch(shrink, (ceil_div(M, tile.m), S), args, tile.warps, tile.stages)
