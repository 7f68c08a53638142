"""The device that the report is about. On a CPU the same calls are made, so a dry run goes every way a run does."""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
import time
from typing import Any, NamedTuple

import torch
from measure import Graphed, Program
from report import machine

import ilora.op.backends


class LostDevice(RuntimeError):
    """A CUDA error after which no call of this process works any more."""


class Machine(NamedTuple):
    """device; l2: bytes that its cache holds; dry: a CPU in the place of a GPU, whose figures mean nothing."""

    device: torch.device
    l2: int
    dry: bool

    def sets(self, size: int) -> int:
        """Input sets of so many bytes each that three caches cannot hold, 2 to 96; in a dry run two."""
        return 2 if self.dry else min(max(math.ceil(3 * self.l2 / size), 2), 96)

    def graphed(self, program: Program) -> Program:
        """The program as CUDA graphs; in a dry run the program itself."""
        return program if self.dry else Graphed(program)

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Gives back what earlier measurements have left: their graphs keep memory until they are collected."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        self.tidy()
        return 2**28 if self.dry else torch.cuda.mem_get_info(self.device)[0]

    def warm_up(self, seconds: float = 0.05) -> None:
        """Work to lift the clocks, which fall while the host prepares."""
        side, own = 64 if self.dry else 4096, torch.Generator(self.device)  # a failed capture may break the default one
        a = torch.randn(side, side, generator=own, device=self.device)
        end = time.perf_counter() + (0.0 if self.dry else seconds)
        while time.perf_counter() < end:
            a @ a
            self.wait()


def machine_of(device: torch.device) -> Machine:
    """Raises ValueError, with the reason, where there is nothing to measure."""
    if device.type == "cpu":
        return Machine(device, 2**20, dry=True)
    if device.type != "cuda":
        raise ValueError(f"--device {device}: expected cuda, or cpu for a dry run")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: torch {torch.__version__} finds no GPU here; --device cpu makes a dry run of every "
            "part, whose figures mean nothing"
        )
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: the kernels would run in the interpreter; unset it")
    return Machine(device, torch.cuda.get_device_properties(device).L2_cache_size, dry=False)


def loads_by_descriptor(device: torch.device) -> bool:
    """Whether the strategy "whole" can run: sm_90 and later, and the interpreter."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def backend_of(device: torch.device, dtype: torch.dtype) -> str:
    """Whose kernels the report measures: Triton's; in a dry run the first of those that run here."""
    if device.type == "cuda":
        return "triton"
    interpreted = dtype != torch.bfloat16 and ilora.op.backends.why_not("triton", "cpu", dtype) is None
    native = ilora.op.backends.why_not("native", "cpu", dtype) is None
    return "triton" if interpreted else "native" if native else "reference"


def facts(here: Machine) -> dict[str, Any]:
    """What the figures depend on."""
    known = machine(here.device)
    if not here.dry:
        properties = torch.cuda.get_device_properties(here.device)
        known |= {
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": here.l2,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "state": _state(),
        }
    return known


def _state() -> str | None:
    """Driver, clocks, temperature and power as nvidia-smi reads them, or None without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return f"{query}: {(done.stdout or done.stderr).strip()}"


def reason_of(error: BaseException) -> str:
    """The error in one line; raises LostDevice where nothing can follow it."""
    first = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first}"[:400]
    if _gone():
        raise LostDevice(text) from error
    return text


def _gone() -> bool:
    """Whether the device refuses the simplest work, as it does for good after an illegal access."""
    if not torch.cuda.is_initialized():
        return False
    try:
        return torch.ones(1, device="cuda").item() != 1.0
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
