"""Merges the update under one gate into the weights, to serve one user at the frozen model's cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base_layers import is_conv1d, offloading_to
from ..gates.checks import one_gate
from ..grouped.experts import ExpertsUpdate, ILoRAExperts
from ..layer import ILoRALinear
from .record import Injection, changeable, injected


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
    injection = changeable(model, "merge")
    gate = one_gate(gate, injection.config.num_experts, len(injection.adapter.blocks), "merge")
    places = _places(injection)
    for path, place in places.items():
        _refuse_unfit(path, *place)
    try:
        # The largest weight first, since its sum takes the most memory: if that fails, nothing is changed yet.
        for path, (wrapper, name) in sorted(places.items(), key=lambda item: -_weight(*item[1]).numel()):
            weight = _weight(wrapper, name)
            with torch.no_grad():
                merged = nn.Parameter(_merged_weight(wrapper, name, gate), requires_grad=False)
                vars(merged).update(vars(weight))  # such as transformers' mark on loaded weights
            if keep_base:
                injection.unmerged[path] = weight  # type: ignore[assignment]
            setattr(wrapper.base_layer, name, merged)
            wrapper.merged = True
    except BaseException:
        _restore(injection)
        raise
    injection.merged = True
    return model


def unmerge(model: Any) -> Any:
    """Undoes `merge`, to the bit; returns the model. Raises ValueError where no gate is merged, or for good."""
    injection = injected(model)
    if not injection.merged:
        raise ValueError("unmerge: no gate is merged")
    if not injection.unmerged:
        raise ValueError("unmerge: the gate was merged with keep_base=False, the weights before it are gone")
    _restore(injection)
    injection.merged = False
    return model


def _places(injection: Injection) -> dict[str, tuple[ILoRALinear | ILoRAExperts, str]]:
    """Where the weight under each update is: in the frozen module of which wrapper, and its name there; by path."""
    adapter = injection.adapter
    places: dict[str, tuple[ILoRALinear | ILoRAExperts, str]] = {
        layer.name: (layer, "weight") for layer in adapter.layers.values()
    }
    for experts in adapter.experts.values():
        places |= {f"{experts.name}.{name}": (experts, name) for name in (experts.up, experts.down)}
    return places


def _weight(wrapper: ILoRALinear | ILoRAExperts, name: str) -> Tensor:
    return getattr(wrapper.base_layer, name)


def _restore(injection: Injection) -> None:
    places = _places(injection)
    for path, original in injection.unmerged.items():
        wrapper, name = places[path]
        weight = original.to(_weight(wrapper, name))
        plain = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        setattr(wrapper.base_layer, name, plain)
        wrapper.merged = False
    injection.unmerged = {}


def _refuse_unfit(path: str, wrapper: ILoRALinear | ILoRAExperts, name: str) -> None:
    base, weight = wrapper.base_layer, getattr(wrapper.base_layer, name, None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    if not plain or type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"merge: {path} has a {type(base).__name__} base, whose {type(weight).__name__} weight cannot be added to"
        )
    if base._parameters.get(name) is None:  # weight_norm, spectral_norm, pruning, old way and new
        raise ValueError(
            f"merge: the weight of {path} is no parameter but computed from others, and cannot be added to; "
            "remove_parametrizations, remove_weight_norm or prune.remove makes it one"
        )
    if offloading_to(base) or weight.is_meta:  # type: ignore[union-attr]
        raise ValueError(f"merge: {path} is offloaded by its device map, its weight is not here to be added to")


def _merged_weight(wrapper: ILoRALinear | ILoRAExperts, name: str, gate: Tensor) -> Tensor:
    weight = _weight(wrapper, name)
    if isinstance(wrapper, ILoRALinear):
        return _sum(weight, wrapper.lora_A, wrapper.lora_B, wrapper, gate, is_conv1d(wrapper.base_layer))
    update, merged = wrapper.get_submodule(name), torch.empty_like(weight)
    assert isinstance(update, ExpertsUpdate)
    for x, (A, B) in enumerate(zip(update.lora_A_experts, update.lora_B_experts, strict=True)):
        merged[x] = _sum(weight[x], A, B, update, gate, update.transposed)
    return merged


def _sum(weight: Tensor, A: Tensor, B: Tensor, settings: Any, gate: Tensor, transposed: bool) -> Tensor:
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    ranks = settings.scaling * weights_of_ranks(settings, gate, weight.device, wide)
    update = (B.to(wide) * ranks) @ A.to(wide)
    return (weight.to(wide) + (update.T if transposed else update)).to(weight.dtype)


def weights_of_ranks(
    update: ILoRALinear | ExpertsUpdate, gate: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The gate of each rank of a layer or of experts, [R], without the scaling; gate: as `one_gate` returns it."""
    row = gate[update.gate_index if len(gate) > 1 else 0]
    return update.own_gate(row[None].to(device, dtype))[0].repeat_interleave(update.r // update.num_experts)
