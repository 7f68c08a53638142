"""Plans launched again: other tensors of the same kind give what a new plan gives, and nothing is planned twice."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import F16, F32, OUTPUTS, Case, run

import ilora
from ilora import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import replay  # noqa: E402

EVEN = Case(M=24, d_in=64, d_out=48, device=DEVICE)
CASES = {
    "small": EVEN,
    "no bias": replace(EVEN, bias=False),
    "several parts": replace(EVEN, M=300, N=1, d_in=520, d_out=264),
    "segments": replace(EVEN, lengths=(0, 5, 0, 19, 70)),
    "token gates": replace(EVEN, M=50, N=50),
    "dropout": replace(EVEN, M=66, N=2, dropout_p=0.3),
    "strided": replace(EVEN, strided=True),
    "mixed": replace(EVEN, M=66, N=2, dtype=F16, adapter_dtype=F32),
    "gemm": replace(EVEN, M=66, N=2, dtype=F16, dropout_p=0.3),
}


@pytest.fixture
def made(monkeypatch):
    """How many plans were made, from none."""
    replay.forget()
    made, run = [], replay.run
    monkeypatch.setattr(replay, "run", lambda *args: made.append(1) or run(*args))
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_second_call_plans_nothing_and_says_the_same_of_other_tensors(name, made, monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "gemm" if name == "gemm" else "auto")
    case = CASES[name]
    first = run(case, "triton")
    plans = len(made)
    assert plans == 2
    assert len(replay._KEPT) == 2
    again = run(case, "triton")
    other = run(replace(case, seed=case.seed + 1), "triton")
    assert len(made) == plans
    replay.forget()
    expected = run(replace(case, seed=case.seed + 1), "triton")
    assert len(made) == 2 * plans
    for output in OUTPUTS:
        assert torch.equal(first[output], again[output])
        assert torch.equal(other[output], expected[output])
        assert not torch.equal(first[output], other[output])


def test_results_are_new_tensors_every_time(made):
    t = replace(EVEN, M=80, N=2).tensors()
    arguments = (t["x"], t["weight"], t["bias"], t["A"], t["B"], t["gate"])
    results = [ilora.ilora_linear(*arguments, 2.0, backend="triton") for _ in range(3)]
    assert len(made) == 1
    assert len({y.data_ptr() for y in results}) == 3
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(x=t["x"][:40]),
        lambda t: t.update(x=t["x"].t().contiguous().t()),
        lambda t: t.update(x=torch.cat([t["x"].new_zeros(1), t["x"].flatten()])[1:].view_as(t["x"])),
        lambda t: t.update(gate=t["gate"][:1]),
        lambda t: t.update(scaling=3.0),
        lambda t: t.update(dropout_p=0.5, seed=1),
        lambda t: t.update(bias=None),
        lambda t: t.update(A=t["A"].half(), B=t["B"].half(), x=t["x"].half(), weight=t["weight"].half(), bias=None),
    ],
    ids=["rows", "strides", "alignment", "instances", "scaling", "dropout", "bias", "dtype"],
)
def test_what_a_plan_depends_on_makes_a_new_one(change, made):
    t = replace(EVEN, M=80, N=2).tensors()
    names = ("x", "weight", "bias", "A", "B", "gate")
    arguments = {**{name: t[name] for name in names}, "scaling": 2.0, "backend": "triton"}
    ilora.ilora_linear(**arguments)
    change(arguments)
    y = ilora.ilora_linear(**arguments)
    assert len(made) == 2
    expected = ilora.ilora_linear(**{**arguments, "backend": "reference"})
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_one_tensor_in_two_places_is_planned_anew(made):
    """x as the base output too: which of the two a pointer was made of cannot be told."""
    t = replace(EVEN, M=80, N=2, d_out=64).tensors()
    low = (t["A"], t["B"], t["gate"], 2.0)
    same = ilora.ilora_update(t["x"], t["x"], *low, backend="triton")
    apart = ilora.ilora_update(t["x"], t["dy"], *low, backend="triton")
    assert len(made) == 2
    torch.testing.assert_close(apart - t["dy"], same - t["x"], rtol=1e-4, atol=1e-4)
    base = t["dy"] + 1  # and what was kept of the second call serves both
    torch.testing.assert_close(ilora.ilora_update(t["x"], base, *low, backend="triton") - base, apart - t["dy"],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert torch.equal(ilora.ilora_update(t["x"], t["x"], *low, backend="triton"), same)
    assert len(made) == 2


def test_no_more_plans_are_kept_than_the_limit(made, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 3)
    t = replace(EVEN, M=100, N=1).tensors()
    for rows in (70, 80, 90, 100, 90):
        low = (t["A"], t["B"], t["gate"], 2.0)
        ilora.ilora_linear(t["x"][:rows], t["weight"], None, *low, backend="triton")
    assert len(replay._KEPT) == 3
    assert len(made) == 4


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU launches by itself; this stands in for one")
def test_compiled_kernels_are_launched_on_the_stream_with_every_argument_in_its_place():
    """Triton's own compiler and launch path, with a driver that notes what it is asked to launch."""
    file = Path(__file__).with_name("replay_worker.py")
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("launched alike"), done.stdout[-3000:]
