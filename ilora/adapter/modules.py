"""Finding and replacing modules of a model; the modules trained whole, and the frozen ones kept meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base_layers import compute_device, frozen_norms


def unique_modules(modules: dict[str, Any]) -> dict[str, Any]:
    """The modules by path, each once: a module that stands in several places by its first path."""
    first = {id(module): path for path, module in reversed(modules.items())}
    return {path: modules[path] for path in modules if first[id(modules[path])] == path}


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Puts the module at the path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def keep_trained_modules(model: Any) -> None:
    """Makes the modules trained whole part of the plain model, so that `detach` leaves them there."""
    injection = model.ilora
    for module in injection.adapter.saved.values():
        module.requires_grad_(False)
    injection.originals, injection.tied = {}, {}


def refuse_resized(model: Any) -> None:
    """Raises ValueError where a module trained whole has other shapes than the frozen module that it replaced."""
    for path, original in model.ilora.originals.items():
        modules = (original, model.get_submodule(path))
        before, now = ({key: list(t.shape) for key, t in module.state_dict().items()} for module in modules)
        if before != now:
            raise ValueError(
                f"eject: {path} was resized while it was trained whole, from {before} to {now}, and the frozen one was "
                "not: resize it back first"
            )


def freeze_statistics(model: Any) -> None:
    """Puts frozen norms with running statistics into eval mode, so that training does not change the frozen model.
    Norms in modules trained whole and in the gate network keep their mode."""
    adapter = model.ilora.adapter
    trained = [*adapter.saved.values(), *([] if adapter.gate is None else [adapter.gate])]
    own = {id(part) for module in trained for part in module.modules()}
    for norm in frozen_norms(model):
        norm.training = norm.training and id(norm) in own


def embeddings(model: Any, kind: str = "input") -> nn.Module | None:
    """The model's input or output embeddings; None where it does not say which they are. Many of transformers' models
    for images and sounds raise NotImplementedError."""
    try:
        found = getattr(model, f"get_{kind}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The frozen model's dtype: that of its first frozen float parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), None)


def match_device_and_mode(
    module: nn.Module, other: nn.Module, before: torch.dtype | None = None, now: torch.dtype | None = None
) -> nn.Module:
    """Moves a module that was not in the model, so that model.to() and model.train() did not reach it, to the device
    and the mode of `other`, which stands in its place. Parameters that had the model's dtype `before` get its dtype
    `now`."""
    for parameter in module.parameters() if before != now else ():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(now)
    return module.train(other.training).to(compute_device(other))
