"""Makes up users whose groups follow conflicting rules."""

from __future__ import annotations

import random
from itertools import product
from math import gcd

from .data import Dataset

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
STEPS = 3  # shared items in each block of a sequence


def synthetic(
    users: int = 600, groups: int = 4, shared: int = 23, own: int = 3, blocks: int = 3, seed: int = 0
) -> Dataset:
    """A data set in which the next item depends on the last item and the user's group, and the groups' rules conflict.

    The `shared` items form a ring, in an order that the seed decides. After a shared item, a user of group g meets the
    one `stride[g]` positions further on the ring. No two groups agree after any item, and the item that another group
    would meet next is never one that the user has already met.

    A user's sequence has 2 to `blocks` blocks. A block is one item that only the user's group uses (each group has
    `own` such items), then three items of the ring. The user starts at a random position on the ring and continues
    there from block to block. The last item, which is tested, is always one of the ring.

    The last item of a history does not show which group's rule is right; the group's own items show it, and so does an
    earlier step. There are few items, so most of the other groups' answers are among the candidates: with four groups,
    a model that knows the rules but not the group is right in about a third of the tests.

    Titles are made-up names that say nothing about the items. They have equal lengths, so none contains another.
    Dataset.groups has every user's group; the groups have equal sizes. Raises ValueError for sizes that do not fit.
    """
    if not 2 <= blocks <= own or STEPS * blocks > shared or not 1 <= groups <= users:
        raise ValueError(
            f"synthetic: {users=}, {groups=}, {shared=}, {own=}, {blocks=}: expected 2 <= blocks <= own, "
            f"blocks <= shared / {STEPS} and 1 <= groups <= users"
        )
    draw = random.Random(f"{seed}/synthetic")
    strides = _strides(draw, groups, shared, STEPS * blocks - 2)
    items = list(range(shared + groups * own))
    draw.shuffle(items)
    ring, rest = items[:shared], items[shared:]
    sequences: dict[str, list[int]] = {}
    for user in range(users):
        group = user % groups
        position, count = draw.randrange(shared), draw.randint(2, blocks)
        sequence: list[int] = []
        for marker in draw.sample(rest[group * own : (group + 1) * own], count):
            sequence.append(marker)
            for _ in range(STEPS):
                sequence.append(ring[position])
                position = (position + strides[group]) % shared
        sequences[f"user-{user}"] = sequence
    titles = made_up_words(len(items), draw)
    return Dataset("synthetic", titles, sequences, groups={f"user-{u}": u % groups for u in range(users)})


def _strides(draw: random.Random, groups: int, shared: int, back: int) -> list[int]:
    """One stride for each group. A step with another group's stride never leads to one of the last `back` items."""
    every = [stride for stride in range(1, shared) if gcd(stride, shared) == 1]  # these reach every item of the ring
    draw.shuffle(every)

    def extended(chosen: list[int], choice: list[int]) -> list[int] | None:
        if len(chosen) == groups:
            return chosen
        for i, a in enumerate(choice):
            clash = {k * a % shared for k in range(1, back + 1)}
            left = [b for b in choice[i + 1 :] if shared - b not in clash]
            left = [b for b in left if all((a + k * b) % shared for k in range(1, back + 1))]
            found = extended([*chosen, a], left)
            if found is not None:
                return found
        return None

    strides = extended([], every)
    if strides is None:
        raise ValueError(f"synthetic: {groups} groups have no conflicting rules on {shared} shared items: take more")
    return strides


def made_up_words(count: int, draw: random.Random) -> list[str]:
    """Distinct made-up words of three syllables, also for `tastes.py`."""
    syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(syllables, k=3)).capitalize()] = None
    return list(names)
