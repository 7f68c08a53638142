"""The layers whose launches `kernel_report.py` looks at, and those launches, for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
TMEM = {"sm_100": 512}  # columns of tensor memory
DESCRIPTORS = ("sm_90", "sm_100")  # load tiles by descriptor; elsewhere descriptors become plain loads


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
    """The same layer by one GEMM, of either kind: every rank that it takes; p = 0, few rows, sizes no block divides."""
    every = [Case("bf16", R, 0.1, strategy="gemm") for R in ranks]
    every += [Case("bf16", first, 0.0, d_out=1024, strategy="gemm")]
    every += [Case("bf16", first, 0.1, M=100, d_in=1000, d_out=776, strategy="gemm")]
    few = [R for R in ranks if R <= 32 and R % 8 == 0]
    every += [Case("bf16", R, p, strategy="whole") for R in few for p in (0.0, 0.1)]
    every += [Case("bf16", few[-1], p, d_in=1024, d_out=1024, token=True, strategy="whole") for p in (0.0, 0.1) if few]
    every += [Case("bf16", few[-1], p, M=100, d_in=1000, d_out=776, strategy="whole") for p in (0.0, 0.1) if few]
    return [case for case in every if case.R <= 128]  # above, gemm refuses


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


def launches(case: Case, target: str, pdl: bool = False) -> tuple[list[Any], list[Any]]:
    """What forward and backward would launch there, on meta tensors; pdl: by programmatic dependent launch, on targets
    that have it."""
    package = kernels()
    arch, sms, smem = TARGETS[target]
    device = package.launch.Device(sms, smem, hip=arch[0] == "hip", tma=target in DESCRIPTORS,
                                   tmem=TMEM.get(target, 0), pdl=pdl and target in DESCRIPTORS)  # fmt: skip
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
    if case.strategy == "whole" and not device.tma:  # refused
        return [], []
    forward, backward = package.update.Update(*common), package.update.Update(*common)
    _, xa = forward.forward(empty(case.d_out), None, weight)
    backward.backward(empty(case.M, case.d_out), xa, True, weight)
    return forward.plan(())[0], backward.plan(())[0]
