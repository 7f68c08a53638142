"""Which kernels a call launches, and how they cut their work."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, GEMM
from hypothesis import given
from hypothesis import strategies as st

from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import device, plans, tiles  # noqa: E402
from ilora.kernels.device import Device  # noqa: E402
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
    xa = forward.results[1]
    backward = plans.backward(H100, t["dy"], t["x"], xa, t["weight"], *low, need_dx, strategy)
    for plan in (forward, backward):
        assert plan.has_product == (not {"fused_layer", "decode"}.isdisjoint(names(plan)))
    return names(forward), names(backward)


BETA = ["gate_ranks", "grad_dy", "gate_ranks", "grad_weights", "sums"]  # and expand, for dx
FUSED = ["fused_layer", "grad_weights", "sums"]


def test_launches_of_a_layer():
    assert launched("beta") == (["shrink", "gate_ranks", "expand"], [*BETA, "expand"])
    assert launched("beta", 0.1) == launched("beta", N=4096) == launched("beta")
    assert launched("beta", need_dx=False)[1] == BETA
    assert launched("fused") == launched("fused", N=4096) == (["fused_layer"], FUSED)
    assert launched("fused", 0.1) == (["shrink", "fused_layer"], FUSED)
    assert launched("fused", need_dx=False)[1] == BETA  # without dx there is no frozen product
    assert launched("auto") == launched("fused")
    few = [name for name in BETA if name != "sums"]  # of a few rows there are no partial sums
    assert launched("beta", M=4, N=4)[1] == [*few, "expand"]
    assert launched("auto", M=4, N=4) == (["decode"], FUSED)


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


def cut(device, M, D, R, dtype=BF16):
    dy, h, B = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, D), (M, R), (D, R)))
    plan = Plan(device, dy, B)
    return *add_grad_dy(plan, dy, h, B, B), plan.launches[0]


def count(parts):
    return len(parts) if parts.dim() == 3 else 1


@given(M=SIZES, D=SIZES, R=st.sampled_from([1, 8, 16, 48, 64, 128, 256]), dtype=st.sampled_from([BF16, F32]))
def test_cells_of_dy_cover_it_and_stay_in_the_cache(M, D, R, dtype):
    dh, dB, launch = cut(H100, M, D, R, dtype)
    args, S, G = launch.args, count(dh), count(dB)
    rows, columns = args["rows"], args["columns"]
    assert all(rows % args[block] == columns % args[block] == 0 for block in ("ALONG_M", "ALONG_N", "DOWN_M", "DOWN_N"))
    assert (S - 1) * columns < D <= S * columns
    assert (G - 1) * rows < M <= G * rows
    assert (rows - 128) * (columns - 128) * dtype.itemsize <= tiles.CELL  # but for rounding up to whole blocks
    assert launch.grid == (S * G * (rows // args["ALONG_M"] + columns // args["DOWN_N"]),)


def test_how_dy_is_cut():
    dh, dB, launch = cut(H100, 4096, 4096, 64)
    assert (launch.args["rows"], launch.args["columns"]) == (2048, 2048)
    assert launch.grid == (4 * (32 + 32),)
    assert (dh.shape, dB.shape) == ((2, 4096, 64), (2, 4096, 64))
    dh, dB, launch = cut(H100, 2048, 4096, 16)
    assert launch.grid[0] <= 2 * H100.sms  # two small programs on each
    assert (dh.shape, dB.shape) == ((4, 2048, 16), (2, 4096, 16))
    assert cut(H100, 200, 4096, 64)[1].shape == (4096, 64)  # dB itself: nothing to add up


@pytest.mark.parametrize("R", [12, 64])
@pytest.mark.parametrize("strided", [False, True])
def test_every_part_of_dh_and_dB_is_right(R, strided, monkeypatch):
    monkeypatch.setattr(tiles, "CELL", 2 * 128 * 128)  # several cells either way
    M, D = 300, 410
    dy = torch.randn(M, 2 * D, dtype=F16, device=DEVICE)[:, ::2]
    h, B = torch.randn(M, R, dtype=F16, device=DEVICE), torch.randn(D, R, dtype=F16, device=DEVICE)
    dy, B = (dy, B.t().contiguous().t()) if strided else (dy.contiguous(), B)
    plan = Plan(device.device_of(dy), dy, B)
    dh, dB = add_grad_dy(plan, dy, h, B, B.new_empty(B.shape))
    rows, columns = (plan.launches[0].args[name] for name in ("rows", "columns"))
    assert count(dh) > 1
    assert count(dB) > 1
    run(plan.launches, dy)
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
