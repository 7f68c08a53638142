"""forward and backward in halves (see ilora/reference.py), for projections that share x: one `shrink` for xa, one
`outer` for dA and one `expand` for dx over all their A's, one below the other; the rest for each projection."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import device_of
from .replay import Plan, planned
from .update import Update


def shrink_x(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] = x̃ Aᵀ, float32: it is rounded once, when the gate has been at it."""
    one = _one(x)

    def make() -> Plan:
        update = _of_x(x, A, one, x.shape[1], dropout_p, seed)
        xa = update.shrink_x()
        return update.plan((xa,))

    (xa,), _ = planned("shrink_x", (dropout_p,), x, (x, A, one, seed), make)
    return xa


def expand_xa(
    x: Tensor, xa: Tensor, weight: Tensor, bias: Tensor | None, base: None, B: Tensor, gate: Tensor,
    segments: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    """y [M, d_out] = x Wᵀ + b + (γ ⊙ xa) Bᵀ."""

    def make() -> Plan:
        update = Update(device_of(x), x, _shaped(B, B.shape[1], x.shape[1]), B, gate, segments, scaling, 0.0, None)
        y = update.expand_xa(xa, bias, weight)
        return update.plan((y,))

    (y,), fused = planned("expand_xa", (scaling,), x, (x, xa, weight, bias, B, gate, segments), make)
    if y.numel() and not fused:
        y.addmm_(x, weight.t())
    return y


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB, dgate) from one launch over dy."""

    def make() -> Plan:
        update = Update(device_of(dy), dy, _shaped(B, *reversed(B.shape)), B, gate, segments, scaling, 0.0, None)
        return update.plan(update.backward_dy(dy, xa))

    (dxa, dB, dgate), _ = planned("backward_dy", (scaling,), dy, (dy, xa, B, gate, segments), make)
    return dxa, dB, dgate


def backward_x(
    dxa: Tensor, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None, products: list[tuple[Tensor, Tensor]],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(dx or None, dA): dx = keep ⊙ (dxa A) + Σ dy W over the products, the first of them in one GEMM with it where
    strategy.py says so."""
    dy, weight = products[0] if products else (None, None)
    one = _one(x)

    def make() -> Plan:
        update = _of_x(x, A, one, x.shape[1] if dy is None else dy.shape[1], dropout_p, seed)
        results = update.backward_x(dxa, need_dx, dy, weight)
        return update.plan(results)

    inputs = (dxa, x, A, one, dy, weight, seed)
    (dx, dA), fused = planned("backward_x", (dropout_p, need_dx), x, inputs, make)
    for each, its_weight in products[fused:] if dx is not None and dx.numel() else ():
        dx.addmm_(each, its_weight)
    return dx, dA


def _one(x: Tensor) -> Tensor:
    return x.new_ones(1, 1, dtype=torch.float32)


def _of_x(x: Tensor, A: Tensor, one: Tensor, d_out: int, dropout_p: float, seed: Tensor | None) -> Update:
    """The half of an update that knows of x and A alone, under a gate of one."""
    return Update(device_of(x), x, A, _shaped(A, d_out, A.shape[0]), one, None, 1.0, dropout_p, seed)


def _shaped(like: Tensor, *shape: int) -> Tensor:
    """Stands for the other operand, of which only the shape is asked."""
    return like.new_empty(()).expand(shape)
