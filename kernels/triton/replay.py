"""Plans that were made once, kept, and run again on other tensors.

Triton's `kernel[grid](…)` inspects every argument of every launch to find the compiled kernel, about 9 µs each time.
What it inspects, and what a plan is made from, follows from shapes, strides, dtypes, alignments and a few settings. So
a plan is kept by those, together with its compiled kernels and the place of every pointer, and `compiled[grid](…)`
inspects nothing.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton.tools.tensor_descriptor import TensorDescriptor

from .device import device_of
from .launch import INTERPRETER_LOCK, Launch, Plan, run

LIMIT = 4096  # plans kept, about ten kilobytes each: training on rows of varying length makes many
ALIGNMENT = 256  # bytes: where buffers begin in the workspace, as torch's tensors do


class Step(NamedTuple):
    """One launch without its tensors. runner: takes the kernel's arguments in order. values: the arguments, None where
    a tensor goes. tensors: (index of the argument, slot, bytes into it, None or the facts of a tensor descriptor)."""

    runner: Callable[..., Any]
    values: list[Any]
    tensors: list[tuple[int, int, int, tuple[Any, ...] | None]]


class KeptPlan:
    """A plan without its tensors. Slots number the inputs and then the buffers that each run allocates.

    buffers: (shape, dtype) of each, contiguous. results: the slots that a run returns. tensor_slots: the buffers that
    must be tensors: results, those behind descriptors, and in the interpreter all. offsets: (slot, offset) of the other
    buffers, which share one workspace of `work` bytes. Compiled kernels get addresses instead of tensors, so the
    launcher has no tensor to inspect.
    """

    def __init__(self, inputs: Sequence[Tensor | None], plan: Plan, compiled: Sequence[Any]) -> None:
        self.has_product = plan.has_product
        self.buffers: list[tuple[torch.Size, torch.dtype]] = []
        self._input_memory = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor is not None}
        self._slots = {tensor.data_ptr(): slot for slot, tensor in enumerate(inputs) if tensor is not None}
        self._first = len(inputs)
        self.results = [None if tensor is None else self._place(tensor)[0] for tensor in plan.results]
        self.steps = [self._step(launch, kernel) for launch, kernel in zip(plan.launches, compiled, strict=True)]
        del self._input_memory, self._slots  # addresses of tensors that are freed now
        self.compiled = any(kernel is not None for kernel in compiled)
        described = {slot for step in self.steps for _, slot, _, facts in step.tensors if facts is not None}
        self.tensor_slots, self.offsets, self.work = list[int](), list[tuple[int, int]](), 0
        for slot, (shape, dtype) in enumerate(self.buffers, self._first):
            if not self.compiled or slot in self.results or slot in described:
                self.tensor_slots.append(slot)
            else:
                self.offsets.append((slot, self.work))
                self.work += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """The slot of a tensor and how many bytes into it the tensor starts, by its address.

        A part of a buffer comes after the buffer itself. An input is not known by a part.
        """
        if tensor.data_ptr() in self._slots:
            return self._slots[tensor.data_ptr()], 0
        memory = tensor.untyped_storage().data_ptr()
        whole = tensor.data_ptr() == memory
        if memory in self._input_memory or not tensor.is_contiguous() or not (whole or memory in self._slots):
            raise ValueError(f"neither an input nor a buffer: {tuple(tensor.shape)}, strides {tensor.stride()}")
        if whole:
            self._slots[memory] = self._first + len(self.buffers)
            self.buffers.append((tensor.shape, tensor.dtype))
        return self._slots[memory], tensor.data_ptr() - memory

    def _step(self, launch: Launch, compiled: Any) -> Step:
        step = Step(launch.runner(compiled), launch.values(), [])
        for index, value in enumerate(step.values):
            if isinstance(value, Tensor):
                step.tensors.append((index, *self._place(value), None))
            elif isinstance(value, TensorDescriptor):
                facts = (value.shape, value.strides, value.block_shape)
                step.tensors.append((index, *self._place(value.base), facts))
        for index, _, _, _ in step.tensors:
            step.values[index] = None
        return step

    def run(self, inputs: Sequence[Tensor | None], x: Tensor) -> tuple[Any, ...]:
        """Launches the plan on other inputs, with new buffers, on x's device. Returns the results."""
        tensors: list[Any] = [*inputs, *[None] * len(self.buffers)]
        for slot in self.tensor_slots:
            shape, dtype = self.buffers[slot - self._first]
            tensors[slot] = torch.empty(shape, dtype=dtype, device=x.device)
        work = torch.empty(self.work, dtype=torch.uint8, device=x.device) if self.offsets else None
        with INTERPRETER_LOCK, torch.cuda.device_of(x):
            options = {"stream": torch.cuda.current_stream(x.device).cuda_stream} if x.is_cuda else {}
            self._launch(tensors, work, options)
        return tuple(None if slot is None else tensors[slot] for slot in self.results)

    def _launch(self, tensors: list[Any], work: Tensor | None, options: dict[str, Any]) -> None:
        pointers = tensors
        if self.compiled:
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            start = 0 if work is None else work.data_ptr()
            for slot, offset in self.offsets:
                pointers[slot] = start + offset
        for runner, values, places in self.steps:
            values = values.copy()
            for index, slot, within, facts in places:
                if facts is not None:
                    values[index] = TensorDescriptor(tensors[slot], *facts)
                elif self.compiled:
                    values[index] = pointers[slot] + within
                else:
                    tensor = tensors[slot]
                    values[index] = tensor.flatten()[within // tensor.element_size() :] if within else tensor
            runner(*values, **options)


_KEPT: dict[tuple[Any, ...], KeptPlan] = {}
_LOCK = threading.Lock()  # for changes; looking a plan up takes none


def _facts(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """All that a plan may depend on of a tensor."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16


def replay(
    make: Callable[..., Plan], inputs: Sequence[Tensor | None], settings: tuple[Any, ...]
) -> tuple[tuple[Any, ...], bool]:
    """Runs the plan make(device, *inputs, *settings). Returns its results and whether they have the frozen product.

    inputs: every tensor that a launch may read, the first not None. The plan may depend on nothing but their facts, the
    settings, the variables ILORA_STRATEGY, ILORA_GRAD_DY and ILORA_EARLY_START, and torch's float32 precision.
    Triton's own knobs are those of the first run: `forget` the plans when they change.
    """
    x = inputs[0]
    precision = torch.backends.cuda.matmul.fp32_precision
    forced = tuple(map(os.environ.get, ("ILORA_STRATEGY", "ILORA_GRAD_DY", "ILORA_EARLY_START")))
    key = (make, settings, x.device, *forced, precision, *map(_facts, inputs))
    kept = _KEPT.get(key)
    if kept is not None:
        return kept.run(inputs, x), kept.has_product
    plan = make(device_of(x), *inputs, *settings)
    compiled = run(plan.launches, x)
    addresses = [tensor.data_ptr() for tensor in inputs if tensor is not None]
    if plan.launches and len(set(addresses)) == len(addresses):  # else an address does not tell which input is meant
        made = KeptPlan(inputs, plan, compiled)
        with _LOCK:
            while len(_KEPT) >= LIMIT:
                del _KEPT[next(iter(_KEPT))]
            _KEPT[key] = made
    return plan.results, plan.has_product


def forget() -> None:
    """Drops all kept plans."""
    with _LOCK:
        _KEPT.clear()
