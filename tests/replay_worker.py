"""Run by test_replay.py without the interpreter: launches and launches again under a driver that only takes notes."""

import os
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from ilora.kernels import launch, replay, update
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

NOTED: list[tuple[Any, ...]] = []
EARLY: list[bool] = []  # of each launch, whether it is a programmatic dependent one


class Utilities:
    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, f"function {name}", 32, 0, 1024

    def unload_module(self, module: Any) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.early = metadata["launch_pdl"] if isinstance(metadata, dict) else metadata.launch_pdl

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        EARLY.append(self.early)
        NOTED.append((x, y, z, stream, function, *map(noted, rest[4:])))  # after metadata and hooks


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


def noted(value: Any) -> Any:
    """A pointer, given as a tensor or as its address, by the name of what it points at; others by when they came."""
    address = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if isinstance(address, int) and address > 2**32:
        assert address % 16 == 0
        return PLACES.get(address) or NAMES.setdefault(address, f"buffer {len(NAMES)}")
    if hasattr(value, "block_shape"):
        return noted(value.base), value.shape, value.strides, value.block_shape
    return str(value)


driver.set_active(Driver())
PLACES: dict[int, str] = {}
NAMES: dict[int, str] = {}
DEVICE = launch.Device(132, 227 * 1024, tma=True, name="noted")
setattr(update, "device_of", lambda x: DEVICE._replace(pdl=os.environ.get("ILORA_PDL") == "1"))  # noqa: B010


def tensors(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    shapes = {"dy": (256, 128), "x": (256, 64), "xa": (256, 16), "weight": (128, 64), "A": (16, 64), "B": (128, 16)}
    made: dict[str, Any] = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    made |= {"gate": torch.rand(2, 4), "seed": torch.zeros(1, dtype=torch.int64)}
    PLACES.clear()
    PLACES.update({tensor.data_ptr(): name for name, tensor in made.items()})
    return made


def launches(seed: int, strategy: str, dropout_p: float = 0.1) -> list[tuple[Any, ...]]:
    os.environ["ILORA_STRATEGY"] = strategy
    t = tensors(seed)
    NOTED.clear()
    NAMES.clear()
    low = (t["A"], t["B"], t["gate"], None, 2.0, dropout_p, t["seed"] if dropout_p else None)
    update.forward(t["x"], t["weight"], None, None, *low)
    NAMES.clear()  # a backward may find what the forward has let go
    update.backward(t["dy"], t["x"], t["xa"], t["weight"], *low, True)
    return [(*entry[:3], *entry[4:]) for entry in NOTED]


for strategy, dropout_p, count in (("whole", 0.0, 4), ("whole", 0.1, 5), ("beta", 0.1, 9), ("gemm", 0.1, 9)):
    first = launches(1, strategy, dropout_p)
    kept = len(replay._KEPT)
    again = launches(2, strategy, dropout_p)
    assert len(first) == count, first
    assert len(replay._KEPT) == kept, "a plan was made twice"
    for one, other in zip(first, again, strict=True):
        assert one == other, f"{one}\n{other}"
    assert not any(EARLY)
    os.environ["ILORA_PDL"] = "1"
    EARLY.clear()
    early, again = launches(1, strategy, dropout_p), launches(2, strategy, dropout_p)
    assert early == again
    assert [entry[:3] for entry in early] == [entry[:3] for entry in first]
    assert len(EARLY) == 2 * count
    assert all(EARLY)
    EARLY.clear()
    del os.environ["ILORA_PDL"]
kept = replay._KEPT[next(key for key in replay._KEPT if key[0] == "backward")]
names = ("dy", "x", "xa", "weight", "A", "B", "gate", None, "seed")
given = tensors(3)
NOTED.clear()
slots = [given[name] if name else None for name in names]
buffers = [torch.empty(shape, dtype=dtype) for shape, dtype in kept.buffers]
work = torch.empty(kept.work, dtype=torch.uint8)
kept._launch([*slots, *buffers], work, {"stream": 3})
assert {entry[3] for entry in NOTED} == {3}, "another stream"
ends = [offset + kept.buffers[slot - kept._first][0].numel() * kept.buffers[slot - kept._first][1].itemsize
        for slot, offset in kept.places]  # fmt: skip
starts = [offset for _, offset in kept.places][1:] + [kept.work]
assert len(ends) > 2
assert all(end <= start for end, start in zip(ends, starts, strict=True)), "buffers overlap"
print("launched alike")
