"""The definition, in plain torch: what every backend computes and is tested against.

Names and shapes (used everywhere): M rows, N gate rows, E experts, R total rank,
x [M, d_in], A [R, d_in], B [d_out, R], gate [N, E], segments [N+1], xa = dropout(x) Aᵀ [M, R], y [M, d_out].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ilora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scaling: float,
    segments: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b + ((dropout(x) Aᵀ) ⊙ γ) Bᵀ with γ[m, r] = scaling · gate[i(m), r // (R/E)] (arXiv 2408.10159).

    Args:
        x: [..., d_in]; its leading dimensions flatten to M rows.
        weight, bias: the frozen linear, [d_out, d_in] and [d_out] or None.
        A, B: [R, d_in] and [d_out, R]; expert e owns ranks [e·R/E, (e+1)·R/E).
        gate: [N, E], one row per instance; or [..., E] with the first dimensions of x.
        scaling: alpha / (R/E).
        segments: int32 [N+1], row m belongs to instance i iff segments[i] <= m < segments[i+1];
            None means N runs of M/N rows each.
        dropout_p, seed: dropout on the low-rank path only, a function of (seed, row, column); see `keep_mask`.
    Returns: y [..., d_out] in x's dtype. Differentiable to any order; no input is checked here.
    """
    rows = x.reshape(-1, x.shape[-1])
    seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    # Inverted dropout: the mask on x, its 1/(1-p) in the scaling, where it costs no rounding.
    xa = shrink_x(rows, A, dropout_p, seed)
    gate = gate.reshape(-1, gate.shape[-1])
    y = expand_xa(rows, xa, weight, bias, None, B, gate, segments, scaling / (1.0 - dropout_p))
    return y.reshape(*x.shape[:-1], B.shape[0])


def row_instances(M: int, N: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """i(m) for every row: int64 [M]. Empty segments own no row."""
    m = torch.arange(M, device=device)
    if segments is None:
        return m // max(M // max(N, 1), 1)
    return torch.searchsorted(segments.to(torch.int64), m, right=True) - 1


def row_gates(gate: Tensor, M: int, R: int, scaling: float, segments: Tensor | None) -> Tensor:
    """γ [M, R] in the gate's dtype, float32 at least: scaling · gate[i(m), r // (R/E)]."""
    N, E = gate.shape
    gamma = gate.to(torch.promote_types(gate.dtype, torch.float32)) * scaling
    return gamma.repeat_interleave(R // E, dim=1)[row_instances(M, N, segments, gate.device)]


# The dropout mask: a 32-bit counter-based hash of (seed, row, column), so that forward and backward, and every
# backend whatever its tiles, recompute the same mask and nothing is stored. All arithmetic is modulo 2**32.
GOLDEN, MUL1, MUL2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # golden ratio; C. Wellons' low-bias multipliers


def _i32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _mix(v: Tensor) -> Tensor:
    """A bijection of 32-bit words; int32 here, hence the masks that make the shifts logical."""
    v = (v ^ (v >> 16 & 0xFFFF)) * _i32(MUL1)
    v = (v ^ (v >> 15 & 0x1FFFF)) * _i32(MUL2)
    return v ^ (v >> 16 & 0xFFFF)


def keep_mask(seed: Tensor, M: int, d: int, dropout_p: float, start: int = 0) -> Tensor:
    """True where the element (row, column) is kept: bool [M, d] on the seed's device, of the columns from `start` on.

    seed is one int64, lo and hi its words. With two keys a seed (s1, s2) and two a row (k1, k2):
        s1 = mix(mix(hi ^ GOLDEN) ^ lo);  s2 = mix(mix(lo ^ GOLDEN) ^ hi);  k1 = mix(row ^ s1);  k2 = mix(k1 + s2)
        v  = k1 + column · GOLDEN;  v = (v ^ v >> 16) · MUL1;  v = ((v ^ v >> 15) + k2) · MUL2
    and the element is dropped iff v < round(p · 2**32), as unsigned words.
    """
    lo, hi = seed.reshape(()).to(torch.int32), (seed.reshape(()) >> 32).to(torch.int32)
    row = torch.arange(M, dtype=torch.int32, device=seed.device)[:, None]
    column = torch.arange(start, start + d, dtype=torch.int32, device=seed.device)
    golden = _i32(GOLDEN)
    k1 = _mix(row ^ _mix(_mix(hi ^ golden) ^ lo))
    k2 = _mix(k1 + _mix(_mix(lo ^ golden) ^ hi))
    v = k1 + column * golden
    v = (v ^ (v >> 16 & 0xFFFF)) * _i32(MUL1)
    v = ((v ^ (v >> 15 & 0x1FFFF)) + k2) * _i32(MUL2)
    return (v ^ _i32(1 << 31)) >= _i32(dropout_threshold(dropout_p) ^ (1 << 31))  # unsigned order through signed words


def dropout_threshold(dropout_p: float) -> int:
    """round(p · 2**32), an unsigned 32-bit word."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """One int64 on the device; drawn from torch's generator there when seed is None (so torch.manual_seed rules it)."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    return seed


# The four primitives, which every backend has under these names. Every tensor is 2-D here and has been checked, scaling
# holds the 1/(1-p) of dropout, and seed is a tensor whenever dropout_p is not 0. `backward_dy` and `backward_x` are the
# gradients of `expand_xa` and `shrink_x`.


def shrink_x(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] = dropout(x) Aᵀ."""
    wide = torch.promote_types(x.dtype, A.dtype)
    return dropped(x, dropout_p, seed).to(wide) @ A.to(wide).T


def expand_xa(
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
) -> Tensor:
    """y [M, d_out] = x Wᵀ + b + (γ ⊙ xa) Bᵀ with a weight, base + (γ ⊙ xa) Bᵀ without one; xa [M, R] contiguous."""
    gamma = row_gates(gate, xa.shape[0], xa.shape[1], scaling, segments)
    update = ((xa * gamma).to(xa.dtype) @ B.to(xa.dtype).T).to(x.dtype)
    if weight is not None:
        return F.linear(x, weight, bias) + update
    return update if base is None else base + update


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB [d_out, R], dgate [N, E]) from one pass over dy, xa contiguous."""
    (M, R), (N, E), wide = xa.shape, gate.shape, xa.dtype
    gamma = row_gates(gate, M, R, scaling, segments)
    dh = dy.to(wide) @ B.to(wide)
    dB = dy.to(wide).T @ (gamma * xa).to(wide)
    by_expert = (dh.to(gamma.dtype) * xa.to(gamma.dtype)).reshape(M, E, R // E).sum(-1)
    dgate = scaling * segment_sums(by_expert, N, segments)
    return (gamma * dh).to(wide), dB.to(B.dtype), dgate.to(gate.dtype)


def backward_x(
    dxa: Tensor,
    x: Tensor,
    A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    products: list[tuple[Tensor, Tensor]],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """(dx [M, d_in] or None, dA [R, d_in]) from one pass over x; dx = dropout's mask ⊙ (dxa A) + Σ dy W over the
    products (dy, W)."""
    wide = dxa.dtype
    dA = dxa.T @ dropped(x, dropout_p, seed).to(wide)
    dx = None
    if need_dx:
        dx = dropped(dxa @ A.to(wide), dropout_p, seed).to(x.dtype)
        for dy, weight in products:
            dx.add_(dy @ weight)
    return dx, dA.to(A.dtype)


def dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else torch.where(keep_mask(seed, x.shape[0], x.shape[1], dropout_p), x, 0)


def segment_sums(rows: Tensor, N: int, segments: Tensor | None) -> Tensor:
    """[M, E] -> [N, E], in a fixed order on every device (an index_add would not be)."""
    if segments is None:
        return rows.reshape(N, -1, rows.shape[1]).sum(1) if N else rows.new_zeros(0, rows.shape[1])
    return torch.segment_reduce(rows, "sum", offsets=segments.to(torch.int64), axis=0, initial=0)
