"""The benchmark of whole models, on a tiny one: its rows, its tables, and that all three models do the same work."""

import json

import bench_model
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")


TINY = ["--model=tiny", "--device=cpu", "--batch=2", "--length=8", "--rounds=2", "--dropout=0.1", "--tokens=2"]


def test_a_tiny_run(tmp_path, capsys):
    file = tmp_path / "model.json"
    results = bench_model.main([*TINY, f"--json={file}"])
    kept = json.loads(file.read_text())
    assert (kept["steps"], kept["generation"]) == (results["steps"], results["generation"])
    rows, texts = ({row["step"]: row for row in results[kind]} for kind in ("steps", "generation"))
    assert list(rows) == list(texts) == ["frozen", "peft", "ilora"]
    assert rows["frozen"]["ratio"] == texts["frozen"]["ratio"] == 1.0
    assert rows["ilora"]["trained"] == rows["peft"]["trained"] + 4 * 64  # the gate's
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert rows["peft"]["tokens_per_second"] == pytest.approx(16 / rows["peft"]["seconds"])
    shown = capsys.readouterr().out
    assert f"| ilora  | {rows['ilora']['seconds']:.4f} s |" in shown
    assert f"{1e3 * texts['ilora']['seconds']:.1f} ms" in shown


def test_one_part_alone_and_a_model_that_does_not_run(monkeypatch, capsys):
    def fails(model, options, dropout):
        raise ImportError("made for another transformers")

    monkeypatch.setitem(bench_model.MODELS, "peft", fails)
    results = bench_model.main([*TINY, "--only=generation"])
    assert results["steps"] == []
    assert [("seconds" in row, row.get("error", "")[:11]) for row in results["generation"]] == [
        (True, ""), (False, "ImportError"), (True, "")
    ]  # fmt: skip
    assert "peft: error: ImportError: made for another transformers" in capsys.readouterr().out


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    def other(model, options, dropout):
        model = bench_model.peft_model(model, options, dropout)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
        return model

    monkeypatch.setitem(bench_model.MODELS, "peft", other)
    results = bench_model.main([*TINY, "--only=steps"])
    assert results["steps"][1]["error"].startswith("WrongPeer: its first loss is")
    assert ["seconds" in row for row in results["steps"]] == [True, False, True]


def test_all_start_from_the_same_model():
    options = bench_model.parse(TINY)
    first, second = (bench_model.make_model(options) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_shape_is_smollm2s():
    """134,515,008 parameters, as the published SmolLM2-135M has."""
    options = bench_model.parse(["--device=cpu"])
    options.device = torch.device("meta")
    model = bench_model.make_model(options)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json=/no/such/folder/x.json"], "does not exist"),
        (["--rank=6"], "--rank 6 --experts 4"),
        (["--rounds=0"], "--rounds: '0'"),
        (["--batch=0"], "--batch: '0'"),
        (["--layers=0"], "--layers: '0'"),
        (["--layers=1", "--model=folder"], "--layers 1: only with --model smollm2"),
        (["--dropout=0,,1"], "--dropout: '' is not a number"),
        (["--dropout=0,1"], "--dropout: '0,1': expected 0 <= p < 1"),
        (["--device=tpu"], "--device: 'tpu'"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_model.parse(["--device=cpu", *arguments])
    assert message in capsys.readouterr().err
