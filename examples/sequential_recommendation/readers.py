"""Reads raw files into the `Dataset` of `data.py`. Every file may also be there as .gz.

Every reader raises FileNotFoundError that says which files it looked for, and ValueError("file:line: ...") for a line
that it cannot use. What published files have and a reader leaves out is counted in `Dataset.dropped`.
"""

from __future__ import annotations

import csv
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .data import MAX_HISTORY, MIN_HISTORY, Dataset, Split, Window
from .lines import (
    Line,
    body,
    content,
    day_of,
    fields_of,
    find_files,
    lines_of,
    needed,
    number,
    old_lines,
    records,
    time_of,
    value,
)
from .titles import article_first, without_year

Event = tuple[str, str, str, int]  # "file:line", user, item, time


def _put_title(titles: dict[str, str], where: str, key: str, title: str) -> None:
    """Puts the title there, its white space and line ends as single spaces."""
    if key in titles:
        raise ValueError(f"{where}: item {key} has a title already, {titles[key]!r}")
    titles[key] = " ".join(title.split())
    if not titles[key]:
        raise ValueError(f"{where}: item {key} has an empty title")


def _assemble(name: str, titles: dict[str, str], events: Iterable[Event], dropped: Counter[str]) -> Dataset:
    """A data set with items in the order of titles, and events of one time in the order of the file.

    events: their items must have titles. Of a user's events with one item the first in time counts.
    """
    number = {key: item for item, key in enumerate(titles)}
    users: dict[str, tuple[array[int], array[int]]] = {}
    for where, user, key, time in events:
        item = number.get(key)
        if item is None:
            raise ValueError(f"{where}: item {key} has no title")
        times, items = users.setdefault(user, (array("q"), array("q")))
        times.append(time)
        items.append(item)
    found: dict[str, list[int]] = {}
    tied = []
    for user, (times, items) in users.items():
        first: dict[int, int] = {}
        for i in sorted(range(len(times)), key=times.__getitem__):
            first.setdefault(items[i], times[i])
        found[user] = list(first)
        if len({*list(first.values())[-2:]}) < min(2, len(first)):
            tied.append(user)
        dropped["repeats of a user's item"] += len(items) - len(first)
    left_out = {what: count for what, count in dropped.items() if count}
    return Dataset(name, list(titles.values()), found, dropped=left_out, tied=tied)


def movielens(folder: Path) -> Dataset:
    """Reads MovieLens: 100K (u.item, u.data), 1M and 10M (movies.dat, ratings.dat), others (movies.csv, ratings.csv).

    Every rating counts as an interaction, whatever its value: 943 users, 1,682 items, 100,000 interactions of 100K.
    Three quarters of those have the same second as another one of the same user; they keep the order of the file.
    """
    choices = (("u.item", "u.data"), ("movies.dat", "ratings.dat"), ("movies.csv", "ratings.csv"))
    movies, ratings = find_files(folder, *choices)
    kind = movies.name.removesuffix(".gz")
    titles: dict[str, str] = {}
    for where, item, title in {"u.item": _old_items, "movies.dat": _dat_items, "movies.csv": _csv_items}[kind](movies):
        _put_title(titles, where, item, title)
    lines, separator = lines_of(ratings), {"u.item": "\t", "movies.dat": "::", "movies.csv": ","}[kind]
    if kind == "movies.csv":
        lines = body(lines, "userId,movieId,rating,timestamp")

    def events() -> Iterator[Event]:
        for line in lines:
            user, item, _, time = fields_of(line, separator, "user item rating time")
            yield line[0], user, item, time_of(line[0], time)

    name = "MovieLens-100K" if kind == "u.item" else f"MovieLens ({folder.resolve().name})"
    return _assemble(name, titles, events(), Counter())


def _old_items(path: Path) -> Iterator[tuple[str, str, str]]:
    """(file:line, id, title) of lines id|title|date|video date|address|19 genres. A title may have | in it."""
    for where, text in old_lines(path):
        item, _, rest = text.partition("|")
        title, *behind = rest.rsplit("|", 22)
        if len(behind) != 22 or set(behind[3:]) - {"0", "1"}:
            raise ValueError(f"{where}: expected 24 fields between '|', the last 19 of them 0 or 1, got {text!r}")
        yield where, item, title


def _dat_items(path: Path) -> Iterator[tuple[str, str, str]]:
    for line in old_lines(path):
        item, title, _ = fields_of(line, "::", "id title genres")
        yield line[0], item, title


def _csv_items(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, text in body(lines_of(path), "movieId,title,genres"):
        found = next(csv.reader([text]))
        if len(found) != 3:
            raise ValueError(f"{where}: expected 3 fields between ',', movieId, title, genres, got {text!r}")
        yield where, found[0], found[1]


def lastfm(folder: Path) -> Dataset:
    """Reads HetRec 2011 Last.fm: user_taggedartists-timestamps.dat and artists.dat, tab-separated, each with a header.

    An artist's time, in milliseconds, is when the user first tagged it. (user_artists.dat has play counts without
    times, which cannot order a sequence, so it is not read.) Of the published tags those of artists that artists.dat
    lacks are left out, and so are those from before 2002, when there was no Last.fm.

    If a folder has items.tsv and no artists.dat, `windows_files` reads it.
    """
    published = ("artists.dat", "user_taggedartists-timestamps.dat")
    found = find_files(folder, published, ("items.tsv", "train.tsv", "val.tsv", "test.tsv"))
    if len(found) == 4:
        return replace(windows_files(folder), name="LastFM")
    titles: dict[str, str] = {}
    for where, text in body(lines_of(found[0]), "id\tname\turl\tpictureURL"):
        fields = text.split("\t")
        if not 3 <= len(fields) <= 4:  # some have no picture
            raise ValueError(f"{where}: expected id, name, url and pictureURL between tabs, got {text!r}")
        _put_title(titles, where, fields[0], fields[1])
    dropped: Counter[str] = Counter()

    def events() -> Iterator[Event]:
        for line in body(lines_of(found[1]), "userID\tartistID\ttagID\ttimestamp"):
            user, item, _, text = fields_of(line, "\t", "userID artistID tagID timestamp")
            time = number(line[0], text)
            if item not in titles:
                dropped["tags of artists without a name"] += 1
            elif time < 1_009_843_200_000:
                dropped["tags from before 2002"] += 1
            else:
                yield line[0], user, item, time_of(line[0], text, 1000)

    return _assemble("LastFM", titles, events(), dropped)


def steam(folder: Path) -> Dataset:
    """Reads the Steam reviews and games of UCSD: steam_reviews.json and steam_games.json, a record a line.

    A review has username, product_id and date (2018-1-5); a game has id and app_name or title. Games without an id or
    name, and reviews of games without a title, are left out, since the published files have some. Pass the result
    through `data.frequent`, because most users wrote a single review.
    """
    games, reviews = find_files(folder, ("steam_games.json", "steam_reviews.json"))
    titles: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for where, game in records(games):
        item, title = value(game, "id"), value(game, "app_name", "title")
        if not item or not title:
            dropped["games without an id or a name"] += 1
        elif titles.get(item) != " ".join(title.split()):
            _put_title(titles, where, item, title)

    def events() -> Iterator[Event]:
        for where, review in records(reviews):
            user, item, day = (needed(where, review, key) for key in ("username", "product_id", "date"))
            if item in titles:
                yield where, user, item, day_of(where, day)
            else:
                dropped["reviews of games without a name"] += 1

    return _assemble("Steam", titles, events(), dropped)


def amazon(folder: Path) -> Dataset:
    """Reads Amazon reviews, a record a line: one file meta_*.json of products and one other .json or .jsonl of reviews.

    A review has reviewerID, asin and unixReviewTime (2014 and 2018), or user_id, parent_asin and timestamp in
    milliseconds (2023). A product has asin or parent_asin, and title. Products without a title and reviews of them are
    left out, since the published files have many.
    """
    files = sorted(p for p in folder.glob("*") if re.search(r"\.jsonl?(\.gz)?$", p.name))
    meta, reviews = ([p for p in files if p.name.startswith("meta_") == is_meta] for is_meta in (True, False))
    if len(meta) != 1 or len(reviews) != 1:
        raise FileNotFoundError(
            f"{folder}: expected one file meta_*.json and one other .json, or .jsonl, each as it is or as .gz; "
            + content(folder)
        )
    titles: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for where, product in records(meta[0]):
        item, title = needed(where, product, "parent_asin", "asin"), value(product, "title")
        if not title:
            dropped["products without a title"] += 1
        elif titles.get(item) != " ".join(title.split()):
            _put_title(titles, where, item, title)

    def events() -> Iterator[Event]:
        for where, review in records(reviews[0]):
            user, item = needed(where, review, "reviewerID", "user_id"), needed(where, review, "parent_asin", "asin")
            if item in titles:
                unit = 1000 if "timestamp" in review else 1
                yield where, user, item, time_of(where, needed(where, review, "unixReviewTime", "timestamp"), unit)
            else:
                dropped["reviews of products without a title"] += 1

    return _assemble(f"Amazon ({reviews[0].name.split('.')[0]})", titles, events(), dropped)


def interactions(folder: Path) -> Dataset:
    """Reads your own data: items.tsv, id<TAB>title, and interactions.tsv, user<TAB>item<TAB>time, without headers.

    A time is any whole number from 0 on; the smaller one came first.
    """
    items, events = find_files(folder, ("items.tsv", "interactions.tsv"))
    titles = _titles(items)

    def read() -> Iterator[Event]:
        for line in lines_of(events):
            user, item, text = fields_of(line, "\t", "user item time")
            if (time := number(line[0], text)) < 0:
                raise ValueError(f"{line[0]}: expected a time of 0 or more, got {text!r}")
            yield line[0], user, item, time

    return _assemble(folder.resolve().name, titles, read(), Counter())


def _titles(path: Path, numbered: bool = False) -> dict[str, str]:
    """item -> title of lines id<TAB>title. numbered: whether the ids have to be 0, 1, ..."""
    titles: dict[str, str] = {}
    for line in lines_of(path):
        item, title = fields_of(line, "\t", "id title")
        if numbered and item != str(len(titles)):
            raise ValueError(f"{line[0]}: expected item {len(titles)}, got {item}")
        _put_title(titles, line[0], item, title)
    return titles


def windows_files(folder: Path) -> Dataset:
    """Reads windows that are already cut and split: items.tsv, and train.tsv, val.tsv, test.tsv.

    A line of items.tsv is id<TAB>title, with ids 0, 1, ... A line of the others is id,id,...<TAB>id: a history of 3 to
    10 items, oldest first, and the next item. The windows become the data set's given split. No window may be in two
    files.

    The leave-one-out protocol needs users, which are recovered from the order in which such files are written. A line
    of train.tsv belongs to the user of the line before if it continues that line: its history is the end of that line's
    history and target. Each line of val.tsv and test.tsv is a user of its own.
    """
    items, *files = find_files(folder, ("items.tsv", "train.tsv", "val.tsv", "test.tsv"))
    titles = _titles(items, numbered=True)
    parts: list[list[Window]] = []
    users: dict[str, list[int]] = {}
    seen: dict[tuple[tuple[int, ...], int], str] = {}
    for name, path in zip(("train", "val", "test"), files, strict=True):
        found = [(where, _window((where, text), len(titles))) for where, text in lines_of(path)]
        if not found:
            raise ValueError(f"{path}: expected windows, it has none")
        for where, window in found:
            if window in seen:
                raise ValueError(f"{where}: the same window is in {seen[window]}: a test would be trained on")
        seen |= {window: where for where, window in found}
        parts.append(_name_users([window for _, window in found], name, users))
    return Dataset(folder.resolve().name, list(titles.values()), users, Split(*parts))


def _window(line: Line, num_items: int) -> tuple[tuple[int, ...], int]:
    where = line[0]
    left, right = fields_of(line, "\t", "history next")
    *history, target = (number(where, text) for text in (*left.split(","), right))
    if not MIN_HISTORY <= len(history) <= MAX_HISTORY:
        raise ValueError(f"{where}: expected a history of {MIN_HISTORY} to {MAX_HISTORY} items, got {len(history)}")
    if len({*history, target}) <= len(history):
        raise ValueError(f"{where}: an item occurs twice")
    if min(*history, target) < 0 or max(*history, target) >= num_items:
        raise ValueError(f"{where}: expected ids below {num_items}, got {line[1]!r}")
    return tuple(history), target


def _name_users(lines: list[tuple[tuple[int, ...], int]], part: str, users: dict[str, list[int]]) -> list[Window]:
    """The lines as windows. Adds their users and the users' items to `users`."""
    found: list[Window] = []
    for history, target in lines:
        continues = False
        if part == "train" and found:
            met = users[found[-1].user]
            # After a history of k < 10 items the same user's next history has k + 1: any other begins another user.
            expected = (*found[-1].history, found[-1].target)[-MAX_HISTORY:]
            continues = history == expected and target not in met
        user = found[-1].user if continues else f"{part}-{len(users)}"
        if continues:
            users[user].append(target)
        else:
            users[user] = [*history, target]
        found.append(Window(user, history, target))
    return found


def plain_titles(dataset: Dataset) -> Dataset:
    """The data set with shorter titles: "Godfather, The (1972)" becomes "The Godfather".

    That halves the tokens of MovieLens.
    Items whose titles become equal stay different items, and are never candidates of one example.
    """
    return replace(dataset, titles=[article_first(without_year(title)) for title in dataset.titles])


READERS: dict[str, Callable[[Path], Dataset]] = {
    "ml-100k": movielens,
    "movielens": movielens,
    "lastfm": lastfm,
    "steam": steam,
    "amazon": amazon,
    "interactions": interactions,
    "windows": windows_files,
}
