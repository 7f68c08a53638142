"""What an adapter's files hold: its tensors by name, and how PEFT describes it.

A tensor's name is the one it has in the injected model: `<path>.lora_A`, `<path>.lora_B`, for fused experts
`<path>.<projection>.lora_A_experts` and so on, `<path of a module trained whole>.<key>` and `ilora_gate.<key>`; where
the base's vocabulary was resized, also `<path of its embeddings>.<key>`. The gate network has a file of its own. The
others are in PEFT's file, with a prefix, and with `.weight` after the names of LoRA matrices; those of experts are laid
out as PEFT does.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapter.modules import embeddings, unique_modules
from ..adapter.record import Adapter, is_injected
from ..base_layers import is_conv1d
from ..layer import ILoRALinear
from .files import GATE, PEFT_WEIGHTS, AdapterError, Spec

PREFIX, GATE_PREFIX = "base_model.model.", "ilora_gate."
A_EXPERTS, B_EXPERTS = ".lora_A_experts", ".lora_B_experts"
T = TypeVar("T")
# PEFT trains these heads by itself for the task: without them in the files it would miss them.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers. Raises TypeError for extra state that is no tensor."""
    state = module.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{type(module).__name__}: {key!r} of its state is a {type(value).__name__}, not a tensor")
    return dict(state)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of the adapter by name: the tensors themselves, no copies."""
    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers.values():
        tensors[f"{layer.name}.lora_A"], tensors[f"{layer.name}.lora_B"] = layer.lora_A, layer.lora_B
    for update in adapter.expert_updates:
        both = update.lora_A_experts, update.lora_B_experts
        tensors[f"{update.name}{A_EXPERTS}"], tensors[f"{update.name}{B_EXPERTS}"] = both
    for path, module in unique_modules(adapter.saved).items():
        tensors |= {f"{path}.{key}": value for key, value in state_of(module).items()}
    if adapter.gate is not None:
        tensors |= {GATE_PREFIX + key: value for key, value in state_of(adapter.gate).items()}
    return tensors


def specs_of(adapter: Adapter) -> dict[str, Spec]:
    """Shape and dtype of every tensor of the adapter, by name; of LoRA matrices the shape that the settings give, since
    this process may hold only a fragment of them."""
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(adapter).items()}
    for layer in adapter.layers.values():
        specs[f"{layer.name}.lora_A"] = torch.Size((layer.r, layer.in_features)), layer.lora_A.dtype
        specs[f"{layer.name}.lora_B"] = torch.Size((layer.out_features, layer.r)), layer.lora_B.dtype
    for update in adapter.expert_updates:
        X, R, dtype = update.slots, update.r, update.lora_A_experts.dtype
        specs[f"{update.name}{A_EXPERTS}"] = torch.Size((X, R, update.in_features)), dtype
        specs[f"{update.name}{B_EXPERTS}"] = torch.Size((X, update.out_features, R)), dtype
    return specs


def vocabulary_size(model: Any) -> int | None:
    """The number of rows of the model's input embeddings, None where it does not tell."""
    return getattr(embeddings(model), "num_embeddings", None)


def is_resized(model: Any) -> bool:
    """Whether the model's vocabulary has another size than that of the checkpoint it was loaded from, whose config.json
    is read on this machine. Warns where that is gone."""
    config: Any = getattr(model, "config", None)
    source, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not source or vocabulary_size(model) is None or not hasattr(config, "get_text_config"):
        return False
    try:
        base = type(config).from_pretrained(
            source, local_files_only=True, **({"revision": revision} if revision else {})
        )
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{source}: its config.json cannot be read any more, so nothing tells whether the vocabulary was resized, "
            f"and the embeddings are not saved: {error}",
            stacklevel=4,
        )
        return False
    now, before = (getattr(each.get_text_config(), "vocab_size", None) for each in (config, base))
    return bool(now != before)


def embedding_parameters(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """The parameters of the model's input and output embeddings by name, tied ones once, but for what the adapter
    trains whole. Raises AdapterError for quantised ones."""
    wanted = {id(embeddings(model)), id(embeddings(model, "output"))}
    originals = model.ilora.originals if is_injected(model) else {}
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        if id(module) in wanted and not any(f"{path}.".startswith(f"{whole}.") for whole in adapter.saved):
            module = originals.get(path, module)  # the frozen one, where another adapter trains it whole
            module = module.base_layer if isinstance(module, ILoRALinear) else module
            inner = f"{path}.base_layer" if path in adapter.layers else path
            for key, parameter in module.named_parameters():
                if not parameter.is_floating_point():
                    raise AdapterError(
                        f"{path}: it is quantised, its {key} cannot be saved; exclude it from quantising"
                    )
                found.setdefault(id(parameter), (f"{inner}.{key}", parameter))
    return dict(found.values())


@torch.no_grad()
def fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copies values into the tensors of the same names, all of them or (out of memory, say) none."""
    for name in values:
        if tensors[name].is_meta:
            raise AdapterError(
                f"{name}: the model is on the meta device, which holds no values; load it, or move it by "
                "model.to_empty(device=...), before its adapter"
            )
    staged = {name: _like(value, tensors[name]) for name, value in values.items()}
    for name, value in staged.items():
        tensors[name].copy_(value)


def _like(value: Tensor, target: Any) -> Tensor:
    value = value.to(target.device, target.dtype)
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor  # a model sharded by FSDP2: every process takes its part

    return distribute_tensor(value, target.device_mesh, target.placements)


def place_of(name: str) -> tuple[str, str]:
    """The file that holds the tensor of this name, and its key there."""
    if name.startswith(GATE_PREFIX):
        return GATE, name.removeprefix(GATE_PREFIX)
    if name.endswith((A_EXPERTS, B_EXPERTS)):  # PEFT wraps the experts once for each tensor, the last one outermost
        path, projection, factor = name.rsplit(".", 2)
        inner = "" if projection == "down_proj" else ".base_layer"
        return PEFT_WEIGHTS, f"{PREFIX}{path}{inner}.{factor.removesuffix('_experts')}.weight"
    return PEFT_WEIGHTS, PREFIX + name + (".weight" if name.endswith((".lora_A", ".lora_B")) else "")


def as_in_file(name: str, tensor: Tensor) -> Tensor:
    """The tensor as PEFT has it: [X·R, d_in] of experts' A [X, R, d_in], [d_out, R·X] of their B [X, d_out, R]."""
    if name.endswith(A_EXPERTS):
        return tensor.flatten(0, 1)
    return tensor.permute(1, 2, 0).flatten(1) if name.endswith(B_EXPERTS) else tensor


def from_file(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The reverse, for a tensor that is to have this shape."""
    if name.endswith(B_EXPERTS):
        X, d_out, R = shape
        return tensor.view(d_out, R, X).permute(2, 0, 1)
    return tensor.view(shape) if name.endswith(A_EXPERTS) else tensor


def spec_in_file(name: str, spec: Spec) -> Spec:
    """Shape and dtype of `as_in_file`."""
    shape, dtype = spec
    return as_in_file(name, torch.empty(shape, device="meta")).shape, dtype


def by_file(values: dict[str, T]) -> dict[str, dict[str, T]]:
    """Tensors by name, or anything else that each of them has: by file and by the key there."""
    files: dict[str, dict[str, T]] = {PEFT_WEIGHTS: {}, GATE: {}}
    for name, value in values.items():
        file, key = place_of(name)
        files[file][key] = value
    return files


def peft_config(model: Any, adapter: Adapter, alphas: dict[str, float] | None = None) -> dict[str, Any]:
    """PEFT's description of the LoRA: fields that every version since 0.6 knows.

    alphas: lora_alpha of each layer where it is not the adapter's own.
    """
    layers, config = unique_modules(adapter.layers), adapter.config
    updates: list[Any] = [*layers.values(), *adapter.expert_updates]
    own = {update.name: update.lora_alpha for update in updates}
    alpha, alphas = (config.lora_alpha, own) if alphas is None else (most_common(alphas), alphas)
    saved = list(unique_modules(adapter.saved))
    parameters = {"target_parameters": [update.name for update in adapter.expert_updates]} if adapter.experts else {}
    return {
        **parameters,
        "peft_type": "LORA",
        "task_type": _task(model, saved),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if adapter.experts else config.lora_dropout,  # PEFT has none for experts
        "target_modules": exact_targets(model, list(layers)),
        "modules_to_save": saved or None,
        "rank_pattern": patterns({update.name: update.r for update in updates}, config.r),
        "alpha_pattern": patterns(alphas, alpha),
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in layers.values()),
        "bias": "none",
    }


def patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The values that are not the default, by path, in an order in which the first key that ends a path is its own."""
    odd = {path for path, value in values.items() if value != default}
    shadowed = {path for path in values if not _endings(path).isdisjoint(odd)}
    keys = sorted(odd | shadowed, key=lambda path: (-path.count("."), path))
    return {re.sub(r"[\\()\[\]{}*+?|^$]", r"\\\g<0>", path): values[path] for path in keys}  # PEFT reads expressions


def most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _task(model: Any, saved: list[str]) -> str | None:
    # PEFT's classes for tasks call the model by these names; under none it passes on what it is given.
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    for ending, (task, heads) in _TASKS.items():
        if task.endswith("_LM") and not hasattr(model, "prepare_inputs_for_generation"):
            continue
        if type(model).__name__.endswith(ending):
            paths = [path for path, _ in model.named_modules() if path.endswith(heads)] if heads else []
            return task if all(path in saved for path in paths) else None
    return None


def exact_targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """target_modules that means these paths alone: the list, or a regular expression where one of them is the ending of
    another module's path."""
    others = {path for path, _ in model.named_modules(remove_duplicate=False)}.difference(paths)
    endings = {ending for path in others if not path.startswith("ilora_gate") for ending in _endings(path)}
    return paths if endings.isdisjoint(paths) else "|".join(map(re.escape, paths))


def _endings(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}
