"""Everything of size [M, R]: sums of partials, the gate on the ranks, and the gate's gradient.

A small launch takes the time of its start and of its loads' way, not of its bytes: so the sum of a weight gradient's
partials rides along where `more_ptr` is given, in programs of its own behind the first `blocks`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import ceil_div, pow2, search_width
from .launch import Launch, begin
from .sums import BLOCK, Partial, along, sum_block, sum_in_order


@triton.jit
def instances(rows, segments_ptr, N, run, width):
    """The instance of each row, always in [0, N): rows // run, or the last i with segments[i] <= row.

    Looked for 15 boundaries at once, `width` apart, then a sixteenth of it, and so on: each step waits for its loads.
    width: the largest power of 16 below N, or 1.
    """
    if segments_ptr is None:
        found = tl.minimum(rows // run, N - 1)
    else:
        found = tl.zeros_like(rows)
        ahead = tl.arange(0, 16)
        while width > 0:
            probe = found[:, None] + ahead[None, :] * width
            inside = (ahead > 0)[None, :] & (probe < N)
            start = tl.load(segments_ptr + probe, mask=inside, other=2147483647)
            found += tl.sum((start <= rows[:, None]).to(tl.int32), axis=1) * width
            width = width // 16
    return found


@triton.jit
def gammas(
    rows, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """γ [rows, ranks] in float32, 0 outside of [M, R]."""
    instance = instances(rows, segments_ptr, N, run, width).to(tl.int64)
    at = instance[:, None] * gate_row + (ranks // RANK)[None, :] * gate_col
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    return scaling * tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gate_block(
    block, parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, N, S, run, width, scaling, gate_row, gate_col,
    E: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, BLOCK_E)
    within = tl.arange(0, BLOCK_J)
    valid = (rows < M)[:, None] & (experts < E)[None, :]
    each = valid[:, :, None] & (within < RANK)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * (E * RANK) + (experts[:, None] * RANK + within[None, :])[None, :, :]
    total = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_J], tl.float32)
    total = sum_in_order(total, parts_ptr, S, M.to(tl.int64) * (E * RANK), at, each)

    instance = instances(rows, segments_ptr, N, run, width).to(tl.int64)
    gate_at = instance[:, None] * gate_row + experts[None, :] * gate_col
    gamma = scaling * tl.load(gate_ptr + gate_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(gated_ptr + at, total * gamma[:, :, None], mask=each)
    if raw_ptr is not None:
        tl.store(raw_ptr + at, total, mask=each)
    if scores_ptr is not None:
        xa = tl.load(xa_ptr + at, mask=each, other=0.0).to(tl.float32)
        scores = scaling * tl.sum(total * xa, axis=2)
        tl.store(scores_ptr + rows.to(tl.int64)[:, None] * E + experts[None, :], scores, mask=valid)


@triton.jit(do_not_specialize=["M", "N", "S", "run", "width", "more_parts", "blocks"])
def gate_ranks(
    parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, N, S, run, width, scaling, gate_row, gate_col, more_ptr, more_sum_ptr, more_size, more_parts, blocks,
    E: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """t = Σ_s parts[s] in order;  gated = γ ⊙ t;  and, where the pointer is given, raw = t and
    scores[m, e] = scaling · Σ_{r in e} t[m, r] · xa[m, r];  and more_sum = Σ_g more[g] (sums.py).

    Reads parts [S, M, R], gate [N, E] (any strides), segments [N+1] or None, xa [M, R] if scores are wanted.
    Writes gated and raw [M, R], scores [M, E], all contiguous, each in its own dtype.
    Work: a program owns BLOCK_M rows and all ranks, as a tile [rows, experts, ranks of one expert].
    """
    begin(PDL)
    block = tl.program_id(0)
    if block < blocks:
        _gate_block(block, parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
                    M, N, S, run, width, scaling, gate_row, gate_col, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)  # fmt: skip
    elif more_ptr is not None:
        sum_block(block - blocks, more_ptr, more_sum_ptr, more_size, more_parts, BLOCK)


class Gate(NamedTuple):
    """gate [N, E], whose rows belong to `segments` or to runs of equal length, and the scaling: γ for M rows."""

    gate: Tensor
    segments: Tensor | None
    scaling: float
    M: int

    def arguments(self) -> dict[str, Any]:
        """What kernels that look up γ take."""
        N = len(self.gate)
        return {
            "gate_ptr": self.gate, "segments_ptr": self.segments, "M": self.M, "N": N, "run": max(self.M // N, 1),
            "width": search_width(N), "scaling": self.scaling,
            "gate_row": self.gate.stride(0), "gate_col": self.gate.stride(1),
        }  # fmt: skip

    def scores(self) -> tuple[Tensor, Tensor]:
        """Room for (the scores [M, E], dgate [N, E]): one and the same where each row has a gate row of its own."""
        dgate = self.gate.new_empty(self.gate.shape)
        if self.segments is None and len(self.gate) == self.M:
            return dgate, dgate
        return self.gate.new_empty(self.M, self.gate.shape[1], dtype=torch.float32), dgate


def gate_launch(
    gate: Gate, parts: Tensor, gated: Tensor, raw: Tensor | None = None, xa: Tensor | None = None,
    scores: Tensor | None = None, more: Partial | None = None,
) -> Launch:  # fmt: skip
    """parts [S, M, R] or [M, R]; more: partial sums that ride along, and their sum."""
    (M, R), E = gated.shape, gate.gate.shape[1]
    block_e, block_j = pow2(E, 1, 256), pow2(R // E, 1, 256)
    block_m = max(1, 512 // (block_e * block_j))  # many programs: each waits for its loads more than it computes
    blocks = ceil_div(M, block_m)
    more_args, programs = along("more", more)
    args = {
        "parts_ptr": parts, "xa_ptr": xa, "raw_ptr": raw, "gated_ptr": gated, "scores_ptr": scores,
        "S": len(parts) if parts.dim() == 3 else 1, **gate.arguments(), **more_args, "blocks": blocks,
        "E": E, "RANK": R // E, "BLOCK_M": block_m, "BLOCK_E": block_e, "BLOCK_J": block_j, "BLOCK": BLOCK,
    }  # fmt: skip
    return Launch(gate_ranks, (blocks + programs,), args)
