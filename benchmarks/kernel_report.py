#!/usr/bin/env python3
"""Compiles every Triton kernel as it would be launched, for GPUs that need not be there, and counts the bytes it moves.

    python benchmarks/kernel_report.py [--targets sm_80,sm_90,sm_100,gfx942] [--ranks 8,16,64,128,256] [--json FILE]

The launches are the backend's own (`Update` in kernels/triton/update.py) on meta tensors, so the report cannot drift
from what runs. Exit status 1 if any kernel spills registers or needs more shared memory than its target has, or if gemm
does not load by tensor descriptor and multiply on the tensor cores where the target has both.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from launch_bytes import least, moved, size, tensors
from torch import Tensor

KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "triton"
KIB = 1024
TARGETS = {  # GPUTarget's arguments; multiprocessors and shared memory of A100, H100, B200, MI300X
    "sm_80": (("cuda", 80, 32), 108, 163 * KIB),
    "sm_90": (("cuda", 90, 32), 132, 227 * KIB),
    "sm_100": (("cuda", 100, 32), 148, 227 * KIB),
    "gfx942": (("hip", "gfx942", 64), 304, 64 * KIB),
}
DTYPES = {"bf16": (torch.bfloat16,) * 2, "mixed": (torch.bfloat16, torch.float32), "fp32": (torch.float32,) * 2}
KERNEL_NAMES = ("shrink", "gate_ranks", "expand", "outer", "sum_parts", "sum_segments", "gemm", "decode")
INSTRUCTIONS = {  # gemm's in PTX: loads by descriptor, tensor cores, a product still running when the next is issued
    "sm_90": ("cp.async.bulk.tensor", "wgmma.mma_async", "wgmma.wait_group.sync.aligned 1"),
    "sm_100": ("cp.async.bulk.tensor", "tcgen05.mma"),
}  # elsewhere descriptors become plain loads
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


class Case(NamedTuple):
    """One layer and its input; `token`: a gate for every row, else 32 instances in segments."""

    dtypes: str
    R: int
    p: float
    M: int = 4096
    d_in: int = 4096
    d_out: int = 4096
    token: bool = False
    strategy: str = "beta"


def cases(ranks: list[int], dtypes: list[str]) -> list[Case]:
    """The typical layer at every rank with dropout, and at one rank the variants: p = 0, few rows, odd sizes."""
    every = [Case(dtype, R, 0.1) for dtype in dtypes for R in ranks if dtype != "fp32"]
    first, main = ranks[len(ranks) > 1], dtypes[0]
    every += [Case(main, first, 0.0), Case(main, first, 0.0, M=1, token=True)]
    every += [Case(main, first, 0.1, M=1000, d_in=1001, d_out=777), Case(main, first, 0.1, d_out=1024, token=True)]
    every += [Case("fp32", R, 0.1) for R in ranks if "fp32" in dtypes]
    every += [Case(dtype, R, 0.0, M, token=True, strategy="decode") for dtype in dtypes for R in ranks for M in (1, 64)]
    every += [Case(main, first, 0.0, 16, d_out=14336, token=True, strategy="decode")]
    every += [Case(main, first, 0.0, 16, 1001, 777, token=True, strategy="decode")]
    return every + (gemms(ranks, first) if "bf16" in dtypes else [])


def gemms(ranks: list[int], first: int) -> list[Case]:
    """The same layer by one GEMM: every rank with dropout; p = 0, few rows, sizes that no block divides."""
    every = [Case("bf16", R, 0.1, strategy="gemm") for R in ranks]
    every += [Case("bf16", first, 0.0, d_out=1024, strategy="gemm")]
    return every + [Case("bf16", first, 0.1, M=100, d_in=1000, d_out=776, strategy="gemm")]


def kernels() -> Any:
    """The package kernels/triton of this checkout, whatever is installed."""
    if "ilora_kernels" not in sys.modules:
        file = KERNELS / "__init__.py"
        spec = importlib.util.spec_from_file_location("ilora_kernels", file, submodule_search_locations=[str(KERNELS)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["ilora_kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ilora_kernels"])
    return sys.modules["ilora_kernels"]


def launches(case: Case, target: str) -> tuple[list[Any], list[Any]]:
    """What forward and backward would launch there, on meta tensors."""
    package = kernels()
    arch, sms, smem = TARGETS[target]
    device = package.launch.Device(sms, smem, hip=arch[0] == "hip", tma=target in INSTRUCTIONS)
    x_type, a_type = DTYPES[case.dtypes]
    N, E = (case.M if case.token else 32), 4

    def empty(*shape: int, dtype: torch.dtype = x_type) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    segments = None if case.token else empty(N + 1, dtype=torch.int32)
    A, B = empty(case.R, case.d_in, dtype=a_type), empty(case.d_out, case.R, dtype=a_type)
    gate, seed = empty(N, E, dtype=torch.float32), empty(1, dtype=torch.int64) if case.p else None
    common = (device, empty(case.M, case.d_in), A, B, gate, segments, 2.0, case.p, seed, case.strategy)
    weight = empty(case.d_out, case.d_in)
    if case.strategy == "decode":  # where it is refused, for reading too much per program, there is nothing to list
        plan = package.decode.plan(device, common[1], weight, empty(case.d_out), None, *common[2:8])
        return [plan[0]] if plan else [], []
    forward, backward = package.update.Update(*common), package.update.Update(*common)
    _, xa = forward.forward(empty(case.d_out), None, weight)
    backward.backward(empty(case.M, case.d_out), xa, True, weight)
    return forward.launches, backward.launches


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


def compile_job(job: Job) -> dict[str, Any]:
    """Registers, spilled registers and bytes of shared memory of a thread's program; INSTRUCTIONS that are missing."""
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
    compiled = triton.compile(source, target=GPUTarget(*arch), options=options)
    usage = _amd(compiled.asm["amdgcn"]) if arch[0] == "hip" else _nvidia(compiled.asm["cubin"])
    wanted = INSTRUCTIONS.get(job.target, ()) if job.kernel == "gemm" else ()
    missing = [name for name in wanted if name not in compiled.asm["ptx"]]
    return usage | {"shared": compiled.metadata.shared, "missing": missing}


def _amd(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return {"registers": field("vgpr_count"), "spills": field("vgpr_spill_count")}


def _nvidia(cubin: bytes) -> dict[str, int]:
    """From cuobjdump: these kernels have no local arrays, so whatever is on the stack was spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return {"registers": int(found[1]), "spills": int(found[2]) // 4}


def bytes_report(case: Case, target: str) -> dict[str, Any]:
    """Unique bytes (each operand of a launch once: what HBM sees at most), bytes asked of L2, and the least."""
    row: dict[str, Any] = {"case": case._asdict(), "target": target}
    minima = least(case, *(dtype.itemsize for dtype in DTYPES[case.dtypes]))
    for part, plan, minimum in zip(("forward", "backward"), launches(case, target), minima, strict=True):
        unique = sum(size(t) for launch in plan for t in tensors(launch).values())
        row[part] = {"launches": len(plan), "asked": sum(map(moved, plan)), "unique": unique, "least": minimum}
    return row


def title(job: Job) -> str:
    """The kernel with what tells its specialisations apart."""
    constants = dict(job.constants)
    kinds = dict(job.signature)
    blocks = "×".join(str(v) for k, v in job.constants if k.startswith("BLOCK"))
    dtype = kinds.get("x_ptr", kinds.get("h_ptr", kinds.get("parts_ptr", "")))[1:]
    small = kinds[{"shrink": "w_ptr", "outer": "h_ptr"}[job.kernel]][1:] if job.kernel in ("shrink", "outer") else ""
    small = kinds.get("a_ptr", f"*{small}")[1:]
    marks = (
        ("mask", constants.get("DROPOUT")),
        ("dh", kinds.get("dh_ptr") == "*fp32"),
        ("turned", constants.get("TURNED")),
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


def report(every: list[Case], targets: list[str], names: list[str], processes: int) -> dict[str, Any]:
    """Prints both tables; returns what --json keeps."""
    plans = [
        (target, launch) for target in targets for case in every for part in launches(case, target) for launch in part
    ]
    jobs = dict.fromkeys(job(launch, target) for target, launch in plans if launch.kernel.fn.__name__ in names)
    rows = []
    for each, usage in compile_all(list(jobs), processes):
        limit = TARGETS[each.target][2]
        bad = usage["spills"] > 0 or usage["shared"] > limit or bool(usage["missing"])
        row: dict[str, Any] = {"target": each.target, "kernel": title(each), "warps": each.warps, "stages": each.stages}
        rows.append(row | usage | {"limit": limit, "bad": bad, "constants": {k: str(v) for k, v in each.constants}})
    print(
        f"\n{'target':8}{'kernel':44}{'warps':>6}{'stages':>7}{'registers':>11}{'spills':>8}{'shared':>9}{'of KiB':>8}"
    )
    for r in rows:
        remarks = ["too much"] * (r["spills"] > 0 or r["shared"] > r["limit"]) + [f"no {name}" for name in r["missing"]]
        print(f"{r['target']:8}{r['kernel']:44}{r['warps']:6}{r['stages']:7}{r['registers']:11}{r['spills']:8}"
              f"{r['shared']:9}{r['limit'] // KIB:8}{'  <-- ' * r['bad']}{', '.join(remarks)}")  # fmt: skip
    traffic = [bytes_report(case, target) for target in targets for case in every]
    print(f"\nMB moved, the frozen product apart unless gemm is it: {'least':>8}; once per launch (×); asked of L2 (×)")
    for t in traffic:
        case = " ".join(f"{k}={v}" for k, v in t["case"].items() if v is not False and v != "beta")
        line = f"{t['target']:8}{case:62}"
        for part in (part for part in ("forward", "backward") if t[part]["launches"]):
            count, least_bytes, once, asked = (t[part][key] for key in ("launches", "least", "unique", "asked"))
            line += f"{part:>9} {count}: {least_bytes / 1e6:7.1f} {once / least_bytes:5.2f} {asked / least_bytes:5.2f}"
        print(line)
    worst = [r for r in rows if r["bad"]]
    print(f"\n{len(rows)} kernels, {len(worst)} with spills, too much shared memory or missing instructions")
    return {"kernels": rows, "bytes": traffic, "bad": len(worst)}


def _list(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=_list, default=list(TARGETS), help=f"of {','.join(TARGETS)}")
    parser.add_argument("--ranks", type=lambda t: [int(r) for r in _list(t)], default=[8, 16, 64])
    parser.add_argument("--dtypes", type=_list, default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--kernels", type=_list, default=list(KERNEL_NAMES), help=f"of {','.join(KERNEL_NAMES)}")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--json", type=Path, help="keep the tables in this file")
    options = parser.parse_args()
    for name, known in (("targets", TARGETS), ("dtypes", DTYPES), ("kernels", KERNEL_NAMES)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {','.join(sorted(unknown))} is none of {','.join(known)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled; unset it")
    every = cases(options.ranks, options.dtypes)
    results = report(every, options.targets, options.kernels, options.processes)
    if options.json:
        temporary = options.json.with_name(options.json.name + ".tmp")  # whole or not at all
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(options.json)
    return int(results["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
