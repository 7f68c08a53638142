"""Finds the items of a data set that a person means by the titles they type."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from .data import Dataset, normal

_YEAR = re.compile(r"\s*\((\d{4})[-–\d\s]*\)\s*$")
_ARTICLES = "the|an?|les?|la|l'|il|lo|gli|el|l[oa]s|das|der|die|de[nt]?|het|une?|una|eine?|os?"
# An article behind its title, at the end or before or after a bracket: "Seventh Seal, The (Sjunde inseglet, Det)".
_BEHIND = re.compile(rf"(a\.k\.a\.\s+)?([^()\s][^()]*), ({_ARTICLES})(?=\s*(?:[()]|$))", re.IGNORECASE)
_BEFORE = re.compile(r"^(?:the|an?)\s+(.+)$")  # of other languages' articles some are English words


class UnknownTitles(ValueError):
    """Titles that fit no item, or several. The message has a line for each, with titles that might be meant."""


def year(title: str) -> str | None:
    """The year in brackets at the end of the title, or None."""
    found = _YEAR.search(title)
    return found and found[1]


def without_year(title: str) -> str:
    return _YEAR.sub("", title) or title


def article_first(title: str) -> str:
    """ "Enfer, L'" becomes "L'Enfer", in brackets too."""

    def turned(found: re.Match[str]) -> str:
        return (found[1] or "") + found[3] + ("" if found[3].endswith("'") else " ") + found[2]

    return _BEHIND.sub(turned, title)


def _letters(title: str) -> str:
    """Without accents and punctuation; a title that would be left empty keeps its punctuation."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", title) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w\s]", "", letters).split()) or letters


class Forms(NamedTuple):
    """The forms in which titles are compared, from the most exact to the least.

    exact: as `normal` returns it. plain: without year, accents and punctuation and with its article in front.
    short: the latter without its article. parts: of what stands before brackets and of what stands in them.
    """

    exact: str
    plain: str
    short: str
    parts: frozenset[str]


def forms(title: str) -> Forms:
    exact = normal(title)
    bare = without_year(exact)
    without = _BEHIND.sub(lambda found: (found[1] or "") + found[2], bare)
    first = article_first(bare)
    parts = re.split(r"[()]", f"{without}({first})")  # each with its article and without
    short, *rest = (_letters(_BEFORE.sub(r"\1", part.strip())) for part in (without, *parts))
    return Forms(exact, _letters(first), short, frozenset(rest) - {""})


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

    def holding(self, words: Sequence[str]) -> list[str]:
        """The titles of `known` that hold all of the words, which may lack accents and have other case."""
        wanted = [_letters(normal(word)) for word in words]
        return [title for title in self.known if all(word in _letters(normal(title)) for word in wanted)]

    def find(self, titles: Sequence[str]) -> list[int]:
        """The items of the titles, in the order of the titles.

        A title may have other case or white space, and may lack accents, punctuation, the year, an article, or what
        stands in brackets or before them, if only one item fits it then. A year must be right if the item's title in
        the data set has one. Raises `UnknownTitles` with a line for every title that fits no item or several.
        """
        found = [self._matches(title) for title in titles]
        wrong = [self._explained(title, items) for title, items in zip(titles, found, strict=True) if len(items) != 1]
        if wrong:
            raise UnknownTitles("\n".join(wrong))
        return [items[0] for items in found]

    def _matches(self, title: str) -> list[int]:
        asked = forms(title)
        if asked.exact in self.items:
            return [self.items[asked.exact]]
        same_year = {year(title), None}
        fitting = [i for i in self.forms if year(title) is None or year(self.dataset.titles[i]) in same_year]
        plain = [item for item in fitting if self.forms[item].plain == asked.plain]
        short = plain or [item for item in fitting if self.forms[item].short == asked.short]
        return short or [item for item in fitting if asked.short in self.forms[item].parts]

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
        asked = forms(title).short
        words = set(asked.split())
        holding = [item for item, form in self.forms.items() if words and words <= set(form.plain.split())]
        holding.sort(key=lambda item: -self.met[item])
        spelt = {form.short: item for item, form in self.forms.items()}
        close = [spelt[name] for name in difflib.get_close_matches(asked, spelt, count)]
        return list(dict.fromkeys(holding[:count] + close))[:count]
