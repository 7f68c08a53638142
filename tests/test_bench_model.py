"""The whole-model benchmark on a tiny model: its rows, its table, and that all three do the same work."""

import json

import bench_model
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_a_tiny_run(tmp_path, capsys):
    file = tmp_path / "model.json"
    results = bench_model.main(
        ["--model=tiny", "--device=cpu", "--batch=2", "--length=8", "--rounds=2", "--dropout=0.1", f"--json={file}"]
    )
    assert json.loads(file.read_text())["steps"] == results["steps"]
    rows = {row["step"]: row for row in results["steps"]}
    assert list(rows) == ["frozen", "peft", "ilora"]
    assert rows["frozen"]["ratio"] == 1.0
    assert rows["ilora"]["trained"] == rows["peft"]["trained"] + 4 * 64  # the gate's
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert f"| ilora | {rows['ilora']['seconds']:.2f} s |" in capsys.readouterr().out


def test_all_start_from_the_same_model():
    options = bench_model.parse(["--model=tiny", "--device=cpu", "--batch=2", "--length=8"])
    first, second = (bench_model.make_model(options) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json=/no/such/folder/x.json"], "does not exist"),
        (["--json=."], "--json .: a folder"),
        (["--rank=6"], "--rank 6 --experts 4"),
        (["--rounds=0"], "--rounds 0"),
        (["--batch=0"], "--batch 0"),
        (["--layers=0"], "--layers 0"),
        (["--layers=1", "--model=folder"], "--layers 1: only with --model smollm2"),
        (["--dropout=0,,1"], "--dropout: '' is not a number"),
        (["--dropout=0,1"], "--dropout 0,1: expected 0 <= p < 1"),
        (["--device=tpu"], "--device tpu"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_model.parse(["--device=cpu", *arguments])
    assert message in capsys.readouterr().err


def test_a_peft_that_does_not_run_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(bench_model, "unavailable", lambda name, device, dtype: f"{name} does not import here")
    arguments = ["--model=tiny", "--device=cpu", "--batch=2", "--length=8", "--rounds=1", "--dropout=0"]
    results = bench_model.main(arguments)
    assert [row["step"] for row in results["steps"]] == ["frozen", "ilora"]
    assert "note: peft is left out: peft does not import here" in capsys.readouterr().out
