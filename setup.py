"""Packages and the compiled libraries; all other metadata is in pyproject.toml.

Each library has an environment variable. auto (the default): build it, or install without it and say why.
1: fail if it cannot be built.  0: do not try.

ILORA_BUILD_EXT: the CPU kernels; they need torch and a C++ compiler. The other two are built only if these are.
ILORA_BUILD_CALL: a layer's call in C++, for the torch that is installed now.
ILORA_BUILD_CUDA: the CUDA kernels for decoding; they need nvcc and a torch for CUDA.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # such a Python has no limited API
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized", "-g0"]
STABLE = {  # libtorch's stable ABI: the library works with every torch from 2.10 on, and with every Python
    "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000")],
    "py_limited_api": not FREE_THREADED,
}


def sources(*folders: str) -> dict:
    """The C++ and CUDA files in these folders of csrc, and the headers that a new build depends on."""
    files = sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.*"))
    compiled = [file for file in files if file.endswith((".cpp", ".cu"))]
    return {"sources": compiled, "depends": [file for file in files if file not in compiled]}


def cpu_kernels():
    import torch
    from torch.utils.cpp_extension import CppExtension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"torch {torch.__version__} is older than 2.10, the first with the stable ABI")
    flags = [*CXX_FLAGS, "-ffp-contract=fast"]
    return CppExtension("ilora._native", **sources("", "cpu"), **STABLE, extra_compile_args=flags)


def layer_call():
    import torch
    from torch.utils.cpp_extension import CppExtension

    version = ("ILORA_TORCH_VERSION", torch.__version__)
    return CppExtension("ilora._call", **sources("call"), define_macros=[version], extra_compile_args=CXX_FLAGS)


def cuda_kernels():
    import torch

    nvcc = shutil.which(str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")) if "CUDA_HOME" in os.environ else "nvcc")
    if torch.version.cuda is None or nvcc is None:
        raise ImportError(f"they need nvcc (found: {nvcc}) and a torch for CUDA (found: {torch.__version__})")
    if "CUDA_HOME" not in os.environ:  # nvcc may be a script that calls the toolkit's: the toolkit itself knows
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        os.environ["CUDA_HOME"] = told.partition("TOP=")[2].splitlines()[0]
    from torch.utils.cpp_extension import CUDAExtension

    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for GPUs yet to come
    flags = {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", *codes]}
    return CUDAExtension("ilora._native_cuda", **sources("cuda"), **STABLE, extra_compile_args=flags)


ROOMS = ("op", "grouped", "gates", "adapter", "storage", "model")
LIBRARIES = {  # in the order in which they are built
    "ILORA_BUILD_EXT": ("the native CPU backend", cpu_kernels),
    "ILORA_BUILD_CALL": ("a layer's call in C++", layer_call),
    "ILORA_BUILD_CUDA": ("the CUDA kernels for decoding", cuda_kernels),
}


def asked(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        sys.exit(f"{variable}={value!r}: expected 0, 1 or auto")
    return value


def attempt(make: Callable[[str], Extension], variables: Iterable[str]) -> dict[str, Extension]:
    """make(variable) for each library, as far as that works; what fails is left out with a word, or raised if its
    variable is 1."""
    made = {}
    for variable in variables:
        try:
            if variable != "ILORA_BUILD_EXT" and "ILORA_BUILD_EXT" not in made:
                raise RuntimeError("it needs the native CPU backend, which is not built")
            made[variable] = make(variable)
        except (Exception, SystemExit) as error:
            if asked(variable) == "1":
                raise
            what = LIBRARIES[variable][0]
            print(f"ilora: installing without {what}: {type(error).__name__}: {error}", file=sys.stderr)
    return made


def build_command(extensions: dict[str, Extension]) -> type:
    """torch's build command, made to go on without a library that cannot be built."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = "build"  # kept between builds, so that ninja compiles only what has changed

        def build_one(self, variable):
            self.extensions = [extensions[variable]]
            super().build_extensions()
            return extensions[variable]

        def build_extensions(self):
            built = attempt(self.build_one, extensions)
            self.extensions = self.distribution.ext_modules = list(built.values())

    return Build


class Wheel(bdist_wheel):
    """Builds the libraries before the wheel is named: without any it is a wheel for every platform."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


os.chdir(Path(__file__).resolve().parent)
if sys.platform == "darwin":  # Python may be built for two architectures, torch is for one
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
to_build = attempt(lambda variable: LIBRARIES[variable][1](), [v for v in LIBRARIES if asked(v) != "0"])
with tempfile.TemporaryDirectory() as scratch:  # a folder of modules that stayed would put deleted ones into a wheel
    setup(
        packages=["ilora", *(f"ilora.{room}" for room in ROOMS), "ilora.kernels"],
        package_dir={"ilora": "ilora", "ilora.kernels": "kernels/triton"},
        ext_modules=list(to_build.values()),
        cmdclass={"bdist_wheel": Wheel} | ({"build_ext": build_command(to_build)} if to_build else {}),
        options={
            "build": {"build_lib": scratch},
            "bdist_wheel": {} if FREE_THREADED or not to_build else {"py_limited_api": "cp310"},
        },
    )
