"""What a benchmark's numbers depend on: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ilora

STATE = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
PACKAGES = ("torch", "triton", "peft", "transformers")
LOAD_BEFORE = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # read before this program does any work


def machine(device: torch.device) -> dict[str, Any]:
    """The device, the processor, the versions and the commit, for the JSON file."""
    changes = _run("git", "status", "--porcelain", "--untracked-files=no")
    known = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": LOAD_BEFORE,
        "python": platform.python_version(),
        "ilora": ilora.__version__,
        **{package: _version(package) for package in PACKAGES},
        "git_commit": _run("git", "rev-parse", "--verify", "HEAD"),
        "git_changed": None if changes is None else bool(changes),
    }
    if device.type == "cuda":
        known |= {"cuda": torch.version.cuda, "state": _run("nvidia-smi", f"--query-gpu={STATE}", "--format=csv")}
    return known


def heading(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("ilora", *PACKAGES))
    return f"{machine['device']}, {machine['threads']} threads, {machine['cpu_capability']}; {versions}"


def busy(machine: dict[str, Any]) -> str | None:
    """A warning where other work would spoil the times, else None."""
    load, cores = machine["load_before"], machine["cores"]
    if load is None or load <= cores / 2:
        return None
    return f"the machine was busy before the start (load {load:.1f} on {cores} cores): do not trust these times"


def _cpu() -> str:
    """The processor's name as Linux gives it, or as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """What the command prints in this folder, or None if it is not there or fails."""
    try:
        folder = Path(__file__).parent
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
