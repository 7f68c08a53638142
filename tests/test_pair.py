"""dh = dy B and dB = dyᵀ h from one launch: how dy is cut between the two kinds of programs, and their sums."""

import pytest
import torch
from cases import BF16, F16, F32
from hypothesis import given
from hypothesis import strategies as st

from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from ilora.kernels import config  # noqa: E402
from ilora.kernels.launch import Device, device_of, run  # noqa: E402
from ilora.kernels.pair import pair_launch  # noqa: E402

H100 = Device(sms=132, smem=227 * 1024, tma=True)
SIZES = st.integers(1, 20000)


def plan(device, M, D, R, dtype=BF16):
    dy, h, B = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, D), (M, R), (D, R)))
    return pair_launch(device, config.dots(device, dtype, dtype), dy, h, B, B, (R, 1))


@given(M=SIZES, D=SIZES, R=st.sampled_from([1, 8, 16, 48, 64, 128, 256]), dtype=st.sampled_from([BF16, F32]))
def test_cells_cover_the_matrix_and_stay_in_the_cache(M, D, R, dtype):
    launch, dh, parts = plan(H100, M, D, R, dtype)
    args, (S, G) = launch.args, (len(dh), 1 if parts.dim() == 2 else len(parts))
    rows, columns = args["rows"], args["columns"]
    assert all(rows % args[block] == columns % args[block] == 0 for block in ("ALONG_M", "ALONG_N", "DOWN_M", "DOWN_N"))
    assert (S - 1) * columns < D <= S * columns
    assert (G - 1) * rows < M <= G * rows
    assert (rows - 128) * (columns - 128) * dtype.itemsize <= config.CELL  # but for rounding up to whole blocks
    assert launch.grid == (S * G * (rows // args["ALONG_M"] + columns // args["DOWN_N"]),)


def test_how_a_square_is_cut():
    launch, dh, parts = plan(H100, 4096, 4096, 64)
    assert (launch.args["rows"], launch.args["columns"]) == (2048, 2048)
    assert launch.grid == (4 * (32 + 32),)
    assert (dh.shape, parts.shape) == ((2, 4096, 64), (2, 4096, 64))
    launch, dh, parts = plan(H100, 2048, 4096, 16)
    assert launch.grid[0] <= 2 * H100.sms  # two small programs on each
    assert (dh.shape, parts.shape) == ((4, 2048, 16), (2, 4096, 16))
    launch, dh, parts = plan(H100, 200, 4096, 64)
    assert parts.shape == (4096, 64)  # dB itself: nothing to add up


@pytest.mark.parametrize("R", [12, 64])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_part_is_right(R, layout, monkeypatch):
    monkeypatch.setattr(config, "CELL", 2 * 128 * 128)  # several cells either way
    M, D = 300, 410
    dy = torch.randn(M, 2 * D, dtype=F16, device=DEVICE)[:, ::2] if layout == "strided" else torch.randn(
        M, D, dtype=F16, device=DEVICE
    )  # fmt: skip
    h, B = torch.randn(M, R, dtype=F16, device=DEVICE), torch.randn(D, R, dtype=F16, device=DEVICE)
    if layout == "strided":
        B = B.t().contiguous().t()
    device = device_of(dy)
    dB = B.new_empty(B.shape)
    launch, dh, parts = pair_launch(device, config.dots(device, F16, F16), dy, h, B, dB, (R, 1))
    rows, columns = launch.args["rows"], launch.args["columns"]
    assert min(-(-M // rows), -(-D // columns)) > 1
    run([launch], dy.device)
    wide = dy.double()
    for s, part in enumerate(dh):
        at = slice(s * columns, (s + 1) * columns)
        torch.testing.assert_close(part.double(), wide[:, at] @ B[at].double(), rtol=1e-4, atol=1e-3)
    for g, part in enumerate(parts):
        at = slice(g * rows, (g + 1) * rows)
        torch.testing.assert_close(part.double(), wide[at].T @ h[at].double(), rtol=1e-4, atol=1e-3)
