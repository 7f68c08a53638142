"""What a call costs the host, on tensors so small that the device waits: a frozen linear, our layer, PEFT's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from peers import Settings, make_case
from torch import Tensor, nn

import ilora

from .arms import using
from .layer import attempt
from .machine import Machine

CALLS, BATCHES, SIDE = 40, 15, 64  # calls in a batch are fewer than a device's queue takes


def measure(here: Machine, dtype: torch.dtype) -> dict[str, Any]:
    """The part: microseconds a call, by rows; 8 are decoding's, 128 are not."""
    part: dict[str, Any] = {"rows": [], "unavailable": {}}
    for M in (8, 128):
        case = make_case(Settings(SIDE, SIDE, 8, M // 8, 16, 4, 0.0, dtype, here.device))
        linear = nn.Linear(SIDE, SIDE, device=here.device, dtype=dtype).requires_grad_(False)
        layer = ilora.ILoRALinear(linear, r=16, num_experts=4)
        functions: dict[str, Callable[[], Tensor]] = {
            "frozen": partial(linear, case.x),
            "ilora layer": partial(layer, case.x, gate=case.gate),
            "ilora_linear": partial(
                ilora.ilora_linear, case.x, case.weight, case.bias, case.A, case.B, case.gate, case.scaling
            ),
        }
        if (reason := peers.unavailable("peft", here.device, dtype)) is None:
            functions["peft"] = partial(peers.peft_lora(case).call, case.x)
        else:
            part["unavailable"]["peft"] = reason
        for name, function in functions.items():
            row: dict[str, Any] = {"peer": name, "M": M}
            attempt(row, "error", partial(_times, here, function, case.dy, row))
            part["rows"].append(row)
    return part


def _times(here: Machine, function: Callable[[], Tensor], dy: Tensor, row: dict[str, Any]) -> None:
    def both() -> None:
        function().backward(dy)

    def inference() -> None:
        with torch.no_grad():
            function()

    with using("auto"):
        for name, call in (("inference", inference), ("forward", function), ("both", both)):
            row[name] = _microseconds(here, call)


def _microseconds(here: Machine, call: Callable[[], object]) -> dict[str, float]:
    """The median over batches of calls, and the fastest batch: of the host's time until all are queued."""
    batches, calls = (2, 3) if here.dry else (BATCHES, CALLS)
    times = []
    for _ in range(batches + 2):
        here.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    here.wait()
    return {"us": statistics.median(times[2:]), "best_us": min(times[2:])}
