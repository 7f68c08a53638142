"""The backends under test. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ilora.kernels is imported

TARGETS = [("reference", "cpu"), ("native", "cpu"), ("triton", "cuda" if GPU else "cpu")] + [
    ("reference", "cuda")
] * GPU


@pytest.fixture(
    params=[
        pytest.param(target, id="-".join(target), marks=[pytest.mark.gpu] * (target[1] == "cuda")) for target in TARGETS
    ]
)
def target(request):
    """(backend, device), skipped with the backend's own reason where it cannot run."""
    from ilora.op import backends

    reason = backends.why_not(*request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
