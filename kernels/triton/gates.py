"""The gate on the ranks: which instance a row belongs to, γ, and everything of size [M, R] between other kernels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import Plan, wait_for_previous
from .sums import sum_in_order
from .tiles import ceil_div, pow2, strides


def search_width(n: int) -> int:
    """The largest power of 16 below n, or 1: where `instances` starts to look for one of n."""
    width = 1
    while width * 16 < n:
        width *= 16
    return width


@triton.jit
def instances(rows, segments_ptr, N, run, width):
    """The instance of each row, always in [0, N): rows // run, or the last i with segments[i] <= row.

    Compares 15 boundaries at once that are `width` apart, then `width` / 16 apart, and so on, because each step waits
    for its loads.
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
def store_gated(
    total, gamma, rows, M, scaling, raw_ptr, gated_ptr, xa_ptr, scores_ptr, R: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Writes gated = γ ⊙ total, and where their pointers are given raw = total and scores = scaling · total ⊙ xa.

    All are [M, R] contiguous. `sums` computes dgate from the scores.
    """
    ranks = tl.arange(0, BLOCK_R)
    at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(gated_ptr + at, total * gamma, mask=inside)
    if raw_ptr is not None:
        tl.store(raw_ptr + at, total, mask=inside)
    if scores_ptr is not None:
        xa = tl.load(xa_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(scores_ptr + at, scaling * total * xa, mask=inside)


@triton.jit(do_not_specialize=["M", "N", "S", "run", "width"])
def gate_ranks(
    parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, N, S, run, width, scaling, gate_row, gate_col,
    E: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """t = Σ_s parts[s] in order and gated = γ ⊙ t; where their pointers are given also raw = t and
    scores[m, e] = scaling · Σ_{r in e} t[m, r] · xa[m, r].

    Reads parts [S, M, R], gate [N, E] (any strides), segments [N+1] or None, and xa [M, R] for the scores.
    Writes gated and raw [M, R] and scores [M, E], all contiguous, each in its own dtype.
    Work: a program owns BLOCK_M rows and all ranks, as a tile [rows, experts, ranks of an expert].
    """
    wait_for_previous(EARLY)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts, within = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_J)
    valid = (rows < M)[:, None] & (experts < E)[None, :]
    each = valid[:, :, None] & (within < RANK)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * (E * RANK) + (experts[:, None] * RANK + within[None, :])[None, :, :]
    total = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_J], tl.float32)
    step = M.to(tl.int64) * (E * RANK)
    total = sum_in_order(total, parts_ptr, S, step, at, S * step, each)

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


class Gate(NamedTuple):
    """γ of M rows. gate: [N, E]. segments: int32 [N+1], or None for N runs of equal length."""

    gate: Tensor
    segments: Tensor | None
    scaling: float
    M: int

    def arguments(self) -> dict[str, Any]:
        """What kernels take that look γ up."""
        N = len(self.gate)
        return {
            "gate_ptr": self.gate, "segments_ptr": self.segments, "M": self.M, "N": N, "run": max(self.M // N, 1),
            "width": search_width(N), "scaling": self.scaling, **strides("gate", self.gate),
        }  # fmt: skip

    def no_rows(self) -> Tensor:
        """dgate where there are no rows."""
        return self.gate.new_zeros(self.gate.shape)

    def new_dgate(self) -> tuple[Tensor, Tensor]:
        """Empty (scores [M, E], dgate [N, E]); one tensor for both where each row has a gate row of its own."""
        dgate = self.gate.new_empty(self.gate.shape)
        if self.segments is None and len(self.gate) == self.M:
            return dgate, dgate
        return self.gate.new_empty(self.M, self.gate.shape[1], dtype=torch.float32), dgate


NO_GATE = {
    "gate_ptr": None, "segments_ptr": None, "N": 1, "run": 1, "width": 1, "scaling": 1.0, **strides("gate", None),
    "RANK": 1,
}  # fmt: skip


def add_gate_ranks(
    plan: Plan, gate: Gate, parts: Tensor, gated: Tensor, raw: Tensor | None = None, xa: Tensor | None = None,
    scores: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills gated [M, R], and raw and scores, if given; scores need xa. parts: [S, M, R] or [M, R]."""
    (M, R), E = parts.shape[-2:], gate.gate.shape[1]
    block_e, block_j = pow2(E, 1, 256), pow2(R // E, 1, 256)
    block_m = max(1, 512 // (block_e * block_j))  # many programs: each waits for its loads more than it computes
    args = {
        "parts_ptr": parts, "xa_ptr": xa, "raw_ptr": raw, "gated_ptr": gated, "scores_ptr": scores,
        "S": len(parts) if parts.dim() == 3 else 1, **gate.arguments(),
        "E": E, "RANK": R // E, "BLOCK_M": block_m, "BLOCK_E": block_e, "BLOCK_J": block_j,
    }  # fmt: skip
    plan.launch(gate_ranks, (ceil_div(M, block_m),), args)
