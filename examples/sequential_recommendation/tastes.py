"""Makes up users whose groups follow conflicting rules about the words in titles, with too many items to learn each."""

from __future__ import annotations

import random
from itertools import product

from .data import Dataset

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
STEPS = 3  # items that follow the rule in each block of a sequence


def tastes(
    users: int = 2400, groups: int = 4, kinds: int = 23, names: int = 70, own: int = 3, blocks: int = 3, seed: int = 0
) -> Dataset:
    """A data set whose answers need both the user's group and the items' kinds, which different models can learn.

    A title is two words, a kind and a name. There are kinds · names items, and only a few users meet each of them. So a
    sequence model, for which items are numbers, learns little about them, while a language model reads the kind.

    The kinds form a ring. After an item of one kind, a user of group g meets any item of the kind `stride[g]` positions
    further on the ring, and no two groups agree after any kind. A user's sequence has 2 to `blocks` blocks. A block is
    one item that only the user's group uses (each group has `own` such items), then three items that follow the rule.
    The user starts at a random kind and continues there from block to block. The last item, which is tested, is one
    that follows the rule.

    So a sequence model can learn the group, whose own items users meet often, but hardly the answer. A model that knows
    the rules but not the group reaches 1 / `groups` of the best possible ratio. The best possible ratio is below 1,
    since other candidates may be of the right kind too.

    Dataset.groups has every user's group; the groups have equal sizes. Raises ValueError for sizes that do not fit.
    """
    if not 2 <= blocks <= own or not 1 <= groups <= min(users, kinds - 1) or names < STEPS * blocks:
        raise ValueError(
            f"tastes: {users=}, {groups=}, {kinds=}, {names=}, {own=}, {blocks=}: expected 2 <= blocks <= own, "
            f"1 <= groups <= users, groups < kinds, and {STEPS} * blocks <= names"
        )
    draw = random.Random(f"{seed}/tastes")
    words = made_up_words(kinds + groups * own + names, draw)
    second = words[kinds + groups * own :]
    titles = [f"{kind} {name}" for kind in words[:kinds] for name in second]  # item id: kind · names + name
    markers = [f"{word} {draw.choice(second)}" for word in words[kinds : kinds + groups * own]]
    strides = draw.sample(range(1, kinds), groups)
    sequences: dict[str, list[int]] = {}
    for user in range(users):
        group = user % groups
        kind, count = draw.randrange(kinds), draw.randint(2, blocks)
        sequence: list[int] = []
        for marker in draw.sample(range(own), count):
            sequence.append(len(titles) + group * own + marker)
            for _ in range(STEPS):
                unmet = [item for item in range(kind * names, (kind + 1) * names) if item not in sequence]
                sequence.append(draw.choice(unmet))
                kind = (kind + strides[group]) % kinds
        sequences[f"user-{user}"] = sequence
    return Dataset("tastes", [*titles, *markers], sequences, groups={f"user-{u}": u % groups for u in range(users)})


def made_up_words(count: int, draw: random.Random) -> list[str]:
    """Distinct made-up words of three syllables."""
    syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(syllables, k=3)).capitalize()] = None
    return list(names)
