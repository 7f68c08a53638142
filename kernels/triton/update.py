"""forward and backward of the low-rank update: plans of launches, then the frozen product by cuBLAS on top (beta = 1).

Names as everywhere: M rows, N gate rows, E experts, R ranks, x [M, d_in], A [R, d_in], B [d_out, R], gate [N, E].
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import config, decode
from .dropout import PLAIN, Mask, mask_of
from .expand import expand_launch
from .gates import Gate, gate_launch
from .gemm import gemm_launch
from .launch import Device, Launch, device_of
from .outer import outer_launch, outers_launch
from .pair import pair_launch
from .replay import Plan, planned
from .shrink import shrink_launch
from .strategy import BETA, Choice, pick
from .sums import Partial, sums_launch
from .whole import Ranks, whole_launch


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
        return update.plan(results)

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
        return update.plan(results)

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
        self.device, self.x, self.A, self.B = device, x, A, B
        self.M, self.R = x.shape[0], A.shape[0]
        self.gate, self.mask = Gate(gate, segments, scaling, self.M), mask_of(dropout_p, seed)
        self.dots = config.dots(device, x.dtype, A.dtype)
        self.launches: list[Launch] = []

    def plan(self, results: tuple[Tensor | None, ...]) -> Plan:
        """What was listed for these results."""
        return [each._replace(pdl=self.device.pdl) for each in self.launches], results, self.fused

    def forward(self, bias: Tensor | None, base: Tensor | None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        xa, y = self._ranks(), self.x.new_empty(self.M, self.B.shape[0])
        if self.M == 0:
            return y, xa
        choice = self._pick("forward", self.x, weight, None if self.mask.on else self.A)
        if choice.strategy == "whole":
            source = self._shrink() if self.mask.on else self.A
            self._whole(choice, self.x, weight, source, y, self.B, Ranks(raw=xa), PLAIN, bias)
        else:
            h = self._ranks()
            self._gate(self._shrink(), h, raw=xa)
            self._onto(choice, y, self.x, weight, h, self.B, PLAIN, bias, base)
        return y, xa

    def backward(
        self, dy: Tensor, xa: Tensor, need_dx: bool, weight: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        if need_dx and self.M:
            turned = None if weight is None else weight.t()
            choice = self._pick("backward", dy, turned, self.B.t())
            if choice.strategy == "whole":
                return self._backward_whole(choice, dy, xa, turned)
        dxa, dB, dgate, scores = self._backward_dy(dy, xa)
        dx, dA = self.backward_x(dxa, need_dx, dy, weight, scores, dgate)
        return dx, dA, dB, dgate

    def shrink_x(self) -> Tensor:
        xa = self.x.new_empty(self.M, self.R, dtype=torch.float32)
        if self.M:
            self._gate(self._shrink(), xa)
        return xa

    def expand_xa(self, xa: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        y = self.x.new_empty(self.M, self.B.shape[0])
        if self.M == 0:
            return y
        choice = self._pick("forward", self.x, weight)
        if choice.strategy == "whole":
            self._whole(choice, self.x, weight, xa[None], y, self.B, Ranks(), PLAIN, bias)
        else:
            h = self._ranks()
            self._gate(xa, h)
            self._onto(choice, y, self.x, weight, h, self.B, PLAIN, bias)
        return y

    def backward_dy(self, dy: Tensor, xa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dxa, dB, dgate, scores = self._backward_dy(dy, xa)
        self.launches += sums_launch(scores, self.gate.segments, dgate)
        return dxa, dB, dgate

    def backward_x(
        self, dxa: Tensor, need_dx: bool, dy: Tensor | None = None, weight: Tensor | None = None,
        scores: Tensor | None = None, dgate: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """scores: what dgate is to be summed of on the way, if anything."""
        dA = torch.empty_like(self.A, memory_format=torch.contiguous_format)
        dx = self.x.new_empty(self.x.shape) if need_dx else None
        if self.M == 0:
            return dx, dA.zero_()
        strides = (1, self.A.shape[1])
        launch, parts = outer_launch(self.device, self.dots, self.x, dxa, dA, strides, self.mask)
        self.launches.append(launch)
        self.launches += sums_launch(scores, self.gate.segments, dgate, (parts, dA))
        if dx is not None:
            turned = None if weight is None else weight.t()
            choice = BETA if dy is None else self._pick("backward", dy, turned, gated=True)
            self._onto(choice, dx, dy, turned, dxa, self.A.t(), self.mask)
        return dx, dA

    def _backward_dy(self, dy: Tensor, xa: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(dxa, dB, dgate, the scores [M, E] that dgate is still to be summed of, or None where it is them)."""
        dB, h, dxa = self.B.new_empty(self.B.shape), self._ranks(), self._ranks()
        scores, dgate = self.gate.scores()
        if self.M == 0:
            return dxa, dB.zero_(), dgate.zero_(), None
        self._gate(xa, h)
        launch, dh, parts = pair_launch(self.device, self.dots, dy, h, self.B, dB, (self.R, 1))
        self.launches.append(launch)
        self._gate(dh, dxa, xa=xa, scores=scores, more=(parts, dB))
        return dxa, dB, dgate, None if scores is dgate else scores

    def _backward_whole(
        self, choice: Choice, dy: Tensor, xa: Tensor, turned: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dA = torch.empty_like(self.A, memory_format=torch.contiguous_format)
        dx, dB, h, dxa = self.x.new_empty(self.x.shape), self.B.new_empty(self.B.shape), self._ranks(), self._ranks()
        dgate = self.gate.gate.new_empty(self.gate.gate.shape)
        scores = self.x.new_empty(self.M, self.R, dtype=torch.float32)
        ranks = Ranks(gated=dxa, xa=xa, h=h, scores=scores)
        self._whole(choice, dy, turned, self.B.t(), dx, self.A.t(), ranks, self.mask)
        launch, *parts = outers_launch(self.device, self.dots, self.x, dxa, dA, self.mask, dy, h, dB)
        self.launches.append(launch)
        self.launches += sums_launch(scores, self.gate.segments, dgate, (parts[0], dA), (parts[1], dB))
        return dx, dA, dB, dgate

    def _pick(
        self, direction: str, x: Tensor, weight: Tensor | None, ranks: Tensor | None = None, gated: bool = False
    ) -> Choice:
        return pick(self.device, direction, x, weight, self.A, self.B, self.strategy, ranks, gated, self.mask.on)

    def _onto(
        self, choice: Choice, y: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor, low: Tensor, mask: Mask,
        bias: Tensor | None = None, base: Tensor | None = None,
    ) -> None:  # fmt: skip
        """y [M, D] = bias + base + keep ⊙ (h lowᵀ), and x · weight in it if the choice is a GEMM; weight [D, K]."""
        if choice.tile is None or x is None or weight is None:
            self.launches.append(expand_launch(self.dots, y, h, low, mask, bias, base))
        else:
            self.launches.append(gemm_launch(self.device, choice.tile, self.dots, x, weight, y, h, low, mask, bias))
            self.fused = True

    def _whole(
        self, choice: Choice, x: Tensor, weight: Tensor | None, source: Tensor, y: Tensor, low: Tensor,
        ranks: Ranks, mask: Mask, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        assert choice.tile is not None
        assert weight is not None
        what = (x, weight, source, y, low, self.gate, ranks, mask, bias)
        self.launches.append(whole_launch(self.device, choice.tile, self.dots, *what))
        self.fused = True

    def _shrink(self) -> Tensor:
        launch, parts = shrink_launch(self.device, self.dots, self.x, self.A, self.mask)
        self.launches.append(launch)
        return parts

    def _gate(
        self, parts: Tensor, gated: Tensor, raw: Tensor | None = None, xa: Tensor | None = None,
        scores: Tensor | None = None, more: Partial | None = None,
    ) -> None:  # fmt: skip
        self.launches.append(gate_launch(self.gate, parts, gated, raw, xa, scores, more))

    def _ranks(self) -> Tensor:
        return self.x.new_empty(self.M, self.R, dtype=torch.promote_types(self.x.dtype, self.A.dtype))
