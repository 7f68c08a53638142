"""Made-up users whose groups follow conflicting rules about what titles say, with items too many to know each."""

from __future__ import annotations

import random
from itertools import product

from .data import Dataset

STEPS = 3  # items by the rule, after each of the group's own
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def tastes(
    users: int = 600, groups: int = 4, kinds: int = 23, names: int = 70, own: int = 3, blocks: int = 3, seed: int = 0
) -> Dataset:
    """A data set where who the user is and what the items are must come together, from two sources.

    A title is two words, its kind and its name: kinds · names items, each met by a few users, so that a sequence model,
    which sees numbers for items, learns little about them; a language model reads the kind. The kinds stand on a ring:
    from a kind, group g goes `stride[g]` places on, to any item there, and no two groups agree after any kind. A user's
    sequence is 2 to `blocks` blocks of one item that only the group uses (it has `own` of them) and three items by the
    group's rule, which go on from block to block, from a random start; the last item, which is tested, is one of them.
    So a sequence model can know the group (its own items are met often) but hardly the answer, and who knows the rules
    but not the group has 1 / `groups` of what can be had; also that is less than all, as other candidates may be of the
    right kind. Dataset.groups has every user's group; groups are of equal size. Raises ValueError for sizes that do
    not fit.
    """
    if not 2 <= blocks <= own or not 1 <= groups <= min(users, kinds - 1) or names < STEPS * blocks:
        raise ValueError(
            f"tastes: {users=}, {groups=}, {kinds=}, {names=}, {own=}, {blocks=}: expected 2 <= blocks <= own, "
            f"1 <= groups <= users, groups < kinds, and {STEPS} * blocks <= names"
        )
    draw = random.Random(f"{seed}/tastes")
    words = _words(kinds + groups * own + names, draw)
    second = words[kinds + groups * own :]
    titles = [f"{kind} {name}" for kind in words[:kinds] for name in second]  # item: kind · names + name
    markers = [f"{word} {draw.choice(second)}" for word in words[kinds : kinds + groups * own]]
    strides = draw.sample(range(1, kinds), groups)
    sequences: dict[str, list[int]] = {}
    for user in range(users):
        group = user % groups
        place, count = draw.randrange(kinds), draw.randint(2, blocks)
        sequence: list[int] = []
        for marker in draw.sample(range(own), count):
            sequence.append(len(titles) + group * own + marker)
            for _ in range(STEPS):
                unmet = [item for item in range(place * names, (place + 1) * names) if item not in sequence]
                sequence.append(draw.choice(unmet))
                place = (place + strides[group]) % kinds
        sequences[f"user-{user}"] = sequence
    return Dataset("tastes", [*titles, *markers], sequences, groups={f"user-{u}": u % groups for u in range(users)})


def _words(count: int, draw: random.Random) -> list[str]:
    """Distinct made-up words of three syllables."""
    syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choices(syllables, k=3)).capitalize()] = None
    return list(words)
