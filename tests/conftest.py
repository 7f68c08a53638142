"""The backends under test. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import gc
import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ilora.kernels is imported


def quicken_interpreter():
    """Triton's interpreter prepares triton.language at every call of a device function, which takes a quarter of its
    time; once for each launch is enough."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version's, left as it is
        return
    prepare, launch, language = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.tl
    prepared = set()

    def prepare_once(function):
        modules = frozenset(m.__name__ for m in (language, language.core) if m in function.__globals__.values())
        scope = interpreter._LangPatchScope() if modules in prepared else prepare(function)
        prepared.add(modules)
        return scope

    def launch_anew(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_anew


if not GPU and importlib.util.find_spec("triton"):
    quicken_interpreter()

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


def pytest_collection_finish():
    gc.freeze()  # a collection then passes over the million objects that imports have made


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
