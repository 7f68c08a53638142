"""Block sizes, splits and dot types: pure functions of shapes and dtypes, so that results repeat bit for bit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import triton.language as tl

from .launch import Device

# Shared memory for programs alone, or two, on a multiprocessor; and alone with all stages but one in it, as they are.
ONE_PROGRAM, TWO_PROGRAMS, DEEP_PROGRAM = 150 * 1024, 96 * 1024, 176 * 1024
CELL = 16 * 2**20  # bytes that the L2 cache keeps between two readings: an A100 has 40 MB, an H100 50
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int, low: int, high: int) -> int:
    """The power of two not below n, clamped to [low, high]."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def search_width(n: int) -> int:
    """The power of 16 from which gates.instances starts to look for one of n."""
    width = 1
    while width * 16 < n:
        width *= 16
    return width


class Dots(NamedTuple):
    """How tiles are multiplied: wide tiles in type `wide` against narrow ones in `pieces` of it; narrow against narrow
    (in expand) in type `narrow`; float32 dots with `precision`."""

    wide: tl.dtype
    narrow: tl.dtype
    pieces: int
    precision: str


def dots(device: Device, x: torch.dtype, a: torch.dtype) -> Dots:
    """x: the activations' dtype; a: that of A and B, x's or float32."""
    for dtype in (x, a):
        if dtype not in TYPES:
            raise ValueError(f"the triton backend computes in float16, bfloat16 and float32, not {dtype}")
    if device.interpret:
        return Dots(tl.float32, tl.float32, 1, "ieee")
    if x == a and x != torch.float32:
        return Dots(TYPES[x], TYPES[x], 1, "ieee")
    # Not allow_tf32: reading that raises where the newer setting was made, as by TrainingArguments(tf32=True).
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not device.hip
    if x == a:
        return Dots(tl.float32, tl.float32, 1, "tf32" if tf32 else "ieee")
    # Mixed: x is exact in tf32 (and in itself), so only the float32 side needs more than one term to stay float32.
    precision = "ieee" if device.hip else "tf32" if tf32 else "tf32x3"
    if x == torch.bfloat16:
        return Dots(tl.bfloat16, tl.float32, 3, precision)
    return Dots(tl.float32, tl.float32, 1, precision)


class Tile(NamedTuple):
    """A program's block of rows and of columns, and the launch options it was sized for."""

    m: int
    n: int
    warps: int
    stages: int


def unit(stride: int) -> int:
    """The largest power of two, at most 16, that divides a stride."""
    return math.gcd(stride, 16)


def aligned(x: Tensor) -> bool:
    """Whether x's rows can be read 16 bytes at a time, by what Triton's launcher notices."""
    return x.stride(1) == 1 and x.stride(0) % 16 == 0 and start(x) == 0


def start(x: Tensor) -> int:
    """The remainder of x's address by 16 bytes."""
    return (x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr()) % 16


def _stages(device: Device, stage: int, budget: int) -> int:
    """As many stages of loads (2 to 4) as fit the budget of shared memory."""
    return 2 if device.hip else min(max(min(budget, device.smem) // stage, 2), 4)


def _sizes(R: int, dot: Dots) -> tuple[int, int, int]:
    """Bytes of an element of the wide tile and of the narrow one; ranks rounded up to a block."""
    size = dot.wide.primitive_bitwidth // 8
    return size, 4 if dot.pieces > 1 else size, pow2(R, 16, 256)


def shrink_tile(device: Device, x: Tensor, R: int, dot: Dots) -> Tile:
    """m rows × n columns of x a step, beside n columns of the [R, D] operand, which every m rows read again."""
    size, narrow, r = _sizes(R, dot)
    heavy = dot.pieces > 1 and r > 64  # three pieces of so many ranks take registers, as an address an element does
    full = 32 if (heavy and r == 256) or (size == 4 and r > 32) else 64 if r <= 64 or heavy or not aligned(x) else 128
    m = pow2(len(x), 16, full)
    pieces = dot.pieces > 1 and r > 32  # steps of 64 columns then spilled on sm_80, beside dB
    n = (256 if r <= 32 else 128) // size // (2 if pieces or not aligned(x) else 1)
    budget = ONE_PROGRAM if r > 32 else TWO_PROGRAMS
    warps = 4 if r <= 32 and aligned(x) else 8
    return Tile(m, n, warps, _stages(device, n * (m * size + r * narrow), budget))


def outer_tile(device: Device, x: Tensor, R: int, dot: Dots) -> Tile:
    """m rows × n columns of x a step; the [n, R] accumulator lives in registers."""
    size, narrow, r = _sizes(R, dot)
    m = pow2(len(x), 16, 64 if size == narrow == 2 else 16 if (size == 4 and r > 32) or r == 256 else 32)
    n, budget = 64, ONE_PROGRAM if r > 32 else TWO_PROGRAMS  # wider blocks read h less often and leave more sums
    warps = 4 if r <= 32 and size == 2 and aligned(x) else 8
    return Tile(m, n, warps, _stages(device, m * (n * size + r * narrow), budget))


def expand_tile(M: int, R: int, dot: Dots) -> Tile:
    """An m × n tile of y."""
    if dot.narrow.primitive_bitwidth == 32:  # float32 without tensor cores keeps its operands in registers
        return Tile(pow2(M, 16, 32 if dot.precision == "ieee" else 64), 64, 4, 2)
    m = pow2(M, 16, 128 if R > 32 else 64)
    return Tile(m, 128, 8 if m == 128 else 4, 2)


def expand_step(R: int, dot: Dots) -> int:
    """Ranks a step of expand's loop; float32 dots hold them in registers. A step that divides R, where one does, masks
    no rank: R = 48 in steps of 64, with dropout, spilled on sm_90."""
    most = 64 if dot.narrow.primitive_bitwidth == 16 else 16
    whole = math.gcd(R, most)
    return whole if whole >= 16 else pow2(R, 16, most)


class GemmTile(NamedTuple):
    """A tile m × n of the product, k of the sum a step; `group` rows of tiles are walked together."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


# The rate of a tile's shape against the largest's is a guess until measured; a table of measurements overrides it.
# The smallest has 8 warps for its low-rank operands: with 4, R = 64 under dropout spilled 40 words at odd sizes.
GEMM_TILES = {(128, 256, 64, 8): 1.0, (128, 128, 64, 8): 0.85, (64, 128, 64, 8): 0.65}


def gemm_step(R: int) -> int:
    """Ranks that gemm multiplies at once: all up to 64, which its shared memory holds, else 32."""
    return pow2(R, 16, 64) if R <= 64 else 32


def gemm_shared(tile: GemmTile, R: int) -> int:
    """Bytes of shared memory of gemm in a 16-bit type: stages of x and W, the low-rank operands, a quarter of y."""
    narrow = gemm_step(R) * (tile.m + tile.n)
    return 2 * (tile.stages * tile.k * (tile.m + tile.n) + narrow + tile.m * tile.n // 4) + 1024


def whole_shared(tile: GemmTile, R: int) -> int:
    """The same of whole: stages of x, W and A, the low-rank operand, a quarter of y."""
    r = pow2(R, 16, 32)
    return 2 * (tile.stages * tile.k * (tile.m + tile.n + r) + r * tile.n + tile.m * tile.n // 4) + 1024


SHARED = {"gemm": gemm_shared, "whole": whole_shared}


def gemm_fits(device: Device, tile: GemmTile, R: int, strategy: str) -> bool:
    """Whether a program has the memory for it. Tensor memory is counted in columns: Triton 3.6 and 3.7 keep the
    accumulator there twice, and whole's ranks beside it."""
    columns = 2 * tile.n + pow2(R, 16, 32) if strategy == "whole" else 0
    return SHARED[strategy](tile, R) <= device.smem and columns <= (device.tmem or columns)


def gemm_programs(device: Device, tile: GemmTile, R: int, strategy: str, tiles: int) -> int:
    """Programs for so many tiles: as many as there are multiprocessors, or twice that where two fit on one."""
    each = 2 if 2 * SHARED[strategy](tile, R) <= device.smem else 1
    return min(each * device.sms, tiles)


def gemm_tile(device: Device, M: int, D: int, R: int, strategy: str = "gemm") -> GemmTile:
    """The tile whose waves over the multiprocessors cost least, with as many stages (2 to 4) as fit."""
    if not device.tma:  # descriptors become plain loads there, which take registers
        return GemmTile(64, 128, 32, 8, 2)

    def cost(tile: GemmTile) -> float:
        waves = ceil_div(ceil_div(M, tile.m) * ceil_div(D, tile.n), device.sms)
        return waves * tile.m * tile.n / GEMM_TILES[tile[:4]]

    tiles = (GemmTile(*shape, stages) for shape in GEMM_TILES for stages in (4, 3, 2))
    best = min((tile for tile in tiles if gemm_fits(device, tile, R, strategy)), key=cost)
    # With tensor memory ptxas cuts 8 warps to 128 registers and spills 2 to 4 words of what is left.
    return best._replace(warps=4) if device.tmem and strategy == "whole" else best


def per_sm(R: int) -> int:
    """Programs a multiprocessor is given by shrink, outer and pair: one large, or two small ones."""
    return 1 if R > 32 else 2


def cell(device: Device, x: Tensor, along: Tile, down: Tile, programs: int) -> tuple[int, int]:
    """(rows, columns) of x that `pair` reads twice at about the same time: no more than CELL bytes, and cut so that
    programs of equal length, half of them along rows, half down columns, fill the multiprocessors once."""
    (M, D), side = x.shape, math.isqrt(CELL // x.element_size())
    share = 2 * M * D / (programs * device.sms)  # elements that a program reads
    block = max(along.m, along.n, down.m, down.n)  # powers of two all

    def cut(length: int, most: float) -> int:
        parts = max(int(length / most), ceil_div(length, side), 1)
        return ceil_div(ceil_div(length, parts), block) * block

    return cut(M, share / down.n), cut(D, share / along.m)


def splits(device: Device, tiles: int, length: int, block: int, programs: int) -> tuple[int, int]:
    """(parts, chunk): cut `length` so that tiles × parts programs fill the multiprocessors once, `programs` on each.

    chunk is a multiple of block, and no part is empty.
    """
    blocks = ceil_div(length, block)
    parts = max(1, min(programs * device.sms // tiles, blocks))
    chunk = ceil_div(blocks, parts)
    return ceil_div(blocks, chunk), chunk * block
