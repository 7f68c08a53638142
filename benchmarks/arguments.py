"""The options of a benchmark from their texts: a value, or ValueError that names the option and what came."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import torch


def number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number") from None


def whole_numbers(option: str, text: str) -> list[int]:
    """Of 1 or more, separated by commas."""
    values = [number(option, part) for part in text.split(",")]
    if not all(value >= 1 and value.is_integer() for value in values):
        raise ValueError(f"{option} {text}: expected whole numbers of 1 or more")
    return [int(value) for value in values]


def probabilities(option: str, text: str) -> list[float]:
    """Of dropout, separated by commas."""
    values = [number(option, part) for part in text.split(",")]
    if not all(0 <= p < 1 for p in values):
        raise ValueError(f"{option} {text}: expected 0 <= p < 1")
    return values


def device(text: str) -> torch.device:
    """cpu or cuda, with or without an index, that torch finds here."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device {text}: expected cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text}: expected cpu or cuda")
    count = torch.cuda.device_count()
    if found.type == "cuda" and not count:
        raise ValueError(f"--device {text}: torch finds no GPU here")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"--device {text}: torch finds {count} GPUs here")
    return found


def at_least_one(**values: int | None) -> None:
    """Refuses a value below 1, by the name of its option; None is none."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected 1 or more")


def divided(option: str, ranks: Iterable[int], experts: Iterable[int]) -> None:
    """Every number of experts must divide every rank; `option` is what the ranks are called."""
    for rank, count in itertools.product(ranks, experts):
        if rank % count:
            raise ValueError(f"{option} {rank} --experts {count}: the experts must divide the rank evenly")


def writable(option: str, file: Path | None) -> None:
    """Refuses what could not be written in the end: a folder, a file in a folder that is not there or is read-only."""
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {file}: its folder does not exist")
    if file.is_dir() or file.name in ("", ".."):
        raise ValueError(f"{option} {file}: a folder, expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {file}: its folder cannot be written to")
