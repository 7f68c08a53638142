"""Saving and loading adapters: a directory that PEFT can read as well, as the model under the uniform gate."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter, adapters, add, changeable, delete_adapter, injected, refuse_wrapped, set_adapter
from ..config import ILoRAConfig
from ..delivery import ILoRAModel
from ..model import eject, put
from ..networks import GATE_TYPES
from ..places import refresh
from .cards import ADAPTER
from .files import CONFIG, GATE, PEFT_CONFIG, PEFT_WEIGHTS, README, STATE, digest_of, to_json, write_directory
from .files import AdapterError as AdapterError
from .gathered import check_whole, taken, whole, writes
from .layout import GATE_PREFIX, Layout, fill, peft_config, peft_key, tensors_of
from .stored import Stored, find_directory, read_adapter

_PUSH = ("repo_id", "token", "private", "commit_message")
_IGNORED = {"max_shard_size", "variant", "save_peft_format", "save_original_format", "distributed_checkpoint"}
_IGNORED |= {"save_function", "use_auth_token"}


def save_adapter(
    model: Any, path: str | os.PathLike[str], *, name: str | None = None, is_main_process: bool | None = None
) -> Path:
    """Writes an adapter of the model to a directory, and returns its path.

    name: which of the model's adapters; None means the active one. Dtypes are kept. A new directory appears whole or
    not at all; in an existing one complete files take the places of the old, `ilora_config.json` last, whose checksums
    tell a mixture. PEFT reads the same directory: it computes the model under the uniform gate.
    is_main_process: False gathers what is sharded, with the other processes, and writes nothing. None means this one,
        and the first one alone where tensors are sharded (FSDP2); nobody waits for it to have written.
    Raises: ValueError for a model without iLoRA or without this adapter, AdapterError for a model of which this process
    has fragments (FSDP1: save_pretrained with the state_dict it gathers), NotADirectoryError, OSError, ImportError.
    """
    adapter = _adapter(model, name)
    tensors = tensors_of(adapter)
    if is_main_process is None:
        is_main_process = writes(tensors)
    tensors = whole(tensors)
    check_whole(adapter, tensors)
    return _write(model, path, adapter, tensors) if is_main_process else Path(path)


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """What transformers' models have under this name, and its Trainer calls: `save_adapter` of the active adapter, and
    in `model.safetensors` the same tensors by the model's own names, which is what the Trainer resumes from. There is
    no `config.json`, so that nothing can take the directory for a whole model.

    state_dict: take the tensors from here, by the model's own names (as FSDP and DeepSpeed gather them).
    is_main_process: others gather, and write nothing. push_to_hub: then `ilora.push_adapter`, to repo_id or the
    directory's name, with token, private and commit_message. Sizes of shards and the like are accepted and ignored.
    Raises: as `save_adapter`; TypeError for unknown arguments, ValueError for safe_serialization=False.
    """
    unknown = sorted(set(kwargs) - {*_PUSH, *_IGNORED, "safe_serialization"})
    if unknown:
        raise TypeError(f"save_pretrained: unexpected arguments {', '.join(unknown)}")
    if not kwargs.get("safe_serialization", True):
        raise ValueError("save_pretrained: safe_serialization=False asks for a pickle; adapters are safetensors files")
    adapter = _adapter(model, None)
    tensors = whole(tensors_of(adapter) if state_dict is None else taken(adapter, state_dict))
    if not is_main_process:
        return
    check_whole(adapter, tensors)
    _write(model, save_directory, adapter, tensors, state=tensors)
    if push_to_hub:
        from .hub import push_folder

        options = {key: kwargs[key] for key in _PUSH[1:] if key in kwargs}
        push_folder(save_directory, kwargs.get("repo_id") or Path(save_directory).name, **options)


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
    if isinstance(model, ILoRAModel):
        try:
            changeable(model, "load_adapter")
        except ValueError as error:
            raise AdapterError(str(error)) from None
    stored = read_adapter(find_directory(path, revision, token), verify)
    if isinstance(model, ILoRAModel) and name in adapters(model):
        return _overwrite(model, stored, name, gate)
    return _add(model, stored, name, gate)


def _add(model: Any, stored: Stored, name: str, gate: nn.Module | None) -> Any:
    gate = stored.check_new(model, gate)
    before = model.ilora.adapter.name if isinstance(model, ILoRAModel) else None
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
    adapter = _adapter(model, name)
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


def describe_gate(gate: nn.Module | None) -> dict[str, Any] | None:
    """A gate network's entry in the files: type and settings, or "custom" and its class."""
    if gate is None:
        return None
    kind = GATE_TYPES.get(type(gate).__name__)
    if kind is type(gate):
        return {"type": kind.__name__, **gate.settings()}
    return {"type": "custom", "class": f"{type(gate).__module__}.{type(gate).__qualname__}"}


def _adapter(model: Any, name: str | None) -> Adapter:
    injection = injected(model)
    refresh(model)
    found = injection.adapter if name in (None, injection.adapter.name) else injection.others.get(name)
    if found is None:
        raise ValueError(f"there is no adapter {name!r}; the model has {adapters(model)}")
    return found


def _write(
    model: Any,
    path: str | os.PathLike[str],
    adapter: Adapter,
    tensors: dict[str, Tensor],
    state: dict[str, Tensor] | None = None,
) -> Path:
    from .. import __version__

    layout = Layout.of(adapter)
    gate = {name: tensor for name, tensor in tensors.items() if name.startswith(GATE_PREFIX)}
    lora = {peft_key(name): tensor for name, tensor in tensors.items() if name not in gate}
    described = peft_config(model, layout)
    contents: dict[str, Any] = {PEFT_CONFIG: to_json(described), PEFT_WEIGHTS: lora}
    if adapter.gate is not None:
        contents[GATE] = {name.removeprefix(GATE_PREFIX): tensor for name, tensor in gate.items()}
    fields = {
        "format": 1,
        "ilora_version": __version__,
        "config": layout.config.to_dict(),
        "gate": describe_gate(adapter.gate),
    }
    read = tuple(contents)
    contents[README] = ADAPTER.format(
        experts=layout.config.num_experts,
        r=layout.config.r,
        base=described["base_model_name_or_path"] or "not recorded",
        gate=type(adapter.gate).__name__ if adapter.gate is not None else "none, every call is given its gate",
    )
    if state is not None:
        contents[STATE] = state

    def seal(sums: dict[str, str]) -> str:
        sealed = {**fields, "files": {name: sums[name] for name in read}}
        return to_json({**sealed, "digest": digest_of(sealed)})

    return write_directory(path, contents, (CONFIG, seal))
