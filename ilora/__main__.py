"""`python -m ilora [report | check | bench]`: about this machine, a self-test of every backend, a short benchmark.

Needs nothing that is not installed with ilora.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import ilora
from ilora.op import backends, native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")


def report() -> str:
    """Versions, devices, settings, and which backends work here and why not: what a bug report needs."""
    lines = [f"ilora {ilora.__version__} in {Path(ilora.__file__).parent}"]
    lines += [f"Python {platform.python_version()}, {platform.platform()}", "packages"]
    lines += [f"  {name} {_version(name)}" for name in PACKAGES]
    lines += [f"  torch built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}", "devices"]
    lines += [f"  cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    for kind in _devices()[1:]:
        module = getattr(torch, kind)
        lines += [f"  {kind}:{i} ({module.get_device_name(i)})" for i in range(module.device_count())]
    settings = {name: value for name, value in os.environ.items() if name.startswith(("ILORA_", "TRITON_"))}
    lines += ["environment", *(f"  {name}={settings[name]}" for name in sorted(settings)), "backends"]
    for name in backends.NAMES:
        lines += [f"  {name:10} {kind:5} {_works(backends.why_not(name, kind))}" for kind in _devices()]
    return "\n".join([*lines, f"  {'call':10} cpu   {_works(native.CALL_UNAVAILABLE)}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _works(reason: str | None) -> str:
    return "works" if reason is None else f"no: {reason}"


def _devices() -> list[str]:
    return ["cpu", *(kind for kind in ("cuda", "xpu") if getattr(torch, kind).device_count())]


@dataclass
class Problem:
    """One random problem: M rows of N instances (or instances of these lengths), R ranks of four experts."""

    M: int
    N: int
    R: int
    dropout_p: float = 0.0
    lengths: tuple[int, ...] | None = None
    d_in: int = 72
    d_out: int = 40

    def solve(self, call: Callable[..., Tensor], dtype: torch.dtype, device: str, compute: torch.dtype) -> list[Tensor]:
        """y, dx, dA, dB and dgate of `call`, in float64; the inputs are rounded to `dtype` and given as `compute`."""
        draw = torch.Generator().manual_seed(self.M)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(dtype).to(compute).to(device)

        x, A, B = random(self.M, self.d_in), random(self.R, self.d_in) / 8, random(self.d_out, self.R) / 4
        weight, bias, dy = random(self.d_out, self.d_in) / 8, random(self.d_out), random(self.M, self.d_out)
        gate = torch.rand(self.N, 4, generator=draw).to(compute if compute is torch.float64 else torch.float32)
        segments = None
        if self.lengths is not None:
            segments = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32).to(device)
        leaves = [tensor.requires_grad_() for tensor in (x, A, B, gate.to(device))]
        y = call(x, weight, bias, *leaves[1:], 2.0, segments, self.dropout_p, 7)
        return [found.detach().double() for found in (y, *torch.autograd.grad(y, leaves, dy))]


PROBLEMS = {
    "equal instances": Problem(M=96, N=3, R=8),
    "dropout": Problem(M=130, N=2, R=16, dropout_p=0.2),
    "segments": Problem(M=37, N=4, R=12, lengths=(9, 0, 20, 8)),
    "token gates, rank 64": Problem(M=33, N=33, R=64),
    "one row": Problem(M=1, N=1, R=4),
}


def check() -> Iterator[tuple[str, bool]]:
    """A line for each backend, device and dtype that works here, and whether it is right.

    Right: y and every gradient are at most twice as far from float64 as the definition in the same dtype is, give or
    take one rounding.
    """
    for name in backends.NAMES:
        for device in _devices():
            for dtype in DTYPES:
                if backends.why_not(name, device, dtype) is None:
                    yield _check_one(name, device, dtype)


def _check_one(name: str, device: str, dtype: torch.dtype) -> tuple[str, bool]:
    where = f"{name:10} {device:5} {str(dtype)[6:]:9}"
    by_backend = partial(ilora.ilora_linear, backend=name)
    for title, problem in PROBLEMS.items():
        exact = problem.solve(reference.ilora_linear, dtype, device, torch.float64)
        torchs = problem.solve(reference.ilora_linear, dtype, device, dtype)
        ours = problem.solve(by_backend, dtype, device, dtype)
        for output, e, t, o in zip(("y", "dx", "dA", "dB", "dgate"), exact, torchs, ours, strict=True):
            allowed = 2 * (t - e).abs().max() + 4 * torch.finfo(dtype).eps * e.abs().max()
            error = (o - e).abs().max()
            if not error <= allowed:  # also where it is nan
                return f"{where} WRONG: {title}: {output} is off by {error:.1e}, at most {allowed:.1e} is right", False
    return f"{where} right", True


SHAPES = {"cpu": ((64, 64, 1), (576, 1536, 512)), "cuda": ((1024, 1024, 4096), (4096, 4096, 4096))}  # d_in, d_out, rows


def bench() -> Iterator[str]:
    """A line for each small shape: forward and backward of the frozen layer, of LoRA in plain torch, and of ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield f"forward and backward on {device}, {str(dtype)[6:]}, R = 8, E = 4: ms, and the ratio to the frozen layer"
    for d_in, d_out, rows in SHAPES[device]:
        x = torch.randn(rows, d_in, device=device, dtype=dtype, requires_grad=True)
        layer = ilora.ILoRALinear(torch.nn.Linear(d_in, d_out, device=device, dtype=dtype), r=8, num_experts=4)
        gate, dy = torch.full((1, 4), 0.25, device=device), torch.randn(rows, d_out, device=device, dtype=dtype)
        programs = {
            "frozen": partial(layer.base_layer, x),
            "torch": partial(_plain_lora, x, layer),
            "ilora": partial(layer, x, gate=gate),
        }
        times = _interleaved(programs, dy)
        cells = [f"{name} {1e3 * t:.3f} ({t / times['frozen']:.2f})" for name, t in times.items()]
        yield f"  {rows} rows, {d_in} to {d_out}: " + ", ".join(cells)
    yield "peers, memory, more shapes: benchmarks/bench_moe_lora.py in the source"


def _plain_lora(x: Tensor, layer: ilora.ILoRALinear) -> Tensor:
    return layer.base_layer(x) + x @ layer.lora_A.T @ layer.lora_B.T


def _interleaved(programs: Mapping[str, Callable[[], Tensor]], dy: Tensor) -> dict[str, float]:
    """Median seconds of forward and backward of each, over rounds in which each runs in turn for 20 ms."""
    timers = {
        name: Timer("f().backward(dy)", globals={"f": f, "dy": dy}, num_threads=torch.get_num_threads())
        for name, f in programs.items()
    }
    numbers = {name: max(1, int(0.02 / timer.timeit(3).median)) for name, timer in timers.items()}
    rounds = [{name: timer.timeit(numbers[name]).median for name, timer in timers.items()} for _ in range(15)]
    return {name: statistics.median(times[name] for times in rounds) for name in programs}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ilora", description="About ilora on this machine.")
    add = parser.add_argument
    add(
        "job",
        nargs="?",
        default="report",
        choices=("report", "check", "bench"),
        help="report: versions, devices, backends and why not (default); check: test every backend that works here, in "
        "under a minute; bench: a short benchmark",
    )
    job = parser.parse_args(argv).job
    if job == "report":
        print(report())
    if job == "bench":
        for line in bench():
            print(line, flush=True)
    right = True
    if job == "check":
        for line, well in check():
            print(line, flush=True)
            right &= well
        print(
            "everything that works here is right"
            if right
            else "something is WRONG: please report it with `python -m ilora`"
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
