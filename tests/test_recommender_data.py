"""Readers on small literal files, splits, windows and candidates of the sequential recommender."""

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequential_recommendation import data, readers
from sequential_recommendation.data import Dataset, Split, Window, split, windows, with_candidates
from sequential_recommendation.tastes import tastes

REAL = Path(os.environ.get("ILORA_DATA", "no-data"))  # a folder with ml-100k (raw) and lastfm (windows)


def made(users=50, items=60, length=12, **more):
    draw = random.Random(0)
    sequences = {f"u{u}": draw.sample(range(items), length) for u in range(users)}
    return Dataset("made", [f"Title {i}" for i in range(items)], sequences, **more)


@given(st.lists(st.integers(0, 99), unique=True, max_size=40))
def test_windows_cover_every_item_from_the_fourth_and_end_where_it_begins(items):
    found = list(windows("u", items))
    assert [(w.user, w.target) for w in found] == [("u", item) for item in items[3:]]
    for t, window in enumerate(found, 3):
        assert len(window.history) == min(t, 10)
        assert [*window.history, window.target] == items[t - len(window.history) : t + 1]


def test_users_are_split_8_1_1_by_a_seed_and_share_nothing():
    dataset = made(users=943, length=5)
    parts = split(dataset, seed=3)
    users = [{window.user for window in part} for part in parts]
    assert [len(part) for part in users] == [754, 94, 95]
    assert len(set.union(*users)) == 943
    assert [len(part) for part in parts] == [754 * 2, 94, 95]  # every window, or one a user, the last
    assert all(window.target == dataset.users[window.user][-1] for part in parts[1:] for window in part)
    assert split(dataset, seed=3) == parts
    assert split(dataset, seed=4).test != parts.test


def test_the_split_does_not_depend_on_the_order_of_users():
    dataset = made()
    turned = Dataset(dataset.name, dataset.titles, dict(reversed(dataset.users.items())))
    for protocol in ("paper", "leave-one-out"):
        assert split(dataset, 1, protocol) == split(turned, 1, protocol)


def test_leave_one_out_by_hand():
    users = {"long": [0, 1, 2, 3, 4, 5], "five": [5, 4, 3, 2, 1], "four": [2, 3, 4, 5], "three": [0, 1, 2]}
    parts = split(Dataset("d", list("abcdef"), users), protocol="leave-one-out")
    assert set(parts.test) == {("long", (0, 1, 2, 3, 4), 5), ("five", (5, 4, 3, 2), 1), ("four", (2, 3, 4), 5)}
    assert set(parts.val) == {("long", (0, 1, 2, 3), 4), ("five", (5, 4, 3), 2)}
    assert parts.train == [("long", (0, 1, 2), 3)]


def test_every_user_is_tested_and_those_of_the_papers_test_were_never_trained_on():
    dataset = made(users=80)
    parts, paper = split(dataset, 2, "every-user"), split(dataset, 2)
    trained = {(window.user, window.target) for window in parts.train}
    for held_out in (parts.val, parts.test):
        assert held_out
        assert not trained & {(window.user, window.target) for window in held_out}
    assert {window.user for window in parts.test} == set(dataset.users)
    assert {window.user for window in paper.test} & {window.user for window in (*parts.train, *parts.val)} == set()
    assert set(paper.test) < set(parts.test)


def test_a_split_that_came_with_the_data_is_kept_but_for_leave_one_out():
    given = Split(*([Window(user, (1, 2, 3), 4)] for user in ("u0", "u1", "u2")))
    dataset = made(given=given)
    assert split(dataset, seed=9) == given
    assert len(split(dataset, protocol="leave-one-out").test) == 50


def test_the_target_is_always_a_candidate_and_negatives_are_new():
    """LastFM's published candidates lack the target, so its hit ratio is 0."""
    dataset = made(users=300, items=30)
    examples = with_candidates(split(dataset).train, dataset)
    places, drawn = ([0] * n for n in (20, 30))
    for example in examples:
        assert len(example.candidates) == len(set(example.candidates)) == 20
        assert example.candidates[example.target_index] == example.target
        assert not set(example.candidates) & set(example.history)
        places[example.target_index] += 1
        for item in example.candidates:
            drawn[item] += 1
    assert min(places) > 0  # the target stands anywhere, and every item is drawn alike
    assert max(places) < 3 * len(examples) / 20
    assert min(drawn) > 0.75 * len(examples) * 20 / 30


def test_candidates_depend_on_the_window_and_the_seed_alone():
    dataset = made()
    parts = split(dataset).train
    examples = with_candidates(parts, dataset, seed=5)
    assert with_candidates(parts[::-1], dataset, seed=5)[::-1] == examples
    assert with_candidates(parts[7:9], dataset, seed=5) == examples[7:9]
    assert with_candidates(parts, dataset, seed=6) != examples
    # in every process: a worker with another hash seed, or one that starts in the middle, draws the same
    code = (
        "from sequential_recommendation.data import Dataset, Window, with_candidates\n"
        "d = Dataset('d', [str(i) for i in range(60)], {})\n"
        "print(with_candidates([Window('ü', (1, 2, 3), t) for t in (9, 8)], d, 1))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    one, two = (subprocess.check_output(command, env={**env, "PYTHONHASHSEED": s}, text=True) for s in "12")
    assert one == two
    assert "candidates=(" in one


def test_no_two_candidates_share_a_title():
    dataset = Dataset("d", [f"Title {i % 25}" + " " * (i // 25) for i in range(50)], {"u": [0, 1, 2, 3]})
    (example,) = with_candidates([Window("u", (0, 1, 2), 3)], dataset)
    assert len({data.normal(dataset.titles[item]) for item in example.candidates}) == 20


def test_frequent_drops_rare_items_and_then_short_users():
    users = {"a": [0, 1, 3, 4], "b": [4, 3, 1, 0], "c": [0, 1, 2, 3], "d": [5, 0, 1, 3]}
    kept = data.frequent(Dataset("d", list("abcdef"), users, groups={"a": 1, "c": 0}), items=2)
    assert kept.titles == ["a", "b", "d", "e"]  # c and f had one user each; their users then had three items
    assert kept.users == {"a": [0, 1, 2, 3], "b": [3, 2, 1, 0]}
    assert kept.groups == {"a": 1}


ONE = Window("u0", (0, 1, 2), 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Dataset("d", ["a", " "], {}), "item 1: expected a title of one line"),
        (lambda: Dataset("d", ["a", "b\nc"], {}), "item 1: expected a title of one line"),
        (lambda: Dataset("d", ["a", "b"], {"u": [0, 1, 0]}), "user u: an item occurs twice"),
        (lambda: Dataset("d", ["a", "b"], {"u": [0, 2]}), r"user u: expected ids from 0 to 1, got \[2\]"),
        (lambda: Dataset("d", ["a", "b"], {"u": [-1]}), r"user u: expected ids from 0 to 1, got \[-1\]"),
        (lambda: data.frequent(made(given=Split([], [], []))), "its own split"),
        (lambda: split(made(users=1)), "too few users with 4 items or more to split: 0 train, 0 val, 1 test"),
        (lambda: split(made(), protocol="all"), "protocol='all', expected one of paper, leave-one-out, every-user"),
        (lambda: with_candidates([ONE], made(1, 22, 4)), "user u0: only 18 of 19 negatives can be drawn"),
        (lambda: tastes(users=3), "users=3, groups=4"),
        (lambda: tastes(groups=23), "tastes"),
    ],
)
def test_data_that_contradict_themselves_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.skipif(not (REAL / "ml-100k").is_dir(), reason="no real data")
def test_the_real_files_have_the_published_sizes():
    dataset = readers.movielens(REAL / "ml-100k")
    assert str(dataset) == "MovieLens-100K: 943 users, 1,682 items, 100,000 interactions"
    parts = split(dataset)
    assert [len(part) for part in (*parts[1:], with_candidates(parts.test, dataset))] == [94, 95, 95]
    lastfm = readers.windows_files(REAL / "lastfm")
    assert (len(lastfm.users), lastfm.num_items) == (1220, 4606)
    assert [len(part) for part in split(lastfm)] == [47872, 122, 122]
    assert len(split(lastfm, protocol="leave-one-out").test) == 1220


def rules(dataset, kind=lambda item: item):
    """For each group what kind of item follows a kind of shared item; it is a rule, not a tendency."""
    following = [{} for _ in range(4)]
    for user, items in dataset.users.items():
        steps = [kind(item) for place, item in enumerate(items) if place % 4]
        for a, b in pairwise(steps):
            assert following[dataset.groups[user]].setdefault(a, b) == b
    return following


def test_every_test_shows_the_group():
    dataset = tastes(users=200)
    own = {item: dataset.groups[user] for user, items in dataset.users.items() for item in items[::4]}
    assert len(own) == 12  # a group's own items are nobody else's
    by_rule = {item for items in dataset.users.values() for place, item in enumerate(items) if place % 4}
    assert not own.keys() & by_rule
    for window in split(dataset, protocol="leave-one-out").test:
        assert {own[item] for item in window.history if item in own} == {dataset.groups[window.user]}
        assert window.target not in own


def test_tastes_have_conflicting_rules_that_titles_show():
    dataset = tastes(users=40)
    assert len(set(dataset.titles)) == dataset.num_items
    following = rules(dataset, lambda item: dataset.titles[item].split()[0])
    for last in set().union(*following):
        met = [rule[last] for rule in following if last in rule]
        assert len(set(met)) == len(met)


def test_what_can_be_known_of_the_tests_of_tastes():
    dataset = tastes()
    kind = [title.split()[0] for title in dataset.titles]
    following = rules(dataset, lambda item: kind[item])
    tests = with_candidates(split(dataset, protocol="leave-one-out").test, dataset)[:600]
    best = blind = 0.0
    for example in tests:
        kinds = [kind[item] for item in example.candidates]
        answers = [rule[kind[example.history[-1]]] for rule in following]
        assert answers[dataset.groups[example.user]] == kind[example.target]
        assert len(set(answers)) == 4
        best += 1 / kinds.count(kind[example.target]) / len(tests)
        blind += 1 / sum(found in answers for found in kinds) / len(tests)
    assert (round(best, 2), round(blind, 2)) == (0.69, 0.28)  # as results/made-up.md says


def test_made_up_users_repeat_with_the_seed():
    assert tastes(users=40, seed=1) == tastes(users=40, seed=1)
    assert tastes(users=40, seed=1) != tastes(users=40, seed=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_no_made_up_title_contains_another(seed):
    titles = [data.normal(title) for title in tastes(users=4, names=9, seed=seed).titles]
    assert len(set(titles)) == len(titles)
    assert not any(a in b for a in titles for b in titles if a is not b)
