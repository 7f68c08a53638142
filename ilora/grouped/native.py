"""The grouped operation's native backend: C++ loops for the four primitives on the CPU (csrc/cpu/grouped.cpp), and
torch's matrix multiplication for each slot's frozen product. What each function computes stands in `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op.native import add_products, dense_gate, through_float32
from ..op.reference import dropout_threshold
from .reference import runs

_OPS = torch.ops.ilora_native


def shrink_x(x: Tensor, A: Tensor, offsets: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R]."""
    return _OPS.grouped_shrink_x.default(x, A, offsets, dropout_threshold(dropout_p), seed)


def expand_xa(
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    B: Tensor,
    offsets: Tensor,
    gate: Tensor,
    instances: Tensor,
    scaling: float,
) -> Tensor:
    """y [M, d_out]: the update first, then each slot's x Wᵀ added onto it."""
    products = [] if weight is None else _products(x, weight.mT, offsets)
    wide = any(through_float32(a, b) for _, a, b in products)
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(len(B), -1)
    frozen = (bias, None) if weight is not None else (None, base)
    y = _OPS.grouped_expand_xa.default(x, xa, *frozen, B, offsets, dense_gate(gate, x), instances, scaling, wide)
    return _added(y, products).to(x.dtype)


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, offsets: Tensor, gate: Tensor, instances: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB [X, d_out, R], dgate [N, E]); dxa is float32, beside float64 it is float64."""
    gates = (dense_gate(gate, dy), instances, scaling)
    dxa, dB, dgate = _OPS.grouped_backward_dy.default(dy, xa, B, offsets, *gates)
    return dxa, dB, dgate.to(gate.dtype)


def backward_x(
    dxa: Tensor,
    x: Tensor,
    A: Tensor,
    offsets: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    products: list[tuple[Tensor, Tensor]],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """(dx [M, d_in] in x's dtype or None, dA [X, R, d_in]): dropout(dxa A) first, then each dy W added onto it."""
    each = [one for dy, weight in products for one in _products(dy, weight, offsets)] if need_dx else []
    wide = any(through_float32(a, b) for _, a, b in each)
    dx, dA = _OPS.grouped_backward_x.default(dxa, x, A, offsets, dropout_threshold(dropout_p), seed, need_dx, wide)
    return _added(dx, each).to(x.dtype) if need_dx else None, dA


def _products(x: Tensor, factor: Tensor, offsets: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
    """(rows, a, b) of every slot's product a b of x [M, k] and factor [X, k, n], or one product with [k, n]."""
    if factor.dim() == 2:
        return [(slice(None), x, factor)]
    return [(rows, x[rows], factor[s]) for s, rows in runs(offsets)]


def _added(out: Tensor, products: list[tuple[slice, Tensor, Tensor]]) -> Tensor:
    for rows, a, b in products:
        add_products(out[rows], [(a, b)])
    return out
