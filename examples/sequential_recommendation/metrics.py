"""Hit ratios and their intervals, ranks from scores, and the judging of generated answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from .data import Example, normal


@dataclass(frozen=True)
class Ratio:
    """The ratio hits / total and its Wilson interval. Raises ValueError unless 0 <= hits <= total and total >= 1."""

    hits: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total < 1:
            raise ValueError(f"expected 0 <= hits <= total and total >= 1, got {self.hits} of {self.total}")

    @property
    def value(self) -> float:
        return self.hits / self.total

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """The Wilson score interval (low, high) for a normal quantile z; the default covers 95%."""
        n, p = self.total, self.value
        middle = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
        # With no hits the low end is exactly 0, and with n hits the high end is exactly 1; rounding would move them.
        return low if self.hits else 0.0, high if self.hits < n else 1.0

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.4f} [{low:.3f}, {high:.3f}]"


def over_seeds(values: Sequence[float]) -> str:
    """The mean of the values, one for each seed, and their sample standard deviation if there are several.

    All seeds are tested on the same users, so the deviation is no confidence interval of the figure.
    """
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


@dataclass(frozen=True)
class Paired:
    """Two arms on the same tests, with the same seeds: which of them has more first ranks.

    difference: of their HitRatio@1, averaged over the seeds. interval: 95%, by a bootstrap that draws users and seeds.
    only: for each seed (tests that the first alone has right, tests that the second alone has right).
    """

    difference: float
    interval: tuple[float, float]
    only: list[tuple[int, int]]

    @property
    def p_values(self) -> list[float]:
        """McNemar's exact two-sided test, for each seed."""
        return [mcnemar(*counts) for counts in self.only]


def mcnemar(first: int, second: int) -> float:
    """The probability of a split as uneven as this or more, if each test is the first's or the second's like a coin."""
    n = first + second
    return min(1.0, sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2 ** (n - 1)) if n else 1.0


def paired(first: Tensor, second: Tensor, draws: int = 4000) -> Paired:
    """Compares two arms by their ranks [seeds, N] of the same tests. Raises ValueError for shapes that differ."""
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"paired: expected twice [seeds, N], got {list(first.shape)} and {list(second.shape)}")
    won = (first == 1).double() - (second == 1).double()
    generator = torch.Generator().manual_seed(0)
    S, N = won.shape
    seeds = torch.randint(S, (draws, S), generator=generator)
    users = torch.stack([torch.randint(N, (N,), generator=generator).bincount(minlength=N) for _ in range(draws)])
    drawn = (won @ users.T.double() / N).T.gather(1, seeds).mean(1)  # users.T: how often each user was drawn
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Paired(won.mean().item(), (low, high), [(int((row > 0).sum()), int((row < 0).sum())) for row in won])


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """The target's rank int64 [N], from 1: how many candidates, the target included, score at least as high as it.

    scores [N, C], floating; target int64 [N], the target's column. A tie counts against the target: a model that gives
    all candidates the same score gets the last rank, not the first, and the order of the candidates never matters.
    Raises FloatingPointError for NaN and ValueError for shapes that do not match.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise ValueError(f"ranks: expected [N, C] and [N], got {list(scores.shape)} and {list(target.shape)}")
    if scores.isnan().any():
        raise FloatingPointError("a score is NaN: try a lower learning rate")
    return (scores >= scores.gather(1, target[:, None])).sum(1)


def hit_ratio(rank: Tensor, k: int = 1) -> Ratio:
    """The share of ranks [N] that are at most k."""
    return Ratio(int((rank <= k).sum()), len(rank))


def ndcg(rank: Tensor, k: int) -> float:
    """NDCG@k with a single relevant item: the mean over rank [N] of 1 / log2(1 + rank), or 0 for a rank beyond k.

    Raises ValueError for no ranks.
    """
    if not len(rank):
        raise ValueError("ndcg: expected one rank or more")
    return float(torch.where(rank <= k, 1 / torch.log2(1.0 + rank), 0.0).double().mean())


def described_ranks(rank: Tensor) -> dict[str, Any]:
    """The figures of ranks [N], JSON-able."""
    first = hit_ratio(rank)
    figures = {"hits": first.hits, "total": first.total, "hit_ratio_5": hit_ratio(rank, 5).value}
    return figures | {"ndcg_5": ndcg(rank, 5), "ndcg_20": ndcg(rank, 20), "ranks": rank.tolist()}


def candidate_scores(scores: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(the candidates' scores [N, C], the target's column int64 [N]) from the scores of all items [N, items]."""
    candidates = torch.tensor([example.candidates for example in examples], device=scores.device)
    target = torch.tensor([example.target_index for example in examples], device=scores.device)
    return scores.gather(1, candidates), target


def catalogue_scores(scores: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(the scores [N, items], -inf for those of the history, the target's number int64 [N]) from the same scores."""
    scores = scores.clone()
    for row, example in zip(scores, examples, strict=True):
        row[list(example.history)] = -math.inf
    return scores, torch.tensor([example.target for example in examples], device=scores.device)


def match_title(text: str, titles: Sequence[str]) -> int | None:
    """The index of the title that a generated text names, or None.

    The answer is the text's first line that is not empty. It must equal exactly one title, after `data.normal` has been
    applied to both. So it does not matter if one title contains another, and a title among other words is no answer.
    """
    answer = next((normal(line) for line in text.split("\n") if line.strip()), "")
    found = [index for index, title in enumerate(titles) if normal(title) == answer]
    return found[0] if len(found) == 1 else None


def text_ratios(texts: Sequence[str], examples: Sequence[Example], titles: Sequence[str]) -> tuple[Ratio, Ratio]:
    """(ValidRatio, HitRatio@1) of the texts generated for the examples; titles: item id -> title.

    A text is valid if it is the title of one of the example's candidates. HitRatio@1 counts all examples, so an invalid
    text is a miss. Raises ValueError unless there are as many texts as examples.
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
