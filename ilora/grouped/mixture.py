"""Several adapters in one batch: what a layer computes where each instance has an adapter of its own.

The frozen product is one call for all rows. Of the updates, the rows of one adapter are a slot of the grouped
operation; adapters that differ in rank, dropout or dtype take a call each. No rows are copied where instances of one
adapter lie together and all of them fit one call.

Names: N instances, L rows of each in a layer's input, E the columns of the widest gate, R a layer's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..current_gate import GateState, own_gate
from .functional import grouped_linear, grouped_update

ALL = slice(None)


@dataclass
class Group:
    """Adapters of one layer that a call of the grouped operation serves, a slot each.

    layers: the ILoRALinear of each. counts: how many instances each has. rows: int64 [n], these instances. blocks:
    int64 [n], which of a gate for each block is theirs. ranks: [n, E, R], what an instance's gate gives to each rank.
    places: offsets and instances of the grouped operation by the rows of an instance. All but layers, dropout_p and
    factors are shared with the layers that have the same settings.
    """

    layers: list[Any]
    dropout_p: float
    counts: list[int]
    rows: Tensor
    blocks: Tensor
    ranks: Tensor
    places: dict[int, tuple[Tensor, Tensor]]
    factors: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, frozen: Any, gate: Tensor, keep: bool) -> Tensor:
        """The updates [n·L, d_out] of x [n·L, d_in], added to x Wᵀ + b where frozen gives (W, b). keep: whether the
        adapters' tensors stay put together for the next call."""
        A, B = self.factors or (torch.stack([layer.lora_A for layer in self.layers]),
                                torch.stack([layer.lora_B for layer in self.layers]))  # fmt: skip
        self.factors = (A, B) if keep else None
        own = gate[self.blocks, self.rows] if gate.dim() == 3 else gate[self.rows]
        weights = (own[..., None] * self.ranks).sum(1)
        settings: Any = (A, B, weights, 1.0, *self._places(x), self.dropout_p, None, self.layers[0].backend)
        return grouped_update(x, None, *settings) if frozen is None else grouped_linear(x, *frozen, *settings)

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """offsets and instances of the grouped operation, for this many rows of each instance."""
        n = len(self.rows)
        L = len(x) // n
        if L not in self.places:
            ends = torch.tensor([0, *self.counts], device=x.device).cumsum(0) * L
            instances = torch.arange(n, dtype=torch.int32, device=x.device).repeat_interleave(L)
            self.places[L] = ends.to(torch.int32), instances
        return self.places[L]


class Plan(NamedTuple):
    """How a layer serves the batch. order: int64 [N], the instances sorted by group and slot, those without an update
    last, None where they lie so; back: the reverse. frozen: how many have no update."""

    groups: list[Group]
    order: Tensor | None
    back: Tensor | None
    frozen: int


class Mixture:
    """Whose adapter the instances of a batch have.

    adapters: the records (`ilora.adapter.record.Adapter`) in the order in which the batch has them. slots: for each
    instance the place of its adapter among them, -1 for the frozen model. by_block: of each adapter, whether its gate
    has a row for each block. The gate in force is [N, E], or [blocks, N, E] where one of them has; columns and blocks
    that an instance's adapter lacks are zeros.
    """

    def __init__(self, adapters: Sequence[Any], slots: Sequence[int], by_block: Sequence[bool]) -> None:
        self.adapters, self.slots, self.by_block = tuple(adapters), tuple(slots), tuple(by_block)
        self._instances: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slots):
            self._instances.setdefault(slot, []).append(row)
        self._plans: dict[tuple[str, bool], Plan] = {}
        self._tensors: dict[Any, tuple[Any, ...]] = {}  # of plans and groups; most layers of a model have the same

    def of_rows(self, rows: Sequence[int]) -> Mixture:
        """The mixture of a batch of these instances."""
        return Mixture(self.adapters, [self.slots[row] for row in rows], self.by_block)

    def adapts(self, name: str) -> bool:
        """Whether an adapter of the batch has an update for the layer of this name."""
        return any(name in adapter.layers for adapter in self.adapters)

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """What the ILoRALinear that stands in the model gives for x [..., d_in]: [..., d_out].
        Raises ValueError, TypeError naming the layer for an input that the batch's adapters do not fit."""
        if not self.adapts(layer.name):  # it may see other rows than the batch's
            return layer.base_layer(x)
        gate, _ = layer.gate_state.gate_for(x, ALL, layer.name)
        plan, weight = self._plan(layer.name, layer.training, gate), layer.plain_weight()
        if weight is None or plan.frozen or len(plan.groups) != 1:
            return self.add(layer.gate_state, layer.name, x, layer.base_layer(x), layer.training)
        rows = reordered(self._by_instance(layer.name, x), plan.order)
        frozen = (weight, layer.base_layer.bias)
        y = self._update(layer.gate_state, layer.name, plan.groups[0], rows.flatten(0, 1), frozen, gate)
        return reordered(y.view(*rows.shape[:-1], -1), plan.back).view(*x.shape[:-1], -1)

    def add(self, state: GateState, name: str, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """y [..., d_out], a frozen layer's output for x, with the updates that the instances' adapters have for it."""
        if not self.adapts(name):
            return y
        gate, _ = state.gate_for(x, ALL, name)
        assert gate is not None
        plan = self._plan(name, training, gate)
        if not plan.groups:
            return y
        rows = reordered(self._by_instance(name, x), plan.order)
        parts = rows.split([*(len(group.rows) for group in plan.groups), plan.frozen])
        updates = [
            self._update(state, name, group, part.flatten(0, 1), None, gate).view(*part.shape[:-1], -1)
            for group, part in zip(plan.groups, parts[:-1], strict=True)
        ]
        if plan.frozen:
            updates.append(updates[0].new_zeros(plan.frozen, *updates[0].shape[1:]))
        update = reordered(torch.cat(updates) if len(updates) > 1 else updates[0], plan.back)
        return y + update.view(y.shape).to(y.dtype)

    def _by_instance(self, name: str, x: Tensor) -> Tensor:
        """x as [N, L, d_in]."""
        N, M = len(self.slots), x.shape[:-1].numel()
        if M % N:
            raise ValueError(
                f"{name}: its input {list(x.shape)} has {M} rows, which {N} instances do not divide evenly"
            )
        return x.reshape(N, M // N, x.shape[-1])

    def _update(self, state: GateState, name: str, group: Group, x: Tensor, frozen: Any, gate: Any) -> Tensor:
        try:
            return group.update(x, frozen, gate, state.current.generating and not torch.is_grad_enabled())
        except (TypeError, ValueError) as error:
            error.args = (f"{name}: {error}",)
            raise

    def _plan(self, name: str, training: bool, gate: Tensor) -> Plan:
        key = name, training
        if key not in self._plans:
            self._plans[key] = self._new_plan(name, training, gate)
        return self._plans[key]

    def _new_plan(self, name: str, training: bool, gate: Tensor) -> Plan:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for slot in self._instances:
            layer = self.adapters[slot].layers.get(name) if slot >= 0 else None
            if layer is not None:
                p = layer.lora_dropout if training else 0.0
                kinds.setdefault((layer.r, p, layer.lora_A.dtype, layer.backend), []).append(slot)
        groups = [self._group(name, slots, p, gate) for (_, p, *_), slots in kinds.items()]
        order = [row for slots in kinds.values() for slot in slots for row in self._instances[slot]]
        frozen = sorted(set(range(len(self.slots))).difference(order))
        key = (*order, *frozen)
        if key == tuple(range(len(key))):
            return Plan(groups, None, None, len(frozen))
        if key not in self._tensors:
            sorted_by_slot = torch.tensor(key, device=gate.device)
            self._tensors[key] = sorted_by_slot, sorted_by_slot.argsort()
        by_slot, back = self._tensors[key]
        return Plan(groups, by_slot, back, len(frozen))

    def _group(self, name: str, slots: list[int], p: float, gate: Tensor) -> Group:
        layers = [self.adapters[slot].layers[name] for slot in slots]
        own = [(e.gate_experts, e.num_experts, e.r, e.scaling, e.gate_index * self.by_block[slot])
               for e, slot in zip(layers, slots, strict=True)]  # fmt: skip
        key = (tuple(slots), tuple(own))
        if key not in self._tensors:
            rows = [self._instances[slot] for slot in slots]
            settings = list(dict.fromkeys(each[:4] for each in own))
            ranks = torch.stack([shares_of_ranks(*each, gate.shape[-1]) for each in settings]).to(gate)
            found = [(row, each[4], settings.index(each[:4])) for each, of in zip(own, rows, strict=True) for row in of]
            places, blocks, kinds = torch.tensor(found, device=gate.device).unbind(1)
            self._tensors[key] = ([len(of) for of in rows], places, blocks, ranks[kinds], {})
        return Group(layers, p, *self._tensors[key])


def reordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """The rows in this order; themselves where there is none."""
    return rows if order is None else rows.index_select(0, order)


def shares_of_ranks(gate_experts: int, num_experts: int, r: int, scaling: float, E: int) -> Tensor:
    """float64 [E, r]: a gate [1, E] times it is what multiplies each rank of a layer, the scaling included."""
    own = own_gate(torch.eye(gate_experts, dtype=torch.float64), num_experts, gate_experts)
    return F.pad(scaling * own.repeat_interleave(r // num_experts, 1), (0, 0, 0, E - gate_experts))


class AddUpdates:
    """The forward hook of a layer that the active adapter leaves frozen, for the adapters of a batch that do not."""

    def __init__(self, state: GateState, name: str) -> None:
        self.state, self.name = state, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        mixture = self.state.current.mixture
        if mixture is None or not self.state.enabled:
            return None
        (x,) = (*args, *kwargs.values())
        return mixture.add(self.state, self.name, x, y, module.training)
