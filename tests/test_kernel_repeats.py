"""The Triton kernels give the same bits every time: on a GPU 200 times over, in the interpreter three times.

Triton's compilers have made kernels with several products in a loop that are right most of the time.
ILORA_TEST_REPEATS says another number, for a memory checker, say.
"""

import os

import pytest
import torch
from cases import BF16, F16, OUTPUTS, Case, check

import ilora
from ilora.op import backends

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", BF16) if GPU else ("cpu", F16)
TIMES = int(os.environ.get("ILORA_TEST_REPEATS", 200 if GPU else 3))
SIZES = {
    "small": {"M": 96, "N": 3, "d_in": 136, "d_out": 200},
    "small, odd": {"M": 67, "N": 1, "d_in": 131, "d_out": 97},
    "small, few rows": {"M": 7, "N": 7, "d_in": 136, "d_out": 200},
}
if GPU:
    SIZES |= {"large": {"M": 4096, "N": 8, "d_in": 1024, "d_out": 1024}}
    SIZES |= {"odd": {"M": 1000, "N": 1, "d_in": 1001, "d_out": 777}}
RANKS = [8, 16, 32, 64] if GPU else [16]
FUSED = [(name, "fused", R) for name in SIZES if name in ("small", "large") for R in RANKS if R <= 32]
OTHERS = [(name, "auto" if "few" in name else "beta", R) for name in SIZES for R in RANKS]
pytestmark = [pytest.mark.gpu] * GPU
if (reason := backends.why_not("triton", DEVICE, DTYPE)) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("size", "strategy", "R"), FUSED + OTHERS)
def test_every_call_gives_the_same_bits(size, strategy, R, dropout_p, monkeypatch):
    if strategy == "fused" and GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the fused kernel needs sm_90 or later")
    monkeypatch.setenv("ILORA_STRATEGY", strategy)
    case = Case(**SIZES[size], R=R, dropout_p=dropout_p, dtype=DTYPE, device=DEVICE)
    check(case, "triton")
    tensors = case.tensors()
    first = results(tensors, dropout_p)
    for number in range(1, TIMES):
        again = results(tensors, dropout_p)
        assert [name for name in OUTPUTS if not torch.equal(first[name], again[name])] == [], f"call {number + 1}"


def results(tensors, dropout_p):
    leaves = [tensors[name].detach().requires_grad_() for name in ("x", "A", "B", "gate")]
    x, *low = leaves
    y = ilora.ilora_linear(x, tensors["weight"], tensors["bias"], *low, 2.0, None, dropout_p, 77, backend="triton")
    return dict(zip(OUTPUTS, (y.detach(), *torch.autograd.grad(y, leaves, tensors["dy"])), strict=True))
