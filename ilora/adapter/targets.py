"""Finds the modules that an ILoRAConfig names in a model, and refuses names that are not there."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base_layers import adapter_like, features_of, is_conv1d, is_linear
from ..grouped.experts import projections_of
from .config import ALL_LINEAR, PATTERNS, ILoRAConfig
from .modules import embeddings


def ends(path: str, name: str) -> bool:
    """Whether the path ends in the name, or equals what follows a ^."""
    return path == name.removeprefix("^") or path.endswith("." + name)


def named(path: str, names: str | Iterable[str]) -> bool:
    """Whether the path matches: a string is a regular expression for the whole path, others are path endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(ends(path, name) for name in names)


def one_by_one(names: str | tuple[str, ...]) -> list[str | tuple[str, ...]]:
    """Each of the names by itself, as `named` takes it."""
    return [names] if isinstance(names, str) else [(name,) for name in names]


def _has_pattern(path: str, key: str) -> bool:
    return ends(path, key) or re.fullmatch(rf"(.*\.)?({key})", path) is not None


def block_of(path: str) -> str:
    """The block that a module belongs to, such as "model.layers.3": its path up to the first number, "" without one."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return match.group() if match else ""


def index_of(path: str) -> int | None:
    """The number of the module's block."""
    block = block_of(path)
    return int(block.rsplit(".", 1)[-1]) if block else None


def layer_settings(config: ILoRAConfig, path: str) -> dict[str, Any]:
    """r, num_experts and lora_alpha of the module at this path, from the first key of each pattern that matches it.
    Raises ValueError where they do not fit each other."""
    settings: dict[str, Any] = {"r": config.r, "num_experts": config.num_experts, "lora_alpha": config.lora_alpha}
    patterns = (config.rank_pattern, config.expert_pattern, config.alpha_pattern)
    for name, pattern in zip(settings, patterns, strict=True):
        own = (value for key, value in (pattern or {}).items() if _has_pattern(path, key))
        settings[name] = next(own, settings[name])
    r, experts = settings["r"], settings["num_experts"]
    if config.num_experts % experts or r % experts:
        raise ValueError(
            f"{path}: r={r} and num_experts={experts} from the patterns; the experts must divide r, and "
            f"the config's num_experts={config.num_experts}"
        )
    return settings


def find_targets(model: nn.Module, config: ILoRAConfig, left_out: dict[str, str] | None = None) -> list[str]:
    """The paths of the linear layers to adapt, in the model's order.

    left_out: receives the linear layers that "all-linear" leaves out, because they compute something else, and why.
    Raises ValueError where a module that is named cannot take an adapter, and where nothing matches. The model itself
    is never one: there is nowhere to put another module in its place. Fused experts are left to `find_experts`."""
    head = embeddings(model, "output")
    everything = config.target_modules == ALL_LINEAR
    targets: list[str] = []
    reasons: dict[Any, str | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not _considered(path, config) or projections_of(module):
            continue
        wanted = is_linear(module) and module is not head if everything else named(path, config.target_modules)
        if wanted and targets and path.startswith(targets[-1] + "."):
            continue  # a part of a layer that is adapted as a whole
        if not wanted:
            continue
        _refuse_unfit(model, path, module)
        kind = type(module), *((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, str)))
        if kind not in reasons:  # layers of one class and sizes are alike
            reasons[kind] = why_no_update(module)
        reason = reasons[kind]
        if reason is None:
            targets.append(path)
        elif not everything:
            raise ValueError(f"{path}: target_modules matches it, but {reason}; leave it out")
        elif left_out is not None:
            left_out[path] = reason
    if not targets and not find_experts(model, config):
        raise ValueError(_nothing_matched(model, config))
    return targets


def why_no_update(module: nn.Module) -> str | None:
    """Why no update can be added to the output of a linear layer that has a forward of its own; None where one can.
    Tried with zeros, and not where the weights are quantised: those kernels may not run here."""
    tensors = [*module.parameters(), *module.buffers()]
    plain = all(t.is_floating_point() and t.itemsize > 1 and type(t) in (Tensor, nn.Parameter) for t in tensors)
    if type(module).forward is nn.Linear.forward or is_conv1d(module) or not plain:
        return None
    trial = copy.copy(module)  # whose attributes are its own, while its tensors are the module's
    trial.__dict__ = {name: dict(value) if type(value) is dict else value for name, value in vars(module).items()}
    trial.training = False
    d_in, d_out = features_of(module)
    x = adapter_like(module, None).new_zeros(1, 7, d_in)
    found = ""
    for rows in (x, x[0]):
        try:
            with torch.no_grad():
                y = type(module).forward(trial, rows)
        except Exception as error:  # whatever a forward of somebody else's raises; the refusal names it
            found = found or f"raises {type(error).__name__} for an input {list(x.shape)}"
            continue
        if isinstance(y, Tensor) and y.shape == (*rows.shape[:-1], d_out):
            return None
        found = f"returns {list(y.shape) if isinstance(y, Tensor) else type(y).__name__} for {list(rows.shape)}"
    return f"{type(module).__name__} computes something else than a product of its input with d_out={d_out}: it {found}"


def find_experts(model: nn.Module, config: ILoRAConfig) -> dict[str, tuple[str, ...]]:
    """The paths of the fused experts to adapt, in the model's order, and the names of their two tensors.
    "all-linear" means them; else target_modules names the module, as "experts" does."""
    everything = config.target_modules == ALL_LINEAR
    return {
        path: projections_of(module)
        for path, module in model.named_modules()
        if projections_of(module) and _considered(path, config) and (everything or named(path, config.target_modules))
    }


def _considered(path: str, config: ILoRAConfig) -> bool:
    """Whether the configuration leaves it to target_modules what becomes of the module at this path."""
    if not path or (config.layers_to_transform is not None and index_of(path) not in config.layers_to_transform):
        return False
    parts = path.split(".")
    inside = any(named(".".join(parts[: i + 1]), config.modules_to_save) for i in range(len(parts)))
    return not inside and not named(path, config.exclude_modules)


def _refuse_unfit(model: nn.Module, path: str, module: nn.Module) -> None:
    if not is_linear(module):
        raise ValueError(
            f"{path}: target_modules matches this {type(module).__name__}, which is no linear layer; "
            "make the name longer, or list it in exclude_modules"
        )
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
        raise ValueError(f"{path}: nn.MultiheadAttention reads this weight without calling the layer; exclude it")
    if re.search(r"(^|\.)experts\.\w*\d+(\.|$)", path):
        raise ValueError(
            f"{path}: an expert of a sparse mixture sees a routed part of the rows, so a gate for each instance cannot "
            r"be mapped to them; leave the experts out, e.g. exclude_modules=r'.*\.experts\..*'"
        )


def _nothing_matched(model: nn.Module, config: ILoRAConfig) -> str:
    kind, blocks, targets = type(model).__name__, config.layers_to_transform, config.target_modules
    if is_linear(model) and not _linear(model):
        return (
            f"model: this {kind} is a linear layer itself, which has no place to be replaced in; wrap it: "
            "layer = ilora.ILoRALinear(linear, r=8, num_experts=4), then layer(x, gate=g)"
        )
    text = (
        f"no module of {kind} matches target_modules={targets!r} with exclude_modules={config.exclude_modules!r}, "
        f"layers_to_transform={blocks}; {_endings(model)}"
    )
    if config.modules_to_save:
        text += f"; trained whole instead: {', '.join(config.modules_to_save)} (exclude_modules leaves them out)"
    if blocks is not None:
        text += f"; {_blocks(model)}"
    if isinstance(targets, str) and targets != ALL_LINEAR:
        text += (
            "; a string is one regular expression for a module's whole path: give a list for path endings, such as "
            f'["q_proj"], or "{ALL_LINEAR}"'
        )
    return text


def refuse_unmatched(model: nn.Module, config: ILoRAConfig, targets: list[str]) -> None:
    """Raises ValueError for a name that matches no module of the model, a pattern that matches none of the targets, and
    a block that is not there. A misspelt one would otherwise do nothing."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    for field in ("target_modules", "exclude_modules"):
        names = [name for name in one_by_one(getattr(config, field)) if name not in ("", ALL_LINEAR)]
        lost = [name for name in names if not any(named(path, name) for path in paths)]
        if lost:
            shown = ", ".join(repr(name if isinstance(name, str) else name[0]) for name in lost)
            raise ValueError(f"{field}: no module of {type(model).__name__} matches {shown}; {_endings(model)}")
    present = {index_of(path) for path in _linear(model)}
    absent = [str(index) for index in config.layers_to_transform or () if index not in present]
    if absent:
        raise ValueError(f"layers_to_transform: there is no block {', '.join(absent)}; {_blocks(model)}")
    for field in PATTERNS:
        keys = [key for key in getattr(config, field) or {} if not any(_has_pattern(path, key) for path in targets)]
        if keys:
            raise ValueError(
                f"{field}: {', '.join(map(repr, keys))} matches none of the adapted layers, which end in "
                f"{', '.join(_last_names(targets))}"
            )


def _linear(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if path and is_linear(module)]


def _last_names(paths: Iterable[str]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _endings(model: nn.Module) -> str:
    return f"its linear layers end in {', '.join(_last_names(_linear(model))) or 'nothing: it has none'}"


def _blocks(model: nn.Module) -> str:
    found = sorted({index for index in map(index_of, _linear(model)) if index is not None})
    run = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
    shown = f"{found[0]} to {found[-1]}" if run else ", ".join(map(str, found))
    return f"its blocks are {shown}" if found else "it has no blocks"
