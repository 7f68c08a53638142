"""The comparison of arms: tables, pictures, going on where it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sequential_recommendation import compare, sequence_models
from sequential_recommendation.arms import Curve, perform
from sequential_recommendation.experiments import Arm, Experiment, Run, train_sequence
from sequential_recommendation.settings import RecommenderConfig, TrainingSettings
from sequential_recommendation.tiny_model import tiny_lm

BRIEF = ["--users", "40", "--pretrain-steps", "3", "--steps", "2", "--seed", "0", "1", "--jobs", "1", "--watch", "1"]


def test_a_comparison_end_to_end_goes_on_where_it_was(tmp_path, capsys):
    brief = [*BRIEF, "--arms", "untuned", "lora", "sequence", "--lr", "1e-3", "1e-2", "--batch-size", "4"]
    found = compare.main([*brief, "--out", str(tmp_path)])
    assert {name: len(results) for name, results in found.items()} == {
        "LM untuned": 1,
        "LoRA": 2,
        "iLoRA, E=4, sequence gate": 2,
    }
    table = capsys.readouterr().out
    for word in ("popularity", "SASRec", "GRU4Rec", "Caser", "HitRatio@1", "40 tests, 2 seeds", "ValidRatio"):
        assert word in table
    for picture in ("gates.png", "hit-ratio.png"):
        assert next(tmp_path.rglob(picture)).read_bytes().startswith(b"\x89PNG")
    whole = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert whole["arms"] == found
    assert {figures["total"] for figures in whole["baselines"].values()} == {40}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("lr*.json")}
    assert compare.main([*brief, "--out", str(tmp_path)]) == found
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("lr*.json")}
    gate = found["iLoRA, E=4, sequence gate"][0]["gate"]
    assert set(gate["with_gate_of"]) == {"own_group", "other_group", "group_mean", "uniform"}
    with pytest.raises(SystemExit):
        compare.main(["--data", "lastfm", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def run_in(folder):
    """A short run, its sequence model and language model being there."""
    experiment = Experiment(folder, users=8)
    dataset = experiment.dataset()
    sequence_models.save(sequence_models.build("sasrec", dataset.num_items), experiment.sequence_file("sasrec"))
    tiny_lm(experiment.tokenizer(dataset), 16, 1, 2).save_pretrained(experiment.lm_folder)
    settings = TrainingSettings(epochs=2, batch_size=2, effective_batch=8, lr=1e-2, save_steps=2, progress=False)
    return Run(experiment, Arm("ours", "sequence", 4), settings, texts=False, watch=1)


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    whole, killed = perform(run_in(tmp_path / "whole")), run_in(tmp_path / "killed")
    assert len(whole["curve"]) > 4

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


def test_a_run_is_kept_by_all_that_decides_it_and_by_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(tmp_path / "out", "ml-100k", tmp_path / "data")
    run = Run(experiment, Arm("ours", "sequence", 4), TrainingSettings(), watch=0)

    def other(**settings):
        return run._replace(settings=replace(run.settings, **settings))

    elsewhere = replace(experiment, folder=Path("out"), root=Path("data"))
    same = [run._replace(experiment=elsewhere), other(workers=2, save_steps=5, logging_steps=1, progress=False)]
    assert [each.key for each in same] == [run.key] * 2
    different = [other(lr=1e-4), other(steps=3), other(precision="bf16"), other(curriculum=None), other(seed=1)]
    different += [run._replace(watch=5), run._replace(texts=False), run._replace(arm=Arm("ours", "sequence", 2))]
    for field, value in (("guide", "gru4rec"), ("plain", True), ("min_users", 20), ("tests", 9), ("root", Path("x"))):
        different.append(run._replace(experiment=replace(experiment, **{field: value})))
    assert len({run.key, *(each.key for each in different)}) == 1 + len(different)
    key = run.key
    monkeypatch.setattr(Run, "recommender", property(lambda self: RecommenderConfig(r=4)))
    assert run.key != key


def test_another_run_leaves_a_finished_one_as_it_is(tmp_path):
    first, second = run_in(tmp_path), run_in(tmp_path)
    second = second._replace(settings=replace(second.settings, steps=1))
    found = perform(first)
    files = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    assert perform(second)["hits"] >= 0
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == files
    assert perform(first) == found


def test_shared_models_are_those_of_the_same_data(tmp_path):
    marks = ["--users", "60", "--evaluate", "random", "--tests", "9", "--pretrain-steps", "5"]
    folder = compare.experiment_of(compare.parse([*marks, "--out", str(tmp_path)])).folder
    assert folder == tmp_path / "synthetic-leave-one-out-tiny-60-users-random-9-tests-5-pretrained"
    films = ["--data", "ml-100k", "--root", str(tmp_path), "--model", "smollm2", "--plain", "--min-users", "20"]
    folder = compare.experiment_of(compare.parse([*films, "--out", str(tmp_path)])).folder
    assert folder == tmp_path / "ml-100k-paper-smollm2-min-20-plain"
    run = run_in(tmp_path)
    fewer = replace(run.experiment, users=8, min_users=1)
    sequence_models.save(sequence_models.build("sasrec", 7), fewer.sequence_file("sasrec"))
    with pytest.raises(ValueError, match="trained on 7 items, synthetic has"):
        train_sequence(fewer, fewer.dataset(), "sasrec")


def test_experts_that_do_not_divide_the_rank_are_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--experts", "4", "3"])
    assert "--experts 3: the rank is 8" in capsys.readouterr().err
