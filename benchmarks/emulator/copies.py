"""cp.async, TMA and the barriers that TMA reports to. Data arrives when it is waited for, no earlier."""

from __future__ import annotations

import re

import numpy as np

from .block import Block, Descriptor, Mask, operation
from .formats import Array, signed
from .program import Instruction
from .shared_memory import COPY_ENGINE

SWIZZLE = {128: 7, 64: 3, 32: 1}  # by the bytes of a row: which bits of the row's number are mixed into the address
STORE = "TMA store"


def swizzled(address: Array, span: int) -> Array:
    return address ^ (((address >> 7) & SWIZZLE[span]) << 4)


@operation("cp.async.ca", "cp.async.cg")
def _copy(block: Block, this: Instruction, active: Mask) -> None:
    """[to], [from], bytes, and how many of them to read: all, or none to write zeros."""
    to, source, size = this.operands[0], this.operands[1], int(this.operands[2], 0)
    some = np.ones(block.threads, bool) if active is None else active
    wanted = block.value(this.operands[3]) if len(this.operands) > 3 else block.full(size)
    if ((wanted != 0) & (wanted != size)).any():
        raise NotImplementedError(f"a copy of some of the bytes: {this.text}")
    data = block.load_global(block.address(source), size, some & (wanted > 0))[some]
    at = block.address(to).astype(np.int64)[some][:, None] + np.arange(size)
    warp = np.broadcast_to(block.warp[some][:, None], at.shape)
    block.shared.begin_copy(at, warp)
    block.copies[-1].append((at, data, warp))


@operation("cp.async.commit_group")
def _commit(block: Block, this: Instruction, active: Mask) -> None:
    block.copies.append([])


@operation("cp.async.wait_group")
def _wait(block: Block, this: Instruction, active: Mask) -> None:
    while len(block.copies) - 1 > int(this.operands[0], 0):
        for at, data, warp in block.copies.pop(0):
            block.shared.deliver(at, data, warp)


@operation("mbarrier.init")
def _init(block: Block, this: Instruction, active: Mask) -> None:
    at = block.scalar(block.address(this.operands[0]), active)
    block.shared.begin_copy(np.arange(at, at + 8), 0)  # checked like a write
    block.barriers[at], block.boxes[at] = {"phase": 0, "expected": 0}, []


@operation("mbarrier.arrive.expect_tx")
def _expect(block: Block, this: Instruction, active: Mask) -> None:
    barrier = block.barriers[block.scalar(block.address(this.operands[1]), active)]
    barrier["expected"] += block.scalar(block.value(this.operands[2]), active)


@operation("barrier_wait")
def _wait_for_boxes(block: Block, this: Instruction, active: Mask) -> None:
    at = block.scalar(block.address(this.operands[0]), active)
    barrier, boxes = block.barriers[at], block.boxes[at]
    if barrier["phase"] % 2 != block.scalar(block.value(this.operands[1]), active) % 2:
        return  # that phase is over
    sent = sum(data.size for _, data in boxes)
    if not barrier["expected"] or barrier["expected"] != sent:
        block.hazard(f"waits for ever: {barrier['expected']} bytes expected, {sent} on the way,")
    for place, data in boxes:
        block.shared.deliver(place, data, COPY_ENGINE)
    barrier["phase"], barrier["expected"], block.boxes[at] = barrier["phase"] + 1, 0, []


@operation("cp.async.bulk.tensor.2d")
def _box(block: Block, this: Instruction, active: Mask) -> None:
    """cp.async.bulk.tensor.2d.<to>.<from>: each active thread moves a box."""
    load = this.suffixes[5].startswith("shared")
    place, tensor = this.operands[:2] if load else this.operands[1::-1]
    found = re.fullmatch(r"\[\s*(\S+?),\s*\{(.*)\}\s*\]", tensor)
    assert found is not None, this.text
    x, y = (signed(block.value(part.strip()), 32) for part in found[2].split(","))
    threads = np.arange(block.threads) if active is None else np.flatnonzero(active)
    for thread in threads:
        box, start = block.descriptors[int(block.value(found[1])[thread])], int(block.address(place)[thread])
        width = min(box.columns, box.span // 2)
        at = swizzled(start + np.arange(box.rows)[:, None] * box.span + np.arange(2 * width), box.span)
        if start % 128 or x[thread] < 0 or y[thread] < 0:
            block.hazard("a TMA box that is not aligned, or begins before the matrix,")
        if not block.shared.holds(at):
            continue
        inside = _inside(box, int(y[thread]), int(x[thread]), width)
        if load:
            data = np.zeros((box.rows, width), np.uint16)
            data[: inside.shape[0], : inside.shape[1]] = inside
            block.shared.begin_copy(at, COPY_ENGINE)
            barrier = block.scalar(block.address(this.operands[2]), active)
            block.boxes[barrier].append((at, data.view(np.uint8)))
        else:
            data = block.shared.read(at, int(block.warp[thread])).view(np.uint16)
            inside[:] = data[: inside.shape[0], : inside.shape[1]]
            block.shared.guard(STORE, [at])


def _inside(box: Descriptor, y: int, x: int, width: int) -> Array:
    """The part of the matrix that a box covers."""
    return box.matrix[y : y + box.rows, x : x + width]


@operation("cp.async.bulk.wait_group")
def _wait_for_stores(block: Block, this: Instruction, active: Mask) -> None:
    block.shared.release(STORE, len(block.shared.guarded))
