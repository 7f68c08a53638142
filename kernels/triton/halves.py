"""forward and backward in halves (see ilora/reference.py), for projections that share x: one `shrink` for xa, one
`outer` for dA and one `expand` for dx over all their A's, one below the other; the rest for each projection."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import device_of, run
from .update import Update


def shrink_x(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] = x̃ Aᵀ, float32: it is rounded once, when the gate has been at it."""
    update = _of_x(x, A, x.shape[1], dropout_p, seed)
    xa = update.shrink_x()
    run(update.launches, x.device)
    return xa


def expand_xa(
    x: Tensor, xa: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, gate: Tensor, segments: Tensor | None,
    scaling: float,
) -> Tensor:  # fmt: skip
    """y [M, d_out] = x Wᵀ + b + (γ ⊙ xa) Bᵀ."""
    A = _shaped(B, B.shape[1], x.shape[1])
    update = Update(device_of(x), x, A, B, gate, segments, scaling, 0.0, None)
    y = update.expand_xa(xa, bias, weight)
    run(update.launches, x.device)
    if y.numel() and not update.fused:
        y.addmm_(x, weight.t())
    return y


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB, dgate) from one launch over dy."""
    update = Update(device_of(dy), dy, _shaped(B, *reversed(B.shape)), B, gate, segments, scaling, 0.0, None)
    results = update.backward_dy(dy, xa)
    run(update.launches, dy.device)
    return results


def backward_x(
    dxa: Tensor, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None, products: list[tuple[Tensor, Tensor]],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(dx or None, dA): dx = keep ⊙ (dxa A) + Σ dy W over the products, the first of them in one GEMM with it where
    strategy.py says so."""
    dy, weight = products[0] if products else (None, None)
    update = _of_x(x, A, x.shape[1] if dy is None else dy.shape[1], dropout_p, seed)
    dx, dA = update.backward_x(dxa, need_dx, dy, weight)
    run(update.launches, x.device)
    for dy, weight in products[update.fused :] if dx is not None and dx.numel() else ():
        dx.addmm_(dy, weight)
    return dx, dA


def _of_x(x: Tensor, A: Tensor, d_out: int, dropout_p: float, seed: Tensor | None) -> Update:
    """The half of an update that knows of x and A alone, under a gate of one."""
    one = x.new_ones(1, 1, dtype=torch.float32)
    return Update(device_of(x), x, A, _shaped(A, d_out, A.shape[0]), one, None, 1.0, dropout_p, seed)


def _shaped(like: Tensor, *shape: int) -> Tensor:
    """Stands for the other operand, of which only the shape is asked."""
    return like.new_empty(()).expand(shape)
