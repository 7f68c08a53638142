"""The layers whose launches `kernel_report.py` compiles and counts, and those launches, for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import math
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
DTYPES = {  # of the activations, and of A and B
    "bf16": (torch.bfloat16,) * 2, "fp16": (torch.float16,) * 2, "mixed": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32,) * 2,
}  # fmt: skip
TMEM = {"sm_100": 512}  # columns of tensor memory
TMA = ("sm_90", "sm_100")  # copy tiles by tensor descriptor, and start kernels early
SQUARE: dict[str, Any] = {"d_in": 1024, "d_out": 1024, "token": True}
SMALL: dict[str, Any] = {"M": 100, "d_in": 1000, "d_out": 776}  # no block divides these


class Case(NamedTuple):
    """One layer and its input. token: a gate row for every row, else 32 instances in segments. strategy: "beta",
    "fused", "decode" for the one launch of a few rows, or "grouped" for rows sorted by slot, of `slots` slots."""

    dtypes: str
    R: int
    p: float
    M: int = 4096
    d_in: int = 4096
    d_out: int = 4096
    token: bool = False
    strategy: str = "beta"
    slots: int = 0


def cases(ranks: list[int], dtypes: list[str]) -> list[Case]:
    """The typical layer at every rank with dropout, and at one rank its variants: p = 0, few rows, odd sizes."""
    every = [Case(dtype, R, 0.1) for dtype in dtypes for R in ranks if dtype != "fp32"]
    first, main = ranks[len(ranks) > 1], dtypes[0]
    every += [Case(main, 2, 0.1)]  # fewer ranks than experts elsewhere: two experts of one rank
    every += [Case(main, first, 0.0), Case(main, first, 0.0, M=1, token=True)]
    every += [Case(main, first, 0.1, M=1000, d_in=1001, d_out=777), Case(main, first, 0.1, d_out=1024, token=True)]
    every += [Case("fp32", R, 0.1) for R in ranks if "fp32" in dtypes]
    every += [Case(dtype, R, 0.0, M, token=True, strategy="decode") for dtype in dtypes for R in ranks for M in (1, 64)]
    every += [Case(main, first, 0.0, 16, d_out=14336, token=True, strategy="decode")]
    every += [Case(main, first, 0.0, 16, 1001, 777, token=True, strategy="decode")]
    every += [Case(dtype, R, p, strategy="grouped", slots=64) for dtype in dtypes for R in ranks for p in (0.0, 0.1)]
    every += [Case(main, first, 0.1, strategy="grouped", slots=1)]
    every += [Case(main, first, 0.1, **SMALL, strategy="grouped", slots=8)]  # few rows a slot
    few = [R for R in ranks if R <= 32 and R % 8 == 0]
    if "bf16" in dtypes and few:
        shapes: list[tuple[int, dict[str, Any]]] = [(R, {}) for R in few] + [(few[-1], SQUARE), (few[-1], SMALL)]
        every += [Case("bf16", R, p, strategy="fused", **shape) for R, shape in shapes for p in (0.0, 0.1)]
    return every


def kernels() -> Any:
    """The package kernels/triton of this checkout, whatever is installed."""
    if "ilora_kernels" not in sys.modules:
        file = KERNELS / "__init__.py"
        spec = importlib.util.spec_from_file_location("ilora_kernels", file, submodule_search_locations=[str(KERNELS)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["ilora_kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ilora_kernels"])
        importlib.import_module("ilora_kernels.grouped")
    return sys.modules["ilora_kernels"]


def launches(case: Case, target: str) -> tuple[list[Any], list[Any]]:
    """What forward and backward would launch there, on meta tensors; nothing where the strategy cannot run there."""
    package = kernels()
    arch, sms, smem = TARGETS[target]
    device = package.device.Device(
        sms, smem, hip=arch[0] == "hip", early=target in TMA, tma=target in TMA, tmem=TMEM.get(target, 0)
    )
    x_type, a_type = DTYPES[case.dtypes]
    N, E = (case.M if case.token else 32), math.gcd(case.R, 4)

    def empty(*shape: int, dtype: torch.dtype = x_type) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    segments = None if case.token else empty(N + 1, dtype=torch.int32)
    A, B = empty(case.R, case.d_in, dtype=a_type), empty(case.d_out, case.R, dtype=a_type)
    gate, seed = empty(N, E, dtype=torch.float32), empty(1, dtype=torch.int64) if case.p else None
    x, dy, weight = empty(case.M, case.d_in), empty(case.M, case.d_out), empty(case.d_out, case.d_in)
    if case.strategy == "grouped":
        return grouped_launches(case, device, x, dy, weight, A, B, gate, seed)
    low = (A, B, gate, segments, seed, 2.0, case.p)
    decoding = case.strategy == "decode"
    if (decoding and not package.decode.decodes(x, A, case.p)) or (case.strategy == "fused" and not device.tma):
        return [], []
    strategy = "auto" if decoding else case.strategy
    forward = package.plans.forward(device, x, weight, empty(case.d_out), None, *low, strategy)
    if decoding:
        return forward.launches, []
    xa, h = forward.results[1]
    return forward.launches, package.plans.backward(device, dy, x, xa, h, weight, *low, True, strategy).launches


def grouped_launches(case: Case, device: Any, *tensors: Any) -> tuple[list[Any], list[Any]]:
    """As `launches`, for the four primitives of the grouped operation, and for the frozen products where torch has no
    grouped product without a wait for the GPU."""
    x, dy, weight, A, B, gate, seed = tensors
    plans, X = kernels().grouped_plans, case.slots
    A, B, weight = (t.expand(X, *t.shape).contiguous() for t in (A, B, weight))
    bias = weight.new_empty(X, case.d_out)
    offsets, instances = (torch.empty(n, dtype=torch.int32, device="meta") for n in (X + 1, case.M))
    gating = (offsets, gate, instances, 2.0)
    first = plans.shrink_x(device, x, A, offsets, seed, case.p)
    product = plans.frozen(device, x, weight, offsets)
    second = plans.expand_xa(device, x, first.results[0], bias, product.results[0], B, *gating, True)
    third = plans.backward_dy(device, dy, first.results[0], B, *gating)
    back = plans.frozen(device, dy, weight.mT, offsets)
    inputs = (x, third.results[0], A, offsets, back.results[0], seed)
    fourth = plans.backward_x(device, *inputs, case.p, True)
    sums = plans.gate_sums(device, third.results[2], torch.empty_like(offsets), gate)
    return [each for plan in (first, product, second) for each in plan.launches], [
        each for plan in (third, sums, back, fourth) for each in plan.launches
    ]
