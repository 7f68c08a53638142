"""Writes the files of an adapter directory, all or none, and reads them with checks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, GATE = "ilora_config.json", "ilora_gate.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STATE, README = "model.safetensors", "README.md"
Spec = tuple[torch.Size, torch.dtype]  # what a tensor must be


class AdapterError(ValueError):
    """An adapter's files cannot be used. Says which file, which tensor or field, what was expected and what came."""


def write_directory(
    path: str | os.PathLike[str],
    contents: dict[str, str | dict[str, Tensor]],
    last: tuple[str, Callable[[dict[str, str]], str]],
) -> Path:
    """Writes texts and tensors to files of these names; returns the directory.

    last: the name of the file that is written last, and a function that makes its text from the others' SHA-256 sums.
    A new directory appears with everything in it or not at all. In an existing one all files are completely on the disk
    before the first old one is replaced. A README.md that is there is kept. Files of an earlier save that this one does
    not write are removed.
    Raises: NotADirectoryError where the path is a file, OSError where it cannot be written, ImportError.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a directory to save to, or a new name, but it is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = (path if path.is_dir() else path.parent) / f".ilora-{uuid.uuid4().hex}"  # one file system, so renames work
    stage.mkdir()
    try:
        sums = {}
        for name, content in contents.items():
            _write(stage / name, content)
            sums[name] = checksum(stage / name)
        _write(stage / last[0], last[1](sums))
        if not path.exists():
            try:
                os.rename(stage, path)
                return path
            except OSError:
                if not path.is_dir():  # else another process was faster
                    raise
        ours = (path / CONFIG).exists() and not (path / "config.json").exists()
        for name in [*contents, last[0]]:
            if name != README or not (path / README).exists():
                os.replace(stage / name, path / name)
        for name in {GATE, STATE}.difference(contents) if ours else ():  # of an earlier save, not of this one
            (path / name).unlink(missing_ok=True)
        return path
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(path: Path, content: str | dict[str, Tensor]) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        # Copies that share no memory: safetensors refuses views and ties.
        copies = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t.detach()) for name, t in content.items()
        }
        _safetensors().save_file(copies, str(path), metadata={"format": "pt"})
    with open(path, "rb+") as file:  # a rename must not reach the disk before the bytes do
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises AdapterError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def digest_of(fields: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def to_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises AdapterError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: expected a JSON object in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises AdapterError naming the file, ImportError."""
    load = _safetensors().load_file
    if not path.is_file():
        raise AdapterError(f"{path}: is missing")
    try:
        tensors: dict[str, Tensor] = load(str(path))
    except Exception as error:  # whatever the parser raises for damaged bytes
        raise AdapterError(f"{path}: expected a whole safetensors file: {error}") from error
    return tensors


def check_tensors(file: Path | str, tensors: dict[str, Tensor], expected: dict[str, Spec]) -> None:
    """Raises AdapterError unless the file's tensors have these names and shapes, and dtypes that fit these: a floating
    one for a floating one, else the same."""
    for name in expected:
        if name not in tensors:
            raise AdapterError(f"{file}: tensor {name!r} of shape {list(expected[name][0])} is missing")
    for name, tensor in tensors.items():
        if name not in expected:
            raise AdapterError(f"{file}: unexpected tensor {name!r} of shape {list(tensor.shape)}: nothing takes it")
        shape, dtype = expected[name]
        if tensor.shape != shape:
            raise AdapterError(f"{file}: tensor {name!r}: expected shape {list(shape)}, got {list(tensor.shape)}")
        fits = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype == dtype
        if not fits:
            wanted = f"a floating dtype such as {dtype}" if dtype.is_floating_point else str(dtype)
            raise AdapterError(f"{file}: tensor {name!r}: expected {wanted}, got {tensor.dtype}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters are kept in safetensors files: pip install safetensors") from error
    return safetensors.torch
