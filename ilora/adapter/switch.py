"""Makes an adapter from a config, puts it into a model and takes it out; one of a model's adapters is active."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..base_layers import compute_device, keep_called, keep_unpacked, let_pack
from ..gates.networks import GateNetwork
from ..grouped.experts import ILoRAExperts, projections_of
from ..layer import ILoRALinear
from ..shared import group
from .config import ILoRAConfig
from .modules import (
    dtype_of,
    embeddings,
    freeze_statistics,
    match_device_and_mode,
    replace,
    unique_modules,
)
from .record import (
    Adapter,
    adapters,
    changeable,
    find_adapter,
    injected,
    is_injected,
    note_replaced_modules,
    warn_of_frozen_experts,
)
from .targets import block_of, find_experts, find_targets, layer_settings, refuse_unmatched
from .task_heads import modules_to_save, with_heads


def add_adapter(model: Any, name: str, config: ILoRAConfig | None = None, gate: nn.Module | None = None) -> Any:
    """Adds an adapter to an injected model and makes it the active one; returns the model.

    name: a new one. config, gate: as in `inject`; each adapter has its own settings, layers and gate network.
    Raises: ValueError where nothing was injected, the name is taken or empty, a gate is merged or the adapter disabled;
    ValueError, TypeError as `inject`. The model is then what it was.
    """
    changeable(model, "add_adapter")
    activate(model, build(model, name, ILoRAConfig() if config is None else config, gate, from_user=True))
    warn_of_frozen_experts(model, stacklevel=2)
    return model


def set_adapter(model: Any, name: str) -> Any:
    """Makes the adapter of this name the active one, and returns the model. The model's parameters and state dict hold
    the active adapter's tensors alone; those of the others are kept, and stay the same objects.
    Raises ValueError where nothing was injected, for an unknown name, while a gate is merged or the adapter disabled.
    """
    adapter = find_adapter(model, name)
    if adapter is model.ilora.adapter:
        return model
    changeable(model, "set_adapter")
    return activate(model, adapter)


def delete_adapter(model: Any, name: str) -> Any:
    """Removes an adapter that is not the active one; returns the model. Raises ValueError where nothing was injected,
    for the active one (`set_adapter` another first) and for a name that is not there."""
    if find_adapter(model, name) is model.ilora.adapter:
        raise ValueError(f"delete_adapter: {name!r} is the active one; the model has {adapters(model)}")
    del model.ilora.others[name]
    return model


@contextmanager
def disable_adapter(model: Any) -> Iterator[Any]:
    """`with ilora.disable_adapter(model): ...`: inside the block the model is the frozen one, and needs no gate.
    Afterwards, also after an exception, the adapter works as before. Raises ValueError where nothing was injected and
    while a gate is merged."""
    injection = injected(model)
    if injection.merged:
        raise ValueError("disable_adapter: a gate is merged into the weights; ilora.unmerge(model) first")
    before, trained = injection.state.enabled, dict[str, nn.Module]()
    injection.state.enabled = False
    try:
        trained = {path: model.get_submodule(path) for path in injection.originals if before}
        for path, module in trained.items():
            original = injection.originals[path]
            replace(model, path, match_device_and_mode(original, module, injection.dtype, dtype_of(model)))
        freeze_statistics(model)
        yield model
    finally:
        for path, module in trained.items():
            replace(model, path, module.train(injection.originals[path].training))
        injection.state.enabled = before


def _add(self: Any, adapter_config: Any, adapter_name: str | None = None, **others: Any) -> None:
    add_adapter(self, adapter_name or "default", adapter_config, **others)


def _set(self: Any, adapter_name: Any) -> None:
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if len(names) != 1:
        raise ValueError(f"set_adapter: one adapter is active at a time, got {names}")
    set_adapter(self, names[0])


def _delete(self: Any, adapter_names: Any) -> None:
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        delete_adapter(self, name)


def _active(self: Any) -> list[str]:
    return [injected(self).adapter.name]


_DELEGATED = {"add_adapter": _add, "set_adapter": _set, "active_adapters": _active}
_DELEGATED |= dict.fromkeys(("delete_adapter", "delete_adapters"), _delete)
_INSTEAD = dict.fromkeys(("disable_adapters", "enable_adapters"), "use `with ilora.disable_adapter(model): ...`")
_INSTEAD |= {"load_adapter": "use ilora.load_adapter(model, path, name=...)"}
_INSTEAD |= {"get_adapter_state_dict": "use ilora.save_adapter(model, path)"}


def adapter_methods(base: type) -> dict[str, Any]:
    """What the class of an injected model has in place of the methods that transformers and diffusers give `base` for
    PEFT's adapters: those of ilora, or a ValueError that names what to use."""
    mixin = next((kind for kind in base.__mro__ if kind.__name__ == "PeftAdapterMixin"), object)
    names = [
        name
        for name, value in vars(mixin).items()
        if inspect.isfunction(value) and not name.startswith("_") and getattr(base, name) is value
    ]
    return {name: _DELEGATED.get(name) or _refusal(name) for name in names}


def _refusal(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        instead = _INSTEAD.get(name, "take it out first: ilora.eject(model)")
        raise ValueError(f"{name} is for PEFT's adapters, and this model has ilora's; {instead}")

    return refuse


def build(
    model: Any,
    name: str,
    config: ILoRAConfig,
    gate: nn.Module | None,
    *,
    from_user: bool = False,
    experts: bool = True,
) -> Adapter:
    """A new adapter for the model, which is left as it is. Raises TypeError, ValueError as `inject`.

    from_user: the config comes from the user and not from a file: also train a task class's head, refuse names that
    are not in this model, and warn of linear layers that are left out. experts: whether to adapt the fused experts that
    the config means."""
    if not isinstance(config, ILoRAConfig):
        raise TypeError(f"config: expected an ILoRAConfig, got {type(config).__name__}")
    if gate is not None and not isinstance(gate, nn.Module):
        raise TypeError(f"gate: expected a gate network (an nn.Module), got {type(gate).__name__}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a name for the adapter, got {name!r}")
    if is_injected(model) and name in adapters(model):
        raise ValueError(f"name: there is an adapter {name!r} already; the model has {adapters(model)}")
    with _without_adapter(model):
        config = with_heads(model, config) if from_user else config
        left_out: dict[str, str] = {}
        paths = find_targets(model, config, left_out)
        mixtures = find_experts(model, config) if experts else {}
        tensors = [f"{path}.{projection}" for path, both in mixtures.items() for projection in both]
        if from_user:
            refuse_unmatched(model, config, [*paths, *tensors])
        for path in list(left_out)[:1] if from_user else ():
            warnings.warn(f"{path}: left out ({len(left_out)} such), because {left_out[path]}", stacklevel=3)
        settings = {path: layer_settings(config, path) for path in (*paths, *tensors)}
        originals = {path: model.get_submodule(path) for path in modules_to_save(model, config, [*paths, *mixtures])}
        adapted = (*paths, *mixtures)
        order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
        blocks = list(dict.fromkeys(block_of(path) for path in sorted(adapted, key=order.__getitem__)))
        bind(model, config, gate, len(blocks))
        bases = {path: model.get_submodule(path) for path in paths}  # one layer in two places stays one
        layers = {id(base): _wrap(base, path, config, settings[path]) for path, base in unique_modules(bases).items()}
        wrapped_experts = {path: _wrap_experts(model.get_submodule(path), path, config, settings) for path in mixtures}
        both = [update for each in wrapped_experts.values() for update in each.updates]
        gated: list[Any] = [*layers.values(), *wrapped_experts.values(), *both]
        for part in gated:
            part.gate_index = blocks.index(block_of(part.name))
        for path, base in bases.items():
            keep_called(model.get_submodule(path.rpartition(".")[0]), layers[id(base)])
        copies = {id(m): copy.deepcopy(m).requires_grad_(True) for m in unique_modules(originals).values()}
    wrapped = {path: layers[id(base)] for path, base in bases.items()}
    saved = {path: copies[id(module)] for path, module in originals.items()}
    return Adapter(name, config, gate, blocks, wrapped, saved, experts=wrapped_experts)


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Inside the block the active adapter is out of the model."""
    adapter = model.ilora.adapter if is_injected(model) else None
    if adapter is not None:
        detach(model)
    try:
        yield
    finally:
        if adapter is not None:
            attach(model, adapter)


def activate(model: Any, adapter: Adapter) -> Any:
    """Makes this adapter of an injected model the active one, in the place of another."""
    injection = model.ilora
    before = injection.adapter
    if adapter is not before:
        detach(model)
        injection.others[before.name] = before
        injection.others.pop(adapter.name, None)
        attach(model, adapter)
    return model


def attach(model: Any, adapter: Adapter) -> None:
    """Puts an adapter into an injected model that has no active one."""
    injection = model.ilora
    injection.adapter, injection.dtype = adapter, dtype_of(model)
    bring(model, adapter)
    for path, layer in adapter.wrappers.items():
        layer.gate_state = injection.state
        replace(model, path, layer.train(layer.base_layer.training))
    group(dict.fromkeys(adapter.layers.values()), injection.share_inputs)
    injection.originals = {path: model.get_submodule(path) for path in adapter.saved}
    for path, module in adapter.saved.items():
        replace(model, path, match_device_and_mode(module, injection.originals[path], adapter.dtype, injection.dtype))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = tuple(path + "." for path in (*adapter.saved, *adapter.wrappers))  # their weights are tied no longer
    for key in [key for key, other in tied.items() if key.startswith(own) or other.startswith(own)]:
        injection.tied[key] = tied.pop(key)
    model.ilora_gate = adapter.gate
    freeze_statistics(model)


def bring(model: Any, adapter: Adapter) -> None:
    """Moves an adapter's layers and gate network, which model.to() and model.train() have not reached, to where they
    have brought the model. Its `dtype` stays what it was."""
    now = dtype_of(model)
    for layer in adapter.wrappers.values():
        device = compute_device(layer.base_layer)
        for parameter in layer.factors:
            dtype = now if parameter.dtype == adapter.dtype else None
            parameter.data = parameter.data.to(device or parameter.device, dtype)
    if adapter.gate is not None:
        _move_gate(model, adapter.gate)
        adapter.gate.train(model.training)


def detach(model: Any) -> None:
    """Takes the active adapter out of the model. Only `attach` or the end of `eject` may follow."""
    injection = model.ilora
    for path, layer in injection.adapter.wrappers.items():
        replace(model, path, layer.base_layer)
    note_replaced_modules(model)
    injection.adapter.dtype = now = dtype_of(model)
    for path, original in injection.originals.items():
        replace(model, path, match_device_and_mode(original, injection.adapter.saved[path], injection.dtype, now))
    while injection.watched:
        injection.watched.popitem()[1].remove()
    if injection.tied:
        model.all_tied_weights_keys.update(injection.tied)
    injection.originals, injection.tied = {}, {}
    model._modules.pop("ilora_gate", None)  # not by setattr, which would remove it from the adapter as well
    vars(model)["ilora_gate"] = None


def bind(model: Any, config: ILoRAConfig, gate: nn.Module | None, blocks: int) -> None:
    """Fits a gate network to the model and moves it to the model's device. Raises ValueError where it does not fit."""
    if gate is None:
        return
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"{type(model).__name__} would take the gate network for one of the modules that it holds: put it into a "
            "module of your own, and inject into that"
        )
    if isinstance(gate, GateNetwork):
        gate.bind(config.num_experts, blocks, getattr(embeddings(model), "embedding_dim", None))
    _move_gate(model, gate)


def _move_gate(model: nn.Module, gate: nn.Module) -> None:
    device = compute_device(model)
    if device is not None and device.type != "meta":
        gate.to(device)


def _wrap_experts(base: nn.Module, path: str, config: ILoRAConfig, settings: dict[str, Any]) -> ILoRAExperts:
    own = {projection: settings[f"{path}.{projection}"] for projection in projections_of(base)}
    common = (config.num_experts, config.lora_dropout, config.adapter_dtype, config.backend)
    return ILoRAExperts(path, base, own, *common)


def _wrap(base: nn.Module, path: str, config: ILoRAConfig, own: dict[str, Any]) -> ILoRALinear:
    """The layer around its base. The base stays trainable and packs as before until the adapter is in the model."""
    flags, packing = [(p, p.requires_grad) for p in base.parameters()], keep_unpacked(base)
    try:
        common = {"adapter_dtype": config.adapter_dtype, "backend": config.backend}
        layer = ILoRALinear(base, **own, lora_dropout=config.lora_dropout, **common)  # type: ignore[arg-type]
    finally:
        let_pack(packing)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    layer.name, layer.gate_experts = path, config.num_experts
    return layer
