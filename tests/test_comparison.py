"""The comparison of arms: tables, pictures, going on where it was."""

import json
from dataclasses import asdict

import pytest
from sequential_recommendation import compare, sequence_models
from sequential_recommendation.arms import Curve, perform
from sequential_recommendation.experiments import Arm, Experiment, Run, same
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


def test_a_run_knows_its_own_checkpoints_and_results(tmp_path):
    run = Run(Experiment(tmp_path), Arm("ours", "sequence", 4), TrainingSettings(), watch=0)
    kept = json.loads(json.dumps(run.described()))
    assert same(kept, run.described())
    del kept["experiment"]["guide"], kept["watch"], kept["recommender"]  # as written before there were these
    assert same(kept, run.described())
    assert not same(run.described() | {"recommender": asdict(RecommenderConfig(r=4))}, run.described())
    for other in (run._replace(watch=5), run._replace(settings=TrainingSettings(lr=1e-4))):
        assert not same(kept, other.described())
