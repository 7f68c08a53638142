"""Weight gradients of rows sorted by slot: dA[s] = dxaᵀ x̃ and dB[s] = dyᵀ h over the rows of slot s."""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .dropout import NO_MASK, Mask
from .grad_weights import grad_weight_sum
from .launch import Plan, wait_for_previous
from .slots import Slots, add_slot_sums, parts_of, slot_block
from .tiles import ceil_div, grad_weight_tile, pow2, programs_per_sm, splits, strides


@triton.jit(do_not_specialize=["X", "chunk", "width", "threshold"])
def grouped_grad_weights(
    x_ptr, h_ptr, seed_ptr, parts_ptr, out_ptr, offsets_ptr, D, X, chunk, width, threshold,
    x_row, x_col, out_col, out_rank,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[s, n, r] = Σ_m x̃[m, n] · h[m, r] over the rows of slot s, zeros if it has none; of a slot with more than
    `chunk` rows instead the sum over each chunk, as parts.

    Reads x [M, D] (any strides; dropped out if DROPOUT) once, h [M, R] contiguous. Writes out [X, D · R] in its own
    dtype and parts [2M // chunk + 1, D · R] float32, both laid out by (out_col, out_rank). Without parts_ptr no slot
    has more than `chunk` rows.
    Work: program (c, i) owns BLOCK_N columns and the i-th block of `chunk` rows, a multiple of BLOCK_M.
    """
    wait_for_previous(EARLY)
    slot, begin, end, first = slot_block(tl.program_id(1), offsets_ptr, X, width, chunk)
    if first < end or first == begin:
        columns, ranks = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        acc = grad_weight_sum(columns, first, tl.minimum(first + chunk, end), x_ptr, h_ptr, seed_ptr, D, threshold,
                              x_row, x_col, R, DROPOUT, DOT, PIECES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
        at = columns.to(tl.int64)[:, None] * out_col + ranks.to(tl.int64)[None, :] * out_rank
        inside, size = (columns < D)[:, None] & (ranks < R)[None, :], tl.cast(D, tl.int64) * R
        if parts_ptr is None:  # noqa: SIM114 (the compiler then leaves the other branches out)
            tl.store(out_ptr + slot * size + at, acc, mask=inside)
        elif end - begin <= chunk:
            tl.store(out_ptr + slot * size + at, acc, mask=inside)
        else:
            part = parts_of(begin, chunk) + (first - begin) // chunk
            tl.store(parts_ptr + part * size + at, acc, mask=inside)


def add_grouped_grad_weights(
    plan: Plan, x: Tensor, h: Tensor, out: Tensor, slots: Slots, mask: Mask = NO_MASK, by_rank: bool = False
) -> Tensor:
    """Fills out: dB [X, d_out, R] from dy as x; or by_rank dA [X, R, d_in], from dxa as h. Returns it."""
    (M, D), R = x.shape, h.shape[1]
    tile = grad_weight_tile(plan.device, x, R, plan.dots, mask.on)
    n = 32 if R > 128 or (R > 32 and plan.dots.wide.primitive_bitwidth == 32) else tile.n  # more would spill
    C, m = ceil_div(D, n), slots.rows(min(tile.m, 32 if R > 128 else tile.m))
    G, chunk = splits(plan.device, C, M, m, programs_per_sm(R))
    parts = out.new_empty(2 * M // chunk + 1, D * R, dtype=torch.float32) if G > 1 else None
    args = {
        "x_ptr": x, "h_ptr": h, "seed_ptr": mask.seed, "parts_ptr": parts, "out_ptr": out, **slots.arguments(),
        "D": D, "chunk": chunk, "threshold": mask.threshold, **strides("x", x),
        "out_col": 1 if by_rank else R, "out_rank": D if by_rank else 1, "R": R, "DROPOUT": mask.on,
        **plan.dots.arguments(), "BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    plan.launch(grouped_grad_weights, (C, slots.blocks(chunk)), args, tile.warps, tile.stages)
    if parts is not None:
        add_slot_sums(plan, slots, parts, out, chunk)
    return out
