"""The grouped operation in plain torch: what every backend computes and is tested against.

Rows are sorted by slot. Names and shapes: M rows, X slots, N instances, E experts, R total rank,
x [M, d_in], weight [X, d_out, d_in] or [d_out, d_in], A [X, R, d_in], B [X, d_out, R], gate [N, E],
offsets [X+1] (slot s has the rows offsets[s] <= m < offsets[s+1]), instances [M] (row m has the gate of instances[m]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op.reference import as_seed, dropped, row_gates, segment_sums


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scaling: float,
    offsets: Tensor,
    instances: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y[m] = x[m] W[s]ᵀ + b[s] + (γ[m] ⊙ (dropout(x)[m] A[s]ᵀ)) B[s]ᵀ, where s is the slot of row m and
    γ[m, r] = scaling · gate[instances[m], r // (R/E)].

    Arguments as of `ilora.grouped_linear`. Returns y [M, d_out]. Differentiable to any order; no input is checked here.
    """
    seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    xa = shrink_x(x, A, offsets, dropout_p, seed)
    return expand_xa(x, xa, weight, bias, None, B, offsets, gate, instances, scaling / (1.0 - dropout_p))


def runs(offsets: Tensor) -> list[tuple[int, slice]]:
    """(slot, its rows) of every slot that has rows. Reads the offsets, which on a GPU waits for it."""
    ends = offsets.tolist()
    return [(s, slice(ends[s], ends[s + 1])) for s in range(len(ends) - 1) if ends[s] < ends[s + 1]]


# The four primitives, as in ilora/op/reference.py. Every tensor has been checked, scaling holds the 1/(1-p) of dropout,
# and seed is a tensor whenever dropout_p is not 0. The dropout mask is the plain operation's for x as it lies here.


def shrink_x(x: Tensor, A: Tensor, offsets: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R]: dropout(x) A[s]ᵀ."""
    wide = torch.promote_types(x.dtype, A.dtype)
    return by_slot(dropped(x, dropout_p, seed).to(wide), A.to(wide), offsets)


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
    """y [M, d_out]: x W[s]ᵀ + b[s] + (γ ⊙ xa) B[s]ᵀ with a weight, base + (γ ⊙ xa) B[s]ᵀ without one."""
    gamma = gates_of_rows(gate, instances, xa.shape[1], scaling)
    update = by_slot((xa * gamma).to(xa.dtype), B.to(xa.dtype), offsets).to(x.dtype)
    if weight is None:
        return update if base is None else base + update
    y = by_slot(x, weight, offsets) + update
    if bias is None:
        return y
    counts = (offsets[1:] - offsets[:-1]).long()
    return y + (bias if bias.dim() == 1 else bias.repeat_interleave(counts, 0))


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, offsets: Tensor, gate: Tensor, instances: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB [X, d_out, R], dgate [N, E]) from one pass over dy; xa contiguous."""
    (M, R), (N, E), wide = xa.shape, gate.shape, xa.dtype
    gamma = gates_of_rows(gate, instances, R, scaling)
    dh = by_slot(dy.to(wide), B.to(wide).mT, offsets)
    h = (gamma * xa).to(wide)
    dB = torch.zeros_like(B)
    for s, rows in runs(offsets):
        dB[s] = dy[rows].to(wide).T @ h[rows]
    by_expert = (dh.to(gamma.dtype) * xa.to(gamma.dtype)).reshape(M, E, R // E).sum(-1)
    order = torch.argsort(instances, stable=True)  # so that each instance's rows are summed in their order
    edges = torch.arange(N + 1, dtype=instances.dtype, device=instances.device)
    segments = torch.searchsorted(instances[order], edges)
    dgate = scaling * segment_sums(by_expert[order], N, segments)
    return (gamma * dh).to(wide), dB, dgate.to(gate.dtype)


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
    """(dx [M, d_in] or None, dA [X, R, d_in]) from one pass over x; dx = dropout's mask ⊙ (dxa A[s]) + Σ dy W[s] over
    the products (dy, W)."""
    wide = dxa.dtype
    kept, dA = dropped(x, dropout_p, seed).to(wide), torch.zeros_like(A)
    for s, rows in runs(offsets):
        dA[s] = dxa[rows].T @ kept[rows]
    dx = None
    if need_dx:
        dx = dropped(by_slot(dxa, A.to(wide).mT, offsets), dropout_p, seed).to(x.dtype)
        for dy, weight in products:
            dx += by_slot(dy, weight.mT, offsets)
    return dx, dA


def by_slot(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[M, k] times the transposed [X, n, k] of each row's slot, or [n, k] of all: [M, n]."""
    if weight.dim() == 2:
        return x @ weight.T
    parts = [x[rows] @ weight[s].T for s, rows in runs(offsets)]
    return torch.cat(parts or [x @ weight[:1].sum(0).T])  # without rows, [0, n] that autograd knows of


def gates_of_rows(gate: Tensor, instances: Tensor, R: int, scaling: float) -> Tensor:
    """γ [M, R] in the gate's dtype, float32 at least."""
    return row_gates(gate.index_select(0, instances), len(instances), R, scaling, None)
