"""Hit ratios, their intervals, ranks from scores, and answers in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Example, Window, normal


@dataclass(frozen=True)
class Ratio:
    """hits of total, as a number with its Wilson interval. Raises ValueError unless 0 <= hits <= total, total >= 1."""

    hits: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total < 1:
            raise ValueError(f"expected 0 <= hits <= total and total >= 1, got {self.hits} of {self.total}")

    @property
    def value(self) -> float:
        return self.hits / self.total

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """The Wilson score interval: low, high (95% by default)."""
        n, p = self.total, self.value
        middle = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
        # At no hits and at n, the ends are exactly 0 and 1: not what rounding makes of them.
        return low if self.hits else 0.0, high if self.hits < n else 1.0

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.4f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Seeds:
    """The same figure from several seeds: mean and sample standard deviation (nan for a single seed)."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if self.count > 1 else "")


def over_seeds(values: Sequence[float]) -> Seeds:
    """Raises ValueError for no values. Seeds share their test users: their spread is not the interval of the figure."""
    if not values:
        raise ValueError("over_seeds: expected one value or more")
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Seeds(statistics.fmean(values), deviation, len(values))


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """int64 [N], from 1: how many candidates score at least as high as the target, which counts itself.

    scores [N, C], floating; target int64 [N], the target's column. A tie counts against the target, so that a model
    that scores all alike is last, not first, and order never matters. Raises ValueError for NaN or shapes that differ.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise ValueError(f"ranks: expected [N, C] and [N], got {list(scores.shape)} and {list(target.shape)}")
    if scores.isnan().any():
        raise ValueError("ranks: a score is NaN")
    return (scores >= scores.gather(1, target[:, None])).sum(1)


def hit_ratio(rank: Tensor, k: int = 1) -> Ratio:
    """How many of rank [N] are at most k."""
    return Ratio(int((rank <= k).sum()), len(rank))


def ndcg(rank: Tensor, k: int) -> float:
    """The mean of 1 / log2(1 + rank) over rank [N], 0 beyond k: NDCG@k with a single relevant item."""
    if not len(rank):
        raise ValueError("ndcg: expected one rank or more")
    return float(torch.where(rank <= k, 1 / torch.log2(1.0 + rank), 0.0).double().mean())


def candidate_scores(scores: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(scores of the candidates [N, C], target's column int64 [N]) from the scores of all items [N, items]."""
    candidates = torch.tensor([example.candidates for example in examples], device=scores.device)
    target = torch.tensor([example.target_index for example in examples], device=scores.device)
    return scores.gather(1, candidates), target


def popularity(train: Iterable[Window], num_items: int) -> Tensor:
    """float32 [num_items]: how many training windows have the item as target. The baseline's scores, for any user."""
    counts = [0] * num_items
    for window in train:
        counts[window.target] += 1
    return torch.tensor(counts, dtype=torch.float32)


def match_title(text: str, titles: Sequence[str]) -> int | None:
    """The index of the title that a generated text is, or None.

    The answer is the text's first line that is not empty; it must equal exactly one title, both as `data.normal` makes
    them. So a longer title that contains another is no obstacle, and a title inside other words is no answer.
    """
    answer = next((normal(line) for line in text.split("\n") if line.strip()), "")
    found = [index for index, title in enumerate(titles) if normal(title) == answer]
    return found[0] if len(found) == 1 else None


def text_ratios(texts: Sequence[str], examples: Sequence[Example], titles: Sequence[str]) -> tuple[Ratio, Ratio]:
    """(ValidRatio, HitRatio@1) of the texts generated for the examples; titles: item id -> title.

    Valid texts are titles of the example's candidates. Hits count over all examples, so an invalid text is a miss.
    Raises ValueError where texts and examples are not as many.
    """
    if len(texts) != len(examples):
        raise ValueError(f"text_ratios: {len(texts)} texts for {len(examples)} examples")
    matches = [
        match_title(text, [titles[item] for item in example.candidates])
        for text, example in zip(texts, examples, strict=True)
    ]
    valid = sum(match is not None for match in matches)
    hits = sum(match == example.target_index for match, example in zip(matches, examples, strict=True))
    return Ratio(valid, len(texts)), Ratio(hits, len(texts))
