"""The lines, fields, numbers, times and records of raw files, each refused by file and line where it is wrong."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

Line = tuple[str, str]  # "file:line", for messages, and the text
EARLIEST, LATEST = 631_152_000, 4_102_444_800  # the years 1990 and 2100, in seconds since 1970
BROKEN_LITERAL = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)  # what ast.literal_eval raises


def find_files(folder: Path, *choices: Sequence[str]) -> list[Path]:
    """The files of the first choice that is there whole. Raises FileNotFoundError that names all choices."""
    for names in choices:
        found = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in names]
        if all(found):
            return [path for path in found if path]
    expected = ", or ".join(" and ".join(names) for names in choices)
    raise FileNotFoundError(f"{folder}: expected {expected}, each as it is or as .gz; {content(folder)}")


def content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    return "there is no such folder" if names is None else f"it has {', '.join(names[:12]) or 'nothing'}"


def lines_of(path: Path, encoding: str = "utf-8") -> Iterator[Line]:
    """Yields the lines that are not empty, without line ends and byte order mark."""
    number = 0
    try:
        shown = {"total": path.stat().st_size, "desc": path.name, "unit": "B", "unit_scale": True}
        with path.open("rb") as packed, tqdm(**shown, leave=False, disable=None) as bar:
            for number, raw in enumerate(gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed, 1):
                if number % 50_000 == 0:
                    bar.update(packed.tell() - bar.n)
                text = raw.decode(encoding).rstrip("\r\n")
                text = text.removeprefix("\ufeff") if number == 1 else text
                if text.strip():
                    yield f"{path}:{number}", text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: expected {encoding}: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: the packed file is damaged or cut short: {error}") from error


def old_lines(path: Path) -> list[Line]:
    """The lines of a file in UTF-8 or, as the older MovieLens files are, in Latin-1."""
    try:
        return list(lines_of(path))
    except ValueError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            return list(lines_of(path, "latin-1"))
        raise


def body(lines: Iterable[Line], header: str) -> Iterator[Line]:
    """The lines behind the header. Raises ValueError if the first line is another one, or if there is none."""
    lines = iter(lines)
    where, text = next(lines, ("the file is empty", ""))
    if text != header:
        raise ValueError(f"{where}: expected the header {header!r}, got {text!r}")
    return lines


def fields_of(line: Line, separator: str, names: str) -> list[str]:
    """As many fields as there are names. None may be empty."""
    found, expected = line[1].split(separator), names.split()
    if len(found) != len(expected) or not all(found):
        raise ValueError(
            f"{line[0]}: expected {len(expected)} fields between {separator!r}, {', '.join(expected)}, got {line[1]!r}"
        )
    return found


def number(where: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{where}: expected an integer, got {text!r}") from error


def time_of(where: str, text: str, unit: int = 1) -> int:
    """Seconds, or with unit=1000 milliseconds, since 1970."""
    time = number(where, text)
    if not EARLIEST <= time / unit < LATEST:
        kind = "seconds" if unit == 1 else "milliseconds"
        raise ValueError(f"{where}: expected a time in {kind} since 1970, of the years 1990 to 2099, got {text!r}")
    return time


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of lines in JSON or written as Python dictionaries, as the older published files are."""
    for where, text in lines_of(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            try:
                record = ast.literal_eval(text)
            except BROKEN_LITERAL as error:
                raise ValueError(f"{where}: expected a record in JSON, got {text[:60]!r}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a record in JSON, got {text[:60]!r}")
        yield where, record


def value(record: dict[str, Any], *keys: str) -> str:
    """The first of the keys that has a text or an integer, as text, or ""."""
    values = (record.get(key) for key in keys)
    return next((str(v).strip() for v in values if isinstance(v, str | int) and str(v).strip()), "")


def needed(where: str, record: dict[str, Any], *keys: str) -> str:
    if found := value(record, *keys):
        return found
    raise ValueError(f"{where}: expected a text or integer for {' or '.join(keys)}, got {str(record)[:90]}")


def day_of(where: str, text: str) -> int:
    """The number of a day such as 2018-1-5."""
    try:
        day = date(*map(int, text.split("-")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected a date such as 2018-01-05, got {text!r}") from error
    if not 1990 <= day.year < 2100:
        raise ValueError(f"{where}: expected a date of the years 1990 to 2099, got {text!r}")
    return day.toordinal()
