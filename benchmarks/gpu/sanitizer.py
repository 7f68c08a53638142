"""NVIDIA's compute-sanitizer over small layers, beside the other checks: bad memory accesses and races."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

TOOLS = ("memcheck", "racecheck")
LINES = 12  # of its output's end, for the report


class Watching(NamedTuple):
    """A checker at work: its process, and the file that it writes to."""

    tool: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]


def start() -> list[Watching]:
    """One process a tool, none where compute-sanitizer is not on the PATH."""
    command = shutil.which("compute-sanitizer")
    if command is None:
        return []
    watching = []
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else torch's pool hides what lies outside
    for tool in TOOLS:
        output = tempfile.TemporaryFile()  # noqa: SIM115 (finish closes it)
        arguments = [command, "--tool", tool, "--report-api-errors", "no", sys.executable, "-m", "gpu.correctness"]
        folder = Path(__file__).resolve().parent.parent
        process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        watching.append(Watching(tool, process, output))
    return watching


def finish(watching: list[Watching], left: Callable[[], float]) -> list[dict[str, Any]]:
    """A row a tool: its findings as it counts them and the errors among them (None where it did not come to that), and
    its last lines."""
    rows = []
    for tool, process, output in watching:
        try:
            status: int | None = process.wait(timeout=max(left(), 0.1))
        except subprocess.TimeoutExpired:
            _end(process)
            status = None
        output.seek(0)
        text = output.read().decode(errors="replace")
        output.close()
        found = re.search(r"SUMMARY: (\d+) (?:error|hazard)", text)
        wrong = re.search(r"SUMMARY: \d+ hazards? displayed \((\d+) error", text) or found  # others are warnings
        rows.append(
            {
                "tool": tool,
                "status": status,
                "finished": status is not None,
                "ran": "the small layers ran" in text,
                "findings": int(found[1]) if found else None,
                "errors": int(wrong[1]) if wrong else None,
                "last_lines": text.strip().splitlines()[-LINES:],
            }
        )
    return rows


def faults(row: dict[str, Any]) -> int:
    """What counts against the kernels in a row of `finish`: its errors; 1 where it ended without having watched the
    small layers to their end, or without a count; 0 where it was not let finish, which proves nothing."""
    if not row["finished"]:
        return 0
    return row["errors"] if row["ran"] and row["errors"] is not None else max(row["errors"] or 0, 1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The checker and the program under it: both are in the session that it was started in."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
