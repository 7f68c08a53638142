"""Putting iLoRA into a model and taking it out again, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import ILoRAConfig, block_of, find_targets, named
from .delivery import Adapter, ILoRAModel, Injection, ilora_class, network_gate
from .gate import GateState, release_checkpoints
from .inputs import read_inputs
from .layer import ILoRALinear
from .networks import GateNetwork


def inject(
    model: Any, config: ILoRAConfig | None = None, gate: nn.Module | None = None, *, name: str = "default"
) -> Any:
    """Freezes the model and gives its linear layers gated low-rank updates, in place; returns the model.

    Args:
        model: any nn.Module; a transformers model gets `generate` and `save_pretrained` that know of the gate as well.
            Devices and dtypes stay. Its class becomes a subclass, of the same name, whose forward takes `ilora_gate`
            [N, E], `ilora_z` [N, z_dim] and `ilora_segments` [N+1].
        config: what to adapt and how; None means the defaults, on all linear layers but the output head.
        gate: a gate network (`SequenceGate`, `PromptGate`, `UniformGate`, or any module that maps ilora_z to
            [N, E]), which becomes the submodule `ilora_gate`: trained, saved and loaded with the model. It goes to the
            device of the model's first parameter. None: every call is given its gate.
        name: the adapter's, for models with several.
    Raises: ValueError, TypeError naming the module that cannot be adapted, before anything is changed.
    """
    config = ILoRAConfig() if config is None else config
    _refuse(model)
    adapter = _build(model, name, config, gate, GateState())
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    kind: Any = type(model)
    model.__class__ = ilora_class(kind)
    model.ilora = Injection(next(iter(adapter.layers.values())).gate_state, trainable, adapter)
    model.ilora.forward = vars(model).get("forward")
    if model.ilora.forward is not None:
        model.forward = model.ilora.forward
    model._hf_peft_config_loaded = True  # transformers asks this before it trains a quantised or checkpointed model
    attach(model, adapter)
    return model


def eject(model: Any) -> Any:
    """Takes everything that `inject` put in out again, other adapters too: the model, its class and its parameters are
    what they were. Merged weights stay if they were merged with keep_base=False.
    Raises ValueError where nothing was injected, and where a merge can still be undone (`ilora.unmerge` first)."""
    injection, base = injected(model), type(model).__dict__.get("ilora_base")
    if base is None:
        raise ValueError(f"eject: the model's class was changed after inject, to {type(model).__name__} (fully_shard?)")
    if injection.unmerged:
        raise ValueError(
            "eject: a gate is merged into the weights; ilora.unmerge(model), or merge with keep_base=False"
        )
    detach(model)
    release_checkpoints(model)
    model.__class__ = base
    vars(model).pop("forward", None)
    if injection.forward is not None:
        model.forward = injection.forward
    del model.ilora, model.ilora_gate, model._hf_peft_config_loaded
    trainable = set(injection.trainable)
    for key, parameter in model.named_parameters():
        if key in trainable:
            parameter.requires_grad_(True)
    return model


def add_adapter(model: Any, name: str, config: ILoRAConfig | None = None, gate: nn.Module | None = None) -> Any:
    """Gives an injected model one more adapter, as `inject` would, and makes it the active one."""
    injection = injected(model)
    if name in adapters(model):
        raise ValueError(f"add_adapter: there is an adapter {name!r} already; the model has {adapters(model)}")
    if injection.merged:
        raise ValueError("add_adapter: a gate is merged into the weights; ilora.unmerge(model) first")
    before = injection.adapter
    detach(model)
    try:
        adapter = _build(model, name, ILoRAConfig() if config is None else config, gate, injection.state)
    except BaseException:
        attach(model, before)
        raise
    injection.others[before.name] = before
    attach(model, adapter)
    return model


def set_adapter(model: Any, name: str) -> Any:
    """Makes the adapter of this name the active one: its layers, gate network and saved modules are in the model (in
    its parameters and its state dict), those of the others are kept beside it. The tensors are the same objects."""
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
    """Forgets an adapter that is not the active one."""
    injection = injected(model)
    if name not in injection.others:
        what = "is the active one" if name == injection.adapter.name else "is not there"
        raise ValueError(f"delete_adapter: {name!r} {what}; the model has {adapters(model)}")
    del injection.others[name]
    return model


def adapters(model: Any) -> tuple[str, ...]:
    """The names of the model's adapters, the active one first."""
    injection = injected(model)
    return (injection.adapter.name, *injection.others)


def injected(model: Any) -> Injection:
    """The record of the injection. Raises ValueError where there is none."""
    if not isinstance(model, ILoRAModel):
        raise ValueError(f"{type(model).__name__} has no iLoRA in it: ilora.inject(model, config) puts it there")
    return model.ilora


def ilora_layers(model: Any) -> dict[str, ILoRALinear]:
    """The adapted layers by path, in the model's order; one that stands in two places once, by its first path."""
    return {layer.name: layer for layer in injected(model).adapter.layers.values()}


def targets(model: Any) -> tuple[str, ...]:
    """The paths of the adapted layers, of a shared one all."""
    return tuple(injected(model).adapter.layers)


@contextmanager
def disable_adapter(model: Any) -> Iterator[Any]:
    """`with ilora.disable_adapter(model): ...`: the frozen model as it was, without updates and without asking for a
    gate. Afterwards, also after an exception, the adapter works as before."""
    injection = injected(model)
    if injection.merged:
        raise ValueError("disable_adapter: a gate is merged into the weights; ilora.unmerge(model) first")
    before, trained = injection.state.enabled, {}
    injection.state.enabled = False
    try:
        for path, original in injection.originals.items() if before else ():
            trained[path] = model.get_submodule(path)
            replace(model, path, _beside(original, trained[path]))
        yield model
    finally:
        for path, module in trained.items():
            replace(model, path, module)
        injection.state.enabled = before


def gate_of(
    model: Any, ilora_z: Tensor | None = None, ilora_prompt_mask: Tensor | None = None, **inputs: Any
) -> Tensor:
    """The gate [N, E] (or [blocks, N, E]) that the model's gate network gives for these inputs, for loops that call the
    model step by step: `with ilora.gated(model, ilora.gate_of(model, input_ids=..., attention_mask=...)): ...`."""
    injected(model)
    segments = inputs.pop("ilora_segments", None)
    return network_gate(model, read_inputs((), (), inputs), ilora_z, segments, ilora_prompt_mask)


def last_gate(model: Any) -> Tensor:
    """The gate [N, E] (or [blocks, N, E]) of the model's last forward or generation, detached: see `gate_stats`,
    `plot_gates`. Raises ValueError before there was one."""
    last = injected(model).state.last
    if last is None:
        raise ValueError("last_gate: the model has not run under a gate yet")
    return last


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; 4-bit weights count each of their values."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two values in a byte
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints one line, as PEFT does."""
    trainable, total = trainable_parameters(model)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / max(total, 1):.4f}"
    )


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Puts the module at the path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _build(model: Any, name: str, config: ILoRAConfig, gate: nn.Module | None, state: GateState) -> Adapter:
    """A fresh adapter for the model, which it leaves as it is. Every refusal of a configuration is raised in here."""
    if not isinstance(config, ILoRAConfig):
        raise TypeError(f"config: expected an ILoRAConfig, got {type(config).__name__}")
    if gate is not None and not isinstance(gate, nn.Module):
        raise TypeError(f"gate: expected a gate network (an nn.Module), got {type(gate).__name__}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a name for the adapter, got {name!r}")
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
    injection.adapter = adapter
    for path, layer in adapter.layers.items():
        replace(model, path, layer.to(_device(layer.base_layer)).train(layer.base_layer.training))
    for path, module in adapter.saved.items():
        injection.originals[path] = model.get_submodule(path)
        replace(model, path, _beside(module, injection.originals[path]))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key in list(tied):  # a module that is trained whole has its own weights: transformers must not tie them again
        if any(end.startswith(path + ".") for path in adapter.saved for end in (key, tied[key])):
            injection.tied[key] = tied.pop(key)
    if adapter.gate is not None:
        adapter.gate.train(model.training)
    model.ilora_gate = adapter.gate


def detach(model: Any) -> None:
    """Takes the active adapter out, which is kept in the injection's record: the model is for `attach` alone then."""
    injection = model.ilora
    for path, layer in injection.adapter.layers.items():
        replace(model, path, layer.base_layer)
    for path, original in injection.originals.items():
        replace(model, path, _beside(original, injection.adapter.saved[path]))
    if injection.tied:
        model.all_tied_weights_keys.update(injection.tied)
    injection.originals, injection.tied = {}, {}
    nn.Module.__setattr__(model, "ilora_gate", None)  # past the model's own, which would forget the network


def _refuse(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, ILoRAModel):
        raise ValueError(f"the model has the adapter {model.ilora.adapter.name!r} already: ilora.eject, or add_adapter")
    if type(model).__name__ == "OptimizedModule":
        raise ValueError("the model is compiled: inject into the plain model, then compile it")
    if hasattr(model, "peft_type") or type(model).__name__.startswith("PeftModel"):
        raise ValueError("the model is a PEFT model: ilora.from_peft(model, num_experts) takes its LoRA over")
    for path, module in model.named_modules():
        if isinstance(module, ILoRALinear):
            raise ValueError(f"{path or type(model).__name__}: it is an ILoRALinear already")


def _bind(model: Any, config: ILoRAConfig, gate: nn.Module | None, blocks: int) -> None:
    if isinstance(gate, GateNetwork):
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        gate.bind(config.num_experts, blocks, getattr(embeddings, "embedding_dim", None))
    if gate is not None:
        first = next(model.parameters(), None)
        if first is not None and first.device.type != "meta":
            gate.to(first.device)


def _wrap(base: nn.Module, path: str, config: ILoRAConfig, own: dict[str, Any]) -> ILoRALinear:
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    dtype = None if config.adapter_dtype is None else getattr(torch, config.adapter_dtype)
    layer = ILoRALinear(base, **own, lora_dropout=config.lora_dropout, adapter_dtype=dtype, backend=config.backend)
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
    return paths


def _device(module: nn.Module) -> torch.device | None:
    return next((t.device for t in (*module.parameters(), *module.buffers())), None)


def _beside(module: nn.Module, other: nn.Module) -> nn.Module:
    """The parked module, moved to where the other one is: model.to() does not reach it while it is out of the model."""
    return module.to(_device(other))
