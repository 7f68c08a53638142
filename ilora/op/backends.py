"""Chooses the backend of a call, by name or by one rule. Nothing falls back silently.

A backend is a module with the four primitives of reference.py: shrink_x, expand_xa, backward_dy, backward_x. One that
computes a whole direction faster than its primitives one after another has `forward` or `backward` too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch

NAMES = ("reference", "native", "triton")
PLAIN = {"reference": "ilora.op.reference", "native": "ilora.op.native", "triton": "ilora.kernels"}
GROUPED = {"reference": "ilora.grouped.reference", "native": "ilora.grouped.native", "triton": "ilora.kernels.grouped"}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


@cache
def why_not(name: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """None if the backend runs tensors of this device type and dtype here, else the reason as a sentence."""
    if name == "native":
        from . import native

        if device_type != "cpu":
            return f"the native backend runs on the CPU, not on {device_type}"
        if dtype is not None and dtype not in native.DTYPES:
            return f"the native backend takes {', '.join(map(str, native.DTYPES))}, not {dtype}"
        return native.unavailable()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if importlib.util.find_spec("ilora.kernels") is None:
            return "ilora.kernels is not importable: install the package (pip install -e .), a bare checkout lacks it"
        if device_type not in ("cpu", "cuda"):
            return f"the Triton kernels run on CUDA and ROCm GPUs, not on {device_type}"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton needs a GPU (or TRITON_INTERPRET=1 in the environment, to run its kernels slowly on the CPU)"
        if dtype == torch.float64:
            return "the Triton kernels take float32, float16 and bfloat16, not torch.float64"
    return None


def available_backends(device: str | torch.device | None = None) -> tuple[str, ...]:
    """The backends that work here: on `device` ("cpu", "cuda", ...), or on any device of this machine when None; () for
    a device that this machine lacks. Raises RuntimeError for what names no device, as torch does."""
    asked = [torch.device(t) for t in (("cpu", "cuda", "xpu") if device is None else (device,))]
    types = [each.type for each in asked if _present(each)]
    return tuple(name for name in NAMES if any(why_not(name, t) is None for t in types))


def _present(device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return True
    module = getattr(torch, device.type, None)
    return module is not None and module.is_available() and (device.index or 0) < module.device_count()


def select(backend: str | None, device_type: str, dtype: torch.dtype, modules: Mapping[str, str] = PLAIN) -> ModuleType:
    """The backend's namespace: `backend`, else ILORA_BACKEND, else the fastest that takes this device and dtype.

    modules: PLAIN or GROUPED, the modules of either operation; what runs one of them on a device runs both.

    Raises ValueError for an unknown name and BackendUnavailable for a named backend that cannot run this call.
    """
    name, source = named(backend)
    if not name:
        return _module(modules[_fastest(device_type, dtype)])
    reason = why_not(name, device_type, dtype)
    if reason is not None:
        raise BackendUnavailable(f"{source}={name!r} cannot run {dtype} on {device_type}: {reason}")
    return _module(modules[name])


def named(backend: str | None) -> tuple[str, str]:
    """The name of the backend that is asked for, "" for none, and where it is asked for. Raises ValueError for an
    unknown name."""
    name, source = (backend, "backend") if backend else (os.environ.get("ILORA_BACKEND") or "", "ILORA_BACKEND")
    if name and name not in NAMES:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(NAMES)}")
    return name, source


@cache
def _fastest(device_type: str, dtype: torch.dtype) -> str:
    first = {"cpu": "native", "cuda": "triton"}.get(device_type)
    return first if first and why_not(first, device_type, dtype) is None else "reference"


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)
