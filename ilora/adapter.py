"""The adapters of a model: what one is made of, putting it in, taking it out, several on one base."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .bases import home, offloading_to
from .config import ILoRAConfig, find_targets
from .gate import GateState
from .heads import with_heads
from .layer import ILoRALinear
from .networks import GateNetwork
from .paths import block_of, named
from .siblings import group


@dataclass
class Adapter:
    """One set of updates: the layers by path (each with the frozen layer it stands for), the modules trained whole, the
    gate network, and the blocks that have a gate each, in order. In the model, or kept beside it.

    dtype: the frozen model's when the adapter was taken out of it."""

    name: str
    config: ILoRAConfig
    gate: nn.Module | None
    blocks: list[str]
    layers: dict[str, ILoRALinear]
    saved: dict[str, nn.Module]
    dtype: torch.dtype | None = None


@dataclass
class Injection:
    """What `inject` has done to a model, so that it can be undone.

    adapter: the one in the model. others: those kept beside it, by name. originals: the frozen modules that
    modules_to_save took the place of; dtype: the frozen model's at that time. trainable: the parameters that were
    trainable. tied: transformers' record of tied weights that no longer are. merged: whether a gate is merged into the
    weights; unmerged: the weights before. forward: the one on the instance, if somebody had put one there.
    share_inputs: whether layers share their input.
    packing: the modules that would pack their weights for inference, and may not (bases.keep_unpacked).
    """

    state: GateState
    trainable: list[str]
    adapter: Adapter
    others: dict[str, Adapter] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    tied: dict[str, Any] = field(default_factory=dict)
    merged: bool = False
    unmerged: dict[str, nn.Parameter] = field(default_factory=dict)
    forward: Any = None
    share_inputs: bool = False
    packing: list[nn.Module] = field(default_factory=list)

    @property
    def config(self) -> ILoRAConfig:
        return self.adapter.config


def injected(model: Any) -> Injection:
    """The record of the injection. Raises ValueError where there is none."""
    if not isinstance(vars(model).get("ilora"), Injection):
        raise ValueError(f"{type(model).__name__} has no iLoRA in it: ilora.inject(model, config) puts it there")
    return model.ilora


def add_adapter(model: Any, name: str, config: ILoRAConfig | None = None, gate: nn.Module | None = None) -> Any:
    """Gives an injected model one more adapter, as `inject` would, and makes it the active one; returns the model.

    name: one that the model has not yet. config, gate: as in `inject`; the adapter has settings, layers and a gate
    network of its own, in the mode (training or not) of the model.
    Raises: ValueError where nothing was injected, the name is taken or empty, or a gate is merged; ValueError,
    TypeError as `inject`. The model is then what it was.
    """
    return add(model, name, ILoRAConfig() if config is None else config, gate, heads=True)


def add(model: Any, name: str, config: ILoRAConfig, gate: nn.Module | None, *, heads: bool = False) -> Any:
    """`add_adapter`; heads as in `build`."""
    injection = injected(model)
    if name in adapters(model):
        raise ValueError(f"add_adapter: there is an adapter {name!r} already; the model has {adapters(model)}")
    if injection.merged:
        raise ValueError("add_adapter: a gate is merged into the weights; ilora.unmerge(model) first")
    before = injection.adapter
    detach(model)
    try:
        adapter = build(model, name, config, gate, injection.state, heads)
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
    if injection.merged:
        raise ValueError("set_adapter: a gate is merged into the weights; ilora.unmerge(model) first")
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


def adapters(model: Any) -> tuple[str, ...]:
    """The names of the model's adapters, the active one first. Raises ValueError where nothing was injected."""
    injection = injected(model)
    return (injection.adapter.name, *injection.others)


def ilora_layers(model: Any) -> dict[str, ILoRALinear]:
    """The adapted layers by path, in the model's order; one that stands in two places once, by its first path.
    Raises ValueError where nothing was injected."""
    return {layer.name: layer for layer in injected(model).adapter.layers.values()}


def targets(model: Any) -> tuple[str, ...]:
    """The paths of the adapted layers, of a shared one all. Raises ValueError where nothing was injected."""
    return tuple(injected(model).adapter.layers)


def build(model: Any, name: str, config: ILoRAConfig, gate: nn.Module | None, state: GateState, heads: bool) -> Adapter:
    """A fresh adapter for the model, which it leaves as it is. Every refusal of a configuration is raised in here.

    heads: what a task class adds is trained whole too; False for a config from a file, which says all."""
    if not isinstance(config, ILoRAConfig):
        raise TypeError(f"config: expected an ILoRAConfig, got {type(config).__name__}")
    if gate is not None and not isinstance(gate, nn.Module):
        raise TypeError(f"gate: expected a gate network (an nn.Module), got {type(gate).__name__}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a name for the adapter, got {name!r}")
    config = with_heads(model, config) if heads else config
    paths = find_targets(model, config)
    settings = {path: config.layer_settings(path) for path in paths}
    saved = modules_to_save(model, config)
    blocks = list(dict.fromkeys(block_of(path) or "" for path in paths))
    _bind(model, config, gate, len(blocks))
    wrapped: dict[int, ILoRALinear] = {}
    layers = {}
    for path in paths:
        base = model.get_submodule(path)
        if id(base) not in wrapped:  # one layer in two places stays one
            wrapped[id(base)] = _wrap(base, path, config, settings[path])
            wrapped[id(base)].gate_state, wrapped[id(base)].gate_index = state, blocks.index(block_of(path) or "")
        layers[path] = wrapped[id(base)]
    copies = {path: copy.deepcopy(model.get_submodule(path)).requires_grad_(True) for path in saved}
    return Adapter(name, config, gate, blocks, layers, copies)


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
    for path, module in adapter.saved.items():
        injection.originals[path] = model.get_submodule(path)
        replace(model, path, beside(module, injection.originals[path], adapter.dtype, injection.dtype))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key in list(tied):  # a module that is trained whole has its own weights: transformers must not tie them again
        if any(end.startswith(path + ".") for path in adapter.saved for end in (key, tied[key])):
            injection.tied[key] = tied.pop(key)
    if adapter.gate is not None:
        device = home(model)
        if device is not None and device.type != "meta":
            adapter.gate.to(device)
        adapter.gate.train(model.training)
    model.ilora_gate = adapter.gate


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
    # Past the model's own, which would forget the network.
    nn.Module.__setattr__(model, "ilora_gate", None)  # type: ignore[arg-type]


def _bind(model: Any, config: ILoRAConfig, gate: nn.Module | None, blocks: int) -> None:
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


def modules_to_save(model: Any, config: ILoRAConfig) -> list[str]:
    """The paths that the config's modules_to_save means. Raises ValueError for a name that is not there."""
    paths = [path for path, _ in model.named_modules() if path and named(path, config.modules_to_save)]
    for wanted in config.modules_to_save:
        if not any(named(path, (wanted,)) for path in paths):
            raise ValueError(f"modules_to_save: no module of {type(model).__name__} is called {wanted!r}")
    for path in paths:
        if any(map(offloading_to, model.get_submodule(path).modules())):
            raise ValueError(f"modules_to_save: {path} is offloaded by its device map, it cannot be trained whole")
    return paths


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Puts the module at the path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def refresh(model: Any) -> None:
    """Takes into the active adapter's record what others have put in the place of a module that is trained whole, as
    resize_token_embeddings does with a head."""
    saved, originals = model.ilora.adapter.saved, model.ilora.originals
    for path in saved:
        module = model.get_submodule(path)
        if module is not originals.get(path):  # as inside disable_adapter
            saved[path] = module


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The frozen model's, by its first parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), None)


def beside(
    module: nn.Module, other: nn.Module, before: torch.dtype | None = None, now: torch.dtype | None = None
) -> nn.Module:
    """The parked module, moved to where the other one is: model.to() does not reach it while it is out of the model. If
    the model was turned from one dtype to another meanwhile, so is what the module has of it."""
    for parameter in module.parameters() if before != now else ():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(now)
    return module.to(home(other))
