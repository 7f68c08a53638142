"""Loading a saved adapter into a model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..adapter.config import ILoRAConfig
from ..adapter.record import Adapter, Injection, adapters, changeable, find_adapter, is_injected
from ..adapter.switch import activate, build
from ..storage.files import CONFIG, AdapterError
from ..storage.format import fill, tensors_of
from ..storage.read import UNFIT, SavedAdapter, find_directory, read_adapter
from ..storage.save import describe_gate
from .inject import install, refuse_model


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
    """Loads a saved adapter into the model, in place, and makes it the active one; returns the model.

    Args:
        model: a plain model, which is injected with the saved settings; or an injected one. If that has an adapter of
            this name and the same settings, its values are overwritten in place (an optimizer keeps its parameters);
            else the adapter is added.
        path: the directory; or, if there is none of this name, "owner/name" on the Hub, with revision and token.
        gate: the gate network, if a network of your own class was saved; others are built from their settings.
        verify: compare checksums. Names, shapes, dtypes and settings are always checked.
    Where the model's adapter has another dtype than the file, values are rounded as by `copy_`, such as a float32
    adapter in a bfloat16 model without adapter_dtype. A gate network that is built here has the file's dtype.
    Saved embeddings (of a base whose vocabulary was resized) replace the model's own values; `eject` leaves them.
    Raises: AdapterError (a ValueError) for files that are missing, damaged, or do not fit the model or each other;
    TypeError, ImportError. Everything is checked first, so the model is then what it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    try:
        changeable(model, "load_adapter") if is_injected(model) else refuse_model(model)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    saved = read_adapter(find_directory(path, revision, token), verify)
    there = is_injected(model) and name in adapters(model)
    if there and gate is not None:
        raise AdapterError(
            f"gate: the model's adapter {name!r} has its gate network; leave it out, or load as a new name"
        )
    adapter = find_adapter(model, name) if there else _build(model, saved, name, gate)
    differ = differences(adapter, saved.config, saved.gate)
    if differ:
        whose = f"the model's adapter {name!r}" if there else "the adapter in this model"
        raise AdapterError(
            f"{saved.directory / CONFIG}: {whose} has other settings: {'; '.join(differ)}"
            + ("; load it under a new name" if there else "")
        )
    embeddings = saved.embeddings_in(model, adapter)
    values = saved.values_for(adapter, embeddings)
    others = is_injected(model) and set(adapters(model)) != {name}
    if others and not all(torch.equal(values[key].to(t), t) for key, t in embeddings.items()):
        raise AdapterError(
            f"{saved.directory}: it was saved with embeddings, since the vocabulary had been resized, and the model's, "
            "which its other adapters use too, are not the same: load it into a model of its own"
        )
    fill(tensors_of(adapter) | embeddings, values)
    return activate(model, adapter) if is_injected(model) else install(model, Injection(adapter))


def _build(model: Any, saved: SavedAdapter, name: str, gate: nn.Module | None) -> Adapter:
    """An adapter of this model with the saved settings and a gate network, not in the model yet."""
    file = saved.directory / CONFIG
    if gate is not None and saved.gate is None:
        raise AdapterError(f"{file}: gate: the adapter was saved without a gate network, but gate= is given")
    gate = saved.new_gate() if gate is None else gate
    try:
        return build(model, name, saved.config, gate, experts=saved.has_experts)
    except UNFIT as error:
        raise AdapterError(f"{file}: does not fit {type(model).__name__}: {error}") from error


def differences(adapter: Adapter, config: ILoRAConfig, gate: dict[str, Any] | None) -> list[str]:
    """The adapter's settings that differ from these, one sentence each. The backend may differ: it belongs to the
    machine."""
    own, other = adapter.config.to_dict(), config.to_dict()
    found = [
        f"{key} is {own[key]!r}, in the file {other[key]!r}"
        for key in own
        if _unordered(own[key]) != _unordered(other[key]) and key != "backend"
    ]
    mine, theirs = describe_gate(adapter.gate) or {}, gate or {}
    if mine.get("type") != theirs.get("type"):
        return [*found, f"the gate network's type is {mine.get('type')!r}, in the file {theirs.get('type')!r}"]
    custom = mine.get("type") == "custom"  # its class may have moved to another module; its tensors are checked
    for key in () if custom else sorted({*mine, *theirs}):
        if key not in mine or key not in theirs or mine[key] != theirs[key]:
            found.append(f"the gate network's {key} is {mine.get(key)!r}, in the file {theirs.get(key)!r}")
    return found


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
