"""Merges the update under one gate into the weights, to serve one user at the frozen model's cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base_layers import is_conv1d, offloading_to
from ..gates.checks import one_gate
from ..layer import ILoRALinear
from .record import Injection, changeable, ilora_layers, injected


def merge(model: Any, gate: Tensor, *, keep_base: bool = True) -> Any:
    """W ← W + s Σ_e g_e B_e A_e in every adapted layer, for one gate [E] or [1, E] (or [blocks, 1, E]); returns the
    model, which then runs without a gate. Sums in float32 or wider and rounds once.

    keep_base: keep the old weights too, so that `unmerge` restores every bit. False saves that memory and makes the
        merge final: `ilora.eject` then gives a plain model with the merged weights and with the modules that were
        trained whole.
    Raises ValueError for a batch of gates, for a quantised base or one whose weight is computed (weight_norm), and
    where a gate is merged already or the adapter is disabled. Nothing is changed then, nor where memory runs out,
    except that with keep_base=False the layers before stay merged.
    """
    injection, layers = changeable(model, "merge"), ilora_layers(model)
    gate = one_gate(gate, injection.config.num_experts, len(injection.adapter.blocks), "merge")
    for path, layer in layers.items():
        _refuse_unfit(path, layer.base_layer)
    try:
        # The largest layer first, since its sum takes the most memory: if that fails, nothing is changed yet.
        for path, layer in sorted(layers.items(), key=lambda item: -item[1].in_features * item[1].out_features):
            with torch.no_grad():
                merged = nn.Parameter(_merged_weight(layer, gate), requires_grad=False)
                vars(merged).update(
                    vars(layer.base_layer.weight)
                )  # attributes, such as transformers' mark on loaded weights
            if keep_base:
                injection.unmerged[path] = layer.base_layer.weight  # type: ignore[assignment]
            layer.base_layer.weight, layer.merged = merged, True
    except BaseException:
        _restore(injection, layers)
        raise
    injection.merged = True
    return model


def unmerge(model: Any) -> Any:
    """Undoes `merge`, to the bit; returns the model. Raises ValueError where no gate is merged, or for good."""
    injection, layers = injected(model), ilora_layers(model)
    if not injection.merged:
        raise ValueError("unmerge: no gate is merged")
    if not injection.unmerged:
        raise ValueError("unmerge: the gate was merged with keep_base=False, the weights before it are gone")
    _restore(injection, layers)
    injection.merged = False
    return model


def _restore(injection: Injection, layers: dict[str, ILoRALinear]) -> None:
    for path, original in injection.unmerged.items():
        layer = layers[path]
        weight = original.to(layer.base_layer.weight)  # type: ignore[arg-type]
        layer.base_layer.weight = (
            weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        )
        layer.merged = False
    injection.unmerged = {}


def _refuse_unfit(path: str, base: nn.Module) -> None:
    weight = getattr(base, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    if not plain or type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"merge: {path} has a {type(base).__name__} base, whose {type(weight).__name__} weight cannot be added to"
        )
    if base._parameters.get("weight") is None:  # weight_norm, spectral_norm, pruning, old way and new
        raise ValueError(
            f"merge: the weight of {path} is no parameter but computed from others, and cannot be added to; "
            "remove_parametrizations, remove_weight_norm or prune.remove makes it one"
        )
    if offloading_to(base) or weight.is_meta:  # type: ignore[union-attr]
        raise ValueError(f"merge: {path} is offloaded by its device map, its weight is not here to be added to")


def _merged_weight(layer: ILoRALinear, gate: Tensor) -> Tensor:
    weight: Tensor = layer.base_layer.weight  # type: ignore[assignment]
    wide = torch.promote_types(torch.promote_types(weight.dtype, layer.lora_A.dtype), torch.float32)
    ranks = layer.scaling * weights_of_ranks(layer, gate, weight.device, wide)
    update = (layer.lora_B.to(wide) * ranks) @ layer.lora_A.to(wide)
    return (weight.to(wide) + (update.T if is_conv1d(layer.base_layer) else update)).to(weight.dtype)


def weights_of_ranks(layer: ILoRALinear, gate: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The gate of each rank of a layer, [R], without the scaling; gate: as `one_gate` returns it."""
    row = gate[layer.gate_index if len(gate) > 1 else 0]
    return layer.own_gate(row[None].to(device, dtype))[0].repeat_interleave(layer.r // layer.num_experts)
