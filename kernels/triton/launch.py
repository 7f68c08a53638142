"""What a launch is, and the facts about the device that launches are cut to."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .dropout import row_keys


class Device(NamedTuple):
    """sms: multiprocessors to fill; smem: bytes of shared memory a program may use; hip: an AMD GPU;
    interpret: the kernels run on the CPU, where bfloat16 arithmetic is meaningless and float32 takes its place;
    tma: the GPU copies tiles by tensor descriptor itself (sm_90 and later); name: what a table of measurements knows
    it by; tmem: columns of its tensor memory, 0 where it has none; pdl: kernels are brought up while the one ahead
    still runs (see Launch)."""

    sms: int
    smem: int
    hip: bool = False
    interpret: bool = False
    tma: bool = False
    name: str = ""
    tmem: int = 0
    pdl: bool = False


# few multiprocessors: small tests split too
INTERPRETER = Device(sms=4, smem=227 * 1024, interpret=True, tma=True, name="interpreter")


@cache
def _gpu(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    smem = 64 * 1024 if hip else facts.shared_memory_per_block_optin
    return Device(
        facts.multi_processor_count,
        smem,
        hip,
        tma=not hip and facts.major >= 9,
        name=facts.name,
        tmem=512 * (not hip and facts.major in (10, 11)),
    )


def device_of(x: Tensor) -> Device:
    """The device x is on; raises where no Triton kernel can run."""
    if not isinstance(row_keys, triton.JITFunction):  # TRITON_INTERPRET was set when the kernels were defined
        return INTERPRETER
    if x.device.type != "cuda":
        raise ValueError(f"the triton backend needs a GPU (or TRITON_INTERPRET=1 before import), not {x.device}")
    device = _gpu(x.device)
    return device._replace(pdl=device.tma and os.environ.get("ILORA_PDL") == "1")


@triton.jit
def begin(PDL: tl.constexpr):
    """What every kernel does first: waits until the one ahead has ended and its writes are seen, and only then lets the
    one behind be brought up, which waits here in turn. So whoever is past this has all those ahead behind it."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


class Launch(NamedTuple):
    """One kernel launch: calling it launches; benchmarks/kernel_report.py compiles and counts it instead.

    pdl: programmatic dependent launch. The kernel, whose last argument it is, may be brought up while the one ahead is
    still running, and waits by itself (`begin`).
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]  # by name, constants included, all but PDL
    warps: int = 4
    stages: int = 2
    pdl: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.args, "PDL": self.pdl}

    @property
    def options(self) -> dict[str, Any]:
        chosen = {"num_warps": self.warps, "num_stages": self.stages}
        return chosen | {"launch_pdl": True} if self.pdl else chosen

    def __call__(self) -> Any:
        """Launches; returns Triton's compiled kernel, or None in the interpreter."""
        compiled = self.kernel[self.grid](**self.arguments, **self.options)
        return compiled.result() if hasattr(type(compiled), "result") else compiled  # under triton.AsyncCompileMode

    def values(self) -> list[Any]:
        """The arguments in the order of the kernel's signature."""
        arguments = self.arguments
        return [arguments[name] for name in self.kernel.arg_names]

    def runner(self, compiled: Any) -> Callable[..., Any]:
        """What launches the compiled kernel on other values like these: runner(*values, stream=None)."""
        if compiled is not None:
            return compiled[(*self.grid, 1, 1)[:3]]
        # In the interpreter. Not of self, which holds the tensors.
        kernel, grid, options = self.kernel, self.grid, self.options
        return lambda *values, stream=None: kernel[grid](**dict(zip(kernel.arg_names, values, strict=True)), **options)


def run(launches: list[Launch], device: torch.device) -> list[Any]:
    """Launches in order on device's current stream; nothing here waits for it. Returns what the launches do."""
    if device.type != "cuda":
        return [launch() for launch in launches]
    with torch.cuda.device(device):
        return [launch() for launch in launches]
