"""Writes the table of a comparison from the results of `arms.perform`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from statistics import fmean
from typing import Any

import torch

from .experiments import LATER
from .metrics import Ratio, described_ranks, hit_ratio, ndcg, over_seeds, paired

Results = dict[str, list[dict[str, Any]]]  # by name, one for each seed


def table(name: str, baselines: Results, arms: Results, kinds: dict[str, list[bool]]) -> str:
    """The comparison as a Markdown table, followed by the paired tests and by what is known of some tests alone.

    baselines: from `compare.prepare`. arms: from `arms.perform`. kinds: from `Experiment.kinds_of_tests`. If they tell
    which targets are later than the history, the table counts those alone, and all tests only appear among the kinds.
    """
    every = baselines | arms
    if later := kinds.get(LATER):
        baselines, arms, name = only(baselines, later), only(arms, later), f"{name}, {LATER}"
    total, seeds = next(iter(baselines.values()))[0]["total"], max(map(len, [*baselines.values(), *arms.values()]))
    head = f"| {name}: {total} tests, {seeds} seed{'s' * (seeds != 1)} | adapters and gate | lr "
    head += f"| HitRatio@1 by likelihood{' ± between seeds' * (seeds > 1)} [95% of the tests] "
    written = any("texts" in results[0] for results in arms.values())
    head += "| HitRatio@5 | NDCG@5 |" + " ValidRatio | HitRatio@1 of texts |" * written
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    lines += [f"| {name} | | | {' | '.join(_figures(each))} |{' | |' * written}" for name, each in baselines.items()]
    lines += [*map(row, arms.values()), *paired_lines(arms), *exchange_lines(arms)]
    return "\n".join([*lines, *kind_lines(every, kinds), *catalogue_lines(baselines | arms)])


def only(results: Results, those: Sequence[bool]) -> Results:
    """The results with the figures of those tests alone."""

    def figures(result: dict[str, Any]) -> dict[str, Any]:
        ranks, among_all = (list(compress(result[name], those)) for name in ("ranks", "catalogue_ranks"))
        return result | described_ranks(torch.tensor(ranks)) | {"catalogue_ranks": among_all}

    return {name: [figures(result) for result in found] for name, found in results.items()}


def _figures(results: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """(HitRatio@1 with its interval, HitRatio@5, NDCG@5). The interval covers the choice of tests, not of seeds."""
    total = results[0]["total"]
    ratios = [result["hits"] / total for result in results]
    low, high = Ratio(round(fmean(ratios) * total), total).interval()
    five, gain = (fmean(result[name] for result in results) for name in ("hit_ratio_5", "ndcg_5"))
    return f"{over_seeds(ratios)} [{low:.3f}, {high:.3f}]", f"{five:.4f}", f"{gain:.4f}"


def row(results: Sequence[dict[str, Any]]) -> str:
    """The line of one arm, over its seeds."""
    first, texts = results[0], []
    if "texts" in first:  # these always count all tests
        written = [result["texts"] for result in results]
        texts = [over_seeds([each[name] / each["total"] for each in written]) for name in ("valid", "hits")]
    trained = first["run"]["arm"]["gate"] is not None
    size, lr = (f"{first['trainable']:,}", f"{first['run']['settings']['lr']:g}") if trained else ("", "")
    name = first["run"]["arm"]["name"]
    return f"| {name} | {size} | {lr} | {' | '.join((*_figures(results), *texts))} |"


def kind_lines(results: Results, kinds: dict[str, list[bool]]) -> Iterator[str]:
    """A table of HitRatio@1 for all tests and for each kind of test by itself."""
    if kinds:
        kinds = {"all": [True] * len(next(iter(kinds.values())))} | kinds
        yield f"\n| HitRatio@1 of the tests | number | {' | '.join(results)} |\n|---|---{'|---' * len(results)}|"
    for kind, those in kinds.items():
        ranks = ([list(compress(result["ranks"], those)) for result in found] for found in results.values())
        ratios = (over_seeds([rank.count(1) / len(rank) for rank in each]) for each in ranks)
        yield f"| {kind} | {sum(those)} | {' | '.join(ratios)} |"


def catalogue_lines(results: Results) -> Iterator[str]:
    """A table of the figures where all items that are not in the history are candidates.

    An arm ranks the shortlist of its sequence model, as `recommend.py` does.
    """
    yield "\n| among all items | HitRatio@10 | NDCG@10 |\n|---|---|---|"
    for name, found in results.items():
        ranks = [torch.tensor(result["catalogue_ranks"]) for result in found]
        hits, gains = [hit_ratio(rank, 10).value for rank in ranks], [ndcg(rank, 10) for rank in ranks]
        yield f"| {name} | {over_seeds(hits)} | {over_seeds(gains)} |"


def paired_lines(arms: Results) -> Iterator[str]:
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


def exchange_lines(found: Results) -> Iterator[str]:
    """Lines with the hit ratios under somebody else's gate. They show whether a gate tells more than the group."""
    for name, results in found.items():
        given = [r["gate"]["with_gate_of"] for r in results if "with_gate_of" in r.get("gate", {})]
        if given:
            means = (f"{whose} {fmean(g[whose] for g in given):.4f}" for whose in given[0])
            yield f"\n{name}: HitRatio@1 with the gate of: {', '.join(means).replace('_', ' ')}"
