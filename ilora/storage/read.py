"""A saved adapter, read and checked: nothing here changes a model."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter.config import ILoRAConfig
from ..adapter.task_heads import outermost
from ..gates.networks import GATE_TYPES, GateNetwork, gate_from_settings
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
from .format import GATE_PREFIX, Layout, peft_config, peft_key, specs_of
from .hub import download

_FIELDS: dict[str, tuple[type, ...]] = {"format": (int,), "ilora_version": (str,), "digest": (str,)}
_FIELDS |= {"config": (dict,), "gate": (dict, type(None)), "files": (dict,)}
_FREE = {"base_model_name_or_path": (str, type(None)), "task_type": (str, type(None)), "inference_mode": (bool,)}


@dataclass
class Stored:
    """What the files of a directory say. tensors: as in `ilora.layout`; gate: the gate network's settings."""

    directory: Path
    config: ILoRAConfig
    gate: dict[str, Any] | None
    peft: dict[str, Any]
    lora: dict[str, Tensor]
    network: dict[str, Tensor]

    tensors: dict[str, Tensor]

    def check(self, model: Any, layout: Layout, gate: nn.Module | None) -> None:
        """Raises AdapterError unless the tensors are those of this layout and gate network, and PEFT's description is
        the layout's."""
        specs = {peft_key(name): spec for name, spec in layout.specs().items()}
        check_tensors(self.directory / PEFT_WEIGHTS, self.lora, specs)
        check_tensors(self.directory / GATE, self.network, {} if gate is None else specs_of(gate))
        self._check_peft(peft_config(model, layout), list(layout.layers))
        self.tensors = {name: self.lora[peft_key(name)] for name in layout.specs()}
        self.tensors |= {GATE_PREFIX + name: tensor for name, tensor in self.network.items()}

    def check_new(self, model: Any, gate: nn.Module | None) -> nn.Module | None:
        """The gate network to inject with the config, filled if it was built here, once everything fits this model."""
        file = self.directory / CONFIG
        try:
            layout = Layout.planned(model, self.config)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise AdapterError(f"{file}: config does not fit {type(model).__name__}: {error}") from error
        network = self._shadow(model, layout, gate)
        self.check(model, layout, network)
        if gate is None and network is not None:
            values = {key: value.clone() for key, value in self.network.items()}
            network.load_state_dict(values, assign=True)
        return gate if gate is not None else network

    def _shadow(self, model: Any, layout: Layout, gate: nn.Module | None) -> nn.Module | None:
        """The saved gate network as the model would bind it, without memory; or what the given one would become, where
        it is of a class that only its owner can build."""
        file = self.directory / CONFIG
        if self.gate is None:
            if gate is not None:
                raise AdapterError(f"{file}: gate: the adapter was saved without a gate network, but gate= is given")
            return None
        custom = self.gate["type"] == "custom"
        if custom and not isinstance(gate, GateNetwork):
            if gate is None:
                raise AdapterError(
                    f"{file}: gate: the gate network is a {self.gate['class']}; build it and give it as gate="
                )
            return gate
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        try:
            with torch.device("meta"):  # settings that ask for too much must not get it
                network = copy.deepcopy(cast(GateNetwork, gate)) if custom else gate_from_settings(self.gate)
                network.bind(layout.config.num_experts, layout.blocks, getattr(embeddings, "embedding_dim", None))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise AdapterError(f"{file}: gate: {error}") from error
        if not custom and {"type": type(network).__name__, **network.settings()} != self.gate:
            raise AdapterError(f"{file}: gate: expected all of {network.settings()}, got {self.gate}")
        self._compare_given(None if custom else gate, network)
        return network

    def _compare_given(self, gate: nn.Module | None, network: GateNetwork) -> None:
        if gate is None:
            return
        own = gate.settings() if isinstance(gate, GateNetwork) and type(gate) is type(network) else None
        unbound = {"num_layers": 1, "hidden_size": None}  # values that bind will replace
        for key, value in network.settings().items():
            if own is None or (own[key] != value and own[key] != unbound.get(key, value)):
                got = type(gate).__name__ if own is None else f"{own[key]!r}"
                raise AdapterError(f"{self.directory / CONFIG}: gate {self.gate}: gate= differs in {key}: {got}")

    def _check_peft(self, expected: dict[str, Any], paths: list[str]) -> None:
        file, found = self.directory / PEFT_CONFIG, self.peft
        if isinstance(found.get("target_modules"), list):
            expected["target_modules"] = paths  # as earlier versions wrote it where PEFT needs a regular expression
        if isinstance(found.get("modules_to_save"), list):  # they listed parts of modules in it as well
            found = {**found, "modules_to_save": outermost(map(str, found["modules_to_save"]))}
        for key in {*expected, *found}:
            if key not in expected or key not in found:
                raise AdapterError(f"{file}: field {key!r} is {'unexpected' if key in found else 'missing'}")
            free = _FREE.get(key)
            if not (isinstance(found[key], free) if free else _same(found[key], expected[key])):
                wanted = " or ".join(t.__name__ for t in free) if free else f"{expected[key]!r}, as {CONFIG} says"
                raise AdapterError(f"{file}: field {key!r}: expected {wanted}, got {found[key]!r}")


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, bool) is not isinstance(expected, bool):
        return False
    return sorted(map(str, found)) == sorted(expected) if _lists(found, expected) else found == expected


def _lists(*values: Any) -> bool:
    return all(isinstance(value, list) for value in values)


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


def read_adapter(directory: Path, verify: bool = True) -> Stored:
    """The files of an adapter, each by itself right. Raises AdapterError."""
    file = directory / CONFIG
    if not file.exists() and (directory / PEFT_CONFIG).exists():
        raise AdapterError(
            f"{file} is missing: this is a PEFT adapter; ilora.from_peft(path, num_experts, model=model)"
        )
    fields = read_json(file)
    if fields.get("format") != 1:
        raise AdapterError(f"{file}: field 'format': expected 1, got {fields.get('format')!r}")
    for key in {*_FIELDS, *fields}:
        if key not in _FIELDS or key not in fields:
            raise AdapterError(f"{file}: field {key!r} is {'unexpected' if key in fields else 'missing'}")
        if not isinstance(fields[key], _FIELDS[key]) or isinstance(fields[key], bool):
            wanted = " or ".join(kind.__name__ for kind in _FIELDS[key])
            raise AdapterError(f"{file}: field {key!r}: expected {wanted}, got {fields[key]!r}")
    sealed = {key: value for key, value in fields.items() if key != "digest"}
    if verify and digest_of(sealed) != fields["digest"]:
        raise AdapterError(
            f"{file}: field 'digest': expected {digest_of(sealed)}, got {fields['digest']}: it was changed"
        )
    gate = fields["gate"]
    _check_files(
        directory, fields["files"], {PEFT_CONFIG, PEFT_WEIGHTS} | ({GATE} if gate is not None else set()), verify
    )
    if gate is not None and gate.get("type") not in (*GATE_TYPES, "custom"):
        raise AdapterError(
            f"{file}: gate: expected a type among {', '.join(GATE_TYPES)}, custom, got {gate.get('type')!r}"
        )
    if (
        gate is not None
        and gate["type"] == "custom"
        and (set(gate) != {"type", "class"} or type(gate["class"]) is not str)
    ):
        raise AdapterError(f"{file}: gate: expected its type and class, got {gate!r}")
    network = {} if gate is None else read_tensors(directory / GATE)
    config = _config(file, fields["config"])
    return Stored(
        directory, config, gate, read_json(directory / PEFT_CONFIG), read_tensors(directory / PEFT_WEIGHTS), network, {}
    )


def _check_files(directory: Path, sums: dict[str, Any], expected: set[str], verify: bool) -> None:
    file = directory / CONFIG
    if set(sums) != expected:
        raise AdapterError(f"{file}: field 'files': expected {sorted(expected)}, got {sorted(sums)}")
    for name, wanted in sums.items():
        if not isinstance(wanted, str):
            raise AdapterError(f"{file}: field 'files': expected the SHA-256 sum of {name}, got {wanted!r}")
        if not (directory / name).is_file():
            raise AdapterError(f"{directory / name}: is missing")
        if verify and (got := checksum(directory / name)) != wanted:
            raise AdapterError(
                f"{directory / name}: damaged, or not of this save: expected SHA-256 {wanted}, got {got}"
            )


def _config(file: Path, values: dict[str, Any]) -> ILoRAConfig:
    try:
        config = ILoRAConfig.from_dict(values)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{file}: config: {error}") from error
    for key, value in config.to_dict().items():
        if key not in values:
            raise AdapterError(f"{file}: config: field {key!r} is missing")
        if values[key] != value or isinstance(values[key], bool):
            raise AdapterError(f"{file}: config: field {key!r}: expected {value!r}, got {values[key]!r}")
    return config
