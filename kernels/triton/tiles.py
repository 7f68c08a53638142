"""Block sizes and splits: pure functions of shapes, strides and dtypes, so that results repeat bit for bit."""

import math
from typing import NamedTuple

from torch import Tensor

from .device import Device, Dots

# Bytes of shared memory for one program alone on a multiprocessor, and for each of two.
ONE_PROGRAM, TWO_PROGRAMS = 150 * 1024, 96 * 1024
FILLED = 0.9  # of the multiprocessors have a program
CELL = 16 * 2**20  # bytes that stay in the L2 cache between two readings: an A100 has 40 MB, an H100 50


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, clamped to [low, high]."""
    return min(max(1 << (n - 1).bit_length(), low), high)


class Tile(NamedTuple):
    """A program's block of rows and of columns, and the launch options that were sized for it."""

    m: int
    n: int
    warps: int
    stages: int


def unit(stride: int) -> int:
    """The largest power of two, at most 16, that divides a stride."""
    return math.gcd(stride, 16)


def strides(name: str, t: Tensor | None) -> dict[str, int]:
    """The strides of a matrix as kernels take them: NAME_row and NAME_col, 0 where there is no matrix."""
    row, column = (0, 0) if t is None else t.stride()
    return {f"{name}_row": row, f"{name}_col": column}


def aligned(x: Tensor) -> bool:
    """Whether Triton's launcher will notice that x's rows can be read 16 bytes at a time."""
    return x.stride(1) == 1 and x.stride(0) % 16 == 0 and misalignment(x) == 0


def misalignment(x: Tensor) -> int:
    """x's address modulo 16 bytes."""
    return (x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr()) % 16


def stages_within(device: Device, stage: int, budget: int) -> int:
    """How many stages of loads (2 to 4), of `stage` bytes each, fit the budget of shared memory."""
    return 2 if device.hip else min(max(min(budget, device.smem) // stage, 2), 4)


def _sizes(R: int, dot: Dots) -> tuple[int, int, int]:
    """(bytes of an element of the wide tile, of the narrow tile, ranks rounded up to a block)."""
    size = dot.wide.primitive_bitwidth // 8
    return size, 4 if dot.pieces > 1 else size, pow2(R, 16, 256)


# Under a dropout mask a program computes the mask in the registers that its wgmma reads, and Triton 3.6 leaves the last
# wgmma of a step running into the next step's mask. The tiles of "masked" kernels are those for which it does not:
# either steps of 64 columns, or blocks of fewer than 64, which no wgmma multiplies. benchmarks/kernel_report.py checks.


def shrink_tile(device: Device, x: Tensor, R: int, dot: Dots, masked: bool = False) -> Tile:
    """m rows and n columns of x a step. Every m rows read the [R, D] operand again. masked: dropout acts on x."""
    size, narrow, r = _sizes(R, dot)
    heavy = dot.pieces > 1 and r > 64  # three pieces of so many ranks need registers, as unaligned addresses do
    full = 32 if (heavy and r == 256) or (size == 4 and r > 32) else 64 if r <= 64 or heavy or not aligned(x) else 128
    m = pow2(len(x), 16, full)
    pieces = dot.pieces > 1 and r > 32  # steps of 64 columns spilled in grad_dy on sm_80
    narrower = pieces or not aligned(x) or (masked and r <= 32 and size == 2)
    n = (256 if r <= 32 else 128) // size // (2 if narrower else 1)
    budget = ONE_PROGRAM if r > 32 else TWO_PROGRAMS
    warps = 4 if r <= 32 and aligned(x) else 8
    return Tile(m, n, warps, stages_within(device, n * (m * size + r * narrow), budget))


def whole_row_tile(device: Device, x: Tensor, R: int, dot: Dots) -> Tile | None:
    """As `shrink_tile`, for programs that take all columns of their rows; None if these would be too few or too slow.

    The fewest programs that fill the device, and no more bytes of the [R, D] operand a step than of x.
    """
    size, narrow, r = _sizes(R, dot)
    if r > 32 or not aligned(x):
        return None
    for m in (64, 32, 16):
        if ceil_div(len(x), m) >= FILLED * device.sms and r * narrow <= m * size:
            n = (256 if r <= 32 and m == 64 or dot.pieces > 1 else 512) // size  # fewer rows, more bytes on the way
            return Tile(m, n, 4, stages_within(device, n * (m * size + r * narrow), TWO_PROGRAMS))
    return None


def grad_weight_tile(device: Device, x: Tensor, R: int, dot: Dots, masked: bool = False) -> Tile:
    """m rows and n columns of x a step. The [n, R] accumulator stays in registers. masked: dropout acts on x."""
    size, narrow, r = _sizes(R, dot)
    m = pow2(len(x), 16, 64 if size == narrow == 2 else 16 if (size == 4 and r > 32) or r == 256 else 32)
    budget = ONE_PROGRAM if r > 32 else TWO_PROGRAMS
    small = masked and r == 16 and size == 2 and not aligned(x)
    n = 32 if small else 64  # wider blocks read h less often and leave more sums
    warps = 4 if small or (r <= 32 and size == 2 and aligned(x)) else 8
    return Tile(m, n, warps, stages_within(device, m * (n * size + r * narrow), budget))


def expand_tile(M: int, R: int, dot: Dots) -> Tile:
    """m rows and n columns of y."""
    if dot.narrow.primitive_bitwidth == 32:  # float32 without tensor cores keeps its operands in registers
        return Tile(pow2(M, 16, 32 if dot.precision == "ieee" else 64), 64, 4, 2)
    m = pow2(M, 16, 128 if R > 32 else 64)
    return Tile(m, 128, 8 if m == 128 else 4, 2)


def expand_step(R: int, dot: Dots) -> int:
    """Ranks a step of expand's loop, a divisor of R where there is one: masked ranks (R = 48 in steps of 64, with
    dropout) spilled on sm_90. float32 operands are held in registers, so their steps are short."""
    most = 64 if dot.narrow.primitive_bitwidth == 16 else 16
    divisor = math.gcd(R, most)
    return divisor if divisor >= 16 else pow2(R, 16, most)


def programs_per_sm(R: int) -> int:
    """How many programs a multiprocessor gets from the kernels that read a wide matrix: one large or two small."""
    return 1 if R > 32 else 2


class GradDyTiles(NamedTuple):
    """How `grad_dy` cuts dy. along, down: the tiles of programs along rows and down columns. rows, columns: the part of
    dy that is read twice at about the same time, multiples of the blocks of either kind."""

    along: Tile
    down: Tile
    rows: int
    columns: int


def grad_dy_tiles(device: Device, x: Tensor, R: int, dot: Dots) -> tuple[GradDyTiles, bool]:
    """The cut, and whether it is into whole rows: where that leaves no more partial sums of dB and dh in all.

    A part has at most CELL bytes. Programs of equal length, half of them along rows and half down columns, fill the
    multiprocessors once.
    """
    (M, D), size, down = x.shape, x.element_size(), grad_weight_tile(device, x, R, dot)
    share = 2 * M * D / (programs_per_sm(R) * device.sms)  # elements that a program reads

    def cut(length: int, most: float, longest: int, block: int) -> int:
        parts = max(int(length / most), ceil_div(length, longest), 1)
        return ceil_div(ceil_div(length, parts), block) * block

    def tiles(along: Tile, whole: bool) -> GradDyTiles:
        block, side = max(along.m, along.n, down.m, down.n), math.isqrt(CELL // size)  # all are powers of two
        columns = ceil_div(D, block) * block if whole else cut(D, share / along.m, side, block)
        rows = cut(M, share / down.n, max(CELL // (size * D), 1) if whole else side, block)
        return GradDyTiles(along, down, rows, columns)

    def sums(these: GradDyTiles) -> int:
        G, S = ceil_div(M, these.rows), ceil_div(D, these.columns)
        return (G > 1) * G * D + (S > 1) * S * M

    split, along = tiles(shrink_tile(device, x, R, dot), False), whole_row_tile(device, x, R, dot)
    whole = None if along is None else tiles(along, True)
    return (split, False) if whole is None or sums(whole) > sums(split) else (whole, True)


def splits(device: Device, tiles: int, length: int, block: int, programs: int) -> tuple[int, int]:
    """(parts, chunk): cut `length` so that tiles × parts programs fill the multiprocessors once, `programs` on each.

    chunk is a multiple of block, and no part is empty.
    """
    blocks = ceil_div(length, block)
    parts = max(1, min(programs * device.sms // tiles, blocks))
    chunk = ceil_div(blocks, parts)
    return ceil_div(blocks, chunk), chunk * block
