"""Draws the pictures of a comparison from the results of `arms.perform`."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import ilora

from .files import write_whole

Results = dict[str, list[dict[str, Any]]]  # by arm, one for each seed


def draw(found: Results, folder: Path, epoch: float) -> list[Path]:
    """Writes gates.png of the first arm with a gate, and hit-ratio.png if arms have curves. Returns the paths it wrote.

    epoch: the number of steps in an epoch. Each file appears complete or not at all.
    """
    gates = [weights for results in found.values() if (weights := results[0].get("gate", {}).get("weights"))]
    watched = {name: results for name, results in found.items() if results[0].get("curve")}
    paths = [ilora.plot_gates(torch.tensor(weights), folder / "gates.png") for weights in gates[:1]]
    if watched:
        drawn = io.BytesIO()
        _curves(watched, epoch).savefig(drawn, format="png")
        paths.append(folder / "hit-ratio.png")
        write_whole(paths[-1], drawn.getvalue())
    return paths


def _curves(watched: Results, epoch: float) -> Any:
    """Draws the validation HitRatio@1 by epoch: a line for the mean of the seeds, a band from lowest to highest."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for number, (name, results) in enumerate(watched.items()):
        shortest = min((result["curve"] for result in results), key=len)  # with patience, seeds end at different steps
        steps = [step for step, _ in shortest]
        values = [[result["curve"][i][1] for result in results] for i in range(len(steps))]
        epochs, color = [step / epoch for step in steps], f"C{number}"
        axes.plot(epochs, [fmean(each) for each in values], marker="o", label=name, color=color)
        lowest, highest = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(epochs, lowest, highest, alpha=0.15, color=color)
    axes.set(xlabel="epoch", ylabel="HitRatio@1, validation users", ylim=(0, None), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
