"""Run by test_replay.py without the interpreter: makes plans and runs kept ones under a driver that only records."""

import os
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from ilora.kernels import plans, primitives, replay
from ilora.kernels.device import Device
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

RECORDED: list[tuple[Any, ...]] = []
INPUTS: dict[int, str] = {}  # names by address
BUFFERS: dict[int, str] = {}


class Utilities:
    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, f"function {name}", 32, 0, 1024

    def unload_module(self, module: Any) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        RECORDED.append((x, y, z, stream, function, *map(described, rest[4:])))  # after metadata and hooks


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


def described(value: Any) -> Any:
    """A pointer, given as a tensor or as an address, by its input's name or its buffer's number; others as text."""
    address = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if isinstance(address, int) and address > 2**32:
        assert address % 16 == 0
        return INPUTS.get(address) or BUFFERS.setdefault(address, f"buffer {len(BUFFERS)}")
    if hasattr(value, "block_shape"):
        return described(value.base), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return str(value)


driver.set_active(Driver())
setattr(replay, "device_of", lambda x: Device(132, 227 * 1024, early=True, tma=True))  # noqa: B010


def tensors(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    shapes = {
        "dy": (2048, 128),
        "x": (2048, 64),
        "ranks": (2, 2048, 16),
        "weight": (128, 64),
        "A": (16, 64),
        "B": (128, 16),
    }
    made: dict[str, Any] = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    made |= {"gate": torch.rand(2, 4), "seed": torch.zeros(1, dtype=torch.int64)}
    INPUTS.clear()
    INPUTS.update({tensor.data_ptr(): name for name, tensor in made.items()})
    INPUTS[made["ranks"][1].data_ptr()] = "h"
    return made


def launches(seed: int, strategy: str, dropout_p: float = 0.1) -> list[tuple[Any, ...]]:
    """The launches of a forward and a backward, without their streams."""
    os.environ["ILORA_STRATEGY"] = strategy
    t = tensors(seed)
    RECORDED.clear()
    BUFFERS.clear()
    low = (t["A"], t["B"], t["gate"], None, 2.0, dropout_p, t["seed"] if dropout_p else None)
    primitives.forward(t["x"], t["weight"], None, None, *low)
    BUFFERS.clear()  # backward may reuse memory that forward has freed
    primitives.backward(t["dy"], t["x"], t["ranks"], t["weight"], *low, True)
    return [(*entry[:3], *entry[4:]) for entry in RECORDED]


for strategy, dropout_p, count in (("fused", 0.0, 4), ("fused", 0.1, 5), ("beta", 0.1, 7)):
    first = launches(1, strategy, dropout_p)
    kept = len(replay._KEPT)
    again = launches(2, strategy, dropout_p)
    assert len(first) == count, first
    assert len(replay._KEPT) == kept, "a plan was made twice"
    for one, other in zip(first, again, strict=True):
        assert one == other, f"{one}\n{other}"
plan = next(replay._KEPT[key] for key in replay._KEPT if key[0] is plans.backward and "beta" in key)
given, names = tensors(3), ("weight", "A", "B", "gate", None, "seed")
RECORDED.clear()
slots = [given["dy"], given["x"], *given["ranks"], *(given.get(name) for name in names)]
buffers = [torch.empty(shape, dtype=dtype) for shape, dtype in plan.buffers]
plan._launch([*slots, *buffers], torch.empty(plan.work, dtype=torch.uint8), {"stream": 3})
assert {entry[3] for entry in RECORDED} == {3}, "another stream"
starts = [offset for _, offset in plan.offsets]
sizes = [plan.buffers[slot - plan._first][0].numel() * plan.buffers[slot - plan._first][1].itemsize
         for slot, _ in plan.offsets]  # fmt: skip
assert len(starts) > 2
assert all(start + size <= after for start, size, after in zip(starts, sizes, [*starts[1:], plan.work], strict=True))
print("launched alike")
