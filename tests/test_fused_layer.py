"""The frozen product and the update in one kernel: is it right, when is it chosen, why is it refused?"""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, GEMM, GEMMS, OUTPUTS, Case, check, run

import ilora
from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels.device import Device, device_of  # noqa: E402
from ilora.kernels.fused_layer import FusedTile, fused_tile  # noqa: E402
from ilora.kernels.strategy import fuses, why_not_fused  # noqa: E402

if not device_of(torch.empty(1, device=DEVICE)).tma:
    pytest.skip("the device does not load tiles by tensor descriptor", allow_module_level=True)

H100, A100 = Device(132, 227 * 1024, tma=True), Device(108, 163 * 1024)
DTYPES = [F16, BF16] if DEVICE == "cuda" else [F16]  # the interpreter computes bfloat16 wrongly
CASES = GEMMS | {
    "more segments than are compared at once": replace(GEMM, lengths=(3, 0, 1, 2) * 9),
    "one expert": replace(GEMM, E=1, R=8),
    "three experts, rank not a power of two": replace(GEMM, E=3, R=24),
    "eight experts of one rank": replace(GEMM, E=8, R=8),
    "rank 32": replace(GEMM, M=200, N=2, R=32),
}


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(forced, name, dtype):
    check(replace(CASES[name], dtype=dtype, device=DEVICE), "triton")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_same_bits_every_time(forced, dropout_p):
    case = Case(M=200, N=2, d_in=136, d_out=264, dtype=F16, dropout_p=dropout_p, device=DEVICE)
    first, second = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


def transposed(t, *names):
    return {name: t[name].t().contiguous().t() for name in names}


LAYOUTS = {
    "Conv1D's weight": lambda t: transposed(t, "weight"),
    "A transposed": lambda t: transposed(t, "A"),
    "B transposed": lambda t: transposed(t, "B"),
    "A and B transposed": lambda t: transposed(t, "A", "B"),
    "rows of wider matrices": lambda t: {name: torch.cat([t[name]] * 2, 1)[:, :64] for name in ("x", "weight")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(forced, layout):
    t = replace(GEMM, dtype=F16, device=DEVICE).tensors()
    t |= LAYOUTS[layout](t)
    inputs = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]
    results = []
    for backend in ("triton", "reference"):
        y = ilora.ilora_linear(inputs[0], t["weight"], t["bias"], *inputs[1:], 2.0, t["segments"], backend=backend)
        results.append((y, *torch.autograd.grad(y, inputs, t["dy"])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


REFUSED = {
    "float32": ({"dtype": F32}, "float16 and bfloat16, not torch.float32"),
    "mixed dtypes": ({"adapter_dtype": F32}, "must be one dtype"),
    "rank above 32": ({"R": 36}, "rank 36 is above 32"),
    "odd d_in": ({"d_in": 20}, r"the input's strides \(20, 1\)"),
    "odd d_out": ({"d_out": 12}, "rows of 12 outputs"),
    "strided": ({"strided": True}, "the input's strides"),
    "rows of B in backward": ({"E": 3, "R": 12}, r"A or B's strides \(12, 1\)"),  # not a multiple of 16 bytes
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forced_choice_that_cannot_run_says_why_and_auto_takes_beta(forced, monkeypatch, name):
    fields, words = REFUSED[name]
    case = replace(GEMM, device=DEVICE, **{"dtype": F16, **fields})
    with pytest.raises(ValueError, match=f"ILORA_STRATEGY='fused' cannot run this layer: .*{words}"):
        run(case, "triton")
    monkeypatch.setenv("ILORA_STRATEGY", "auto")
    check(case, "triton")


def test_an_opaque_base_and_an_unknown_name_are_refused(forced, monkeypatch):
    t = replace(GEMM, dtype=F16, device=DEVICE).tensors()
    with pytest.raises(ValueError, match="the base layer is opaque"):
        ilora.ilora_update(t["x"], None, t["A"], t["B"], t["gate"], 2.0, backend="triton")
    monkeypatch.setenv("ILORA_STRATEGY", "fastest")
    with pytest.raises(ValueError, match="ILORA_STRATEGY='fastest': expected beta, fused or auto"):
        run(replace(GEMM, dtype=F16, device=DEVICE), "triton")


def layer(d_in, d_out, R=16, M=4096):
    return tuple(torch.empty(shape, dtype=BF16, device="meta") for shape in ((M, d_in), (d_out, d_in), (R, d_in)))


def test_the_device_and_the_address_of_x_count():
    x, weight, A = layer(64, 48)
    assert why_not_fused(H100, x, weight, A, A) is None
    assert "by tensor descriptor" in why_not_fused(A100, x, weight, A, A)
    off = torch.empty(24 * 64 + 1, dtype=BF16, device="meta")[1:].view(24, 64)
    assert why_not_fused(H100, off, weight, A, A) == "the input does not start at a multiple of 16 bytes"


def test_auto_fuses_layers_of_up_to_2048_features():
    fused = {(d_in, d_out): fuses("auto", H100, *layer(d_in, d_out), None)
             for d_in, d_out in ((256, 256), (2048, 2048), (2048, 2056), (4096, 1024), (4096, 4096))}  # fmt: skip
    assert [shape for shape, yes in fused.items() if yes] == [(256, 256), (2048, 2048)]
    assert not fuses("auto", A100, *layer(1024, 1024), None)
    assert not fuses("auto", H100, *layer(1024, 1024, R=64), None)
    assert not fuses("beta", H100, *layer(1024, 1024), None)
    assert fuses("fused", H100, *layer(4096, 4096), None)


@pytest.mark.parametrize("R", [1, 8, 16, 32])
def test_tiles_fit_the_shared_and_the_tensor_memory(R):
    for smem in (99 * 1024, 163 * 1024, 227 * 1024):
        assert fused_tile(Device(132, smem, tma=True), 4096, 4096, R).shared_memory(R) <= smem
    assert fused_tile(H100, 4096, 4096, R)[:4] == (128, 256, 64, 8)
    B200 = Device(148, 227 * 1024, tma=True, tmem=512)  # holds two accumulators of 128 columns beside the ranks
    assert fused_tile(B200, 4096, 4096, R)[:4] == (128, 128, 64, 4)
    assert not FusedTile(64, 256, 64, 8, 2).fits(B200, R)
