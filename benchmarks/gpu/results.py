"""The report's files: one JSON, whole after every part, and what is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from report import write_json, write_text

from . import figures, table
from .markdown import markdown

SAME = ("device", "torch", "triton", "git_commit", "git_changed")  # what parts of one report have in common


def folder_of(out: Path, known: dict[str, Any], dry: bool) -> Path:
    """The device's own folder below `out`; that of a dry run can be mistaken for no device's."""
    return out / ("dry-run" if dry else "gpu-" + re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-"))


def earlier_parts(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The parts of a report of the same device, versions and commit that is there already; ValueError for another."""
    if not file.exists():
        return {}
    earlier = load(file)
    differing = [name for name in SAME if earlier["machine"].get(name) != results["machine"][name]]
    if differing:
        now = ", ".join(f"{name} {earlier['machine'].get(name)}, now {results['machine'][name]}" for name in differing)
        raise ValueError(f"{file} is another report ({now}): move it away, or name another --out")
    return earlier["parts"]


def load(file: Path) -> dict[str, Any]:
    """A report's JSON; ValueError for any other file."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(results, dict) or results.get("kind") != "gpu_report":
        raise ValueError(f"{file} is no report of gpu_report.py")
    return results


def save(results: dict[str, Any], folder: Path) -> None:
    write_json(results, folder / "report.json")


def render(results: dict[str, Any], folder: Path, plots: bool = True) -> list[str]:
    """Writes Markdown, strategy table and plots; their names."""
    write_text(markdown(results), folder / "report.md")
    names = ["report.md"]
    if not results["dry_run"] and table.write(results, folder / "strategy-table.json"):
        names.append("strategy-table.json")
    return names + (figures.draw(results, folder) if plots else [])
