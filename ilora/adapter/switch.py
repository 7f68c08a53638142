"""Putting an adapter into a model and taking it out: several on one base, one of them active."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..base_layers import home
from ..current_gate import GateState
from ..gates.networks import GateNetwork
from ..layer import ILoRALinear
from ..shared import group
from .config import ILoRAConfig
from .modules import beside, dtype_of, hold_statistics, once, refresh, replace
from .record import Adapter, adapters, changeable, injected
from .targets import block_of, find_targets, layer_settings, refuse_unmatched
from .task_heads import modules_to_save, with_heads


def add_adapter(model: Any, name: str, config: ILoRAConfig | None = None, gate: nn.Module | None = None) -> Any:
    """Gives an injected model one more adapter, as `inject` would, and makes it the active one; returns the model.

    name: one that the model has not yet. config, gate: as in `inject`; the adapter has settings, layers and a gate
    network of its own, in the mode (training or not) of the model.
    Raises: ValueError where nothing was injected, the name is taken or empty, or a gate is merged; ValueError,
    TypeError as `inject`. The model is then what it was.
    """
    return add(model, name, ILoRAConfig() if config is None else config, gate, fresh=True)


def add(model: Any, name: str, config: ILoRAConfig, gate: nn.Module | None, *, fresh: bool = False) -> Any:
    """`add_adapter`; fresh as in `build`."""
    injection = changeable(model, "add_adapter")
    if name in adapters(model):
        raise ValueError(f"add_adapter: there is an adapter {name!r} already; the model has {adapters(model)}")
    before = injection.adapter
    detach(model)
    try:
        adapter = build(model, name, config, gate, injection.state, fresh)
    except BaseException:
        attach(model, before)
        raise
    injection.others[before.name] = before
    attach(model, adapter)
    return model


def set_adapter(model: Any, name: str) -> Any:
    """Makes the adapter of this name the active one: its layers, gate network and saved modules are in the model (in
    its parameters and its state dict), those of the others are kept beside it. The tensors are the same objects.
    Returns the model. Raises ValueError where nothing was injected, for an unknown name, and while a gate is merged."""
    injection = injected(model)
    if name == injection.adapter.name:
        return model
    if name not in injection.others:
        raise ValueError(f"set_adapter: there is no adapter {name!r}; the model has {adapters(model)}")
    changeable(model, "set_adapter")
    before = injection.adapter
    detach(model)
    injection.others[before.name] = before
    attach(model, injection.others.pop(name))
    return model


def delete_adapter(model: Any, name: str) -> Any:
    """Forgets an adapter that is not the active one; returns the model. Raises ValueError where nothing was injected,
    for the active one (`set_adapter` another first) and for a name that is not there."""
    injection = injected(model)
    if name not in injection.others:
        what = "is the active one" if name == injection.adapter.name else "is not there"
        raise ValueError(f"delete_adapter: {name!r} {what}; the model has {adapters(model)}")
    del injection.others[name]
    return model


@contextmanager
def disable_adapter(model: Any) -> Iterator[Any]:
    """`with ilora.disable_adapter(model): ...`: the frozen model as it was, without updates and without asking for a
    gate. Afterwards, also after an exception, the adapter works as before."""
    injection = injected(model)
    if injection.merged:
        raise ValueError("disable_adapter: a gate is merged into the weights; ilora.unmerge(model) first")
    before, trained = injection.state.enabled, dict[str, nn.Module]()
    injection.state.enabled = False
    try:
        trained = {path: model.get_submodule(path) for path in injection.originals if before}
        for path, original in injection.originals.items() if before else ():
            replace(model, path, beside(original, trained[path], injection.dtype, dtype_of(model)))
        hold_statistics(model)
        yield model
    finally:
        for path, module in trained.items():
            replace(model, path, module.train(injection.originals[path].training))
        injection.state.enabled = before


def build(model: Any, name: str, config: ILoRAConfig, gate: nn.Module | None, state: GateState, fresh: bool) -> Adapter:
    """A fresh adapter for the model, which it leaves as it is. Every refusal of a configuration is raised in here.

    fresh: what a task class adds is trained whole too, and names that mean nothing here are refused; False for a config
    from a file, which is taken as it stands."""
    if not isinstance(config, ILoRAConfig):
        raise TypeError(f"config: expected an ILoRAConfig, got {type(config).__name__}")
    if gate is not None and not isinstance(gate, nn.Module):
        raise TypeError(f"gate: expected a gate network (an nn.Module), got {type(gate).__name__}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a name for the adapter, got {name!r}")
    config = with_heads(model, config) if fresh else config
    paths = find_targets(model, config)
    if fresh:
        refuse_unmatched(model, config, paths)
    settings = {path: layer_settings(config, path) for path in paths}
    saved = modules_to_save(model, config, paths)
    blocks = list(dict.fromkeys(block_of(path) or "" for path in paths))
    bind(model, config, gate, len(blocks))
    wrapped: dict[int, ILoRALinear] = {}
    layers = {}
    for path in paths:
        base = model.get_submodule(path)
        if id(base) not in wrapped:  # one layer in two places stays one
            wrapped[id(base)] = _wrap(base, path, config, settings[path])
            wrapped[id(base)].gate_state, wrapped[id(base)].gate_index = state, blocks.index(block_of(path) or "")
        layers[path] = wrapped[id(base)]
    originals = {path: model.get_submodule(path) for path in saved}
    copies = {id(module): copy.deepcopy(module).requires_grad_(True) for module in once(originals).values()}
    return Adapter(name, config, gate, blocks, layers, {path: copies[id(module)] for path, module in originals.items()})


def attach(model: Any, adapter: Adapter) -> None:
    """Puts an adapter into an injected model that has none in it."""
    injection = model.ilora
    injection.adapter, injection.dtype = adapter, dtype_of(model)
    for path, layer in adapter.layers.items():
        for parameter in (layer.lora_A, layer.lora_B):  # model.to() did not reach them while they were kept beside it
            dtype = injection.dtype if parameter.dtype == adapter.dtype else None
            parameter.data = parameter.data.to(home(layer.base_layer) or parameter.device, dtype)
        replace(model, path, layer.train(layer.base_layer.training))
    group(dict.fromkeys(adapter.layers.values()), injection.share_inputs)
    injection.originals = {path: model.get_submodule(path) for path in adapter.saved}
    for path, module in adapter.saved.items():
        replace(model, path, beside(module, injection.originals[path], adapter.dtype, injection.dtype))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key in list(tied):  # what is trained whole has its own weights, and a layer's are in its base: never tied again
        if any(end.startswith(path + ".") for path in (*adapter.saved, *adapter.layers) for end in (key, tied[key])):
            injection.tied[key] = tied.pop(key)
    if adapter.gate is not None:
        device = home(model)
        if device is not None and device.type != "meta":
            adapter.gate.to(device)
        adapter.gate.train(model.training)
    model.ilora_gate = adapter.gate
    hold_statistics(model)


def detach(model: Any) -> None:
    """Takes the active adapter out, which is kept in the injection's record: the model is for `attach` alone then."""
    injection = model.ilora
    for path, layer in injection.adapter.layers.items():
        replace(model, path, layer.base_layer)
    refresh(model)
    injection.adapter.dtype = now = dtype_of(model)
    for path, original in injection.originals.items():
        replace(model, path, beside(original, injection.adapter.saved[path], injection.dtype, now))
    if injection.tied:
        model.all_tied_weights_keys.update(injection.tied)
    injection.originals, injection.tied = {}, {}
    model._modules.pop("ilora_gate", None)  # past the model's own __setattr__, which would forget the network
    vars(model)["ilora_gate"] = None


def bind(model: Any, config: ILoRAConfig, gate: nn.Module | None, blocks: int) -> None:
    """Fits a gate network to the model, and brings it there. Raises ValueError where it cannot be."""
    if gate is not None and isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"{type(model).__name__} would take the gate network for one of the modules that it holds: put it into a "
            "module of your own, and inject into that"
        )
    if isinstance(gate, GateNetwork):
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        gate.bind(config.num_experts, blocks, getattr(embeddings, "embedding_dim", None))
    if gate is not None:
        device = home(model)
        if device is not None and device.type != "meta":
            gate.to(device)


def _wrap(base: nn.Module, path: str, config: ILoRAConfig, own: dict[str, Any]) -> ILoRALinear:
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    common = {"adapter_dtype": config.adapter_dtype, "backend": config.backend}
    layer = ILoRALinear(base, **own, lora_dropout=config.lora_dropout, **common)  # type: ignore[arg-type]
    layer.name, layer.gate_experts = path, config.num_experts
    for parameter, flag in flags:  # frozen with the rest of the model, once nothing can be refused any more
        parameter.requires_grad_(flag)
    return layer
