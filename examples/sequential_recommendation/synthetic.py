"""Made-up users whose groups follow conflicting rules."""

from __future__ import annotations

import random
from itertools import product
from math import gcd

from .data import Dataset

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
STEPS = 3  # on the ring, in each block


def synthetic(
    users: int = 600, groups: int = 4, shared: int = 23, own: int = 3, blocks: int = 3, seed: int = 0
) -> Dataset:
    """A data set in which the next item depends on the last item and on the user's group, and groups contradict.

    The `shared` items stand on a ring (in an order drawn from the seed). From a shared item, group g goes `stride[g]`
    places on: no two groups agree after any item, and what another group would do next is never an item that the user
    met already. A user's sequence is 2 to `blocks` blocks of one item that only the group uses (it has `own` of them)
    and three steps on the ring, which go on from block to block, from a random start. The last item alone says nothing
    about which of the groups' answers is right; the group's own items, or an earlier step, say all about it. Items are
    few, so that most of the others' answers are among the candidates: who knows the rules but not the group is right
    in about a third of the tests (with four groups). The last item, which is tested, is always a step on the ring.
    Titles are made-up names of one length, so none contains another, and tell nothing about items.
    Dataset.groups has every user's group; groups are of equal size. Raises ValueError for sizes that do not fit.
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
        place, count = draw.randrange(shared), draw.randint(2, blocks)
        sequence: list[int] = []
        for marker in draw.sample(rest[group * own : (group + 1) * own], count):
            sequence.append(marker)
            for _ in range(STEPS):
                sequence.append(ring[place])
                place = (place + strides[group]) % shared
        sequences[f"user-{user}"] = sequence
    titles = _names(len(items), draw)
    return Dataset("synthetic", titles, sequences, groups={f"user-{u}": u % groups for u in range(users)})


def _strides(draw: random.Random, groups: int, shared: int, back: int) -> list[int]:
    """One stride for each group; a step with another's never leads to one of the `back` items before."""
    every = [stride for stride in range(1, shared) if gcd(stride, shared) == 1]  # these meet every item
    draw.shuffle(every)

    def extended(chosen: list[int], choice: list[int]) -> list[int] | None:
        if len(chosen) == groups:
            return chosen
        for place, a in enumerate(choice):
            clash = {k * a % shared for k in range(1, back + 1)}
            left = [b for b in choice[place + 1 :] if shared - b not in clash]
            left = [b for b in left if all((a + k * b) % shared for k in range(1, back + 1))]
            found = extended([*chosen, a], left)
            if found is not None:
                return found
        return None

    strides = extended([], every)
    if strides is None:
        raise ValueError(f"synthetic: {groups} groups have no conflicting rules on {shared} shared items: take more")
    return strides


def _names(count: int, draw: random.Random) -> list[str]:
    """Distinct names of three syllables."""
    syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(syllables, k=3)).capitalize()] = None
    return list(names)
