"""The records: what an adapter consists of, and what `inject` has changed in a model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base_layers import frozen_experts, weights_in
from ..current_gate import GateState
from ..grouped.experts import ExpertsUpdate, ILoRAExperts
from ..layer import ILoRALinear
from .config import ILoRAConfig
from .targets import named


@dataclass
class Adapter:
    """One adapter, in the model or kept beside it.

    blocks: the paths of the adapted blocks, in order; a gate network may give each a gate. layers: the ILoRALinears by
    path. saved: the modules trained whole, by path. dtype: the frozen model's dtype when the adapter was taken out.
    experts: the ILoRAExperts by path.
    """

    name: str
    config: ILoRAConfig
    gate: nn.Module | None
    blocks: list[str]
    layers: dict[str, ILoRALinear]
    saved: dict[str, nn.Module]
    dtype: torch.dtype | None = None
    experts: dict[str, ILoRAExperts] = field(default_factory=dict)

    @property
    def wrappers(self) -> dict[str, ILoRALinear | ILoRAExperts]:
        """What stands in the model in the place of frozen modules, by path."""
        return {**self.layers, **self.experts}

    @property
    def expert_updates(self) -> list[ExpertsUpdate]:
        """Those of both projections of all experts."""
        return [update for experts in self.experts.values() for update in experts.updates]


@dataclass
class Injection:
    """What `inject` has changed in a model, so that it can be undone.

    adapter: the active one. others: the other adapters by name. share_inputs: whether layers share their input.
    originals: the frozen modules that modules trained whole have replaced, by path; dtype: the frozen model's then.
    tied: what was taken out of transformers' record of tied weights. merged: whether a gate is merged into the weights;
    unmerged: the weights before, by path. trainable: the parameters that required a gradient before `inject`. norms:
    those of `frozen_norms` that had the model's mode then. packing, nesting: what `keep_unpacked` and `keep_padded`
    returned. hook: the handle of the model's hook that sets the gate. watched: the handles of the hooks of layers that
    the active adapter leaves frozen and that others adapt, by path, once a batch had several adapters.
    """

    adapter: Adapter
    share_inputs: bool = False
    state: GateState = field(default_factory=GateState)
    others: dict[str, Adapter] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    tied: dict[str, Any] = field(default_factory=dict)
    merged: bool = False
    unmerged: dict[str, nn.Parameter] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    norms: list[nn.Module] = field(default_factory=list)
    packing: list[nn.Module] = field(default_factory=list)
    nesting: list[nn.Module] = field(default_factory=list)
    hook: Any = None
    watched: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ILoRAConfig:
        return self.adapter.config


def is_injected(model: Any) -> bool:
    """Whether `inject` has put an adapter into this very model."""
    return isinstance(vars(model).get("ilora"), Injection)


def injected(model: Any) -> Injection:
    """The model's record. Raises ValueError where nothing was injected."""
    if not is_injected(model):
        refuse_wrapped(model)
        raise ValueError(f"{type(model).__name__} has no iLoRA in it: ilora.inject(model, config) puts it there")
    return model.ilora


def changeable(model: Any, what: str) -> Injection:
    """The model's record, for a call `what` that replaces modules. Raises ValueError where nothing was injected, a gate
    is merged, or the adapter is disabled."""
    injection = injected(model)
    if injection.merged:
        raise ValueError(f"{what}: a gate is merged into the weights; ilora.unmerge(model) first")
    if not injection.state.enabled:
        raise ValueError(f"{what}: the adapter is disabled; leave the `with disable_adapter(model)` block first")
    return injection


def refuse_wrapped(model: Any) -> None:
    """Raises ValueError for torch's wrappers of a model (compiled, DDP, FSDP1), naming the attribute to use."""
    place = type(model).__module__
    if not place.startswith("torch.") or place.startswith("torch.nn.modules."):  # a container may have such a child
        return
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} wraps a {type(inner).__name__}: give that one, model.{name}")


def find_adapter(model: Any, name: str | None = None) -> Adapter:
    """The adapter of this name, None for the active one. Raises ValueError where there is no such adapter."""
    injection = injected(model)
    if name is None or name == injection.adapter.name:
        note_replaced_modules(model)
        return injection.adapter
    if name not in injection.others:
        raise ValueError(f"there is no adapter {name!r}; the model has {adapters(model)}")
    return injection.others[name]


def note_replaced_modules(model: Any) -> None:
    """Records modules that other code has put in the place of one trained whole, as resize_token_embeddings does."""
    saved, originals = model.ilora.adapter.saved, model.ilora.originals
    for path in saved:
        module = model.get_submodule(path)
        if module is not originals.get(path):  # inside disable_adapter the frozen one stands there
            saved[path] = module


def adapters(model: Any) -> tuple[str, ...]:
    """The names of the model's adapters, the active one first. Raises ValueError where nothing was injected."""
    injection = injected(model)
    return (injection.adapter.name, *injection.others)


def ilora_layers(model: Any) -> dict[str, ILoRALinear]:
    """The adapted layers by path, in the model's order; a layer that stands in two places by its first path.
    Raises ValueError where nothing was injected."""
    return {layer.name: layer for layer in injected(model).adapter.layers.values()}


def targets(model: Any) -> tuple[str, ...]:
    """The paths of the adapted layers, both of one that stands in two places, and of the adapted tensors of fused
    experts. Raises ValueError where nothing was injected."""
    adapter = injected(model).adapter
    return (*adapter.layers, *(update.name for update in adapter.expert_updates))


def adapter_parameters(model: Any, name: str | None = None) -> list[nn.Parameter]:
    """The trained parameters of the adapter of this name, None for the active one, and of its gate network, for an
    optimizer of its own. They stay the same objects, active or not. Raises ValueError where nothing was injected, or
    there is no such adapter."""
    adapter = find_adapter(model, name)
    whole = [*adapter.saved.values(), *([] if adapter.gate is None else [adapter.gate])]
    found = [parameter for wrapper in adapter.wrappers.values() for parameter in wrapper.factors]
    found += [parameter for module in whole for parameter in module.parameters()]
    return list(dict.fromkeys(found))


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; 4-bit weights count each of their values."""
    counts = [(weights_in(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints one line, as PEFT does; of a sparse mixture it says as well how many weights are frozen experts'."""
    trainable, total = trainable_parameters(model)
    line = f"trainable params: {trainable:,} || all params: {total:,}"
    line += f" || trainable%: {100 * trainable / max(total, 1):.4f}"
    frozen = sum(frozen_experts(model).values())
    print(line + (f" || experts without an update: {frozen:,} ({frozen / total:.0%} of all)" if frozen else ""))


def warn_of_frozen_experts(model: Any, stacklevel: int) -> None:
    """One warning where the active adapter leaves experts of a sparse mixture frozen, unless its configuration excludes
    them by name: they may be most of the model."""
    excluded = model.ilora.adapter.config.exclude_modules
    frozen = {path: count for path, count in frozen_experts(model).items() if not named(path, excluded)}
    if frozen:
        share = sum(frozen.values()) / max(trainable_parameters(model)[1], 1)
        first, more = next(iter(frozen)), f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        warnings.warn(
            f"experts, {share:.0%} of the weights, stay frozen: {first}{more}; "
            f"exclude_modules=[{first.rsplit('.', 1)[-1]!r}] says that this is meant",
            stacklevel=stacklevel + 1,
        )
