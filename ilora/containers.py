"""nn.Sequential and its kin with a gate network among their children, which is none of those they run or list."""

from __future__ import annotations

from typing import Any

from torch import nn


def listing_of(base: type) -> dict[str, Any]:
    """For the class that `inject` makes of a container: the methods that say what is in it."""
    if issubclass(base, nn.ModuleDict):
        return {"__iter__": _keys, "keys": lambda self: _listed(self).keys(), "__len__": _length} | {
            "values": lambda self: _listed(self).values(),
            "items": lambda self: _listed(self).items(),
        }
    if issubclass(base, (nn.Sequential, nn.ModuleList)):
        return {"__iter__": _values, "__len__": _length, "__getitem__": _item}
    return {}


def _listed(container: Any) -> dict[str, nn.Module]:
    return {name: child for name, child in container._modules.items() if name != "ilora_gate"}


def _keys(container: Any) -> Any:
    return iter(_listed(container))


def _values(container: Any) -> Any:
    return iter(_listed(container).values())


def _length(container: Any) -> int:
    return len(_listed(container))


def _item(container: Any, index: Any) -> Any:
    children = list(_listed(container).values())
    if isinstance(index, slice):
        chosen = children[index]
        return nn.Sequential(*chosen) if isinstance(container, nn.Sequential) else nn.ModuleList(chosen)
    return children[index]
