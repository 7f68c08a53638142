"""Finds the items of a data set that a person means by the titles they type."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from .data import Dataset, normal

_YEAR = re.compile(r"\s*\((\d{4})\)$")
_BEHIND = re.compile(r"^(.+), (the|a|an|le|la|les|il|das|der|die)$")  # "Godfather, The", as `readers.plain_titles`
_BEFORE = re.compile(r"^(the|a|an) (.+)$")


class UnknownTitles(ValueError):
    """Titles that fit no item, or several. The message has a line for each, with titles that might be meant."""


def year(title: str) -> str | None:
    """The year in brackets at the end of the title, or None."""
    found = _YEAR.search(title.strip())
    return found and found[1]


def forms(title: str) -> tuple[str, str, str]:
    """Three forms in which titles are compared, from the most exact to the least.

    They are: the title as `normal` returns it; that without year, accents and punctuation and with its article in
    front; and the latter without its article. If a title would be left empty, it keeps its punctuation.
    """
    exact = normal(title)
    bare = _BEHIND.sub(r"\2 \1", _YEAR.sub("", exact))
    letters = "".join(c for c in unicodedata.normalize("NFKD", bare) if not unicodedata.combining(c))
    plain = " ".join(re.sub(r"[^\w\s]", "", letters).split()) or letters
    behind = _BEHIND.match(_YEAR.sub("", exact))
    short = forms(behind[1])[1] if behind else _BEFORE.sub(r"\2", plain)
    return exact, plain, short


class Titles:
    """Finds the items of a data set by title.

    If several items have the very same title, it takes the one that most users met, since the title cannot tell them
    apart.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.met = [0] * dataset.num_items
        for items in dataset.users.values():
            for item in items:
                self.met[item] += 1
        self.items: dict[str, int] = {}  # exact form -> item
        for item, name in enumerate(dataset.names):
            if name not in self.items or self.met[item] > self.met[self.items[name]]:
                self.items[name] = item
        self.forms = {item: forms(dataset.titles[item]) for item in self.items.values()}

    @property
    def known(self) -> list[str]:
        """Every title once, in alphabetical order."""
        return sorted((self.dataset.titles[item] for item in self.items.values()), key=str.casefold)

    def find(self, titles: Sequence[str]) -> list[int]:
        """The items of the titles, in the order of the titles.

        A title may have other case or white space, and may lack accents, punctuation, the year or an article, if only
        one item fits it then. A year must be right if the item's title in the data set has one. Raises `UnknownTitles`
        with a line for every title that fits no item or several.
        """
        found = [self._matches(title) for title in titles]
        wrong = [self._explained(title, items) for title, items in zip(titles, found, strict=True) if len(items) != 1]
        if wrong:
            raise UnknownTitles("\n".join(wrong))
        return [items[0] for items in found]

    def _matches(self, title: str) -> list[int]:
        asked = forms(title)
        if asked[0] in self.items:
            return [self.items[asked[0]]]
        same_year = {year(title), None}
        fitting = [i for i in self.forms if year(title) is None or year(self.dataset.titles[i]) in same_year]
        for level in (1, 2):
            items = [item for item in fitting if self.forms[item][level] == asked[level]]
            if items:
                return items
        return []

    def _explained(self, title: str, items: list[int]) -> str:
        if items:
            return f"{title!r} is several: {self._listed(items)}"
        near = self.nearest(title)
        return f"{title!r} is not known" + (f"; near it: {self._listed(near)}" if near else "")

    def _listed(self, items: Sequence[int]) -> str:
        return ", ".join(repr(self.dataset.titles[item]) for item in items)

    def nearest(self, title: str, count: int = 3) -> list[int]:
        """Up to `count` items with similar titles.

        First come the items whose titles hold all words of this one, in the order of how many users met them. Then come
        those whose titles are spelt like it.
        """
        asked = forms(title)[2]
        words = set(asked.split())
        holding = [item for item, form in self.forms.items() if words and words <= set(form[1].split())]
        holding.sort(key=lambda item: -self.met[item])
        spelt = {form[2]: item for item, form in self.forms.items()}
        close = [spelt[name] for name in difflib.get_close_matches(asked, spelt, count)]
        return list(dict.fromkeys(holding[:count] + close))[:count]
