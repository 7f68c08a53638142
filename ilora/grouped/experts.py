"""ILoRAExperts: the fused experts of a sparse mixture, each with gated low-rank updates.

transformers keeps the experts of a layer as one module with a tensor for each projection. Every model's module says by
the same attributes how to compute them (`use_experts_implementation` in transformers' integrations/moe.py): has_gate,
has_bias, is_transposed, has_post_expert_norm, `_apply_gate`. So one wrapper serves all such models, whatever
implementation ("eager", "grouped_mm", ...) their config has; that one computes the frozen experts alone.

Names: M tokens, K experts chosen for each, X experts of the model (slots of the grouped operation), E experts of the
adapter (columns of the gate).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..current_gate import GateState, own_gate
from ..op.checks import FLOATS, check_settings, dtype_named
from ..op.reference import row_instances
from .functional import grouped_linear

_SAYS_HOW = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "down_proj")


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the two tensors to adapt of fused experts that say how they are computed; () for any other module,
    and for experts that are quantised or spread over processes."""
    if not all(hasattr(module, name) for name in _SAYS_HOW) or getattr(module, "_is_expert_parallel", False):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [getattr(module, name, None) for name in names]
    fit = all(
        isinstance(w, Tensor) and w.dim() == 3 and w.dtype in FLOATS and not hasattr(w, "device_mesh") for w in weights
    )
    return names if fit else ()


class ExpertsUpdate(nn.Module):
    """The updates of one projection of all X experts: lora_A_experts [X, R, d_in], lora_B_experts [X, d_out, R].

    name: the projection's path in the model. Settings as of `ILoRALinear`; adapter_dtype None means the weight's.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        transposed: bool,
        gate_experts: int,
        adapter_dtype: str | torch.dtype | None,
        r: int,
        num_experts: int,
        lora_alpha: float,
    ) -> None:
        super().__init__()
        X, first, second = weight.shape
        self.in_features, self.out_features = (first, second) if transposed else (second, first)
        self.name, self.slots, self.r, self.num_experts, self.lora_alpha = name, X, r, num_experts, lora_alpha
        self.transposed, self.gate_experts, self.gate_index = transposed, gate_experts, 0
        self.scaling = lora_alpha / (r // num_experts)
        dtype = dtype_named(adapter_dtype) or weight.dtype
        self.lora_A_experts = nn.Parameter(torch.empty(X, r, self.in_features, dtype=dtype, device=weight.device))
        self.lora_B_experts = nn.Parameter(torch.zeros(X, self.out_features, r, dtype=dtype, device=weight.device))
        nn.init.uniform_(self.lora_A_experts, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        offsets: Tensor,
        instances: Tensor,
        dropout_p: float,
        backend: str | None,
    ) -> Tensor:
        """[rows, d_out] of x [rows, d_in], sorted by expert; weight as the model has it, gate [N, gate_experts]."""
        weight = (weight.mT if self.transposed else weight).detach()
        bias = None if bias is None else bias.detach()
        adapter = (self.lora_A_experts, self.lora_B_experts, self.own_gate(gate), self.scaling)
        rows = (offsets, instances, dropout_p)
        return grouped_linear(x.to(weight.dtype), weight, bias, *adapter, *rows, backend=backend)

    def own_gate(self, gate: Tensor) -> Tensor:
        """As `current_gate.own_gate`."""
        return own_gate(gate, self.num_experts, self.gate_experts)

    def extra_repr(self) -> str:
        return (
            f"{self.slots} experts, in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"num_experts={self.num_experts}, lora_alpha={self.lora_alpha}"
        )


class ILoRAExperts(nn.Module):
    """Wraps fused experts: each of their two products has a gated low-rank update, as ILoRALinear gives it to a layer.

    Args:
        name: the path of the experts in the model.
        base_layer: a module for which `projections_of` names two tensors. It is frozen in place by `inject`.
        settings: r, num_experts and lora_alpha of each of these by its name.
        gate_experts: the gate's width. lora_dropout, adapter_dtype, backend: as in `ILoRAConfig`; dropout acts on the
            input of each product, before A alone.
    A token has the gate of its instance with every expert that it is routed to. The router is left as it is. A fresh
    wrapper equals its base.
    """

    def __init__(
        self,
        name: str,
        base_layer: Any,
        settings: dict[str, dict[str, Any]],
        gate_experts: int,
        lora_dropout: float = 0.0,
        adapter_dtype: str | torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.base_layer, self.lora_dropout, self.backend = name, base_layer, lora_dropout, backend
        self.gate_state, self.gate_index, self.merged = GateState(), 0, False
        self.up, self.down = projections_of(base_layer)
        for projection in (self.up, self.down):
            own = settings[projection]
            check_settings(**own, lora_dropout=lora_dropout, backend=backend)
            weight = getattr(base_layer, projection)
            like = (weight, base_layer.is_transposed, gate_experts, adapter_dtype)
            update = ExpertsUpdate(f"{name}.{projection}", *like, **own)
            self.add_module(projection, update)

    @property
    def factors(self) -> list[nn.Parameter]:
        """Its trained tensors."""
        return [tensor for update in self.updates for tensor in (update.lora_A_experts, update.lora_B_experts)]

    @property
    def updates(self) -> tuple[ExpertsUpdate, ExpertsUpdate]:
        """Those of the first projection and of down_proj."""
        return self.get_submodule(self.up), self.get_submodule(self.down)  # type: ignore[return-value]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[M, d] from hidden_states [M, d], the chosen experts [M, K] and their weights [M, K].

        Raises: RuntimeError without a gate, and where hooks on the base would be passed over; ValueError for a gate
        that the tokens do not fit.
        """
        if not self.gate_state.enabled or self.merged:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        gate, segments = self.gate_state.gate_for(hidden_states, self.gate_index, self.name)
        if gate is None:
            raise RuntimeError(f"{self.name} has no gate: run the model inside `with ilora.gated(model, g):`")
        if self.base_layer._forward_hooks or self.base_layer._forward_pre_hooks or "forward" in vars(self.base_layer):
            raise RuntimeError(
                f"{self.name}: its frozen experts have hooks or another forward (a device map that offloads?), which "
                "their updates would pass over; exclude_modules=['experts'] leaves these experts out"
            )
        M, K = top_k_index.shape
        if segments is None and M % max(len(gate), 1):
            raise ValueError(f"{self.name}: gate: its N={len(gate)} rows do not divide the M={M} tokens evenly")
        order, offsets = self._sorted(top_k_index)
        tokens = order // K
        instances = row_instances(M, len(gate), segments, gate.device)[tokens].to(torch.int32)
        y = self._experts(hidden_states[tokens], gate, offsets, instances)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(M * K, device=order.device))
        y = y.index_select(0, places).view(M, K, -1) * top_k_weights[..., None]
        return y.sum(1).to(hidden_states.dtype)

    def _sorted(self, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
        """(int64 [M·K], the choices sorted by expert; int32 [X+1], where each expert's begin)."""
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        edges = torch.arange(self.updates[0].slots + 1, dtype=experts.dtype, device=experts.device)
        return order, torch.searchsorted(experts, edges).to(torch.int32)

    def _experts(self, x: Tensor, gate: Tensor, offsets: Tensor, instances: Tensor) -> Tensor:
        """What the model's own implementations compute of rows sorted by expert, with the updates."""
        base: Any = self.base_layer
        dropout_p = self.lora_dropout if self.training else 0.0
        for name, update in zip((self.up, self.down), self.updates, strict=True):
            bias = getattr(base, f"{name}_bias") if base.has_bias else None
            x = update(x, getattr(base, name), bias, gate, offsets, instances, dropout_p, self.backend)
            if name == self.up:
                x = base._apply_gate(x) if base.has_gate else base.act_fn(x)
        return base.post_expert_norm(x) if getattr(base, "has_post_expert_norm", False) else x
