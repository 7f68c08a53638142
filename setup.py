"""Packages and the optional native library; all other metadata is in pyproject.toml.

ILORA_BUILD_EXT=auto (default): build the library if torch and a compiler are here, else install without it and say why.
ILORA_BUILD_EXT=1: fail when it cannot be built.  ILORA_BUILD_EXT=0: do not try.
"""

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}  # those that need the library


def native_extension() -> Extension:
    """The library against libtorch's stable ABI: it outlives upgrades of torch and of Python."""
    import torch
    from torch.utils import cpp_extension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"torch {torch.__version__} is older than 2.10, the first with this stable ABI")
    sources = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
    return Extension(
        "ilora._native",  # a library of torch ops, not a Python module: no Python header is needed, see ilora/native.py
        sources=[path for path in sources if path.endswith(".cpp")],
        depends=[path for path in sources if not path.endswith(".cpp")],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
        py_limited_api=True,
    )


class PlaceBuilt(build_ext):
    """Puts the library that is already built where setuptools wants it."""

    library: Path

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.library, target)


def build(extension: Extension, directory: str) -> Path:
    """Builds before setup() runs: a wheel is named for a platform, or not, before setuptools would try to compile."""
    if sys.platform == "darwin":
        os.environ.setdefault(
            "ARCHFLAGS", f"-arch {platform.machine()}"
        )  # torch has one architecture, python may have two
    command = build_ext(Distribution({"name": "ilora", "ext_modules": [extension]}))
    command.build_lib = command.build_temp = directory
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(extension.name))


def native_arguments(directory: str) -> dict:
    """setup()'s arguments for the native library: none where it is not wanted, not needed now, or cannot be built."""
    mode = os.environ.get("ILORA_BUILD_EXT", "auto")
    if mode not in ("0", "1", "auto"):
        sys.exit(f"ILORA_BUILD_EXT={mode!r}: expected 0, 1 or auto")
    if mode == "0" or not COMMANDS.intersection(sys.argv):
        return {}
    try:
        extension = native_extension()
        PlaceBuilt.library = build(extension, directory)
    except (Exception, SystemExit) as error:
        if mode == "1":
            raise
        print(f"ilora: installing without the native CPU backend: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": PlaceBuilt},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(Path(__file__).resolve().parent)
with tempfile.TemporaryDirectory() as scratch:
    setup(
        packages=["ilora", "ilora.storage", "ilora.kernels"],
        package_dir={"ilora": "ilora", "ilora.kernels": "kernels/triton"},
        **native_arguments(scratch),
    )
