"""Finds registers in machine code for sm_90 that are written while a running wgmma may still use them.

wgmma (HGMMA in SASS) runs beside the instructions after it. Until it has been waited for it reads its left matrix,
where that is in registers, and adds to its accumulator. PTX forbids to write either before; some releases of Triton let
it happen.
Every path through the code is followed with every set of wgmma that can be running there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

# Instructions whose first operand is a register that they do not write.
READ_ONLY = (
    "ST", "RED", "BAR", "SYNCS", "UTMA", "WARPSYNC", "LDGSTS", "LDGDEPBAR", "MEMBAR", "FENCE", "CCTL", "DEPBAR",
    "WARPGROUP", "NOP", "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "ERRBAR", "R2UR", "R2P", "ISETP", "FSETP",
    "PLOP3",
)  # fmt: skip
WIDTHS = {".128": 4, ".64": 2, "WIDE": 2, ".M88.4": 4, ".M88.2": 2, ".MT88.4": 4, ".MT88.2": 2}  # registers written
LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?(\S+)\s*(.*?)\s*;")
IN_FLIGHT = 8  # groups of wgmma that are remembered: more than any loop leaves running


class Instruction(NamedTuple):
    address: str
    guarded: bool
    name: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address} {self.name} {', '.join(self.operands)}"


class Code(NamedTuple):
    """A kernel's instructions, and the index of the instruction behind each label."""

    instructions: list[Instruction]
    labels: dict[str, int]


class Group(NamedTuple):
    """wgmma that are waited for together. registers: those they still use. last: index of the last one. closed: whether
    the group is complete."""

    registers: frozenset[int]
    last: int
    closed: bool


State = tuple[Group, ...]


class EarlyWrite(NamedTuple):
    """wgmma: the last of the group that is running. writer: the first instruction that overwrites what it uses."""

    wgmma: Instruction
    writer: Instruction


def disassemble(cubin: bytes) -> Code:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read_listing(subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout)


def read_listing(listing: str) -> Code:
    code = Code([], {})
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            code.labels[label[1]] = len(code.instructions)
        if found := LINE.match(line):
            address, guard, name, rest = found.groups()
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            code.instructions.append(Instruction(address, bool(guard), name, operands))
    return code


def _register(operand: str) -> int | None:
    found = re.match(r"R(\d+)", operand)
    return int(found[1]) if found else None


def _written(this: Instruction) -> set[int]:
    if this.name.startswith(READ_ONLY):
        return set()
    results = [part for part in this.operands[:3] if not re.fullmatch(r"U?P(T|\d+)", part)]  # predicates may be first
    first = _register(results[0]) if results else None
    width = max((count for mark, count in WIDTHS.items() if mark in this.name), default=1)
    return set() if first is None else set(range(first, first + width))


def _used_by_wgmma(this: Instruction) -> set[int]:
    """The accumulator, 64 × N float32 numbers of 128 threads, and the left matrix where it is in registers."""
    shape = re.search(r"\.64x(\d+)x", this.name)
    into, left = _register(this.operands[0]), _register(this.operands[1])
    assert shape is not None, this
    found = set() if into is None else set(range(into, into + int(shape[1]) // 2))
    return found if left is None else found | set(range(left, left + 4))


def _next(at: int, code: Code) -> list[int]:
    """Where the code may go on."""
    this = code.instructions[at]
    after = [at + 1] if at + 1 < len(code.instructions) else []
    if this.name == "EXIT" or this.name.startswith("RET"):
        return after if this.guarded else []
    if this.name.startswith("BRA"):
        target = next((code.labels[part] for part in map(_label, this.operands) if part in code.labels), None)
        conditional = this.guarded or len(this.operands) > 1
        return after if target is None else [target, *(after if conditional else [])]
    return after


def _label(operand: str) -> str:
    found = re.search(r"\.L_x_\d+", operand)
    return found[0] if found else ""


def _step(at: int, this: Instruction, running: State, found: set[tuple[int, int]]) -> State:
    """What runs after this instruction. Adds (wgmma, writer) to `found`, once for each register of a group."""
    if this.name.startswith("HGMMA"):
        *before, last = running if running and not running[-1].closed else (*running, Group(frozenset(), at, False))
        group = Group(last.registers | _used_by_wgmma(this), at, "gsb0" in this.operands)
        return (*before, group)[-IN_FLIGHT:]
    if this.name.startswith("WARPGROUP.DEPBAR"):
        left = int(this.operands[-1], 0)
        return running[len(running) - left :] if left < len(running) else running
    registers = _written(this)
    found |= {(group.last, at) for group in running if group.registers & registers}
    return tuple(group._replace(registers=group.registers - registers) for group in running)


def early_writes(code: Code) -> list[EarlyWrite]:
    """In the order of the wgmma, the first writer of each."""
    found: set[tuple[int, int]] = set()
    todo: list[tuple[int, State]] = [(0, ())] if code.instructions else []
    seen = set(todo)
    while todo:
        at, running = todo.pop()
        running = _step(at, code.instructions[at], running, found)
        following = {(after, running) for after in _next(at, code)} - seen
        seen |= following
        todo += following
    first = dict(sorted(found, reverse=True))  # of equal keys the last one stays
    return [EarlyWrite(code.instructions[a], code.instructions[b]) for a, b in sorted(first.items())]
