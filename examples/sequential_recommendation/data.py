"""Data sets, their split, the windows of a split and their candidates.

A `Dataset` is a list of titles (an item's id is its index) and, for every user, distinct item ids in the order in which
the user met them. Readers (`readers.py`) and `tastes.py` make it; all else starts from it:

    dataset = readers.movielens(Path("ml-100k"))
    parts = split(dataset, seed=0)                      # windows: history -> next item
    test = with_candidates(parts.test, dataset, seed=0) # the same, with 20 items to choose from

Every random choice depends on the seed and on the user or window that it is made for, never on order, worker or
process.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

MIN_HISTORY, MAX_HISTORY = 3, 10  # items in a window's history
NUM_CANDIDATES = 20
PROTOCOLS = ("paper", "leave-one-out", "every-user")


class Window(NamedTuple):
    """What a user met last, oldest first, and the item that came next."""

    user: str
    history: tuple[int, ...]
    target: int


class Example(NamedTuple):
    """A window and the shuffled candidates to choose from: items with distinct titles, one of them the target."""

    user: str
    history: tuple[int, ...]
    target: int
    candidates: tuple[int, ...]

    @property
    def target_index(self) -> int:
        """The target's index among the candidates."""
        return self.candidates.index(self.target)


class Split(NamedTuple):
    """Windows to train on, to validate on and to test on."""

    train: list[Window]
    val: list[Window]
    test: list[Window]


@dataclass(frozen=True)
class Dataset:
    """The titles of all items, and every user's items in order of time.

    Args:
        name: appears in tables and file names.
        titles: item id -> title. Two items may share a title; candidates of one example never do.
        users: user -> item ids in order of time, each once.
        given: a split that came with the data; the paper's protocol then uses it as it is.
        groups: user -> group, for made-up users.
        dropped: what the raw files have and this data set leaves out -> how many.
        tied: the users whose last two items have the same time, so that their order is the file's; None: unknown.
    Raises ValueError, naming the user or item, for ids without a title, repeated items, and titles that are empty or
    have several lines.
    """

    name: str
    titles: list[str]
    users: dict[str, list[int]]
    given: Split | None = None
    groups: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    tied: list[str] | None = None

    def __post_init__(self) -> None:
        for item, title in enumerate(self.titles):
            if not title.strip() or len(title.splitlines()) > 1:
                raise ValueError(f"{self.name}: item {item}: expected a title of one line, got {title!r}")
        count = self.num_items
        for user, items in self.users.items():
            if len(set(items)) != len(items):
                raise ValueError(f"{self.name}: user {user}: an item occurs twice")
            wrong = [item for item in items if not 0 <= item < count]
            if wrong:
                raise ValueError(f"{self.name}: user {user}: expected ids from 0 to {count - 1}, got {wrong}")

    @property
    def num_items(self) -> int:
        return len(self.titles)

    @cached_property
    def names(self) -> list[str]:
        """Every title as `normal` returns it."""
        return [normal(title) for title in self.titles]

    def __str__(self) -> str:
        interactions = sum(len(items) for items in self.users.values())
        found = f"{self.name}: {len(self.users):,} users, {self.num_items:,} items, {interactions:,} interactions"
        few = sum(len(items) <= MIN_HISTORY for items in self.users.values())
        left_out = self.dropped | ({f"users with fewer than {MIN_HISTORY + 1} items": few} if few else {})
        return found + "".join(f"; left out: {count:,} {what}" for what, count in left_out.items())


def normal(title: str) -> str:
    """The form in which titles are compared: Unicode NFKC, case folded, runs of white space as one space."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", title)).strip().casefold()


def windows(user: str, items: Sequence[int]) -> Iterator[Window]:
    """Every window of one user, in order: item t is the target of the (at most) 10 before it, for t = 3, 4, ..."""
    for t in range(MIN_HISTORY, len(items)):
        yield Window(user, tuple(items[max(0, t - MAX_HISTORY) : t]), items[t])


def split(dataset: Dataset, seed: int = 0, protocol: str = "paper") -> Split:
    """Windows for training, validation and testing. Users with fewer than 4 items have no window and are left out.

    protocol="paper" shuffles the users and splits them 8:1:1. Two of the numbers are rounded down, and the rest of the
    users are for testing: 943 users -> 754, 94, 95. Training takes every window of its users. Validation and testing
    take the last window of each of theirs. No user is in two parts. A split that came with the data is returned as it
    is.

    protocol="leave-one-out" tests every user on the last item, validates on the one before (except users with 4 items),
    and trains on all earlier windows. There are as many tests as users, so that differences stand out from noise.

    protocol="every-user" does the same, but trains and validates on the paper's training users alone. So the tests of
    the other users, who are new to the model, are the paper's.
    Raises ValueError for another protocol, and if a part would be empty.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"split: unknown {protocol=}, expected one of {', '.join(PROTOCOLS)}")
    users = {user: list(windows(user, items)) for user, items in sorted(dataset.users.items())}
    users = {user: found for user, found in users.items() if found}
    parts = _leave_one_out(users)
    if protocol != "leave-one-out":
        paper = dataset.given or _by_user(users, seed)
        known = {window.user for window in paper.train}
        train, val = ([window for window in part if window.user in known] for part in parts[:2])
        parts = paper if protocol == "paper" else Split(train, val, parts.test)
    if not all(parts):
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts._asdict().items())
        raise ValueError(f"{dataset.name}: too few users with 4 items or more to split: {sizes} windows")
    return parts


def _by_user(users: dict[str, list[Window]], seed: int) -> Split:
    names = list(users)
    random.Random(f"{seed}/users").shuffle(names)
    train, val = len(names) * 8 // 10, len(names) // 10
    return Split(
        [window for user in names[:train] for window in users[user]],
        [users[user][-1] for user in names[train : train + val]],
        [users[user][-1] for user in names[train + val :]],
    )


def _leave_one_out(users: dict[str, list[Window]]) -> Split:
    return Split(
        [window for found in users.values() for window in found[:-2]],
        [found[-2] for found in users.values() if len(found) > 1],
        [found[-1] for found in users.values()],
    )


def with_candidates(
    parts: Sequence[Window],
    dataset: Dataset,
    seed: int = 0,
    count: int = NUM_CANDIDATES,
) -> list[Example]:
    """The windows with their candidates: the target and count - 1 uniformly drawn negatives, shuffled.

    A window's candidates depend on the seed and the window alone. Negatives are never in the window's history, and have
    no title of it. They may be other items of the user, as in the paper. No two candidates have the same title as
    `normal` returns it, since an answer in words could not tell them apart.
    Raises ValueError if fewer than count - 1 negatives are left.
    """
    return [_example(window, dataset.names, seed, count) for window in parts]


def _example(window: Window, names: list[str], seed: int, count: int) -> Example:
    user, history, target = window
    draw = random.Random(f"{seed}/{user}/{history}/{target}")  # a string gives the same seed in every process
    titles = {names[item] for item in (*history, target)}
    candidates = [target]
    for item in _without_repeats(draw, len(names)):
        if len(candidates) == count:
            break
        if names[item] not in titles:
            candidates.append(item)
            titles.add(names[item])
    if len(candidates) < count:
        raise ValueError(f"user {user}: only {len(candidates) - 1} of {count - 1} negatives can be drawn")
    draw.shuffle(candidates)
    return Example(user, history, target, tuple(candidates))


def _without_repeats(draw: random.Random, size: int) -> Iterator[int]:
    """Yields the numbers below size in random order, without shuffling all of them if the caller takes only a few."""
    seen: set[int] = set()
    while len(seen) < size // 2:
        number = draw.randrange(size)
        if number not in seen:
            seen.add(number)
            yield number
    rest = [number for number in range(size) if number not in seen]
    draw.shuffle(rest)
    yield from rest


def frequent(dataset: Dataset, users: int = MIN_HISTORY + 1, items: int = 5) -> Dataset:
    """Drops users with fewer than `users` items and items with fewer than `items` users, until none are left to drop.

    Item ids are renumbered in their old order. For raw files with a long tail, such as Steam's reviews.
    Raises ValueError for a data set that came with its own split, whose windows would change.
    """
    if dataset.given is not None:
        raise ValueError(f"{dataset.name}: it came with its own split, which filtering would change")
    remaining, before = dataset.users, -1
    while before != (before := sum(map(len, remaining.values()))):
        counts = [0] * dataset.num_items
        for sequence in remaining.values():
            for item in sequence:
                counts[item] += 1
        remaining = {user: [i for i in sequence if counts[i] >= items] for user, sequence in remaining.items()}
        remaining = {user: sequence for user, sequence in remaining.items() if len(sequence) >= users}
    dropped = {
        f"users with fewer than {users} items of at least {items} users each": len(dataset.users) - len(remaining),
        f"items that fewer than {items} such users met": dataset.num_items
        - len({item for sequence in remaining.values() for item in sequence}),
    }
    number = {item: new for new, item in enumerate(sorted({i for sequence in remaining.values() for i in sequence}))}
    return Dataset(
        dataset.name,
        [dataset.titles[item] for item in number],
        {user: [number[item] for item in sequence] for user, sequence in remaining.items()},
        groups={user: group for user, group in dataset.groups.items() if user in remaining},
        dropped=dataset.dropped | {what: count for what, count in dropped.items() if count},
    )
