"""Reads and checks the files of an adapter; nothing here changes a model.

`ilora_config.json` describes the adapter: its config, its gate network's settings and the other files' checksums.
`adapter_config.json` says the same to PEFT; only its checksum is looked at.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..adapter.record import Adapter
from ..gates.networks import gate_from_settings
from .files import (
    CONFIG,
    GATE,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    AdapterError,
    check_tensors,
    checksum,
    digest_of,
    read_json,
    read_tensors,
)
from .format import (
    by_file,
    embedding_parameters,
    from_file,
    place_of,
    spec_in_file,
    specs_of,
    state_of,
    vocabulary_size,
)
from .hub import download

_FIELDS: dict[str, tuple[type, ...]] = {"format": (int,), "ilora_version": (str,), "digest": (str,)}
_FIELDS |= {"config": (dict,), "gate": (dict, type(None)), "files": (dict,), "vocabulary": (dict,)}
_LATER = {"vocabulary"}  # fields that files of earlier versions have not
UNFIT = (TypeError, ValueError, OverflowError, RecursionError)  # what settings from a file may raise


@dataclass
class SavedAdapter:
    """What the files of a directory say. gate: the gate network's settings; files: the tensors of each file by key.
    rows: of the base's input embeddings, None where it is not said; embeddings: the names of those that are saved."""

    directory: Path
    config: ILoRAConfig
    gate: dict[str, Any] | None
    files: dict[str, dict[str, Tensor]]
    rows: int | None
    embeddings: tuple[str, ...]

    @property
    def has_experts(self) -> bool:
        """Whether it adapts fused experts. Version 0.1.0 did not, where the same configuration now means them too."""
        return any(".base_layer.lora_A." in key for key in self.files[PEFT_WEIGHTS])

    def embeddings_in(self, model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
        """The model's embeddings of which the files hold values, by name. Raises AdapterError where its vocabulary has
        another size, or its embeddings are tied otherwise."""
        file, own = self.directory / CONFIG, vocabulary_size(model)
        if None not in (self.rows, own) and own != self.rows:
            raise AdapterError(
                f"{file}: vocabulary: the adapter was saved with a base of {self.rows} embeddings, this one has {own}; "
                f"model.resize_token_embeddings({self.rows}) before loading, and add further tokens afterwards"
            )
        found = embedding_parameters(model, adapter) if self.embeddings else {}
        if found.keys() != set(self.embeddings):
            expected, got = (", ".join(map(repr, names)) or "none" for names in (self.embeddings, found))
            raise AdapterError(f"{file}: vocabulary: expected embeddings {expected}, the model has {got}")
        return found

    def values_for(self, adapter: Adapter, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """The saved values of the adapter's tensors and of these embeddings, by name. Raises AdapterError unless the
        files hold exactly these tensors, in their shapes."""
        specs = specs_of(adapter) | {name: (tensor.shape, tensor.dtype) for name, tensor in embeddings.items()}
        for file, expected in by_file({name: spec_in_file(name, spec) for name, spec in specs.items()}).items():
            check_tensors(self.directory / file, self.files[file], expected)
        places = {name: place_of(name) for name in specs}
        return {name: from_file(name, self.files[file][key], specs[name][0]) for name, (file, key) in places.items()}

    def new_gate(self) -> nn.Module | None:
        """The saved gate network with its values. Raises AdapterError where its class is not one of ours."""
        file = self.directory / CONFIG
        if self.gate is None:
            return None
        if self.gate.get("type") == "custom":
            raise AdapterError(
                f"{file}: gate: the gate network is a {self.gate['class']}; build it and give it as gate="
            )
        try:
            with torch.device("meta"):  # settings that ask for too much must not get it
                network = gate_from_settings(self.gate)
        except (*UNFIT, RuntimeError) as error:
            raise AdapterError(f"{file}: gate: {error}") from error
        expected = {key: (tensor.shape, tensor.dtype) for key, tensor in state_of(network).items()}
        check_tensors(self.directory / GATE, self.files[GATE], expected)
        network.load_state_dict({key: value.clone() for key, value in self.files[GATE].items()}, assign=True)
        return network


def find_directory(path: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """The directory, downloaded if it is none and has the form "owner/name". Raises AdapterError."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise AdapterError(f"{directory}: expected the directory of an adapter, got a file")
    if not (isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)):
        raise AdapterError(f"{directory}: there is no such directory")
    return download(path, revision=revision, token=token)


def read_adapter(directory: Path, verify: bool = True) -> SavedAdapter:
    """The files of an adapter, each right by itself. Raises AdapterError.

    verify: compare the checksums."""
    file = directory / CONFIG
    if not file.exists() and (directory / PEFT_CONFIG).exists():
        raise AdapterError(
            f"{file} is missing: this is a PEFT adapter; ilora.from_peft(path, num_experts, model=model)"
        )
    fields = read_json(file)
    if fields.get("format") != 1:
        raise AdapterError(f"{file}: field 'format': expected 1, got {fields.get('format')!r}")
    for key in {*_FIELDS, *fields}:
        if key in _LATER and key not in fields:
            continue
        if key not in _FIELDS or key not in fields:
            raise AdapterError(f"{file}: field {key!r} is {'unexpected' if key in fields else 'missing'}")
        if not isinstance(fields[key], _FIELDS[key]) or isinstance(fields[key], bool):
            wanted = " or ".join(kind.__name__ for kind in _FIELDS[key])
            raise AdapterError(f"{file}: field {key!r}: expected {wanted}, got {fields[key]!r}")
    digest = digest_of({key: value for key, value in fields.items() if key != "digest"})
    if verify and digest != fields["digest"]:
        raise AdapterError(f"{file}: field 'digest': expected {digest}, got {fields['digest']}: it was changed")
    names = {PEFT_CONFIG, PEFT_WEIGHTS} | ({GATE} if fields["gate"] is not None else set())
    _check_sums(directory, fields["files"], names, verify)
    config, gate = _config(file, fields["config"]), fields["gate"]
    if gate is not None and gate.get("type") == "custom" and not isinstance(gate.get("class"), str):
        raise AdapterError(f"{file}: gate: expected its type and class, got {gate!r}")
    files = {name: read_tensors(directory / name) if name in names else {} for name in (PEFT_WEIGHTS, GATE)}
    return SavedAdapter(directory, config, gate, files, *_vocabulary(file, fields.get("vocabulary")))


def _vocabulary(file: Path, value: dict[str, Any] | None) -> tuple[int | None, tuple[str, ...]]:
    if value is None:
        return None, ()
    rows, names = value.get("rows"), value.get("embeddings")
    if type(rows) is int and isinstance(names, list) and all(isinstance(n, str) for n in names) and len(value) == 2:
        return rows, tuple(names)
    raise AdapterError(f"{file}: vocabulary: expected its rows and the names of embeddings, got {value!r}")


def _check_sums(directory: Path, sums: dict[str, Any], names: set[str], verify: bool) -> None:
    if set(sums) != names:
        raise AdapterError(f"{directory / CONFIG}: field 'files': expected {sorted(names)}, got {sorted(sums)}")
    for name, wanted in sums.items():
        if not (directory / name).is_file():
            raise AdapterError(f"{directory / name}: is missing")
        if verify and (got := checksum(directory / name)) != wanted:
            raise AdapterError(
                f"{directory / name}: damaged, or not of this save: expected SHA-256 {wanted}, got {got}"
            )


def _config(file: Path, values: dict[str, Any]) -> ILoRAConfig:
    try:
        config = ILoRAConfig.from_dict(values)
    except UNFIT as error:
        raise AdapterError(f"{file}: config: {error}") from error
    for key, value in config.to_dict().items():
        if key not in values:
            raise AdapterError(f"{file}: config: field {key!r} is missing")
        if values[key] != value or isinstance(values[key], bool):
            raise AdapterError(f"{file}: config: field {key!r}: expected {value!r}, got {values[key]!r}")
    return config
