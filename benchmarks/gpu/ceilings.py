"""What the device can do at most, measured by itself: bytes copied a second, and bfloat16 products."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from measure import time_once
from torch import Tensor

from .machine import Machine


class Calls:
    """Functions called one after another, as one part: what they return is kept until the next time."""

    queued = False

    def __init__(self, functions: Sequence[Callable[[], Tensor]]) -> None:
        self.functions, self.sets, self.outputs = functions, len(functions), list[Tensor]()

    @property
    def parts(self) -> Sequence[Callable[[], object]]:
        return (self.run,)

    def run(self) -> None:
        self.outputs = [function() for function in self.functions]


def measure(here: Machine) -> dict[str, float]:
    """copy_bytes: read plus written a second; flops: of a large square bfloat16 product of random numbers."""
    ceilings = {"copy_bytes": _copy_bytes(here, 2**16 if here.dry else 2**30)}
    here.tidy()
    return ceilings | {"flops": _flops(here, 64 if here.dry else 8192)}


def _copy_bytes(here: Machine, size: int) -> float:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=here.device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(here, [partial(target.copy_, source)] * 4)


def _flops(here: Machine, side: int) -> float:
    pairs = [[torch.randn(side, side, device=here.device).bfloat16() for _ in range(2)] for _ in range(2)]
    return 2 * side**3 / _seconds(here, [partial(torch.mm, *pair) for pair in pairs])


def _seconds(here: Machine, functions: list[Callable[[], Tensor]], rounds: int = 15) -> float:
    program = here.graphed(Calls(functions))
    here.warm_up(0.2)
    return statistics.median(time_once(program, here.device)[0] for _ in range(rounds)) / 1e3
