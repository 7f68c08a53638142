"""From PEFT's LoRA and back. With the gate 1/E everywhere, an iLoRA is the LoRA of the same matrices and alpha."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.modules import refresh, replace
from ..adapter.record import adapters, changeable, is_injected
from ..base_layers import is_linear
from ..storage.cards import PLAIN
from ..storage.files import CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, README, AdapterError, to_json, write_directory
from ..storage.format import GATE_PREFIX, Layout, peft_config, peft_key, tensors_of
from ..storage.read import find_directory
from .inject import eject, enter
from .peft_lora import REASONS, PlainLora, read_peft, refuse, take_over


def from_peft(source: Any, num_experts: int, model: Any = None, gate: nn.Module | None = None) -> Any:
    """An iLoRA that starts from a PEFT LoRA: with the gate 1/num_experts it computes what PEFT computed.

    Args:
        source: a `peft.PeftModel`, whose base model is unwrapped in place, injected and returned, with the active
            adapter (the others are dropped); or the directory of a saved adapter, or "owner/name" on the Hub.
        num_experts: E, which divides every rank.
        model: the base model, for a directory.
        gate: the gate network, as in `ilora.inject`.
    Raises: AdapterError for what iLoRA cannot express (DoRA, biases, trained tokens, other methods than LoRA, LoRA of
        embeddings and convolutions, ranks that num_experts does not divide) and for damaged files; TypeError,
        ImportError. The model is then what it was.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts: expected an integer >= 1, got {num_experts!r}")
    if isinstance(source, (str, os.PathLike)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"from_peft: a saved adapter needs model=, its base model; got {type(model).__name__}")
        if is_injected(model):
            raise ValueError(f"from_peft: the model has the adapter {adapters(model)[0]!r} already: ilora.eject first")
        return take_over(model, read_peft(model, find_directory(source)), num_experts, gate)
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
    injection = changeable(model, "to_peft")
    refresh(model)
    layout, tensors = Layout.of(injection.adapter), _gated(injection.adapter, gate)
    alphas = {name: layer.lora_alpha * layer.num_experts for name, layer in layout.layers.items()}
    described = peft_config(model, layout, alphas)
    if path is not None:
        if (Path(path) / CONFIG).exists():
            raise AdapterError(f"{path}: holds an iLoRA adapter, which a PEFT adapter would spoil; choose another name")
        lora = {peft_key(name): tensor for name, tensor in tensors.items()}
        text = to_json(described)
        return write_directory(path, {PEFT_WEIGHTS: lora, README: PLAIN}, (PEFT_CONFIG, lambda _: text))
    training = {name: module.training for name, module in model.named_modules()}
    with tempfile.TemporaryDirectory() as folder:
        live = _taken_by_peft(model, to_peft(model, gate, Path(folder) / "adapter"))
    for name, module in live.get_base_model().named_modules():
        module.training = training.get(name.split(".lora_")[0], module.training)
    return live


def _taken_by_peft(model: Any, saved: Path) -> Any:
    """The model, ejected, in a PeftModel with a saved adapter. Where PEFT refuses it the model is what it was."""
    peft, injection = _peft(), model.ilora
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    base = eject(model)
    before = dict(base.named_modules(remove_duplicate=False)), dict(vars(base))
    try:
        return peft.PeftModel.from_pretrained(base, str(saved), autocast_adapter_dtype=False)
    except BaseException:
        for path, module in before[0].items():  # parents first: what PEFT has wrapped is whole inside
            if path and base.get_submodule(path) is not module:
                replace(base, path, module)
        for name in set(vars(base)) - set(before[1]):
            delattr(base, name)
        enter(base, injection)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        raise


@torch.no_grad()
def _gated(adapter: Any, gate: Tensor) -> dict[str, Tensor]:
    """The adapter's tensors without its gate network, the gate multiplied into each lora_B and rounded once."""
    E, blocks = adapter.config.num_experts, len(adapter.blocks)
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"to_peft: expected one gate, a float tensor [{E}], got {type(gate).__name__}")
    if gate.shape not in ((E,), (1, E), (blocks, 1, E)):
        raise ValueError(f"to_peft: expected one gate, [{E}], [1, {E}] or [{blocks}, 1, {E}], got {list(gate.shape)}")
    tensors = {name: t for name, t in tensors_of(adapter).items() if not name.startswith(GATE_PREFIX)}
    for layer in adapter.layers.values():
        B = layer.lora_B
        wide = torch.promote_types(B.dtype, torch.float32)
        row = gate[layer.gate_index] if gate.dim() == 3 else gate.reshape(1, -1)
        weights = layer.own_gate(row.to(B.device, wide))[0].repeat_interleave(layer.r // layer.num_experts)
        tensors[f"{layer.name}.lora_B"] = (B.to(wide) * weights).to(B.dtype)
    return tensors


def _from_live(source: Any, num_experts: int, gate: nn.Module | None) -> Any:
    peft = _peft()
    if not isinstance(source, peft.PeftModel):
        raise TypeError(f"from_peft: expected a peft.PeftModel or a path, got {type(source).__name__}")
    active = source.active_adapters
    if len(active) != 1:
        raise AdapterError(f"{type(source).__name__}: expected one active adapter, got {active}: set_adapter(name)")
    label = f"{type(source).__name__}, adapter {active[0]!r}"
    refuse(label, source.peft_config[active[0]].to_dict())
    base = source.get_base_model()
    wrappers: dict[str, tuple[nn.Module, nn.Module]] = {}
    lora = PlainLora(label)
    for path, module in base.named_modules():
        if any(path.startswith(outer + ".") for outer in wrappers):
            continue
        inner = _unwrapped(path, module, active[0], lora)
        if inner is not None:
            wrappers[path] = (module, inner)
    config = base.__dict__.pop("peft_config", None)
    try:
        for path, (_, inner) in wrappers.items():
            replace(base, path, inner)
        return take_over(base, lora, num_experts, gate)
    except BaseException:
        for path, (wrapper, _) in wrappers.items():
            replace(base, path, wrapper)
        if config is not None:
            base.peft_config = config
        raise


def _unwrapped(path: str, module: nn.Module, name: str, lora: PlainLora) -> nn.Module | None:
    """What PEFT wrapped in this module, None if it is none of PEFT's; what the adapter has there goes to `lora`."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if name in module.modules_to_save:
            lora.saved.append(path)
            lora.values |= {f"{path}.{key}": t for key, t in module.modules_to_save[name].state_dict().items()}
        return module.original_module
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise AdapterError(f"{lora.source}: {path} is a {type(module).__name__}: {REASONS['trainable_token_indices']}")
    if not isinstance(module, BaseTunerLayer):
        return None
    base: nn.Module = module.get_base_layer()
    if getattr(module, "merged", False):
        raise AdapterError(f"{lora.source}: {path} is merged into its base; call unmerge_adapter() first")
    if not isinstance(module, LoraLayer) or not is_linear(base) or name in module.lora_embedding_A:
        raise AdapterError(f"{lora.source}: {path} is a LoRA on a {type(base).__name__}, which is no linear layer")
    if name in module.lora_A:
        r = lora.ranks[path] = int(module.r[name])
        lora.alphas[path] = module.scaling[name] * r
        lora.dropout = max(lora.dropout, float(getattr(module.lora_dropout[name], "p", 0.0)))
        for part, layer in (("lora_A", module.lora_A[name]), ("lora_B", module.lora_B[name])):
            lora.values[f"{path}.{part}"] = layer.weight
    return base


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("live PEFT models need peft: pip install peft") from error
    return peft
