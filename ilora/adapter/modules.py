"""Modules that take the places of others: those trained whole, and the frozen ones that are kept meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base_layers import compute_device, frozen_norms


def unique_modules(modules: dict[str, Any]) -> dict[str, Any]:
    """The modules by path, one that stands in several places only by its first."""
    first = {id(module): path for path, module in reversed(modules.items())}
    return {path: modules[path] for path in modules if first[id(modules[path])] == path}


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Puts the module at the path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def keep_trained_modules(model: Any) -> None:
    """Leaves the modules trained whole, and the weights that are tied no longer, to the plain model."""
    injection = model.ilora
    for module in injection.adapter.saved.values():
        module.requires_grad_(False)
    injection.originals, injection.tied = {}, {}


def refuse_resized(model: Any) -> None:
    """Raises ValueError where a module trained whole has other shapes than the frozen one."""
    for path, original in model.ilora.originals.items():
        modules = (original, model.get_submodule(path))
        before, now = ({key: list(t.shape) for key, t in module.state_dict().items()} for module in modules)
        if before != now:
            raise ValueError(
                f"eject: {path} was resized while it was trained whole, from {before} to {now}, and the frozen one was "
                "not: resize it back first"
            )


def freeze_statistics(model: Any) -> None:
    """Puts the frozen norms of an injected model that keep running statistics into eval mode, so that training changes
    nothing of the base. Those in modules trained whole and in the gate network stay in the mode they are in."""
    adapter = model.ilora.adapter
    trained = [*adapter.saved.values(), *([] if adapter.gate is None else [adapter.gate])]
    own = {id(part) for module in trained for part in module.modules()}
    for norm in frozen_norms(model):
        norm.training = norm.training and id(norm) in own


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's, or None where it does not say which they are (transformers raises NotImplementedError there)."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The frozen model's, by its first frozen parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), None)


def match_device_and_mode(
    module: nn.Module, other: nn.Module, before: torch.dtype | None = None, now: torch.dtype | None = None
) -> nn.Module:
    """Brings a module that was out of the model to the device and the mode of the one in its place, since model.to()
    and model.train() did not reach it. Its parameters of dtype `before`, the model's then, become `now`, its dtype now.
    """
    for parameter in module.parameters() if before != now else ():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(now)
    return module.train(other.training).to(compute_device(other))
