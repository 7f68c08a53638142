"""Modules in the places of others: those that are trained whole, and the frozen ones that are kept meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base_layers import frozen_norms, home


def once(modules: dict[str, Any]) -> dict[str, Any]:
    """The modules by path, one that stands in several places by its first."""
    first = {id(module): path for path, module in reversed(modules.items())}
    return {path: modules[path] for path in modules if first[id(modules[path])] == path}


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Puts the module at the path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def refresh(model: Any) -> None:
    """Takes into the active adapter's record what others have put in the place of a module that is trained whole, as
    resize_token_embeddings does with a head."""
    saved, originals = model.ilora.adapter.saved, model.ilora.originals
    for path in saved:
        module = model.get_submodule(path)
        if module is not originals.get(path):  # as inside disable_adapter
            saved[path] = module


def keep_saved(model: Any) -> None:
    """Leaves the modules that are trained whole, and the weights that are tied no longer, to the plain model."""
    injection = model.ilora
    for module in injection.adapter.saved.values():
        module.requires_grad_(False)
    injection.originals, injection.tied = {}, {}


def refuse_resized(model: Any) -> None:
    """Raises ValueError where a module that is trained whole has other shapes than the frozen one."""
    for path, original in model.ilora.originals.items():
        before, now = _shapes(original), _shapes(model.get_submodule(path))
        if before != now:
            raise ValueError(
                f"eject: {path} was resized while it was trained whole, from {before} to {now}, and the frozen one was "
                "not: resize it back first"
            )


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in module.state_dict().items()}


def hold_statistics(model: Any) -> None:
    """Puts the frozen norms of an injected model that keep running statistics into eval mode, so that training changes
    nothing of the base. Those in what is trained whole, and the gate network's, stay in the mode they are in."""
    adapter = model.ilora.adapter
    whole = [*adapter.saved.values(), *([] if adapter.gate is None else [adapter.gate])]
    trained = {id(part) for module in whole for part in module.modules()}
    for norm in frozen_norms(model):
        norm.training = norm.training and id(norm) in trained


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The frozen model's, by its first parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), None)


def beside(
    module: nn.Module, other: nn.Module, before: torch.dtype | None = None, now: torch.dtype | None = None
) -> nn.Module:
    """The parked module, moved to where the other one is and into its mode: model.to() and model.train() do not reach
    it while it is out of the model. If the model was turned from one dtype to another meanwhile, so is what the module
    has of it."""
    for parameter in module.parameters() if before != now else ():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(now)
    return module.train(other.training).to(home(other))
