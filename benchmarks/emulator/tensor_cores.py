"""ldmatrix and stmatrix; mma.sync and wgmma in bfloat16, float16 and tf32 with float32 sums."""

from __future__ import annotations

import re

import numpy as np

from .block import Block, Mask, listed, operation
from .copies import swizzled
from .formats import ELEMENTS, Array, Element, U, from_float32, low_bits, to_float32
from .program import Instruction

LANES = np.arange(32)
SPANS = {1: 128, 2: 64, 3: 32}  # bytes of a swizzled row, by a matrix descriptor's upper bits


@operation("ldmatrix", "stmatrix")
def _move_matrices(block: Block, this: Instruction, active: Mask) -> None:
    """8 × 8 matrices of 16 bits, each between a register and shared memory. Eight threads give a matrix's rows."""
    count = int(next(part for part in this.suffixes if re.fullmatch(r"x\d", part))[1])
    store, turned = this.suffixes[0] == "stmatrix", "trans" in this.suffixes
    place, registers = this.operands if store else this.operands[::-1]
    address = block.address(place).astype(np.int64)
    for warp in range(block.threads // 32):
        threads = LANES + 32 * warp
        for i, name in enumerate(listed(registers)[:count]):
            rows = address[threads[8 * i : 8 * i + 8]]
            at = _matrix_places(rows, turned)
            if store:
                value = block.value(name)[threads].astype("<u4").view(np.uint8).reshape(32, 4)
                block.shared.write(at, value, warp)
            else:
                block.put_some(name, threads, block.shared.read(at, warp).view("<u4")[:, 0].astype(U))


def _matrix_places(rows: Array, turned: bool) -> Array:
    """int64 [32, 4]: where the four bytes of each lane's register lie. Two elements that follow one another in a row,
    or, turned, in a column."""
    if turned:
        first, second = (rows[2 * (LANES % 4) + half] + 2 * (LANES // 4) for half in (0, 1))
    else:
        first = rows[LANES // 4] + 4 * (LANES % 4)
        second = first + 2
    return np.stack([first, first + 1, second, second + 1], axis=1)


@operation("mma.sync")
def _mma(block: Block, this: Instruction, active: Mask) -> None:
    """m16n8kK by every warp for itself: D = A B + C."""
    shape = re.search(r"m16n8k(\d+)\.row\.col\.f32\.(\w+)\.", this.name)
    if shape is None or shape[2] not in ELEMENTS:
        raise NotImplementedError(this.text)
    K, element = int(shape[1]), ELEMENTS[shape[2]]
    D, A_names, B_names, C = map(listed, this.operands)
    each = 4 // element.size  # elements of a register
    warps = block.threads // 32
    group, place = LANES // 4, LANES % 4
    A, B = np.zeros((warps, 16, K), np.float32), np.zeros((warps, K, 8), np.float32)
    for half in range(each):
        for i, name in enumerate(A_names):
            k = each * place + 4 * each * (i // 2) + half
            A[:, group + 8 * (i % 2), k] = _part(block.value(name), half, element).reshape(warps, 32)
        for i, name in enumerate(B_names):
            B[:, each * place + 4 * each * i + half, group] = _part(block.value(name), half, element).reshape(warps, 32)
    product = A @ B
    sums = [
        to_float32(block.value(C[i])) + product[:, group + 8 * (i // 2), 2 * place + i % 2].ravel() for i in range(4)
    ]
    for name, value in zip(D, sums, strict=True):
        block.put(name, from_float32(value), 32, active)


def _part(register: Array, index: int, element: Element) -> Array:
    bits = 8 * element.size
    return element.read(low_bits(low_bits(register, 32) >> U(bits * index), bits))


@operation("wgmma.mma_async")
def _wgmma(block: Block, this: Instruction, active: Mask) -> None:
    """m64nNkK by every four warps: D += A B. A is in registers or shared memory, B in shared memory."""
    shape = re.search(r"m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)", this.name)
    if shape is None:
        raise NotImplementedError(this.text)
    N, K, element = int(shape[1]), int(shape[2]), ELEMENTS[shape[3]]
    results, left, right, adds = listed(this.operands[0]), *this.operands[1:4]
    numbers = [int(operand) for operand in this.operands[4:]]  # signs of A and B, then which is turned
    if set(numbers[:2]) != {1}:
        raise NotImplementedError(f"a negated operand: {this.text}")
    registers = left.startswith("{")
    turned = [0, 0, *numbers[2:]][-2:] if element.size == 2 else [0, 0]
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    used: list[Array] = []
    for start in range(0, block.threads, 128):
        threads = slice(start, start + 128)
        if registers:
            A = _from_registers(block, listed(left), threads, K, element)
        else:
            A = _from_shared(block, left, threads, turned[0], 64, K, element, used)
        product = A @ _from_shared(block, right, threads, turned[1], N, K, element, used).T
        keep = block.value(adds)[0] != 0
        for i, name in enumerate(results):
            row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
            before = to_float32(block.value(name)[threads]) if keep else np.float32(0)
            block.put_some(name, threads, from_float32(before + product[row, column]))
    block.shared.guard("wgmma", used)
    block.products[-1] += 1


def _from_registers(block: Block, names: list[str], threads: slice, K: int, element: Element) -> Array:
    """[64, K]."""
    lane, warp, each = np.arange(128) % 32, np.arange(128) // 32, 4 // element.size
    A = np.zeros((64, K), np.float32)
    for i, name in enumerate(names):
        for index in range(each):
            row, column = 16 * warp + lane // 4 + 8 * (i % 2), (lane % 4) * each + K // 2 * (i // 2) + index
            A[row, column] = _part(block.value(name)[threads], index, element)
    return A


def _from_shared(
    block: Block, operand: str, threads: slice, turned: int, rows: int, K: int, element: Element, used: list[Array]
) -> Array:
    """[rows, K], as a matrix descriptor says. Appends the addresses to `used`."""
    value = block.value(operand)[threads]
    if (value != value[0]).any():
        block.hazard("threads give different matrix descriptors")
    code = int(value[0])
    start, leading, stride = ((code >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    span = SPANS[code >> 62]
    row, k = np.arange(rows)[:, None], np.arange(K)[None, :]
    if turned:
        at = k // 8 * stride + k % 8 * span + row // (span // 2) * leading + row % (span // 2) * 2
    else:
        at = row // 8 * stride + row % 8 * span + k * element.size
    places = swizzled(start + at, span)[..., None] + np.arange(element.size)
    used.append(places)
    return element.read(block.shared.read_by_engine(places).view(f"<u{element.size}")[..., 0])


@operation("wgmma.commit_group")
def _commit(block: Block, this: Instruction, active: Mask) -> None:
    block.products.append(0)


@operation("wgmma.wait_group")
def _wait(block: Block, this: Instruction, active: Mask) -> None:
    while len(block.products) - 1 > int(this.operands[0]):
        block.shared.release("wgmma", block.products.pop(0))
