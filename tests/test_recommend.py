"""The command that recommends: titles, kept runs, the ranking, the gate, what it prints and how it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kept_runs import FILMS, kept_run, movielens_files
from sequential_recommendation import kept, page, recommend, scoring
from sequential_recommendation.data import Dataset
from sequential_recommendation.experiments import Arm, Experiment
from sequential_recommendation.kept import find_run, read_run
from sequential_recommendation.scoring import (
    asked,
    by_sequence,
    candidate_likelihoods,
    gates,
    shortlist,
    shortlist_ranks,
)
from sequential_recommendation.service import Service
from sequential_recommendation.titles import Titles, UnknownTitles, forms

ROOT = Path(__file__).resolve().parent.parent
LIKED = ["Toy Story", "alien", "the usual suspects"]
ITEMS = [0, 2, 1]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """(folder of the data, folder of a run on it)"""
    folder = tmp_path_factory.mktemp("films")
    data = movielens_files(folder / "data")
    return data, kept_run(folder / "out", data="ml-100k", root=data)


@pytest.fixture(scope="module")
def service(films):
    run = find_run(films[1])
    return Service.of(run, run.experiment.dataset())


@pytest.fixture(scope="module")
def titles():
    return Titles(Dataset("films", FILMS, {f"u{n}": [8, 11] for n in range(5)}))


@pytest.mark.parametrize(
    ("meant", "typed"),
    [
        ("Toy Story (1995)", ["Toy Story (1995)", "  TOY   story"]),
        ("Usual Suspects, The (1995)", ["usual suspects", "The Usual Suspects", "the usual suspects (1995)"]),
        ("Usual Suspects, The (1995)", ["usual suspects, the"]),
        ("Bonheur, Le (1965)", ["le bonheur", "Bonheur"]),
        ("Amélie & Co. (1997)", ["Amelie & Co"]),
        ("Sabrina (1954)", ["sabrina (1954)"]),
    ],
)
def test_a_title_is_found_by_what_is_left_of_it(titles, meant, typed):
    assert titles.find(typed) == [FILMS.index(meant)] * len(typed)


def test_all_wrong_titles_are_named_with_what_is_near(titles):
    with pytest.raises(UnknownTitles) as caught:
        titles.find(["Toy Story", "Sabrina", "Toy Storry", "Toy Story (1996)", "story", "qqqq", "amelie and co"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "'Sabrina' is several: 'Sabrina (1954)', 'Sabrina (1995)'"
    assert lines[1] == "'Toy Storry' is not known; near it: 'Toy Story (1995)'"
    assert lines[2].startswith("'Toy Story (1996)' is not known; near it: 'Toy Story (1995)'")
    assert lines[3].startswith("'story' is not known; near it: 'Toy Story (1995)'")
    assert lines[4] == "'qqqq' is not known"
    assert lines[5].startswith("'amelie and co' is not known")
    assert len(lines) == 6


def test_items_of_one_title_are_one_to_a_person(titles):
    assert titles.find(["chasing amy"]) == [8]  # of 7 and 8 the one that more users met
    assert titles.known.count("Chasing Amy (1997)") == 1
    assert len(titles.known) == len(FILMS) - 1
    plain = Titles(Dataset("plain", ["Toy Story", "!!!", "The The"], {}))
    assert plain.find(["Toy Story (1995)", "!!!", "the"]) == [0, 1, 2]  # without years a year says nothing
    assert forms("!!!") == ("!!!", "!!!", "!!!", {"!!!"})


def test_a_title_is_found_by_what_stands_in_brackets_or_before_them():
    films = ["Seven (Se7en) (1995)", "Seventh Seal, The (Sjunde inseglet, Det) (1957)", "Enfer, L' (1994)"]
    films += ["Die Hard (1988)", "Star Maker, The (Uomo delle stelle, L') (1995)", "Star Maker (1968)"]
    found = Titles(Dataset("films", films, {}))
    typed = {"seven": 0, "SE7EN": 0, "the seventh seal": 1, "Sjunde inseglet": 1, "det sjunde inseglet": 1}
    typed |= {"enfer": 2, "l'enfer": 2, "Die Hard": 3, "uomo delle stelle": 4, "L'uomo delle stelle (1995)": 4}
    assert found.find(list(typed)) == list(typed.values())
    for unknown in ("hard", "seal", "star makers", "seven (1994)"):
        with pytest.raises(UnknownTitles, match="is not known"):
            found.find([unknown])
    assert found.find(["star maker"]) == [5]


def test_examples_are_spelt_as_the_page_offers_them():
    users = {"a": [0, 1, 2, 3, 4, 5], "b": [6, 0, 2, 3, 4, 5], "c": [6, 2, 3, 5]}
    dataset = Dataset("films", ["ALIEN", "Heat", "Big", "Fargo", "alien ", "Jaws", "Alien"], users)
    titles = Titles(dataset)
    histories = Service.histories(SimpleNamespace(dataset=dataset, titles=titles))
    assert sorted(histories) == [["ALIEN", "Heat", "Big", "Fargo", "Jaws"]]
    assert all(title in titles.known for history in histories for title in history)


def test_the_ranking_is_that_of_the_likelihoods(service):
    answer = service.answer(LIKED)
    order = by_sequence(service.model.encoder.model, ITEMS)
    shortlist = [item for item in order if item != 7 or order.index(8) > order.index(7)]
    shortlist = [item for item in shortlist if item != 8 or order.index(7) > order.index(8)][:20]
    example = asked(ITEMS, shortlist)
    scores = candidate_likelihoods(service.model, service.prompts, [example], service.choice)[0]
    assert len(set(scores.tolist())) == 20
    by_title = {FILMS[item]: score for item, score in zip(example.candidates, scores.tolist(), strict=True)}
    assert [r.title for r in answer.ranked] == sorted(by_title, key=by_title.get, reverse=True)
    assert [r.log_likelihood for r in answer.ranked] == sorted(by_title.values(), reverse=True)
    probabilities = torch.tensor([r.probability for r in answer.ranked], dtype=torch.float64)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(probabilities, scores.double().sort(descending=True).values.softmax(0))
    assert [r.rank for r in answer.ranked] == list(range(1, 21))
    assert {r.title: r.sequence_rank for r in answer.ranked} == {FILMS[i]: order.index(i) + 1 for i in shortlist}
    assert not {FILMS[item] for item in ITEMS} & set(by_title)


def test_the_figures_among_all_items_are_those_of_the_answers(service):
    order = by_sequence(service.model.encoder.model, ITEMS)
    examples = [asked(ITEMS, [item, order[0] if item != order[0] else order[1]], item) for item in order]
    found = shortlist_ranks(service.model, service.prompts, examples, service.choice, size=4, count=5)
    answer = service.answer(LIKED, count=5)
    listed = {recommendation.title: recommendation.rank for recommendation in answer.ranked}
    shown = shortlist(service.dataset, ITEMS, order, 5)
    assert {FILMS[item] for item in shown} == set(listed)
    expected = [listed[FILMS[item]] if item in shown else max(6, order.index(item) + 1) for item in order]
    assert found.tolist() == expected
    assert sorted(expected)[:5] == [1, 2, 3, 4, 5]


def test_the_random_gate_is_the_users_own_among_all_items_too(service, monkeypatch):
    asked_for = []
    monkeypatch.setattr(scoring, "score", lambda model, prompts, some, *rest: asked_for.extend(some) or (None, 1))
    order = by_sequence(service.model.encoder.model, ITEMS)
    examples = [asked(ITEMS, order[:2], order[0], user) for user in ("anna", "bob")]
    shortlist_ranks(service.model, service.prompts, examples, service.choice, size=4, count=5)
    assert [example.user for example in asked_for] == ["anna", "bob"]


def test_the_gate_is_the_models(service):
    answer = service.answer(LIKED)
    batch = service.prompts.collate([asked(ITEMS, [3, 4, 5])], [service.choice], answers=False)
    with torch.no_grad():
        assert answer.gate == service.model.gate(batch)[0].tolist()
    assert sum(answer.gate) == pytest.approx(1)
    assert answer.gate_source == "from the history, as SASRec reads it"
    turned = service.answer(LIKED[::-1])
    assert turned.gate != answer.gate
    assert [r.probability for r in turned.ranked] != [r.probability for r in answer.ranked]
    assert service.answer(LIKED) == answer


def test_candidates_of_ones_own_and_longer_lists(service):
    own = service.answer(LIKED, ["Sabrina (1995)", "heat <b>", "chasing amy"])
    assert {r.title for r in own.ranked} == {"Sabrina (1995)", "Heat <b>(1995)", "Chasing Amy (1997)"}
    assert own == service.answer(LIKED, ["chasing amy", "Sabrina (1995)", "heat <b>"])
    assert any("3 candidates" in note for note in own.notes)
    assert len(service.answer(LIKED, count=30).ranked) == 30
    assert service.answer(LIKED).notes == []
    assert "1 of the 3 to 10" in service.answer(["alien"]).notes[0]
    many = service.answer(FILMS[10:24])
    assert many.history == FILMS[14:24]
    assert "the last 10 are used" in many.notes[0]
    assert not set(FILMS[10:24]) & {r.title for r in many.ranked}  # nor the first four


@pytest.mark.parametrize(
    ("asked_for", "words"),
    [
        (([],), "empty"),
        ((["alien", "toy story", "Alien (1979)"],), r"more than once: Alien \(1979\)"),
        ((["alien"], ["toy story", "Toy Story"]), "more than once: Toy Story"),
        ((["alien"], ["alien", "toy story"]), "both in the history and among the candidates: Alien"),
        ((["alien"], ["toy story"]), "one candidate cannot be ranked"),
        ((["alien"], [], 1), "a shortlist of 1"),
        ((["alien"], [], 100), "only 38 titles are not in the history"),
        ((["alien", "nobody"], ["nothing"]), "'nobody' is not known.*\n'nothing' is not known"),
    ],
)
def test_what_cannot_be_answered(service, asked_for, words):
    with pytest.raises(ValueError, match=words):
        service.answer(*asked_for)


def test_a_prompt_longer_than_the_model_can_read(service, monkeypatch):
    monkeypatch.setattr(service.model.lm.config, "max_position_embeddings", 100)
    with pytest.raises(ValueError, match="room for 100: ask for a shorter list"):
        service.answer(LIKED)


@pytest.mark.parametrize(
    ("gate", "source"), [("uniform", "plain LoRA"), ("prompt", "the words"), ("random", "drawn once")]
)
def test_other_gates(tmp_path, gate, source):
    run = find_run(kept_run(tmp_path, gate))
    dataset = run.experiment.dataset()
    service = Service.of(run, dataset)
    answer = service.answer(dataset.titles[:3])
    example = asked([0, 1, 2], [service.titles.items[r.title.casefold()] for r in answer.ranked])
    assert answer.gate == gates(service.model, service.prompts, [example], service.choice)[0].tolist()
    assert len(answer.gate) == (1 if gate == "uniform" else 4)
    assert source in answer.gate_source


def test_what_the_page_shows(service):
    answer = service.answer(LIKED)
    ranking, gate = page.respond(service, LIKED)
    assert ranking.count("<tr") == 21
    places = [ranking.index(page.escape(r.title)) for r in answer.ranked]
    assert places == sorted(places)
    assert "<b>" not in ranking
    for weight in answer.gate:
        assert f'<meter value="{weight:.3f}"></meter> {weight:.3f}' in gate
    wrong, nothing = page.respond(service, ["Toy Storry"])
    assert 'role="alert"' in wrong
    assert "near it: &#x27;Toy Story (1995)&#x27;" in wrong
    assert nothing == ""
    assert "give one title or more" in page.respond(service, None)[0]
    for history in service.histories():
        service.answer(history)


def test_a_run_says_what_it_is_of(films):
    data, folder = films
    run = read_run(folder)
    assert run.experiment == Experiment(folder.parents[2], data, "ml-100k", users=40)
    assert (run.arm, run.hybrid) == (Arm("iLoRA, sequence", "sequence", 4), True)
    assert run.experiment.dataset().titles[0] == "Toy Story (1995)"


def test_run_files_that_say_too_little(films, tmp_path):
    good = json.loads((films[1] / "run.json").read_text())
    experiment = good["experiment"]
    folder = tmp_path / "runs" / "arm" / "run"
    folder.mkdir(parents=True)
    for described, words in (
        (good | {"experiment": experiment | {"plain": "False"}}, "run.json: .*expected a value such as False, got"),
        (good | {"experiment": experiment | {"data": "books"}}, "run.json: .*expected one of tastes.*got 'books'"),
        (good | {"experiment": experiment | {"users": "many"}}, "run.json: .*users: expected .* 2400, got 'many'"),
        ({"arm": good["arm"]}, "run.json: .*it has no 'experiment'"),
        (None, "run.json"),
    ):
        (folder / "run.json").write_text(json.dumps(described) if described else "{")
        with pytest.raises(ValueError, match=words):
            read_run(folder)
    with pytest.raises(ValueError, match="/run: expected a run in its place, <comparison>/runs/<arm>/<run>"):
        read_run(Path("/run"))


def test_the_best_run_of_a_comparison_is_taken(tmp_path):
    kept_run(tmp_path, "uniform", validation=0.9)
    kept_run(tmp_path, seed=1, validation=0.2)
    best = kept_run(tmp_path, seed=2, validation=0.4)
    kept_run(tmp_path, seed=3)
    assert find_run(tmp_path).folder == best
    assert find_run(best.parent).folder == best
    assert find_run(tmp_path / "tastes-leave-one-out-tiny" / "runs" / "ilora-uniform").arm.gate == "uniform"
    kept_run(tmp_path / "more")
    with pytest.raises(ValueError, match="several comparisons(.|\n)*more/tastes"):
        find_run(tmp_path)


@pytest.fixture
def run(films, capsys):
    """Runs the command on films' run: (exit status, stdout, stderr)."""

    def command(*arguments, run=films[1]):
        try:
            status = recommend.main([f"--run={run}", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return command


def test_the_command_prints_a_table(run, service):
    status, out, _ = run("--top=3", *LIKED)
    answer, lines = service.answer(LIKED), out.splitlines()
    assert status == 0
    assert lines[:2] == [service.label, "after: Toy Story (1995); Alien (1979); Usual Suspects, The (1995)"]
    for line, r in zip(lines[4:7], answer.ranked, strict=False):
        assert line.startswith(f"{r.rank:4}  {r.title} ")
        assert line.split()[-2:] == [f"{r.probability:.1%}", str(r.sequence_rank)]
    assert "and 17 more" in lines[7]
    assert [line.split()[1] for line in lines[-4:]] == [f"{weight:.3f}" for weight in answer.gate]
    assert [line.count("#") for line in lines[-4:]] == [round(30 * weight) for weight in answer.gate]


def test_the_command_prints_json(run, service):
    status, out, _ = run("--json", "--top=2", *LIKED, "--shortlist=5")
    answer, said = service.answer(LIKED, count=5), json.loads(out)
    assert (status, said["scored"], said["history"]) == (0, 5, answer.history)
    assert said["gate"] == {"source": answer.gate_source, "weights": answer.gate}
    assert [r["title"] for r in said["recommendations"]] == [r.title for r in answer.ranked[:2]]
    assert said["recommendations"][0]["log_likelihood"] == answer.ranked[0].log_likelihood
    assert said["notes"] == ["5 candidates: the model was trained with 20"]


def test_how_the_command_refuses(run, tmp_path):
    status, out, err = run("Toy Storry", "sabrina", "alien")
    assert (status, out) == (2, "")
    assert err.count("\n") == 2
    assert "near it: 'Toy Story (1995)'" in err
    for arguments in ((), ("alien", "Alien"), ("--top=0", "alien")):
        assert run(*arguments)[0] == 2
    status, *_ = run("alien", run=tmp_path / "none")
    assert f"{kept.COMPARE} --out {tmp_path / 'none'}" in status  # sys.exit prints it and ends with 1
    status, *_ = run("--root", tmp_path / "gone", "alien")
    assert "gone" in status
    assert "--root" in status


def test_the_files_must_be_those_of_the_training_wherever_they_are(run, tmp_path):
    items = movielens_files(tmp_path / "moved") / "u.item"
    films = items.read_text("latin-1")
    assert run(*LIKED)[1] == run("--root", items.parent, *LIKED)[1]
    for other in (
        films.replace("Film number 29", "Film number 30"),
        films + "99|A new film (1999)|||" + "|0" * 19 + "\n",
    ):
        items.write_text(other, "latin-1")
        status, *_ = run("--root", items.parent, *LIKED)
        assert "it was trained on other data" in status
        assert "the files that it was trained on" in status


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
def test_an_answer_that_nobody_reads_to_its_end(films):
    command = [sys.executable, recommend.__file__, "--run", films[1], *LIKED]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| true`
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == -signal.SIGPIPE
    assert "Traceback" not in said
