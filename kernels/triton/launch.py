"""What a launch is, and the facts about the device that launches are cut to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .dropout import row_keys


class Device(NamedTuple):
    """sms: multiprocessors to fill; smem: bytes of shared memory a program may use; hip: an AMD GPU;
    interpret: the kernels run on the CPU, where bfloat16 arithmetic is meaningless and float32 takes its place;
    tma: the GPU copies tiles by tensor descriptor itself (sm_90 and later); tmem: columns of its tensor memory, 0 where
    it has none; name: what a table of measurements knows
    it by."""

    sms: int
    smem: int
    hip: bool = False
    interpret: bool = False
    tma: bool = False
    name: str = ""
    tmem: int = 0


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
        tmem=512 * (not hip and facts.major == 10),
    )


def device_of(x: Tensor) -> Device:
    """The device x is on; raises where no Triton kernel can run."""
    if not isinstance(row_keys, triton.JITFunction):  # TRITON_INTERPRET was set when the kernels were defined
        return INTERPRETER
    if x.device.type != "cuda":
        raise ValueError(f"the triton backend needs a GPU (or TRITON_INTERPRET=1 before import), not {x.device}")
    return _gpu(x.device)


class Launch(NamedTuple):
    """One kernel launch: calling it launches; benchmarks/kernel_report.py compiles and counts it instead."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]  # in the order of the kernel's signature, constants included
    warps: int = 4
    stages: int = 2

    def __call__(self) -> Any:
        """Launches; returns Triton's compiled kernel, or None in the interpreter."""
        compiled = self.kernel[self.grid](**self.args, num_warps=self.warps, num_stages=self.stages)
        return compiled.result() if hasattr(type(compiled), "result") else compiled  # under triton.AsyncCompileMode

    def values(self) -> list[Any]:
        """The arguments in the order of the kernel's signature."""
        return [self.args[name] for name in self.kernel.arg_names]

    def runner(self, compiled: Any) -> Callable[..., Any]:
        """What launches the compiled kernel on other values like these: runner(*values, stream=None)."""
        if compiled is not None:
            return compiled[(*self.grid, 1, 1)[:3]]
        # In the interpreter. Not of self, which holds the tensors.
        kernel, grid, options = self.kernel, self.grid, {"num_warps": self.warps, "num_stages": self.stages}
        return lambda *values, stream=None: kernel[grid](**dict(zip(kernel.arg_names, values, strict=True)), **options)


def run(launches: list[Launch], device: torch.device) -> list[Any]:
    """Launches in order on device's current stream; nothing here waits for it. Returns what the launches do."""
    if device.type != "cuda":
        return [launch() for launch in launches]
    with torch.cuda.device(device):
        return [launch() for launch in launches]
