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
