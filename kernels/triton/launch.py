"""A kernel launch as data, and a plan: the launches of one call in order, with the tensors that they fill."""

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .device import Device, dots

# Triton's interpreter puts its own functions into triton.language while a kernel runs, and keeps the place in the grid
# in a global: it runs one kernel at a time. Compiled kernels are launched by all threads at once.
INTERPRETER_LOCK: Any = threading.Lock() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait for the previous kernel, then let the next be scheduled. Code after this call may read anything earlier
    kernels wrote. Every kernel calls it first, so that this holds for all kernels before."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def starts_early() -> bool:
    """Whether kernels may be scheduled while the one before still runs: yes, unless ILORA_EARLY_START is 0. Raises
    ValueError for an unknown value."""
    value = os.environ.get("ILORA_EARLY_START") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"ILORA_EARLY_START={value!r}: expected 0 or 1")
    return value == "1"


class Launch(NamedTuple):
    """One kernel launch. args: the kernel's arguments by name, constants included. early: whether it may be scheduled
    before the kernel before it ends (programmatic dependent launch). Calling it launches the kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    warps: int = 4
    stages: int = 2
    early: bool = False

    @property
    def options(self) -> dict[str, Any]:
        early = {"launch_pdl": True} if self.early else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **early}

    def __call__(self) -> Any:
        """Launches the kernel. Returns Triton's compiled kernel, or None in the interpreter."""
        compiled = self.kernel[self.grid](**self.args, **self.options)
        return compiled.result() if hasattr(type(compiled), "result") else compiled  # under triton.AsyncCompileMode

    def values(self) -> list[Any]:
        """The arguments in the order of the kernel's signature."""
        return [self.args[name] for name in self.kernel.arg_names]

    def runner(self, compiled: Any) -> Callable[..., Any]:
        """A function that launches the compiled kernel (or the interpreted one) on other values of the same kinds."""
        if compiled is not None:
            return compiled[(*self.grid, 1, 1)[:3]]
        return partial(self.kernel[self.grid], **self.options)


def run(launches: list[Launch], x: Tensor) -> list[Any]:
    """Launches all in order on the current stream of x's device, without waiting. Returns what each launch returns."""
    with INTERPRETER_LOCK, torch.cuda.device_of(x):
        return [launch() for launch in launches]


class Plan:
    """The launches of one call. `add_NAME` beside each kernel appends a launch of it and returns what it will fill.

    Listing launches runs nothing, so the tensors may be on the meta device, and `device` a GPU that is not here.
    results: what the call returns. has_product: whether the launches compute the frozen product too.
    """

    def __init__(self, device: Device, x: Tensor, A: Tensor) -> None:
        """x: any of the activations. A: A or B."""
        self.device, self.dots = device, dots(device, x.dtype, A.dtype)
        self._x, self._rank_dtype = x, torch.promote_types(x.dtype, A.dtype)
        self._early = device.early and starts_early()
        self.launches: list[Launch] = []
        self.results: tuple[Tensor | None, ...] = ()
        self.has_product = False

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: dict[str, Any], warps: int = 4, stages: int = 2
    ) -> None:  # fmt: skip
        """Appends a launch. args: all of the kernel's but EARLY."""
        self.launches.append(Launch(kernel, grid, {**args, "EARLY": self._early}, warps, stages, self._early))

    def returning(self, *results: Tensor | None) -> "Plan":
        self.results = results
        return self

    def new_wide(self, M: int, D: int) -> Tensor:
        """An empty [M, D] in the dtype of the activations."""
        return self._x.new_empty(M, D)

    def new_ranks(self, *shape: int) -> Tensor:
        """An empty [..., M, R] in the dtype that ranks have between launches."""
        return self._x.new_empty(shape, dtype=self._rank_dtype)


def new_parts(count: int, out: Tensor) -> Tensor:
    """Room for `count` partial sums of `out`, [count, …] float32; or `out` itself where there is just one."""
    return out if count == 1 else out.new_empty(count, *out.shape, dtype=torch.float32)
