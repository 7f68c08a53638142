"""Hit ratios and their intervals, ranks from scores, and the judging of generated answers."""

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


@dataclass(frozen=True)
class Seeds:
    """One figure over several seeds: its mean and sample standard deviation (nan for a single seed)."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if self.count > 1 else "")


def over_seeds(values: Sequence[float]) -> Seeds:
    """The mean and deviation of the values, one for each seed. Raises ValueError for no values.

    All seeds are tested on the same users, so the deviation is no confidence interval of the figure.
    """
    if not values:
        raise ValueError("over_seeds: expected one value or more")
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Seeds(statistics.fmean(values), deviation, len(values))


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


def candidate_scores(scores: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(the candidates' scores [N, C], the target's column int64 [N]) from the scores of all items [N, items]."""
    candidates = torch.tensor([example.candidates for example in examples], device=scores.device)
    target = torch.tensor([example.target_index for example in examples], device=scores.device)
    return scores.gather(1, candidates), target


def popularity(train: Iterable[Window], num_items: int) -> Tensor:
    """float32 [num_items]: how many training windows have the item as target. The popularity baseline scores so."""
    counts = [0] * num_items
    for window in train:
        counts[window.target] += 1
    return torch.tensor(counts, dtype=torch.float32)


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
