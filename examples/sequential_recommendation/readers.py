"""Reads public raw files into the `Dataset` of `data.py`.

Every reader raises FileNotFoundError for a missing file and ValueError("file:line: ...") for a line it cannot use.
"""

from __future__ import annotations

import ast
import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .data import MAX_HISTORY, MIN_HISTORY, Dataset, Split, Window

Line = tuple[str, str]  # "file:line", for messages, and the text
Event = tuple[str, str, str, int | str]  # "file:line", user, item, time


def _lines(path: Path, encoding: str = "utf-8") -> Iterator[Line]:
    """Yields the lines that are not empty, without their line ends."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = raw.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected {encoding}: {error}") from error
            if text.strip():
                yield where, text


def _fields(line: Line, separator: str, least: int) -> list[str]:
    where, text = line
    fields = text.split(separator)
    if len(fields) < least:
        raise ValueError(f"{where}: expected {least} fields or more between {separator!r}, got {text!r}")
    return fields


def _number(where: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{where}: expected an integer, got {text!r}") from error


def _put_title(titles: dict[str, str], where: str, key: str, title: str) -> None:
    if key in titles:
        raise ValueError(f"{where}: item {key} has a title already, {titles[key]!r}")
    if not title.strip():
        raise ValueError(f"{where}: item {key} has an empty title")
    titles[key] = title.strip()


def _assemble(name: str, titles: dict[str, str], events: Iterable[Event]) -> Dataset:
    """A data set with items in the order of titles, and events of one time in the order of the file."""
    number = {key: item for item, key in enumerate(titles)}
    users: dict[str, list[tuple[Any, int]]] = {}
    for where, user, item, time in events:
        if item not in number:
            raise ValueError(f"{where}: item {item} has no title")
        users.setdefault(user, []).append((time, number[item]))
    ordered = {user: sorted(found, key=lambda event: event[0]) for user, found in users.items()}
    first = {user: list(dict.fromkeys(item for _, item in found)) for user, found in ordered.items()}
    return Dataset(name, list(titles.values()), first)


def movielens(folder: Path) -> Dataset:
    """Reads MovieLens-100K: u.data, user<TAB>item<TAB>rating<TAB>time, and u.item, item|title|..., in Latin-1.

    Every rating counts as an interaction, whatever its value: 943 users, 1,682 items, 100,000 interactions. Three
    quarters of the ratings have the same time, in seconds, as another one of the same user; they keep the order of the
    file.
    """
    titles: dict[str, str] = {}
    for line in _lines(folder / "u.item", "latin-1"):
        item, title, *_ = _fields(line, "|", 2)
        _put_title(titles, line[0], item, title)

    def events() -> Iterator[Event]:
        for line in _lines(folder / "u.data", "latin-1"):
            user, item, _, time, *_ = _fields(line, "\t", 4)
            yield line[0], user, item, _number(line[0], time)

    return _assemble("MovieLens-100K", titles, events())


def lastfm(folder: Path) -> Dataset:
    """Reads HetRec 2011 Last.fm: user_taggedartists-timestamps.dat and artists.dat, tab-separated, each with a header.

    user_taggedartists-timestamps.dat holds userID, artistID, tagID, timestamp. An artist's time is when the user first
    tagged it. (user_artists.dat has play counts without times, which cannot order a sequence, so it is not read.)
    artists.dat holds id, name, url, pictureURL. Tags of artists that artists.dat lacks are dropped, since the published
    files have some.

    If a folder has items.tsv and no artists.dat, `windows_files` reads it.
    """
    if not (folder / "artists.dat").exists():
        if (folder / "items.tsv").exists():
            return replace(windows_files(folder), name="LastFM")
        raise FileNotFoundError(
            f"{folder}: expected artists.dat and user_taggedartists-timestamps.dat, or "
            "items.tsv, train.tsv, val.tsv and test.tsv; there is neither artists.dat nor items.tsv"
        )
    titles: dict[str, str] = {}
    for line in _body(folder / "artists.dat", "id"):
        item, title, *_ = _fields(line, "\t", 2)
        _put_title(titles, line[0], item, title)

    def events() -> Iterator[Event]:
        for line in _body(folder / "user_taggedartists-timestamps.dat", "userID"):
            user, item, _, time, *_ = _fields(line, "\t", 4)
            if item in titles:
                yield line[0], user, item, _number(line[0], time)

    return _assemble("LastFM", titles, events())


def _body(path: Path, header: str) -> Iterator[Line]:
    lines = _lines(path)
    for where, text in lines:
        if not text.startswith(header + "\t"):
            raise ValueError(f"{where}: expected a header that starts with {header!r}, got {text!r}")
        break
    yield from lines


def steam(folder: Path) -> Dataset:
    """Reads the Steam reviews and games of UCSD: steam_reviews.json.gz and steam_games.json.gz (or without .gz).

    Each line is one record, written as a Python dictionary (JSON works too, unless it has null, true or false). A
    review has username, product_id and date (YYYY-MM-DD); a game has id and app_name or title. Games without an id or
    name, and reviews of games without a title, are dropped, since the published files have some. Pass the result
    through `data.frequent`, because most users wrote a single review.
    """
    titles: dict[str, str] = {}
    for where, game in _records(folder, "steam_games.json"):
        item, title = str(game.get("id", "")), str(game.get("app_name") or game.get("title") or "")
        if item and title.strip() and titles.get(item) != title.strip():
            _put_title(titles, where, item, title)

    def events() -> Iterator[Event]:
        for where, review in _records(folder, "steam_reviews.json"):
            missing = [key for key in ("username", "product_id", "date") if key not in review]
            if missing:
                raise ValueError(f"{where}: the review has no {', '.join(missing)}")
            item = str(review["product_id"])
            if item in titles:
                yield where, str(review["username"]), item, str(review["date"])

    return _assemble("Steam", titles, events())


def _records(folder: Path, name: str) -> Iterator[tuple[str, dict[str, object]]]:
    packed, plain = folder / (name + ".gz"), folder / name
    if not packed.exists() and not plain.exists():
        raise FileNotFoundError(f"{folder}: expected {packed.name} or {name}, there is neither")
    for where, text in _lines(packed if packed.exists() else plain):
        try:
            record = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{where}: expected a dictionary, got {text[:60]!r}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a dictionary, got {text[:60]!r}")
        yield where, record


def windows_files(folder: Path) -> Dataset:
    """Reads windows that are already cut and split: items.tsv, and train.tsv, val.tsv, test.tsv.

    A line of items.tsv is id<TAB>title, with ids 0, 1, ... A line of the others is id,id,...<TAB>id: a history of 3 to
    10 items, oldest first, and the next item. The windows become the data set's given split.

    The leave-one-out protocol needs users, which are recovered from the order in which such files are written. A line
    of train.tsv belongs to the user of the line before if it continues that line: its history is the end of that line's
    history and target. Each line of val.tsv and test.tsv is a user of its own.
    """
    titles: dict[str, str] = {}
    for line in _lines(folder / "items.tsv"):
        item, title, *_ = _fields(line, "\t", 2)
        if item != str(len(titles)):
            raise ValueError(f"{line[0]}: expected item {len(titles)}, got {item}")
        _put_title(titles, line[0], item, title)
    parts: list[list[Window]] = []
    users: dict[str, list[int]] = {}
    for name in ("train", "val", "test"):
        lines = [_window(line, len(titles)) for line in _lines(folder / f"{name}.tsv")]
        if not lines:
            raise ValueError(f"{folder / name}.tsv: expected windows, it has none")
        parts.append(_name_users(lines, name, users))
    return Dataset(folder.resolve().name, list(titles.values()), users, Split(*parts))


def _window(line: Line, num_items: int) -> tuple[tuple[int, ...], int]:
    where = line[0]
    left, right, *_ = _fields(line, "\t", 2)
    *history, target = (_number(where, text) for text in (*left.split(","), right))
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
    found = [re.sub(r"\s*\(\d{4}\)$", "", title) or title for title in dataset.titles]
    return replace(dataset, titles=[re.sub(r"^(.+), (The|A|An|Le|La|Les|Il|Das|Der|Die)$", r"\2 \1", t) for t in found])


READERS: dict[str, Callable[[Path], Dataset]] = {
    "ml-100k": movielens,
    "lastfm": lastfm,
    "steam": steam,
    "windows": windows_files,
}
