"""Whether the kernels are right on this device, by the tests' rule: the error against float64 is below twice that of
plain torch in the same dtype, give or take one rounding. And whether two runs give the same bits."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import ilora.op.native

from . import sanitizer, workers
from .arms import cuda_decode, using
from .machine import LostDevice, Machine, backend_of, loads_by_descriptor, reason_of

CASES: Any = importlib.import_module("cases")  # tests/cases.py: the rule is written there, once
DTYPES = {"bf16": CASES.BF16, "fp16": CASES.F16, "fp32": CASES.F32}
EVEN = {"M": 300, "N": 3, "d_in": 272, "d_out": 144}  # multiples of 16: read 16 bytes at a time
ODD = {"M": 67, "N": 1, "d_in": 131, "d_out": 97}
SEGMENTS = {"lengths": (0, 5, 0, 0, 90, 0), "d_in": 136, "d_out": 200}  # of 8 alone
LARGE = {"M": 4096, "N": 8, "d_in": 1024, "d_out": 4096}
TINY = {"M": 72, "N": 3, "d_in": 16, "d_out": 8}


class Check(NamedTuple):
    """What a process computes by itself. strategy "cuda": the CUDA library's decode instead of a strategy of Triton's;
    mixed: A and B in float32; table, pdl: what ILORA_TABLE and ILORA_PDL say while it runs."""

    shape: str
    strategy: str
    dtype: str
    R: int
    p: float
    fields: tuple[tuple[str, Any], ...]
    device: str
    mixed: bool = False
    table: str | None = None
    pdl: str | None = None

    def case(self) -> Any:
        adapter = CASES.F32 if self.mixed else None
        more = {"dtype": DTYPES[self.dtype], "adapter_dtype": adapter, "R": self.R, "E": 4, "dropout_p": self.p}
        return CASES.Case(device=self.device, **more, **dict(self.fields))


def checks(device: torch.device, quick: bool, dry: bool) -> list[Check]:
    """Every combination that the kernels take, in order of importance; in a dry run a few tiny ones."""
    every: list[Check] = []

    def add(shape: str, fields: dict[str, Any], strategy: str, rank: int, p: float, kind: tuple[str, bool]) -> None:
        dtype, mixed = kind
        every.append(Check(shape, strategy, dtype, rank, p, tuple(fields.items()), str(device), mixed))

    kinds = [("fp16", False)] if dry else [*((name, False) for name in DTYPES), ("bf16", True)]
    real: dict[str, dict[str, Any]] = {"even": EVEN, "empty segments": SEGMENTS, "odd": ODD}
    shapes = {"tiny": TINY} if dry else real
    few_sizes = {"few rows": (24, 16)} if dry else {"few rows": (272, 144), "few odd rows": (131, 97)}
    gemms = ("gemm", "whole") if loads_by_descriptor(device) else ("gemm",)
    library = device.type == "cuda" and ilora.op.native.cuda_unavailable() is None
    for rank, kind in itertools.product((16,) if quick or dry else (16, 8, 64), kinds):
        for p, (shape, fields) in itertools.product((0.0, 0.1), shapes.items()):
            add(shape, fields, "beta", rank, p, kind)
            if shape != "odd" and kind in (("bf16", False), ("fp16", False)):
                for strategy in gemms if rank <= 32 else gemms[:1]:
                    add(shape, fields, strategy, rank, p, kind)
        for M, (shape, (d_in, d_out)) in itertools.product(
            (16, 64) if quick or dry else (1, 7, 16, 64), few_sizes.items()
        ):
            for strategy in ("auto", "cuda") if library else ("auto",):
                add(shape, {"M": M, "N": M, "d_in": d_in, "d_out": d_out}, strategy, rank, 0.0, kind)
    for p, strategy in itertools.product(() if dry else (0.0, 0.1), ("beta", *gemms)):
        add("large", LARGE, strategy, 16, p, ("bf16", False))
    early = [each._replace(pdl="1") for each in every if each.R == 16 and each.dtype == "bf16" and not each.mixed]
    return every + [each for each in early if each.strategy != "cuda" and len(gemms) == 2]


_lost: list[str] = []  # this process's: once its device is gone, nothing that follows is a verdict


def work(check: Check) -> dict[str, Any]:
    """One row of the report; `problem` is None where the kernels are right."""
    row = {**check._asdict(), "fields": dict(check.fields)}
    if _lost:
        return row | {"problem": f"not run: its process had lost the device before ({_lost[0]})"}
    try:
        problem = _cuda_decode(check) if check.strategy == "cuda" else _update(check)
    except LostDevice as error:
        workers.leave(f"{check.shape}, {check.strategy}: {error}")
        _lost.append(f"{check.shape}, {check.strategy}: {error}")
        problem = str(error)
    return row | {"problem": problem}


def died(check: Check) -> dict[str, Any]:
    """The row of a check that took its process along."""
    return {**check._asdict(), "fields": dict(check.fields), "problem": workers.DIED}


def _update(check: Check) -> str | None:
    case = check.case()
    backend = backend_of(torch.device(check.device), torch.float32 if check.mixed else case.dtype)
    try:
        with using(check.strategy, check.table, check.pdl):
            first = CASES.run(case, backend)
            want = CASES.run(case, None, wide=True), CASES.run(case, None, wide=True, squared=True)
            CASES.within(case, first, CASES.run(case, None), *want)
            second = CASES.run(case, backend)  # launched again by what was kept of the first
    except Exception as error:  # a wrong answer, a kernel that does not compile: all are findings
        return reason_of(error)
    return _differing(first, second)


def _differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> str | None:
    names = [name for name in first if not torch.equal(first[name], second[name])]
    return f"two runs differ in {', '.join(names)}" if names else None


def _cuda_decode(check: Check) -> str | None:
    """y of the CUDA library by the same rule; above its rows for a weight, upon the frozen layer's output."""
    case = check.case()
    try:
        got, again = _decoded(case), _decoded(case)
        want, torchs = CASES.run(case, None, wide=True)["y"], CASES.run(case, None)["y"]
        size = CASES.run(case, None, wide=True, squared=True)["y"].max().sqrt().item()
    except Exception as error:
        return reason_of(error)
    ours, theirs = ((each.double() - want).abs().max().item() for each in (got, torchs))
    allowed = 2 * theirs + CASES.ROUNDING[case.dtype] * size
    if not ours <= allowed:
        return f"y: error {ours:.3g}, allowed {allowed:.3g}"
    return _differing({"y": got}, {"y": again})


def _decoded(case: Any) -> torch.Tensor:
    t = case.tensors()
    return cuda_decode(t["x"], t["weight"], t["bias"], t["A"], t["B"], t["gate"], 2.0)


def measure(here: Machine, quick: bool, processes: int, left: Callable[[], float]) -> dict[str, Any]:
    """The part. failed: rows with a problem, and what the sanitizer found or where it broke down; not_run: checks that
    there was no time for, a sanitizer that did not come to its end among them."""
    watching = sanitizer.start()
    every = checks(here.device, quick, here.dry)
    try:
        rows = [row for _, row in workers.done(work, every, processes, left, died)]
    finally:
        watched = sanitizer.finish(watching, left)
    failed = sum(row["problem"] is not None for row in rows)
    failed += sum(sanitizer.faults(each) for each in watched)
    not_run = len(every) - len(rows) + sum(not each["finished"] for each in watched)
    part = {"rows": rows, "failed": failed, "not_run": not_run, "sanitizer": watched}
    return part if watched else part | {"unavailable": {"compute-sanitizer": "it is not on the PATH"}}


def small(device: str) -> None:
    """A small layer by each strategy, for a memory checker to watch."""
    gemms = ("gemm", "whole") if loads_by_descriptor(torch.device(device)) else ("gemm",)
    for strategy, p in itertools.product(("beta", *gemms), (0.1, 0.0)):
        case = CASES.Case(M=96, N=3, R=16, d_in=136, d_out=200, dtype=CASES.F16, dropout_p=p, device=device)
        backend = backend_of(torch.device(device), case.dtype)
        with using(strategy):
            CASES.run(case, backend), CASES.run(case, backend)
    for M in (7, 40):
        case = CASES.Case(M=M, N=1, R=16, d_in=136, d_out=200, dtype=CASES.F16, device=device)
        with using("auto"):
            for _ in range(2):
                CASES.run(case, backend_of(torch.device(device), case.dtype))
        if device == "cuda" and ilora.op.native.cuda_unavailable() is None:
            _decoded(case)


if __name__ == "__main__":
    small("cuda" if torch.cuda.is_available() else "cpu")
    print("the small layers ran")
