"""Which kernels each primitive of the grouped operation launches, on which tensors; as in plans.py."""

from torch import Tensor

from .device import Device, dots
from .dropout import mask_of
from .grouped_expand import add_grouped_expand
from .grouped_grad_weights import add_grouped_grad_weights
from .grouped_shrink import add_grouped_grad_ranks, add_grouped_shrink
from .launch import Plan
from .slots import RowGates, Slots
from .sums import add_sums


def shrink_x(device: Device, x: Tensor, A: Tensor, offsets: Tensor, seed: Tensor | None, dropout_p: float) -> Plan:
    plan = Plan(device, x, A)
    return plan.returning(add_grouped_shrink(plan, x, A, mask_of(dropout_p, seed), Slots(offsets, len(x))))


def frozen(device: Device, x: Tensor, weight: Tensor, offsets: Tensor) -> Plan:
    plan = Plan(device, x, weight)
    dot = dots(device, x.dtype, weight.dtype)
    return plan.returning(add_grouped_expand(plan, x, weight, Slots(offsets, len(x)), dot=dot))


def expand_xa(
    device: Device, x: Tensor, xa: Tensor, bias: Tensor | None, base: Tensor | None, B: Tensor, offsets: Tensor,
    gate: Tensor, instances: Tensor, scaling: float, in_place: bool,
) -> Plan:  # fmt: skip
    plan, gating, slots = Plan(device, x, B), RowGates(gate, instances, scaling), Slots(offsets, len(x))
    y = base if in_place else None
    return plan.returning(add_grouped_expand(plan, xa, B, slots, gating, bias=bias, base=base, y=y))


def backward_dy(
    device: Device, dy: Tensor, xa: Tensor, B: Tensor, offsets: Tensor, gate: Tensor, instances: Tensor, scaling: float
) -> Plan:
    plan, slots = Plan(device, dy, B), Slots(offsets, len(dy))
    dxa, h, scores = add_grouped_grad_ranks(plan, dy, xa, B, slots, RowGates(gate, instances, scaling))
    dB = add_grouped_grad_weights(plan, dy, h, B.new_empty(B.shape), slots)
    return plan.returning(dxa, dB, scores)


def gate_sums(device: Device, scores: Tensor, segments: Tensor, gate: Tensor) -> Plan:
    plan, dgate = Plan(device, scores, scores), gate.new_empty(gate.shape)
    add_sums(plan, None, None, scores, segments, dgate)
    return plan.returning(dgate)


def backward_x(
    device: Device, x: Tensor, dxa: Tensor, A: Tensor, offsets: Tensor, base: Tensor | None, seed: Tensor | None,
    dropout_p: float, need_dx: bool,
) -> Plan:  # fmt: skip
    plan, mask, slots = Plan(device, x, A), mask_of(dropout_p, seed), Slots(offsets, len(x))
    dA = add_grouped_grad_weights(plan, x, dxa, A.new_empty(A.shape), slots, mask, by_rank=True)
    dx = add_grouped_expand(plan, dxa, A.mT, slots, mask=mask, base=base, y=base) if need_dx else None
    return plan.returning(dx, dA)
