"""A few rows at inference: one Triton launch, and the same answer as the definition."""

from dataclasses import replace

import pytest
import torch
from cases import F16, F32, Case, check

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
def launched(monkeypatch):
    """The launches since the test began, in order."""
    from ilora.kernels import replay
    from ilora.kernels.launch import Launch

    replay.forget()
    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: launches.append(self) or call(self))
    return launches


@pytest.fixture
def products(monkeypatch):
    """One item for each frozen product that torch computed since the test began."""
    from ilora.kernels import primitives

    products, add = [], primitives._add_product
    monkeypatch.setattr(primitives, "_add_product", lambda *args: products.append(1) or add(*args))
    return products


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (F16, F32)], ids=["fp32", "fp16", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"M={case.M},R={case.R}")
def test_against_the_definition(case, dtypes, launched):
    check(replace(case, dtype=dtypes[0], adapter_dtype=dtypes[1], device=DEVICE), "triton")
    launch, M = launched[0], sum(case.lengths) if case.lengths else case.M
    assert launch.kernel.fn.__name__ == "decode"
    assert (launch.args["weight_ptr"] is not None) == (M <= 16)
    assert launch.args["BLOCK_R"] >= (32 if M <= 16 else 16)


@pytest.mark.parametrize("M", [1, 16, 64])
def test_one_launch_with_the_frozen_product_in_it_up_to_16_rows(M, launched, products):
    t = Case(M=M, N=M, device=DEVICE).tensors()
    low = (t["A"], t["B"], t["gate"], 2.0)
    want = ilora.reference.ilora_linear(t["x"], t["weight"], t["bias"], *low)
    got = ilora.ilora_linear(t["x"], t["weight"], t["bias"], *low, backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    update = ilora.ilora_update(t["x"], t["dy"], *low, backend="triton")
    torch.testing.assert_close(update - t["dy"], want - t["x"] @ t["weight"].T - t["bias"], rtol=1e-4, atol=1e-4)
    assert [launch.kernel.fn.__name__ for launch in launched] == ["decode"] * 2
    assert len(products) == (M > 16)


def test_dropout_many_rows_and_wide_inputs_take_the_ordinary_launches(launched):
    from ilora.kernels import decode

    for M, p in ((4, 0.5), (65, 0.0)):
        t = Case(M=M, N=1, device=DEVICE).tensors()
        low = (t["A"], t["B"], t["gate"], 2.0)
        ilora.ilora_linear(t["x"], t["weight"], t["bias"], *low, dropout_p=p, seed=1, backend="triton")
    assert launched
    assert "decode" not in [launch.kernel.fn.__name__ for launch in launched]
    wide = torch.empty(1, decode.BYTES // 4, device="meta")
    assert not decode.decodes(wide, wide, 0.0)
    assert decode.decodes(wide[:, : decode.BYTES // 8], wide[:, : decode.BYTES // 8], 0.0)


def test_a_transposed_weight_is_in_the_launch_and_a_strided_one_is_not(products):
    t = Case(M=3, N=3, device=DEVICE).tensors()
    low = (t["A"], t["B"], t["gate"], 2.0)
    want = ilora.reference.ilora_linear(t["x"], t["weight"], t["bias"], *low)
    transposed = t["weight"].T.contiguous().T
    strided = torch.stack([t["weight"]] * 2, 2)[:, :, 1]
    for weight, count in ((transposed, 0), (strided, 1)):
        got = ilora.ilora_linear(t["x"], weight, t["bias"], *low, backend="triton")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert len(products) == count


def test_the_last_rows_of_a_batch_repeated_bits_and_the_saved_ranks():
    t = Case(M=12, N=4, d_in=40, device=DEVICE).tensors()
    x, rest = t["x"].view(4, 3, 40)[:, -1], (t["weight"], t["bias"], t["A"], t["B"], t["gate"], 2.0)
    first, second = (ilora.ilora_linear(x, *rest, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, ilora.reference.ilora_linear(x, *rest), rtol=1e-4, atol=1e-4)
    arguments = (x, t["weight"], t["bias"], None, t["A"], t["B"], t["gate"], None, 2.0, 0.0, None)
    _, (xa, h) = torch.ops.ilora.forward(*arguments, "triton")
    torch.testing.assert_close(xa, x @ t["A"].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h, 2.0 * xa * t["gate"].repeat_interleave(2, 1), rtol=1e-4, atol=1e-4)


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
