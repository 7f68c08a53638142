"""Loading a saved adapter into a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapter.config import ILoRAConfig
from ..adapter.record import Adapter, adapters, changeable, injected, is_injected, refuse_wrapped
from ..adapter.switch import add, delete_adapter, set_adapter
from ..storage.files import CONFIG, AdapterError
from ..storage.format import Layout, fill, tensors_of
from ..storage.read import Stored, find_directory, read_adapter
from ..storage.save import adapter_named, describe_gate
from .inject import eject, put


def load_adapter(
    model: Any,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    gate: nn.Module | None = None,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """Puts a saved adapter into the model, in place, and returns the model.

    Args:
        model: a plain model, which is injected with the settings on disk; or an injected one: if it has an adapter of
            this name, with the same settings, its values are overwritten in place (an optimizer keeps its parameters),
            else it gets one more. The adapter is the active one afterwards.
        path: the directory, or "owner/name" on the Hub where no such directory is (with revision and token).
        gate: the gate network, for a saved one of a class of your own; else it is built from its settings.
        verify: compare checksums. Names, shapes, dtypes and fields are checked in any case.
    Values are exact where the model's adapter has the dtype of the file; else they are rounded as `copy_` does, such as
    a float32 adapter into a bfloat16 model without adapter_dtype. A gate network built here has the file's dtype.
    Raises: AdapterError (a ValueError) for files that are missing, damaged, or do not fit the model or each other,
    ImportError. Everything is checked first: the model is then what it was before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    refuse_wrapped(model)
    if is_injected(model):
        try:
            changeable(model, "load_adapter")
        except ValueError as error:
            raise AdapterError(str(error)) from None
    stored = read_adapter(find_directory(path, revision, token), verify)
    if is_injected(model) and name in adapters(model):
        return _overwrite(model, stored, name, gate)
    return _add(model, stored, name, gate)


def _add(model: Any, stored: Stored, name: str, gate: nn.Module | None) -> Any:
    gate = stored.check_new(model, gate)
    before = model.ilora.adapter.name if is_injected(model) else None
    make: Callable[..., Any] = put if before is None else add
    try:
        make(model, config=stored.config, gate=gate, name=name)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{stored.directory / CONFIG}: does not fit {type(model).__name__}: {error}") from error
    try:
        fill(tensors_of(injected(model).adapter), stored.tensors)
    except BaseException:
        if before is None:
            eject(model)
        else:
            set_adapter(model, before)
            delete_adapter(model, name)
        raise
    if gate is not None:
        gate.train(model.training)  # a noisy gate in a model that is in eval mode would be a surprise
    return model


def _overwrite(model: Any, stored: Stored, name: str, gate: nn.Module | None) -> Any:
    adapter = adapter_named(model, name)
    if gate is not None:
        raise AdapterError(
            f"gate: the model's adapter {name!r} has its gate network; leave it out, or load as a new name"
        )
    differ = differences(adapter, stored.config, stored.gate)
    if differ:
        raise AdapterError(
            f"{stored.directory / CONFIG}: the model's adapter {name!r} has other settings: {'; '.join(differ)}; "
            "load it under a new name"
        )
    stored.check(model, Layout.of(adapter), adapter.gate)
    fill(tensors_of(adapter), stored.tensors)
    return set_adapter(model, name)


def differences(adapter: Adapter, config: ILoRAConfig, gate: dict[str, Any] | None) -> list[str]:
    """What of an adapter's settings is not as in these; the backend is the machine's affair."""
    own, other = adapter.config.to_dict(), config.to_dict()
    found = [
        f"{key} is {own[key]!r}, in the file {other[key]!r}"
        for key in own
        if _unordered(own[key]) != _unordered(other[key]) and key != "backend"
    ]
    mine, theirs = describe_gate(adapter.gate) or {}, gate or {}
    if mine.get("type") != theirs.get("type"):
        return [*found, f"the gate network's type is {mine.get('type')!r}, in the file {theirs.get('type')!r}"]
    custom = mine.get("type") == "custom"  # tensors tell whether they fit: classes move
    for key in () if custom else sorted({*mine, *theirs}):
        same = mine.get(key) == theirs.get(key) and isinstance(mine.get(key), bool) == isinstance(theirs.get(key), bool)
        if not (same and key in mine and key in theirs):
            found.append(f"the gate network's {key} is {mine.get(key)!r}, in the file {theirs.get(key)!r}")
    return found


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
