"""A few rows at inference, by one Triton launch: the same answer as everything else, and one launch it is."""

import json
from dataclasses import replace

import pytest
import torch
from cases import F16, F32, Case, check
from test_kernel_report import report

import ilora

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] * GPU

CASES = [
    Case(M=M, N=1, R=R, E=E, d_in=d_in, d_out=d_out, bias=bias)
    for M, R, E, d_in, d_out, bias in [
        (1, 16, 4, 131, 97, True),
        (1, 1, 1, 40, 33, False),
        (2, 8, 4, 64, 48, True),
        (7, 24, 3, 77, 130, False),
        (16, 64, 4, 130, 70, True),
        (17, 16, 2, 65, 81, True),
        (64, 24, 4, 51, 67, False),
        (64, 64, 8, 33, 140, True),
    ]
]
CASES += [
    Case(M=7, N=7, R=8, d_in=33, d_out=35),
    Case(M=64, N=64, R=16, d_in=33, d_out=35),
    Case(lengths=(0, 2, 0, 5, 0), R=8, d_in=45, d_out=37),
    Case(lengths=(3, 0, 40, 1), R=16, d_in=45, d_out=37),
    Case(M=16, N=4, R=16, strided=True, d_in=45, d_out=37),
]


@pytest.fixture
def planned(monkeypatch):
    """What decode.plan answered, plan by plan."""
    from ilora.kernels import decode, replay

    replay.forget()
    answers, plan = [], decode.plan

    def spy(*args):
        answers.append(plan(*args))
        return answers[-1]

    monkeypatch.setattr(decode, "plan", spy)
    return answers


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (F16, F32)], ids=["fp32", "fp16", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"M={case.M},R={case.R}")
def test_against_the_definition(case, dtypes, planned):
    check(replace(case, dtype=dtypes[0], adapter_dtype=dtypes[1], device=DEVICE), "triton")
    (launch, _, _, whole), M = planned[0], sum(case.lengths) if case.lengths else case.M
    assert whole == (M <= 16)
    assert len(launch.grid) == 2
    assert launch.args["BLOCK_R"] >= (32 if whole else 16)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    from ilora.kernels import replay
    from ilora.kernels.launch import Launch

    replay.forget()
    names, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: names.append(self.kernel.fn.__name__) or call(self))
    return names


@pytest.mark.parametrize("M", [1, 16, 64])
def test_one_launch_and_the_frozen_product_within_it_up_to_16_rows(M, launched, monkeypatch):
    t = Case(M=M, N=M, device=DEVICE).tensors()
    low = (t["A"], t["B"], t["gate"], 2.0)
    products = []
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: products.append(1) or addmm(*args))
    want = ilora.reference.ilora_linear(t["x"], t["weight"], t["bias"], *low)
    got = ilora.ilora_linear(t["x"], t["weight"], t["bias"], *low, backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert launched == ["decode"]
    assert len(products) == (M > 16)
    update = ilora.ilora_update(t["x"], t["dy"], *low, backend="triton")
    torch.testing.assert_close(update - t["dy"], want - t["x"] @ t["weight"].T - t["bias"], rtol=1e-4, atol=1e-4)
    assert launched == ["decode"] * 2
    assert len(products) == (M > 16)


def test_what_the_ordinary_launches_are_for(launched):
    from ilora.kernels import decode, replay

    def forward(t, p=0.0):
        launched.clear()
        replay.forget()
        low = (t["A"], t["B"], t["gate"], 2.0)
        ilora.ilora_linear(t["x"], t["weight"], t["bias"], *low, dropout_p=p, seed=1, backend="triton")
        return "decode" in launched

    few = Case(M=4, N=2, device=DEVICE).tensors()
    assert forward(few)
    assert not forward(few, 0.5)
    assert not forward(Case(M=65, N=1, device=DEVICE).tensors())
    wide = torch.empty(1, decode.BYTES // 4, device="meta")
    assert not decode.decodes(wide, wide, 0.0)
    assert decode.decodes(wide[:, : decode.BYTES // 8], wide[:, : decode.BYTES // 8], 0.0)


def test_a_weight_that_lies_the_other_way_is_fused_and_a_strided_one_is_not(planned):
    t = Case(M=3, N=3, device=DEVICE).tensors()
    low = (t["A"], t["B"], t["gate"], 2.0)
    want = ilora.reference.ilora_linear(t["x"], t["weight"], t["bias"], *low)
    turned = t["weight"].T.contiguous().T
    strided = torch.stack([t["weight"]] * 2, 2)[:, :, 1]
    for weight in (turned, strided):
        got = ilora.ilora_linear(t["x"], weight, t["bias"], *low, backend="triton")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert [whole for *_, whole in planned] == [True, False]


def test_the_last_rows_of_a_batch_and_repeated_bits():
    t = Case(M=12, N=4, d_in=40, device=DEVICE).tensors()
    x, rest = t["x"].view(4, 3, 40)[:, -1], (t["weight"], t["bias"], t["A"], t["B"], t["gate"], 2.0)
    first, second = (ilora.ilora_linear(x, *rest, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, ilora.reference.ilora_linear(x, *rest), rtol=1e-4, atol=1e-4)


def test_the_saved_xa_is_what_the_backward_needs():
    t = Case(M=5, N=5, device=DEVICE).tensors()
    arguments = (t["x"], t["weight"], t["bias"], None, t["A"], t["B"], t["gate"], None, 2.0, 0.0, None)
    _, xa = torch.ops.ilora.forward(*arguments, "triton")
    torch.testing.assert_close(xa, t["x"] @ t["A"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("M", [1, 16, 64])
def test_a_graph_replays_with_new_values(M):
    t = Case(M=M, N=1, R=16, d_in=256, d_out=192, dtype=torch.bfloat16, device="cuda").tensors()
    rest = (t["weight"], t["bias"], t["A"], t["B"], t["gate"], 2.0)
    ilora.ilora_linear(t["x"], *rest, backend="triton")  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ilora.ilora_linear(t["x"], *rest, backend="triton")
    for _ in range(2):
        t["x"].normal_()
        t["gate"].uniform_()
        graph.replay()
        assert torch.equal(y, ilora.ilora_linear(t["x"], *rest, backend="triton"))


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("M", [1, 8, 9, 16, 40, 64])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (torch.bfloat16,) * 2, (torch.bfloat16, F32)], ids=str)
def test_the_cuda_library(M, dtypes):
    from ilora.op import native

    if reason := native.cuda_unavailable():
        pytest.skip(reason)
    case = Case(M=M, N=M, R=24, d_in=520, d_out=392, dtype=dtypes[0], adapter_dtype=dtypes[1], device="cuda")
    t = case.tensors()
    weight = t["weight"] if M <= 16 else None
    low = (t["A"], t["B"], t["gate"])
    bias = t["bias"] if weight is not None else None
    got = native.decode(t["x"], weight, bias, t["dy"], *low, None, 2.0)
    assert got is not None
    again = native.decode(t["x"], weight, bias, t["dy"], *low, None, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    wide = [None if v is None else v.double() for v in (t["x"], weight, bias, *low)]
    zero = torch.zeros(392, 520, device="cuda", dtype=torch.float64)
    want = ilora.reference.ilora_linear(wide[0], zero if weight is None else wide[1], wide[2], *wide[3:], 2.0)
    rounding = {F32: 2.0**-20, F16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtypes[0]]
    torch.testing.assert_close(got[0].double(), want + t["dy"].double(), rtol=rounding, atol=4 * rounding)
    torch.testing.assert_close(got[1].double(), wide[0] @ wide[3].T, rtol=rounding, atol=4 * rounding)


def test_the_weight_is_nearly_all_that_is_read(tmp_path):
    file = tmp_path / "report.json"
    done = report("--targets=sm_90", "--ranks=16", "--dtypes=bf16", "--kernels=decode", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(file.read_text())
    assert len(kept["kernels"]) == 4
    assert kept["bad"] == 0
    (one,) = (t["forward"] for t in kept["bytes"] if t["case"]["M"] == 1 and t["case"]["strategy"] == "decode")
    weight = 2 * 4096 * 4096
    assert weight < one["unique"] <= 1.02 * weight  # from memory
    assert one["asked"] <= 1.6 * weight  # from L2: every program reads A
