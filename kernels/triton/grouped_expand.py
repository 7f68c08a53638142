"""y = h B[s]ᵀ + bias[s] + base for rows sorted by slot, and dx = keep ⊙ (dxa A[s]) + base. The frozen product of each
row with its slot's weight is the same product with more than ranks in between."""

from torch import Tensor

import triton
import triton.language as tl

from .device import Dots
from .dropout import NO_MASK, Mask, keep, row_keys
from .launch import Plan, wait_for_previous
from .slots import NO_ROW_GATES, RowGates, Slots, gammas_of_rows, slot_block
from .tiles import TWO_PROGRAMS, ceil_div, expand_step, expand_tile, stages_within, strides, unit

MAX_RANK = 256  # more is the frozen product, whose loop is long enough for loads to run ahead


@triton.jit(do_not_specialize=["X", "width", "threshold"])
def grouped_expand(
    h_ptr, b_ptr, bias_ptr, base_ptr, seed_ptr, y_ptr, gate_ptr, instances_ptr, offsets_ptr,
    D, X, width, threshold, scaling, h_row, h_col, b_slot, b_row, b_col, bias_row, bias_col, base_row, base_col,
    gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y[m, n] = keep[m, n] · Σ_r γ[m, r] · h[m, r] · b[s, n, r] + bias[s, n] + base[m, n] with s the slot of row m; a
    pointer that is None adds nothing, and γ is 1 without a gate.

    Reads h [M, R], b [X, D, R], bias [X, D] and base [M, D], all of any strides. Writes y [M, D] once, contiguous, in
    its own dtype; y may be base itself.
    UNIT: a power of two that divides b_row. Triton itself only notices 16.
    Work: a program owns BLOCK_N columns of a block of at most BLOCK_M rows of one slot. Neighbours share their rows.
    """
    wait_for_previous(EARLY)
    tiles = tl.cdiv(D, BLOCK_N)
    slot, _, last, first = slot_block(tl.program_id(0) // tiles, offsets_ptr, X, width, BLOCK_M)
    if first < last:
        rows, columns = first + tl.arange(0, BLOCK_M), (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        at, wide = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
        row_ok, inside = (rows < last)[:, None], (columns < D)[None, :]
        b_ptr += slot * b_slot
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r in range(0, R, BLOCK_K):
            ranks = r + tl.arange(0, BLOCK_K)
            thin = ranks.to(tl.int64)
            h = tl.load(h_ptr + at * h_row + thin[None, :] * h_col, mask=row_ok & (ranks < R)[None, :], other=0.0)
            if gate_ptr is not None:
                h = h * gammas_of_rows(rows, last, ranks, gate_ptr, instances_ptr, scaling, gate_row, gate_col, R, RANK)
            b_at = wide * (b_row // UNIT * UNIT) + thin[:, None] * b_col
            b = tl.load(b_ptr + b_at, mask=inside & (ranks < R)[:, None], other=0.0)
            acc = tl.dot(h.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
        if DROPOUT:
            k1, k2 = row_keys(seed_ptr, rows)
            acc = tl.where(keep(k1, k2, columns, threshold), acc, 0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + slot * bias_row + wide * bias_col, mask=inside, other=0.0)
            acc += bias.to(tl.float32)
        if base_ptr is not None:
            base = tl.load(base_ptr + at * base_row + wide * base_col, mask=row_ok & inside, other=0.0)
            acc += base.to(tl.float32)
        tl.store(y_ptr + at * D + wide, acc, mask=row_ok & inside)


def add_grouped_expand(
    plan: Plan, h: Tensor, B: Tensor, slots: Slots, gate: RowGates | None = None, mask: Mask = NO_MASK,
    bias: Tensor | None = None, base: Tensor | None = None, y: Tensor | None = None, dot: Dots | None = None,
) -> Tensor:  # fmt: skip
    """y [M, D], or that which is given, from B [X, D, R]; or dx, from dxa as h and A.mT as B. bias: [X, D] or [D]. dot:
    how h and B are multiplied, if not as activations and ranks are."""
    (M, R), D, dot = h.shape, B.shape[1], dot or plan.dots
    y = plan.new_wide(M, D) if y is None else y
    tile, step = expand_tile(M, R, dot), expand_step(R, dot)
    m = slots.rows(tile.m)
    stage = step * (m + tile.n) * dot.narrow.primitive_bitwidth // 8
    stages = stages_within(plan.device, stage, TWO_PROGRAMS) if R > MAX_RANK else tile.stages
    bias = bias if bias is None or bias.dim() == 2 else bias.expand(len(B), -1)
    args = {
        "h_ptr": h, "b_ptr": B, "bias_ptr": bias, "base_ptr": base, "seed_ptr": mask.seed, "y_ptr": y,
        **(NO_ROW_GATES if gate is None else gate.arguments(R)), **slots.arguments(),
        "D": D, "threshold": mask.threshold, **strides("h", h), "b_slot": B.stride(0), **strides("b", B[0]),
        **strides("bias", bias), **strides("base", base), "R": R, "UNIT": unit(B.stride(1)), "DROPOUT": mask.on,
        "DOT": dot.narrow, "PRECISION": dot.precision, "BLOCK_M": m, "BLOCK_N": tile.n, "BLOCK_K": step,
    }  # fmt: skip
    plan.launch(grouped_expand, (slots.blocks(m) * ceil_div(D, tile.n),), args, tile.warps, stages)
    return y
