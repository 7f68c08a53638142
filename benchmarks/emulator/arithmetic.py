"""Instructions between registers: moves, conversions, comparisons, integers and float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .block import Block, Mask, listed, operation
from .formats import (
    BITS,
    Array,
    U,
    bfloat16_from_float32,
    bfloat16_to_float32,
    float16_from_float32,
    float16_to_float32,
    from_float32,
    low_bits,
    signed,
    to_float32,
)
from .program import Instruction

ARITHMETIC = (
    "add", "sub", "mul", "mad", "fma", "neg", "min", "max", "div", "rem", "and", "or", "xor", "not", "shl", "shr",
)  # fmt: skip
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
FLOATS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin,
}  # fmt: skip


@operation("mov.")
def _move(block: Block, this: Instruction, active: Mask) -> None:
    bits, (to, source) = BITS[this.suffixes[-1]], this.operands
    if to.startswith("{"):
        each, value = bits // len(listed(to)), block.value(source)
        for i, name in enumerate(listed(to)):
            block.put(name, value >> U(i * each), each, active)
    elif source.startswith("{"):
        each, value = bits // len(listed(source)), block.full(0)
        for i, name in enumerate(listed(source)):
            value = value | low_bits(block.value(name), each) << U(i * each)
        block.put(to, value, bits, active)
    else:
        value = block.value(source)
        block.put(to, value != 0 if bits == 1 else value, bits, active)


@operation("cvta.")
def _to_generic_address(block: Block, this: Instruction, active: Mask) -> None:
    block.put(this.operands[0], block.value(this.operands[1]), 64, active)


@operation("cvt.")
def _convert(block: Block, this: Instruction, active: Mask) -> None:
    to, source = this.suffixes[-2:]
    name, a = this.operands[0], block.value(this.operands[1])
    if "tf32" in this.suffixes:  # to the nearest of 19 bits
        block.put(name, (low_bits(a, 32) + U(0x1000)) & U(0xFFFFE000), 32, active)
    elif to in ("bf16x2", "f16x2"):
        pack = bfloat16_from_float32 if to == "bf16x2" else float16_from_float32
        high, low = (pack(to_float32(block.value(operand))) for operand in this.operands[1:3])
        block.put(name, high << U(16) | low, 32, active)
    elif to in BITS and source in BITS and "f" not in to[0] + source[0]:
        value = signed(a, BITS[source]).view(U) if source[0] == "s" else low_bits(a, BITS[source])
        block.put(name, value, BITS[to], active)
    elif to == "f32" and source in ("bf16", "f16"):
        read = bfloat16_to_float32 if source == "bf16" else float16_to_float32
        block.put(name, from_float32(read(low_bits(a, 16))), 32, active)
    elif to == "f32" and source in BITS and source[0] in "su":
        number = signed(a, BITS[source]) if source[0] == "s" else low_bits(a, BITS[source])
        block.put(name, from_float32(number.astype(np.float32)), 32, active)
    elif source == "f32" and to in ("bf16", "f16"):
        pack = bfloat16_from_float32 if to == "bf16" else float16_from_float32
        block.put(name, pack(to_float32(a)), 16, active)
    else:
        raise NotImplementedError(this.text)


@operation("setp.")
def _compare(block: Block, this: Instruction, active: Mask) -> None:
    if len(this.suffixes) != 3 or len(this.operands) != 3:
        raise NotImplementedError(this.text)
    comparison, kind = this.suffixes[1:]

    def read(operand: str) -> Array:
        value = block.value(operand)
        if kind == "f32":
            return to_float32(value)
        return signed(value, BITS[kind]) if kind[0] == "s" else low_bits(value, BITS[kind])

    x, y = map(read, this.operands[1:])
    value = ~(np.isnan(x) | np.isnan(y)) if comparison == "num" else COMPARISONS[comparison](x, y)
    block.put(this.operands[0], value, 1, active)


@operation("selp.")
def _select(block: Block, this: Instruction, active: Mask) -> None:
    yes, no, chosen = (block.value(operand) for operand in this.operands[1:4])
    block.put(this.operands[0], np.where(chosen != 0, yes, no), BITS[this.suffixes[-1]], active)


# ---- between the threads of a warp


@operation("elect.")
def _elect(block: Block, this: Instruction, active: Mask) -> None:
    lane, predicate = this.operands[0].split("|")
    block.put(predicate.strip(), block.lane == 0, 1, active)
    block.put(lane.strip(), block.full(0), 32, active)


@operation("shfl.")
def _shuffle(block: Block, this: Instruction, active: Mask) -> None:
    other = block.value(this.operands[2])
    if this.suffixes[2] not in ("bfly", "idx"):
        raise NotImplementedError(this.text)
    source = block.lane ^ other if this.suffixes[2] == "bfly" else other % U(32)
    value = block.value(this.operands[1])[(block.thread - block.lane + source).astype(np.int64)]
    block.put(this.operands[0].split("|")[0].strip(), value, 32, active)


@operation("redux.sync.add")
def _sum_of_warp(block: Block, this: Instruction, active: Mask) -> None:
    block.put(this.operands[0], block.value(this.operands[1]).reshape(-1, 32).sum(1).repeat(32), 32, active)


# ---- bits


@operation("popc.")
def _count_bits(block: Block, this: Instruction, active: Mask) -> None:
    value = low_bits(block.value(this.operands[1]), BITS[this.suffixes[-1]])
    count = sum(((value >> U(i)) & U(1) for i in range(1, 64)), value & U(1))
    block.put(this.operands[0], count, 32, active)


@operation("bfe.")
def _extract_bits(block: Block, this: Instruction, active: Mask) -> None:
    kind = this.suffixes[-1]
    at, count = (int(operand) for operand in this.operands[2:4])
    value = low_bits(low_bits(block.value(this.operands[1]), BITS[kind]) >> U(at), count)
    block.put(this.operands[0], signed(value, count).view(U) if kind[0] == "s" else value, BITS[kind], active)


@operation("bfi.")
def _insert_bits(block: Block, this: Instruction, active: Mask) -> None:
    new, old, at = (block.value(operand) for operand in this.operands[1:4])
    mask = U((1 << int(this.operands[4])) - 1) << at
    block.put(this.operands[0], old & ~mask | new << at & mask, BITS[this.suffixes[-1]], active)


@operation("prmt.")
def _permute_bytes(block: Block, this: Instruction, active: Mask) -> None:
    low, high, choice = (low_bits(block.value(operand), 32) for operand in this.operands[1:4])
    both, value = low | high << U(32), block.full(0)
    for i in range(4):
        pick = choice >> U(4 * i) & U(15)
        byte = both >> (pick & U(7)) * U(8) & U(255)
        sign = np.where(byte >= 128, U(255), U(0))
        value = value | np.where(pick & U(8), sign, byte) << U(8 * i)
    block.put(this.operands[0], value, 32, active)


@operation("lop3.")
def _any_logic(block: Block, this: Instruction, active: Mask) -> None:
    a, b, c = (low_bits(block.value(operand), 32) for operand in this.operands[1:4])
    table, value = int(this.operands[4], 0), block.full(0)
    for row in range(8):
        if table >> row & 1:
            terms = (x if row >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0)))
            value = value | np.bitwise_and.reduce(list(terms))
    block.put(this.operands[0], value, 32, active)


# ---- arithmetic


@operation(*(f"{name}." for name in ARITHMETIC))
def _arithmetic(block: Block, this: Instruction, active: Mask) -> None:
    if this.suffixes[-1] == "f32":
        _float_arithmetic(block, this, active)
    else:
        _integer_arithmetic(block, this, active)


def _float_arithmetic(block: Block, this: Instruction, active: Mask) -> None:
    name, (x, *more) = this.suffixes[0], [to_float32(block.value(operand)) for operand in this.operands[1:]]
    with np.errstate(all="ignore"):
        if name == "fma":
            value = (x.astype(np.float64) * more[0] + more[1]).astype(np.float32)
        elif name == "neg":
            value = -x
        elif name in FLOATS:
            value = FLOATS[name](x, more[0])
        else:
            raise NotImplementedError(this.text)
    block.put(this.operands[0], from_float32(value), 32, active)


def _integer_arithmetic(block: Block, this: Instruction, active: Mask) -> None:
    name, kind = this.suffixes[0], this.suffixes[-1]
    bits, negative = BITS[kind], kind[0] == "s"
    x, *more = (low_bits(block.value(operand), bits) for operand in this.operands[1:3])
    y = more[0] if more else x
    wide_x, wide_y = (signed(a, bits) if negative else a for a in (x, y))
    if name in ("and", "or", "xor", "not"):
        value = {"and": x & y, "or": x | y, "xor": x ^ y, "not": ~x}[name]
    elif name in ("shl", "shr"):
        value = _shifted(name, wide_x, low_bits(block.value(this.operands[2]), 32), bits)
    elif name in ("add", "sub", "neg"):
        value = {"add": x + y, "sub": x - y, "neg": ~x + U(1)}[name]
    elif name in ("mul", "mad"):
        value = wide_x.view(U) * wide_y.view(U)
        if this.suffixes[1] == "hi":
            if bits != 32:
                raise NotImplementedError(this.text)
            value = value >> U(32)
        value = value + block.value(this.operands[3]) if name == "mad" else value
        bits = 2 * bits if this.suffixes[1] == "wide" else bits
    elif name in ("min", "max"):
        value = (np.minimum if name == "min" else np.maximum)(wide_x, wide_y).view(U)
    elif name in ("div", "rem"):
        value = _divided(name, wide_x, wide_y)
    else:
        raise NotImplementedError(this.text)
    block.put(this.operands[0], value, bits, active)


def _shifted(name: str, x: Array, count: Array, bits: int) -> Array:
    over, count = count >= bits, np.minimum(count, U(bits - 1))
    if name == "shr" and x.dtype == np.int64:
        return (x >> count.astype(np.int64)).view(U)
    x = x.view(U)
    return np.where(over, U(0), x << count if name == "shl" else x >> count)


def _divided(name: str, x: Array, y: Array) -> Array:
    """Towards zero. Whatever is divided by 0 is not used."""
    y = np.where(y == 0, y.dtype.type(1), y)
    quotient = np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)) if x.dtype == np.int64 else x // y
    return (quotient if name == "div" else x - y * quotient).view(U)
