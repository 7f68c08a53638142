"""Makes an iLoRA of a PEFT LoRA: checks its configuration and tensors, and injects them into the base model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..adapter.record import Injection
from ..adapter.switch import build
from ..adapter.targets import named
from ..base_layers import adapter_like, is_linear
from ..grouped.experts import projections_of
from ..op.checks import MAX_RANK
from ..storage.files import PEFT_CONFIG, PEFT_WEIGHTS, AdapterError, check_tensors, read_json, read_tensors
from ..storage.format import (
    PREFIX,
    by_file,
    exact_targets,
    fill,
    from_file,
    most_common,
    patterns,
    place_of,
    spec_in_file,
    specs_of,
    tensors_of,
)
from .inject import install, refuse_model

# Fields of LoraConfig that do not change what an adapter computes, or that `_config` reads.
_NEUTRAL = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_NEUTRAL |= {"inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"}
_NEUTRAL |= {"use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
_NEUTRAL |= {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
_NEUTRAL |= {"target_parameters", "runtime_config", "ensure_weight_tying", "init_lora_weights"}
_REASONS = {
    "use_dora": "DoRA rescales whole weights, which a gated sum cannot",
    "bias": "trained biases are not part of an iLoRA; train with bias='none'",
    "lora_bias": "a bias on lora_B has no gate",
    "layer_replication": "replicated layers share a weight but not an adapter",
    "trainable_token_indices": "an iLoRA trains no single tokens; use modules_to_save",
}
# Values of init_lora_weights under which PEFT leaves the base's weights as they are.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


def read_lora(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by PEFT's keys) of a saved PEFT LoRA. Raises AdapterError for damaged files and for what
    an iLoRA cannot express."""
    file, weights = directory / PEFT_CONFIG, directory / PEFT_WEIGHTS
    config = read_json(file)
    refuse_config(str(file), config)
    if config.get("init_lora_weights") not in _KEEPS_BASE:
        value = config["init_lora_weights"]
        raise AdapterError(f"{file}: init_lora_weights={value!r} changes the base's weights: convert it with PEFT")
    if not weights.exists() and (directory / "adapter_model.bin").exists():
        raise AdapterError(f"{weights} is missing; adapter_model.bin is a pickle: load and save the adapter with PEFT")
    return config, read_tensors(weights)


def refuse_config(source: str, config: dict[str, Any]) -> None:
    """Raises AdapterError for a PEFT configuration that an iLoRA cannot express, naming the field and the reason."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise AdapterError(f"{source}: peft_type: expected 'LORA', got {kind!r}, which is another method")
    for key, value in config.items():
        if value and key not in _NEUTRAL and (key, value) != ("bias", "none"):
            raise AdapterError(f"{source}: {key}={value!r}: {_REASONS.get(key, 'iLoRA has no counterpart for it')}")


def install_lora(
    model: Any,
    source: str,
    peft: dict[str, Any],
    tensors: dict[str, Tensor],
    num_experts: int,
    gate: nn.Module | None,
) -> Any:
    """Injects a LoRA, given as PEFT's configuration and tensors, into its plain base model; returns the model.
    Raises AdapterError naming the source, ValueError, TypeError. The model is then what it was."""
    refuse_model(model)
    adapter = build(model, "default", _config(model, source, peft, tensors, num_experts), gate)
    specs = specs_of(adapter)
    expected = by_file({name: spec_in_file(name, spec) for name, spec in specs.items()})[PEFT_WEIGHTS]
    base = {PREFIX + name for name in model.state_dict()}
    for key in tensors:
        if key not in expected and key.replace(".base_layer.", ".") in base:
            raise AdapterError(
                f"{source}: {key!r} is a weight of the base model, as PEFT adds where the vocabulary was resized; load "
                "the adapter with PEFT and pass the PeftModel, or save it with save_embedding_layers=False"
            )
    check_tensors(source, tensors, expected)
    keys = {name: place_of(name)[1] for name in specs if place_of(name)[0] == PEFT_WEIGHTS}
    fill(tensors_of(adapter), {name: from_file(name, tensors[key], specs[name][0]) for name, key in keys.items()})
    return install(model, Injection(adapter))


def _config(
    model: nn.Module, source: str, peft: dict[str, Any], tensors: dict[str, Tensor], num_experts: int
) -> ILoRAConfig:
    """The iLoRA's configuration, for the layers of this model that have a lora_A among the tensors."""
    modules = [(path, module) for path, module in model.named_modules() if path]
    found = [path for path, module in modules if place_of(f"{path}.lora_A")[1] in tensors and is_linear(module)]
    experts = _experts(source, peft, modules)
    if not found and not experts:
        raise AdapterError(f"{source}: it has no LoRA layer of {type(model).__name__}")
    ranks = {path: _rank(source, peft, path, num_experts) for path in (*found, *sum(experts.values(), ()))}
    found += experts
    alphas = {path: _alpha(source, peft, path, r) for path, r in ranks.items()}
    dropout, whole = peft.get("lora_dropout", 0.0), peft.get("modules_to_save") or ()
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise AdapterError(f"{source}: field 'lora_dropout': expected 0 <= p < 1, got {dropout!r}")
    if isinstance(whole, str) or not all(isinstance(name, str) and name for name in whole):
        raise AdapterError(f"{source}: field 'modules_to_save': expected a list of names, got {whole!r}")
    saved = [path for path, _ in modules if path.endswith(tuple(whole)) and path not in ranks]
    r, alpha, names = most_common(ranks), most_common(alphas), exact_targets(model, found)
    return ILoRAConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=float(dropout),
        num_experts=num_experts,
        target_modules=names if isinstance(names, str) else tuple(names),
        modules_to_save=tuple(path for path in saved if any(key.startswith(f"{PREFIX}{path}.") for key in tensors)),
        rank_pattern=patterns(ranks, r) or None,
        alpha_pattern=patterns(alphas, alpha) or None,
        adapter_dtype=_dtype(model, found, tensors),
    )


def _experts(source: str, peft: dict[str, Any], modules: list[tuple[str, nn.Module]]) -> dict[str, tuple[str, ...]]:
    """The paths of the fused experts that target_parameters means, and of their two tensors. Raises AdapterError where
    it means one of the two, or a parameter that is none of them."""
    wanted = peft.get("target_parameters") or ()
    if isinstance(wanted, str) or not all(isinstance(name, str) and name for name in wanted):
        raise AdapterError(f"{source}: field 'target_parameters': expected a list of names, got {wanted!r}")
    found, meant = {}, set()
    for path, module in modules:
        tensors = tuple(f"{path}.{name}" for name in projections_of(module))
        hits = {name: [tensor for tensor in tensors if named(tensor, (name,))] for name in wanted}
        meant |= {name for name, of in hits.items() if of}
        both = {tensor for of in hits.values() for tensor in of}
        if both and len(both) < 2:
            raise AdapterError(f"{source}: target_parameters: of {path} it has {both.pop()} alone; iLoRA adapts both")
        if both:
            found[path] = tensors
    for name in wanted:
        if name not in meant:
            raise AdapterError(f"{source}: target_parameters: {name!r} is no tensor of fused experts in this model")
    return found


def _dtype(model: nn.Module, paths: list[str], tensors: dict[str, Tensor]) -> str | None:
    """An adapter_dtype that keeps every value exactly and with which the layers run; None for the base's own dtype."""
    dtypes = {tensor.dtype for key, tensor in tensors.items() if ".lora_" in key}
    dtypes = {dtype if dtype.itemsize > 1 else torch.float32 for dtype in dtypes}
    bases = {adapter_like(model.get_submodule(path), None).dtype for path in paths}
    kept = all(torch.promote_types(base, dtype) == base for base in bases for dtype in dtypes)
    # A 16-bit layer takes A and B in its own dtype or in float32.
    return None if kept or torch.float64 in bases else "float32"


def _rank(source: str, peft: dict[str, Any], path: str, num_experts: int) -> int:
    r = _number(source, peft, "r", path, "rank_pattern")
    if not isinstance(r, int) or r < 1:
        raise AdapterError(f"{source}: the r of {path}: expected an integer >= 1, got {r!r}")
    if r > MAX_RANK or r % num_experts:
        why = f"more than the {MAX_RANK} of an iLoRA" if r > MAX_RANK else f"which {num_experts=} does not divide"
        raise AdapterError(f"{source}: {path} has rank {r}, {why}")
    return r


def _alpha(source: str, peft: dict[str, Any], path: str, r: int) -> float:
    """The lora_alpha with which an iLoRA under the uniform gate scales by as much as PEFT: alpha / r, or alpha / √r."""
    alpha = _number(source, peft, "lora_alpha", path, "alpha_pattern")
    alpha = alpha / math.sqrt(r) * r if peft.get("use_rslora") else alpha
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _number(source: str, peft: dict[str, Any], name: str, path: str, pattern_name: str) -> Any:
    """r or lora_alpha of the layer at the path: that of the first matching key of the pattern, else the common one."""
    value, pattern = peft.get(name, 8), peft.get(pattern_name) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{source}: field {pattern_name!r}: expected an object, got {pattern!r}")
    try:
        value = next((own for key, own in pattern.items() if re.match(rf"(?:.*\.)?(?:{key})$", path)), value)
    except re.error as error:
        raise AdapterError(f"{source}: field {pattern_name!r}: a key is no regular expression: {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
        raise AdapterError(f"{source}: the {name} of {path}: expected a number, got {value!r}")
    return value
