"""xa = x̃ A[s]ᵀ for rows sorted by slot; and dxa = γ ⊙ (dy B[s]) by the same kernel, which then gates its rows."""

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

from .dropout import NO_MASK, Mask
from .gates import store_gated
from .launch import Plan, wait_for_previous
from .shrink import shrink_block, store_part
from .slots import NO_ROW_GATES, RowGates, Slots, gammas_of_rows, slot_block
from .tiles import pow2, shrink_tile, strides, unit


@triton.jit(do_not_specialize=["X", "width", "threshold"])
def grouped_shrink(
    x_ptr, a_ptr, seed_ptr, xa_ptr, h_ptr, gated_ptr, scores_ptr, gate_ptr, instances_ptr, offsets_ptr,
    D, X, width, threshold, scaling, x_row, x_col, a_slot, a_row, a_col, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr,
    DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """t[m, r] = Σ_k x̃[m, k] · a[s, r, k] with s the slot of row m. Without a gate xa = t; with one gated = γ ⊙ t,
    scores = scaling · t ⊙ xa and h = γ ⊙ xa.

    Reads x [M, D] once (dropped out if DROPOUT) and a [X, R, D], both of any strides; for the gate xa [M, R].
    Writes xa, or gated, scores and h, [M, R] contiguous.
    UNIT: a power of two that divides a_col. Triton itself only notices 16.
    Work: a program owns a block of at most BLOCK_M rows of one slot, and all columns.
    """
    wait_for_previous(EARLY)
    slot, _, last, first = slot_block(tl.program_id(0), offsets_ptr, X, width, BLOCK_M)
    if first < last:
        rows, ranks = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
        total = shrink_block(rows, 0, x_ptr, a_ptr + slot * a_slot, seed_ptr, last, D, D, threshold, x_row, x_col,
                             a_row, a_col // UNIT * UNIT, R, DROPOUT, DOT, PIECES, PRECISION,
                             BLOCK_M, BLOCK_K, BLOCK_R)  # fmt: skip
        if gate_ptr is None:
            store_part(total, xa_ptr, rows, 0, last, R, BLOCK_R)
        else:
            gamma = gammas_of_rows(rows, last, ranks, gate_ptr, instances_ptr, scaling, gate_row, gate_col, R, RANK)
            store_gated(total, gamma, rows, last, scaling, None, gated_ptr, xa_ptr, scores_ptr, R, BLOCK_R)
            at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
            inside = (rows < last)[:, None] & (ranks < R)[None, :]
            xa = tl.load(xa_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(h_ptr + at, gamma * xa, mask=inside)


def _add(
    plan: Plan, x: Tensor, A: Tensor, mask: Mask, slots: Slots, ranks: dict[str, Tensor | None], gate: dict[str, Any]
) -> None:
    """A: [X, R, D]. ranks: what is written, and xa. gate: the arguments about γ."""
    (_, D), R = x.shape, A.shape[1]
    tile = shrink_tile(plan.device, x, R, plan.dots, mask.on)
    # More rows of many ranks would spill. Of 64 masked rows Triton 3.6 overwrites registers that a running wgmma reads;
    # 32 are multiplied without it.
    wide, gated = plan.dots.wide.primitive_bitwidth == 32 and R > 32, gate is not NO_ROW_GATES and R > 128
    columns = tile.n // 2 if plan.dots.pieces > 1 and gate is not NO_ROW_GATES else tile.n  # more spilled on sm_100
    most = 16 if wide or gated else 32 if R > 128 or (mask.on and R > 32) else tile.m
    m = slots.rows(min(most, tile.m))
    args = {
        "x_ptr": x, "a_ptr": A, "seed_ptr": mask.seed, **ranks, **gate, **slots.arguments(), "D": D,
        "threshold": mask.threshold, **strides("x", x), "a_slot": A.stride(0), **strides("a", A[0]), "R": R,
        "UNIT": unit(A.stride(2)), "DROPOUT": mask.on, **plan.dots.arguments(),
        "BLOCK_M": m, "BLOCK_K": columns, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    plan.launch(grouped_shrink, (slots.blocks(m),), args, tile.warps, tile.stages)


def add_grouped_shrink(plan: Plan, x: Tensor, A: Tensor, mask: Mask, slots: Slots) -> Tensor:
    """xa [M, R]."""
    xa = plan.new_ranks(len(x), A.shape[1])
    _add(plan, x, A, mask, slots, {"xa_ptr": xa, "h_ptr": None, "gated_ptr": None, "scores_ptr": None}, NO_ROW_GATES)
    return xa


def add_grouped_grad_ranks(
    plan: Plan, dy: Tensor, xa: Tensor, B: Tensor, slots: Slots, gate: RowGates
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa = γ ⊙ (dy B[s]), h = γ ⊙ xa, the scores for dgate in float32), each [M, R]."""
    dxa, h = plan.new_ranks(*xa.shape), plan.new_ranks(*xa.shape)
    scores = dy.new_empty(xa.shape, dtype=torch.float32)
    ranks = {"xa_ptr": xa, "h_ptr": h, "gated_ptr": dxa, "scores_ptr": scores}
    _add(plan, dy, B.mT, NO_MASK, slots, ranks, gate.arguments(xa.shape[1]))
    return dxa, h, scores
