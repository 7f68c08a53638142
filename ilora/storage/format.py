"""What an adapter's files hold: its tensors by name, and how PEFT describes it.

A tensor's name is the one it has in the injected model: `<path>.lora_A`, `<path>.lora_B`, `<path of a saved
module>.<key>` and `ilora_gate.<key>`. PEFT's file has the first three with a prefix, and `.weight` after the LoRA ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..adapter.modules import once
from ..adapter.record import Adapter, is_injected
from ..adapter.switch import attach, detach
from ..adapter.targets import block_of, find_targets, layer_settings
from ..adapter.task_heads import modules_to_save
from ..base_layers import adapted, features_of, is_conv1d
from .files import AdapterError

PREFIX, GATE_PREFIX = "base_model.model.", "ilora_gate."
Spec = tuple[torch.Size, torch.dtype]
# PEFT trains these heads by itself for the task: without them in the files it would miss them.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


@dataclass(frozen=True)
class Shape:
    """Of one layer: its rank, experts and alpha, and the frozen layer's features."""

    r: int
    num_experts: int
    lora_alpha: float
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Layout:
    """layers, saved (the modules trained whole): by first path, in the model's order. blocks: how many have a gate."""

    config: ILoRAConfig
    layers: dict[str, Shape]
    saved: dict[str, nn.Module]
    blocks: int
    conv1d: bool

    @classmethod
    def of(cls, adapter: Adapter) -> Layout:
        """Of an adapter that is there."""
        layers = {layer.name: layer for layer in adapter.layers.values()}
        shapes = {
            path: Shape(layer.r, layer.num_experts, layer.lora_alpha, layer.in_features, layer.out_features)
            for path, layer in layers.items()
        }
        conv1d = any(is_conv1d(layer.base_layer) for layer in layers.values())
        return cls(adapter.config, shapes, once(adapter.saved), len(adapter.blocks), conv1d)

    @classmethod
    def planned(cls, model: Any, config: ILoRAConfig) -> Layout:
        """Of the adapter that this config would make in the model, which is left alone and nothing is allocated.
        Raises ValueError, TypeError where the config does not fit the model."""
        with _bare(model):
            paths = find_targets(model, config)
            bases = {path: model.get_submodule(path) for path in paths}
            saved = once({path: model.get_submodule(path) for path in modules_to_save(model, config, paths)})
        first = {id(base): path for path, base in reversed(bases.items())}
        shapes = {
            path: Shape(
                **layer_settings(config, path), **dict(zip(("d_in", "d_out"), features_of(bases[path]), strict=True))
            )
            for path in paths
            if first[id(bases[path])] == path
        }
        blocks = len({block_of(path) for path in paths})
        return cls(config, shapes, saved, blocks, any(map(is_conv1d, bases.values())))

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor but the gate network's, by name."""
        specs: dict[str, Spec] = {}
        for path, layer in self.layers.items():
            specs[f"{path}.lora_A"] = torch.Size((layer.r, layer.d_in)), torch.float32
            specs[f"{path}.lora_B"] = torch.Size((layer.d_out, layer.r)), torch.float32
        for path, module in self.saved.items():
            specs |= {f"{path}.{key}": spec for key, spec in specs_of(module).items()}
        return specs


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """The model with the adapter that is in it out of the way."""
    adapter = model.ilora.adapter if is_injected(model) else None
    if adapter is not None:
        detach(model)
    try:
        yield
    finally:
        if adapter is not None:
            attach(model, adapter)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers. Raises TypeError for extra state that is no tensor."""
    state = module.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{type(module).__name__}: {key!r} of its state is a {type(value).__name__}, not a tensor")
    return dict(state)


def specs_of(module: nn.Module) -> dict[str, Spec]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in state_of(module).items()}


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of the adapter by name; they are the adapter's own."""
    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers.values():
        tensors[f"{layer.name}.lora_A"], tensors[f"{layer.name}.lora_B"] = layer.lora_A, layer.lora_B
    for path, module in once(adapter.saved).items():
        tensors |= {f"{path}.{key}": value for key, value in state_of(module).items()}
    if adapter.gate is not None:
        tensors |= {GATE_PREFIX + key: value for key, value in state_of(adapter.gate).items()}
    return tensors


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


def peft_key(name: str) -> str:
    """How PEFT's file calls the tensor."""
    return PREFIX + name + (".weight" if name.endswith((".lora_A", ".lora_B")) else "")


def peft_config(model: Any, layout: Layout, alphas: dict[str, float] | None = None) -> dict[str, Any]:
    """PEFT's description of the LoRA: fields that every version since 0.6 knows.

    alphas: lora_alpha of each layer where it is not the layout's own.
    """
    own = {path: layer.lora_alpha for path, layer in layout.layers.items()}
    alphas = own if alphas is None else alphas
    alpha = layout.config.lora_alpha if alphas is own else most_common(alphas)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": _task(model, layout),
        "base_model_name_or_path": name or None,
        "inference_mode": True,
        "r": layout.config.r,
        "lora_alpha": alpha,
        "lora_dropout": layout.config.lora_dropout,
        "target_modules": exactly(model, list(layout.layers)),
        "modules_to_save": list(layout.saved) or None,
        "rank_pattern": patterns({path: layer.r for path, layer in layout.layers.items()}, layout.config.r),
        "alpha_pattern": patterns(alphas, alpha),
        "fan_in_fan_out": layout.conv1d,
        "bias": "none",
    }


def patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The values that are not the default by path, so that the first key that is a path's ending is its own."""
    odd = {path for path, value in values.items() if value != default}
    shadowed = {path for path in values if not _endings(path).isdisjoint(odd)}
    keys = sorted(odd | shadowed, key=lambda path: (-path.count("."), path))
    return {
        re.sub(r"[\\()\[\]{}*+?|^$]", r"\\\g<0>", path): values[path] for path in keys
    }  # PEFT takes them for regexes


def most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _task(model: Any, layout: Layout) -> str | None:
    # PEFT's classes for tasks call the model by these names; under none it passes on what it is given.
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    for ending, (task, heads) in _TASKS.items():
        if task.endswith("_LM") and not hasattr(model, "prepare_inputs_for_generation"):
            continue
        if type(model).__name__.endswith(ending):
            paths = [path for path, _ in model.named_modules() if path.endswith(heads)] if heads else []
            return task if all(path in layout.saved for path in paths) else None
    return None


def exactly(model: nn.Module, paths: list[str]) -> list[str] | str:
    """target_modules that means these paths alone: the list, or a regular expression where one of them is the ending of
    another module's path."""
    endings = {tail for path in set(_plain_paths(model)).difference(paths) for tail in _endings(path)}
    ambiguous = not endings.isdisjoint(paths)
    return "|".join(map(re.escape, paths)) if ambiguous else paths


def _plain_paths(module: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all modules, as they are without an adapter in the model."""
    for name, child in module._modules.items():
        if child is None or (name == "ilora_gate" and is_injected(module)):
            continue
        yield prefix + name
        yield from _plain_paths(child.base_layer if adapted(child) else child, f"{prefix}{name}.")


def _endings(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}
