"""Which layers are measured, in order of importance: a sweep that stops early has the more important ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from peers import Settings


class Sizes(NamedTuple):
    """What a sweep goes over; the first of each tuple but `dropouts` is what matters most."""

    rows: tuple[int, ...]
    squares: tuple[int, ...]
    oblong: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    experts: tuple[int, ...]
    batch: int
    dropouts: tuple[float, ...] = (0.0, 0.1)


FULL = Sizes((4096, 8192, 2048, 1024), (4096, 1024, 2048, 8192), ((4096, 1024), (4096, 14336), (14336, 4096)),
             (16, 8, 64), (4, 8), 8)  # fmt: skip
QUICK = FULL._replace(rows=(4096,), squares=(4096, 1024), ranks=(16, 64), experts=(4,))
TINY = Sizes((80, 72), (16,), ((16, 24),), (8, 4), (4, 2), 8)  # more than 64 rows: fewer are decoding's

LEVELS = (
    "the main M, square, main R and E, with all peers",
    "the main M, oblong, main R and E",
    "the main M, other R",
    "other M, main R and E",
    "the main M and R, other E",
    "other M, other R",
    "other E, the rest",
)


class Planned(NamedTuple):
    """level: index of LEVELS; in level 0 all peers are timed, elsewhere few."""

    level: int
    settings: Settings


def layers(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Planned]:
    """Every combination once, by level and within one in the order of `sizes`."""
    shapes = [(d, d) for d in sizes.squares] + list(sizes.oblong)
    every = itertools.product(sizes.rows, shapes, sizes.ranks, sizes.experts, sizes.dropouts)
    planned = [
        Planned(
            _level(sizes, M, d_in == d_out, R, E),
            Settings(d_in, d_out, sizes.batch, M // sizes.batch, R, E, p, dtype, device),
        )
        for M, (d_in, d_out), R, E, p in every
    ]
    return sorted(planned, key=lambda each: each.level)  # stable


def _level(sizes: Sizes, rows: int, square: bool, rank: int, experts: int) -> int:
    main = rows == sizes.rows[0]
    if experts != sizes.experts[0]:
        return 4 if main and rank == sizes.ranks[0] else 6
    if rank != sizes.ranks[0]:
        return 2 if main else 5
    if not main:
        return 3
    return 0 if square else 1


def left_out(planned: Iterable[Planned]) -> list[str]:
    """What a sweep did not come to, a line a level."""
    counts: dict[int, int] = {}
    for each in planned:
        counts[each.level] = counts.get(each.level, 0) + 1
    return [f"no time for {count} of: {LEVELS[level]}" for level, count in sorted(counts.items())]


def decodings(dry: bool) -> Iterator[tuple[int, int]]:
    """(d_in, d_out) of the decode sweep, in order of importance."""
    yield from ((16, 24),) if dry else ((4096, 4096), (1024, 1024), (4096, 14336), (14336, 4096), (2048, 2048))


def decode_rows(dry: bool, quick: bool) -> tuple[int, ...]:
    return (1, 16, 17) if dry else (1, 8, 64) if quick else (1, 2, 4, 8, 16, 32, 64)
