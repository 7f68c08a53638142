"""The grouped operation's Triton backend: the four primitives for rows sorted by slot.

    shrink_x      xa = x̃ A[s]ᵀ                                             grouped_shrink
    expand_xa     y = x W[s]ᵀ + bias[s] + (γ ⊙ xa) B[s]ᵀ                    the frozen product, grouped_expand
    backward_dy   dxa = γ ⊙ (dy B[s]),  dB[s] = dyᵀ (γ ⊙ xa),  dgate        grouped_shrink, grouped_grad_weights, sums
    backward_x    dA[s] = dxaᵀ x̃,  dx = dy W[s] + keep ⊙ (dxa A[s])        grouped_grad_weights, expand, the product

Shapes: M rows, X slots, N gate rows, E experts, R ranks; x [M, d_in], weight [X, d_out, d_in] or [d_out, d_in], A
[X, R, d_in], B [X, d_out, R], gate [N, E]; offsets int32 [X+1], instances int32 [M]; seed int64 [1] or None. Nothing
here reads a value on the host, so the GPU is never waited for. No kernel uses atomics: the same inputs give the same
bits.
"""

import torch
from torch import Tensor

from . import grouped_plans as plans
from .replay import replay


def shrink_x(x: Tensor, A: Tensor, offsets: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] in the wider dtype of x and A."""
    if not len(x):
        return x.new_empty(0, A.shape[1], dtype=torch.promote_types(x.dtype, A.dtype))
    (xa,), _ = replay(plans.shrink_x, (x, A, offsets, seed), (dropout_p,))
    return xa


def expand_xa(
    x: Tensor, xa: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, B: Tensor, offsets: Tensor,
    gate: Tensor, instances: Tensor, scaling: float,
) -> Tensor:  # fmt: skip
    """y [M, d_out] = x W[s]ᵀ + bias[s] + (γ ⊙ xa) B[s]ᵀ with a weight, base + (γ ⊙ xa) B[s]ᵀ without one."""
    if not len(x):
        return x.new_empty(0, B.shape[1])
    by_slot = weight is not None and weight.dim() == 3
    if weight is None:
        bias = None
    else:
        base = _frozen(x, weight, offsets) if by_slot else None
    inputs = (x, xa, bias, base, B, offsets, gate, instances)
    (y,), _ = replay(plans.expand_xa, inputs, (scaling, by_slot))
    return y if weight is None or by_slot else y.addmm_(x, weight.t())


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, offsets: Tensor, gate: Tensor, instances: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB [X, d_out, R], dgate [N, E])."""
    if not len(dy):
        return xa.new_empty(xa.shape), B.new_zeros(B.shape), gate.new_zeros(gate.shape)
    (dxa, dB, scores), _ = replay(plans.backward_dy, (dy, xa, B, offsets, gate, instances), (scaling,))
    ordered, order = torch.sort(instances, stable=True)  # each instance's rows, in their order
    edges = torch.arange(len(gate) + 1, dtype=torch.int32, device=gate.device)
    segments = torch.searchsorted(ordered, edges, out_int32=True)
    (dgate,), _ = replay(plans.gate_sums, (scores.index_select(0, order), segments, gate), ())
    return dxa, dB, dgate


def backward_x(
    dxa: Tensor, x: Tensor, A: Tensor, offsets: Tensor, dropout_p: float, seed: Tensor | None,
    products: list[tuple[Tensor, Tensor]], need_dx: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(dx or None, dA): dx = keep ⊙ (dxa A[s]) + Σ dy W[s] over the (dy, weight) of `products`."""
    if not len(x):
        return x.new_empty(x.shape) if need_dx else None, A.new_zeros(A.shape)
    frozen = None
    for dy, weight in products if need_dx else ():
        product = _frozen(dy, weight.mT, offsets) if weight.dim() == 3 else dy @ weight
        frozen = product if frozen is None else frozen.add_(product)
    (dx, dA), _ = replay(plans.backward_x, (x, dxa, A, offsets, frozen, seed), (dropout_p, need_dx))
    return dx, dA


def _frozen(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [M, K] times the transposed [X, D, K] of each row's slot: by torch's grouped product where it has a kernel for
    it, which elsewhere would read the offsets; else by ours."""
    if _torch_has_a_kernel(x, weight):
        return torch._grouped_mm(x, weight.mT, offs=offsets[1:])
    (y,), _ = replay(plans.frozen, (x, weight, offsets), ())
    return y


def _torch_has_a_kernel(x: Tensor, weight: Tensor) -> bool:
    """bfloat16 on sm_90 and sm_100, with sizes and strides of whole 16 bytes."""
    if not (x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and torch.version.hip is None):
        return False
    if torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return False
    lengths = [n for t in (x, weight) for n in (*t.stride(), *weight.shape[1:]) if n != 1]
    return all(1 in t.stride()[-2:] and t.data_ptr() % 16 == 0 for t in (x, weight)) and not any(n % 8 for n in lengths)
