"""Packages and the optional native library; all other metadata is in pyproject.toml.

ILORA_BUILD_EXT=auto (default): build the library if torch and a compiler are here, else install without it and say why.
ILORA_BUILD_EXT=1: fail when it cannot be built.  ILORA_BUILD_EXT=0: do not try.
ILORA_BUILD_CUDA=auto, 1 or 0: the same for the CUDA kernels of decoding beside it, which need nvcc and a CUDA torch.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # such a Python has no limited API to be named for
COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}  # those that need the library


def native_extension() -> Extension:
    """The library against libtorch's stable ABI: it outlives upgrades of torch and of Python."""
    import torch
    from torch.utils import cpp_extension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"torch {torch.__version__} is older than 2.10, the first with this stable ABI")
    sources = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file() and "cuda" not in path.parts)
    return Extension(
        "ilora._native",  # a library of torch ops, not a Python module: no Python header is needed, see ilora/native.py
        sources=[path for path in sources if path.endswith(".cpp")],
        depends=[path for path in sources if not path.endswith(".cpp")],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
        py_limited_api=not FREE_THREADED,
    )


def cuda_extension(directory: str) -> Extension:
    """A library of its own, so that the CPU's needs no CUDA: nvcc compiles the kernels, the C++ compiler the ops."""
    import torch

    if torch.version.cuda is None:
        raise ImportError(f"torch {torch.__version__} is not built for CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if not nvcc or not Path(nvcc).exists():
        raise FileNotFoundError("nvcc is neither on the PATH nor in CUDA_HOME")
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for GPUs yet to come
    kernels = str(Path(directory) / "decode.o")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes]
    subprocess.run([nvcc, *flags, "-c", "csrc/cuda/decode.cu", "-o", kernels], check=True)
    trial = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], check=True, capture_output=True, text=True)
    toolkit = Path(trial.stderr.partition("TOP=")[2].splitlines()[0])  # where nvcc may be a script that calls another
    extension = native_extension()
    extension.name, extension.sources = "ilora._native_cuda", ["csrc/cuda/ops_cuda.cpp"]
    extension.extra_objects = [kernels]
    extension.define_macros += [("USE_CUDA", None)]  # torch's headers then declare the current stream
    extension.library_dirs += [str(path) for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir()]
    extension.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    return extension


class PlaceBuilt(build_ext):
    """Puts the libraries that are already built where setuptools wants them."""

    placed: dict[str, Path] = {}

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.placed[ext.name], target)


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


def attempt(variable: str, what: str, extension: Callable[[], Extension], directory: str) -> list[Extension]:
    """The extension, built, or none where `variable` says 0 or it cannot be built, unless that says 1."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("0", "1", "auto"):
        sys.exit(f"{variable}={mode!r}: expected 0, 1 or auto")
    if mode == "0":
        return []
    try:
        built = extension()
        PlaceBuilt.placed[built.name] = build(built, directory)
    except (Exception, SystemExit) as error:
        if mode == "1":
            raise
        print(f"ilora: installing without {what}: {type(error).__name__}: {error}", file=sys.stderr)
        return []
    return [built]


def native_arguments(directory: str) -> dict:
    """setup()'s arguments for the native libraries: none where not wanted, not needed now, or not to be built."""
    if not COMMANDS.intersection(sys.argv):
        return {}
    extensions = attempt("ILORA_BUILD_EXT", "the native CPU backend", native_extension, directory)
    if extensions:  # it defines the ops that the other implements
        kernels = "the CUDA kernels of decoding"
        extensions += attempt("ILORA_BUILD_CUDA", kernels, lambda: cuda_extension(directory), directory)
    elif os.environ.get("ILORA_BUILD_CUDA") == "1":
        sys.exit("ILORA_BUILD_CUDA=1: the CUDA kernels need the native library too, which is not built")
    if not extensions:
        return {}
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": PlaceBuilt},
        "options": {} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(Path(__file__).resolve().parent)
with tempfile.TemporaryDirectory() as scratch:
    arguments = native_arguments(scratch)
    # a build folder that stays would put modules that are gone since into the next wheel
    arguments.setdefault("options", {})["build"] = {"build_base": str(Path(scratch) / "build")}
    setup(
        packages=["ilora", "ilora.op", "ilora.gates", "ilora.adapter", "ilora.storage", "ilora.model", "ilora.kernels"],
        package_dir={"ilora": "ilora", "ilora.kernels": "kernels/triton"},
        **arguments,
    )
