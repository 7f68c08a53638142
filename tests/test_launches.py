"""Which kernels a call launches, and how they cut their work."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, GEMM, Case
from cases import run as run_case
from hypothesis import given
from hypothesis import strategies as st

from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import device, plans, tiles  # noqa: E402
from ilora.kernels.device import Device  # noqa: E402
from ilora.kernels.gates import Gate  # noqa: E402
from ilora.kernels.grad_dy import add_grad_dy  # noqa: E402
from ilora.kernels.launch import Plan, run  # noqa: E402
from ilora.kernels.sums import add_sums  # noqa: E402

H100 = Device(132, 227 * 1024, tma=True)
SIZES = st.integers(1, 20000)


def names(plan):
    return [launch.kernel.fn.__name__ for launch in plan.launches]


def launched(strategy, dropout_p=0.0, need_dx=True, **fields):
    """The names of the kernels of a forward and of a backward on an H100."""
    tensors = replace(GEMM, **{"M": 4096, "dtype": F16, **fields}).tensors()
    t = {name: tensor.to("meta") for name, tensor in tensors.items() if tensor is not None}
    low = (t["A"], t["B"], t["gate"], None, t["gate"] if dropout_p else None, 2.0, dropout_p)
    forward = plans.forward(H100, t["x"], t["weight"], t["bias"], None, *low, strategy)
    backward = plans.backward(H100, t["dy"], t["x"], *forward.results[1], t["weight"], *low, need_dx, strategy)
    for plan in (forward, backward):
        assert plan.has_product == (not {"fused_layer", "decode"}.isdisjoint(names(plan)))
    return names(forward), names(backward)


BETA = ["grad_dy", "grad_weights", "sums"]  # and expand, for dx
FUSED = ["fused_layer", "grad_weights", "sums"]


def test_launches_of_a_layer():
    assert launched("beta") == launched("beta", N=4096) == (["shrink", "expand"], [*BETA, "expand"])
    assert launched("beta", 0.1) == (["shrink", "gate_ranks", "expand"], [*BETA, "expand"])
    assert launched("beta", need_dx=False)[1] == BETA
    assert launched("fused") == launched("fused", N=4096) == (["fused_layer"], FUSED)
    assert launched("fused", 0.1) == (["shrink", "fused_layer"], FUSED)
    assert launched("fused", need_dx=False)[1] == BETA  # without dx there is no frozen product
    assert launched("auto") == launched("fused")
    too_few = (["shrink", "gate_ranks", "expand"], ["grad_dy", "gate_ranks", *BETA[1:], "expand"])
    assert launched("beta", M=200, N=1) == launched("beta", R=64) == too_few  # programs to fill the device
    assert launched("beta", d_in=65, d_out=49) == too_few
    assert "sums" not in launched("beta", M=4, N=4)[1]  # of a few rows there are no partial sums
    assert launched("auto", M=4, N=4) == (["decode"], FUSED)


@pytest.mark.parametrize("d", [1024, 2048, 4096])
@pytest.mark.parametrize(("M", "R"), [(2048, 8), (2048, 16), (4096, 16), (4096, 32), (8192, 16)])
def test_large_layers_take_six_launches(d, M, R):
    shapes = ((M, d), (M, d), (d, d), (R, d), (d, R))
    x, dy, weight, A, B = (torch.empty(shape, dtype=BF16, device="meta") for shape in shapes)
    low = (A, B, torch.empty(8, 4, device="meta"), None, None, 2.0, 0.0)
    forward = plans.forward(H100, x, weight, None, None, *low, "beta")
    assert names(forward) == ["shrink", "expand"]
    backward = plans.backward(H100, dy, x, *forward.results[1], weight, *low, True, "beta")
    assert names(backward) == [*BETA, "expand"]


def test_the_pass_over_dy_apart(monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "beta")
    monkeypatch.setenv("ILORA_GRAD_DY", "apart")
    assert launched("beta")[1] == ["grad_dy", *BETA, "expand"]
    case = Case(M=70, N=2, R=16, d_in=64, d_out=48, dtype=F16, device=DEVICE)
    apart = run_case(case, "triton")
    monkeypatch.delenv("ILORA_GRAD_DY")
    assert all(torch.equal(tensor, apart[name]) for name, tensor in run_case(case, "triton").items())
    monkeypatch.setenv("ILORA_GRAD_DY", "joint")
    with pytest.raises(ValueError, match="ILORA_GRAD_DY='joint': expected joined or apart"):
        launched("beta")


def test_the_primitives_take_beta_whatever_is_forced(monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "fused")
    shapes = ((600, 640), (600, 48), (8, 640), (48, 8))
    x, dy, A, B = (torch.empty(shape, dtype=F16, device="meta") for shape in shapes)
    gate = torch.empty(1, 4, device="meta")
    shrink = plans.shrink_x(H100, x, A, None, 0.0)
    (xa,) = shrink.results
    assert (names(shrink), xa.dtype) == (["shrink", "sums"], F32)
    assert names(plans.expand_xa(H100, x, xa, None, B, gate, None, 2.0)) == ["gate_ranks", "expand"]
    dy_plan = plans.backward_dy(H100, dy, xa, B, gate, None, 2.0)
    assert names(dy_plan) == ["gate_ranks", "grad_dy", "gate_ranks", "sums"]
    dxa = dy_plan.results[0]
    assert names(plans.backward_x(H100, x, dxa, A, None, 0.0, True)) == ["grad_weights", "sums", "expand"]
    assert names(plans.backward_x(H100, x, dxa, A, None, 0.0, False)) == ["grad_weights", "sums"]


def test_sums_take_a_program_for_an_instance_or_for_many_rows():
    dgate, scores = torch.empty(4096, 4, device="meta"), torch.empty(4096, 16, device="meta")

    def grid(*arguments):
        plan = Plan(H100, scores, scores)
        add_sums(plan, None, None, *arguments)
        return [launch.grid for launch in plan.launches]

    assert grid(scores, None, dgate) == [(64,)]
    assert grid(scores, torch.empty(4097, device="meta"), dgate) == [(4096,)]  # segments of any lengths
    assert grid(scores[:8], None, dgate[:1]) == [(1,)]
    assert grid(dgate, None, dgate) == grid(None, None, dgate) == []


def test_segments_that_nothing_checked_read_no_row_outside():
    scores, dgate = torch.ones(40, 8, device=DEVICE), torch.full((3, 4), -1.0, device=DEVICE)
    segments = torch.tensor([2**31 - 1, -(2**31), 7, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    plan = Plan(device.device_of(scores), scores, scores)
    add_sums(plan, None, None, scores, segments, dgate)
    run(plan.launches, scores)
    assert dgate.tolist() == [[0] * 4, [14] * 4, [66] * 4]


def pass_over_dy(device, dy, h, B):
    """(the partial sums of dh or None, those of dB, the first launch, all launches)."""
    plan, gate = Plan(device, dy, B), Gate(torch.ones(1, 1, device=dy.device), None, 2.0, len(dy))
    *_, dB = add_grad_dy(plan, dy, h, h, B, B.new_empty(B.shape), gate)
    return plan.launches[0].args["dh_ptr"], dB, plan.launches[0], plan.launches


def cut(device, M, D, R, dtype=BF16):
    dy, h, B = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, D), (M, R), (D, R)))
    return pass_over_dy(device, dy, h, B)[:3]


BLOCKS = ("ALONG_M", "ALONG_N", "DOWN_M", "DOWN_N")


def count(parts):
    return len(parts) if parts is not None and parts.dim() == 3 else 1


@given(M=SIZES, D=SIZES, R=st.sampled_from([1, 8, 16, 48, 64, 128, 256]), dtype=st.sampled_from([BF16, F32]))
def test_cells_of_dy_cover_it_and_stay_in_the_cache(M, D, R, dtype):
    dh, dB, launch = cut(H100, M, D, R, dtype)
    args, S, G = launch.args, count(dh), count(dB)
    rows, columns = args["rows"], args["columns"]
    assert all(rows % args[name] == columns % args[name] == 0 for name in BLOCKS)
    assert (S - 1) * columns < D <= S * columns
    assert (G - 1) * rows < M <= G * rows
    block = max(args[name] for name in BLOCKS)
    assert (rows - block) * (columns - block) * dtype.itemsize <= tiles.CELL  # but for rounding up to whole blocks
    assert launch.grid == (S * G * (rows // args["ALONG_M"] + columns // args["DOWN_N"]),)


def test_how_dy_is_cut():
    dh, dB, launch = cut(H100, 4096, 4096, 64)
    assert (launch.args["rows"], launch.args["columns"]) == (2048, 2048)
    assert launch.grid == (4 * (32 + 32),)
    assert (dh.shape, dB.shape) == ((2, 4096, 64), (2, 4096, 64))
    dh, dB, launch = cut(H100, 2048, 4096, 16)
    assert launch.grid[0] <= 2 * H100.sms  # two small programs on each
    assert (launch.args["rows"], launch.args["columns"]) == (1024, 4096)
    assert (dh, dB.shape) == (None, (2, 4096, 16))  # whole rows
    assert cut(H100, 4096, 8192, 16)[0].shape == (3, 4096, 16)  # whole rows would leave more partial sums of dB
    assert cut(H100, 200, 4096, 64)[1].shape == (4096, 64)  # dB itself: nothing to add up


@pytest.mark.parametrize("R", [12, 64])
@pytest.mark.parametrize("strided", [False, True])
def test_every_part_of_dh_and_dB_is_right(R, strided, monkeypatch):
    monkeypatch.setattr(tiles, "CELL", 2 * 128 * 128)  # several cells either way
    M, D = 300, 410
    dy = torch.randn(M, 2 * D, dtype=F16, device=DEVICE)[:, ::2]
    h, B = torch.randn(M, R, dtype=F16, device=DEVICE), torch.randn(D, R, dtype=F16, device=DEVICE)
    dy, B = (dy, B.t().contiguous().t()) if strided else (dy.contiguous(), B)
    dh, dB, launch, launches = pass_over_dy(device.device_of(dy), dy, h, B)
    rows, columns = (launch.args[name] for name in ("rows", "columns"))
    assert count(dh) > 1
    assert count(dB) > 1
    run(launches, dy)
    wide = dy.double()
    for s, part in enumerate(dh):
        at = slice(s * columns, (s + 1) * columns)
        torch.testing.assert_close(part.double(), wide[:, at] @ B[at].double(), rtol=1e-4, atol=1e-3)
    for g, part in enumerate(dB):
        at = slice(g * rows, (g + 1) * rows)
        torch.testing.assert_close(part.double(), wide[at].T @ h[at].double(), rtol=1e-4, atol=1e-3)


def test_tf32_is_read_in_the_way_that_always_answers():
    """torch refuses to read allow_tf32 once fp32_precision was set, as TrainingArguments(tf32=True) does."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert device.dots(H100, F32, F32).precision == "tf32"
        assert device.dots(H100, BF16, F32).precision == "tf32"
        matmul.fp32_precision = "ieee"
        assert (device.dots(H100, F32, F32).precision, device.dots(H100, BF16, F32).precision) == ("ieee", "tf32x3")
    finally:
        matmul.fp32_precision = before


def test_kernels_start_early_where_the_device_can_and_nobody_forbids_it(monkeypatch):
    def options(device):
        x, A = (torch.empty(shape, dtype=BF16, device="meta") for shape in ((64, 64), (8, 64)))
        (first, *_) = plans.shrink_x(device, x, A, None, 0.0).launches
        return first.args["EARLY"], first.options.get("launch_pdl", False)

    early = H100._replace(early=True)
    assert options(early) == (True, True)
    assert options(H100) == (False, False)
    monkeypatch.setenv("ILORA_EARLY_START", "0")
    assert options(early) == (False, False)
    monkeypatch.setenv("ILORA_EARLY_START", "no")
    with pytest.raises(ValueError, match="ILORA_EARLY_START='no': expected 0 or 1"):
        options(early)
