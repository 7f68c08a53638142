"""The lines of a comparison's table, from the results of `arms.perform`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .metrics import Ratio, over_seeds


def row(results: Sequence[dict[str, Any]]) -> str:
    """One arm's line, over its seeds. The interval is that of the mean on the one set of tests."""
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
    """What became of the hit ratio where users were given somebody else's gate: does it tell the group, or more?"""
    for name, results in found.items():
        given = [r["gate"]["with_gate_of"] for r in results if "with_gate_of" in r.get("gate", {})]
        if given:
            means = (f"{whose} {over_seeds([g[whose] for g in given]).mean:.4f}" for whose in given[0])
            yield f"\n{name}: HitRatio@1 with the gate of: {', '.join(means).replace('_', ' ')}"
