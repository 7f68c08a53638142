"""One gate folded into the weights, for serving one user at the frozen model's cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import ilora_layers, injected
from .bases import is_conv1d, offloading_to
from .layer import ILoRALinear


def merge(model: Any, gate: Tensor, *, keep_base: bool = True) -> Any:
    """W ← W + s Σ_e g_e B_e A_e in every adapted layer, for one gate [E] or [1, E] (or [blocks, 1, E]); returns the
    model, which then runs without a gate.

    keep_base: keep the weights as they were beside the merged ones, so that `unmerge` brings back every bit; False
    saves that memory, and makes the merge final (`ilora.eject` then gives a plain model with the merged weights).
    Sums in float32 or wider and rounds once. Raises ValueError for a batch of gates, for a quantised base, and where a
    gate is merged already; nothing is changed then.
    """
    injection, layers = injected(model), ilora_layers(model)
    if injection.merged:
        raise ValueError("merge: a gate is merged already; ilora.unmerge(model) first")
    E, blocks = injection.config.num_experts, len(injection.adapter.blocks)
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"merge: expected one user's gate, a float tensor [{E}], got {type(gate).__name__}")
    if gate.shape not in ((E,), (1, E), (blocks, 1, E)):
        raise ValueError(
            f"merge: expected one user's gate, [{E}] or [1, {E}], or [{blocks}, 1, {E}], got {list(gate.shape)}"
        )
    for path, layer in layers.items():
        weight = layer.base_layer.weight
        plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
        if not plain or type(weight) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"merge: {path} has a {type(layer.base_layer).__name__} base, whose {type(weight).__name__} weight "
                "cannot be added to"
            )
        if offloading_to(layer.base_layer):
            raise ValueError(f"merge: {path} is offloaded by its device map, its weight is not here to be added to")
    with torch.no_grad():
        merged = {path: _merged_weight(layer, gate) for path, layer in layers.items()}
    for path, layer in layers.items():
        if keep_base:
            injection.unmerged[path] = layer.base_layer.weight  # type: ignore[assignment]
        layer.base_layer.weight = nn.Parameter(merged[path], requires_grad=False)
        layer.merged = True
    injection.merged = True
    return model


def unmerge(model: Any) -> Any:
    """Undoes `merge`: the weights are what they were, to the bit. Raises ValueError where there is nothing to undo."""
    injection, layers = injected(model), ilora_layers(model)
    if not injection.merged:
        raise ValueError("unmerge: no gate is merged")
    if not injection.unmerged:
        raise ValueError("unmerge: the gate was merged with keep_base=False, the weights before it are gone")
    for path, layer in layers.items():
        weight = injection.unmerged[path].to(layer.base_layer.weight)  # type: ignore[arg-type]
        layer.base_layer.weight = (
            weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        )
        layer.merged = False
    injection.unmerged = {}
    injection.merged = False
    return model


def _merged_weight(layer: ILoRALinear, gate: Tensor) -> Tensor:
    weight: Tensor = layer.base_layer.weight  # type: ignore[assignment]
    wide = torch.promote_types(torch.promote_types(weight.dtype, layer.lora_A.dtype), torch.float32)
    own = layer.own_gate((gate[layer.gate_index] if gate.dim() == 3 else gate.reshape(1, -1)).to(weight.device))
    ranks = (layer.scaling * own[0].to(wide)).repeat_interleave(layer.r // layer.num_experts)
    update = (layer.lora_B.to(wide) * ranks) @ layer.lora_A.to(wide)
    return (weight.to(wide) + (update.T if is_conv1d(layer.base_layer) else update)).to(weight.dtype)
