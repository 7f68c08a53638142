"""How a gate uses its experts: the balance loss, statistics and a picture. A gate is [N, E] or [G, N, E]."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import gate_rows


def balance_loss(gate: Tensor) -> Tensor:
    """The squared coefficient of variation of the experts' importance (arXiv 1701.06538), a scalar, differentiable.

    E · Σ_e share_e² - 1 with share_e = mean_i g_ie / Σ_e' mean_i g_ie', averaged over layers: 0 when all experts are
    used alike, E - 1 when one does everything. In float32 or wider.
    Raises: ValueError for a gate that is not [N, E] or [G, N, E] with at least one instance, TypeError for one that is
    no float tensor.
    """
    gate = gate_rows(gate)
    importance = gate.mean(-2)
    mean = importance.mean(-1)
    variance = (importance - mean[..., None]).square().mean(-1)  # this form is exactly 0 for equal experts
    return (variance / mean.square().clamp_min(torch.finfo(gate.dtype).tiny)).mean()


@dataclass(frozen=True)
class GateStats:
    """entropy: mean over instances of the gate's entropy / log E, from 0 (one expert each) to 1 (uniform); 0 if E = 1.
    usage: [E] mean gate. top1: [E] share of instances whose largest weight is e's; a tie is shared.
    balance: `balance_loss`. instances: N. With layers' own gates, means over the layers.
    """

    entropy: float
    usage: tuple[float, ...]
    top1: tuple[float, ...]
    balance: float
    instances: int

    def __str__(self) -> str:
        head = f"gate of {self.instances} instances, {len(self.usage)} experts"
        usage, top1 = ("".join(f"{share:8.3f}" for share in shares) for shares in (self.usage, self.top1))
        return f"{head}: entropy {self.entropy:.3f}, balance loss {self.balance:.4f}\n  usage{usage}\n  top1 {top1}"


def gate_stats(gate: Tensor) -> GateStats:
    """The numbers of a gate [N, E] or [G, N, E]. Raises as `balance_loss`."""
    gate = gate_rows(gate).detach().cpu()
    N, E = gate.shape[-2:]
    shares = gate / gate.sum(-1, keepdim=True).clamp_min(torch.finfo(gate.dtype).tiny)
    entropy = float(torch.special.entr(shares.clamp_min(0)).sum(-1).mean()) / math.log(E) if E > 1 else 0.0
    largest = (gate == gate.amax(-1, keepdim=True)).to(gate.dtype)
    top1 = (largest / largest.sum(-1, keepdim=True)).reshape(-1, E).mean(0)
    usage = gate.reshape(-1, E).mean(0)
    return GateStats(entropy, tuple(usage.tolist()), tuple(top1.tolist()), float(balance_loss(gate)), N)


def plot_gates(gate: Tensor, path: str | os.PathLike[str], labels: Sequence[str] | None = None) -> Path:
    """Draws a gate [N, E] or [G, N, E] into an image file of the path's type (png, pdf, svg); returns the path.

    A heat map of instances × experts (of the layers' mean), if layers have their own gates one of layers × experts, and
    the experts' mean weights. labels: the instances' N names, shown where they can be read. More than 40 instances are
    sorted by their largest expert. The file appears whole or not at all.
    Raises: ImportError without matplotlib; ValueError as `balance_loss`, or for another number of labels.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("plot_gates needs matplotlib: pip install matplotlib") from error
    gate = gate_rows(gate).detach().cpu()
    if labels is not None and len(labels) != gate.shape[-2]:
        raise ValueError(f"labels: expected one for each of {gate.shape[-2]} instances, got {len(labels)}")
    each, title = gate.reshape(-1, *gate.shape[-2:]).mean(0), "Weight of each instance"
    if len(each) > 40:
        weight, top = each.max(-1)
        each, labels = each[(top - 0.5 * weight / weight.max()).argsort(stable=True)], None
        title += ", sorted by its largest expert"
    maps = [("instance", title, each)]
    if gate.dim() == 3 and len(gate) > 1:
        maps.append(("layer", "Mean weight in each layer", gate.mean(1)))
    figure = Figure(figsize=(5 * len(maps) + 3.5, min(5.5, 2.5 + 0.3 * len(each))), layout="constrained", dpi=150)
    *heat, bars = figure.subplots(1, len(maps) + 1, width_ratios=[3] * len(maps) + [2])
    for axes, (what, title, rows) in zip(heat, maps, strict=True):
        figure.colorbar(axes.imshow(rows.numpy(), aspect="auto", vmin=0), ax=axes, aspect=40, pad=0.02)
        axes.set(xlabel="expert", ylabel=what, title=title)
        axes.yaxis.get_major_locator().set_params(integer=True)
    if labels is not None:
        heat[0].set_yticks(range(len(each)), labels, fontsize=8)
    E = each.shape[1]
    bars.bar(range(E), each.mean(0).tolist(), color="#31688e")
    bars.axhline(1 / E, color="0.35", linestyle="--", linewidth=1, label=f"uniform, {1 / E:.2f}")
    bars.set(xlabel="expert", title="Mean weight")
    bars.margins(y=0.25)
    bars.legend(frameon=False)
    for axes in (*heat, bars):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{len(each)} instances, {E} experts, entropy {gate_stats(gate).entropy:.2f} of 1")
    return _save_whole(figure, Path(path))


def _save_whole(figure: Any, path: Path) -> Path:
    """Writes a temporary file in the same folder and renames it, so that no half-written picture is ever seen."""
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(whole, format=path.suffix[1:] or "png")
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
    return path
