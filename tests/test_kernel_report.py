"""The Triton kernels compile for GPUs that are not here, without spills, and read their operands once."""

import json
import os
import subprocess
import sys

import kernel_report
import pytest

pytest.importorskip("triton")


def test_kernels_compile_without_spills_and_move_few_bytes(tmp_path):
    """In a process of its own: here the kernels may belong to the interpreter already."""
    file, names = tmp_path / "report.json", "shrink,grad_dy,grad_weights,fused_layer,decode,grouped_grad_weights"
    options = ["--targets=sm_90", "--ranks=16", "--dtypes=bf16", f"--kernels={names}", "--json", str(file)]
    options += ["--processes=1"] * ("PYTEST_XDIST_WORKER" in os.environ)  # the other cores have tests of their own
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, kernel_report.__file__, *options]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(file.read_text())
    assert kept["bad"] == 0
    assert {row["kernel"].split()[0] for row in kept["kernels"]} == set(names.split(","))
    for row in kept["kernels"]:
        assert row["spills"] == 0
        assert row["early_writes"] == []
        assert row["missing"] == []  # fused_layer is pipelined, by tensor descriptor and on the tensor cores
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= row["limit"]
    fused = [row["constants"] for row in kept["kernels"] if row["kernel"].startswith("fused_layer")]
    assert {(row["W_BY_ROWS"], row["DROPOUT"]) for row in fused} == {
        ("True", "False"), ("False", "True"), ("False", "False")
    }  # fmt: skip
    cases = [(row, row["case"]) for row in kept["bytes"] if not row["case"]["slots"]]
    square = [row for row, case in cases if case["R"] == 16 and case["M"] == case["d_out"] == case["d_in"] == 4096]
    assert [(row["case"]["strategy"], row["case"]["p"]) for row in square] == [
        ("beta", 0.1), ("beta", 0.0), ("fused", 0.0), ("fused", 0.1)
    ]  # fmt: skip
    parts = ("forward", "backward")
    assert [row[part]["launches"] for row in square for part in parts] == [3, 4, 2, 4, 1, 3, 2, 3]
    for moved in (row[part] for row in square for part in parts):
        assert moved["least"] <= moved["unique"] <= moved["asked"]
        assert moved["unique"] < 1.1 * moved["least"]
    (one,) = (row["forward"] for row in kept["bytes"] if row["case"]["strategy"] == "decode" and row["case"]["M"] == 1)
    weight = 2 * 4096 * 4096
    assert weight < one["unique"] <= 1.02 * weight  # from memory
    assert one["asked"] <= 1.6 * weight  # from L2: every program reads A


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--targets=sm_90", "--ranks=8"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (["--targets=sm_1"], {}, "--targets: sm_1 is none of sm_80"),
    ],
)
def test_mistakes_are_named(arguments, environment, words, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        kernel_report.main()
    assert words in capsys.readouterr().err
