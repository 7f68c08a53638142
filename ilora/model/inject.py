"""Injects an adapter into a model, in place, and ejects it; also the gate and shared inputs of an injected model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..adapter.modules import keep_trained_modules, refuse_resized
from ..adapter.record import Injection, changeable, injected, refuse_wrapped, warn_of_frozen_experts
from ..adapter.switch import attach, build, detach
from ..base_layers import frozen_norms, keep_padded, keep_unpacked, let_nest, let_pack
from ..current_gate import release_checkpoints
from ..layer import ILoRALinear
from ..shared import group
from .batch import read_inputs
from .delivery import ILoRAModel, ilora_class, put_gate_in_force
from .gate_choice import ask_network, check_argument_types


def inject(
    model: Any,
    config: ILoRAConfig | None = None,
    gate: nn.Module | None = None,
    *,
    name: str = "default",
    share_inputs: bool = False,
) -> Any:
    """Freezes the model and gives its linear layers gated low-rank updates, in place; returns the model.

    Args:
        model: any nn.Module. Devices and dtypes stay. Its class becomes a subclass of the same name, whose forward also
            takes `ilora_gate` [N, E], `ilora_z` [N, z_dim] and `ilora_segments` [N+1]; of a transformers model,
            `generate` and `save_pretrained` know the gate and the adapter too.
        config: what to adapt and how; None means the defaults, on all linear layers but the output head. A linear layer
            that computes something else than a product of its input is left out, with a warning.
        gate: a gate network (`SequenceGate`, `PromptGate`, `UniformGate`, or any module that maps ilora_z to [N, E]).
            It becomes the submodule `ilora_gate`, on the device of the model's first parameter, and is trained, saved
            and loaded with the model. None: every call needs a gate.
        name: the adapter's name.
        share_inputs: whether to call `ilora.share_inputs(model)`.
    Raises: ValueError, TypeError naming the module that cannot be adapted, or the name, pattern or block of the config
    that is not in the model; ValueError for a bare linear layer, which `ILoRALinear` wraps. Nothing is changed then.
    """
    refuse_model(model)
    adapter = build(model, name, ILoRAConfig() if config is None else config, gate, from_user=True)
    install(model, Injection(adapter, share_inputs))
    warn_of_frozen_experts(model, stacklevel=2)
    return model


def install(model: Any, injection: Injection) -> Any:
    """Makes a plain model an injected one, with the injection's adapter; returns the model. `eject` undoes it."""
    injection.trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    injection.norms = [norm for norm in frozen_norms(model) if norm.training == model.training]
    injection.packing, injection.nesting = keep_unpacked(model), keep_padded(model)
    kind: Any = type(model)
    model.__class__ = ilora_class(kind)
    model.ilora = injection
    injection.hook = model.register_forward_pre_hook(put_gate_in_force, with_kwargs=True)
    model._hf_peft_config_loaded = True  # transformers trains a quantised model only if it is set
    attach(model, injection.adapter)
    return model


def eject(model: Any) -> Any:
    """Takes all adapters out: the model, its class and its parameters are what they were before `inject`; returns it.
    After a merge with keep_base=False it keeps the merged weights and the modules that were trained whole.
    Raises ValueError where nothing was injected, inside `disable_adapter`, after a merge that can still be undone
    (`ilora.unmerge` first), and where a module that was trained whole has been resized."""
    injection, base = injected(model), type(model).__dict__.get("ilora_base")
    if base is None:
        raise ValueError(f"eject: the model's class was changed after inject, to {type(model).__name__} (fully_shard?)")
    if injection.unmerged:
        raise ValueError(
            "eject: a gate is merged into the weights; ilora.unmerge(model), or merge with keep_base=False"
        )
    if injection.merged:  # with keep_base=False
        keep_trained_modules(model)
    else:
        changeable(model, "eject")
        refuse_resized(model)
    detach(model)
    release_checkpoints(model)
    let_pack(injection.packing)
    let_nest(injection.nesting)
    injection.hook.remove()
    model.__class__ = base
    del model.ilora, model.ilora_gate, model._hf_peft_config_loaded
    for key, parameter in model.named_parameters():
        if key in injection.trainable:
            parameter.requires_grad_(True)
    for norm in injection.norms:
        norm.training = model.training
    return model


def share_inputs(model: Any, share: bool = True) -> tuple[tuple[str, ...], ...]:
    """Lets layers that get one input (q, k, v; gate, up) read it once, forward and backward; returns their paths, by
    group. It holds for all adapters of the model, and is not saved. share=False undoes it.

    Results differ from those of separate layers in the order of sums alone; under dropout a group has one mask.
    A group is made of children of one module that have known names (`ilora.shared.FAMILIES`), plain weights, and the
    same r, num_experts and scaling. Each call checks that they really get the same tensor; else, in compiled models, in
    decoding steps and in a batch of several adapters, every layer computes by itself. Raises ValueError where nothing
    was injected.
    """
    injection = injected(model)
    injection.share_inputs = bool(share)
    injection.state.shared = None
    return group(dict.fromkeys(injection.adapter.layers.values()), injection.share_inputs)


def gate_of(
    model: Any,
    *,
    ilora_z: Tensor | None = None,
    ilora_prompt_mask: Tensor | None = None,
    ilora_segments: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """The gate [N, E] (or [blocks, N, E]) that the model's gate network computes from these inputs, for code that calls
    the model step by step: `with ilora.gated(model, ilora.gate_of(model, input_ids=..., attention_mask=...)): ...`.

    inputs: by name, as the model's forward takes them. Raises: ValueError where nothing was injected, where the model
    has no gate network, and for inputs that it lacks or does not take; TypeError for inputs of a wrong type.
    """
    injected(model)
    check_argument_types(ilora_segments, ilora_prompt_mask)
    return ask_network(model, read_inputs((), (), inputs), ilora_z, ilora_segments, ilora_prompt_mask)


def last_gate(model: Any) -> Tensor:
    """The gate [N, E] (or [blocks, N, E]) of the model's last forward, detached, for `gate_stats` and `plot_gates`.
    Of a batch of several adapters it has the rows of all, narrower ones filled up by zeros.
    Raises ValueError where nothing was injected, before the first forward, and after one without a gate (merged, or
    inside `disable_adapter`)."""
    last = injected(model).state.last
    if last is None:
        raise ValueError("last_gate: the model has not run under a gate yet")
    return last


def refuse_model(model: Any) -> None:
    """Raises TypeError, ValueError for what cannot be injected: other adapters, wrappers, what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, ILoRAModel):
        raise ValueError(f"the model has the adapter {model.ilora.adapter.name!r} already: ilora.eject, or add_adapter")
    refuse_wrapped(model)  # inject into the plain model, then compile it
    if any(hasattr(model, name) for name in ("ilora", "ilora_gate")):
        raise ValueError(f"{type(model).__name__} has an attribute ilora or ilora_gate of its own: name it otherwise")
    if hasattr(model, "peft_type") or type(model).__name__.startswith("PeftModel"):
        raise ValueError("the model is a PEFT model: ilora.from_peft(model, num_experts) takes its LoRA over")
    for path, module in model.named_modules():
        if isinstance(module, ILoRALinear):
            raise ValueError(f"{path or type(model).__name__}: it is an ILoRALinear already")
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{path}: it is PEFT's {type(module).__name__}; take PEFT's adapter out of the model first"
            )
