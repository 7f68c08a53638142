"""Writes the table of a comparison from the results of `arms.perform`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .metrics import Ratio, hit_ratio, ndcg, over_seeds


def described_ranks(rank: Tensor) -> dict[str, Any]:
    """The figures of ranks [N], JSON-able."""
    first = hit_ratio(rank)
    return {
        "hits": first.hits,
        "total": first.total,
        "hit_ratio_5": hit_ratio(rank, 5).value,
        "ndcg_5": ndcg(rank, 5),
        "ndcg_20": ndcg(rank, 20),
    }


def table(name: str, baselines: dict[str, dict[str, Any]], arms: dict[str, list[dict[str, Any]]]) -> str:
    """The comparison as a Markdown table. arms: the results of `arms.perform` by arm, one for each seed."""
    total, seeds = next(iter(baselines.values()))["total"], max(map(len, arms.values()), default=0)
    head = f"| {name}: {total} tests, {seeds} seed{'s' * (seeds != 1)} | adapters and gate | lr "
    head += f"| HitRatio@1 by likelihood{' ± between seeds' * (seeds > 1)} [95% of the tests] "
    head += "| HitRatio@5 | NDCG@5 | ValidRatio | HitRatio@1 of texts |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for baseline, figures in baselines.items():
        ratio = Ratio(figures["hits"], figures["total"])
        lines.append(f"| {baseline} | | | {ratio} | {figures['hit_ratio_5']:.4f} | {figures['ndcg_5']:.4f} | | |")
    return "\n".join([*lines, *map(row, arms.values()), *exchange_lines(arms)])


def row(results: Sequence[dict[str, Any]]) -> str:
    """The line of one arm, over its seeds. The interval of the mean covers the choice of tests, not that of seeds."""
    first, total = results[0], results[0]["total"]
    ratio = over_seeds([result["hits"] / total for result in results])
    low, high = Ratio(round(ratio.mean * total), total).interval()
    five, gain = (over_seeds([result[name] for result in results]).mean for name in ("hit_ratio_5", "ndcg_5"))
    texts = ["", ""]
    if "texts" in first:
        texts = [str(over_seeds([result["texts"][name] / total for result in results])) for name in ("valid", "hits")]
    trained = first["run"]["arm"]["gate"] is not None
    size, lr = (f"{first['trainable']:,}", f"{first['run']['settings']['lr']:g}") if trained else ("", "")
    name = first["run"]["arm"]["name"]
    return (
        f"| {name} | {size} | {lr} | {ratio} [{low:.3f}, {high:.3f}] | {five:.4f} | {gain:.4f} | {' | '.join(texts)} |"
    )


def exchange_lines(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Lines with the hit ratios under somebody else's gate. They show whether a gate tells more than the group."""
    for name, results in found.items():
        given = [r["gate"]["with_gate_of"] for r in results if "with_gate_of" in r.get("gate", {})]
        if given:
            means = (f"{whose} {over_seeds([g[whose] for g in given]).mean:.4f}" for whose in given[0])
            yield f"\n{name}: HitRatio@1 with the gate of: {', '.join(means).replace('_', ' ')}"
