"""Which way the frozen product and the update meet, for a shape on a device.

"beta": the update is written first and the frozen product is added on top (cuBLAS, beta = 1). "gemm": one kernel
computes both (gemm.py). A choice is a pure function of shapes and of a table that is read once: nothing is tuned while
a graph is captured, and results repeat. ILORA_STRATEGY=beta|gemm|auto forces it.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Dots, GemmTile, ceil_div, gemm_shared, gemm_step, gemm_tile, start, unit
from .gemm import gemm
from .launch import Device, Launch
from .table import MEASURED, STRATEGIES, load_table


class Choice(NamedTuple):
    """strategy: "beta" or "gemm"; tile: the one that gemm takes, or would."""

    strategy: str
    tile: GemmTile


@lru_cache(maxsize=4096)
def choose(
    device: Device, direction: str, M: int, d_in: int, d_out: int, R: int, dtype: torch.dtype, table: str | None = None
) -> Choice:
    """What was measured for the nearest shape, if M, d_in, d_out and R are all within a factor of 2 of it; else "beta":
    it costs one pass more, whereas a GEMM never timed on a device may cost anything.

    Rows beyond the most that were measured count as those. table: a file whose rows go ahead of MEASURED.
    """
    tile = gemm_tile(device, M, d_out if direction == "forward" else d_in, R)
    best, found = math.inf, Choice("beta", tile)
    for row in (load_table(table) if table else ()) + MEASURED:
        if (row.device, row.direction, f"torch.{row.dtype}") != (device.name, direction, str(dtype)):
            continue
        ratios = (row.M / min(M, row.M), row.d_in / d_in, row.d_out / d_out, row.R / R)
        distance = max(abs(math.log2(ratio)) for ratio in ratios)
        if distance <= 1.0 and distance < best:
            fits = row.tile is not None and gemm_shared(row.tile, R) <= device.smem
            best, found = distance, Choice(row.strategy, row.tile if fits and row.tile else tile)
    return found


def gemm_or_beta(
    device: Device, direction: str, x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, asked: str | None
) -> GemmTile | None:
    """The tile of gemm where gemm it is, else None. asked: one of STRATEGIES or "auto"; None asks ILORA_STRATEGY.

    Raises ValueError for a name unknown, and for "gemm" where it cannot run, with the reason: a forced choice never
    falls back silently.
    """
    name = asked or os.environ.get("ILORA_STRATEGY") or "auto"
    source = f"{'strategy' if asked else 'ILORA_STRATEGY'}={name!r}"
    if name not in (*STRATEGIES, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join(STRATEGIES)}, auto")
    if name == "beta":
        return None
    M, (R, d_in), d_out = len(x), A.shape, len(B)
    choice = choose(device, direction, M, d_in, d_out, R, x.dtype, os.environ.get("ILORA_TABLE"))
    if "gemm" not in (name, choice.strategy):
        return None
    reason = why_not(x, weight, d_out if direction == "forward" else d_in, A)
    if name == "gemm" and reason is not None:
        raise ValueError(f"{source} cannot run {direction}: {reason}")
    return choice.tile if reason is None else None


def rows_of(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix whose rows are contiguous, matrix or its transpose, and whether it was turned."""
    return (matrix.t(), True) if matrix.stride(1) != 1 and matrix.stride(0) == 1 else (matrix, False)


def why_not(x: Tensor, weight: Tensor | None, D: int, A: Tensor) -> str | None:
    """None if y [M, D] = x · weight (either way round) can be one `gemm`, else the reason."""
    if weight is None:
        return "there is no weight to read: the base layer is opaque"
    if x.dtype.itemsize != 2:
        return f"it computes in float16 and bfloat16, not {x.dtype}"
    if not x.dtype == weight.dtype == A.dtype:
        return f"the activations are {x.dtype}, the weight {weight.dtype}, A and B {A.dtype}: they must be one dtype"
    if len(A) > 128:
        return f"rank {len(A)} is above 128"
    if D % 8:
        return f"rows of {D} outputs are not a multiple of 16 bytes"
    for name, matrix in (("the input", x), ("the weight", rows_of(weight)[0])):
        if matrix.stride(1) != 1 or matrix.stride(0) * 2 % 16 or matrix.stride(0) < matrix.shape[1]:
            return f"{name}'s strides {tuple(matrix.stride())} are not those of rows a multiple of 16 bytes long"
        if start(matrix):
            return f"{name} does not start at a multiple of 16 bytes"
    return None


def gemm_launch(
    device: Device, tile: GemmTile, dot: Dots, x: Tensor, weight: Tensor, y: Tensor, h: Tensor,
    low: Tensor, strides: tuple[int, int], mask: dict[str, Any], bias: Tensor | None,
) -> Launch:  # fmt: skip
    """weight [D, K], low's (column, rank) strides. Descriptors are made here, on the host: passed by value, they need
    no workspace and stay with a captured graph."""
    (M, D), K, R = y.shape, x.shape[1], h.shape[1]
    w, turned = rows_of(weight)
    blocks = [tile.k, tile.n] if turned else [tile.n, tile.k]
    args = {
        "x": TensorDescriptor(x, [M, K], [x.stride(0), 1], [tile.m, tile.k]),
        "w": TensorDescriptor(w, list(w.shape), [w.stride(0), 1], blocks),
        "y": TensorDescriptor(y, [M, D], [D, 1], [tile.m, tile.n // 4]),
        "h_ptr": h, "low_ptr": low, "bias_ptr": bias, "seed_ptr": mask["seed_ptr"],
        "M": M, "D": D, "K": K, "threshold": mask["threshold"], "low_col": strides[0], "low_rank": strides[1],
        "R": R, "UNIT": unit(strides[0]), "DROPOUT": mask["DROPOUT"], "TURNED": not turned, "DOT": dot.wide,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": gemm_step(R), "GROUP": tile.group,
        "AHEAD": R > 16 or not mask["DROPOUT"],  # both together spill a few registers under Triton 3.6
    }  # fmt: skip
    tiles = ceil_div(M, tile.m) * ceil_div(D, tile.n)
    return Launch(gemm, (min(device.sms, tiles),), args, tile.warps, tile.stages)
