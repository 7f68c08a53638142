"""Writes the table of a comparison from the results of `arms.perform`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .metrics import Ratio, hit_ratio, ndcg, over_seeds, paired


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


def table(name: str, baselines: dict[str, list[dict[str, Any]]], arms: dict[str, list[dict[str, Any]]]) -> str:
    """The comparison as a Markdown table, followed by the paired tests. Both by name, with results for each seed.

    baselines: from `described_ranks`. arms: from `arms.perform`.
    """
    total, seeds = next(iter(baselines.values()))[0]["total"], max(map(len, arms.values()), default=0)
    head = f"| {name}: {total} tests, {seeds} seed{'s' * (seeds != 1)} | adapters and gate | lr "
    head += f"| HitRatio@1 by likelihood{' ± between seeds' * (seeds > 1)} [95% of the tests] "
    head += "| HitRatio@5 | NDCG@5 | ValidRatio | HitRatio@1 of texts |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | | | {' | '.join(_figures(results))} | | |" for name, results in baselines.items()]
    return "\n".join([*lines, *map(row, arms.values()), *paired_lines(arms), *exchange_lines(arms)])


def _figures(results: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """(HitRatio@1 with its interval, HitRatio@5, NDCG@5). The interval covers the choice of tests, not of seeds."""
    total = results[0]["total"]
    ratio = over_seeds([result["hits"] / total for result in results])
    low, high = Ratio(round(ratio.mean * total), total).interval()
    five, gain = (over_seeds([result[name] for result in results]).mean for name in ("hit_ratio_5", "ndcg_5"))
    return f"{ratio} [{low:.3f}, {high:.3f}]", f"{five:.4f}", f"{gain:.4f}"


def row(results: Sequence[dict[str, Any]]) -> str:
    """The line of one arm, over its seeds."""
    first, total = results[0], results[0]["total"]
    texts = ["", ""]
    if "texts" in first:
        texts = [str(over_seeds([result["texts"][name] / total for result in results])) for name in ("valid", "hits")]
    trained = first["run"]["arm"]["gate"] is not None
    size, lr = (f"{first['trainable']:,}", f"{first['run']['settings']['lr']:g}") if trained else ("", "")
    name = first["run"]["arm"]["name"]
    return f"| {name} | {size} | {lr} | {' | '.join((*_figures(results), *texts))} |"


def paired_lines(arms: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A second table: the first arm with a sequence gate against every other trained arm that has the same seeds."""
    trained = {name: found for name, found in arms.items() if found[0]["run"]["arm"]["gate"] is not None}
    ours = next((name for name, found in trained.items() if found[0]["run"]["arm"]["gate"] == "sequence"), None)
    if ours is None:
        return
    others = [name for name in trained if name != ours and len(trained[name]) == len(trained[ours])]
    if not others:
        return
    ranks = {name: torch.tensor([result["ranks"] for result in trained[name]]) for name in (ours, *others)}
    yield (
        f"\n| {ours}, against | HitRatio@1 less the other's [95%, users and seeds drawn again] "
        "| right by it alone : by the other alone, of each seed | McNemar's p of each seed |\n|---|---|---|---|"
    )
    for name in others:
        found = paired(ranks[ours], ranks[name])
        low, high = found.interval
        counts, p = ", ".join(f"{a}:{b}" for a, b in found.only), ", ".join(f"{p:.1g}" for p in found.p_values)
        yield f"| {name} | {found.difference:+.4f} [{low:+.3f}, {high:+.3f}] | {counts} | {p} |"


def exchange_lines(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Lines with the hit ratios under somebody else's gate. They show whether a gate tells more than the group."""
    for name, results in found.items():
        given = [r["gate"]["with_gate_of"] for r in results if "with_gate_of" in r.get("gate", {})]
        if given:
            means = (f"{whose} {over_seeds([g[whose] for g in given]).mean:.4f}" for whose in given[0])
            yield f"\n{name}: HitRatio@1 with the gate of: {', '.join(means).replace('_', ' ')}"
