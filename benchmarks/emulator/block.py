"""A thread block: registers, control flow, loads and stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from .formats import BITS, Array, U, low_bits
from .program import Instruction, Program
from .shared_memory import START, SharedMemory


class Memory(NamedTuple):
    """A tensor's storage: its address and its bytes."""

    address: int
    bytes: Array


class Descriptor(NamedTuple):
    """What a tensor descriptor says: the matrix as uint16, rows and columns of a box, bytes of a swizzled row."""

    matrix: Array
    rows: int
    columns: int
    span: int


Mask = Array | None  # the threads that take an instruction; None for all
Operation = Callable[["Block", Instruction, Mask], None]
OPERATIONS: dict[str, Operation] = {}  # by the start of an instruction's name
ORDERING = (  # instructions that order only what is in order here
    "cp.async.bulk.commit_group", "mbarrier.inval", "bar.warp", "fence", "membar", "griddepcontrol", "wgmma.fence",
    "prefetch",
)  # fmt: skip


def operation(*starts: str) -> Callable[[Operation], Operation]:
    """Marks the function that carries out the instructions whose names start so."""

    def enter(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(starts, function))
        return function

    return enter


@cache
def find_operation(name: str) -> Operation | None:
    """The operation with the longest start that fits."""
    fitting = [start for start in OPERATIONS if name.startswith(start)]
    return OPERATIONS[max(fitting, key=len)] if fitting else None


@operation(*ORDERING)
def _nothing(block: Block, this: Instruction, active: Mask) -> None: ...


def emulate(
    program: Program, values: list[int], memory: list[Memory], descriptors: dict[int, Descriptor], shared: int,
    grid: tuple[int, ...],
) -> Counter[str]:  # fmt: skip
    """Runs every block of the grid, one after another; returns the hazards, each with how often it was seen.

    values: of the parameters, in order. descriptors: by the value that stands for their address. shared: bytes.
    """
    hazards: Counter[str] = Counter()
    parameters = dict(zip(program.parameters, values, strict=True))
    for z, y, x in np.ndindex(*grid[::-1]):
        Block(program, parameters, memory, descriptors, shared, (x, y, z), grid, hazards).run()
    return hazards


class Block:
    def __init__(
        self, program: Program, parameters: dict[str, int], memory: list[Memory], descriptors: dict[int, Descriptor],
        shared: int, place: tuple[int, ...], grid: tuple[int, ...], hazards: Counter[str],
    ) -> None:  # fmt: skip
        self.program, self._memory, self.descriptors, self._hazards = program, memory, descriptors, hazards
        self.threads = program.threads
        self.thread = np.arange(self.threads).astype(U)
        self.lane, self.warp = self.thread % U(32), np.arange(self.threads) // 32
        self.shared = SharedMemory(shared, self.hazard)
        self.registers: dict[str, Array] = {}
        self._constants: dict[str, Array] = {"%tid.x": self.thread, "%laneid": self.lane}
        fixed = {"%tid.y": 0, "%tid.z": 0, "global_smem": START, "true": 1, "false": 0, **parameters}
        fixed |= {f"%ctaid.{axis}": at for axis, at in zip("xyz", place, strict=True)}
        fixed |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        self._constants |= {name: self.full(value) for name, value in fixed.items()}
        self.copies: list[list[tuple[Array, Array, Array]]] = [[]]  # groups of cp.async, the last still open
        self.products: list[int] = [0]  # wgmma in each group, the last still open
        self.barriers: dict[int, dict[str, int]] = {}
        self.boxes: dict[int, list[tuple[Array, Array]]] = {}  # by barrier: what TMA brings
        self.now = program.instructions[0]

    def run(self) -> None:
        at, code = 0, self.program.instructions
        while code[at].name != "ret" or not self._active(code[at])[0]:
            self.now = this = code[at]
            at += 1
            some, active = self._active(this)
            if not some:
                continue
            if this.name.startswith("bra"):
                if active is not None and not active.all():
                    raise NotImplementedError(f"threads of a block part at {this.text}")
                at = self.program.labels[this.operands[0]]
                continue
            function = find_operation(this.name)
            if function is None:
                raise NotImplementedError(this.text)
            function(self, this, active)

    def _active(self, this: Instruction) -> tuple[bool, Mask]:
        """Whether any thread takes the instruction, and which."""
        if this.guard is None:
            return True, None
        active = (self.registers[this.guard] != 0) ^ this.negated
        return bool(active.any()), active

    def hazard(self, kind: str) -> None:
        self._hazards[f"{kind} in {self.program.name}: {self.now.text[:100]}"] += 1

    # ---- registers

    def full(self, value: int) -> Array:
        return np.full(self.threads, value & 0xFFFFFFFFFFFFFFFF, U)

    def value(self, operand: str) -> Array:
        """Of a register, a parameter or a number."""
        if operand in self.registers:
            return self.registers[operand]
        if operand not in self._constants:
            number = int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)
            self._constants[operand] = self.full(number)
        return self._constants[operand]

    def address(self, operand: str) -> Array:
        """Of [register + offset]."""
        base, _, offset = operand.strip("[] ").partition("+")
        return self.value(base.strip()) + self.full(int(offset.strip() or "0", 0))

    def scalar(self, value: Array, active: Mask) -> int:
        """The first active thread's."""
        return int(value[0] if active is None else value[active][0])

    def put(self, name: str, value: Array, bits: int, active: Mask) -> None:
        if name == "_":
            return
        value = low_bits(np.asarray(value).astype(U), bits)
        if active is not None:
            value = np.where(active, value, self.registers.get(name, U(0)))
        self.registers[name] = np.broadcast_to(value, self.threads).copy()

    def put_some(self, name: str, threads: slice | Array, value: Array) -> None:
        whole = self.registers.get(name, self.full(0)).copy()
        whole[threads] = value
        self.registers[name] = whole

    # ---- global memory

    def _place(self, address: Array, size: int) -> tuple[Array, Array] | None:
        """The bytes of the tensor that the first address is in, and every address's places there."""
        start = int(address[0])
        found = next((each for each in self._memory if each.address <= start < each.address + len(each.bytes)), None)
        if found is None:
            self.hazard("outside every tensor")
            return None
        at = (address - U(found.address)).astype(np.int64)[:, None] + np.arange(size)
        if at.min() < 0 or at.max() >= len(found.bytes):
            self.hazard("outside the tensor")
            at = np.clip(at, 0, len(found.bytes) - 1)
        if (address % U(size)).any():
            self.hazard("not aligned")
        return found.bytes, at

    def load_global(self, address: Array, size: int, active: Mask) -> Array:
        """uint8 [threads, size], 0 for threads that do not load."""
        out, some = np.zeros((self.threads, size), np.uint8), slice(None) if active is None else active
        if active is None or active.any():
            place = self._place(address[some], size)
            if place is not None:
                out[some] = place[0][place[1]]
        return out

    def store_global(self, address: Array, data: Array, active: Mask) -> None:
        some = slice(None) if active is None else active
        place = self._place(address[some], data.shape[1])
        if place is not None:
            place[0][place[1]] = data[some]

    def load_shared(self, address: Array, size: int, active: Mask) -> Array:
        out, some = np.zeros((self.threads, size), np.uint8), slice(None) if active is None else active
        at = address.astype(np.int64)[:, None] + np.arange(size)
        out[some] = self.shared.read(at[some], self.warp[some][:, None])
        return out

    def store_shared(self, address: Array, data: Array, active: Mask) -> None:
        some = slice(None) if active is None else active
        at = address.astype(np.int64)[:, None] + np.arange(data.shape[1])
        self.shared.write(at[some], data[some], self.warp[some][:, None])


def listed(operand: str) -> list[str]:
    """The registers of {a, b, c}, or the one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


@operation("ld.")
def _load(block: Block, this: Instruction, active: Mask) -> None:
    names, bits = listed(this.operands[0]), BITS[this.suffixes[-1]]
    if this.suffixes[1] == "param":
        block.put(names[0], block.value(this.operands[1].strip("[]")), bits, active)
        return
    load = block.load_global if this.suffixes[1] == "global" else block.load_shared
    data = load(block.address(this.operands[1]), bits // 8 * len(names), active).reshape(block.threads, len(names), -1)
    for i, name in enumerate(names):
        whole = np.zeros((block.threads, 8), np.uint8)
        whole[:, : bits // 8] = data[:, i]
        block.put(name, whole.view("<u8")[:, 0], bits, active)


@operation("st.")
def _store(block: Block, this: Instruction, active: Mask) -> None:
    size = BITS[this.suffixes[-1]] // 8
    words = [block.value(name).astype("<u8").view(np.uint8) for name in listed(this.operands[1])]
    values = [word.reshape(-1, 8)[:, :size] for word in words]
    store = block.store_global if this.suffixes[1] == "global" else block.store_shared
    store(block.address(this.operands[0]), np.concatenate(values, axis=1), active)


@operation("bar.sync", "barrier.sync")
def _barrier(block: Block, this: Instruction, active: Mask) -> None:
    block.shared.barrier()
