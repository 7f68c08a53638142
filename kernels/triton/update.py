"""forward and backward of the low-rank update: plans of launches, then the frozen product by cuBLAS on top (beta = 1).

Names as everywhere: M rows, N gate rows, E experts, R ranks, x [M, d_in], A [R, d_in], B [d_out, R], gate [N, E].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import config, decode
from .config import ceil_div, pow2
from .expand import expand
from .gates import gate_ranks, sum_segments
from .launch import Device, Launch, device_of
from .outer import outer
from .pair import pair_launch
from .replay import Plan, planned
from .shrink import shrink
from .strategy import gemm_launch, gemm_or_beta
from .sums import sum_parts


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor, gate: Tensor,
    segments: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, d_out], xa [M, R]): y = x Wᵀ + bias + h Bᵀ, or base + h Bᵀ without a weight; h = γ ⊙ xa, xa = x̃ Aᵀ."""
    if weight is None:
        bias = None
    else:
        base = None
    device = device_of(x)

    def make() -> Plan:
        few = decode.plan(device, x, weight, bias, base, A, B, gate, segments, scaling, dropout_p)
        if few is not None:
            launch, y, xa, fused = few
            return [launch], (y, xa), fused
        update = Update(device, x, A, B, gate, segments, scaling, dropout_p, seed)
        results = update.forward(bias, base, weight)
        return update.launches, results, update.fused

    inputs = (x, weight, bias, base, A, B, gate, segments, seed)
    (y, xa), fused = planned("forward", (scaling, dropout_p), x, inputs, make)
    if weight is not None and y.numel() and not fused:
        y.addmm_(x, weight.t())
    return y, xa


def backward(
    dy: Tensor, x: Tensor, xa: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, gate: Tensor,
    segments: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None, need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, d_in] or None, dA, dB, dgate); dx = dy W + keep ⊙ (dxa A), without a weight its second part only."""

    def make() -> Plan:
        update = Update(device_of(x), x, A, B, gate, segments, scaling, dropout_p, seed)
        results = update.backward(dy, xa, need_dx, weight)
        return update.launches, results, update.fused

    inputs = (dy, x, xa, weight, A, B, gate, segments, seed)
    (dx, dA, dB, dgate), fused = planned("backward", (scaling, dropout_p, need_dx), x, inputs, make)
    if dx is not None and weight is not None and dx.numel() and not fused:
        dx.addmm_(dy, weight)
    return dx, dA, dB, dgate


class Update:
    """Allocates results and workspaces and lists the launches that fill them; launches nothing itself.

    The tensors may be on the meta device: that is how the kernel report sees what would be launched.
    strategy: see strategy.py. fused: whether the launches hold the frozen product too.
    """

    def __init__(
        self, device: Device, x: Tensor, A: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None,
        scaling: float, dropout_p: float, seed: Tensor | None, strategy: str | None = None,
    ) -> None:  # fmt: skip
        self.strategy, self.fused = strategy, False
        self.device, self.x, self.A, self.B, self.gate, self.segments = device, x, A, B, gate, segments
        self.scaling, self.M, self.R, (self.N, self.E) = scaling, x.shape[0], A.shape[0], gate.shape
        threshold = min(round(dropout_p * 2**32), 2**32 - 1)
        self.dropout = {"seed_ptr": seed, "threshold": (threshold + 2**31) % 2**32 - 2**31, "DROPOUT": dropout_p > 0.0}
        self.plain = {"seed_ptr": None, "threshold": 0, "DROPOUT": False}
        self.dots = config.dots(device, x.dtype, A.dtype)
        self.block_r = pow2(self.R, 16, 256)
        self.launches: list[Launch] = []

    def forward(self, bias: Tensor | None, base: Tensor | None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        xa, h = self._ranks(), self._ranks()
        y = self.x.new_empty(self.M, self.B.shape[0])
        if self.M:
            self._gate(*self._shrink(self.x, self.A, self.A.stride(), self.dropout), gated=h, raw=xa)
            self._onto_y(y, h, bias, base, weight)
        return y, xa

    def backward(
        self, dy: Tensor, xa: Tensor, need_dx: bool, weight: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        dxa, dB, dgate, scores = self._backward_dy(dy, xa)
        dx, dA = self.backward_x(dxa, need_dx, dy, weight, scores, dgate)
        return dx, dA, dB, dgate

    def shrink_x(self) -> Tensor:
        xa = self._buffer(self.M, self.R)
        if self.M:
            self._gate(*self._shrink(self.x, self.A, self.A.stride(), self.dropout), gated=xa)
        return xa

    def expand_xa(self, xa: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        y, h = self.x.new_empty(self.M, self.B.shape[0]), self._ranks()
        if self.M:
            self._gate(xa, 1, gated=h)
            self._onto_y(y, h, bias, None, weight)
        return y

    def backward_dy(self, dy: Tensor, xa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dxa, dB, dgate, scores = self._backward_dy(dy, xa)
        if scores is not None:
            self._sum_segments(scores, dgate)
        return dxa, dB, dgate

    def _backward_dy(self, dy: Tensor, xa: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(dxa, dB, dgate, the scores [M, E] that dgate is still to be summed of, or None where it is them)."""
        dB, dgate = self.B.new_empty(self.B.shape), self.gate.new_empty(self.gate.shape)
        h, dxa = self._ranks(), self._ranks()
        if self.M == 0:
            return dxa, dB.zero_(), dgate.zero_(), None
        one_row_each = self.segments is None and self.N == self.M  # then the scores are the gradient already
        scores = dgate if one_row_each else self._buffer(self.M, self.E)
        self._gate(xa, 1, gated=h)
        launch, dh, parts = pair_launch(self.device, self.dots, dy, h, self.B, dB, (self.R, 1))
        self.launches.append(launch)
        self._gate(dh, len(dh), gated=dxa, xa=xa, scores=scores, more=(parts, dB))
        return dxa, dB, dgate, None if one_row_each else scores

    def backward_x(
        self, dxa: Tensor, need_dx: bool, dy: Tensor | None = None, weight: Tensor | None = None,
        scores: Tensor | None = None, dgate: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """scores, dgate: what is to be summed on the way, if anything."""
        dA = torch.empty_like(self.A, memory_format=torch.contiguous_format)
        dx = self.x.new_empty(self.x.shape) if need_dx else None
        if self.M == 0:
            return dx, dA.zero_()
        parts = self._outer(self.x, dxa, dA, (1, self.A.shape[1]), self.dropout)
        if scores is not None and dgate is not None:
            self._sum_segments(scores, dgate, more=(parts, dA))
        else:
            self._sum(parts, dA)
        if dx is not None:
            strides = self.A.stride()[::-1]
            turned = None if weight is None else weight.t()
            if dy is None or not self._gemm("backward", dy, turned, dx, dxa, self.A, strides, self.dropout):
                self._expand(dx, dxa, self.A, strides, self.dropout)
        return dx, dA

    def _onto_y(self, y: Tensor, h: Tensor, bias: Tensor | None, base: Tensor | None, weight: Tensor | None) -> None:
        if not self._gemm("forward", self.x, weight, y, h, self.B, self.B.stride(), self.plain, bias):
            self._expand(y, h, self.B, self.B.stride(), self.plain, bias, base)

    def _ranks(self) -> Tensor:
        return self.x.new_empty(self.M, self.R, dtype=torch.promote_types(self.x.dtype, self.A.dtype))

    def _buffer(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def _shrink(self, x: Tensor, w: Tensor, strides: tuple[int, int], mask: dict) -> tuple[Tensor, int]:
        """w's (rank, column) strides. Returns the partial sums [S, M, R], and S."""
        M, D = x.shape
        tile = config.shrink_tile(self.device, x, self.R, self.dots)
        S, chunk = config.splits(self.device, ceil_div(M, tile.m), D, tile.n, config.per_sm(self.R))
        parts = self._buffer(S, M, self.R)
        args = {
            "x_ptr": x, "w_ptr": w, "seed_ptr": mask["seed_ptr"], "parts_ptr": parts,
            "M": M, "D": D, "chunk": chunk, "threshold": mask["threshold"],
            "x_row": x.stride(0), "x_col": x.stride(1), "w_rank": strides[0], "w_col": strides[1],
            "R": self.R, "DROPOUT": mask["DROPOUT"], "DOT": self.dots.wide, "PIECES": self.dots.pieces,
            "PRECISION": self.dots.precision, "BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": self.block_r,
        }  # fmt: skip
        self.launches.append(Launch(shrink, (ceil_div(M, tile.m), S), args, tile.warps, tile.stages))
        return parts, S

    def _outer(self, x: Tensor, h: Tensor, out: Tensor, strides: tuple[int, int], mask: dict) -> Tensor:
        """out's (column, rank) strides. Returns the partial sums [G, …], or out itself."""
        M, D = x.shape
        tile = config.outer_tile(self.device, x, self.R, self.dots)
        C = ceil_div(D, tile.n)
        G, chunk = config.splits(self.device, C, M, tile.m, config.per_sm(self.R))
        parts = out if G == 1 else self._buffer(G, *out.shape)
        args = {
            "x_ptr": x, "h_ptr": h, "seed_ptr": mask["seed_ptr"], "parts_ptr": parts, "M": M, "D": D, "chunk": chunk,
            "threshold": mask["threshold"], "x_row": x.stride(0), "x_col": x.stride(1),
            "out_col": strides[0], "out_rank": strides[1], "R": self.R, "DROPOUT": mask["DROPOUT"],
            "DOT": self.dots.wide, "PIECES": self.dots.pieces,
            "PRECISION": self.dots.precision, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": self.block_r,
        }  # fmt: skip
        self.launches.append(Launch(outer, (C, G), args, tile.warps, tile.stages))
        return parts

    def _sum(self, parts: Tensor, out: Tensor) -> None:
        """out from its partial sums [G, …]; there is nothing to do where out is them."""
        args, programs = _along((parts, out), 0)
        if programs:
            args = {"parts_ptr": args["more_ptr"], **{name: args[name] for name in ("sum_ptr", "size", "G", "BLOCK")}}
            self.launches.append(Launch(sum_parts, (programs,), args))

    def _expand(
        self, y: Tensor, h: Tensor, w: Tensor, strides: tuple[int, int], mask: dict,
        bias: Tensor | None = None, base: Tensor | None = None,
    ) -> None:  # fmt: skip
        """w's (column, rank) strides."""
        M, D = y.shape
        tile = config.expand_tile(M, self.R, self.dots)
        base_strides = (0, 0) if base is None else base.stride()
        args = {
            "h_ptr": h, "w_ptr": w, "bias_ptr": bias, "base_ptr": base,
            "seed_ptr": mask["seed_ptr"], "y_ptr": y, "M": M, "D": D, "threshold": mask["threshold"],
            "w_col": strides[0], "w_rank": strides[1], "base_row": base_strides[0], "base_col": base_strides[1],
            "R": self.R, "UNIT": config.unit(strides[0]), "DROPOUT": mask["DROPOUT"],
            "DOT": self.dots.narrow, "PRECISION": self.dots.precision,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": config.expand_step(self.R, self.dots),
        }  # fmt: skip
        self.launches.append(
            Launch(expand, (ceil_div(M, tile.m) * ceil_div(D, tile.n),), args, tile.warps, tile.stages)
        )

    def _gemm(
        self, direction: str, x: Tensor, weight: Tensor | None, y: Tensor, h: Tensor, low: Tensor,
        strides: tuple[int, int], mask: dict, bias: Tensor | None = None,
    ) -> bool:  # fmt: skip
        """weight [D, K] and low's (column, rank) strides. Whether the strategy is one launch for y, now listed."""
        tile = gemm_or_beta(self.device, direction, x, weight, self.A, self.B, self.strategy)
        if tile is None or weight is None:
            return False
        self.launches.append(gemm_launch(self.device, tile, self.dots, x, weight, y, h, low, strides, mask, bias))
        self.fused = True
        return True

    def _gate(
        self, parts: Tensor, S: int, gated: Tensor, raw: Tensor | None = None, xa: Tensor | None = None,
        scores: Tensor | None = None, more: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """parts [S, M, R], or [M, R] where S is 1. more: partial sums that ride along, and their sum."""
        rank = self.R // self.E
        block_e, block_j = pow2(self.E, 1, 256), pow2(rank, 1, 256)
        block_m = max(1, 512 // (block_e * block_j))  # many programs: each waits for its loads more than it computes
        blocks = ceil_div(self.M, block_m)
        along, programs = _along(more, blocks)
        args = {
            "parts_ptr": parts, "gate_ptr": self.gate, "segments_ptr": self.segments, "xa_ptr": xa, "raw_ptr": raw,
            "gated_ptr": gated, "scores_ptr": scores, "M": self.M, "N": self.N, "S": S, "run": self._run(),
            "steps": self.N.bit_length(), "scaling": self.scaling,
            "gate_row": self.gate.stride(0), "gate_col": self.gate.stride(1), **along,
            "E": self.E, "RANK": rank, "BLOCK_M": block_m, "BLOCK_E": block_e, "BLOCK_J": block_j,
        }  # fmt: skip
        self.launches.append(Launch(gate_ranks, (blocks + programs,), args))

    def _sum_segments(self, scores: Tensor, dgate: Tensor, more: tuple[Tensor, Tensor] | None = None) -> None:
        block_e = pow2(self.E, 1, 256)
        block_m = pow2(ceil_div(self.M, self.N), 8, min(256, 4096 // block_e))  # short chains of additions
        along, programs = _along(more, self.N)
        args = {
            "scores_ptr": scores, "segments_ptr": self.segments, "dgate_ptr": dgate, "M": self.M, "run": self._run(),
            **along, "E": self.E, "BLOCK_M": block_m, "BLOCK_E": block_e,
        }  # fmt: skip
        self.launches.append(Launch(sum_segments, (self.N + programs,), args))

    def _run(self) -> int:
        """Rows an instance has where there are no segments."""
        return max(self.M // self.N, 1)


def _along(more: tuple[Tensor, Tensor] | None, blocks: int) -> tuple[dict[str, Any], int]:
    """The arguments of a sum that rides along behind `blocks` programs, and how many of its own it takes: 0 where
    there is none, or where the only partial sum is the sum."""
    if more is None or more[0] is more[1]:
        return {"more_ptr": None, "sum_ptr": None, "size": 0, "G": 0, "blocks": blocks, "BLOCK": 256}, 0
    parts, out = more
    args = {"more_ptr": parts, "sum_ptr": out, "size": out.numel(), "G": len(parts), "blocks": blocks, "BLOCK": 256}
    return args, ceil_div(out.numel(), 256)
