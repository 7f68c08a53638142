"""Kept plans: run again on other tensors of the same kind they give what a new plan gives, and are made just once."""

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import F16, F32, OUTPUTS, Case, run

import ilora
from ilora.op import backends
from ilora.op.shared_input import Projection, SharedInput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import replay  # noqa: E402
from ilora.kernels.device import device_of  # noqa: E402

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
    "fused": replace(EVEN, M=66, N=2, dtype=F16),
    "fused, dropout": replace(EVEN, M=66, N=2, dtype=F16, dropout_p=0.3),
}


@pytest.fixture
def made(monkeypatch):
    """One item for each plan that was made since the test began."""
    replay.forget()
    made, run = [], replay.run
    monkeypatch.setattr(replay, "run", lambda *args: made.append(1) or run(*args))
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_second_call_makes_no_plan_and_is_right_for_other_tensors(name, made, monkeypatch):
    case, strategy = CASES[name], name.split(",")[0]
    if strategy == "fused" and not device_of(case.tensors()["x"]).tma:
        pytest.skip("the device does not load tiles by tensor descriptor")
    monkeypatch.setenv("ILORA_STRATEGY", strategy if strategy == "fused" else "auto")
    first, again = run(case, "triton"), run(case, "triton")
    other = run(replace(case, seed=case.seed + 1), "triton")
    assert len(made) == len(replay._KEPT) == 2
    replay.forget()
    expected = run(replace(case, seed=case.seed + 1), "triton")
    assert len(made) == 4
    for output in OUTPUTS:
        assert torch.equal(first[output], again[output])
        assert torch.equal(other[output], expected[output])
        assert not torch.equal(first[output], other[output])


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
    first, second = (ilora.ilora_linear(**arguments) for _ in range(2))
    assert len(made) == 1
    assert first.data_ptr() != second.data_ptr()  # a run returns new tensors
    change(arguments)
    y = ilora.ilora_linear(**arguments)
    assert len(made) == 2
    expected = ilora.ilora_linear(**{**arguments, "backend": "reference"})
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


def both_ways(scaling=2.0, dropout_p=0.0, needs_x=True, shared=False):
    """Outputs and gradients of a layer, or of two that share their input."""
    t = replace(EVEN, M=80, N=2).tensors()
    leaves = {name: t[name].requires_grad_(name != "x" or needs_x) for name in ("x", "A", "B", "gate")}
    low, options = (leaves["A"], leaves["B"]), {"dropout_p": dropout_p, "seed": 1 if dropout_p else None}
    if shared:
        projections = [Projection(t["weight"], t["bias"], *low), Projection(t["weight"] * 2, None, *low)]
        together = SharedInput(leaves["x"], projections, leaves["gate"], scaling, **options, backend="triton")
        y = together.y(0) + 2 * together.y(1)
    else:
        y = ilora.ilora_linear(leaves["x"], t["weight"], t["bias"], *low, leaves["gate"], scaling, **options,
                               backend="triton")  # fmt: skip
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, t["dy"])]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("change", [{"scaling": 3.0}, {"dropout_p": 0.5}, {"needs_x": False}, {}])
def test_settings_of_a_forward_and_backward(change, shared, made):
    both_ways(shared=shared)
    plans = len(made)
    found = both_ways(**change, shared=shared)
    assert (len(made) > plans) == bool(change)
    replay.forget()
    expected = both_ways(**change, shared=shared)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_strategy_and_precision_make_new_plans(made, monkeypatch):
    both_ways()
    monkeypatch.setenv("ILORA_STRATEGY", "beta")
    both_ways()
    assert len(made) == 4
    torch.set_float32_matmul_precision("high")
    try:
        both_ways()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(made) == 6


def test_threads_of_other_shapes_do_not_disturb_each_other():
    """Triton's interpreter has one place in the grid and one triton.language for the whole process."""

    def ask(n):
        torch.manual_seed(n)
        t = replace(EVEN, M=20 + n % 3, N=1, d_in=32, d_out=16 + 16 * (n % 2), seed=n).tensors()
        args = [t[name].requires_grad_() for name in ("x", "weight", "bias", "A", "B", "gate")]
        results = []
        for f, options in ((ilora.ilora_linear, {"backend": "triton"}), (ilora.reference.ilora_linear, {})):
            y = f(*args, 2.0, **options)
            results.append([y.detach(), *torch.autograd.grad(y, args, t["dy"])])
        return results

    with ThreadPoolExecutor(4) as pool:
        for ours, wanted in pool.map(ask, range(12)):
            for a, b in zip(ours, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_kept_plan_holds_no_tensor_and_refuses_a_view_as_its_buffer(made):
    t = replace(EVEN, M=80, N=2).tensors()
    x, watched = t["x"], weakref.ref(t["x"])
    ilora.ilora_linear(x, t["weight"], None, t["A"], t["B"], t["gate"], 2.0, backend="triton")
    del x, t
    gc.collect()
    assert watched() is None
    given = torch.zeros(4, 4)
    launch = SimpleNamespace(runner=lambda compiled: None, values=lambda: [given[1:]])
    plan = SimpleNamespace(launches=[launch], results=(), has_product=False)
    with pytest.raises(ValueError, match=r"neither an input nor a buffer: \(3, 4\)"):
        replay.KeptPlan((given,), plan, [None])


def test_threads_may_make_plans_at_once(monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 2)
    monkeypatch.setattr(replay, "run", lambda *args: [])
    monkeypatch.setattr(replay, "KeptPlan", lambda *args: SimpleNamespace(run=lambda *args: (), has_product=False))
    x, interval, failed = torch.zeros(2), sys.getswitchinterval(), []

    def make(*_):
        return SimpleNamespace(launches=[None], results=(), has_product=False)

    def work(n):
        try:
            for k in range(1500):
                replay.replay(make, (x,), (n, k))
        except RuntimeError as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
        replay.forget()
    assert not failed


def test_one_tensor_in_two_places_makes_a_plan_that_is_not_kept(made):
    """x as the base output too: an address does not tell which of the two a pointer is."""
    t = replace(EVEN, M=80, N=2, d_out=64).tensors()

    def update(base):
        return ilora.ilora_update(t["x"], base, t["A"], t["B"], t["gate"], 2.0, backend="triton") - base

    same, apart = update(t["x"]), update(t["dy"])
    assert len(made) == 2
    torch.testing.assert_close(apart, same, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update(t["dy"] + 1), apart, rtol=1e-4, atol=1e-4)  # by the plan kept of the second
    assert torch.equal(update(t["x"]), same)  # and by the same
    assert len(made) == 2


def test_no_more_plans_are_kept_than_the_limit(made, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 3)
    t = replace(EVEN, M=100, N=1).tensors()
    for rows in (70, 80, 90, 100, 90):
        low = (t["A"], t["B"], t["gate"], 2.0)
        ilora.ilora_linear(t["x"][:rows], t["weight"], None, *low, backend="triton")
    assert len(replay._KEPT) == 3
    assert len(made) == 4


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU launches by itself; this replaces its driver")
def test_compiled_kernels_are_launched_with_every_argument_in_its_place():
    """By Triton's own compiler and launch path, with a driver that records what it is asked to launch."""
    file = Path(__file__).with_name("replay_worker.py")
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("launched alike"), done.stdout[-3000:]
