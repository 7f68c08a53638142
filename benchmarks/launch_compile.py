"""Compiles the kernels of launches for GPUs that are not here, and reads how many registers and bytes they take."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from launch_cases import TARGETS, kernels
from register_check import disassemble, early_writes
from torch import Tensor

# What the PTX of fused_layer must contain: loads by descriptor, tensor cores, and on sm_90 a wait that leaves a product
# running while the next one is issued.
INSTRUCTIONS = {
    "sm_90": ("cp.async.bulk.tensor", "wgmma.mma_async", r"wgmma\.wait_group\.sync\.aligned [1-9]"),
    "sm_100": ("cp.async.bulk.tensor", "tcgen05.mma"),
}
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Job(NamedTuple):
    """One specialisation of one kernel for one target: what a real launch would compile."""

    target: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments divisible by 16
    warps: int
    stages: int


def job(launch: Any, target: str) -> Job:
    """The specialisation Triton's launcher would choose: constants, None and 1 folded, divisibility by 16 noted."""
    signature, constants, aligned = {}, {}, []
    for parameter in launch.kernel.params:
        value, name = launch.args[parameter.name], parameter.name
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                aligned.append(name)
    module = launch.kernel.fn.__module__.rsplit(".", 1)[-1]
    return Job(target, module, launch.kernel.fn.__name__, tuple(signature.items()), tuple(constants.items()),
               tuple(aligned), launch.warps, launch.stages)  # fmt: skip


def compiled(job: Job) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(getattr(kernels(), job.module), job.kernel)
    arch = TARGETS[job.target][0]
    marks = [["tt.divisibility", 16]]
    names = [name for name, _ in job.signature]
    pointers = [["tt.pointer_range", 32]] if arch[0] == "hip" else []  # as the AMD launcher marks small tensors
    attributes = {
        (i,): marks + (pointers if kind.startswith("*") else [])
        for i, (name, kind) in enumerate(job.signature)
        if name in job.aligned
    }
    source = ASTSource(kernel, dict(job.signature), {(names.index(k),): v for k, v in job.constants}, attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    return triton.compile(source, target=GPUTarget(*arch), options=options)


def compile_job(job: Job) -> dict[str, Any]:
    """Registers and spilled registers of a thread, bytes of shared memory of a program, missing INSTRUCTIONS, and on
    sm_90 what register_check.py found."""
    kernel = compiled(job)
    asm = kernel.asm
    usage = _nvidia(asm["cubin"]) if "cubin" in asm else _amd(asm["amdgcn"])
    wanted = INSTRUCTIONS.get(job.target, ()) if job.kernel == "fused_layer" else ()
    missing = [name for name in wanted if not re.search(name, asm["ptx"])]
    if dict(job.constants)["EARLY"] and not _waits_first(asm["ptx"]):
        missing.append("griddepcontrol.wait before global memory is accessed")
    early = early_writes(disassemble(asm["cubin"])) if "wgmma.mma_async" in asm.get("ptx", "") else []
    found = [f"{wgmma}  <-- {writer}" for wgmma, writer in early]
    return usage | {"shared": kernel.metadata.shared, "missing": missing, "early_writes": found}


def _waits_first(ptx: str) -> bool:
    """Whether a kernel that may start early waits for the one before it ahead of every access to global memory.

    On sm_100 Triton allocates tensor memory first, by way of shared memory, which is the program's own.
    """
    access = re.search(r"\b(?:ld|st|red|atom|prefetch)\.(?:\w+\.)*global\b|\bcp\.(?:async|reduce)", ptx)
    return -1 < ptx.find("griddepcontrol.wait") < (access.start() if access else len(ptx))


def _amd(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return {"registers": field("vgpr_count"), "spills": field("vgpr_spill_count")}


def _nvidia(cubin: bytes) -> dict[str, int]:
    """By cuobjdump. These kernels have no local arrays, so what is on the stack was spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return {"registers": int(found[1]), "spills": int(found[2]) // 4}


def title(job: Job) -> str:
    """The kernel, and what distinguishes its specialisations."""
    constants = dict(job.constants)
    kinds = dict(job.signature)
    blocks = "×".join(str(v) for k, v in job.constants if k.startswith(("BLOCK", "ALONG_", "DOWN_")))

    def dtype_of(*names: str) -> str:
        return next((kinds[name][1:] for name in names if kinds.get(name, "").startswith("*")), "")

    dtype, small = dtype_of("x_ptr", "dy_ptr", "b_ptr", "parts_ptr"), dtype_of("a_ptr", "dxa_ptr", "b_ptr")
    marks = (
        ("dropout", constants.get("DROPOUT")),
        ("w by rows", constants.get("W_BY_ROWS")),
        ("and dB", job.kernel == "grad_weights" and constants.get("dy_ptr", "given") is not None),
        ("gates", job.kernel.endswith(("shrink", "grad_dy", "grouped_expand")) and kinds["gate_ptr"] != "constexpr"),
        ("with W", kinds.get("weight_ptr", "constexpr") != "constexpr"),
    )
    flags = [name for name, on in marks if on]
    return " ".join([f"{job.kernel:12}", f"{dtype}{'/' + small if small not in ('', dtype) else ''}", blocks, *flags])


def _init(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def compile_all(jobs: list[Job], processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as cache:  # a fresh one: what was compiled before is not this code
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _init, (cache,))
        with pool:
            yield from zip(jobs, tqdm(pool.map(compile_job, jobs), total=len(jobs), unit="kernel"), strict=True)
