"""From PEFT's LoRA and back. With the gate 1/E everywhere, an iLoRA is the LoRA of the same matrices and alpha."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.merging import weights_of_ranks
from ..adapter.modules import replace
from ..adapter.record import Adapter, changeable, find_adapter
from ..gates.checks import one_gate
from ..storage.cards import PLAIN
from ..storage.files import CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, README, AdapterError, to_json, write_directory
from ..storage.format import by_file, embeddings_of, is_resized, peft_config, tensors_of
from ..storage.read import find_directory
from .inject import eject, install
from .peft_lora import install_lora, read_lora, refuse_config


def from_peft(source: Any, num_experts: int, model: Any = None, gate: nn.Module | None = None) -> Any:
    """An iLoRA that starts from a PEFT LoRA: with the gate 1/num_experts it computes what PEFT computed.

    Args:
        source: a `peft.PeftModel`, whose base model is unwrapped in place, injected and returned, with the active
            adapter (the others are dropped); or the directory of a saved adapter, or "owner/name" on the Hub.
        num_experts: E, which divides every rank.
        model: the base model, for a directory.
        gate: the gate network, as in `ilora.inject`.
    Raises: AdapterError for what iLoRA cannot express (DoRA, biases, trained tokens, other methods than LoRA, LoRA of
        embeddings and convolutions, ranks that num_experts does not divide), for files that are damaged or repeat
        weights of the base model; TypeError, ImportError. The model is then what it was.
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


def to_peft(model: Any, gate: Tensor, path: str | os.PathLike[str] | None = None) -> Any:
    """A plain LoRA that computes what the model computes under one gate [E], [1, E] or [blocks, 1, E]: the gate goes
    into lora_B, and lora_alpha becomes E times as large.

    path: write a PEFT adapter there, atomically as `save_adapter`, and return the Path; the model stays as it is. None:
    return a `peft.PeftModel` over the base model, which `ilora.eject` gives back (its other adapters are forgotten).
    Raises: ValueError for a batch of gates, while a gate is merged and inside `disable_adapter`, TypeError, OSError,
    ImportError, and what PEFT raises for a model that it cannot take. The model is then what it was.
    """
    changeable(model, "to_peft")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            return _taken_by_peft(model, to_peft(model, gate, Path(folder) / "adapter"))
    adapter = find_adapter(model)
    embeddings = embeddings_of(model, adapter) if is_resized(model) else {}
    tensors = by_file(_gated_tensors(adapter, gate) | embeddings)[PEFT_WEIGHTS]
    if (Path(path) / CONFIG).exists():
        raise AdapterError(f"{path}: holds an iLoRA adapter, which a PEFT adapter would spoil; choose another name")
    alphas = {layer.name: layer.lora_alpha * layer.num_experts for layer in adapter.layers.values()}
    text = to_json(peft_config(model, adapter, alphas))
    return write_directory(path, {PEFT_WEIGHTS: tensors, README: PLAIN}, (PEFT_CONFIG, lambda _: text))


@torch.no_grad()
def _gated_tensors(adapter: Adapter, gate: Tensor) -> dict[str, Tensor]:
    """The adapter's tensors, the gate multiplied into each lora_B and rounded once."""
    gate = one_gate(gate, adapter.config.num_experts, len(adapter.blocks), "to_peft")
    tensors = tensors_of(adapter)
    for layer in adapter.layers.values():
        B = layer.lora_B
        wide = torch.promote_types(B.dtype, torch.float32)
        tensors[f"{layer.name}.lora_B"] = (B.to(wide) * weights_of_ranks(layer, gate, B.device, wide)).to(B.dtype)
    return tensors


def _taken_by_peft(model: Any, saved: Path) -> Any:
    """The model, ejected, in a PeftModel with a saved adapter. Where PEFT refuses it the model is what it was."""
    peft, injection = _peft(), model.ilora
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = {name: module.training for name, module in model.named_modules()}
    base = eject(model)
    try:
        live = peft.PeftModel.from_pretrained(base, str(saved), autocast_adapter_dtype=False)
    except BaseException:
        _unwrap(base)
        install(base, injection)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, module in base.named_modules():
            module.training = training[name]
        raise
    for name, module in live.get_base_model().named_modules():
        module.training = training.get(name.split(".lora_")[0], module.training)
    return live


def _from_live(source: Any, num_experts: int, gate: nn.Module | None) -> Any:
    peft = _peft()
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
    wrappers = _unwrap(base)
    try:
        return install_lora(base, label, config, tensors, num_experts, gate)
    except BaseException:
        for path, wrapper in wrappers.items():
            replace(base, path, wrapper)
        base.peft_config = source.peft_config
        raise


def _unwrap(base: Any) -> dict[str, nn.Module]:
    """Puts the modules that PEFT has wrapped back in their places; returns the wrappers by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    wrappers: dict[str, Any] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        inside = path.startswith(tuple(outer + "." for outer in wrappers))
        if not inside and isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            wrappers[path] = module
    for path, module in wrappers.items():
        replace(base, path, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module)
    vars(base).pop("peft_config", None)
    return wrappers


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("live PEFT models need peft: pip install peft") from error
    return peft
