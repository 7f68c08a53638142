"""Checks the values of command-line options before any work. Errors say what was expected and what was given."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path

MOST_SEED = 2**32 - 1  # numpy's limit; the Trainer seeds numpy too


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`, or from `least` on where most is None."""
    expected = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return number

    return read


def real(zero: bool) -> Callable[[str], float]:
    """An argparse type: a finite number above zero. zero: whether zero is allowed as well."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise argparse.ArgumentTypeError(f"expected a number {'of 0 or more' if zero else 'above 0'}, got {text!r}")
        return number

    return read


def refuse_repeats(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]) -> None:
    """Ends the program if an option that takes several values was given one of them twice: it would count twice."""
    for name in names:
        values = getattr(options, name) or []
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            parser.error(f"{_flag(name)} {twice[0]}: given more than once")


def refuse_idle(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Ends the program if one of these options was given, because it would be ignored. Their default is None or False.

    why: the option that makes them meaningless.
    """
    for name in names:
        if (value := getattr(options, name)) not in (None, False):
            parser.error(f"{_flag(name)}{'' if value is True else f' {value}'}: means nothing with {why}")


def refuse_missing_folder(parser: argparse.ArgumentParser, model: str) -> None:
    """Ends the program if the model is a path where there is no folder. A name on the Hub does not look like a path."""
    looks = Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if looks and not Path(model).is_dir():
        parser.error(f"--model {model}: expected the folder of a causal language model, there is none")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
