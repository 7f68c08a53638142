"""forward and backward, composed of a backend's four primitives: shrink_x, expand_xa, backward_dy, backward_x.

A backend that computes a whole direction faster than its primitives one after another offers `forward` or `backward`
itself, with the arguments and results below, and then that is called. Every tensor is 2-D here and has been checked,
scaling holds the 1/(1-p) of dropout, and seed is a tensor whenever dropout_p is not 0.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def forward(
    backend: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [M, d_out], xa [M, R]). Without a weight y is the update alone, added to base [M, d_out] if there is one."""
    merged = getattr(backend, "forward", None)
    if merged is not None:
        return merged(x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed)
    xa = backend.shrink_x(x, A, dropout_p, seed)
    return backend.expand_xa(x, xa, weight, bias, base, B, gate, segments, scaling), xa


def backward(
    backend: ModuleType,
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(dx [M, d_in] or None, dA [R, d_in], dB [d_out, R], dgate [N, E])."""
    merged = getattr(backend, "backward", None)
    if merged is not None:
        return merged(dy, x, xa, weight, A, B, gate, segments, scaling, dropout_p, seed, need_dx)
    dxa, dB, dgate = backend.backward_dy(dy, xa, B, gate, segments, scaling)
    products = [] if weight is None else [(dy, weight)]
    dx, dA = backend.backward_x(dxa, x, A, dropout_p, seed, products, need_dx)
    return dx, dA, dB, dgate
