"""Readers on small literal files: what they read, and every line that they refuse, by file and line."""

import gzip

import pytest
from sequential_recommendation import readers
from sequential_recommendation.data import split, with_candidates
from sequential_recommendation.files import read_once
from sequential_recommendation.readers import READERS

GENRES = "|0" * 18 + "|1"


def film(item, title):
    return f"{item}|{title}|01-Jan-1995||http://x{GENRES}\n"


T = 880_000_000
RATINGS = f"7\t3\t5\t{T + 20}\n7\t1\t1\t{T + 10}\n8\t2\t3\t{T}\n7\t2\t4\t{T + 20}\n7\t3\t1\t{T + 30}\n\n"
FILMS = film(1, "Café (1990)") + film(2, "B (1991)") + film(3, "C")
MOVIES = {"u.item": FILMS.encode("latin-1"), "u.data": RATINGS}
HALF = RATINGS.replace("\t5\t", "\t4.5\t")
DAT = {"movies.dat": "1::Café (1990)::Drama\n2::B (1991)::A|B\n3::C::A\n", "ratings.dat": HALF.replace("\t", "::")}
COLUMNS = "userId,movieId,rating,timestamp\n"
TABLE = {
    "movies.csv": 'movieId,title,genres\n1,Café (1990),Drama\n2,"B (1991)",A|B\n3,C,A\n',
    "ratings.csv": COLUMNS + HALF.replace("\t", ","),
}
MS = 1_238_536_800_000
TAGS = f"2\t52\t13\t{MS + 30}\r\n2\t51\t13\t{MS + 20}\n2\t52\t15\t{MS + 10}\n2\t99\t15\t{MS}\n2\t51\t1\t-428720400000\n"
ARTISTS = {
    "artists.dat": "id\tname\turl\tpictureURL\n51\tDiary of Dreams\thttp://x\t\n52\tÉmilie\thttp://y\n",
    "user_taggedartists-timestamps.dat": "userID\tartistID\ttagID\ttimestamp\n" + TAGS,
}
REVIEWS = """{'username': 'ann', 'product_id': '2', 'date': '2017-1-10', 'text': "it's", 'early': False}
{'username': 'ann', 'product_id': '570', 'date': '2017-1-9'}
{"username": "ann", "product_id": "1", "date": "2017-12-31", "found": null}
"""
GAMES = "{u'app_name': u'Dota\u2122', u'id': u'570'}\n{'title': 'B\\nside', 'id': '2'}\n{'title': 'C'}\n"
STEAM = {"steam_games.json": GAMES, "steam_reviews.json": REVIEWS}
PRODUCTS = '{"asin": "B1", "title": "Comb"}\n{"asin": "B2", "title": ""}\n{"asin": "B3", "title": "Soap"}\n'
BOUGHT = """{"reviewerID": "A", "asin": "B3", "unixReviewTime": 1400000200, "overall": 5.0}
{"reviewerID": "A", "asin": "B1", "unixReviewTime": 1400000100}
{"reviewerID": "A", "asin": "B2", "unixReviewTime": 1400000100}
"""
AMAZON = {"meta_Beauty.json": PRODUCTS, "Beauty_5.json": BOUGHT}
NEWER = {
    "meta_Beauty.jsonl": PRODUCTS.replace("asin", "parent_asin"),
    "Beauty.jsonl": BOUGHT.replace("reviewerID", "user_id").replace('"asin', '"asin": "x", "parent_asin')
    .replace("unixReviewTime", "timestamp").replace("00,", "00000,").replace("00}", "00000}"),
}  # fmt: skip
OWN = {"items.tsv": "a\tTea\nb\tCoffee\nc\tMilk\n", "interactions.tsv": "kim\tb\t3\nkim\ta\t12\nlee\tc\t0\n"}
TRAIN = "0,1,2\t3\n0,1,2,3\t4\n5,6,7\t8\n0,1,2\t9\n1,2,3,4,5,6,7,8,9,10\t11\n2,3,4,5,6,7,8,9,10,11\t12\n"
ITEMS = "".join(f"{i}\tArtist {i}\n" for i in range(30))
WINDOWS = {"items.tsv": ITEMS, "train.tsv": TRAIN, "val.tsv": "1,2,3\t4\n", "test.tsv": "3,4,5\t6\n"}


def read(reader, folder, files):
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return READERS[reader](folder)


MET = {"7": [0, 2, 1], "8": [1]}
READ = {  # reader and files: titles and users; by time, and as in the file within a second
    "ml-100k": (MOVIES, ["Café (1990)", "B (1991)", "C"], MET),
    "movielens of 1M and 10M": (DAT, ["Café (1990)", "B (1991)", "C"], MET),
    "movielens of 20M and later": (TABLE, ["Café (1990)", "B (1991)", "C"], MET),
    "lastfm": (ARTISTS, ["Diary of Dreams", "Émilie"], {"2": [1, 0]}),  # an artist counts from its first tag
    "steam": (STEAM, ["Dota\u2122", "B side"], {"ann": [0, 1]}),
    "amazon of 2014 and 2018": (AMAZON, ["Comb", "Soap"], {"A": [0, 1]}),
    "amazon of 2023": (NEWER, ["Comb", "Soap"], {"A": [0, 1]}),
    "interactions": (OWN, ["Tea", "Coffee", "Milk"], {"kim": [1, 0], "lee": [2]}),
}


def packed(files):
    return {f"{name}.gz": gzip.compress(t if isinstance(t, bytes) else t.encode()) for name, t in files.items()}


def marked(files):
    return {name: t if isinstance(t, bytes) else b"\xef\xbb\xbf" + t.encode() for name, t in files.items()}


@pytest.mark.parametrize("form", [dict, packed, marked])
@pytest.mark.parametrize("kind", READ)
def test_titles_and_histories_are_read_packed_and_with_a_mark_too(tmp_path, kind, form):
    files, titles, users = READ[kind]
    dataset = read(kind.split()[0], tmp_path, form(files))
    assert (dataset.titles, dataset.users) == (titles, users)


def test_users_whose_last_two_items_have_the_same_time_are_known(tmp_path):
    more = f"8\t3\t5\t{T}\n9\t3\t5\t{T}\n9\t1\t5\t{T + 9}\n"
    dataset = read("ml-100k", tmp_path, MOVIES | {"u.data": RATINGS + more})
    assert dataset.tied == ["7", "8"]  # their last two are 3 and 2, and 2 and 3; 9 met 1 later than 3
    assert readers.plain_titles(dataset).tied == dataset.tied


def test_old_titles_may_be_in_utf_8_and_have_a_bar(tmp_path):
    files = MOVIES | {"u.item": film(1, "Am\u00e9lie \u2013 |Face|Off") + film(2, "B") + film(3, "C")}
    assert read("ml-100k", tmp_path, files).titles[0] == "Am\u00e9lie \u2013 |Face|Off"


def test_what_is_left_out_is_counted(tmp_path):
    def folder(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    assert str(read("steam", folder("steam"), STEAM)) == (
        "Steam: 1 users, 2 items, 2 interactions; left out: 1 games without an id or a name; "
        "left out: 1 reviews of games without a name; left out: 1 users with fewer than 4 items"
    )
    assert read("amazon", folder("amazon"), AMAZON).dropped == {
        "products without a title": 1, "reviews of products without a title": 1,
    }  # fmt: skip
    assert read("lastfm", folder("lastfm"), ARTISTS).dropped == {
        "tags of artists without a name": 1, "tags from before 2002": 1, "repeats of a user's item": 1,
    }  # fmt: skip
    assert read("ml-100k", folder("films"), MOVIES).dropped == {"repeats of a user's item": 1}


PACKED = gzip.compress(RATINGS.encode() * 400)
DAMAGED = bytearray(PACKED)
DAMAGED[40:60] = b"\xff" * 20
REFUSED = [
    ("ml-100k", "u.data", f"7\t1\t5\t{T}\n7\t2\t5\n", r"u\.data:2: expected 4 fields .* user, item, rating, time"),
    ("ml-100k", "u.data", f"7\t1\t5\t{T}\t1\n", r"u\.data:1: expected 4 fields"),
    ("ml-100k", "u.data", f"\t1\t5\t{T}\n", r"u\.data:1: expected 4 fields"),
    ("ml-100k", "u.data", "7\t1\t5\tnoon\n", r"u\.data:1: expected an integer, got 'noon'"),
    ("ml-100k", "u.data", "7\t1\t5\t-88\n", r"u\.data:1: expected a time in seconds .* got '-88'"),
    ("ml-100k", "u.data", f"7\t1\t5\t{T}000\n", r"u\.data:1: expected a time in seconds .* 1990 to 2099, got"),
    ("ml-100k", "u.data", f"\n7\t9\t5\t{T}\n", r"u\.data:2: item 9 has no title"),
    ("ml-100k", "u.item", film(1, "A") + film(1, "B"), r"u\.item:2: item 1 has a title already, 'A'"),
    ("ml-100k", "u.item", film(1, ""), r"u\.item:1: item 1 has an empty title"),
    ("ml-100k", "u.item", "1|A|x\n", r"u\.item:1: expected 24 fields"),
    ("ml-100k", "u.item", film(1, "A").replace("|1\n", "|http\n"), r"u\.item:1: expected 24 fields .* 0 or 1"),
    ("movielens", "movies.dat", "1:A:x\n", r"movies\.dat:1: expected 3 fields between '::'"),
    ("movielens", "ratings.dat", f"7::1::5\n7::1::5::{T}\n", r"ratings\.dat:1: expected 4 fields"),
    ("movielens", "movies.csv", "movieId,title,genres\n1,A, B,x\n", r"movies\.csv:2: expected 3 fields"),
    ("movielens", "movies.csv", "1,A,x\n", r"movies\.csv:1: expected the header 'movieId,title,genres'"),
    ("movielens", "ratings.csv", "", r"the file is empty: expected the header"),
    ("movielens", "ratings.csv", f"{COLUMNS}1,4,5,{T}\n", r"ratings\.csv:2: item 4 has no title"),
    ("lastfm", "artists.dat", "51\tA\n", r"artists\.dat:1: expected the header 'id"),
    ("lastfm", "artists.dat", "id\tname\turl\tpictureURL\n51\tA\tB\tx\ty\n", r"dat:2: expected id, name, url and"),
    ("lastfm", "artists.dat", b"id\tname\turl\tpictureURL\n51\t\xe9\n", r"artists\.dat:2: expected utf-8"),
    (
        "steam",
        "steam_reviews.json",
        "{'username': 'a', 'date': '2018-1-1'}",
        r"json:1: expected .* for product_id, got",
    ),
    ("steam", "steam_reviews.json", REVIEWS.replace("'2017-1-9'", "None"), r"json:2: expected .* for date, got"),
    ("steam", "steam_reviews.json", REVIEWS.replace("1-9", "13-9"), r"json:2: expected a date such as 2018-01-05, got"),
    ("steam", "steam_reviews.json", REVIEWS.replace("2017-1-9", "1-1-9"), r"json:2: expected a date of the years 1990"),
    ("steam", "steam_reviews.json", "{'username': ", r"steam_reviews\.json:1: expected a record in JSON"),
    ("steam", "steam_reviews.json", "{[]: 1}", r"steam_reviews\.json:1: expected a record in JSON"),
    ("steam", "steam_reviews.json", "[1]", r"steam_reviews\.json:1: expected a record in JSON"),
    (
        "steam",
        "steam_games.json",
        GAMES + "{'id': 2, 'title': 'D'}\n",
        r"games\.json:4: item 2 has a title already, 'B s",
    ),
    (
        "amazon",
        "Beauty_5.json",
        BOUGHT.replace("1400000100", "null", 1),
        r"5\.json:2: expected .* unixReviewTime or tim",
    ),
    ("amazon", "Beauty_5.json", BOUGHT.replace("1400000100", "14", 1), r"5\.json:2: expected a time in seconds"),
    (
        "interactions",
        "interactions.tsv",
        "kim\ta\t-1\n",
        r"interactions\.tsv:1: expected a time of 0 or more, got '-1'",
    ),
    ("interactions", "items.tsv", "a\tTea\tblack\n", r"items\.tsv:1: expected 2 fields"),
    ("windows", "train.tsv", "0,1,2\t3\n0,1\t2", r"train\.tsv:2: expected a history of 3 to 10 items, got 2"),
    ("windows", "train.tsv", "0,1,2\t3\t4\n", r"train\.tsv:1: expected 2 fields"),
    ("windows", "val.tsv", "0,1,x\t3\n", r"val\.tsv:1: expected an integer, got 'x'"),
    ("windows", "test.tsv", "0,1,2\t30\n", r"test\.tsv:1: expected ids below 30"),
    ("windows", "test.tsv", "0,1,2\t2\n", r"test\.tsv:1: an item occurs twice"),
    ("windows", "test.tsv", "5,6,7\t8\n", r"test\.tsv:1: the same window is in .*train\.tsv:3"),
    ("windows", "val.tsv", "\n", r"val\.tsv: expected windows, it has none"),
    ("windows", "items.tsv", "0\ta\n2\tb\n", r"items\.tsv:2: expected item 1, got 2"),
]
FILES = [(kind.split()[0], files) for kind, (files, _, _) in READ.items()] + [("windows", WINDOWS)]


@pytest.mark.parametrize(("reader", "file", "text", "words"), REFUSED)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, reader, file, text, words):
    with pytest.raises(ValueError, match=words):
        read(reader, tmp_path, next(files for kind, files in FILES if kind == reader and file in files) | {file: text})


CONTENTS = {
    "no end": PACKED[:-9],
    "half": PACKED[: len(PACKED) // 2],
    "damaged": bytes(DAMAGED),
    "not packed": RATINGS.encode(),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_packed_file_that_is_damaged_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"u\.data\.gz:\d+: the packed file is damaged or cut short"):
        read("ml-100k", tmp_path, {"u.item": FILMS, "u.data.gz": content})


def test_missing_files_are_named_as_they_may_be_called(tmp_path):
    published = {name: text for name, text in WINDOWS.items() if name != "val.tsv"}  # Steam's data lack it
    for reader, files, words in (
        ("steam", {}, r"expected steam_games\.json and steam_reviews\.json, each as it is or as \.gz; it has nothing"),
        ("movielens", {"u.item": ""}, r"u\.item and u\.data, or movies\.dat and .*, or movies\.csv .* it has u\.item"),
        ("lastfm", {}, r"artists\.dat and user_.*, or items\.tsv and train\.tsv"),
        ("windows", published, r"val\.tsv"),
        (
            "amazon",
            {"a.json": "", "b.json": "", "meta_a.json": ""},
            r"one file meta_\*\.json and one other .* it has a\.j",
        ),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            read(reader, tmp_path, files)
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected .*; there is no such folder"):
        readers.steam(tmp_path / "nowhere")


def test_windows_files_keep_their_split_and_recover_users(tmp_path):
    dataset = read("windows", tmp_path, WINDOWS)
    users = list(dataset.users.values())
    assert users[:4] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 2, 9], list(range(1, 13))]
    assert users[4:] == [[1, 2, 3, 4], [3, 4, 5, 6]]
    parts = split(dataset)
    assert [(w.history, w.target) for w in parts.test] == [((3, 4, 5), 6)]
    assert len(parts.train) == 6
    assert {w.user for w in parts.test}.isdisjoint(w.user for w in parts.train)


def test_titles_in_plain_words(tmp_path):
    titles = {
        "Godfather, The (1972)": "The Godfather",
        "Seventh Seal, The (Sjunde inseglet, Det) (1957)": "The Seventh Seal (Det Sjunde inseglet)",
        "Enfer, L' (1994)": "L'Enfer",
        "Convent, The (Convento, O) (1995)": "The Convent (O Convento)",
        "Seven Years (a.k.a. Long Wait, The) (1999-2001) ": "Seven Years (a.k.a. The Long Wait)",
        "Murder, My Sweet (1944)": "Murder, My Sweet",
        "1984 (1956)": "1984",
        "(1963)": "(1963)",
    }
    files = {"items.tsv": "".join(f"{i}\t{t}\n" for i, t in enumerate(titles)), "interactions.tsv": "u\t1\t1\n"}
    assert readers.plain_titles(read("interactions", tmp_path, files)).titles == list(titles.values())


def test_no_negative_has_a_title_of_the_history(tmp_path):
    names = ["Sabrina", *(f"Film {n}" for n in range(30)), "sabrina ", "Sabrina"]
    files = {
        "items.tsv": "".join(f"{i}\t{t}\n" for i, t in enumerate(names)),
        "interactions.tsv": "".join(f"u{n}\t{(n + k) % 8}\t{k}\n" for n in range(8) for k in range(6)),
    }
    dataset = read("interactions", tmp_path, files)
    for seed in range(20):
        for example in with_candidates(split(dataset, protocol="leave-one-out").test, dataset, seed):
            if 0 in example.history:
                assert not {31, 32} & set(example.candidates)


def test_raw_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    calls = []
    for name, reader in READERS.items():
        monkeypatch.setitem(READERS, name, lambda folder, reader=reader: calls.append(folder) or reader(folder))
    for name, files in (("steam", packed(STEAM)), ("windows", WINDOWS)):
        root, kept = tmp_path / name, tmp_path / "out" / f"{name}.json"
        root.mkdir()
        first = read(name, root, files)
        calls.clear()
        assert read_once(name, root, kept) == read_once(name, root, kept) == first
        assert calls == [root]
        file = root / next(iter(files))
        file.touch()
        assert read_once(name, root, kept) == first
        assert len(calls) == 2
    assert read_once("windows", root, kept).given == first.given is not None
