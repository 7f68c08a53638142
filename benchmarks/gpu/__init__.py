"""The parts of `benchmarks/gpu_report.py`. Importing this puts the checkout's own ilora, with its kernels, in front of
whatever is installed: the figures are then those of the commit that the report names."""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def use_checkout() -> None:
    """ilora, ilora.kernels and the tests' cases from this folder, installed or not; what is imported already stays."""
    for folder, place in ((ROOT, 0), (ROOT / "tests", len(sys.path) + 1)):
        if str(folder) not in sys.path:
            sys.path.insert(place, str(folder))
    if "ilora.kernels" in sys.modules or importlib.util.find_spec("triton") is None:
        return
    ilora = importlib.import_module("ilora")
    folder = ROOT / "kernels" / "triton"
    file, name = folder / "__init__.py", "ilora.kernels"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    setattr(ilora, "kernels", module)  # noqa: B010 (as an import would)
    spec.loader.exec_module(module)


use_checkout()
