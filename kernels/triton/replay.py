"""Plans that were made and compiled once, launched again on other tensors without planning them anew.

Triton's `kernel[grid](…)` looks at every argument of every launch to find the compiled kernel, some 9 µs each time. All
that it looks at, and all that a plan is made of, follows from shapes, strides, dtypes, alignment and a few settings: a
plan is kept by those, with the place of every pointer in it, and `compiled[grid](…)` asks nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, run

LIMIT = 4096  # plans kept: a training with rows of every length meets many, and each takes some ten kilobytes
ALIGNED = 256  # bytes: buffers of a workspace begin at multiples of this, as tensors do

Plan = tuple[list[Launch], tuple[Any, ...], bool]  # launches, results, whether the frozen product is in them


class Step(NamedTuple):
    """runner: takes the kernel's arguments in order. values: those, None where a pointer goes. pointers: (index, slot);
    descriptors: (index, slot, what a tensor descriptor says of its tensor)."""

    runner: Callable[..., Any]
    values: list[Any]
    pointers: list[tuple[int, int]]
    descriptors: list[tuple[int, int, tuple[Any, ...]]]


class Replay:
    """A plan without its tensors: slots hold the inputs, then the buffers that it allocates.

    buffers: (shape, dtype) each, contiguous. results: the slots of what it returns. fresh: the slots of buffers that
    are tensors: results, what descriptors describe, or all in the interpreter. places: (slot, offset) of the others, in
    one workspace of `work` bytes: compiled kernels take addresses, and the launcher then looks at no tensor.
    """

    def __init__(self, inputs: Sequence[Tensor | None], plan: Plan, compiled: Sequence[Any]) -> None:
        launches, results, self.fused = plan
        self.buffers: list[tuple[torch.Size, torch.dtype]] = []
        self._given = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor is not None}
        self._slots = {tensor.data_ptr(): slot for slot, tensor in enumerate(inputs) if tensor is not None}
        self._first = len(inputs)
        self.results = [None if tensor is None else self._slot(tensor) for tensor in results]
        self.steps = [self._step(launch, kernel) for launch, kernel in zip(launches, compiled, strict=True)]
        del self._given, self._slots  # of tensors that are let go now
        self.compiled = any(kernel is not None for kernel in compiled)
        described = {slot for step in self.steps for _, slot, _ in step.descriptors}
        self.fresh, self.places, self.work = list[int](), list[tuple[int, int]](), 0
        for slot, (shape, dtype) in enumerate(self.buffers, self._first):
            if not self.compiled or slot in self.results or slot in described:
                self.fresh.append(slot)
            else:
                self.places.append((slot, self.work))
                self.work += -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED

    def _slot(self, tensor: Tensor) -> int:
        """By its address, which a view that starts where its base does has too."""
        if tensor.data_ptr() not in self._slots:
            memory = tensor.untyped_storage().data_ptr()
            if memory in self._given or not tensor.is_contiguous() or tensor.data_ptr() != memory:
                raise ValueError(f"no buffer of a plan's own: {tuple(tensor.shape)}, strides {tensor.stride()}")
            self._slots[tensor.data_ptr()] = self._first + len(self.buffers)
            self.buffers.append((tensor.shape, tensor.dtype))
        return self._slots[tensor.data_ptr()]

    def _step(self, launch: Launch, compiled: Any) -> Step:
        step = Step(launch.runner(compiled), list(launch.values()), [], [])
        for index, value in enumerate(step.values):
            if isinstance(value, Tensor):
                step.pointers.append((index, self._slot(value)))
            elif isinstance(value, TensorDescriptor):
                said = (value.shape, value.strides, value.block_shape)
                step.descriptors.append((index, self._slot(value.base), said))
            else:
                continue
            step.values[index] = None
        return step

    def again(self, inputs: Sequence[Tensor | None], device: torch.device) -> tuple[Any, ...]:
        """Launches it on other inputs, in new buffers; the results."""
        tensors: list[Any] = [*inputs, *[None] * len(self.buffers)]
        for slot in self.fresh:
            shape, dtype = self.buffers[slot - self._first]
            tensors[slot] = torch.empty(shape, dtype=dtype, device=device)
        work = torch.empty(self.work, dtype=torch.uint8, device=device) if self.places else None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._launch(tensors, work, {"stream": torch.cuda.current_stream(device).cuda_stream})
        else:
            self._launch(tensors, work, {})
        return tuple(None if slot is None else tensors[slot] for slot in self.results)

    def _launch(self, tensors: list[Any], work: Tensor | None, options: dict[str, Any]) -> None:
        slots = tensors
        if self.compiled:
            slots = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            start = 0 if work is None else work.data_ptr()
            for slot, offset in self.places:
                slots[slot] = start + offset
        for runner, values, pointers, descriptors in self.steps:
            values = values.copy()
            for index, slot in pointers:
                values[index] = slots[slot]
            for index, slot, said in descriptors:
                values[index] = TensorDescriptor(tensors[slot], *said)
            runner(*values, **options)


_KEPT: dict[tuple[Any, ...], Replay] = {}
_CHANGING = threading.Lock()  # looking up takes none


def _facts(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """All that a plan may know of a tensor."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16


def planned(
    name: str, settings: tuple[Any, ...], x: Tensor, inputs: Sequence[Tensor | None], make: Callable[[], Plan]
) -> tuple[tuple[Any, ...], bool]:
    """(results, whether the frozen product is in them) of the plan `make` would make for these inputs, launched.

    A pure function of (name, settings), the inputs' facts and what ILORA_STRATEGY, ILORA_TABLE, ILORA_PDL and torch's
    float32 precision say; Triton's own knobs are those of the first call (`forget` when they change). inputs: every
    tensor of the caller's that a launch may point at, or None; x: on whose device it runs.
    """
    asked = (os.environ.get("ILORA_STRATEGY"), os.environ.get("ILORA_TABLE"), os.environ.get("ILORA_PDL"))
    precision = torch.backends.cuda.matmul.fp32_precision
    key = (name, settings, x.device, asked, precision, *map(_facts, inputs))
    kept = _KEPT.get(key)
    if kept is not None:
        return kept.again(inputs, x.device), kept.fused
    plan = make()
    compiled = run(plan[0], x.device)
    places = [tensor.data_ptr() for tensor in inputs if tensor is not None]
    if plan[0] and len(set(places)) == len(places):  # one address in two places does not tell which is meant
        made = Replay(inputs, plan, compiled)
        with _CHANGING:
            while len(_KEPT) >= LIMIT:
                del _KEPT[next(iter(_KEPT))]
            _KEPT[key] = made
    return plan[1], plan[2]


def forget() -> None:
    """Lets go of all kept plans."""
    with _CHANGING:
        _KEPT.clear()
