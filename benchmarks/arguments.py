"""Types of command-line options: each turns a text into a value, or says what was expected."""

from __future__ import annotations

import importlib.util
import os
from argparse import ArgumentTypeError
from pathlib import Path

import torch


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None


def count(text: str) -> int:
    value = number(text)
    if not (value >= 1 and value.is_integer()):
        raise ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(value)


def counts(text: str) -> list[int]:
    """Whole numbers of 1 or more, separated by commas."""
    return [count(part) for part in text.split(",")]


def probabilities(text: str) -> list[float]:
    """Dropout probabilities, separated by commas."""
    values = [number(part) for part in text.split(",")]
    if not all(0 <= p < 1 for p in values):
        raise ArgumentTypeError(f"{text!r}: expected 0 <= p < 1")
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    """d_in x d_out of several layers, separated by commas."""
    pairs = [[part.strip() for part in each.split("x")] for each in text.split(",")]
    if not all(len(pair) == 2 and all(part.isdigit() and int(part) for part in pair) for pair in pairs):
        raise ArgumentTypeError(f"{text!r}: expected d_in x d_out, as 576x1536,1024x1024")
    return [(int(d_in), int(d_out)) for d_in, d_out in pairs]


def device(text: str) -> torch.device:
    """A device that torch finds here: cpu or cuda, with or without an index."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ArgumentTypeError(f"{text!r}: expected cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"{text!r}: expected cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"{text!r}: torch finds {torch.cuda.device_count() or 'no'} GPU here")
    return found


def new_file(text: str) -> Path:
    """A file that can be written in the end."""
    file = Path(text)
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ArgumentTypeError(f"{file}: its folder does not exist")
    if file.is_dir() or file.name in ("", ".."):
        raise ArgumentTypeError(f"{file}: a folder, expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise ArgumentTypeError(f"{file}: its folder cannot be written to")
    return file


def plot_file(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentTypeError("matplotlib is not installed")
    if not text.lower().endswith(".png"):
        raise ArgumentTypeError(f"{text}: expected a name that ends in .png")
    return new_file(text)
