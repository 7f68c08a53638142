"""Which kernels each call launches, on which tensors.

Each function takes the device, the tensors that its launches read, and settings. It returns a plan with the results of
the function of the same name in primitives.py, which says what the tensors are. Unless the plan `has_product`, the
frozen product is still to be added to y or dx.
"""

import torch
from torch import Tensor

from .decode import add_decode, decodes
from .device import Device
from .dropout import Mask, mask_of
from .expand import add_expand
from .fused_layer import add_fused_layer
from .gates import Gate, add_gate_ranks
from .grad_dy import add_grad_dy
from .grad_weights import add_grad_weights
from .launch import Plan
from .shrink import add_gated_shrink, add_shrink
from .strategy import fuses, requested
from .sums import add_sums


def shrink_x(device: Device, x: Tensor, A: Tensor, seed: Tensor | None, dropout_p: float) -> Plan:
    plan = Plan(device, x, A)
    if len(x) == 0:
        return plan.returning(x.new_empty(0, len(A), dtype=torch.float32))
    parts = add_shrink(plan, x, A, mask_of(dropout_p, seed))
    xa = parts if parts.dim() == 2 else parts.new_empty(parts.shape[1:])
    add_sums(plan, (parts, xa))
    return plan.returning(xa)


def expand_xa(
    device: Device, x: Tensor, xa: Tensor, bias: Tensor | None, B: Tensor, gate: Tensor, segments: Tensor | None,
    scaling: float,
) -> Plan:  # fmt: skip
    plan = Plan(device, x, B)
    if len(x) == 0:
        return plan.returning(plan.new_wide(0, len(B)))
    h = plan.new_ranks(*xa.shape)
    add_gate_ranks(plan, Gate(gate, segments, scaling, len(x)), xa, h)
    return plan.returning(add_expand(plan, h, B, bias=bias))


def backward_dy(
    device: Device, dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> Plan:
    plan, gating, dB = Plan(device, dy, B), Gate(gate, segments, scaling, len(dy)), B.new_empty(B.shape)
    if len(dy) == 0:
        return plan.returning(plan.new_ranks(*xa.shape), dB.zero_(), gating.no_rows())
    h = plan.new_ranks(*xa.shape)
    add_gate_ranks(plan, gating, xa, h)
    dxa, scores, dgate, parts = add_grad_dy(plan, dy, xa, h, B, dB, gating)
    add_sums(plan, (parts, dB), None, scores, segments, dgate)
    return plan.returning(dxa, dB, dgate)


def backward_x(
    device: Device, x: Tensor, dxa: Tensor, A: Tensor, seed: Tensor | None, dropout_p: float, need_dx: bool
) -> Plan:
    plan, mask, dA = Plan(device, x, A), mask_of(dropout_p, seed), A.new_empty(A.shape)
    if len(x) == 0:
        return plan.returning(x.new_empty(x.shape) if need_dx else None, dA.zero_())
    parts, _ = add_grad_weights(plan, x, dxa, dA, mask)
    add_sums(plan, (parts, dA))
    return plan.returning(add_expand(plan, dxa, A.t(), mask) if need_dx else None, dA)


def forward(
    device: Device, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor,
    gate: Tensor, segments: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
    strategy: str | None = None,
) -> Plan:  # fmt: skip
    plan, mask, (M, R), name = Plan(device, x, A), mask_of(dropout_p, seed), (len(x), len(A)), requested(strategy)
    ranks, gating = plan.new_ranks(2, M, R), Gate(gate, segments, scaling, M)
    xa, h = ranks
    if M == 0:
        y = plan.new_wide(0, len(B))
    elif name == "auto" and decodes(x, A, dropout_p):
        y = add_decode(plan, x, weight, bias, base, A, B, gating, xa, h)
    elif fuses(name, device, x, weight, A, None if mask.on else A):
        factor, parts = (None, add_shrink(plan, x, A, mask)) if mask.on else (A, None)
        y = add_fused_layer(plan, x, weight, gating, factor, B, h, parts, bias=bias, raw=xa)
    else:
        add_gated_shrink(plan, x, A, mask, gating, xa, h)
        y = add_expand(plan, h, B, bias=bias, base=base)
    return plan.returning(y, ranks)


def backward(
    device: Device, dy: Tensor, x: Tensor, xa: Tensor, h: Tensor, weight: Tensor | None, A: Tensor, B: Tensor,
    gate: Tensor, segments: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float, need_dx: bool,
    strategy: str | None = None,
) -> Plan:  # fmt: skip
    plan, mask, gating = Plan(device, x, A), mask_of(dropout_p, seed), Gate(gate, segments, scaling, len(x))
    turned, dA, dB = None if weight is None else weight.t(), A.new_empty(A.shape), B.new_empty(B.shape)
    if len(x) == 0:
        return plan.returning(x.new_empty(x.shape) if need_dx else None, dA.zero_(), dB.zero_(), gating.no_rows())
    if need_dx and fuses(requested(strategy), device, dy, turned, A, B.t()):
        return _backward_fused(plan, dy, x, xa, h, turned, A, B, gating, mask)
    dxa, scores, dgate, db = add_grad_dy(plan, dy, xa, h, B, dB, gating)
    da, _ = add_grad_weights(plan, x, dxa, dA, mask)
    add_sums(plan, (da, dA), (db, dB), scores, segments, dgate)
    return plan.returning(add_expand(plan, dxa, A.t(), mask) if need_dx else None, dA, dB, dgate)


def _backward_fused(
    plan: Plan, dy: Tensor, x: Tensor, xa: Tensor, h: Tensor, turned: Tensor | None, A: Tensor, B: Tensor, gate: Gate,
    mask: Mask,
) -> Plan:  # fmt: skip
    """turned: weight.t()."""
    dA, dB, dgate = A.new_empty(A.shape), B.new_empty(B.shape), gate.gate.new_empty(gate.gate.shape)
    dxa, scores = plan.new_ranks(*xa.shape), x.new_empty(xa.shape, dtype=torch.float32)
    dx = add_fused_layer(plan, dy, turned, gate, B.t(), A.t(), dxa, mask=mask, xa=xa, scores=scores)
    da, db = add_grad_weights(plan, x, dxa, dA, mask, dy, h, dB)
    add_sums(plan, (da, dA), (db, dB), scores, gate.segments, dgate)
    return plan.returning(dx, dA, dB, dgate)
