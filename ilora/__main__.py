"""`python -m ilora`: versions, devices, and which backends work here and why not. Nothing more to install it needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import ilora
from ilora.op import backends, native


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text."""
    lines = [f"ilora {ilora.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines += [f"  {name} {_version(name)}" for name in ("torch", "triton", "transformers", "peft")]
    devices = [f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    types = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        devices += [f"{kind}:{i} ({module.get_device_name(i)})" for i in range(module.device_count())]
        types += [kind] * bool(module.device_count())
    lines += ["devices", *(f"  {device}" for device in devices), "backends"]
    for name in backends.NAMES:
        for kind in types:
            reason = backends.why_not(name, kind)
            lines.append(f"  {name:10} {kind:5} {'works' if reason is None else 'no: ' + reason}")
    reason = native.CALL_UNAVAILABLE
    lines.append(f"  {'call':10} cpu   {'works' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
