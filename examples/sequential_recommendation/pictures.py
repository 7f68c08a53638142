"""Draws the pictures of a comparison from the results of `arms.perform`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .files import write_whole

Results = dict[str, list[dict[str, Any]]]  # by arm, one for each seed


def draw(found: Results, folder: Path, epoch: float, groups: Sequence[int] | None = None) -> list[Path]:
    """Writes gates.png if an arm has a gate, and hit-ratio.png if arms have curves. Returns the paths it wrote.

    epoch: the number of steps in an epoch. groups: the groups of the test users, in their order; the heat map is sorted
    by them. Raises ImportError without matplotlib. Each file appears complete or not at all.
    """
    gated = {name: results for name, results in found.items() if results[0].get("gate", {}).get("weights")}
    watched = {name: results for name, results in found.items() if results[0].get("curve")}
    paths = []
    if gated:
        paths.append(_save(_gates(gated, groups), folder / "gates.png"))
    if watched:
        paths.append(_save(_curves(watched, epoch), folder / "hit-ratio.png"))
    return paths


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _gates(gated: Results, groups: Sequence[int] | None) -> Any:
    """Draws, for each arm's first seed, the gates of the test users and below them the experts' mean weights."""
    figure = _figure(1.2 + 2.6 * len(gated), 5.4)
    axes = figure.subplots(2, len(gated), squeeze=False, height_ratios=[3, 1])
    for column, (name, results) in enumerate(gated.items()):
        weights, usage = results[0]["gate"]["weights"], results[0]["gate"]["usage"]
        order = sorted(range(len(weights)), key=lambda i: _sort_key(weights[i], groups[i] if groups else 0))
        heat, bars = axes[:, column]
        image = heat.imshow([weights[i] for i in order], aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        heat.set(title=name.replace(", ", "\n"), xticks=range(len(usage)))
        if groups:
            ends = [n for n in range(1, len(order)) if groups[order[n]] != groups[order[n - 1]]]
            for end in ends:
                heat.axhline(end - 0.5, color="white", linewidth=1)
        bars.bar(range(len(usage)), usage, color="#31688e", width=0.75)
        bars.axhline(1 / len(usage), color="0.35", linestyle="--", linewidth=1)
        bars.set(xlabel="expert", xticks=range(len(usage)), ylim=(0, 1))
        bars.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test user, by group" if groups else "test user, by largest expert")
    axes[1, 0].set_ylabel("mean weight")
    figure.colorbar(image, ax=axes[0, :].tolist(), aspect=40, pad=0.02, label="weight").outline.set_visible(False)
    return figure


def _sort_key(weights: Sequence[float], group: int) -> tuple[int, int, float]:
    """Sorts the users of a heat map by group, then by their heaviest expert, then by its weight."""
    most = max(weights)
    return group, weights.index(most), -most


def _curves(watched: Results, epoch: float) -> Any:
    """Draws the validation HitRatio@1 by epoch: a line for the mean of the seeds, a band from lowest to highest."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    for number, (name, results) in enumerate(watched.items()):
        shortest = min((result["curve"] for result in results), key=len)  # with patience, seeds end at different steps
        steps = [step for step, _ in shortest]
        values = [[result["curve"][i][1] for result in results] for i in range(len(steps))]
        epochs, style = [step / epoch for step in steps], {"color": f"C{number}"}
        axes.plot(epochs, [fmean(each) for each in values], marker="o", label=name, **style)
        axes.fill_between(epochs, [min(each) for each in values], [max(each) for each in values], alpha=0.15, **style)
    axes.set(xlabel="epoch", ylabel="HitRatio@1, validation users", ylim=(0, None), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _save(figure: Any, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())
    return path
