"""The Triton kernels compile for GPUs that are not here, without spilling a register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernel_report.py"


def report(*arguments, **environment):
    """In a process of its own: here the kernels may belong to the interpreter already."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


def test_kernels_compile_without_spills(tmp_path):
    file = tmp_path / "report.json"
    done = report("--targets=sm_90", "--ranks=16", "--dtypes=bf16", "--kernels=shrink", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(file.read_text())
    assert kept["bad"] == 0
    assert {row["constants"]["DROPOUT"] for row in kept["kernels"]} == {"True", "False"}
    assert all(0 < row["registers"] <= 255 and row["shared"] <= row["limit"] for row in kept["kernels"])
    typical = next(row for row in kept["bytes"] if row["case"]["M"] == 4096)
    for part in ("forward", "backward"):
        moved = typical[part]
        assert moved["least"] <= moved["unique"] <= moved["asked"]
        assert moved["unique"] < 1.2 * moved["least"]


def test_the_gemms_are_pipelined_and_read_their_operands_once(tmp_path):
    file = tmp_path / "report.json"
    done = report("--targets=sm_90", "--ranks=16,64", "--dtypes=bf16", "--kernels=gemm,whole,pair", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(file.read_text())
    for name in ("gemm", "whole"):
        kinds = [row["constants"] for row in kept["kernels"] if row["kernel"].startswith(name)]
        assert {(row["TURNED"], row["DROPOUT"]) for row in kinds} == {
            ("True", "False"), ("False", "True"), ("False", "False")
        }  # fmt: skip
    assert all(row["missing"] == [] and row["spills"] == 0 for row in kept["kernels"])
    square = [row for row in kept["bytes"] if row["case"]["d_out"] == row["case"]["d_in"] == 4096]
    typical = [row for row in square if row["case"]["strategy"] in ("gemm", "whole")]
    assert [row["case"]["R"] for row in typical] == [16, 64, 16, 16]
    assert [row[part]["launches"] for row in typical for part in ("forward", "backward")] == [3, 6, 3, 6, 1, 3, 2, 3]
    for row in typical:
        for part in ("forward", "backward"):
            assert row[part]["least"] <= row[part]["unique"] < 1.1 * row[part]["least"]


def test_kernels_that_begin_early_wait(tmp_path):
    file = tmp_path / "report.json"
    done = report("--pdl", "--targets=sm_80,sm_90", "--ranks=16", "--dtypes=bf16", "--kernels=sums", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr  # without a wait in the PTX it is bad
    kernels = json.loads(file.read_text())["kernels"]
    assert {(row["target"], row["constants"]["PDL"]) for row in kernels} == {("sm_80", "False"), ("sm_90", "True")}


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--targets=sm_90", "--ranks=8"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (["--targets=sm_1"], {}, "--targets: sm_1 is none of sm_80"),
    ],
)
def test_mistakes_are_named(arguments, environment, words):
    done = report(*arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr
