"""The Triton kernels give the same bits every time: on a GPU 200 times over, in the interpreter three times.

Triton's compilers have made kernels with several products in a loop that are right most of the time.
"""

import pytest
import torch
from cases import BF16, F16, Case, check, run

from ilora.op import backends

GPU = torch.cuda.is_available()
DEVICE, DTYPE, TIMES = ("cuda", BF16, 200) if GPU else ("cpu", F16, 3)
SMALL = {"d_in": 136, "d_out": 200, "M": 96, "N": 3}
LARGE = {"d_in": 1024, "d_out": 1024, "M": 4096, "N": 8}
SIZES = {
    "small": SMALL,
    "small, odd": {"d_in": 131, "d_out": 97, "M": 67, "N": 1},
    "small, few rows": {"d_in": 136, "d_out": 200, "M": 7, "N": 7},
} | ({"large": LARGE, "odd": {"d_in": 1001, "d_out": 777, "M": 1000, "N": 1}} if GPU else {})
pytestmark = [pytest.mark.gpu] * GPU
if (reason := backends.why_not("triton", DEVICE, DTYPE)) is not None:
    pytest.skip(reason, allow_module_level=True)


def differing(case, times):
    """The names of the results that differ from the first call's in any of the other calls."""
    first, found = run(case, "triton"), set()
    for _ in range(times - 1):
        again = run(case, "triton")
        found |= {name for name in first if not torch.equal(first[name], again[name])}
    return found


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("R", [8, 16, 32, 64] if GPU else [16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", ["beta", "fused"])
def test_every_call_gives_the_same_bits(strategy, size, R, dropout_p, monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "auto" if "few" in size else strategy)
    case = Case(**SIZES[size], R=R, dropout_p=dropout_p, dtype=DTYPE, device=DEVICE)
    if strategy == "fused" and ("odd" in size or "few" in size or R > 32):
        pytest.skip("the fused kernel does not take it")
    check(case, "triton")
    assert differing(case, TIMES) == set()
