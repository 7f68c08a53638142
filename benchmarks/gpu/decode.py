"""A few rows at inference, without gradients: the frozen layer, Triton's launch, the CUDA library's, and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from checking import TOLERANCE, WrongPeer
from measure import Program
from peers import Case, Settings, make_case
from torch import Tensor

import ilora.op.native
from ilora import reference

from .arms import Under, cuda_decode
from .ceilings import Calls
from .layer import attempt, time_both
from .machine import Machine, backend_of
from .plan import decode_rows, decodings

Call = Callable[[Tensor, Tensor], Tensor]  # x [M, d_in], gate [M, E] -> y [M, d_out]
RANK, EXPERTS = 16, 4
SECONDS = 0.04


def frozen(case: Case) -> Call:
    return lambda x, gate: F.linear(x, case.weight, case.bias)


def ours(case: Case) -> Call:
    backend = backend_of(case.x.device, case.x.dtype)
    fixed = (case.weight, case.bias, case.A, case.B)
    return lambda x, gate: ilora.ilora_linear(x, *fixed, gate, case.scaling, backend=backend)


def cuda(case: Case) -> Call:
    fixed = (case.weight, case.bias, case.A, case.B)
    return lambda x, gate: cuda_decode(x, *fixed, gate, case.scaling)


def peft(case: Case) -> Call:
    layer = peers.peft_lora(case).call
    return lambda x, gate: layer(x)


def arms_of(here: Machine, dtype: torch.dtype) -> tuple[dict[str, Callable[[Case], Call]], dict[str, str]]:
    """The arms that run here, and why the others do not."""
    every: dict[str, Callable[[Case], Call]] = {"frozen": frozen, "ilora": ours, "ilora[cuda]": cuda, "peft": peft}
    reasons = {
        "ilora[cuda]": "it wants a GPU" if here.dry else ilora.op.native.cuda_unavailable(),
        "peft": peers.unavailable("peft", here.device, dtype),
    }
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: build for name, build in every.items() if name not in missing}, missing


@torch.no_grad()
def measure(
    here: Machine, dtype: torch.dtype, quick: bool, left: Callable[[], float], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The part: a row for each shape, number of rows and arm."""
    arms, missing = arms_of(here, dtype)
    part: dict[str, Any] = {"rows": [], "unavailable": missing, "left_out": []}
    every = decode_rows(here.dry, quick)
    for d_in, d_out in decodings(here.dry):
        if left() <= 0:
            part["left_out"].append(f"no time for {d_in}→{d_out}")
            continue
        here.tidy()
        settings = Settings(d_in, d_out, max(every), 1, RANK, EXPERTS, 0.0, dtype, here.device)
        first = make_case(settings)
        size = sum(tensor.nbytes for tensor in first.constants)
        inputs = [first, *(make_case(settings, seed) for seed in range(1, here.sets(size)))]
        built: dict[str, list[Call]] = {}
        failed: dict[str, dict[str, Any]] = {name: {} for name in arms}
        for name, build in arms.items():
            if (calls := attempt(failed[name], "error", partial(_build, build, inputs))) is not None:
                built[name] = calls
        for M in every:
            rows = {name: _row(M, settings, name) | failed[name] for name in arms}
            _rows(here, M, inputs, built, rows)
            part["rows"] += rows.values()
        keep(part)
    return part


def _build(build: Callable[[Case], Call], inputs: list[Case]) -> list[Call]:
    return [build(case) for case in inputs]


def _row(M: int, settings: Settings, name: str) -> dict[str, Any]:
    s = settings
    read = s.d_in * s.d_out * s.dtype.itemsize
    return {"peer": name, "M": M, "d_in": s.d_in, "d_out": s.d_out, "rank": s.rank, "weight_bytes": read}


def _rows(
    here: Machine, M: int, inputs: list[Case], built: dict[str, list[Call]], rows: dict[str, dict[str, Any]]
) -> None:
    """Times every arm that is right on M rows of each input."""
    pairs = [(case.x.detach()[:M, 0], case.gate[:M]) for case in inputs]
    programs: dict[str, Program] = {}
    for name, calls in built.items():
        if attempt(rows[name], "error", partial(_check, name, inputs[0], calls[0], *pairs[0])):
            functions = [partial(call, *pair) for call, pair in zip(calls, pairs, strict=True)]
            programs[name] = Under(Calls(functions), "auto")
    if "frozen" not in programs:
        return
    time_both(here, rows, programs, SECONDS)


def _check(name: str, case: Case, call: Call, x: Tensor, gate: Tensor) -> bool:
    """True, or WrongPeer: y against the reference in float32."""
    gates = {"frozen": torch.zeros_like(gate), "peft": torch.full_like(gate, 1.0 / gate.shape[1])}
    low = (case.A.float(), case.B.float(), gates.get(name, gate).float())
    want = reference.ilora_linear(x.float(), case.weight.float(), case.bias.float(), *low, case.scaling)
    error = float((call(x, gate).float() - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE[x.dtype]:
        raise WrongPeer(f"y differs from the reference by {error:.2g} of its largest value")
    return True
