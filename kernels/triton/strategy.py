"""Which way the frozen product and the update meet, for a shape on a device.

"beta": the update is written first and the frozen product is added on top (cuBLAS, beta = 1). "gemm": one kernel
computes both, upon ranks that others have summed and gated (gemm.py). "whole": it gates the ranks and sums them too
(whole.py), unless a mask stands before A or projections share them; where it finds them gated, for the dx of a shared
input, it is "gemm".
A choice is a pure function of shapes and of a table that is read once: nothing is tuned while a graph is captured, and
results repeat. ILORA_STRATEGY=beta|gemm|whole|auto forces it.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .config import GemmTile, gemm_fits, gemm_tile, pow2, start
from .gemm import rows_of
from .launch import Device
from .table import MEASURED, STRATEGIES, load_table


class Choice(NamedTuple):
    """strategy: one of STRATEGIES; tile: the one that its GEMM takes, None for "beta"."""

    strategy: str
    tile: GemmTile | None = None


BETA = Choice("beta")


@lru_cache(maxsize=4096)
def choose(
    device: Device, direction: str, M: int, d_in: int, d_out: int, R: int, dtype: torch.dtype,
    table: str | None = None, dropout: bool = False, whole: bool = True,
) -> Choice:  # fmt: skip
    """What was measured for the nearest shape, if M, d_in, d_out and R are all within a factor of 2 of it; else "beta":
    it costs one pass more, whereas a GEMM never timed on a device may cost anything.

    Rows beyond the most that were measured count as those. table: a file whose rows go ahead of MEASURED. whole:
    whether rows of "whole" count. The tile is the table's, or None where that does not fit or there is none.
    """
    near = []
    for row in (load_table(table) if table else ()) + MEASURED:
        if (row.device, row.direction, f"torch.{row.dtype}") != (device.name, direction, str(dtype)):
            continue
        if row.dropout not in (None, dropout) or (row.strategy == "whole" and not whole):
            continue
        apart = max(abs(math.log2(ratio)) for ratio in (row.d_in / d_in, row.d_out / d_out, row.R / R))
        if apart <= 1.0:
            near.append((apart, row))
    most = max((row.M for _, row in near), default=M)
    best, found = math.inf, BETA
    for apart, row in near:
        distance = max(apart, abs(math.log2(row.M / min(M, most))))
        if distance <= 1.0 and distance < best:
            like = row.strategy != "beta" and pow2(row.R, 16, 128) == pow2(R, 16, 128)  # else it has other registers
            tile = row.tile if like and row.tile and gemm_fits(device, row.tile, R, row.strategy) else None
            best, found = distance, Choice(row.strategy, tile)
    return found


def pick(
    device: Device, direction: str, x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, asked: str | None,
    ranks: Tensor | None, gated: bool, dropout: bool,
) -> Choice:  # fmt: skip
    """The way for y [M, D] = x · weight + …, with a tile where it is a GEMM.

    ranks: the matrix [R, K] that "whole" would multiply x by too, None where it finds them summed; gated: it finds them
    gated; dropout: there is a mask. asked: one of STRATEGIES or "auto"; None asks ILORA_STRATEGY. Raises ValueError for
    a name unknown, and for one that cannot run, with the reason: a forced choice never falls back silently.
    """
    name = asked or os.environ.get("ILORA_STRATEGY") or "auto"
    source = f"{'strategy' if asked else 'ILORA_STRATEGY'}={name!r}"
    if name not in (*STRATEGIES, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join(STRATEGIES)}, auto")
    M, (R, d_in), d_out = len(x), A.shape, len(B)
    D = d_out if direction == "forward" else d_in
    if name == "beta":
        return BETA
    if name == "whole" and gated:
        name = "gemm"
    reason, refused = why_not(x, weight, D, A), "the ranks are gated" if gated else why_not_whole(device, A, ranks)
    shape, table = (M, d_in, d_out, R, x.dtype), os.environ.get("ILORA_TABLE")
    choice = choose(device, direction, *shape, table, dropout, whole=refused is None and name != "gemm")
    if name == "auto":
        name = "beta" if reason else choice.strategy
    elif reason := reason or (refused if name == "whole" else None):
        raise ValueError(f"{source} cannot run {direction}: {reason}")
    if name == "beta":
        return BETA
    measured = choice.tile if name == choice.strategy else None
    return Choice(name, measured or gemm_tile(device, M, D, R, name))


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
    return _why_not_read("the input", x) or _why_not_read("the weight", rows_of(weight)[0])


def why_not_whole(device: Device, A: Tensor, ranks: Tensor | None) -> str | None:
    """None if that can be one `whole`, else the reason."""
    if not device.tma:
        return "the device loads no tiles by tensor descriptor, as sm_90 and later do"
    if len(A) > 32:  # more are spilled
        return f"rank {len(A)} is above 32"
    return None if ranks is None else _why_not_read("A or B", rows_of(ranks)[0])


def _why_not_read(name: str, matrix: Tensor) -> str | None:
    if matrix.stride(1) != 1 or matrix.stride(0) * 2 % 16 or matrix.stride(0) < matrix.shape[1]:
        return f"{name}'s strides {tuple(matrix.stride())} are not those of rows a multiple of 16 bytes long"
    return f"{name} does not start at a multiple of 16 bytes" if start(matrix) else None
