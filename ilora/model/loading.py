"""Adapters from files into a model: ilora's own, and PEFT's LoRA, from it and back. Under the uniform gate 1/E an iLoRA
computes the LoRA of the same A, B and alpha."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..adapter.merging import weights_of_ranks
from ..adapter.modules import replace
from ..adapter.record import Adapter, Injection, adapters, changeable, find_adapter, is_injected
from ..adapter.switch import activate, build
from ..gates.checks import one_gate
from ..storage.cards import PLAIN
from ..storage.files import CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, README, AdapterError, to_json, write_directory
from ..storage.format import (
    B_EXPERTS,
    as_in_file,
    by_file,
    embedding_parameters,
    fill,
    is_resized,
    peft_config,
    tensors_of,
)
from ..storage.read import UNFIT, SavedAdapter, find_directory, read_adapter
from ..storage.save import describe_gate
from .inject import install, refuse_model
from .peft_lora import install_lora, read_lora, refuse_config


def load_adapter(
    model: Any,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    gate: nn.Module | None = None,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """Loads a saved adapter into the model, in place, and makes it the active one; returns the model.

    Args:
        model: a plain model, which is injected with the saved settings; or an injected one. If that has an adapter of
            this name and the same settings, its values are overwritten in place (an optimizer keeps its parameters);
            else the adapter is added.
        path: the directory; or, if there is none of this name, "owner/name" on the Hub, with revision and token.
        gate: the gate network, if a network of your own class was saved; others are built from their settings.
        verify: compare checksums. Names, shapes, dtypes and settings are always checked.
    Where the model's adapter has another dtype than the file, values are rounded as by `copy_`, such as a float32
    adapter in a bfloat16 model without adapter_dtype. A gate network that is built here has the file's dtype.
    Saved embeddings (of a base whose vocabulary was resized) replace the model's own values; `eject` leaves them.
    Raises: AdapterError (a ValueError) for files that are missing, damaged, or do not fit the model or each other;
    TypeError, ImportError. Everything is checked first, so the model is then what it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    try:
        changeable(model, "load_adapter") if is_injected(model) else refuse_model(model)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    saved = read_adapter(find_directory(path, revision, token), verify)
    there = is_injected(model) and name in adapters(model)
    if there and gate is not None:
        raise AdapterError(
            f"gate: the model's adapter {name!r} has its gate network; leave it out, or load as a new name"
        )
    adapter = find_adapter(model, name) if there else _build(model, saved, name, gate)
    differ = differences(adapter, saved.config, saved.gate)
    if differ:
        whose = f"the model's adapter {name!r}" if there else "the adapter in this model"
        raise AdapterError(
            f"{saved.directory / CONFIG}: {whose} has other settings: {'; '.join(differ)}"
            + ("; load it under a new name" if there else "")
        )
    embeddings = saved.embeddings_in(model, adapter)
    values = saved.values_for(adapter, embeddings)
    others = is_injected(model) and set(adapters(model)) != {name}
    if others and not all(torch.equal(values[key].to(t), t) for key, t in embeddings.items()):
        raise AdapterError(
            f"{saved.directory}: it was saved with embeddings, since the vocabulary had been resized, and the model's, "
            "which its other adapters use too, are not the same: load it into a model of its own"
        )
    fill(tensors_of(adapter) | embeddings, values)
    return activate(model, adapter) if is_injected(model) else install(model, Injection(adapter))


def _build(model: Any, saved: SavedAdapter, name: str, gate: nn.Module | None) -> Adapter:
    """An adapter of this model with the saved settings and a gate network, not in the model yet."""
    file = saved.directory / CONFIG
    if gate is not None and saved.gate is None:
        raise AdapterError(f"{file}: gate: the adapter was saved without a gate network, but gate= is given")
    gate = saved.new_gate() if gate is None else gate
    try:
        return build(model, name, saved.config, gate, experts=saved.has_experts)
    except UNFIT as error:
        raise AdapterError(f"{file}: does not fit {type(model).__name__}: {error}") from error


def differences(adapter: Adapter, config: ILoRAConfig, gate: dict[str, Any] | None) -> list[str]:
    """The adapter's settings that differ from these, one sentence each. The backend may differ: it belongs to the
    machine."""
    own, other = adapter.config.to_dict(), config.to_dict()
    found = [
        f"{key} is {own[key]!r}, in the file {other[key]!r}"
        for key in own
        if _unordered(own[key]) != _unordered(other[key]) and key != "backend"
    ]
    mine, theirs = describe_gate(adapter.gate) or {}, gate or {}
    if mine.get("type") != theirs.get("type"):
        return [*found, f"the gate network's type is {mine.get('type')!r}, in the file {theirs.get('type')!r}"]
    custom = mine.get("type") == "custom"  # its class may have moved to another module; its tensors are checked
    for key in () if custom else sorted({*mine, *theirs}):
        if key not in mine or key not in theirs or mine[key] != theirs[key]:
            found.append(f"the gate network's {key} is {mine.get(key)!r}, in the file {theirs.get(key)!r}")
    return found


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def from_peft(source: Any, num_experts: int, model: Any = None, gate: nn.Module | None = None) -> Any:
    """An iLoRA that starts from a PEFT LoRA: under the gate 1/num_experts it computes what PEFT computed.

    Args:
        source: a saved PEFT adapter, as its directory or "owner/name" on the Hub; or a `peft.PeftModel`, whose active
            adapter is taken over into its base model, in place, and whose other adapters are dropped.
        num_experts: E, which divides every rank.
        model: the base model of a saved adapter.
        gate: the gate network, as in `ilora.inject`.
    Returns: the injected base model. Raises: AdapterError for what an iLoRA cannot express (DoRA, biases, trained
    tokens, methods other than LoRA, LoRA of embeddings and convolutions, ranks that num_experts does not divide), for
    damaged files and files that repeat weights of the base model; ValueError, TypeError, ImportError. The model is then
    what it was.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts: expected an integer >= 1, got {num_experts!r}")
    if isinstance(source, (str, os.PathLike)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"from_peft: a saved adapter needs model=, its base model; got {type(model).__name__}")
        directory = find_directory(source)
        return install_lora(model, str(directory / PEFT_WEIGHTS), *read_lora(directory), num_experts, gate)
    if model is not None:
        raise TypeError("from_peft: model= goes with a saved adapter; a PeftModel has its base model with it")
    return _from_live(source, num_experts, gate)


def to_peft(model: Any, gate: Tensor, path: str | os.PathLike[str] | None = None) -> Path:
    """Writes a plain PEFT LoRA that computes what the model computes under one gate [E], [1, E] or [blocks, 1, E].
    The gate is multiplied into lora_B, and lora_alpha becomes E times as large.

    path: the directory, written as atomically as by `save_adapter`. The model stays as it is; for a live model then
        `peft.PeftModel.from_pretrained(ilora.eject(model), path)`.
    Raises: ValueError without a path, for a batch of gates, while a gate is merged and inside `disable_adapter`;
    TypeError for what is no gate; AdapterError where the directory holds an iLoRA adapter; OSError.
    """
    changeable(model, "to_peft")
    if path is None:
        raise ValueError(
            "to_peft: expected a path to write to; for a live model, load what it wrote: "
            "peft.PeftModel.from_pretrained(ilora.eject(model), path)"
        )
    adapter = find_adapter(model)
    tensors = _gated_tensors(adapter, gate) | (embedding_parameters(model, adapter) if is_resized(model) else {})
    tensors = by_file({name: as_in_file(name, tensor) for name, tensor in tensors.items()})[PEFT_WEIGHTS]
    if (Path(path) / CONFIG).exists():
        raise AdapterError(f"{path}: holds an iLoRA adapter, which a PEFT adapter would spoil; choose another name")
    updates: list[Any] = [*adapter.layers.values(), *adapter.expert_updates]
    alphas = {update.name: update.lora_alpha * update.num_experts for update in updates}
    text = to_json(peft_config(model, adapter, alphas))
    return write_directory(path, {PEFT_WEIGHTS: tensors, README: PLAIN}, (PEFT_CONFIG, lambda _: text))


@torch.no_grad()
def _gated_tensors(adapter: Adapter, gate: Tensor) -> dict[str, Tensor]:
    """The adapter's tensors, the gate multiplied into each lora_B and rounded once."""
    gate = one_gate(gate, adapter.config.num_experts, len(adapter.blocks), "to_peft")
    tensors = tensors_of(adapter)
    split = next((name for name, tensor in tensors.items() if hasattr(tensor, "device_mesh")), None)
    if split is not None:
        raise ValueError(
            f"to_peft: {split} is split over processes; save_adapter, then load_adapter and to_peft in one process"
        )
    for layer in adapter.layers.values():
        B = layer.lora_B
        wide = torch.promote_types(B.dtype, torch.float32)
        tensors[f"{layer.name}.lora_B"] = (B.to(wide) * weights_of_ranks(layer, gate, B.device, wide)).to(B.dtype)
    for update in adapter.expert_updates:
        B = update.lora_B_experts
        wide = torch.promote_types(B.dtype, torch.float32)
        ranks = weights_of_ranks(update, gate, B.device, wide)
        tensors[f"{update.name}{B_EXPERTS}"] = (B.to(wide) * ranks).to(B.dtype)
    return tensors


def _from_live(source: Any, num_experts: int, gate: nn.Module | None) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("from_peft: a PeftModel needs peft: pip install peft") from error
    if not isinstance(source, peft.PeftModel):
        raise TypeError(f"from_peft: expected a peft.PeftModel or a path, got {type(source).__name__}")
    active, base = source.active_adapters, source.get_base_model()
    if len(active) != 1:
        raise AdapterError(f"{type(source).__name__}: expected one active adapter, got {active}: set_adapter(name)")
    label, config = f"{type(source).__name__}, adapter {active[0]!r}", source.peft_config[active[0]].to_dict()
    refuse_config(label, config)
    if any(getattr(module, "merged", False) for module in base.modules()):
        raise AdapterError(f"{label}: it is merged into its base; call unmerge_adapter() first")
    tensors = peft.get_peft_model_state_dict(source, adapter_name=active[0], save_embedding_layers=False)
    wrappers = _peft_wrappers(base)
    for path, wrapper in wrappers.items():
        whole = hasattr(wrapper, "original_module")
        replace(base, path, wrapper.original_module if whole else wrapper.get_base_layer())
    vars(base).pop("peft_config", None)
    try:
        return install_lora(base, label, config, tensors, num_experts, gate)
    except BaseException:
        for path, wrapper in wrappers.items():
            replace(base, path, wrapper)
        base.peft_config = source.peft_config
        raise


def _peft_wrappers(base: nn.Module) -> dict[str, Any]:
    """The modules that PEFT has put in the places of the base model's own, by path; not those inside of others."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    wrappers: dict[str, Any] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        inside = path.startswith(tuple(outer + "." for outer in wrappers))
        if not inside and isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            wrappers[path] = module
    return wrappers
