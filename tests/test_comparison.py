"""The comparison of arms: tables, pictures, going on where it was, and never with other data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept_runs import movielens_files
from safetensors.torch import load_file
from sequential_recommendation import arms, compare, options, sequence_models
from sequential_recommendation.arms import Curve, perform
from sequential_recommendation.data import split
from sequential_recommendation.experiments import LATER, Arm, Experiment, OtherData, Run
from sequential_recommendation.kept import find_run
from sequential_recommendation.options import experiment_of, parse, settings_of, watch_of
from sequential_recommendation.recommender import Recommender, RecommenderConfig
from sequential_recommendation.shared import MARK, tiny_model, train_sequence
from sequential_recommendation.tables import paired_lines
from sequential_recommendation.tiny_model import tiny_lm, tiny_tokenizer
from sequential_recommendation.training import TrainingSettings


def test_a_comparison_end_to_end_goes_on_where_it_was(tmp_path, capsys):
    brief = "--users 40 --tests 12 --pretrain-steps 3 --steps 2 --seed 0 1 --jobs 1 --watch 1 --batch-size 2 "
    brief += "--texts --arms untuned lora sequence --lr 1e-3 1e-2"
    brief = [*brief.split(), "--out", str(tmp_path)]
    found = compare.main(brief)
    counts = {name: len(results) for name, results in found.items()}
    assert counts == {"LM untuned": 2, "LoRA": 2, "iLoRA, E=4, sequence gate": 2}
    table = capsys.readouterr().out
    for word in (
        "popularity",
        "SASRec",
        "GRU4Rec",
        "Caser",
        "HitRatio@1",
        "12 tests, 2 seeds",
        "ValidRatio",
        "HitRatio@10",
    ):
        assert word in table
    assert all(len(results[0]["catalogue_ranks"]) == 12 for results in found.values())
    for picture in ("gates.png", "hit-ratio.png"):
        assert next(tmp_path.rglob(picture)).read_bytes().startswith(b"\x89PNG")
    whole = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert whole["arms"] == found
    assert {figures["total"] for seeds in whole["baselines"].values() for figures in seeds} == {12}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("lr*.json")}
    assert compare.main(brief) == found
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("lr*.json")}
    kept = [json.loads(path.read_text()) for path in times]
    for name in ("LoRA", "iLoRA, E=4, sequence gate"):  # the rate of all seeds is the best of the first
        tried = [each for each in kept if (each["run"]["arm"]["name"], each["run"]["settings"]["seed"]) == (name, 0)]
        quality = {each["run"]["settings"]["lr"]: tuple(each["validation"].values()) for each in tried}
        assert len(quality) == 2
        assert {quality[each["run"]["settings"]["lr"]] for each in found[name]} == {max(quality.values())}
    gate = found["iLoRA, E=4, sequence gate"][0]["gate"]
    assert set(gate["with_gate_of"]) == {"own_group", "other_group", "group_mean", "uniform"}
    result, mark = next(tmp_path.rglob("lr*.json")), next(tmp_path.rglob(MARK)).read_text()
    assert json.loads(result.read_text())["run"]["fingerprint"] == mark
    result.write_text(result.read_text().replace(mark, "0" * 16))
    with pytest.raises(SystemExit, match=f"{result.name}: it was made from other data"):
        compare.main(brief)
    with pytest.raises(SystemExit, match="files of lastfm are to be in --root, .*nowhere"):
        compare.main(["--data", "lastfm", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def run_in(folder, steps=0, **more):
    """A short run, its sequence model and language model being there. more: fields of `Experiment`."""
    experiment = Experiment(folder, users=8, **more)
    dataset = experiment.dataset()
    sequence_models.save(sequence_models.build("sasrec", dataset.num_items), experiment.sequence_file("sasrec"))
    tiny_lm(tiny_tokenizer(dataset), 16, 1, 2).save_pretrained(experiment.lm_folder)
    sizes = {"batch_size": 2, "effective_batch": 8, "lr": 1e-2, "save_steps": 2}
    settings = TrainingSettings(epochs=2, steps=steps, **sizes)
    return Run(experiment, Arm("ours", "sequence", 4), settings, watch=1)


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    first, killed = run_in(tmp_path / "whole"), run_in(tmp_path / "killed")
    whole = perform(first)
    assert len(whole["curve"]) > 4
    assert load_file(first.folder / "recommender" / "projector.safetensors")["z.mean"].any()  # z was standardised

    def stop(self, args, state, control, **_):
        if state.global_step == 3:  # in the middle of an epoch: a micro-batch after step 3
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Curve, "on_substep_end", stop)
        with pytest.raises(KeyboardInterrupt):
            perform(killed)
    assert not killed.file.exists()
    assert [path.name for path in killed.folder.glob("checkpoint-*")] == ["checkpoint-2"]
    again = perform(killed)
    exact = ("validation", "hits", "hit_ratio_5", "ndcg_5", "gate", "curve")  # a logged loss is a mean since the resume
    assert {name: again[name] for name in exact} == {name: whole[name] for name in exact}
    assert not list(killed.folder.glob("checkpoint-*"))

    # another run leaves a finished one as it is
    files = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    other = perform(run_in(tmp_path / "whole", steps=1))
    assert other["hits"] >= 0
    assert other != whole
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == files
    assert perform(first) == whole


def test_every_user_is_tested_and_kinds_of_tests_are_told_apart(tmp_path, capsys):
    root = movielens_files(tmp_path / "data")
    file = root / "u.data"
    file.write_text(file.read_text().replace("\t880000009\n", "\t880000008\n", 12))  # as the item before
    brief = f"--data ml-100k --root {root} --out {tmp_path / 'out'} --protocol every-user --precision bf16-frozen "
    brief += "--pretrain-steps 1 --steps 1 --seed 0 --jobs 1 --batch-size 4 --sequence-models sasrec --arms sequence"
    found = compare.main(brief.split())["iLoRA, E=4, sequence gate"]
    table, ranks = capsys.readouterr().out, found[0]["ranks"]
    assert len(ranks) == 25
    users = [line.split("\t")[0] for line in next(tmp_path.rglob("predictions.tsv")).read_text().splitlines()[1:]]
    new = {window.user for window in split(Experiment(tmp_path, root, "ml-100k").dataset(), protocol="paper").test}
    later = set(users) - {str(user) for user in range(12)}
    kinds = {"all": set(users), "of the paper's test users, who are new": new, LATER: later}
    for kind, those in kinds.items():
        rank = [rank for user, rank in zip(users, ranks, strict=True) if user in those]
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {kind} |"))
        assert line.startswith(f"| {kind} | {len(those)} |")
        assert line.endswith(f"| {rank.count(1) / len(rank):.4f} |")
    (head,) = (line for line in table.splitlines() if "adapters and gate" in line)
    assert f"{LATER}: {len(later)} tests" in head
    (line,) = (line for line in table.splitlines() if line.startswith("| iLoRA, E=4, sequence gate | 1"))
    assert f"| {rank.count(1) / len(rank):.4f} [" in line  # the first table counts the later ones
    assert "| among all items | HitRatio@10 | NDCG@10 |" in table
    run = find_run(tmp_path / "out")  # trained over a model in bfloat16, used with one in float32
    assert run.load(run.experiment.dataset())[0].lm.dtype == torch.float32


def test_a_run_is_kept_by_all_that_decides_it_and_by_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(tmp_path / "out", tmp_path / "data", "ml-100k")
    run = Run(experiment, Arm("ours", "sequence", 4), TrainingSettings(), watch=0)

    def other(**settings):
        return run._replace(settings=replace(run.settings, **settings))

    elsewhere = replace(experiment, folder=Path("out"), root=Path("data"))
    same = [run._replace(experiment=elsewhere), other(save_steps=5)]
    names = {options.table_name(other(**each).settings) for each in ({}, {"seed": 3}, {"lr": 1.0}, {"save_steps": 5})}
    assert len(names) == 1
    assert options.table_name(other(patience=2).settings) not in names
    assert [each.key for each in same] == [run.key] * 2
    different = [other(lr=1e-4), other(steps=3), other(precision="bf16"), other(curriculum=None), other(seed=1)]
    different += [run._replace(watch=5), run._replace(texts=True), run._replace(arm=Arm("ours", "sequence", 2))]
    for field, value in (("guide", "gru4rec"), ("plain", True), ("min_users", 20), ("tests", 9), ("root", Path("x"))):
        different.append(run._replace(experiment=replace(experiment, **{field: value})))
    assert len({run.key, *(each.key for each in different)}) == 1 + len(different)
    key = run.key
    monkeypatch.setattr(Run, "recommender", property(lambda self: RecommenderConfig(r=4)))
    assert run.key != key


def test_tests_of_one_group_exchange_no_gates(tmp_path):
    found = perform(run_in(tmp_path, steps=1, tests=1))
    assert found["total"] == 1
    assert set(found["gate"]) == {"entropy", "usage", "weights"}


def test_patience_ends_a_run_and_takes_its_best_weights(tmp_path, monkeypatch):
    qualities = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(arms, "ndcg", lambda rank, k: next(qualities) if k == 20 else 0.0)
    run, kept = run_in(tmp_path, steps=9), {}
    run = run._replace(settings=replace(run.settings, patience=2, save_steps=0))
    saved = Recommender.save
    monkeypatch.setattr(Recommender, "save", lambda self, path: kept.update({path: weights(self)}) or saved(self, path))
    monkeypatch.setattr(arms, "measure", lambda model, *more: kept.update(last=weights(model)) or {"hits": 0})
    found = perform(run)
    assert [step for step, _ in found["curve"]] == [1, 2, 3, 4]  # two rankings after the best, the second
    assert kept["last"] == kept[run.folder / "best"] == kept[run.folder / "recommender"]
    assert not (run.folder / "best").exists()


def weights(model):
    return {name: parameter.tolist() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_arms_of_equal_information_and_of_equal_size(tmp_path):
    found = {}
    for arm in options.arms_of(asked("--arms lora lora-wide lora+z sequence shuffled")):
        found[arm.name] = perform(run_in(tmp_path, steps=1)._replace(arm=arm))
    sizes = {name: result["trainable"] for name, result in found.items()}
    lora, wide, soft, ilora, shuffled = sizes.values()
    assert lora < ilora == shuffled <= wide == lora * 9 // 8
    assert soft - lora == 16 * 64 + 16 + 16 * 16 + 16  # the projector of z
    assert all(len(result["ranks"]) == result["total"] == 8 for result in found.values())
    lines = list(paired_lines({name: [result] for name, result in found.items()}))
    assert [line.split(" | ")[0] for line in lines[1:]] == [f"| {name}" for name in found if "sequence" not in name]
    assert "against" in lines[0]
    assert not list(paired_lines({"LoRA": [found["LoRA"]]}))


def test_every_seed_has_its_own_models(tmp_path):
    experiments = [Experiment(tmp_path, users=40, model_seed=seed) for seed in (0, 1)]
    for experiment in experiments:
        train_sequence(experiment, experiment.dataset(), "sasrec")
        tiny_model(experiment, experiment.dataset(), 1)
    first, second = (load_file(experiment.sequence_file("sasrec")) for experiment in experiments)
    assert not torch.equal(first["items.weight"], second["items.weight"])
    first, second = (load_file(experiment.lm_folder / "model.safetensors") for experiment in experiments)
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    run = Run(experiments[0], Arm("ours", "sequence", 4), TrainingSettings())
    seeded = arms.with_rate(run, 1e-3, 1)
    assert (seeded.experiment, seeded.settings.seed, seeded.settings.lr) == (experiments[1], 1, 1e-3)


def changed(folder):
    """As many films and users, one of whom met others."""
    file = folder / "u.data"
    file.write_text(file.read_text().replace("0\t9\t5\t880000009\n", "0\t19\t5\t880000009\n", 1))
    return folder


def test_what_was_trained_on_other_data_is_refused(tmp_path):
    films = Experiment(tmp_path / "out", movielens_files(tmp_path / "data"), "ml-100k")
    same = replace(films, root=movielens_files(tmp_path / "copy"))
    other = replace(films, root=changed(movielens_files(tmp_path / "other")))
    now = other.dataset()
    assert films.dataset().num_items == now.num_items
    for experiment in (films, same):
        train_sequence(experiment, experiment.dataset(), "caser")
        tiny_model(experiment, experiment.dataset(), 1)
    for make in (lambda: train_sequence(other, now, "caser"), lambda: tiny_model(other, now, 1)):
        with pytest.raises(OtherData, match="made from other data .* give another --out"):
            make()
    run = run_in(tmp_path)._replace(fingerprint="0" * 16)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(run.described()))
    with pytest.raises(OtherData, match="run.json: it was made from other data"):
        perform(run._replace(fingerprint="1" * 16))


def test_the_fingerprint_is_of_titles_users_and_split(tmp_path):
    films = Experiment(tmp_path, movielens_files(tmp_path / "data"), "ml-100k")
    dataset = films.dataset()
    turned = replace(dataset, users=dict(reversed(dataset.users.items())), name="films")
    assert films.fingerprint(turned) == films.fingerprint(dataset)
    titles = replace(dataset, titles=[*dataset.titles[:-1], "another"])
    users = replace(dataset, users=dataset.users | {"0": dataset.users["0"][::-1]})
    found = [films.fingerprint(each) for each in (dataset, titles, users)]
    for field, value in (("protocol", "paper"), ("candidates", 9), ("tests", 9), ("data_seed", 1)):
        found.append(replace(films, **{field: value}).fingerprint(dataset))
    assert len(set(found)) == 7


def asked(options, *more):
    return parse([*options.split(), *more])


def test_epochs_and_rates_are_those_that_were_asked_for():
    def epochs(options):
        settings = settings_of(asked(options))
        return settings.epochs, settings.steps, watch_of(asked(options), settings, 100)

    assert epochs("") == (5, 900, 300)
    assert epochs("--steps 30") == (5, 30, 10)
    assert epochs("--epochs 2.5") == (2.5, 0, 3)  # 10 steps: 2.5 epochs of 100 / 32
    assert epochs("--epochs 2 --watch 0") == (2, 0, 0)
    assert epochs("--data ml-100k --root x --model smollm2") == (5, 0, 0)
    assert epochs("--data ml-100k --root x --model smollm2 --steps 7") == (5, 7, 0)
    for given, lr in (("", 3e-3), ("--lr 0.1", 0.1), ("--data ml-100k --root x --model smollm2", 8e-4)):
        assert compare.choose_rates([None] * 2, asked(given), 1) == [lr] * 2


def test_folders_say_what_decides_the_models_and_are_of_use_from_everywhere(tmp_path, monkeypatch):
    made_up = experiment_of(asked("--users 60 --tests 9 --pretrain-steps 5 --out out"))
    assert made_up.folder == Path("out/tastes-leave-one-out-tiny-60-users-9-tests-5-pretrained")
    films = experiment_of(asked("--data ml-100k --root . --model smollm2 --plain --min-users 20 --out out"))
    assert films.folder == Path("out/ml-100k-paper-smollm2-min-20-plain")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    typed = experiment_of(asked("--data ml-100k --out out --root data --model ./model"))
    absolute = ("--root", str(tmp_path / "data"), "--model", str(tmp_path / "model"))
    whole = experiment_of(asked("--data ml-100k --out out", *absolute))
    assert typed == whole
    assert (whole.root, whole.model) == (tmp_path / "data", str(tmp_path / "model"))
    assert experiment_of(asked("--data ml-100k --out out --root data --model some/name")).model == "some/name"
    (tmp_path / options.TINY).mkdir()
    assert experiment_of(asked("--data ml-100k --out out --root data")).model == options.TINY
