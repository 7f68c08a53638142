"""Rows sorted by slot: which slot a block of rows belongs to, which gate row a row has, and sums over a slot's parts.

Slot s has the rows offsets[s] <= m < offsets[s+1]. Blocks of BLOCK rows never straddle two slots, and which rows a
block has is found by its own program, so that the host need not read the offsets: slot s has the blocks from number
offsets[s] // BLOCK + s on, one at least, and M // BLOCK + X are enough for all. A slot may leave its last one empty.
"""

from typing import Any, NamedTuple

from torch import Tensor

import triton
import triton.language as tl

from .gates import search_width
from .launch import Plan, wait_for_previous
from .sums import sum_in_order
from .tiles import ceil_div, pow2, strides


@triton.jit
def slot_block(block, offsets_ptr, X, width, BLOCK):
    """(slot, first and last row of the slot, first row of the block), the last rows exclusive. A block is empty if its
    first row is not below the slot's last.

    Compares 15 boundaries at once that are `width` apart, then `width` / 16 apart, and so on, as `instances` does.
    """
    ahead = tl.arange(0, 16)
    slot = block * 0
    while width > 0:
        probe = slot + ahead * width
        inside = (ahead > 0) & (probe < X)
        begin = tl.load(offsets_ptr + probe, mask=inside, other=0)
        slot += tl.sum((inside & (begin // BLOCK <= block - probe)).to(tl.int32), axis=0) * width
        width = width // 16
    begin, end = tl.load(offsets_ptr + slot), tl.load(offsets_ptr + slot + 1)
    return slot.to(tl.int64), begin, end, begin + (block - slot - begin // BLOCK) * BLOCK


@triton.jit
def gammas_of_rows(
    rows, last, ranks, gate_ptr, instances_ptr, scaling, gate_row, gate_col, R: tl.constexpr, RANK: tl.constexpr
):
    """γ [rows, ranks] in float32 by the instance of each row, 0 outside of [last, R]."""
    instance = tl.load(instances_ptr + rows, mask=rows < last, other=0).to(tl.int64)
    at = instance[:, None] * gate_row + (ranks // RANK)[None, :] * gate_col
    inside = (rows < last)[:, None] & (ranks < R)[None, :]
    return scaling * tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def parts_of(begin, chunk):
    """The number of the first partial sum of a slot that has more than `chunk` rows: these are at most 2M / chunk + 1,
    since such a slot has at most twice as many parts as chunks of rows."""
    return begin.to(tl.int64) * 2 // chunk


@triton.jit(do_not_specialize=["chunk"])
def slot_sums(parts_ptr, out_ptr, offsets_ptr, size, chunk, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """out[s] = Σ_j parts[first of s + j] in order, for the slots that have more than `chunk` rows.

    Reads parts [P, size] float32 once. Writes out [X, size] in its own dtype; other slots have their sum already.
    Work: program (b, s) owns BLOCK elements of slot s.
    """
    wait_for_previous(EARLY)
    slot = tl.program_id(1)
    begin, end = tl.load(offsets_ptr + slot), tl.load(offsets_ptr + slot + 1)
    if end - begin > chunk:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        count, step = tl.cdiv(end - begin, chunk), tl.cast(size, tl.int64)
        parts_ptr += parts_of(begin, chunk) * step
        total = sum_in_order(tl.zeros([BLOCK], tl.float32), parts_ptr, count, step, at, count * step, at < size)
        tl.store(out_ptr + slot.to(tl.int64) * size + at, total, mask=at < size)


class Slots(NamedTuple):
    """Where slots begin: offsets int32 [X+1] of M rows, contiguous."""

    offsets: Tensor
    M: int

    def arguments(self) -> dict[str, Any]:
        """What kernels take that look a block's slot up."""
        X = len(self.offsets) - 1
        return {"offsets_ptr": self.offsets, "X": X, "width": search_width(X)}

    def blocks(self, size: int) -> int:
        """How many programs blocks of `size` rows need, at most."""
        return self.M // size + len(self.offsets) - 1

    def rows(self, most: int) -> int:
        """Rows of a block: `most`, or fewer where slots have fewer on average."""
        return min(most, pow2(ceil_div(self.M, len(self.offsets) - 1), 16, most))


class RowGates(NamedTuple):
    """γ of rows: gate [N, E], and instances int32 [M], contiguous, the gate row of each."""

    gate: Tensor
    instances: Tensor
    scaling: float

    def arguments(self, R: int) -> dict[str, Any]:
        """What kernels take that look γ up."""
        return {
            "gate_ptr": self.gate, "instances_ptr": self.instances, "scaling": self.scaling,
            **strides("gate", self.gate), "RANK": R // self.gate.shape[1],
        }  # fmt: skip


NO_ROW_GATES = {"gate_ptr": None, "instances_ptr": None, "scaling": 1.0, **strides("gate", None), "RANK": 1}


def add_slot_sums(plan: Plan, slots: Slots, parts: Tensor, out: Tensor, chunk: int) -> None:
    """Completes out [X, …] from the parts of slots with more than `chunk` rows."""
    size, block = out[0].numel(), 1024  # few programs: those of slots that are complete have nothing to do
    args = {
        "parts_ptr": parts, "out_ptr": out, "offsets_ptr": slots.offsets, "size": size, "chunk": chunk, "BLOCK": block,
    }  # fmt: skip
    plan.launch(slot_sums, (ceil_div(size, block), len(out)), args)
