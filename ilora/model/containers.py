"""nn.Sequential and its kin with a gate network among their children, which is none of those they run or list."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


def listing_of(base: type) -> dict[str, Any]:
    """For the class that `inject` makes of a container: the methods that say what is in it, where they are torch's own;
    those that a class has of itself know what they list."""
    for kind, methods in _LISTING.items():
        if issubclass(base, kind):
            return {name: method for name, method in methods.items() if getattr(base, name) is getattr(kind, name)}
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
    children = _listed(container)
    if not isinstance(index, slice):
        return list(children.values())[index]
    chosen = list(children.items())[index]
    if isinstance(container, nn.Sequential):
        return nn.Sequential(OrderedDict(chosen))
    return nn.ModuleList(child for _, child in chosen)


def _set_item(container: Any, index: int, module: nn.Module) -> None:
    setattr(container, list(_listed(container))[index], module)


_LIST = {"__iter__": _values, "__len__": _length, "__getitem__": _item, "__setitem__": _set_item}
_LISTING: dict[type, dict[str, Any]] = {
    nn.ModuleDict: {
        "__iter__": _keys,
        "__len__": _length,
        "keys": lambda self: _listed(self).keys(),
        "values": lambda self: _listed(self).values(),
        "items": lambda self: _listed(self).items(),
    },
    nn.Sequential: _LIST,
    nn.ModuleList: _LIST,
}
