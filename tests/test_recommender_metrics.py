"""Intervals, ranks and answers in words, by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequential_recommendation import metrics
from sequential_recommendation.data import Example, Window
from sequential_recommendation.metrics import Ratio, match_title, ndcg, over_seeds, ranks, text_ratios
from sequential_recommendation.sequence_models import Popularity
from sequential_recommendation.sequence_training import target_ranks

TITLES = ["Alien (1979)", "Aliens (1986)", "Alien", "Star Wars", "Star Wars: Return of the Jedi", "Café Del Mar"]


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(43, 95, 0.356, 0.553), (64, 122, 0.437, 0.611), (599, 1186, 0.477, 0.534), (0, 10, 0.0, 0.278), (3, 3, 0.438, 1)],
)
def test_wilson_intervals(hits, total, low, high):
    assert Ratio(hits, total).interval() == pytest.approx((low, high), abs=6e-4)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_ratio_and_mirrors(counts):
    hits, total = counts
    low, high = Ratio(hits, total).interval()
    assert 0 <= low <= hits / total <= high <= 1
    assert Ratio(total - hits, total).interval() == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Ratio(0, 0), "expected 0 <= hits <= total"),
        (lambda: Ratio(3, 2), "expected 0 <= hits <= total"),
        (lambda: Ratio(-1, 2), "expected 0 <= hits <= total"),
        (lambda: ranks(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), r"expected \[N, C\] and \[N\]"),
        (lambda: ndcg(torch.zeros(0), 5), "one rank or more"),
        (lambda: text_ratios(["Alien"], [], TITLES), "1 texts for 0 examples"),
    ],
)
def test_figures_of_nothing_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_ranks_by_hand_with_ties_against_the_target():
    scores = [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [5.0, 5.0, 1.0], [0.0, 0.0, 0.0], [-math.inf, 1.0, 2.0]]
    rank = ranks(torch.tensor(scores), torch.tensor([0, 1, 0, 2, 0]))
    assert rank.tolist() == [1, 3, 2, 3, 3]
    assert metrics.hit_ratio(rank) == Ratio(1, 5)
    assert metrics.hit_ratio(rank, 2) == Ratio(2, 5)
    assert ndcg(rank, 3) == pytest.approx((1 + 3 * 0.5 + 1 / math.log2(3)) / 5)
    assert ndcg(rank, 2) == pytest.approx((1 + 1 / math.log2(3)) / 5)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=2, max_size=8), st.randoms())
def test_a_rank_does_not_depend_on_the_order_of_candidates(scores, draw):
    order = list(range(len(scores)))
    draw.shuffle(order)
    before = ranks(torch.tensor([scores]), torch.tensor([0]))
    after = ranks(torch.tensor([[scores[i] for i in order]]), torch.tensor([order.index(0)]))
    assert torch.equal(before, after)


def test_candidate_scores_and_popularity():
    examples = [Example("u", (0,), 3, (2, 3)), Example("v", (0,), 1, (1, 0))]
    scores, target = metrics.candidate_scores(torch.arange(8.0).view(2, 4), examples)
    assert scores.tolist() == [[2.0, 3.0], [5.0, 4.0]]
    assert target.tolist() == [1, 0]
    train = [Window("u", (0, 1, 2), 3), Window("u", (0, 1, 2, 3), 1), Window("v", (0, 1, 2), 3)]
    popular = Popularity(5, train)
    assert popular(torch.tensor([[0, 1, 2], [4, 5, 5]])).tolist() == [[0, 1, 0, 2, 0]] * 2
    assert target_ranks(popular.eval(), examples[:1]).tolist() == [1]
    assert target_ranks(popular, [Example("u", (3,), 1, (0, 1))] * 2, whole=True).tolist() == [1, 1]  # 3 is history


def test_seeds():
    assert over_seeds([0.2, 0.4]) == "0.3000 ± 0.1414"
    assert over_seeds([0.5]) == "0.5000"


WHOLE = {"Alien": 2, "\n\nAlien\r\n": 2, "Star Wars: Return of the Jedi\n": 4, "Cafe\u0301 Del Mar": 5}
WHOLE["Aliens (1986)"] = 1  # contains another title
WHOLE["  STAR  wars \nStar Wars: Return of the Jedi"] = 3  # what follows the line does not count
PARTS = ["I would say Alien", "Alien or Aliens", "Star Wars: Return", "lien", "", "\n \n"]


@pytest.mark.parametrize(("text", "index"), [*WHOLE.items(), *((text, None) for text in PARTS)])
def test_an_answer_is_a_whole_title(text, index):
    assert match_title(text, TITLES) == index


def test_every_perfect_answer_is_valid_whatever_the_other_titles():
    """The published metric looks for substrings, and calls 3 of 95 perfect answers on MovieLens invalid."""
    assert [match_title(title + "\n", TITLES) for title in TITLES] == list(range(len(TITLES)))
    assert match_title("A b", ["a  B", "A b"]) is None  # it fits two


def test_invalid_texts_are_misses():
    examples = [Example(user, (9,), target, (0, 1, 2)) for user, target in (("a", 0), ("b", 1), ("c", 2), ("d", 2))]
    texts = ["Alien (1979)\n", "Alien", "It is Alien", "Star Wars"]  # hit; valid; invalid; no candidate
    assert text_ratios(texts, examples, TITLES) == (Ratio(2, 4), Ratio(1, 4))


@pytest.mark.parametrize(
    ("first", "second", "p"), [(3, 12, 0.03515625), (12, 3, 0.03515625), (0, 5, 0.0625), (4, 4, 1.0), (0, 0, 1.0)]
)
def test_mcnemar_is_the_exact_binomial_test(first, second, p):
    assert metrics.mcnemar(first, second) == pytest.approx(p)


def test_paired_arms_are_compared_user_by_user():
    first = torch.tensor([[1] * 60 + [2] * 40, [1] * 50 + [7] * 50])
    second = torch.tensor([[1] * 50 + [2] * 10 + [1] * 4 + [3] * 36, [1] * 20 + [2] * 80])
    found = metrics.paired(first, second)
    assert found.only == [(10, 4), (30, 0)]
    assert found.difference == pytest.approx((0.06 + 0.30) / 2)
    assert found.p_values == [pytest.approx(metrics.mcnemar(10, 4)), pytest.approx(2**-29)]
    low, high = found.interval
    assert low < 0.06 < 0.3 < high  # the seeds differ by more than the users of one seed
    turned = metrics.paired(second, first)
    assert turned.interval == (pytest.approx(-high), pytest.approx(-low))
    assert metrics.paired(first, first).interval == (0.0, 0.0)
    users_only = metrics.paired(first[:1], second[:1], draws=20_000).interval
    deviation = math.sqrt((14 / 100 - 0.06**2) / 100)
    assert users_only == (
        pytest.approx(0.06 - 1.96 * deviation, abs=0.012),
        pytest.approx(0.06 + 1.96 * deviation, abs=0.012),
    )
    with pytest.raises(ValueError, match=r"expected twice \[seeds, N\], got \[2, 100\] and \[1, 100\]"):
        metrics.paired(first, second[:1])


def test_a_score_that_is_nan_means_that_training_diverged():
    with pytest.raises(FloatingPointError, match="a score is NaN: try a lower learning rate"):
        ranks(torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))
