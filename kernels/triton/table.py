"""The measured choices of strategy.py: rows in the package, and a table on disk that goes ahead of them.

ILORA_TABLE names a JSON file, written by whoever measures, read once and checked:

    {"version": 1, "rows": [{"device": "NVIDIA H100 80GB HBM3", "direction": "forward", "dtype": "bfloat16", "M": 4096,
     "d_in": 4096, "d_out": 4096, "R": 16, "strategy": "gemm", "tile": [128, 256, 64, 8, 4, 8]}]}

"device" is torch's name of it; "direction" is "forward" or "backward" (dx); "tile" (m, n, k, warps, stages, group) may
be left out, and so may "dropout", true or false, for a row that holds only with or without it. Of rows equally near
the first counts; one of "whole" is passed over where that cannot be, so another may follow for the same shape.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .config import GemmTile

STRATEGIES = ("beta", "gemm", "whole")
DIRECTIONS = ("forward", "backward")


class Row(NamedTuple):
    """A measured choice."""

    device: str
    direction: str
    dtype: str
    M: int
    d_in: int
    d_out: int
    R: int
    strategy: str
    tile: GemmTile | None = None
    dropout: bool | None = None


MEASURED: tuple[Row, ...] = ()  # none yet: without a table, every device takes "beta"


def _tile(numbers: Any) -> GemmTile:
    if not isinstance(numbers, list) or len(numbers) != 6 or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"tile {numbers!r}: expected six positive integers")
    tile = GemmTile(*numbers)
    if not (tile.m in (64, 128, 256) and tile.n in (64, 128, 256) and tile.k in (16, 32, 64, 128)):
        raise ValueError(f"tile {numbers}: m and n are 64, 128 or 256, k 16 to 128, all powers of two")
    if tile.m * tile.n > 128 * 256:
        raise ValueError(f"tile {numbers}: more than 128 × 256 elements do not fit the registers")
    if tile.warps not in (4, 8, 16) or tile.stages > 8:
        raise ValueError(f"tile {numbers}: warps are 4, 8 or 16, stages at most 8")
    return tile


def _row(fields: Any) -> Row:
    """A row of the file; raises ValueError or TypeError with what is wrong."""
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    row = Row(**fields)
    if row.tile is not None:
        row = row._replace(tile=_tile(row.tile))
    choices = {"strategy": STRATEGIES, "direction": DIRECTIONS, "dtype": ("float16", "bfloat16")}
    for name, known in choices.items():
        if getattr(row, name) not in known:
            raise ValueError(f"{name} {getattr(row, name)!r} is none of {', '.join(known)}")
    if row.dropout not in (None, True, False):
        raise ValueError(f"dropout {row.dropout!r} is neither true nor false")
    for name in ("M", "d_in", "d_out", "R"):
        if type(getattr(row, name)) is not int or getattr(row, name) < 1:
            raise ValueError(f"{name} {getattr(row, name)!r} is not a positive integer")
    return row


@cache
def load_table(path: str) -> tuple[Row, ...]:
    """The rows of a table on disk, checked; ValueError says which file and which row."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"ILORA_TABLE={path!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("version") != 1 or not isinstance(content.get("rows"), list):
        raise ValueError(f'ILORA_TABLE={path!r}: expected {{"version": 1, "rows": [...]}}')
    rows = []
    for number, fields in enumerate(content["rows"]):
        try:
            rows.append(_row(fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"ILORA_TABLE={path!r}, row {number}: {error}") from error
    return tuple(rows)
