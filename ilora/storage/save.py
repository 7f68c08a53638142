"""Saving adapters: a directory that PEFT can read as well, as the model under the uniform gate."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter.record import Adapter, find_adapter
from ..gates.networks import GATE_TYPES
from .cards import ADAPTER
from .files import CONFIG, GATE, PEFT_CONFIG, PEFT_WEIGHTS, README, STATE, digest_of, to_json, write_directory
from .format import as_in_file, by_file, embedding_parameters, is_resized, peft_config, tensors_of, vocabulary_size
from .gather import gather_full_tensors, is_writer, refuse_fragments, select_from_state_dict
from .hub import MESSAGE, push_folder

# A field that PEFT does not know: it warns of it by name, and so does what loads adapters by PEFT (transformers,
# sentence-transformers). PEFT before 0.14 refuses it.
NOTICE = "an iLoRA adapter, of which PEFT loads no gate (all experts count alike): use ilora.load_adapter(model, path)"
_PUSH = ("repo_id", "token", "private", "commit_message")
_IGNORED = {"max_shard_size", "variant", "save_peft_format", "save_original_format", "distributed_checkpoint"}
_IGNORED |= {"save_function", "use_auth_token"}


def save_adapter(
    model: Any, path: str | os.PathLike[str], *, name: str | None = None, is_main_process: bool | None = None
) -> Path:
    """Writes an adapter of the model to a directory, and returns its path.

    name: which of the model's adapters; None means the active one. Dtypes are kept. A new directory appears whole or
    not at all; in an existing one complete files replace the old, `ilora_config.json` last: its checksums show if files
    of two saves are mixed. PEFT reads the same directory, and computes the model under the uniform gate. Where the
    vocabulary is not of the size that the base's checkpoint has, the frozen embeddings are saved too.
    is_main_process: False gathers what is sharded, with the other processes, and writes nothing. None means that this
        process writes, or, where tensors are sharded (FSDP2), the first of them; the others do not wait for it.
    Raises: ValueError for a model without iLoRA or without this adapter, AdapterError for a model of which this process
    has fragments (FSDP1: save_pretrained with the state_dict it gathers), NotADirectoryError, OSError, ImportError.
    """
    adapter = find_adapter(model, name)
    tensors = _tensors(model, adapter)
    if is_main_process is None:
        is_main_process = is_writer(tensors)
    tensors = gather_full_tensors(tensors)
    refuse_fragments(adapter, tensors)
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
    """The method of this name that transformers' models have and its Trainer calls. Saves the active adapter as
    `save_adapter` does, and its tensors by the model's own names in `model.safetensors`, from which the Trainer
    resumes. There is no `config.json`, so that nothing can take the directory for a whole model.

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
    adapter = find_adapter(model)
    tensors = _tensors(model, adapter)
    tensors = gather_full_tensors(tensors if state_dict is None else select_from_state_dict(tensors, state_dict))
    if not is_main_process:
        return
    refuse_fragments(adapter, tensors)
    _write(model, save_directory, adapter, tensors, state=tensors)
    if push_to_hub:
        options = {key: kwargs[key] for key in _PUSH[1:] if key in kwargs}
        push_folder(save_directory, kwargs.get("repo_id") or Path(save_directory).name, **options)


def push_adapter(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = MESSAGE,
    name: str | None = None,
) -> str:
    """Saves an adapter of the model to a repository of the Hub, made if there is none; returns the commit's address.

    repo_id: "owner/name". private: of a new repository; None means the owner's default. token: None means the one that
    `hf auth login` keeps. name: which adapter; None means the active one. Of the processes of a sharded model (FSDP2),
    which all call this, one pushes; the others return "".
    Raises: as `ilora.save_adapter`; huggingface_hub's errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = save_adapter(model, Path(folder) / "adapter", name=name)
        if not saved.exists():  # of a sharded model, which another process writes
            return ""
        return push_folder(saved, repo_id, private=private, token=token, commit_message=commit_message)


def describe_gate(gate: nn.Module | None) -> dict[str, Any] | None:
    """A gate network's entry in the files: type and settings, or "custom" and its class."""
    if gate is None:
        return None
    kind = GATE_TYPES.get(type(gate).__name__)
    if kind is type(gate):
        return {"type": kind.__name__, **gate.settings()}
    return {"type": "custom", "class": f"{type(gate).__module__}.{type(gate).__qualname__}"}


def _tensors(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """What is to be saved: the adapter's tensors, and the embeddings of a model whose vocabulary was resized."""
    return tensors_of(adapter) | (embedding_parameters(model, adapter) if is_resized(model) else {})


def _write(
    model: Any,
    path: str | os.PathLike[str],
    adapter: Adapter,
    tensors: dict[str, Tensor],
    state: dict[str, Tensor] | None = None,
) -> Path:
    """state: the tensors by the model's own names, for a file of their own."""
    from .. import __version__

    files = by_file({name: as_in_file(name, tensor) for name, tensor in tensors.items()})
    config, described = adapter.config, peft_config(model, adapter)
    contents: dict[str, Any] = {PEFT_CONFIG: to_json({**described, NOTICE: None}), PEFT_WEIGHTS: files[PEFT_WEIGHTS]}
    if adapter.gate is not None:
        contents[GATE] = files[GATE]
    fields = {
        "format": 1,
        "ilora_version": __version__,
        "config": config.to_dict(),
        "gate": describe_gate(adapter.gate),
    }
    if (rows := vocabulary_size(model)) is not None:
        own = tensors_of(adapter)
        fields["vocabulary"] = {"rows": rows, "embeddings": [name for name in tensors if name not in own]}
    checked = tuple(contents)
    contents[README] = ADAPTER.format(
        experts=config.num_experts,
        r=config.r,
        base=described["base_model_name_or_path"] or "not recorded",
        gate=type(adapter.gate).__name__ if adapter.gate is not None else "none, every call is given its gate",
    )
    if state is not None:
        contents[STATE] = state

    def settings(sums: dict[str, str]) -> str:
        digested = {**fields, "files": {name: sums[name] for name in checked}}
        return to_json({**digested, "digest": digest_of(digested)})

    return write_directory(path, contents, (CONFIG, settings))
