"""A PEFT LoRA taken apart: read from its directory, and put into a model as an iLoRA."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..base_layers import adapter_like, features_of, is_linear
from ..op.checks import MAX_RANK
from ..storage.files import PEFT_CONFIG, PEFT_WEIGHTS, AdapterError, check_tensors, read_json, read_tensors
from ..storage.format import PREFIX, Layout, exactly, fill, most_common, patterns, peft_key, specs_of, tensors_of
from .inject import eject, put

# Fields of LoraConfig that do not change what an adapter computes, or whose effect is read off the layers.
_NEUTRAL = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_NEUTRAL |= {"inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"}
_NEUTRAL |= {"use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
_NEUTRAL |= {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
_NEUTRAL |= {"runtime_config", "ensure_weight_tying", "init_lora_weights"}
REASONS = {
    "use_dora": "DoRA rescales whole weights, which a gated sum cannot",
    "bias": "trained biases are not part of an iLoRA; train with bias='none'",
    "lora_bias": "a bias on lora_B has no gate",
    "layer_replication": "replicated layers share a weight but not an adapter",
    "trainable_token_indices": "trained tokens are not part of an iLoRA; use modules_to_save",
    "target_parameters": "LoRA on bare parameters has no layer to wrap",
}
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class PlainLora:
    """A PEFT LoRA taken apart: ranks, alphas (scaling = alpha / r) by path; tensors named as in `ilora.layout`."""

    source: str
    dropout: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)


def read_peft(model: nn.Module, directory: Path) -> PlainLora:
    """A PEFT directory, checked against the model."""
    file, weights = directory / PEFT_CONFIG, directory / PEFT_WEIGHTS
    config = read_json(file)
    refuse(str(file), config)
    if config.get("init_lora_weights") not in _KEEPS_BASE:
        value = config["init_lora_weights"]
        raise AdapterError(f"{file}: init_lora_weights={value!r} changes the base's weights: convert it with PEFT")
    if not weights.exists() and (directory / "adapter_model.bin").exists():
        raise AdapterError(f"{weights} is missing; adapter_model.bin is a pickle: load and save the adapter with PEFT")
    tensors, lora = read_tensors(weights), PlainLora(str(weights), _number(file, config, "lora_dropout", 0.0))
    modules = dict(model.named_modules())
    ends = tuple(_strings(file, config, "modules_to_save"))
    specs = {}
    for key in tensors:
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_A\.weight", key)
        if match and is_linear(modules.get(match[1], nn.Identity())):
            path = match[1]
            lora.ranks[path] = r = _rank(file, config, path)
            lora.alphas[path] = _alpha(file, config, path) / (math.sqrt(r) if config.get("use_rslora") else r) * r
            d_in, d_out = features_of(modules[path])
            specs[f"{path}.lora_A"] = torch.Size((r, d_in)), torch.float32
            specs[f"{path}.lora_B"] = torch.Size((d_out, r)), torch.float32
        elif not match:
            lora.saved += [p for p in _parents(key.removeprefix(PREFIX)) if ends and p.endswith(ends) and p in modules]
    lora.saved = list(dict.fromkeys(lora.saved))
    for path in lora.saved:
        specs |= {f"{path}.{key}": spec for key, spec in specs_of(modules[path]).items()}
    tensors = _without_base(model, weights, tensors, {peft_key(name) for name in specs})
    check_tensors(weights, tensors, {peft_key(name): spec for name, spec in specs.items()})
    lora.values = {name: tensors[peft_key(name)] for name in specs}
    return lora


def _without_base(model: nn.Module, file: Path, tensors: dict[str, Tensor], kept: set[str]) -> dict[str, Tensor]:
    """The tensors without weights of the base model, which PEFT adds where a head or the embeddings are adapted or have
    been resized. Raises AdapterError where they are not this model's."""
    own = model.state_dict()
    for key in tensors.keys() - kept:
        weight = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if weight is None:
            continue  # nobody's: refused with the others
        value = tensors[key].to(weight.device, weight.dtype)
        if weight.is_meta or value.shape != weight.shape or not torch.equal(value, weight):
            raise AdapterError(
                f"{file}: {key!r} is a weight of the base model that this model does not have; load the adapter with "
                "PEFT and pass the PeftModel"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name != key}
    return tensors


def refuse(source: str, config: dict[str, Any]) -> None:
    """Raises AdapterError for a PEFT configuration that an iLoRA cannot express, naming the field and the reason."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise AdapterError(f"{source}: peft_type: expected 'LORA', got {kind!r}, which is another method")
    for key, value in config.items():
        if key in _NEUTRAL or not value or (key, value) == ("bias", "none"):
            continue
        raise AdapterError(f"{source}: {key}={value!r}: {REASONS.get(key, 'iLoRA has no counterpart for it')}")


def take_over(model: Any, lora: PlainLora, num_experts: int, gate: nn.Module | None) -> Any:
    """Injects the LoRA into its base model as an iLoRA. Raises ValueError, TypeError; the model is then as it was."""
    if not lora.ranks:
        raise AdapterError(f"{lora.source}: it has no LoRA layer of {type(model).__name__}")
    for path, r in lora.ranks.items():
        if r > MAX_RANK or r % num_experts:
            why = f"more than the {MAX_RANK} of an iLoRA" if r > MAX_RANK else f"which {num_experts=} does not divide"
            raise AdapterError(f"{lora.source}: {path} has rank {r}, {why}")
    order = [path for path, _ in model.named_modules()]  # not the file's, so that the config is the same either way
    ranks = {path: lora.ranks[path] for path in order if path in lora.ranks}
    alphas = {path: _tidy(lora.alphas[path]) for path in ranks}
    r, alpha, names = most_common(ranks), most_common(alphas), exactly(model, list(ranks))
    config = ILoRAConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        num_experts=num_experts,
        target_modules=names if isinstance(names, str) else tuple(names),
        modules_to_save=tuple(path for path in order if path in lora.saved),
        rank_pattern=patterns(ranks, r) or None,
        alpha_pattern=patterns(alphas, alpha) or None,
        adapter_dtype=_dtype(model, lora),
    )
    layout = Layout.planned(model, config)
    wanted, planned = {*lora.ranks, *lora.saved}, {*layout.layers, *layout.saved}
    if wanted != planned:
        raise AdapterError(f"{lora.source}: cannot tell {sorted(wanted ^ planned)} from {sorted(wanted)} by name")
    put(model, config, gate)
    try:
        fill(tensors_of(model.ilora.adapter), lora.values)
    except BaseException:
        eject(model)
        raise
    return model


def _dtype(model: nn.Module, lora: PlainLora) -> str | None:
    """adapter_dtype under which the layers run and every value is kept; None where the base's own dtype is that."""
    values = {lora.values[f"{path}.{part}"].dtype for path in lora.ranks for part in ("lora_A", "lora_B")}
    values = {dtype if dtype.itemsize > 1 else torch.float32 for dtype in values}
    bases = {adapter_like(model.get_submodule(path), None).dtype for path in lora.ranks}
    kept = all(torch.promote_types(base, value) == base for base in bases for value in values)
    return None if kept or torch.float64 in bases else "float32"  # beside 16 bits nothing but float32 runs


def _tidy(alpha: float) -> float:
    # PEFT keeps alpha / r: multiplied back it may miss the integer by its last bit
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _rank(file: Path, config: dict[str, Any], path: str) -> int:
    r = _patterned(file, config, "rank_pattern", path, config.get("r", 8))
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r < 2**31:
        raise AdapterError(f"{file}: the rank of {path}: expected an integer >= 1, got {r!r}")
    return r


def _alpha(file: Path, config: dict[str, Any], path: str) -> float:
    alpha = _patterned(file, config, "alpha_pattern", path, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or abs(alpha) > 1e300:
        raise AdapterError(f"{file}: the lora_alpha of {path}: expected a number, got {alpha!r}")
    return alpha


def _patterned(file: Path, config: dict[str, Any], name: str, path: str, default: Any) -> Any:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{file}: field {name!r}: expected an object, got {pattern!r}")
    for key, value in pattern.items():
        try:
            if re.match(rf"(?:.*\.)?(?:{key})$", path):
                return value
        except re.error as error:
            raise AdapterError(f"{file}: field {name!r}: {key!r} is no regular expression: {error}") from error
    return default


def _number(file: Path, config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise AdapterError(f"{file}: field {name!r}: expected 0 <= p < 1, got {value!r}")
    return float(value)


def _strings(file: Path, config: dict[str, Any], name: str) -> list[str]:
    value = config.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise AdapterError(f"{file}: field {name!r}: expected a list of names, got {value!r}")
    return value


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
