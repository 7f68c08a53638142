"""The frozen product and the update in one kernel, forward and dx, by either GEMM; who gets "gemm", who is refused."""

import json
from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, GEMM, GEMMS, OUTPUTS, Case, check, run

import ilora
from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import config, gemm, launch, strategy, table, update  # noqa: E402
from ilora.kernels.launch import INTERPRETER, Device  # noqa: E402

DTYPES = [F16, BF16] if DEVICE == "cuda" else [F16]  # the interpreter's bfloat16 arithmetic means nothing
CASES = {
    "gemm": GEMMS | {
        "rank one": replace(GEMM, E=1, R=1),
        "rank not a power of two": replace(GEMM, E=3, R=12),
        "rank 64": replace(GEMM, R=64),
        "rank 96": replace(GEMM, R=96),
    },
    "whole": GEMMS | {
        "more segments than are looked for at once": replace(GEMM, lengths=(3, 0, 1, 2) * 9),
        "one expert": replace(GEMM, E=1, R=8),
        "three experts, rank not a power of two": replace(GEMM, E=3, R=24),
        "eight experts of one rank": replace(GEMM, E=8, R=8),
        "rank 32": replace(GEMM, M=200, N=2, R=32),
    },
}  # fmt: skip


def force(strategy, monkeypatch):
    if strategy == "whole" and not launch.device_of(torch.empty(1, device=DEVICE)).tma:
        pytest.skip("the device loads no tiles by tensor descriptor")
    monkeypatch.setenv("ILORA_STRATEGY", strategy)


@pytest.fixture
def forced(monkeypatch):
    force("gemm", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("strategy", "name"), [(strategy, name) for strategy in CASES for name in CASES[strategy]])
def test_against_the_definition(strategy, name, dtype, monkeypatch):
    force(strategy, monkeypatch)
    check(replace(CASES[strategy][name], dtype=dtype, device=DEVICE), "triton")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("strategy", CASES)
def test_the_same_bits_every_time(strategy, dropout_p, monkeypatch):
    force(strategy, monkeypatch)
    case = Case(M=200, N=2, d_in=136, d_out=264, dtype=F16, dropout_p=dropout_p, device=DEVICE)
    first, second = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


def both(x, weight, dropout_p=0.3):
    """y and dx by either strategy."""
    torch.manual_seed(1)
    M, (d_out, d_in) = len(x), weight.shape
    A, B = torch.randn(8, d_in, dtype=F16, device=DEVICE) / 8, torch.randn(d_out, 8, dtype=F16, device=DEVICE)
    gate, seed = torch.rand(M, 4, device=DEVICE), torch.tensor([3], device=DEVICE)
    dy = torch.randn(M, d_out, dtype=F16, device=DEVICE)
    results = []
    for name in ("beta", "gemm"):
        plan = update.Update(update.device_of(x), x, A, B, gate, None, 2.0, dropout_p, seed, name)
        y, xa = plan.forward(None, None, weight)
        dx = plan.backward(dy, xa, True, weight)[0]
        assert plan.fused == (name == "gemm")
        launch.run(plan.launches, x.device)
        if name == "beta":
            y, dx = y + x @ weight.T, dx + dy @ weight
        results.append((y, dx))
    return results


@pytest.mark.parametrize("view", ["rows of a wider matrix", "a transposed weight"])
def test_strides_it_takes(view):
    x, weight = torch.randn(40, 72, dtype=F16, device=DEVICE), torch.randn(56, 72, dtype=F16, device=DEVICE) / 8
    if view == "a transposed weight":  # as Conv1D keeps it
        weight = weight.t().contiguous().t()
    else:
        x, weight = torch.cat([x, x], 1)[:, :72], torch.cat([weight, weight], 1)[:, 72:]
    assert not (x.is_contiguous() and weight.is_contiguous())
    (y, dx), (y_gemm, dx_gemm) = both(x, weight)
    torch.testing.assert_close(y_gemm, y, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx_gemm, dx, rtol=2e-2, atol=2e-2)


REFUSED = {
    "float32": ({"dtype": F32}, "float16 and bfloat16, not torch.float32"),
    "mixed dtypes": ({"dtype": F16, "adapter_dtype": F32}, "must be one dtype"),
    "odd d_in": ({"dtype": F16, "d_in": 20}, r"the input's strides \(20, 1\)"),
    "odd d_out": ({"dtype": F16, "d_out": 12}, "rows of 12 outputs"),
    "rank above 128": ({"dtype": F16, "R": 132}, "rank 132 is above 128"),
    "strided": ({"dtype": F16, "strided": True}, "the input's strides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forced_gemm_says_why_it_cannot_run(forced, monkeypatch, name):
    fields, words = REFUSED[name]
    case = replace(GEMM, device=DEVICE, **fields)
    with pytest.raises(ValueError, match=f"ILORA_STRATEGY='gemm' cannot run forward: .*{words}"):
        run(case, "triton")
    monkeypatch.setenv("ILORA_STRATEGY", "auto")
    check(case, "triton")


def test_an_opaque_base_and_a_start_off_16_bytes(forced):
    t = replace(GEMM, dtype=F16, device=DEVICE).tensors()
    with pytest.raises(ValueError, match="the base layer is opaque"):
        ilora.ilora_update(t["x"], None, t["A"], t["B"], t["gate"], 2.0, backend="triton")
    buffer = torch.zeros(24 * 64 + 1, dtype=F16, device=DEVICE)
    reason = strategy.why_not(buffer[1:].view(24, 64), t["weight"], 48, t["A"])
    assert reason == "the input does not start at a multiple of 16 bytes"


def test_beta_asks_no_table(monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "beta")
    monkeypatch.setenv("ILORA_TABLE", "/no/such/table.json")
    check(replace(GEMM, dtype=F16, device=DEVICE), "triton")


def test_an_unknown_strategy_is_refused(monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "fastest")
    with pytest.raises(ValueError, match="ILORA_STRATEGY='fastest': expected one of beta, gemm, whole, auto"):
        run(replace(GEMM, dtype=F16, device=DEVICE), "triton")


def chosen(M=4096, d=4096, R=16, direction="forward", path=None, device=INTERPRETER, dropout=False):
    return strategy.choose(device, direction, M, d, d, R, BF16, path, dropout)


ROW = {"device": "interpreter", "direction": "forward", "dtype": "bfloat16", "M": 4096, "d_in": 4096, "d_out": 4096}
ROW |= {"R": 16, "strategy": "gemm"}


def written(tmp_path, *rows, **fields):
    row = ROW | fields
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps({"version": 1, "rows": [row, *rows]}))
    return str(path)


def test_without_measurements_every_device_takes_beta():
    assert chosen().strategy == "beta"
    assert chosen(device=Device(132, 227 * 1024, tma=True, name="a GPU never seen")).strategy == "beta"


def test_the_table_answers_for_the_nearest_shape(tmp_path):
    path = written(tmp_path, tile=[128, 128, 64, 8, 3, 4])
    assert chosen(path=path)[:2] == ("gemm", (128, 128, 64, 8, 3, 4))
    assert chosen(M=10**6, path=path).strategy == "gemm"  # more rows than were measured
    assert chosen(d=6000, R=8, path=path).strategy == "gemm"
    several = written(tmp_path, {**ROW, "M": 16384, "strategy": "beta"}, {**ROW, "M": 8192}, M=2048, strategy="beta")
    found = {M: chosen(M=M, path=several).strategy for M in (1024, 2048, 4000, 4097, 8192, 10**4, 10**6)}
    assert found == {1024: "beta", 2048: "beta", 4000: "beta", 4097: "gemm", 8192: "gemm", 10**4: "gemm", 10**6: "beta"}
    for other in ({"M": 1024}, {"d": 1024}, {"R": 64}, {"direction": "backward"}):
        assert chosen(path=path, **other).strategy == "beta"
    with_dropout = written(tmp_path, dropout=True)
    assert chosen(path=with_dropout).strategy == "beta"
    assert chosen(path=with_dropout, dropout=True).strategy == chosen(path=path, dropout=True).strategy == "gemm"
    large = written(tmp_path, tile=[128, 256, 128, 8, 4, 8])
    assert chosen(path=large)[:2] == ("gemm", None)  # a tile that does not fit is replaced


def test_a_table_reaches_the_kernels(tmp_path, monkeypatch):
    name = update.device_of(torch.empty(1, device=DEVICE)).name
    backward = {"device": name, "direction": "backward", "dtype": "float16", "M": 72, "d_in": 64, "d_out": 48}
    backward |= {"R": 8, "strategy": "beta"}
    forward = {**backward, "direction": "forward", "strategy": "gemm"}
    monkeypatch.setenv("ILORA_TABLE", written(tmp_path, backward, **forward))
    case = replace(GEMM, M=72, dtype=F16, device=DEVICE)
    seen = []
    monkeypatch.setattr(update, "gemm_launch", lambda *a: seen.append(a[1]) or gemm.gemm_launch(*a))
    check(case, "triton")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategy": "fast"}, "row 0: strategy 'fast' is none of beta, gemm, whole"),
        ({"direction": "sideways"}, "row 0: direction 'sideways'"),
        ({"dtype": "float64"}, "row 0: dtype 'float64'"),
        ({"R": 0}, "row 0: R 0 is not a positive integer"),
        ({"dropout": 0.1}, "row 0: dropout 0.1 is neither true nor false"),
        ({"color": 1}, "row 0: .*unexpected keyword argument 'color'"),
        ({"tile": [128, 256]}, "expected six positive integers"),
        ({"tile": [96, 256, 64, 8, 4, 8]}, "all powers of two"),
        ({"tile": [256, 256, 32, 16, 2, 8]}, "more than 128 × 256 elements"),
        ({"tile": [128, 256, 64, 5, 4, 8]}, "warps are 4, 8 or 16"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        table.load_table(written(tmp_path, **fields))


def test_a_file_that_is_no_table(tmp_path):
    path = tmp_path / "table.json"
    for content, words in (("{", "cannot be read"), ("[]", "expected"), ('{"version": 2, "rows": []}', "version")):
        path.write_text(content)
        table.load_table.cache_clear()
        with pytest.raises(ValueError, match=f"ILORA_TABLE=.*{words}"):
            table.load_table(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        table.load_table(str(tmp_path / "none.json"))


def test_tiles_fit_the_shared_memory():
    for smem in (99 * 1024, 163 * 1024, 227 * 1024):
        for R in (1, 8, 16, 32, 64, 128):
            tile = config.gemm_tile(Device(132, smem, tma=True), 4096, 4096, R)
            assert config.gemm_shared(tile, R) <= smem
    assert config.gemm_tile(Device(132, 227 * 1024, tma=True), 4096, 4096, 16)[:5] == (128, 256, 64, 8, 4)


def test_tf32_is_asked_for_in_the_way_that_always_answers():
    """torch refuses to read allow_tf32 once fp32_precision was set, as TrainingArguments(tf32=True) does."""
    gpu, matmul = Device(132, 227 * 1024), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert config.dots(gpu, F32, F32).precision == "tf32"
        assert config.dots(gpu, BF16, F32).precision == "tf32"
        matmul.fp32_precision = "ieee"
        assert (config.dots(gpu, F32, F32).precision, config.dots(gpu, BF16, F32).precision) == ("ieee", "tf32x3")
    finally:
        matmul.fp32_precision = before
