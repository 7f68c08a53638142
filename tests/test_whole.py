"""Strategy "whole": ranks, gate, update and the frozen product in one kernel; backward in three launches."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, GEMM, check, run

import ilora
from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import config, strategy, update  # noqa: E402
from ilora.kernels.launch import Device, device_of  # noqa: E402
from ilora.kernels.sums import sums_launch  # noqa: E402
from ilora.kernels.table import Row  # noqa: E402

if not device_of(torch.empty(1, device=DEVICE)).tma:
    pytest.skip("the device loads no tiles by tensor descriptor", allow_module_level=True)


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "whole")


def planned(dropout_p=0.0, need_dx=True, fields=None):
    """The names of the kernels of a forward and of a backward."""
    t = replace(GEMM, M=600, dtype=F16, device=DEVICE, **(fields or {})).tensors()
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None
    names = []
    for direction in ("forward", "backward"):
        plan = update.Update(
            update.device_of(t["x"]), t["x"], t["A"], t["B"], t["gate"], t["segments"], 2.0, dropout_p, seed, "whole"
        )
        if direction == "forward":
            _, xa = plan.forward(t["bias"], None, t["weight"])
        else:
            plan.backward(t["dy"], xa, need_dx, t["weight"])
        names.append([each.kernel.fn.__name__ for each in plan.launches])
    return names


def test_one_launch_forward_and_three_backward():
    assert planned() == [["whole"], ["whole", "outers", "sums"]]
    assert planned(fields={"N": 600}) == [["whole"], ["whole", "outers", "sums"]]  # token gates: weights' sums alone


def test_token_gates_take_a_program_for_many_rows():
    dgate, scores = torch.empty(4096, 4, device="meta"), torch.empty(4096, 16, device="meta")
    (launch,) = sums_launch(scores, None, dgate)
    assert launch.grid == (64,)
    (launch,) = sums_launch(scores, torch.empty(4097, device="meta"), dgate)  # of any lengths
    assert launch.grid == (4096,)
    (launch,) = sums_launch(scores[:8], None, dgate[:1])
    assert (launch.grid, launch.args["EACH"]) == ((1,), False)
    assert sums_launch(None, None, dgate) == []


def test_a_mask_before_A_is_gone_through_before():
    assert planned(0.1) == [["shrink", "whole"], ["whole", "outers", "sums"]]


def test_without_dx_there_is_no_product_to_be_part_of():
    assert planned(need_dx=False)[1] == ["gate_ranks", "pair", "gate_ranks", "outer", "sums"]


@pytest.mark.parametrize("turned", ["the weight", "A", "B", "A and B"])
def test_transposed_operands(forced, turned):
    """A transposed weight is Conv1D's; A and B may be views."""
    t = replace(GEMM, dtype=F16, device=DEVICE).tensors()
    for name in {"the weight": ["weight"], "A": ["A"], "B": ["B"], "A and B": ["A", "B"]}[turned]:
        t[name] = t[name].t().contiguous().t()
    inputs = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]
    results = []
    for backend in ("triton", "reference"):
        y = ilora.ilora_linear(
            inputs[0], t["weight"], t["bias"], *inputs[1:], 2.0, t["segments"], 0.0, None, backend=backend
        )
        results.append((y, *torch.autograd.grad(y, inputs, t["dy"])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


REFUSED = {
    "float32": ({"dtype": F32}, "float16 and bfloat16, not torch.float32"),
    "rank above 32": ({"R": 36}, "rank 36 is above 32"),
    "odd d_in": ({"d_in": 20}, r"the input's strides \(20, 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forced_whole_says_why_it_cannot_run(forced, monkeypatch, name):
    fields, words = REFUSED[name]
    case = replace(GEMM, device=DEVICE, **{"dtype": F16, **fields})
    with pytest.raises(ValueError, match=f"ILORA_STRATEGY='whole' cannot run forward: .*{words}"):
        run(case, "triton")
    monkeypatch.setenv("ILORA_STRATEGY", "auto")
    check(case, "triton")


def test_it_wants_tensor_descriptors():
    A = torch.empty(32, 64, dtype=BF16, device="meta")
    assert "by tensor descriptor" in strategy.why_not_whole(Device(108, 163 * 1024), A, A)
    assert strategy.why_not_whole(Device(132, 227 * 1024, tma=True), A, A) is None


def test_ranks_that_rows_of_B_cannot_hold_are_refused_in_backward(forced):
    """Rows of B have R elements: 12 of them are not a multiple of 16 bytes."""
    case = replace(GEMM, E=3, R=12, dtype=F16, device=DEVICE)
    with pytest.raises(ValueError, match=r"cannot run backward: A or B's strides \(12, 1\)"):
        run(case, "triton")


def test_projections_that_share_their_ranks(forced):
    t = replace(GEMM, M=600, dtype=F16, device=DEVICE).tensors()
    half = update.Update(update.device_of(t["x"]), t["x"], t["A"], t["B"], t["gate"], None, 2.0, 0.0, None)
    xa = half.shrink_x()
    half.expand_xa(xa, None, t["weight"])
    dxa, *_ = half.backward_dy(t["dy"], xa)
    half.backward_x(dxa, True, t["dy"], t["weight"])
    names = [each.kernel.fn.__name__ for each in half.launches]
    assert names[2:3] == ["whole"]  # gates them
    assert names[-1] == "gemm"  # finds them gated


def test_the_table_may_name_it_and_what_is_to_be_where_it_cannot(monkeypatch):
    device = Device(132, 227 * 1024, tma=True, name="a GPU")

    def measured(*rows):
        shape = {"M": 4096, "d_in": 1024, "d_out": 1024, "R": 16}
        rows = tuple(Row("a GPU", "forward", "bfloat16", **shape | fields) for fields in rows)
        monkeypatch.setattr(strategy, "MEASURED", rows)
        strategy.choose.cache_clear()

    monkeypatch.delenv("ILORA_STRATEGY", raising=False)
    monkeypatch.delenv("ILORA_TABLE", raising=False)

    def way(R, gated=False):
        shapes = ((4096, 1024), (1024, 1024), (R, 1024), (1024, R))
        x, weight, A, B = (torch.empty(shape, dtype=BF16, device="meta") for shape in shapes)
        return strategy.pick(device, "forward", x, weight, A, B, None, A, gated, False)

    small, large = config.GemmTile(64, 128, 64, 8, 3), config.GemmTile(128, 256, 64, 8, 3)
    try:
        measured({"strategy": "whole"})
        assert way(16) == ("whole", config.gemm_tile(device, 4096, 1024, 16, "whole"))
        assert way(24).strategy == "whole"
        assert way(16, gated=True).strategy == "beta"
        measured({"strategy": "whole", "tile": small}, {"strategy": "gemm", "tile": large})
        assert way(16) == ("whole", small)
        assert way(16, gated=True) == ("gemm", large)
        measured({"strategy": "whole", "tile": small})
        assert way(24) == ("whole", config.gemm_tile(device, 4096, 1024, 24, "whole"))  # other blocks of ranks
        measured({"strategy": "whole", "R": 32}, {"strategy": "gemm", "R": 32})
        assert way(64).strategy == "gemm"
        assert way(65).strategy == "beta"  # no measurement is that near
    finally:
        strategy.choose.cache_clear()


def test_tiles_fit_the_tensor_memory():
    """Where there is one, it has room for the ranks beside two accumulators of 128 columns, not of 256."""
    device = Device(148, 227 * 1024, tma=True, tmem=512)
    assert config.gemm_tile(device, 4096, 4096, 16, "whole")[:2] == (128, 128)
    assert config.gemm_tile(device, 4096, 4096, 16)[:2] == (128, 256)
    assert not config.gemm_fits(device, config.GemmTile(64, 256, 64, 8, 2), 16, "whole")


def test_tiles_fit_the_shared_memory():
    for smem in (99 * 1024, 163 * 1024, 227 * 1024):
        for R in (1, 8, 16, 32):
            tile = config.gemm_tile(Device(132, smem, tma=True), 4096, 4096, R, "whole")
            assert config.whole_shared(tile, R) <= smem
    assert config.gemm_tile(Device(132, 227 * 1024, tma=True), 4096, 4096, 16, "whole")[:5] == (128, 256, 64, 8, 4)
